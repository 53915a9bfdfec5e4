//! Factors of 16-bit whole numbers, for the forward pass with 16-bit factors: what is brought to the points spans few powers of two,
//! so that steps of one size keep four times as much of it as bf16, which spans 254 of them.
//!
//! Values and weights at point (i, j) are multiplied until no sum of products can leave 32 bits:
//!
//! ```text
//! |V[i,j]|                  <= g_i g_j max |d|                g: absolute sums of the input map's rows
//! sum over a run |U[i,j]|   <= h_i h_j max over taps of the sum over the run |w|       h: of the weights' map's
//! ```
//!
//! with one `max |d|` a tile, so that nothing depends on neighbours, and one for the weights a panel of columns. Sums over a run are
//! exact; then they are numbers again, times what they were divided by, and the sum goes on in f32. The worst that can be is far
//! from what is, but of normal numbers both factors still have an error of only about 3e-4 of the typical one.

use super::points::Weights;
use super::product::Winograd;
use super::transform::Maps;
use super::{Tile, load};
use crate::tile::Product;
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Words of k whose products are summed as whole numbers: whole vectors. Twice as many gain up to 5 % of time, and cost half a bit.
pub(super) const RUN: usize = 32;
/// What values become at most.
const VALUE: f32 = 16_320.0;
/// What the absolute weights of a run sum up to at most: times [`VALUE`], roundings and all, less than 2^31.
const WEIGHTS: f32 = 131_000.0;
/// What a weight becomes at most.
const WEIGHT: f32 = 32_700.0;

/// A number for each point.
pub(super) type Gains<const D: usize> = [[f32; D]; D];

/// Those where nothing is scaled.
pub(super) fn none<const D: usize>() -> Gains<D> {
    [[1.0; D]; D]
}

/// The absolute sums of a map's rows; `map` gives what it makes of the i-th unit.
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

/// `g` of both directions.
pub(super) fn input_gains<F: Maps<D, R>, const D: usize, const R: usize>() -> Gains<D> {
    let line = sums(D, |i| F::input_line(pulp::Scalar, unit(i)));
    line.map(|a| line.map(|b| a * b))
}

/// `h` of both directions.
pub(super) fn weight_gains<F: Maps<D, R>, const D: usize, const R: usize>() -> Gains<D> {
    let line = sums(D, |i| F::weights_line(pulp::Scalar, unit(i)));
    line.map(|a| line.map(|b| a * b))
}

/// What products of values and weights at a point are to be multiplied with, besides their steps.
pub(super) fn unit_at<F: Maps<D, R>, const D: usize, const R: usize>(point: usize) -> f32 {
    let (i, j) = (point / D, point % D);
    input_gains::<F, D, R>()[i][j] * weight_gains::<F, D, R>()[i][j]
}

/// What the numbers at each point are multiplied with, and what the whole numbers are to be multiplied with, but for the gains.
/// `step` is the size of 1; not finite is what holds a number that is not, and then so will be what is made of it.
pub(super) fn factors<const D: usize>(gains: &Gains<D>, step: f32) -> (Gains<D>, f32) {
    let factor = if step > 0.0 && step.is_finite() { step.recip().min(f32::MAX) } else { 0.0 };
    (gains.map(|row| row.map(|gain| factor / gain)), if factor > 0.0 { factor.recip() } else { step })
}

/// [`factors`] of a panel's weights, if words are of whole numbers.
pub(super) fn weight_factors<P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
    step: f32,
) -> (Gains<D>, f32) {
    if P::WHOLE { factors(&weight_gains::<F, D, R>(), step) } else { (none(), 1.0) }
}

/// The larger of two; NaN if one is.
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// A value times a factor, if words are of whole numbers.
#[inline(always)]
pub(super) fn scaled<S: Simd, P: Product>(s: S, x: S::f32s, by: f32) -> S::f32s {
    if P::WHOLE { s.mul_f32s(x, s.splat_f32s(by)) } else { x }
}

/// The largest of absolute values; NaN if one is NaN or infinite.
struct Largest<S: Simd> {
    most: S::f32s,
    /// Zero, until something is not finite.
    zero: S::f32s,
}

impl<S: Simd> Largest<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let zero = s.splat_f32s(0.0);
        Self { most: zero, zero }
    }

    #[inline(always)]
    fn see(&mut self, s: S, x: S::f32s) {
        self.most = s.max_f32s(self.most, s.abs_f32s(x));
        self.zero = s.mul_add_e_f32s(x, s.splat_f32s(0.0), self.zero);
    }

    #[inline(always)]
    fn get(&self, s: S) -> f32 {
        s.reduce_max_f32s(self.most) + s.reduce_sum_f32s(self.zero)
    }
}

impl Winograd {
    /// The step of a tile's values: of its largest input, `[n, h, w, cin]`.
    #[inline(always)]
    pub(super) fn value_step<S: Simd, const D: usize>(&self, s: S, tile: Option<Tile>, input: &[f32]) -> f32 {
        let Some(tile) = tile else { return 0.0 };
        let mut largest = Largest::new(s);
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
                    let (whole, rest) = S::as_simd_f32s(pixel);
                    for v in whole {
                        largest.see(s, *v);
                    }
                    if !rest.is_empty() {
                        largest.see(s, load(s, rest));
                    }
                }
            }
        }
        largest.get(s) / VALUE
    }

    /// The step of a panel's weights, as far as these words ask for it, which are of whole runs.
    #[inline(always)]
    pub(super) fn weight_step<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        panel: usize,
        words: Range<usize>,
        weights: &[f32],
    ) -> f32 {
        let (part, panel) = (panel / self.panels_of_part(), panel % self.panels_of_part());
        let (mut weight, mut sum) = (Largest::new(s), Largest::new(s));
        for v in 0..self.tile.nv {
            let column = panel * self.nr() + v * S::F32_LANES;
            let source = Weights { of_maps: PhantomData::<F>, of: self, part, column, weights };
            for first in words.clone().step_by(RUN) {
                let mut sums = [[s.splat_f32s(0.0); R]; R];
                // Two channels a word.
                for c in 2 * first..2 * words.end.min(first + RUN) {
                    source.taps::<S, R>(
                        s,
                        c,
                        #[inline(always)]
                        |i, j, w| {
                            weight.see(s, w);
                            sums[i][j] = s.add_f32s(sums[i][j], s.abs_f32s(w));
                        },
                    );
                }
                for line in sums {
                    for taps in line {
                        sum.see(s, taps);
                    }
                }
            }
        }
        let (weight, sum) = (weight.get(s) / WEIGHT, sum.get(s) / WEIGHTS);
        larger(weight, sum)
    }
}
