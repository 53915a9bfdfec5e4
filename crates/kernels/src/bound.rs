//! Terms of the variational bound for images of 256 levels (Ho et al. 2020, eq. 5 and 13), and their
//! gradients with respect to a learned variance (Nichol, Dhariwal, "Improved Denoising Diffusion
//! Probabilistic Models", 2021, section 3.1).
//!
//! They are cheap next to the network and span many orders of magnitude: scalar f64, identical on every
//! instruction set.

/// Half the distance between two of 256 levels in [-1, 1].
const HALF_LEVEL: f64 = 1.0 / 255.0;
/// Beyond it a value belongs to the darkest or brightest level, whose bin is unbounded (Ho et al. 2020, eq.
/// 13).
const EDGE: f64 = 0.999;
/// Probabilities are clamped to this from below to keep their logarithm finite, as in the code of both
/// papers.
const MIN_PROBABILITY: f64 = 1e-12;

/// What the term of a timestep needs from the schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BoundStep {
    /// The predicted image is `to_x_0.0 x_t + to_x_0.1 output`.
    pub to_x_0: (f64, f64),
    /// Coefficient of `x_0` in the posterior mean (eq. 7).
    pub posterior_x_0: f64,
    /// Logarithms of the variances that a learned one interpolates: `beta_tilde_t` and `beta_t`.
    pub log_variance: (f64, f64),
    /// Whether this is the last step: its term is the decoder's, `-log p(x_0 | x_1)`, not a divergence.
    pub decoder: bool,
}

impl BoundStep {
    /// Log variance for the network output v: -1 is the lower bound, 1 the upper, linear between and beyond
    /// (Nichol, Dhariwal, eq. 15, with `(v + 1) / 2` for their v, as in their code).
    pub fn log_variance(&self, v: f64) -> f64 {
        let (low, high) = self.log_variance;
        let part = (v + 1.0) / 2.0;
        part * high + (1.0 - part) * low
    }

    /// The term of one element in nats, and its gradient with respect to the log variance; `x_0` is the true
    /// value, `mean_x_0` the predicted one.
    pub fn term(&self, x_0: f64, mean_x_0: f64, log_variance: f64) -> (f64, f64) {
        if self.decoder {
            let (log, grad) = log_likelihood(x_0, mean_x_0, 0.5 * log_variance);
            return (-log, -0.5 * grad);
        }
        // The x_t parts of both means are equal and cancel.
        kl(self.posterior_x_0 * (x_0 - mean_x_0), self.log_variance.0, log_variance)
    }
}

/// `KL(q || p)` of two normals in nats, and its gradient with respect to `log_p`; from the difference of
/// their means and their log variances.
pub fn kl(difference: f64, log_q: f64, log_p: f64) -> (f64, f64) {
    let ratio = libm::exp(log_q - log_p) + difference * difference * libm::exp(-log_p);
    (0.5 * (log_p - log_q - 1.0 + ratio), 0.5 * (1.0 - ratio))
}

/// Log probability of a level under a normal (eq. 13: the mass of the level's bin; the first and last bins
/// are unbounded), and its gradient with respect to the log standard deviation; `x` is one of 256 levels in
/// [-1, 1]. Probabilities are clamped to 1e-12 from below.
pub fn log_likelihood(x: f64, mean: f64, log_deviation: f64) -> (f64, f64) {
    let inverse = libm::exp(-log_deviation);
    let below = if x < -EDGE { f64::NEG_INFINITY } else { (x - mean - HALF_LEVEL) * inverse };
    let above = if x > EDGE { f64::INFINITY } else { (x - mean + HALF_LEVEL) * inverse };
    // Computed in the tail where both terms are small, to avoid cancellation.
    let probability = if below > 0.0 {
        normal_cdf(-below) - normal_cdf(-above)
    } else {
        normal_cdf(above) - normal_cdf(below)
    };
    if probability.is_nan() {
        return (f64::NAN, f64::NAN);
    }
    if probability <= MIN_PROBABILITY {
        return (MIN_PROBABILITY.ln(), 0.0);
    }
    (libm::log(probability), (z_density(below) - z_density(above)) / probability)
}

