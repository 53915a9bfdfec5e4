//! Layer normalisation of rows `[rows, channels]` (Ba, Kiros, Hinton 2016), forward and backward.
//!
//! `y = x_hat gamma + beta` with `x_hat = (x - mean) rstd` over the channels of each row.

use crate::isa::{Isa, dispatch};
use crate::norm::{load, store};
use crate::vector;
use pulp::Simd;

/// Operands of the backward pass of some rows: those and the result of the forward pass, and the output gradient.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Scale, `[channels]`.
    pub gamma: &'a [f32],
    /// The input, `[rows, channels]`.
    pub x: &'a [f32],
    /// Each row's mean and reciprocal standard deviation, `[rows, 2]`.
    pub stats: &'a [f32],
    /// The output gradient, `[rows, channels]`.
    pub dy: &'a [f32],
}

/// Forward pass; `stats` (`[rows, 2]`) receives each row's mean and reciprocal standard deviation.
pub fn layer_norm(
    isa: Isa,
    eps: f32,
    gamma: &[f32],
    beta: &[f32],
    x: &[f32],
    y: &mut [f32],
    stats: &mut [f32],
) {
    assert_eq!((x.len(), x.len() * 2), (y.len(), stats.len() * gamma.len()));
    dispatch!(isa, s => forward(s, eps, gamma, beta, x, y, stats))
}

#[inline(always)]
fn forward<S: Simd>(
    s: S,
    eps: f32,
    gamma: &[f32],
    beta: &[f32],
    x: &[f32],
    y: &mut [f32],
    stats: &mut [f32],
) {
    let c = gamma.len();
    for ((x, y), stats) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(stats.chunks_exact_mut(2)) {
        let mean = vector::sum(s, x) / c as f32;
        let m = s.splat_f32s(mean);
        let mut squares = 0.0;
        // y holds the centred row until the variance is known.
        for start in (0..c).step_by(S::F32_LANES) {
            let at = start..c.min(start + S::F32_LANES);
            store(s, &mut y[at.clone()], s.sub_f32s(load(s, &x[at.clone()]), m));
            let d = load(s, &y[at]);
            squares += s.reduce_sum_f32s(s.mul_f32s(d, d));
        }
        let rstd = 1.0 / (squares / c as f32 + eps).sqrt();
        stats.copy_from_slice(&[mean, rstd]);
        let r = s.splat_f32s(rstd);
        for start in (0..c).step_by(S::F32_LANES) {
            let at = start..c.min(start + S::F32_LANES);
            let x_hat = s.mul_f32s(load(s, &y[at.clone()]), r);
            let v = s.mul_add_e_f32s(x_hat, load(s, &gamma[at.clone()]), load(s, &beta[at.clone()]));
            store(s, &mut y[at], v);
        }
    }
}

/// Backward pass; `dx` is `[rows, channels]`, `dgamma` and `dbeta` (`[channels]`) receive the contribution of
/// these rows.
///
/// `dx = rstd (g - mean(g) - x_hat mean(g x_hat))` with `g = dy gamma`; `dgamma = sum dy x_hat`,
/// `dbeta = sum dy`.
pub fn layer_norm_backward(
    isa: Isa,
    saved: Saved<'_>,
    dx: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
) {
    assert_eq!((saved.x.len(), saved.x.len()), (saved.dy.len(), dx.len()));
    dispatch!(isa, s => backward(s, saved, dx, dgamma, dbeta))
}

#[inline(always)]
fn backward<S: Simd>(
    s: S,
    Saved { gamma, x, stats, dy }: Saved<'_>,
    dx: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
) {
    let c = gamma.len();
    dgamma.fill(0.0);
    dbeta.fill(0.0);
    let rows =
        x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)).zip(stats.chunks_exact(2));
    for (((x, dy), dx), stats) in rows {
        let (mean, rstd) = (s.splat_f32s(stats[0]), s.splat_f32s(stats[1]));
        let (mut sum, mut dot) = (s.splat_f32s(0.0), s.splat_f32s(0.0));
        for start in (0..c).step_by(S::F32_LANES) {
            let at = start..c.min(start + S::F32_LANES);
            let x_hat = s.mul_f32s(s.sub_f32s(load(s, &x[at.clone()]), mean), rstd);
            let dy = load(s, &dy[at.clone()]);
            // Past the end of the row dy and gamma are 0, whatever x_hat is.
            let g = s.mul_f32s(dy, load(s, &gamma[at.clone()]));
            sum = s.add_f32s(sum, g);
            dot = s.mul_add_e_f32s(g, x_hat, dot);
            let to = s.mul_add_e_f32s(dy, x_hat, load(s, &dgamma[at.clone()]));
            store(s, &mut dgamma[at.clone()], to);
            let to = s.add_f32s(dy, load(s, &dbeta[at.clone()]));
            store(s, &mut dbeta[at], to);
        }
        let share = 1.0 / c as f32;
        let (sum, dot) =
            (s.splat_f32s(s.reduce_sum_f32s(sum) * share), s.splat_f32s(s.reduce_sum_f32s(dot) * share));
        for start in (0..c).step_by(S::F32_LANES) {
            let at = start..c.min(start + S::F32_LANES);
            let x_hat = s.mul_f32s(s.sub_f32s(load(s, &x[at.clone()]), mean), rstd);
            let g = s.mul_f32s(load(s, &dy[at.clone()]), load(s, &gamma[at.clone()]));
            let rest = s.sub_f32s(s.sub_f32s(g, sum), s.mul_f32s(x_hat, dot));
            store(s, &mut dx[at], s.mul_f32s(rest, rstd));
        }
    }
}
