//! The weight gradient: gathered inputs times output gradients, summed over pixels.

use super::{CACHE_SET_PAD, ConvShape, MAX_PANEL_COLUMNS, MatmulDtype, PixelCursor, copy_short};
use crate::bf16::{self, Packing};
use crate::isa::{Isa, dispatch};
use crate::tile::{self, DotKernel, MAX_TILE_ELEMS, TileShape, with_tile};
use pulp::Simd;
use std::ops::Range;

/// Pixels of a pass.
const GRAD_PIXELS: usize = 256;

/// The weight gradient of a convolution, with the bias gradient as its last row, prepared for one instruction
/// set.
///
/// The rows of the result are `m = (ky, kx, ci)`, then one row for the bias (an input that is always 1). A
/// task is a (group of pixels, range of rows); each writes its own part of a partial result, and
/// [`WeightGrad::reduce`] adds the groups in order. With bf16 operands the bias gradient sums rounded values
/// too.
#[derive(Clone, Debug)]
pub struct WeightGrad {
    isa: Isa,
    tile: TileShape,
    packing: Packing,
    shape: ConvShape,
    /// `kh * kw * cin + 1`.
    m: usize,
    groups: usize,
    ranges: usize,
    /// Rows of a range, a multiple of the tile.
    range: usize,
}

/// The first row of the result that a task computes.
#[derive(Clone, Copy)]
struct First {
    tap: (usize, usize),
    channel: usize,
}

/// The pixels of a pass, `k` from `start` on, and the rows of the result that its task computes.
struct Pass<'a> {
    rows: Range<usize>,
    start: usize,
    k: usize,
    input: &'a [f32],
    dy: &'a [f32],
}

/// Scratch memory of a task: A panels, B panels, and three rows of inputs.
struct Memory<'a> {
    a: &'a mut [f32],
    b: &'a mut [f32],
    row: &'a mut [f32],
}

/// A panels of `rows` rows of `k` words.
#[derive(Clone, Copy)]
struct RowPanels<'a> {
    a: &'a [f32],
    rows: usize,
    k: usize,
}

impl WeightGrad {
    /// The split into tasks depends only on the sizes.
    pub fn new(isa: Isa, dtype: MatmulDtype, shape: ConvShape) -> Self {
        let tile = TileShape::pick(isa.lanes(), shape.cout);
        let m = shape.kernel.0 * shape.kernel.1 * shape.cin + 1;
        let pixels = shape.n * shape.output.0 * shape.output.1;
        // A task's part of the result should fit the L2 cache.
        let ranges = (m * shape.cout).div_ceil(96 << 10);
        let range = m.div_ceil(ranges).next_multiple_of(tile.mr);
        let ranges = m.div_ceil(range);
        let groups = 8usize.div_ceil(ranges).min(pixels.div_ceil(GRAD_PIXELS)).max(1);
        Self { isa, tile, packing: isa.packing(dtype), shape, m, groups, ranges, range }
    }

    /// Number of tasks; each has its own part of the partial results.
    pub fn tasks(&self) -> usize {
        self.groups * self.ranges
    }

    /// Length of a task's part of the partial results, in f32s.
    pub fn partial_len(&self) -> usize {
        self.range * self.shape.cout
    }

    /// Scratch length of a task, in f32s.
    pub fn scratch_len(&self) -> usize {
        self.a_len() + self.b_len() + 3 * self.range
    }

    /// Length of the A panels of a pass (and [`b_len`](Self::b_len) of the B panels), in f32s.
    fn a_len(&self) -> usize {
        self.range / self.tile.mr * (GRAD_PIXELS * self.tile.mr + CACHE_SET_PAD)
    }

    fn b_len(&self) -> usize {
        let nr = self.tile.nv * self.isa.lanes();
        self.shape.cout.div_ceil(nr) * (GRAD_PIXELS * nr + CACHE_SET_PAD)
    }

