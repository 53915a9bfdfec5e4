//! Group, batch and layer normalisation.

use super::{silu, silu_derivative, sum_rows};
use crate::norm::NormShape;

/// `y = act(x_hat gamma + beta)`, `x_hat = (x - mean) / sqrt(variance + eps)`, mean and biased variance over the
/// pixels and channels of a group, `act` SiLU or nothing.
///
/// One image: `x [pixels, c]`, `gamma [c]`, `beta [c]`. Results `y [pixels, c]` and the statistics
/// `[groups]` means, then `[groups]` reciprocal standard deviations.
pub fn group_norm(shape: NormShape, x: &[f64], gamma: &[f64], beta: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let stats = group_stats(shape, x);
    let mut y = vec![0.0; x.len()];
    for at in 0..x.len() {
        let (channel, group) = channel_and_group(shape, at);
        let z = (x[at] - stats[group]) * stats[shape.groups + group] * gamma[channel] + beta[channel];
        y[at] = if shape.silu { silu(z) } else { z };
    }
    (y, stats)
}

/// The gradients of [`group_norm`] with respect to `x`, `gamma` and `beta`. With `dz` the gradient before the
/// activation and `d = dz gamma`: `dx = (d - mean(d) - x_hat mean(d x_hat)) / sqrt(variance + eps)`, means
/// over the group; `dgamma = sum over pixels of dz x_hat`; `dbeta = sum over pixels of dz`.
///
/// One image: `x, dy [pixels, c]`; results `[pixels, c]`, `[c]`, `[c]`.
pub fn group_norm_backward(
    shape: NormShape,
    x: &[f64],
    dy: &[f64],
    gamma: &[f64],
    beta: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let stats = group_stats(shape, x);
    let (mean, rstd) = stats.split_at(shape.groups);
    let count = (x.len() / shape.groups) as f64;
    let x_hat = |at: usize| {
        let (_, group) = channel_and_group(shape, at);
        (x[at] - mean[group]) * rstd[group]
    };
    let dz = |at: usize| {
        let (channel, _) = channel_and_group(shape, at);
        let z = x_hat(at) * gamma[channel] + beta[channel];
        if shape.silu { dy[at] * silu_derivative(z) } else { dy[at] }
    };
    let (mut dgamma, mut dbeta) = (vec![0.0; shape.channels], vec![0.0; shape.channels]);
    let (mut mean_d, mut mean_d_x_hat) = (vec![0.0; shape.groups], vec![0.0; shape.groups]);
    for at in 0..x.len() {
        let (channel, group) = channel_and_group(shape, at);
        dgamma[channel] += dz(at) * x_hat(at);
        dbeta[channel] += dz(at);
        mean_d[group] += dz(at) * gamma[channel] / count;
        mean_d_x_hat[group] += dz(at) * gamma[channel] * x_hat(at) / count;
    }
    let dx = (0..x.len()).map(|at| {
        let (channel, group) = channel_and_group(shape, at);
        rstd[group] * (dz(at) * gamma[channel] - mean_d[group] - x_hat(at) * mean_d_x_hat[group])
    });
    (dx.collect(), dgamma, dbeta)
}

/// Channel and group of element `at` of an image.
fn channel_and_group(shape: NormShape, at: usize) -> (usize, usize) {
    let channel = at % shape.channels;
    (channel, channel / (shape.channels / shape.groups))
}

/// `[groups]` means, then `[groups]` reciprocal standard deviations.
fn group_stats(shape: NormShape, x: &[f64]) -> Vec<f64> {
    let count = (x.len() / shape.groups) as f64;
    let (mut mean, mut variance) = (vec![0.0; shape.groups], vec![0.0; shape.groups]);
    for (at, x) in x.iter().enumerate() {
        mean[channel_and_group(shape, at).1] += x / count;
    }
    for (at, x) in x.iter().enumerate() {
        let group = channel_and_group(shape, at).1;
        variance[group] += (x - mean[group]).powi(2) / count;
    }
    mean.extend(variance.iter().map(|v| 1.0 / (v + f64::from(shape.eps)).sqrt()));
    mean
}

/// Normalises rows `[rows, channels]` channel by channel over all rows:
/// `(x - mean) / sqrt(variance + eps) gamma + beta`; also returns the means and the biased variances,
/// `[channels]` each.
pub fn batch_norm(eps: f64, x: &[f64], gamma: &[f64], beta: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let c = gamma.len();
    let rows = (x.len() / c) as f64;
    let mean: Vec<f64> = sum_rows(x, c).iter().map(|s| s / rows).collect();
    let squares: Vec<f64> = x.iter().enumerate().map(|(i, x)| (x - mean[i % c]).powi(2)).collect();
    let variance: Vec<f64> = sum_rows(&squares, c).iter().map(|s| s / rows).collect();
    let value = |(i, x): (usize, &f64)| {
        (x - mean[i % c]) / (variance[i % c] + eps).sqrt() * gamma[i % c] + beta[i % c]
    };
    (x.iter().enumerate().map(value).collect(), mean, variance)
}

/// Normalises each of the rows `[rows, channels]` over its channels, then `* gamma + beta`.
pub fn layer_norm(eps: f64, x: &[f64], gamma: &[f64], beta: &[f64]) -> Vec<f64> {
    let c = gamma.len();
    let row = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / c as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
        let of = |i: usize| (x[i] - mean) / (variance + eps).sqrt() * gamma[i] + beta[i];
        (0..c).map(of).collect::<Vec<_>>()
    };
    x.chunks_exact(c).flat_map(row).collect()
}
