//! What is brought to the points: inputs and weights (gradients are the weight gradient's own), and how words are made of it.

use super::product::Part;
use super::transform::Maps;
use super::whole::{Gains, scaled};
use super::{Winograd, load};
use crate::bf16::{self, Words};
use crate::prefetch::prefetch;
use crate::tile::Product;
use pulp::Simd;
use std::marker::PhantomData;

/// The inputs of a tile.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub(super) image: usize,
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) size: (usize, usize),
    pub(super) step: usize,
}

/// What is brought to the points.
pub(super) trait Source<S: Simd, const D: usize, const R: usize> {
    /// The values at the points of a vector of channels from `c` on, which go to `put(row, column, vector)`, by rows.
    fn bring(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s));
}

/// A tile's inputs, `[n, h, w, cin]`; zero outside of the image, without a tile, and for channels that are not there.
pub(super) struct Inputs<'a, F> {
    /// Which maps.
    pub(super) of: PhantomData<F>,
    pub(super) window: Option<Window>,
    pub(super) input: &'a [f32],
    pub(super) cin: usize,
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Inputs<'_, F> {
    #[inline(always)]
    fn bring(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let Inputs { window, input, cin, .. } = *self;
        let zero = s.splat_f32s(0.0);
        let Some(Window { image, top, left, size: (h, w), step }) = window.filter(|_| c < cin) else {
            return none::<S, D>(s, put);
        };
        let (lanes, span) = (S::F32_LANES.min(cin - c), step * (D - 1));
        if top < h && left < w && top + span < h && left + span < w && lanes == S::F32_LANES {
            let input = &input[((image * h + top) * w + left) * cin + c..][..(span * w + span) * cin + lanes];
            let (down, right) = (step * w * cin, step * cin);
            F::input(
                s,
                #[inline(always)]
                |i: usize, j: usize| S::as_simd_f32s(&input[i * down + j * right..][..S::F32_LANES]).0[0],
                put,
            );
        } else {
            F::input(
                s,
                #[inline(always)]
                |i: usize, j: usize| {
                    let (y, x) = (top.wrapping_add(step * i), left.wrapping_add(step * j));
                    match y < h && x < w {
                        true => load(s, &input[((image * h + y) * w + x) * cin + c..][..lanes]),
                        false => zero,
                    }
                },
                put,
            );
        }
    }
}

/// A vector for each point: the first values of pairs are kept there. Made once and used for many.
pub(super) type Space<S, const D: usize> = [[<S as Simd>::f32s; D]; D];

/// The words of what `source` has at channel `c`, with those of `odd`, a source and its channel, if they are pairs: each point's
/// vector goes to the front of `out`, `point_len` numbers apart. Whole numbers are `scale` times the values.
#[inline(always)]
pub(super) fn words_of<S: Simd, P: Product, const D: usize, const R: usize>(
    s: S,
    product: P,
    words: Words,
    scale: &Gains<D>,
    even: &mut Space<S, D>,
    (source, c): (&impl Source<S, D, R>, usize),
    (odd_source, odd_c): (&impl Source<S, D, R>, usize),
    out: &mut [f32],
    point_len: usize,
) {
    // Sources give the points in order.
    let mut points = Points::<S> { of: S::as_mut_simd_f32s(out).0, at: 0, len: point_len / S::F32_LANES };
    if P::PER_WORD == 2 {
        source.bring(
            s,
            c,
            #[inline(always)]
            |i, j, v| even[i][j] = scaled::<S, P>(s, v, scale[i][j]),
        );
        odd_source.bring(
            s,
            odd_c,
            #[inline(always)]
            |i, j, v| points.put(product.pair(s, even[i][j], scaled::<S, P>(s, v, scale[i][j]))),
        );
    } else if words == Words::Rounded {
        source.bring(
            s,
            c,
            #[inline(always)]
            |_, _, v| points.put(bf16::round_vector(s, v)),
        );
    } else {
        source.bring(
            s,
            c,
            #[inline(always)]
            |_, _, v| points.put(v),
        );
    }
}