    /// Runs one task: `input` is `[n, h, w, cin]`, `dy` is `[n, oh, ow, cout]`, `partial` the task's part.
    pub fn run(&self, task: usize, input: &[f32], dy: &[f32], partial: &mut [f32], scratch: &mut [f32]) {
        let (ConvShape { n, input: (h, w), output: (oh, ow), cin, cout, .. }, mr) =
            (self.shape, self.tile.mr);
        assert_eq!(input.len(), n * h * w * cin);
        assert_eq!(dy.len(), n * oh * ow * cout);
        let (group, range) = (task / self.ranges, task % self.ranges);
        let rows = range * self.range..self.m.min((range + 1) * self.range);
        let pixels = n * oh * ow;
        let share = pixels.div_ceil(self.groups);
        let (a, rest) = scratch.split_at_mut(self.a_len());
        let (b, row) = rest.split_at_mut(self.b_len());
        let row = &mut row[..3 * rows.len().next_multiple_of(mr)];
        row.fill(0.0);
        partial.fill(0.0);
        let end = pixels.min((group + 1) * share);
        let mut memory = Memory { a, b, row };
        for start in (group * share..end).step_by(GRAD_PIXELS) {
            let k = GRAD_PIXELS.min(end - start);
            let pass = Pass { rows: rows.clone(), start, k, input, dy };
            dispatch!(self.isa, self.packing, s, dot => self.add_pass(s, dot, &pass, &mut memory, partial));
        }
    }

    /// Adds the products of a pass to the partial result.
    #[inline(always)]
    fn add_pass<S: Simd>(
        &self,
        s: S,
        dot: impl DotKernel,
        Pass { rows, start, k, input, dy }: &Pass<'_>,
        Memory { a, b, row }: &mut Memory<'_>,
        partial: &mut [f32],
    ) {
        let (start, k) = (*start, *k);
        let (cout, mr, nr) = (self.shape.cout, self.tile.mr, self.tile.nv * S::F32_LANES);
        let (tap, channel) = (rows.start / self.shape.cin, rows.start % self.shape.cin);
        let first = First { tap: (tap / self.shape.kernel.1, tap % self.shape.kernel.1), channel };
        let mut cursor = PixelCursor::new(start, self.shape.output);
        debug_assert_eq!(row.len() % (3 * mr), 0);
        let (even, rest) = row.split_at_mut(row.len() / 3);
        let (odd, pairs) = rest.split_at_mut(even.len());
        let dy = |p: usize| &dy[(start + p) * cout..][..cout];
        let words = k.div_ceil(self.packing.elems_per_word());
        for word in 0..words {
            let p = word * self.packing.elems_per_word();
            self.gather_row(cursor, first, rows.len(), input, even);
            cursor.advance();
            match self.packing {
                Packing::F32 | Packing::Rounded => {
                    self.packing.round(even);
                    with_tile!(self.tile, scatter_row::<S>(s, even, words, word, a));
                    for (j, part) in dy(p).chunks(nr).enumerate() {
                        let to = &mut b[j * (words * nr + CACHE_SET_PAD) + word * nr..][..nr];
                        copy_short(&mut to[..part.len()], part);
                        to[part.len()..].fill(0.0);
                        self.packing.round(to);
                    }
                }
                Packing::Pairs => {
                    let last = p + 1 == k;
                    if last {
                        odd.fill(0.0);
                    } else {
                        self.gather_row(cursor, first, rows.len(), input, odd);
                    }
                    cursor.advance();
                    pair_rows(s, dot, even, odd, pairs);
                    with_tile!(self.tile, scatter_row::<S>(s, pairs, words, word, a));
                    for (j, part) in dy(p).chunks(nr).enumerate() {
                        let to = &mut b[j * (words * nr + CACHE_SET_PAD) + word * nr..][..nr];
                        let next = if last {
                            &[0.0; MAX_PANEL_COLUMNS][..part.len()]
                        } else {
                            &dy(p + 1)[j * nr..][..part.len()]
                        };
                        pair_rows(s, dot, part, next, to);
                        to[part.len()..].fill(0.0);
                    }
                }
            }
        }
        self.multiply(s, dot, RowPanels { a, rows: rows.len(), k: words }, b, partial);
    }

    /// The inputs of one output pixel for the given rows: its part of the im2col matrix, and 1 for the bias.
    #[inline(always)]
    fn gather_row(&self, cursor: PixelCursor, first: First, rows: usize, input: &[f32], out: &mut [f32]) {
        let ConvShape { input: (h, w), cin, kernel, stride, pad, .. } = self.shape;
        let PixelCursor { image, y: oy, x: ox, .. } = cursor;
        let ((mut ky, mut kx), mut at, mut c) = (first.tap, 0, first.channel);
        while at < rows {
            if ky == kernel.0 {
                out[at] = 1.0;
                break;
            }
            let len = (cin - c).min(rows - at);
            let y = (oy * stride.0 + ky).wrapping_sub(pad.0);
            let x = (ox * stride.1 + kx).wrapping_sub(pad.1);
            let to = &mut out[at..at + len];
            if y < h && x < w {
                copy_short(to, &input[((image * h + y) * w + x) * cin + c..][..len]);
            } else {
                to.fill(0.0);
            }
            (at, c, kx) = (at + len, 0, kx + 1);
            if kx == kernel.1 {
                (ky, kx) = (ky + 1, 0);
            }
        }
    }

