//! Transforming inputs and weights to the points, and packing them into words. (Output gradients are in
//! `weight_grad.rs`.)

use super::plan::Part;
use super::quantized::{Gains, scaled};
use super::transform::Maps;
use super::{Winograd, load};
use crate::bf16::{self, Packing};
use crate::prefetch::prefetch;
use crate::tile::DotKernel;
use pulp::Simd;
use std::marker::PhantomData;

/// The input window of a tile.
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub(super) image: usize,
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) size: (usize, usize),
    pub(super) step: usize,
}

/// Data that can be transformed to the points.
pub(super) trait Source<S: Simd, const D: usize, const R: usize> {
    /// Passes the values at the points to `put(row, column, vector)`, in row-major order, for a vector of
    /// channels from `c` on.
    fn transform(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s));
}

/// The inputs of a tile, `[n, h, w, cin]`; zero outside the image, without a tile, and past the last channel.
pub(super) struct Inputs<'a, F> {
    /// The transforms.
    pub(super) maps: PhantomData<F>,
    pub(super) window: Option<Window>,
    pub(super) input: &'a [f32],
    pub(super) cin: usize,
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Inputs<'_, F> {
    #[inline(always)]
    fn transform(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let Inputs { window, input, cin, .. } = *self;
        let zero = s.splat_f32s(0.0);
        let Some(Window { image, top, left, size: (h, w), step }) = window.filter(|_| c < cin) else {
            return put_zeros::<S, D>(s, put);
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
                    if y < h && x < w {
                        load(s, &input[((image * h + y) * w + x) * cin + c..][..lanes])
                    } else {
                        zero
                    }
                },
                put,
            );
        }
    }
}

/// One vector for each point, holding the even elements of pairs. Allocated once and reused.
pub(super) type PointVectors<S, const D: usize> = [[<S as Simd>::f32s; D]; D];

/// How values at the points are packed into words.
#[derive(Clone, Copy)]
pub(super) struct PointPacking<'a, const D: usize> {
    pub(super) packing: Packing,
    /// Integers are the values times these.
    pub(super) scale: &'a Gains<D>,
    /// Elements from one point to the next.
    pub(super) point_len: usize,
}

/// Packs channel `c` of `source`, paired with a channel of the odd source if words have two elements: the
/// vector of each point goes to the front of `out`.
#[inline(always)]
pub(super) fn pack_points<S: Simd, P: DotKernel, const D: usize, const R: usize>(
    s: S,
    dot: P,
    PointPacking { packing, scale, point_len }: PointPacking<'_, D>,
    even: &mut PointVectors<S, D>,
    (source, c): (&impl Source<S, D, R>, usize),
    (odd_source, odd_c): (&impl Source<S, D, R>, usize),
    out: &mut [f32],
) {
    // Sources yield the points in order.
    let mut points =
        PointWriter::<S> { out: S::as_mut_simd_f32s(out).0, at: 0, len: point_len / S::F32_LANES };
    if P::ELEMS_PER_WORD == 2 {
        source.transform(
            s,
            c,
            #[inline(always)]
            |i, j, v| even[i][j] = scaled::<S, P>(s, v, scale[i][j]),
        );
        odd_source.transform(
            s,
            odd_c,
            #[inline(always)]
            |i, j, v| points.put(dot.pair(s, even[i][j], scaled::<S, P>(s, v, scale[i][j]))),
        );
    } else if packing == Packing::Rounded {
        source.transform(
            s,
            c,
            #[inline(always)]
            |_, _, v| points.put(bf16::round_vector(s, v)),
        );
    } else {
        source.transform(
            s,
            c,
            #[inline(always)]
            |_, _, v| points.put(v),
        );
    }
}

/// Writes one vector for each point in turn, `len` vectors apart.
struct PointWriter<'a, S: Simd> {
    out: &'a mut [S::f32s],
    at: usize,
    len: usize,
}

impl<S: Simd> PointWriter<'_, S> {
    #[inline(always)]
    fn put(&mut self, v: S::f32s) {
        self.out[self.at] = v;
        self.at += self.len;
    }
}

/// Puts zeros at all points.
#[inline(always)]
pub(super) fn put_zeros<S: Simd, const D: usize>(s: S, mut put: impl FnMut(usize, usize, S::f32s)) {
    for i in 0..D {
        for j in 0..D {
            put(i, j, s.splat_f32s(0.0));
        }
    }
}

/// The weights of a vector of output channels from `column` on, for a part of the output; zero past the last
/// channel.
pub(super) struct Weights<'a, F> {
    /// The transforms.
    pub(super) maps: PhantomData<F>,
    pub(super) conv: &'a Winograd,
    pub(super) part: usize,
    pub(super) column: usize,
    pub(super) weights: &'a [f32],
}

