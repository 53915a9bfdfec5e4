//! The weight gradient by Winograd.

use super::super::{CACHE_SET_PAD, ConvShape, MatmulDtype};
use super::points::{Inputs, PointPacking, Source, pack_points, put_zeros};
use super::quantized;
use super::transform::Maps;
use super::{BLOCK, Kind, M, Tile, Tiles, is_faster, load, store, transform, with_maps};
use crate::bf16::Packing;
use crate::isa::{Isa, dispatch};
use crate::tile::{self, DotKernel, K_RUN, TileShape, with_tile};
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Words of tiles stored together: the run of k of a matrix product.
const RUN: usize = 16;
/// Minimum number of tiles of a block with many channels, if there are that many: every block reads and
/// writes all sums.
const MIN_BLOCK_TILES: usize = 128;

/// Maximum length of the sums for which each group of blocks has its own, in f32s.
const MAX_PER_THREAD_SUMS: usize = 640 << 10;
/// Approximate length of all such sums.
const TOTAL_SUMS: usize = 5 << 20;
/// Maximum number of groups.
const MAX_GROUPS: usize = 16;
/// Length of the sums that are computed at a time if there is only one block of tiles, in f32s.
const RANGE_SUMS: usize = 2 << 20;
/// Runs of a per-thread block: its values stay in the core's private cache.
const PER_THREAD_RUNS: usize = 2;

/// Operands of a weight gradient.
#[derive(Clone, Copy, Debug)]
pub struct GradOperands<'a> {
    /// The input, `[n, h, w, cin]`.
    pub input: &'a [f32],
    /// The output gradient, `[n, oh, ow, cout]`.
    pub dy: &'a [f32],
}

/// The values of a run of tiles, with the lengths of [`WinogradGrad::run_len`].
#[derive(Debug)]
pub struct RunValues<'a> {
    /// Of the inputs, `[points][cin / 16][run][16]`.
    pub v: &'a mut [f32],
    /// Of the output gradients, `[points][panels][run][nr]`.
    pub y: &'a mut [f32],
    /// The contribution to the bias gradient.
    pub bias: &'a mut [f32],
}

/// The product of the values of a block of runs at one point, for a range of rows: added to the sums if `add`, else
/// stored.
#[derive(Clone, Copy)]
struct PointSums<'a> {
    point: usize,
    /// The first row, and the end.
    rows: (usize, usize),
    v: &'a [f32],
    y: &'a [f32],
    add: bool,
}

/// The weight gradient of a convolution, prepared for one instruction set; processes the parts of the input
/// one after the other.
#[derive(Clone, Debug)]
pub struct WinogradGrad {
    isa: Isa,
    kind: Kind,
    tile: TileShape,
    packing: Packing,
    shape: ConvShape,
    tiles: Tiles,
    /// `cin` and `cout`, rounded up to full runs and panels.
    rows: usize,
    columns: usize,
    /// Runs of tiles in a block.
    runs: usize,
    /// Groups of blocks with separate sums.
    groups: usize,
    /// Rows whose sums are computed at a time.
    range: usize,
}

impl WinogradGrad {
    /// The weight gradient, if the convolution is supported.
    pub fn new(isa: Isa, dtype: MatmulDtype, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let tiles = Tiles::of_output(kind, &shape);
        let tile = TileShape::for_runs(isa.lanes());
        let rows = shape.cin.next_multiple_of(K_RUN);
        let columns = shape.cout.next_multiple_of(tile.nv * isa.lanes());
        let wanted = (BLOCK / (kind.points() * (rows + columns))).max(MIN_BLOCK_TILES);
        let packing = isa.packing(dtype);
        let run = RUN * packing.elems_per_word();
        let all_runs = tiles.count().div_ceil(run);
        // The number of groups must not depend on the number of threads, because their sums are added in
        // order.
        let sums = kind.points() * rows * columns;
        let groups = (TOTAL_SUMS / sums).min(MAX_GROUPS);
        let (groups, runs) = if sums <= MAX_PER_THREAD_SUMS && all_runs >= 2 * PER_THREAD_RUNS * groups {
            (groups, PER_THREAD_RUNS)
        } else {
            (1, (wanted / run).min(all_runs))
        };
        let range =
            if groups == 1 && runs == all_runs { RANGE_SUMS / (kind.points() * columns) } else { rows };
        let grad = Self { isa, kind, tile, packing, shape, tiles, rows, columns, runs, groups, range };
        Some(grad.with_ranges(range))
    }

