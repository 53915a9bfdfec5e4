//! The forward process and its posterior, on slices of any shape (Ho, Jain, Abbeel 2020).
//!
//! Numbers are f32, coefficients f64. The slices of a call have one length; `t` is below T.

use crate::error::{Error, Result};
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
///
/// # Errors
/// [`Error::Config`] at a timestep that leaves nothing of the picture (`alpha_bar_t` = 0): any picture has that noise.
pub fn predict_x0(
    schedule: &Schedule,
    t: usize,
    x_t: &[f32],
    eps: &[f32],
    clip: bool,
    x_0: &mut [f32],
) -> Result<()> {
    if t >= schedule.timesteps_with_signal() {
        let reason = format!(
            "nothing is left of the picture at t = {t}, where the predicted noise says nothing about it; start at \
             t = {} or before",
            schedule.timesteps_with_signal().saturating_sub(1)
        );
        return Err(Error::Config { key: "diffusion.zero_terminal_snr".to_owned(), reason });
    }
    let (scale, noise) = (1.0 / schedule.alpha_bar(t).sqrt(), (1.0 - schedule.alpha_bar(t)).sqrt());
    for ((x_0, &x_t), &eps) in x_0.iter_mut().zip(x_t).zip(eps) {
        let x = scale * (f64::from(x_t) - noise * f64::from(eps));
        *x_0 = if clip { x.clamp(-1.0, 1.0) } else { x } as f32;
    }
    Ok(())
}

/// The posterior's mean, `mu_tilde_t(x_t, x_0)` (eq. 7). With [`predict_x0`] unclipped it is eq. 11.
pub fn posterior_mean(schedule: &Schedule, t: usize, x_0: &[f32], x_t: &[f32], mean: &mut [f32]) {
    let p = schedule.posterior(t);
    for ((mean, &x_0), &x_t) in mean.iter_mut().zip(x_0).zip(x_t) {
        *mean = (p.x0 * f64::from(x_0) + p.xt * f64::from(x_t)) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_says_nothing_where_no_signal_is_left() {
        let schedule = Schedule::linear(10, 1e-4, 0.02).unwrap().zero_terminal_snr().unwrap();
        let (x_t, mut x_0) = ([0.3, -2.0], [f32::NAN; 2]);
        let error = predict_x0(&schedule, 9, &x_t, &x_t, true, &mut x_0).unwrap_err().to_string();
        assert!(error.contains("zero_terminal_snr") && error.contains("t = 9") && error.contains("t = 8"));
        predict_x0(&schedule, 8, &x_t, &[0.1, 0.2], true, &mut x_0).unwrap();
        assert!(x_0.iter().all(|x| x.abs() <= 1.0));
        // Forwards it is what it says: noise.
        let mut noisy = [0.0; 2];
        q_sample(&schedule, 9, &[1.0, 1.0], &x_t, &mut noisy);
        assert_eq!(noisy, x_t);
    }
}