impl<F> Weights<'_, F> {
    /// The weights from the matrix in row `i` and column `j` of a part's `R` taps along each axis on.
    #[inline(always)]
    fn matrix<const R: usize>(&self, part: Part, i: usize, j: usize) -> &[f32] {
        let (conv, stride) = (self.conv, self.conv.kind.stride());
        let (i, j) = if conv.transposed { (R - 1 - i, R - 1 - j) } else { (i, j) };
        let tap = (part.tap.0 + stride * i) * conv.shape.kernel.1 + part.tap.1 + stride * j;
        &self.weights[tap * conv.cin * conv.cout..]
    }

    /// Visits the untransformed weights of summed channel `c`, in the forward pass; none past the last
    /// channel.
    #[inline(always)]
    pub(super) fn taps<S: Simd, const R: usize>(
        &self,
        s: S,
        c: usize,
        mut see: impl FnMut(usize, usize, S::f32s),
    ) {
        let Self { conv, column, .. } = *self;
        let width = S::F32_LANES.min(conv.cout.saturating_sub(column));
        let (Some((part, ci)), true) = (conv.summed(self.part, c), width > 0) else { return };
        for i in 0..R {
            for j in 0..R {
                see(i, j, load(s, &self.matrix::<R>(part, i, j)[ci * conv.cout + column..][..width]));
            }
        }
    }
}

impl<F> Weights<'_, F> {
    /// Prefetches the weights of summed channel `c`, in the forward pass.
    #[inline(always)]
    pub(super) fn prefetch<const R: usize>(&self, c: usize) {
        let Some((part, ci)) = self.conv.summed(self.part, c) else { return };
        for i in 0..R {
            for j in 0..R {
                prefetch(self.matrix::<R>(part, i, j), ci * self.conv.cout + self.column);
            }
        }
    }
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Weights<'_, F> {
    /// `G g G^T` of summed channel `c`, in the forward pass.
    #[inline(always)]
    fn transform(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let Self { conv, column, .. } = *self;
        let width = S::F32_LANES.min(conv.cout.saturating_sub(column));
        let (Some((part, ci)), true) = (conv.summed(self.part, c), width > 0) else {
            return put_zeros::<S, D>(s, put);
        };
        if width == S::F32_LANES {
            let (weights, matrix) =
                (&self.matrix::<R>(part, 0, 0)[ci * conv.cout + column..], conv.cin * conv.cout);
            let (down, right) =
                (conv.kind.stride() * conv.shape.kernel.1 * matrix, conv.kind.stride() * matrix);
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
            |i: usize, j: usize| load(s, &self.matrix::<R>(part, i, j)[ci * conv.cout + column..][..width]),
            put,
        );
    }
}

/// The weights of up to 16 output channels and 32 summed ones in the data gradient. Rows of memory are output
/// channels there, far apart, so they are read along the rows.
pub(super) struct TransposedWeights([[[f32; 32]; 16]; MAX_TAPS]);

/// Maximum number of taps of a part.
const MAX_TAPS: usize = 9;

impl TransposedWeights {
    pub(super) fn new() -> Self {
        Self([[[0.0; 32]; 16]; MAX_TAPS])
    }

    /// Reads `per_word` vectors of summed channels from `c` on, for a vector of output channels; zeros past
    /// the last.
    #[inline(always)]
    pub(super) fn fill<S: Simd, F, const R: usize>(
        &mut self,
        source: &Weights<'_, F>,
        c: usize,
        per_word: usize,
    ) {
        let (conv, len) = (source.conv, per_word * S::F32_LANES);
        let available = len.min(conv.cin.saturating_sub(c));
        let rows = S::F32_LANES.min(conv.cout.saturating_sub(source.column));
        let Some((part, c)) = conv.summed(source.part, c) else {
            return self.0.as_flattened_mut().fill([0.0; 32]);
        };
        for (tap, block) in self.0[..R * R].iter_mut().enumerate() {
            let matrix = source.matrix::<R>(part, tap / R, tap % R);
            for (row, to) in block[..S::F32_LANES].iter_mut().enumerate() {
                let available = if row < rows { available } else { 0 };
                to[available..len].fill(0.0);
                if available > 0 {
                    to[..available]
                        .copy_from_slice(&matrix[(source.column + row) * conv.cin + c..][..available]);
                }
            }
        }
    }
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R>
    for (PhantomData<F>, &TransposedWeights)
{
    /// `G g G^T` of channel `c` in the buffer.
    #[inline(always)]
    fn transform(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
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