/// Standard normal CDF.
fn normal_cdf(z: f64) -> f64 {
    0.5 * libm::erfc(-z * std::f64::consts::FRAC_1_SQRT_2)
}

/// `z` times the standard normal density, the derivative of -[`normal_cdf`] by the log standard deviation; 0
/// at infinity.
fn z_density(z: f64) -> f64 {
    const INVERSE_ROOT: f64 = 0.398_942_280_401_432_7; // 1 / sqrt(2 pi)
    if z.is_infinite() { 0.0 } else { z * INVERSE_ROOT * libm::exp(-0.5 * z * z) }
}

/// Sum of the terms of an image, in nats. `output` is the network's prediction of the image, `v` of the
/// variance ([`BoundStep::log_variance`]); all slices have the length of the image.
pub fn sum(step: &BoundStep, output: &[f32], v: &[f32], x_0: &[f32], x_t: &[f32]) -> f64 {
    let mut total = 0.0;
    for_each_term(step, output, v, x_0, x_t, |_, (term, _)| total += term);
    total
}

/// `out = factor * d term / d v`. The mean gets no gradient: in the hybrid loss the bound only trains the
/// variance.
pub fn grad(
    step: &BoundStep,
    factor: f64,
    output: &[f32],
    v: &[f32],
    x_0: &[f32],
    x_t: &[f32],
    out: &mut [f32],
) {
    let by_v = factor * 0.5 * (step.log_variance.1 - step.log_variance.0);
    for_each_term(step, output, v, x_0, x_t, |i, (_, grad)| out[i] = (by_v * grad) as f32);
}

