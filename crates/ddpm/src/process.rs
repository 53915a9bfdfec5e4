//! The forward process and its posterior, on slices of any shape (Ho, Jain, Abbeel 2020).
//!
//! Numbers are f32, coefficients f64. The slices of a call have one length; `t` is below T.

use crate::schedule::Schedule;

/// The forward process in one step: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (Ho et al. 2020, eq. 4).
///
/// `eps` is standard normal noise.
pub fn q_sample(schedule: &Schedule, t: usize, x_0: &[f32], eps: &[f32], x_t: &mut [f32]) {
    let (signal, noise) = (schedule.alpha_bar(t).sqrt(), (1.0 - schedule.alpha_bar(t)).sqrt());
    for ((x_t, &x_0), &eps) in x_t.iter_mut().zip(x_0).zip(eps) {
        *x_t = (signal * f64::from(x_0) + noise * f64::from(eps)) as f32;
    }
}

/// The picture that a noise prediction means: `x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)` (eq. 15).
///
/// With `clip`, values are held within [-1, 1], where pictures live. At large t the division makes much of small errors
/// of `eps`, which clipping takes back.
pub fn predict_x0(schedule: &Schedule, t: usize, x_t: &[f32], eps: &[f32], clip: bool, x_0: &mut [f32]) {
    let (scale, noise) = (1.0 / schedule.alpha_bar(t).sqrt(), (1.0 - schedule.alpha_bar(t)).sqrt());
    for ((x_0, &x_t), &eps) in x_0.iter_mut().zip(x_t).zip(eps) {
        let x = scale * (f64::from(x_t) - noise * f64::from(eps));
        *x_0 = if clip { x.clamp(-1.0, 1.0) } else { x } as f32;
    }
}

/// The posterior's mean, `mu_tilde_t(x_t, x_0)` (eq. 7). With [`predict_x0`] unclipped it is eq. 11.
pub fn posterior_mean(schedule: &Schedule, t: usize, x_0: &[f32], x_t: &[f32], mean: &mut [f32]) {
    let p = schedule.posterior(t);
    for ((mean, &x_0), &x_t) in mean.iter_mut().zip(x_0).zip(x_t) {
        *mean = (p.x0 * f64::from(x_0) + p.xt * f64::from(x_t)) as f32;
    }
}