    /// Sets `groups` groups of blocks of `runs` runs of tiles; for tests, which would need large images
    /// otherwise.
    pub fn with_blocks(mut self, runs: usize, groups: usize) -> Self {
        self.runs = runs.clamp(1, self.all_runs());
        self.groups = groups.clamp(1, self.all_runs());
        self.range = self.rows;
        self
    }

    /// Sets ranges of about `rows` rows if there is only one block; for tests, like
    /// [`WinogradGrad::with_blocks`].
    pub fn with_ranges(mut self, rows: usize) -> Self {
        let one_block = self.groups == 1 && self.runs >= self.all_runs();
        let rows = if one_block { rows } else { self.rows };
        self.range = (rows / K_RUN * K_RUN).clamp(K_RUN, self.rows);
        self
    }

    /// Number of groups of blocks, each with its own sums. If there are several, each is computed by one
    /// thread ([`WinogradGrad::accumulate_group`]), instead of each phase of a block by all threads: values
    /// then stay in the core's private cache.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Ranges of rows (input channels and their padding) whose sums are computed one after the other. There
    /// are several only if there is a single block, whose values then serve them all.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, range) = (self.rows, self.range);
        (0..rows).step_by(range).map(move |first| first..rows.min(first + range))
    }

    /// Whether this is estimated to be faster than direct convolution with this dtype.
    pub fn is_faster(&self, dtype: MatmulDtype) -> bool {
        let packings = [self.isa.packing(dtype), self.packing];
        let transformed = self.parts() * (self.shape.cin + self.shape.cout);
        is_faster(packings, false, self.kind, &self.shape, self.tiles.count(), transformed)
    }

    /// Parts of the input, each with its own taps.
    pub fn parts(&self) -> usize {
        self.kind.parts().count()
    }

    /// Blocks of runs of tiles in a group.
    pub fn blocks(&self, group: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, block) = (self.all_runs(), self.runs);
        let (start, end) = (group * all / self.groups, (group + 1) * all / self.groups);
        (start..end).step_by(block).map(move |first| first..end.min(first + block))
    }

    fn all_runs(&self) -> usize {
        self.tiles.count().div_ceil(RUN * self.packing.elems_per_word())
    }

    fn input_point(&self) -> usize {
        RUN * self.rows + CACHE_SET_PAD
    }

    fn output_point(&self) -> usize {
        RUN * self.columns + CACHE_SET_PAD
    }

    /// Lengths of the values of one run: inputs, output gradients, and its contribution to the bias gradient.
    pub fn run_len(&self) -> [usize; 3] {
        let points = self.kind.points();
        [points * self.input_point(), points * self.output_point(), self.shape.cout]
    }

    /// Length of the sums of a range at one point, and number of points.
    pub fn sums_len(&self) -> (usize, usize) {
        (self.range * self.columns + CACHE_SET_PAD, self.kind.points())
    }

    /// Number of taps of a part.
    pub fn taps(&self) -> usize {
        self.kind.taps().pow(2)
    }

    /// Position of tap `tap` of part `part` in the kernel.
    pub fn place(&self, part: usize, tap: usize) -> usize {
        let (stride, taps) = (self.kind.stride(), self.kind.taps());
        let (y, x) = (part / stride + stride * (tap / taps), part % stride + stride * (tap % taps));
        y * self.shape.kernel.1 + x
    }

    /// Length of a group's sums: at all points, and of the bias gradient.
    pub fn group_len(&self) -> usize {
        let (sums, points) = self.sums_len();
        points * sums + self.shape.cout.next_multiple_of(CACHE_SET_PAD)
    }

    /// Lengths of the shared memory: [`WinogradGrad::run_len`] for a block, the sums of all groups, and the
    /// weight gradient of a part and a range by rows.
    pub fn shared_len(&self) -> [usize; 5] {
        let [v, y, b] = self.run_len().map(|len| len * self.runs);
        [v, y, b, self.groups * self.group_len(), self.range * self.taps() * self.shape.cout]
    }

    /// Sums of group `group` for part `part`; `sums` has length [`WinogradGrad::group_len`], `memory` holds
    /// the values of a block.
    pub fn accumulate_group(
        &self,
        part: usize,
        group: usize,
        operands: GradOperands<'_>,
        sums: &mut [f32],
        memory: &mut [f32],
    ) {
        let ([v_len, y_len, _], (sums_len, points)) = (self.run_len(), self.sums_len());
        let (v, rest) = memory.split_at_mut(self.runs * v_len);
        let (y, share) = rest.split_at_mut(self.runs * y_len);
        let (sums, db) = sums.split_at_mut(points * sums_len);
        let (db, share) = (&mut db[..self.shape.cout], &mut share[..self.shape.cout]);
        db.fill(0.0);
        for (i, runs) in self.blocks(group).enumerate() {
            let (v, y) = (&mut v[..runs.len() * v_len], &mut y[..runs.len() * y_len]);
            for (run, (v, y)) in runs.zip(v.chunks_exact_mut(v_len).zip(y.chunks_exact_mut(y_len))) {
                self.values(part, run, operands, RunValues { v, y, bias: share });
                db.iter_mut().zip(&*share).for_each(|(sum, share)| *sum += share);
            }
            for (point, sums) in sums.chunks_exact_mut(sums_len).enumerate() {
                self.multiply(point, 0..self.rows, v, y, sums, i > 0);
            }
        }
    }

    /// The bias gradient from the sums of all groups.
    pub fn reduce_bias(&self, sums: &[f32], db: &mut [f32]) {
        db.fill(0.0);
        for sums in sums.chunks_exact(self.group_len()) {
            let shares = &sums[self.sums_len().0 * self.sums_len().1..];
            db.iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
        }
    }

    /// The values of run `run` for part `part`.
    pub fn values(&self, part: usize, run: usize, operands: GradOperands<'_>, out: RunValues<'_>) {
        let ConvShape { n, input: (h, w), output: (oh, ow), cin, cout, .. } = self.shape;
        assert_eq!(operands.input.len(), n * h * w * cin);
        assert_eq!(operands.dy.len(), n * oh * ow * cout);
        assert_eq!([out.v.len(), out.y.len(), out.bias.len()], self.run_len());
        let (GradOperands { input, dy }, RunValues { v, y, bias }) = (operands, out);
        with_maps!(self.kind, maps => dispatch!(self.isa, self.packing, s, dot => {
            self.pack_inputs(s, maps, dot, (part, run), input, v);
            self.pack_gradients(s, maps, dot, run, dy, y, bias);
        }))
    }

    /// The tiles in a word of a run: two if words have two elements.
    #[inline(always)]
    fn tiles_of(&self, run: usize, word: usize) -> [Option<Tile>; 2] {
        let first = (run * RUN + word) * self.packing.elems_per_word();
        [self.tiles.get(first), self.tiles.get(first + 1)]
    }

    #[inline(always)]
    fn pack_inputs<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        dot: impl DotKernel,
        (part, run): (usize, usize),
        input: &[f32],
        v: &mut [f32],
    ) {
        let ConvShape { cin, pad, .. } = self.shape;
        let (stride, pad) = (self.kind.stride(), (pad.0 as isize, pad.1 as isize));
        let from = ((part / stride) as isize - pad.0, (part % stride) as isize - pad.1);
        let mut point_vectors = [[s.splat_f32s(0.0); D]; D];
        let scale = &quantized::unscaled();
        let packing = PointPacking { packing: self.packing, scale, point_len: self.input_point() };
        for word in 0..RUN {
            let inputs = self.tiles_of(run, word).map(
                #[inline(always)]
                |tile| Inputs {
                    maps: PhantomData::<F>,
                    window: tile.map(
                        #[inline(always)]
                        |tile| self.tiles.window(tile, from),
                    ),
                    input,
                    cin,
                },
            );
            for c in (0..self.rows).step_by(S::F32_LANES) {
                let at = (c / K_RUN * RUN + word) * K_RUN + c % K_RUN;
                let (even, odd) = ((&inputs[0], c), (&inputs[1], c));
                pack_points(s, dot, packing, &mut point_vectors, even, odd, &mut v[at..]);
            }
        }
    }

    // Slices in a struct could overlap as far as the compiler knows, which costs a tenth to a quarter of the speed.
    #[inline(always)]
    fn pack_gradients<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        dot: impl DotKernel,
        run: usize,
        dy: &[f32],
        y: &mut [f32],
        bias: &mut [f32],
    ) {
        let nr = self.tile.nv * S::F32_LANES;
        bias.fill(0.0);
        let mut point_vectors = [[s.splat_f32s(0.0); D]; D];
        let scale = &quantized::unscaled();
        let packing = PointPacking { packing: self.packing, scale, point_len: self.output_point() };
        for word in 0..RUN {
            let gradients = self.tiles_of(run, word).map(
                #[inline(always)]
                |tile| Gradients { maps: PhantomData::<F>, grad: self, tile, dy },
            );
            for c in (0..self.columns).step_by(S::F32_LANES) {
                let at = (c / nr * RUN + word) * nr + c % nr;
                let (even, odd) = ((&gradients[0], c), (&gradients[1], c));
                pack_points(s, dot, packing, &mut point_vectors, even, odd, &mut y[at..]);
            }
            for gradients in &gradients[..self.packing.elems_per_word()] {
                gradients.add_to(s, bias);
            }
        }
    }

    /// Sums over a block's tiles at one point, `[rows][columns]`, for a range of rows: added to `sums` if
    /// `add`, else stored.
    pub fn multiply(
        &self,
        point: usize,
        rows: Range<usize>,
        v: &[f32],
        y: &[f32],
        sums: &mut [f32],
        add: bool,
    ) {
        assert_eq!(sums.len(), self.sums_len().0);
        let product = PointSums { point, rows: (rows.start, rows.end), v, y, add };
        dispatch!(self.isa, self.packing, s, dot => self.multiply_generic(s, dot, product, sums))
    }

    #[inline(always)]
    fn multiply_generic<S: Simd>(&self, s: S, dot: impl DotKernel, product: PointSums<'_>, sums: &mut [f32]) {
        let nr = self.tile.nv * S::F32_LANES;
        for j in 0..self.columns / nr {
            with_tile!(self.tile, column_of_tiles::<S>(s, self, dot, product, j, sums));
        }
    }

    /// The weight gradient of input channel `row` of a range of a part, `[taps, cout]`, from the sums of all groups.
    pub fn reduce(&self, row: usize, sums: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), self.taps() * self.shape.cout);
        with_maps!(self.kind, maps => dispatch!(self.isa, s => self.reduce_generic(s, maps, row, sums, out)))
    }

    #[inline(always)]
    fn reduce_generic<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        row: usize,
        sums: &[f32],
        out: &mut [f32],
    ) {
        let cout = self.shape.cout;
        for c in (0..cout).step_by(S::F32_LANES) {
            let lanes = S::F32_LANES.min(cout - c);
            F::weights_grad(
                s,
                #[inline(always)]
                |i: usize, j: usize| {
                    let at = (i * D + j) * self.sums_len().0 + row * self.columns + c;
                    let mut sum = load(s, &sums[at..at + S::F32_LANES]);
                    for sums in sums.chunks_exact(self.group_len()).skip(1) {
                        sum = s.add_f32s(sum, load(s, &sums[at..at + S::F32_LANES]));
                    }
                    sum
                },
                #[inline(always)]
                |i, j, w| store(s, &mut out[(i * R + j) * cout + c..][..lanes], w),
            );
        }
    }
}

