//! int16 operands for the forward pass with 16-bit operands: values at the points span few powers of two, so
//! that a uniform step keeps four times as much precision as bf16, which spans 254 of them.
//!
//! Values and weights at point (i, j) are scaled so that no sum of products can overflow 32 bits:
//!
//! ```text
//! |V[i,j]|                  <= g_i g_j max |d|                g: absolute row sums of the input transform
//! sum over a run |U[i,j]|   <= h_i h_j max over taps of the sum over the run |w|       h: of the weight transform
//! ```
//!
//! with one `max |d|` for each tile, so that nothing depends on neighbours, and one weight bound for each
//! panel of columns. Sums over a run are exact; then they are dequantized and accumulated in f32. The worst
//! case is far from typical, but for normally distributed data both operands still have an error of only
//! about 3e-4 of the typical value.

use super::plan::Winograd;
use super::points::Weights;
use super::transform::Maps;
use super::{Tile, load};
use crate::tile::DotKernel;
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Words of k whose products are summed as integers, a multiple of a vector. Doubling it gains up to 5 % of
/// time and costs half a bit.
pub(super) const RUN: usize = 32;
/// Maximum quantized value.
const MAX_VALUE: f32 = 16_320.0;
/// Maximum sum of absolute quantized weights over a run: times [`MAX_VALUE`], including rounding, less than
/// 2^31.
const MAX_WEIGHT_SUM: f32 = 131_000.0;
/// Maximum quantized weight.
const MAX_WEIGHT: f32 = 32_700.0;

/// One factor for each point.
pub(super) type Gains<const D: usize> = [[f32; D]; D];

/// Factors of 1.
pub(super) fn unscaled<const D: usize>() -> Gains<D> {
    [[1.0; D]; D]
}

/// Absolute row sums of a transform; `map` transforms the i-th unit vector.
fn sums<const D: usize>(units: usize, map: impl Fn(usize) -> [f32; D]) -> [f32; D] {
    let mut sums = [0.0; D];
    for unit in 0..units {
        for (sum, x) in sums.iter_mut().zip(map(unit)) {
            *sum += x.abs();
        }
    }
    sums
}

fn unit<const N: usize>(i: usize) -> [f32; N] {
    std::array::from_fn(|j| if i == j { 1.0 } else { 0.0 })
}

/// `g_i g_j`.
pub(super) fn input_gains<F: Maps<D, R>, const D: usize, const R: usize>() -> Gains<D> {
    let line = sums(D, |i| F::input_line(pulp::Scalar, unit(i)));
    line.map(|a| line.map(|b| a * b))
}

/// `h_i h_j`.
pub(super) fn weight_gains<F: Maps<D, R>, const D: usize, const R: usize>() -> Gains<D> {
    let line = sums(D, |i| F::weights_line(pulp::Scalar, unit(i)));
    line.map(|a| line.map(|b| a * b))
}

/// Dequantization factor of products at a point, without the steps.
pub(super) fn dequant_at<F: Maps<D, R>, const D: usize, const R: usize>(point: usize) -> f32 {
    let (i, j) = (point / D, point % D);
    input_gains::<F, D, R>()[i][j] * weight_gains::<F, D, R>()[i][j]
}

/// Quantization factors at each point, and the dequantization factor without the gains. `step` is the value
/// of 1; it is not finite if any element is not, which then propagates to the result.
pub(super) fn quant_scales<const D: usize>(gains: &Gains<D>, step: f32) -> (Gains<D>, f32) {
    let factor = if step > 0.0 && step.is_finite() { step.recip().min(f32::MAX) } else { 0.0 };
    (gains.map(|row| row.map(|gain| factor / gain)), if factor > 0.0 { factor.recip() } else { step })
}

/// [`quant_scales`] of a panel's weights, if words are integers.
pub(super) fn weight_scales<P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
    step: f32,
) -> (Gains<D>, f32) {
    if P::IS_INT { quant_scales(&weight_gains::<F, D, R>(), step) } else { (unscaled(), 1.0) }
}

/// The maximum; NaN if either is NaN.
pub(super) fn nan_max(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// Scales a value if words are integers.
#[inline(always)]
pub(super) fn scaled<S: Simd, P: DotKernel>(s: S, x: S::f32s, by: f32) -> S::f32s {
    if P::IS_INT { s.mul_f32s(x, s.splat_f32s(by)) } else { x }
}

/// Running maximum of absolute values; NaN if any is NaN or infinite.
struct AbsMax<S: Simd> {
    max: S::f32s,
    /// Zero until an element is not finite.
    zero: S::f32s,
}

impl<S: Simd> AbsMax<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let zero = s.splat_f32s(0.0);
        Self { max: zero, zero }
    }

    #[inline(always)]
    fn update(&mut self, s: S, x: S::f32s) {
        self.max = s.max_f32s(self.max, s.abs_f32s(x));
        self.zero = s.mul_add_e_f32s(x, s.splat_f32s(0.0), self.zero);
    }

    #[inline(always)]
    fn get(&self, s: S) -> f32 {
        s.reduce_max_f32s(self.max) + s.reduce_sum_f32s(self.zero)
    }
}

impl Winograd {
    /// Quantization step of a tile's values, from its largest input, `[n, h, w, cin]`.
    #[inline(always)]
    pub(super) fn value_step<S: Simd, const D: usize>(&self, s: S, tile: Option<Tile>, input: &[f32]) -> f32 {
        let Some(tile) = tile else { return 0.0 };
        let mut largest = AbsMax::new(s);
        for part in &self.parts {
            let window = self.tiles.window(tile, part.first);
            let (h, w) = window.size;
            for i in 0..D {
                for j in 0..D {
                    let y = window.top.wrapping_add(window.step * i);
                    let x = window.left.wrapping_add(window.step * j);
                    if y >= h || x >= w {
                        continue;
                    }
                    let pixel = &input[((window.image * h + y) * w + x) * self.cin..][..self.cin];
                    let (full, rest) = S::as_simd_f32s(pixel);
                    for v in full {
                        largest.update(s, *v);
                    }
                    if !rest.is_empty() {
                        largest.update(s, load(s, rest));
                    }
                }
            }
        }
        largest.get(s) / MAX_VALUE
    }

    /// Quantization step that these words require for a panel's weights; the words are full runs.
    #[inline(always)]
    pub(super) fn weight_step<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        panel: usize,
        words: Range<usize>,
        weights: &[f32],
    ) -> f32 {
        let (part, panel) = (panel / self.panels_of_part(), panel % self.panels_of_part());
        let (mut weight, mut sum) = (AbsMax::new(s), AbsMax::new(s));
        for v in 0..self.tile.nv {
            let column = panel * self.nr() + v * S::F32_LANES;
            let source = Weights { maps: PhantomData::<F>, conv: self, part, column, weights };
            for first in words.clone().step_by(RUN) {
                let mut sums = [[s.splat_f32s(0.0); R]; R];
                // Two channels a word.
                for c in 2 * first..2 * words.end.min(first + RUN) {
                    source.taps::<S, R>(
                        s,
                        c,
                        #[inline(always)]
                        |i, j, w| {
                            weight.update(s, w);
                            sums[i][j] = s.add_f32s(sums[i][j], s.abs_f32s(w));
                        },
                    );
                }
                for line in sums {
                    for taps in line {
                        sum.update(s, taps);
                    }
                }
            }
        }
        let (weight, sum) = (weight.get(s) / MAX_WEIGHT, sum.get(s) / MAX_WEIGHT_SUM);
        nan_max(weight, sum)
    }
}
