//! Elementwise losses: sums and gradients.

use crate::isa::{Isa, dispatch};
use crate::vector::{fold2, map2};
use pulp::Simd;

/// Loss as a function of the difference d of prediction and target, averaged over all elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// `d^2`.
    Mse,
    /// `|d|`.
    L1,
    /// `d^2 / 2` up to `|d| = delta` and `delta (|d| - delta / 2)` from there on (Huber 1964; PyTorch's `huber_loss`).
    Huber {
        /// Where the parabola becomes a line; above 0.
        delta: f32,
    },
}

/// Sum of the losses of `a - b`, accumulated in f64 over runs of 4096.
pub fn sum(isa: Isa, loss: Loss, a: &[f32], b: &[f32]) -> f64 {
    #[inline(always)]
    fn run<S: Simd>(s: S, loss: Loss, a: &[f32], b: &[f32]) -> f64 {
        match loss {
            Loss::Mse => fold2(
                s,
                a,
                b,
                #[inline(always)]
                |a, b, total| {
                    let d = s.sub_f32s(a, b);
                    s.mul_add_e_f32s(d, d, total)
                },
            ),
            Loss::L1 => fold2(
                s,
                a,
                b,
                #[inline(always)]
                |a, b, total| s.add_f32s(total, s.abs_f32s(s.sub_f32s(a, b))),
            ),
            Loss::Huber { delta } => {
                let (delta, half) = (s.splat_f32s(delta), s.splat_f32s(-0.5));
                fold2(
                    s,
                    a,
                    b,
                    // m (d - m / 2) with m = min(d, delta), for d >= 0. A comparison, because min with NaN
                    // returns a number on some machines.
                    #[inline(always)]
                    |a, b, total| {
                        let d = s.abs_f32s(s.sub_f32s(a, b));
                        let m = s.select_f32s(s.greater_than_f32s(d, delta), delta, d);
                        s.mul_add_e_f32s(m, s.mul_add_e_f32s(half, m, d), total)
                    },
                )
            }
        }
    }
    assert_eq!(a.len(), b.len());
    dispatch!(isa, s => run(s, loss, a, b))
}

/// `out = factor * dloss/dd` at `d = a - b`: `2 d`, the sign of d (0 at 0), or d clamped to [-delta, delta].
pub fn grad(isa: Isa, loss: Loss, factor: f32, a: &[f32], b: &[f32], out: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, loss: Loss, factor: f32, a: &[f32], b: &[f32], out: &mut [f32]) {
        out.copy_from_slice(a);
        // As in the sums, comparisons propagate NaN.
        match loss {
            Loss::Mse => {
                let f = s.splat_f32s(2.0 * factor);
                map2(
                    s,
                    out,
                    b,
                    #[inline(always)]
                    |a, b| s.mul_f32s(f, s.sub_f32s(a, b)),
                );
            }
            Loss::L1 => {
                let (f, zero) = (s.splat_f32s(factor), s.splat_f32s(0.0));
                let (one, minus_one) = (s.splat_f32s(1.0), s.splat_f32s(-1.0));
                map2(
                    s,
                    out,
                    b,
                    #[inline(always)]
                    |a, b| {
                        let d = s.sub_f32s(a, b);
                        let sign = s.select_f32s(s.less_than_f32s(d, zero), minus_one, d);
                        s.mul_f32s(f, s.select_f32s(s.greater_than_f32s(d, zero), one, sign))
                    },
                );
            }
            Loss::Huber { delta } => {
                let f = s.splat_f32s(factor);
                let (low, high) = (s.splat_f32s(-delta), s.splat_f32s(delta));
                map2(
                    s,
                    out,
                    b,
                    #[inline(always)]
                    |a, b| {
                        let d = s.sub_f32s(a, b);
                        let d = s.select_f32s(s.less_than_f32s(d, low), low, d);
                        s.mul_f32s(f, s.select_f32s(s.greater_than_f32s(d, high), high, d))
                    },
                );
            }
        }
    }
    dispatch!(isa, s => run(s, loss, factor, a, b, out))
}