/// The output gradients of a tile, `[n, oh, ow, cout]`; zero outside the image, without a tile, and past the
/// last channel.
struct Gradients<'a, F> {
    /// The transforms.
    maps: PhantomData<F>,
    grad: &'a WinogradGrad,
    tile: Option<Tile>,
    dy: &'a [f32],
}

impl<F> Gradients<'_, F> {
    /// Offset of the pixel in row `i` and column `j` of the tile, if it is inside the image.
    #[inline(always)]
    fn pixel(&self, tile: Tile, i: usize, j: usize) -> Option<usize> {
        let ConvShape { output: (h, w), cout, .. } = self.grad.shape;
        let (y, x) = (tile.y + i, tile.x + j);
        (y < h && x < w).then(|| ((tile.image * h + y) * w + x) * cout)
    }

    /// Adds the tile's sums to the bias gradient.
    #[inline(always)]
    fn add_to<S: Simd>(&self, s: S, bias: &mut [f32]) {
        let Some(tile) = self.tile else { return };
        for (i, j) in (0..M).flat_map(|i| (0..M).map(move |j| (i, j))) {
            let Some(at) = self.pixel(tile, i, j) else { continue };
            let pixel = &self.dy[at..at + bias.len()];
            for (sum, dy) in bias.chunks_mut(S::F32_LANES).zip(pixel.chunks(S::F32_LANES)) {
                let both = s.add_f32s(load(s, sum), load(s, dy));
                store(s, sum, both);
            }
        }
    }
}

