//! What is brought to the points: inputs and weights (gradients are the weight gradient's own), and how words are made of it.

use super::product::Part;
use super::transform::{Lines, Maps};
use super::whole::{Gains, scaled};
use super::{Winograd, load};
use crate::bf16::{self, Words};
use crate::tile::Product;
use pulp::Simd;
use std::marker::PhantomData;

/// The inputs of a tile.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub(super) picture: usize,
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) size: (usize, usize),
    pub(super) step: usize,
}

/// What is brought to the points.
pub(super) trait Source<S: Simd, const D: usize, const R: usize> {
    /// The values at the points of a vector of channels from `c` on, which go to `put(row, column, vector)`.
    fn bring(&self, s: S, lines: &mut Lines<S, D>, c: usize, put: impl FnMut(usize, usize, S::f32s));
}

/// A tile's inputs, `[n, h, w, cin]`; zero outside of the picture, without a tile, and for channels that are not there.
pub(super) struct Inputs<'a, F> {
    /// Which maps.
    pub(super) of: PhantomData<F>,
    pub(super) window: Option<Window>,
    pub(super) input: &'a [f32],
    pub(super) cin: usize,
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Inputs<'_, F> {
    #[inline(always)]
    fn bring(&self, s: S, lines: &mut Lines<S, D>, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let Inputs { window, input, cin, .. } = *self;
        let zero = s.splat_f32s(0.0);
        let Some(Window { picture, top, left, size: (h, w), step }) = window.filter(|_| c < cin) else {
            return none::<S, D>(s, put);
        };
        let (lanes, span) = (S::F32_LANES.min(cin - c), step * (D - 1));
        if top < h && left < w && top + span < h && left + span < w && lanes == S::F32_LANES {
            let input =
                &input[((picture * h + top) * w + left) * cin + c..][..(span * w + span) * cin + lanes];
            let (down, right) = (step * w * cin, step * cin);
            F::input(
                s,
                lines,
                #[inline(always)]
                |i: usize, j: usize| S::as_simd_f32s(&input[i * down + j * right..][..S::F32_LANES]).0[0],
                put,
            );
        } else {
            F::input(
                s,
                lines,
                #[inline(always)]
                |i: usize, j: usize| {
                    let (y, x) = (top.wrapping_add(step * i), left.wrapping_add(step * j));
                    match y < h && x < w {
                        true => load(s, &input[((picture * h + y) * w + x) * cin + c..][..lanes]),
                        false => zero,
                    }
                },
                put,
            );
        }
    }
}

/// Vectors that are kept on the way: between the directions of a map, and the first values of pairs.
pub(super) struct Space<S: Simd, const D: usize> {
    lines: Lines<S, D>,
    even: Lines<S, D>,
}

impl<S: Simd, const D: usize> Space<S, D> {
    #[inline(always)]
    pub(super) fn new(s: S) -> Self {
        let zero = [[s.splat_f32s(0.0); D]; D];
        Self { lines: zero, even: zero }
    }
}

/// The words of what `source` has at channel `c`, with those of `odd`, a source and its channel, if they are pairs: each point's
/// goes to `put(point, vector)`. Whole numbers are `scale` times the values.
#[inline(always)]
pub(super) fn words_of<S: Simd, P: Product, const D: usize, const R: usize>(
    s: S,
    product: P,
    words: Words,
    scale: &Gains<D>,
    space: &mut Space<S, D>,
    (source, c): (&impl Source<S, D, R>, usize),
    (odd_source, odd_c): (&impl Source<S, D, R>, usize),
    mut put: impl FnMut(usize, S::f32s),
) {
    let Space { lines, even } = space;
    if P::PER_WORD == 2 {
        source.bring(
            s,
            lines,
            c,
            #[inline(always)]
            |i, j, v| even[i][j] = scaled::<S, P>(s, v, scale[i][j]),
        );
        odd_source.bring(
            s,
            lines,
            odd_c,
            #[inline(always)]
            |i, j, v| put(i * D + j, product.pair(s, even[i][j], scaled::<S, P>(s, v, scale[i][j]))),
        );
    } else if words == Words::Rounded {
        source.bring(
            s,
            lines,
            c,
            #[inline(always)]
            |i, j, v| put(i * D + j, bf16::round_vector(s, v)),
        );
    } else {
        source.bring(
            s,
            lines,
            c,
            #[inline(always)]
            |i, j, v| put(i * D + j, v),
        );
    }
}

/// Zeros at all points.
#[inline(always)]
pub(super) fn none<S: Simd, const D: usize>(s: S, mut put: impl FnMut(usize, usize, S::f32s)) {
    for i in 0..D {
        for j in 0..D {
            put(i, j, s.splat_f32s(0.0));
        }
    }
}

/// The weights of a vector of output channels from `column` on, for a part of the output; zero where there are no such
/// channels.
pub(super) struct Weights<'a, F> {
    /// Which maps.
    pub(super) of_maps: PhantomData<F>,
    pub(super) of: &'a Winograd,
    pub(super) part: usize,
    pub(super) column: usize,
    pub(super) weights: &'a [f32],
}

impl<F> Weights<'_, F> {
    /// The weights from the matrix on that is in row `i` and column `j` of a part's `R` taps in each direction.
    #[inline(always)]
    fn matrix<const R: usize>(&self, part: Part, i: usize, j: usize) -> &[f32] {
        let (of, stride) = (self.of, self.of.kind.stride());
        let (i, j) = if of.transposed { (R - 1 - i, R - 1 - j) } else { (i, j) };
        let tap = (part.tap.0 + stride * i) * of.shape.kernel.1 + part.tap.1 + stride * j;
        &self.weights[tap * of.cin * of.cout..]
    }

    /// The weights of summed channel `c` themselves, forward; none where there is no such channel.
    #[inline(always)]
    pub(super) fn taps<S: Simd, const R: usize>(
        &self,
        s: S,
        c: usize,
        mut see: impl FnMut(usize, usize, S::f32s),
    ) {
        let Self { of, column, .. } = *self;
        let width = S::F32_LANES.min(of.cout.saturating_sub(column));
        let (Some((part, ci)), true) = (of.summed(self.part, c), width > 0) else { return };
        for i in 0..R {
            for j in 0..R {
                see(i, j, load(s, &self.matrix::<R>(part, i, j)[ci * of.cout + column..][..width]));
            }
        }
    }
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Weights<'_, F> {
    /// `G g G^T` of summed channel `c`.
    #[inline(always)]
    fn bring(&self, s: S, lines: &mut Lines<S, D>, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let Self { of, column, .. } = *self;
        let (cin, cout) = (of.cin, of.cout);
        let width = S::F32_LANES.min(cout.saturating_sub(column));
        let (Some((part, ci)), true) = (of.summed(self.part, c), width > 0) else {
            return none::<S, D>(s, put);
        };
        if of.transposed {
            F::weights(
                s,
                lines,
                #[inline(always)]
                |i: usize, j: usize| {
                    let mut lanes = [0.0; 16];
                    let from = self.matrix::<R>(part, i, j)[column * cin + ci..].iter().step_by(cin);
                    for (to, w) in lanes.iter_mut().zip(from).take(width) {
                        *to = *w;
                    }
                    load(s, &lanes[..S::F32_LANES])
                },
                put,
            );
        } else {
            F::weights(
                s,
                lines,
                #[inline(always)]
                |i: usize, j: usize| load(s, &self.matrix::<R>(part, i, j)[ci * cout + column..][..width]),
                put,
            );
        }
    }
}