/// The numbers of points behind each other, `len` vectors each: a vector goes to the front of each in turn.
struct Points<'a, S: Simd> {
    of: &'a mut [S::f32s],
    at: usize,
    len: usize,
}

impl<S: Simd> Points<'_, S> {
    #[inline(always)]
    fn put(&mut self, v: S::f32s) {
        self.of[self.at] = v;
        self.at += self.len;
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

impl<F> Weights<'_, F> {
    /// Asks for the weights of summed channel `c`, forward.
    #[inline(always)]
    pub(super) fn prefetch<const R: usize>(&self, c: usize) {
        let Some((part, ci)) = self.of.summed(self.part, c) else { return };
        for i in 0..R {
            for j in 0..R {
                prefetch(self.matrix::<R>(part, i, j), ci * self.of.cout + self.column);
            }
        }
    }
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Weights<'_, F> {
    /// `G g G^T` of summed channel `c`, forward.
    #[inline(always)]
    fn bring(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let Self { of, column, .. } = *self;
        let width = S::F32_LANES.min(of.cout.saturating_sub(column));
        let (Some((part, ci)), true) = (of.summed(self.part, c), width > 0) else {
            return none::<S, D>(s, put);
        };
        if width == S::F32_LANES {
            let (weights, matrix) =
                (&self.matrix::<R>(part, 0, 0)[ci * of.cout + column..], of.cin * of.cout);
            let (down, right) = (of.kind.stride() * of.shape.kernel.1 * matrix, of.kind.stride() * matrix);
            return F::weights(
                s,
                #[inline(always)]
                |i: usize, j: usize| S::as_simd_f32s(&weights[i * down + j * right..][..S::F32_LANES]).0[0],
                put,
            );
        }
        F::weights(
            s,
            #[inline(always)]
            |i: usize, j: usize| load(s, &self.matrix::<R>(part, i, j)[ci * of.cout + column..][..width]),
            put,
        );
    }
}

/// The weights of up to 16 output channels and 32 summed ones in the data gradient, whose rows are those of the output channels: read
/// along these, since they lie far apart.
pub(super) struct Turned([[[f32; 32]; 16]; MOST_TAPS]);

/// Taps of a part.
const MOST_TAPS: usize = 9;

impl Turned {
    pub(super) fn new() -> Self {
        Self([[[0.0; 32]; 16]; MOST_TAPS])
    }

    /// Takes `per_word` vectors of summed channels from `c` on, for a vector of output channels; zeros where there are none.
    #[inline(always)]
    pub(super) fn fill<S: Simd, F, const R: usize>(
        &mut self,
        of: &Weights<'_, F>,
        c: usize,
        per_word: usize,
    ) {
        let (conv, len) = (of.of, per_word * S::F32_LANES);
        let there = len.min(conv.cin.saturating_sub(c));
        let rows = S::F32_LANES.min(conv.cout.saturating_sub(of.column));
        let Some((part, c)) = conv.summed(of.part, c) else {
            return self.0.as_flattened_mut().fill([0.0; 32]);
        };
        for (tap, block) in self.0[..R * R].iter_mut().enumerate() {
            let matrix = of.matrix::<R>(part, tap / R, tap % R);
            for (row, to) in block[..S::F32_LANES].iter_mut().enumerate() {
                let there = if row < rows { there } else { 0 };
                to[there..len].fill(0.0);
                if there > 0 {
                    to[..there].copy_from_slice(&matrix[(of.column + row) * conv.cin + c..][..there]);
                }
            }
        }
    }
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for (PhantomData<F>, &Turned) {
    /// `G g G^T` of the `c`-th channel there.
    #[inline(always)]
    fn bring(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        F::weights(
            s,
            #[inline(always)]
            |i: usize, j: usize| {
                let mut lanes = [0.0; 16];
                for (to, row) in lanes.iter_mut().zip(&self.1.0[i * R + j]).take(S::F32_LANES) {
                    *to = row[c];
                }
                S::as_simd_f32s(&lanes).0[0]
            },
            put,
        );
    }
}