impl<S: Simd, F: Maps<D, R>, const D: usize, const R: usize> Source<S, D, R> for Gradients<'_, F> {
    /// `A dy A^T`.
    #[inline(always)]
    fn transform(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let cout = self.grad.shape.cout;
        let (Some(tile), true) = (self.tile, c < cout) else { return put_zeros::<S, D>(s, put) };
        let (lanes, zero) = (S::F32_LANES.min(cout - c), s.splat_f32s(0.0));
        F::output_grad(
            s,
            #[inline(always)]
            |i: usize, j: usize| match self.pixel(tile, i, j) {
                Some(at) => load(s, &self.dy[at + c..][..lanes]),
                None => zero,
            },
            put,
        );
    }
}

/// One panel of columns against the rows of a range: sums over the block's runs in order.
#[inline(always)]
fn column_of_tiles<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    grad: &WinogradGrad,
    dot: impl DotKernel,
    PointSums { point, rows: (first, end), v, y, add }: PointSums<'_>,
    j: usize,
    sums: &mut [f32],
) {
    let nr = NV * S::F32_LANES;
    let [v_run, y_run, _] = grad.run_len();
    let (v_point, y_point) = (point * grad.input_point(), point * grad.output_point() + j * RUN * nr);
    for row in (first..end).step_by(MR) {
        let a_start = v_point + row / K_RUN * (RUN * K_RUN) + row % K_RUN;
        let mut acc = tile::zero::<S, MR, NV>(s);
        for (v, y) in v.chunks_exact(v_run).zip(y.chunks_exact(y_run)) {
            let a = &v[a_start..][..(RUN - 1) * K_RUN + MR];
            let b = S::as_simd_f32s(&y[y_point..][..RUN * nr]).0;
            tile::columns_strided(s, dot, a, b, &mut acc);
        }
        for (r, acc) in acc.iter().enumerate() {
            let at = (row - first + r) * grad.columns + j * nr;
            tile::store_row(s, acc, &mut sums[at..at + nr], add);
        }
    }
}
