//! Weight gradient.

use super::super::{CACHE_SET_PAD, ConvShape, MatmulDtype};
use super::points::{Inputs, Source, none, words_of};
use super::transform::Maps;
use super::whole;
use super::{BLOCK, Kind, M, Tile, Tiles, is_faster, load, store, transform, with_maps};
use crate::bf16::Words;
use crate::isa::{Isa, dispatch};
use crate::tile::{self, K_RUN, Product, TileShape, with_tile};
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Words of tiles whose values lie together: the run of k of a matrix product.
const RUN: usize = 16;
/// Tiles of a block of many channels, if there are as many: every block reads and writes all sums.
const FEWEST: usize = 128;

/// Most numbers of sums of which there are several, each one thread's own.
const MOST_OWN_SUMS: usize = 640 << 10;
/// Numbers of all such sums, about.
const ALL_OWN_SUMS: usize = 5 << 20;
/// Most of them.
const MOST_GROUPS: usize = 16;
/// Numbers of the sums that are made at a time where one block of tiles is all there is.
const RANGE_SUMS: usize = 2 << 20;
/// Runs of a block that is one thread's own: its values stay in the core's own cache.
const OWN_RUNS: usize = 2;

/// The weight gradient of a convolution, prepared for one instruction set; the parts of the input one after the other.
#[derive(Clone, Debug)]
pub struct WinogradGrad {
    isa: Isa,
    kind: Kind,
    tile: TileShape,
    words: Words,
    shape: ConvShape,
    tiles: Tiles,
    /// `cin` and `cout`, rounded up to whole runs and panels.
    rows: usize,
    columns: usize,
    /// Runs of tiles of a block.
    runs: usize,
    /// Groups of blocks that have sums of their own.
    groups: usize,
    /// Rows whose sums are made at a time.
    range: usize,
}

impl WinogradGrad {
    /// The weight gradient, if there is a way for the convolution.
    pub fn new(isa: Isa, factors: MatmulDtype, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let tiles = Tiles::of_output(kind, &shape);
        let tile = TileShape::of_runs(isa.lanes());
        let rows = shape.cin.next_multiple_of(K_RUN);
        let columns = shape.cout.next_multiple_of(tile.nv * isa.lanes());
        let wanted = (BLOCK / (kind.points() * (rows + columns))).max(FEWEST);
        let words = Words::of(isa, factors);
        let run = RUN * words.numbers();
        let all_runs = tiles.count().div_ceil(run);
        // The number of groups must not depend on that of the threads: sums are added in order.
        let sums = kind.points() * rows * columns;
        let groups = (ALL_OWN_SUMS / sums).min(MOST_GROUPS);
        let (groups, runs) = match sums <= MOST_OWN_SUMS && all_runs >= 2 * OWN_RUNS * groups {
            true => (groups, OWN_RUNS),
            false => (1, (wanted / run).min(all_runs)),
        };
        let range = match groups == 1 && runs == all_runs {
            true => RANGE_SUMS / (kind.points() * columns),
            false => rows,
        };
        let of = Self { isa, kind, tile, words, shape, tiles, rows, columns, runs, groups, range };
        Some(of.in_ranges(range))
    }

    /// With `groups` groups of blocks of `runs` runs of tiles; for tests, which would need large images otherwise.
    pub fn in_blocks(mut self, runs: usize, groups: usize) -> Self {
        self.runs = runs.clamp(1, self.all_runs());
        self.groups = groups.clamp(1, self.all_runs());
        self.range = self.rows;
        self
    }

    /// With sums of about `rows` rows made at a time, if there is but one block; for tests, as [`WinogradGrad::in_blocks`].
    pub fn in_ranges(mut self, rows: usize) -> Self {
        let one_block = self.groups == 1 && self.runs >= self.all_runs();
        let rows = if one_block { rows } else { self.rows };
        self.range = (rows / K_RUN * K_RUN).clamp(K_RUN, self.rows);
        self
    }