fn for_each_term(
    step: &BoundStep,
    output: &[f32],
    v: &[f32],
    x_0: &[f32],
    x_t: &[f32],
    mut f: impl FnMut(usize, (f64, f64)),
) {
    assert!([v.len(), x_0.len(), x_t.len()] == [output.len(); 3]);
    for (i, (((&output, &v), &x_0), &x_t)) in output.iter().zip(v).zip(x_0).zip(x_t).enumerate() {
        let mean_x_0 = step.to_x_0.0 * f64::from(x_t) + step.to_x_0.1 * f64::from(output);
        f(i, step.term(f64::from(x_0), mean_x_0, step.log_variance(f64::from(v))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    /// Normal density.
    fn density(x: f64, mean: f64, variance: f64) -> f64 {
        (-(x - mean).powi(2) / (2.0 * variance)).exp() / (std::f64::consts::TAU * variance).sqrt()
    }

    /// Integral from a to b (Simpson's rule).
    fn integral(a: f64, b: f64, f: impl Fn(f64) -> f64) -> f64 {
        const PIECES: usize = 4000;
        let h = (b - a) / (2 * PIECES) as f64;
        let weight = |i: usize| if i == 0 || i == 2 * PIECES { 1.0 } else { [2.0, 4.0][i % 2] };
        (0..=2 * PIECES).map(|i| weight(i) * f(a + i as f64 * h)).sum::<f64>() * h / 3.0
    }

    #[test]
    fn kl_matches_numeric_integration() {
        for (difference, q, p) in
            [(0.0, 1.0, 1.0), (0.3, 0.04, 0.09), (-1.0, 2.0, 0.5), (1e-3, 1e-4, 1.3e-4), (0.02, 1e-4, 1e-4)]
        {
            let reach = 12.0 * f64::sqrt(q);
            let log_ratio =
                |x: f64| 0.5 * (p / q).ln() - x * x / (2.0 * q) + (x - difference).powi(2) / (2.0 * p);
            let want = integral(-reach, reach, |x| density(x, 0.0, q) * log_ratio(x));
            let got = kl(difference, q.ln(), p.ln()).0;
            assert!(
                (got - want).abs() < 1e-9 * want.abs().max(1.0),
                "{difference}, {q}, {p}: {got}, not {want}"
            );
        }
    }

    #[test]
    fn level_probabilities_match_integration_and_sum_to_one() {
        let level = |i: usize| 2.0 * i as f64 / 255.0 - 1.0;
        for (mean, deviation) in
            [(0.0, 1.0), (0.3, 0.01), (-0.98, 0.004), (1.4, 0.2), (-1.0, 1e-3), (0.1, 30.0)]
        {
            let of = |i: usize| log_likelihood(level(i), mean, f64::ln(deviation)).0.exp();
            let total: f64 = (0..256).map(of).sum();
            // Each of the 256 may have been raised to 1e-12.
            assert!((total - 1.0).abs() < 256.0 * MIN_PROBABILITY, "{mean}, {deviation}: {total}");
            for i in [1, 100, 128, 165, 254] {
                let (a, b) = (level(i) - 1.0 / 255.0, level(i) + 1.0 / 255.0);
                let want = integral(a, b, |x| density(x, mean, deviation * deviation));
                assert!((of(i) - want.max(MIN_PROBABILITY)).abs() < 1e-9 * want.max(1e-3), "{i}: {}", of(i));
            }
        }
        // The first and last levels cover everything beyond them.
        for x in [-1.0, 1.0] {
            assert!(log_likelihood(x, 9.0 * x, 0.0).0.abs() < 1e-14);
        }
        // Far in the tail of a narrow normal no digits are lost.
        let far = log_likelihood(level(128), level(128) - 7.0 / 25.5, f64::ln(1.0 / 25.5)).0;
        let want = integral(6.9, 7.1, |z| density(z, 0.0, 1.0)).ln();
        assert!((far / want - 1.0).abs() < 1e-9, "{far}, {want}");
    }

    #[test]
    fn terms_and_gradients_match_the_oracle_and_finite_differences() {
        const H: f64 = 1e-5;
        let elems =
            |from: f32, by: f32| (0..97).map(move |i| ((i as f32 * by).sin() + from).clamp(-1.0, 1.0));
        let levels: Vec<f32> = (0..97).map(|i| (i * 255 / 96) as f32 / 127.5 - 1.0).collect();
        let (output, v): (Vec<f32>, Vec<f32>) = (elems(0.1, 0.7).collect(), elems(0.0, 1.3).collect());
        for decoder in [false, true] {
            let step =
                BoundStep { to_x_0: (1.1, -0.4), posterior_x_0: 0.3, log_variance: (-4.5, -2.0), decoder };
            let x_t: Vec<f32> = levels.iter().zip(&output).map(|(x, o)| (x + 0.4 * o) / 1.1 + 0.05).collect();
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let (o, w, x, t) = (wide(&output), wide(&v), wide(&levels), wide(&x_t));
            let want = reference::bound_sum(&step, &o, &w, &x, &t);
            let got = sum(&step, &output, &v, &levels, &x_t);
            assert!((got / want - 1.0).abs() < 1e-12, "{decoder}: {got}, not {want}");
            let mut grads = vec![f32::NAN; v.len()];
            grad(&step, 2.0, &output, &v, &levels, &x_t, &mut grads);
            for (i, &grad) in grads.iter().enumerate() {
                let side = |by: f64| {
                    let mut w = w.clone();
                    w[i] += by;
                    reference::bound_sum(&step, &o[i..=i], &w[i..=i], &x[i..=i], &t[i..=i])
                };
                let want = (side(H) - side(-H)) / H;
                assert!(
                    (f64::from(grad) - want).abs() < 1e-6 * want.abs().max(1e-2),
                    "{decoder}, {i}: {grad}, {want}"
                );
            }
        }
    }

    #[test]
    fn nan_propagates() {
        for decoder in [false, true] {
            let step =
                BoundStep { to_x_0: (1.0, -1.0), posterior_x_0: 1.0, log_variance: (-2.0, -1.0), decoder };
            let bad = [f32::NAN];
            assert!(sum(&step, &bad, &[0.0], &[0.0], &[0.0]).is_nan());
            assert!(sum(&step, &[0.0], &bad, &[0.0], &[0.0]).is_nan());
            let mut out = [0.0];
            grad(&step, 1.0, &bad, &[0.0], &[0.0], &[0.0], &mut out);
            assert!(out[0].is_nan(), "{decoder}");
        }
    }
}