    #[inline(always)]
    fn multiply<S: Simd>(&self, s: S, dot: impl DotKernel, a: RowPanels<'_>, b: &[f32], partial: &mut [f32]) {
        let (cout, k) = (self.shape.cout, a.k);
        let nr = self.tile.nv * S::F32_LANES;
        for (j, b) in b.chunks_exact(k * nr + CACHE_SET_PAD).take(cout.div_ceil(nr)).enumerate() {
            let b = S::as_simd_f32s(&b[..k * nr]).0;
            let columns = j * nr..cout.min((j + 1) * nr);
            with_tile!(self.tile, column_panels::<S>(s, dot, a, b, columns.clone(), cout, partial));
        }
    }

    /// Adds the groups' partial results in order: `dw` is `[kh, kw, cin, cout]`, `db` is `[cout]`.
    pub fn reduce(&self, partials: &[f32], dw: &mut [f32], db: Option<&mut [f32]>) {
        let len = self.partial_len();
        assert_eq!(dw.len(), self.shape.weights());
        for (range, out) in dw.chunks_mut(len).enumerate() {
            self.reduce_range(partials, range, 0, out);
        }
        if let Some(db) = db {
            self.reduce_bias(partials, db);
        }
    }

    /// The bias gradient `[cout]`: the last row of the result.
    pub fn reduce_bias(&self, partials: &[f32], db: &mut [f32]) {
        let (range, row) = ((self.m - 1) / self.range, (self.m - 1) % self.range);
        self.reduce_range(partials, range, row * self.shape.cout, db);
    }

    /// Adds the groups' rows of one range, from offset `from` in the range's part on.
    pub fn reduce_range(&self, partials: &[f32], range: usize, from: usize, out: &mut [f32]) {
        let len = self.partial_len();
        for group in 0..self.groups {
            let part = &partials[(group * self.ranges + range) * len + from..][..out.len()];
            if group == 0 {
                out.copy_from_slice(part);
            } else {
                for (o, p) in out.iter_mut().zip(part) {
                    *o += p;
                }
            }
        }
    }
}

/// Writes row `p` of `k` into column panels `[panel][k][MR]`.
#[inline(always)]
fn scatter_row<S: Simd, const MR: usize, const NV: usize>(
    _: S,
    row: &[f32],
    k: usize,
    p: usize,
    a: &mut [f32],
) {
    for (part, panel) in row.chunks_exact(MR).zip(a.chunks_exact_mut(k * MR + CACHE_SET_PAD)) {
        // A copy of constant length compiles to a vector move.
        panel[p * MR..][..MR].copy_from_slice(part);
    }
}

/// Packs two rows into words.
#[inline(always)]
fn pair_rows<S: Simd>(s: S, dot: impl DotKernel, even: &[f32], odd: &[f32], to: &mut [f32]) {
    let full = even.len() / S::F32_LANES * S::F32_LANES;
    let (words, rest) = to.split_at_mut(full);
    let rows = S::as_simd_f32s(&even[..full]).0.iter().zip(S::as_simd_f32s(&odd[..full]).0);
    for (word, (even, odd)) in S::as_mut_simd_f32s(words).0.iter_mut().zip(rows) {
        *word = dot.pair(s, *even, *odd);
    }
    bf16::pair_rows(&even[full..], &odd[full..], rest);
}

/// Adds the product with a panel of B to the columns `columns` of `partial`, `[rows][cout]`.
#[inline(always)]
fn column_panels<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl DotKernel,
    RowPanels { a, rows, k }: RowPanels<'_>,
    b: &[S::f32s],
    columns: Range<usize>,
    cout: usize,
    partial: &mut [f32],
) {
    let (nr, mut sums) = (NV * S::F32_LANES, [0.0; MAX_TILE_ELEMS]);
    for (i, a) in a.chunks_exact(k * MR + CACHE_SET_PAD).take(rows.div_ceil(MR)).enumerate() {
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::columns(s, dot, &a[..k * MR], b, &mut acc);
        tile::store_acc::<S, MR, NV>(&acc, &mut sums);
        for (r, sums) in sums.chunks_exact(nr).enumerate().take(MR.min(rows - i * MR)) {
            let at = (i * MR + r) * cout;
            let to = &mut partial[at + columns.start..at + columns.end];
            tile::store_row(s, &tile::vectors::<S, NV>(S::as_simd_f32s(sums).0), to, true);
        }
    }
}