    /// Groups of blocks, each with sums of its own. If there is more than one, they are made by [`WinogradGrad::own_group`],
    /// side by side, instead of each phase of a block by all threads: values then stay in the cache of the core that made
    /// them.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Ranges of rows (input channels, and what they are rounded up with) whose sums are made one after the other. There is more
    /// than one only if one block is all there is: its values then serve them all.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, range) = (self.rows, self.range);
        (0..rows).step_by(range).map(move |first| first..rows.min(first + range))
    }

    /// Whether this is expected to take less time than the plain way with such factors.
    pub fn is_faster(&self, factors: MatmulDtype) -> bool {
        let words = [Words::of(self.isa, factors), self.words];
        let brought = self.parts() * (self.shape.cin + self.shape.cout);
        is_faster(words, false, self.kind, &self.shape, self.tiles.count(), brought)
    }

    /// Parts of the input, each with its own taps.
    pub fn parts(&self) -> usize {
        self.kind.parts().count()
    }

    /// Blocks of runs of tiles of a group.
    pub fn blocks(&self, group: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, block) = (self.all_runs(), self.runs);
        let (start, end) = (group * all / self.groups, (group + 1) * all / self.groups);
        (start..end).step_by(block).map(move |first| first..end.min(first + block))
    }

    fn all_runs(&self) -> usize {
        self.tiles.count().div_ceil(RUN * self.words.numbers())
    }

    fn input_point(&self) -> usize {
        RUN * self.rows + CACHE_SET_PAD
    }

    fn output_point(&self) -> usize {
        RUN * self.columns + CACHE_SET_PAD
    }

    /// Numbers of the values of one run: of the inputs, of the output gradients, and of its part of the bias gradient.
    pub fn run_len(&self) -> [usize; 3] {
        let points = self.kind.points();
        [points * self.input_point(), points * self.output_point(), self.shape.cout]
    }

    /// Numbers of the sums of a range at one point, and points.
    pub fn sums_len(&self) -> (usize, usize) {
        (self.range * self.columns + CACHE_SET_PAD, self.kind.points())
    }

    /// Taps of a part.
    pub fn taps(&self) -> usize {
        self.kind.taps().pow(2)
    }

    /// Where tap `tap` of part `part` is among the kernel's.
    pub fn place(&self, part: usize, tap: usize) -> usize {
        let (stride, taps) = (self.kind.stride(), self.kind.taps());
        let (y, x) = (part / stride + stride * (tap / taps), part % stride + stride * (tap % taps));
        y * self.shape.kernel.1 + x
    }

    /// Numbers of a group's sums: at all points, and of the bias gradient.
    pub fn group_len(&self) -> usize {
        let (sums, points) = self.sums_len();
        points * sums + self.shape.cout.next_multiple_of(CACHE_SET_PAD)
    }

    /// Numbers of scratch memory: what [`WinogradGrad::run_len`] says for a block, the sums of all groups, and the weight
    /// gradient of a part and a range by rows.
    pub fn shared_len(&self) -> [usize; 5] {
        let [v, y, b] = self.run_len().map(|len| len * self.runs);
        [v, y, b, self.groups * self.group_len(), self.range * self.taps() * self.shape.cout]
    }

    /// The sums of group `group` for part `part`; `sums` has [`WinogradGrad::group_len`] numbers, `memory` the values of a block.
    pub fn own_group(
        &self,
        part: usize,
        group: usize,
        input: &[f32],
        dy: &[f32],
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
                self.values(part, run, input, dy, v, y, share);
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

    /// The values of run `run` for part `part`: `input` is `[n, h, w, cin]`, `dy` is `[n, oh, ow, cout]`; into `v` as
    /// `[points][cin / 16][run][16]`, into `y` as `[points][panels][run][nr]`, and the sum of `dy` into `bias`.
    pub fn values(
        &self,
        part: usize,
        run: usize,
        input: &[f32],
        dy: &[f32],
        v: &mut [f32],
        y: &mut [f32],
        bias: &mut [f32],
    ) {
        let ConvShape { n, input: (h, w), output: (oh, ow), cin, cout, .. } = self.shape;
        assert_eq!(input.len(), n * h * w * cin);
        assert_eq!(dy.len(), n * oh * ow * cout);
        assert_eq!([v.len(), y.len(), bias.len()], self.run_len());
        with_maps!(self.kind, maps => dispatch!(self.isa, self.words, s, product => self.values_generic(
            s, maps, product, part, run, input, dy, v, y, bias
        )))
    }

    #[inline(always)]
    fn values_generic<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        product: impl Product,
        part: usize,
        run: usize,
        input: &[f32],
        dy: &[f32],
        v: &mut [f32],
        y: &mut [f32],
        bias: &mut [f32],
    ) {
        let (ConvShape { cin, pad, .. }, nr) = (self.shape, self.tile.nv * S::F32_LANES);
        let (stride, pad) = (self.kind.stride(), (pad.0 as isize, pad.1 as isize));
        let from = ((part / stride) as isize - pad.0, (part % stride) as isize - pad.1);
        bias.fill(0.0);
        let mut space = [[s.splat_f32s(0.0); D]; D];
        let none_scaled = whole::none();
        for word in 0..RUN {
            let first = (run * RUN + word) * self.words.numbers();
            let tiles = [self.tiles.get(first), self.tiles.get(first + 1)];
            let inputs = tiles.map(|tile| Inputs {
                of: PhantomData::<F>,
                window: tile.map(|tile| self.tiles.window(tile, from)),
                input,
                cin,
            });
            for c in (0..self.rows).step_by(S::F32_LANES) {
                let at = (c / K_RUN * RUN + word) * K_RUN + c % K_RUN;
                words_of(
                    s,
                    product,
                    self.words,
                    &none_scaled,
                    &mut space,
                    (&inputs[0], c),
                    (&inputs[1], c),
                    &mut v[at..],
                    self.input_point(),
                );
            }
            let gradients = tiles.map(|tile| Gradients { of: PhantomData::<F>, grad: self, tile, dy });
            for c in (0..self.columns).step_by(S::F32_LANES) {
                let at = (c / nr * RUN + word) * nr + c % nr;
                words_of(
                    s,
                    product,
                    self.words,
                    &none_scaled,
                    &mut space,
                    (&gradients[0], c),
                    (&gradients[1], c),
                    &mut y[at..],
                    self.output_point(),
                );
            }
            for gradients in &gradients[..self.words.numbers()] {
                gradients.add_to(s, bias);
            }
        }
    }

    /// The sums over a block's tiles at one point, `[rows][columns]`, for a range of rows: added to `sums`, or put there.
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
        dispatch!(self.isa, self.words, s, product => self.multiply_generic(
            s, product, point, rows, v, y, sums, add
        ))
    }

    #[inline(always)]
    fn multiply_generic<S: Simd>(
        &self,
        s: S,
        product: impl Product,
        point: usize,
        rows: Range<usize>,
        v: &[f32],
        y: &[f32],
        sums: &mut [f32],
        add: bool,
    ) {
        let nr = self.tile.nv * S::F32_LANES;
        for j in 0..self.columns / nr {
            let rows = rows.clone();
            with_tile!(self.tile, column_of_tiles::<S>(s, self, product, point, rows, j, v, y, sums, add));
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

/// A tile's output gradients, `[n, oh, ow, cout]`; zero outside of the image, without a tile, and for channels that are not
/// there.
struct Gradients<'a, F> {
    /// Which maps.
    of: PhantomData<F>,
    grad: &'a WinogradGrad,
    tile: Option<Tile>,
    dy: &'a [f32],
}

impl<F> Gradients<'_, F> {
    /// Where the pixel in row `i` and column `j` of the tile begins, if there is one.
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
    fn bring(&self, s: S, c: usize, put: impl FnMut(usize, usize, S::f32s)) {
        let cout = self.grad.shape.cout;
        let (Some(tile), true) = (self.tile, c < cout) else { return none::<S, D>(s, put) };
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

/// One panel of columns against the rows of a range: sums over the block's runs, one behind the other.
#[inline(always)]
fn column_of_tiles<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    of: &WinogradGrad,
    product: impl Product,
    point: usize,
    rows: Range<usize>,
    j: usize,
    v: &[f32],
    y: &[f32],
    sums: &mut [f32],
    add: bool,
) {
    let nr = NV * S::F32_LANES;
    let [v_run, y_run, _] = of.run_len();
    let (v_point, y_point) = (point * of.input_point(), point * of.output_point() + j * RUN * nr);
    for row in rows.clone().step_by(MR) {
        let a_start = v_point + row / K_RUN * (RUN * K_RUN) + row % K_RUN;
        let mut acc = tile::zero::<S, MR, NV>(s);
        for (v, y) in v.chunks_exact(v_run).zip(y.chunks_exact(y_run)) {
            let a = &v[a_start..][..(RUN - 1) * K_RUN + MR];
            let b = S::as_simd_f32s(&y[y_point..][..RUN * nr]).0;
            tile::columns_apart(s, product, a, b, &mut acc);
        }
        for (r, acc) in acc.iter().enumerate() {
            let at = (row - rows.start + r) * of.columns + j * nr;
            tile::store_row(s, acc, &mut sums[at..at + nr], add);
        }
    }
}
