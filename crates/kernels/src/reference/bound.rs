//! Terms of the variational bound.

use crate::bound::BoundStep;

/// Sum of an image's terms of the variational bound, in nats (Ho et al. 2020, eq. 5 and 13), from variances
/// instead of their logarithms.
pub fn bound_sum(step: &BoundStep, output: &[f64], v: &[f64], x_0: &[f64], x_t: &[f64]) -> f64 {
    let (low, high) = (step.log_variance.0.exp(), step.log_variance.1.exp());
    let below = |z: f64| 0.5 * libm::erfc(-z / 2f64.sqrt());
    let term = |i: usize| {
        let mean = step.to_x_0.0 * x_t[i] + step.to_x_0.1 * output[i];
        let variance = low.powf(0.5 - 0.5 * v[i]) * high.powf(0.5 + 0.5 * v[i]);
        if !step.decoder {
            let difference = step.posterior_x_0 * (x_0[i] - mean);
            return 0.5 * ((variance / low).ln() + (low + difference * difference) / variance - 1.0);
        }
        // Mirrored if it lies above the mean: near 1 the CDF loses precision.
        let (x, mean) = if x_0[i] > mean { (-x_0[i], -mean) } else { (x_0[i], mean) };
        let edge = |side: f64| below((x + side / 255.0 - mean) / variance.sqrt());
        let from = if x < -0.999 { 0.0 } else { edge(-1.0) };
        let to = if x > 0.999 { 1.0 } else { edge(1.0) };
        -(to - from).max(1e-12).ln()
    };
    (0..x_0.len()).map(term).sum()
}
