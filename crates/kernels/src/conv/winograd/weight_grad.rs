//! Weight gradient.

use super::super::{ConvShape, Factors};
use super::{APART, BLOCK, Kind, M, Maps, Tile, Tiles, load, pays, store, transform, with_maps, words_of};
use crate::bf16::Words;
use crate::isa::{Isa, dispatch};
use crate::tile::{self, K_RUN, Product, TileShape, with_tile};
use pulp::Simd;
use std::ops::Range;

/// Words of tiles whose values lie together: the run of k of a matrix product.
const RUN: usize = 16;
/// Tiles of a block of many channels, if there are as many: every block reads and writes all sums.
const FEWEST: usize = 128;

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
}

impl WinogradGrad {
    /// The weight gradient, if there is a way for the convolution.
    pub fn new(isa: Isa, factors: Factors, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let tiles = Tiles::of_output(kind, &shape);
        let tile = TileShape::of_runs(isa.lanes());
        let rows = shape.cin.next_multiple_of(K_RUN);
        let columns = shape.cout.next_multiple_of(tile.nv * isa.lanes());
        let wanted = (BLOCK / (kind.points() * (rows + columns))).max(FEWEST);
        let words = Words::of(isa, factors);
        let run = RUN * words.numbers();
        let runs = (wanted / run).min(tiles.count().div_ceil(run));
        Some(Self { isa, kind, tile, words, shape, tiles, rows, columns, runs })
    }

    /// With blocks of `runs` runs of tiles; for tests, which would need large pictures otherwise.
    pub fn in_blocks(mut self, runs: usize) -> Self {
        self.runs = runs.clamp(1, self.all_runs());
        self
    }

    /// Whether this is expected to take less time than the plain way with such factors.
    pub fn pays(&self, factors: Factors) -> bool {
        let words = [Words::of(self.isa, factors), self.words];
        let brought = self.parts() * (self.shape.cin + self.shape.cout);
        pays(words, false, self.kind, &self.shape, self.tiles.count(), brought)
    }

    /// Parts of the input, each with its own taps.
    pub fn parts(&self) -> usize {
        self.kind.parts().count()
    }

    /// Blocks of runs of tiles.
    pub fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (all, block) = (self.all_runs(), self.runs);
        (0..all).step_by(block).map(move |first| first..all.min(first + block))
    }

    fn all_runs(&self) -> usize {
        self.tiles.count().div_ceil(RUN * self.words.numbers())
    }

    fn input_point(&self) -> usize {
        RUN * self.rows + APART
    }

    fn output_point(&self) -> usize {
        RUN * self.columns + APART
    }

    /// Numbers of the values of one run: of the inputs, of the output gradients, and of its part of the bias gradient.
    pub fn run_len(&self) -> [usize; 3] {
        let points = self.kind.points();
        [points * self.input_point(), points * self.output_point(), self.shape.cout]
    }

    /// Numbers of the sums at one point, and points.
    pub fn sums_len(&self) -> (usize, usize) {
        (self.rows * self.columns + APART, self.kind.points())
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

    /// Numbers of shared scratch memory: what [`WinogradGrad::run_len`] says for a block, the sums, and a part's weight
    /// gradient by rows.
    pub fn shared_len(&self) -> [usize; 5] {
        let [v, y, b] = self.run_len().map(|len| len * self.runs);
        let ((sums, points), ConvShape { cin, cout, .. }) = (self.sums_len(), self.shape);
        [v, y, b, points * sums, cin * self.taps() * cout]
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
        maps: F,
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
        for word in 0..RUN {
            let first = (run * RUN + word) * self.words.numbers();
            let (tile, odd) = (self.tiles.get(first), self.tiles.get(first + 1));
            for c in (0..self.rows).step_by(S::F32_LANES) {
                let values = self.tiles.values(s, maps, tile, from, input, cin, c);
                let values = words_of(
                    s,
                    product,
                    self.words,
                    values,
                    #[inline(always)]
                    || self.tiles.values(s, maps, odd, from, input, cin, c),
                );
                let at = (c / K_RUN * RUN + word) * K_RUN + c % K_RUN;
                put(s, values, v, at, self.input_point());
            }
            for c in (0..self.columns).step_by(S::F32_LANES) {
                let values = self.gradients(s, maps, tile, dy, c, bias);
                let values = words_of(
                    s,
                    product,
                    self.words,
                    values,
                    #[inline(always)]
                    || self.gradients(s, maps, odd, dy, c, bias),
                );
                put(s, values, y, (c / nr * RUN + word) * nr + c % nr, self.output_point());
            }
        }
    }

    /// `A dy A^T` of a vector of channels from `c` of a tile; adds the tile's sum to the bias gradient.
    #[inline(always)]
    fn gradients<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        tile: Option<Tile>,
        dy: &[f32],
        c: usize,
        bias: &mut [f32],
    ) -> [[S::f32s; D]; D] {
        let ((oh, ow), cout) = (self.shape.output, self.shape.cout);
        let Some(tile) = tile.filter(|_| c < cout) else {
            return [[s.splat_f32s(0.0); D]; D];
        };
        let lanes = S::F32_LANES.min(cout - c);
        let mut d = [[s.splat_f32s(0.0); M]; M];
        let mut sum = s.splat_f32s(0.0);
        for i in 0..M {
            for j in 0..M {
                if tile.y + i < oh && tile.x + j < ow {
                    let at = ((tile.picture * oh + tile.y + i) * ow + tile.x + j) * cout + c;
                    d[i][j] = load(s, &dy[at..at + lanes]);
                    sum = s.add_f32s(sum, d[i][j]);
                }
            }
        }
        let bias = &mut bias[c..c + lanes];
        let before = load(s, bias);
        store(s, bias, s.add_f32s(before, sum));
        F::output_grad(s, d)
    }

    /// The sums over a block's tiles at one point, `[rows][columns]`: added to `sums`, or put there.
    pub fn multiply(&self, point: usize, v: &[f32], y: &[f32], sums: &mut [f32], add: bool) {
        assert_eq!(sums.len(), self.sums_len().0);
        dispatch!(self.isa, self.words, s, product => self.multiply_generic(s, product, point, v, y, sums, add))
    }

    #[inline(always)]
    fn multiply_generic<S: Simd>(
        &self,
        s: S,
        product: impl Product,
        point: usize,
        v: &[f32],
        y: &[f32],
        sums: &mut [f32],
        add: bool,
    ) {
        let nr = self.tile.nv * S::F32_LANES;
        for j in 0..self.columns / nr {
            with_tile!(self.tile, column_of_tiles::<S>(s, self, product, point, j, v, y, sums, add));
        }
    }

    /// The weight gradient of input channel `ci` of a part, `[taps, cout]`, from the sums at all points.
    pub fn reduce(&self, ci: usize, sums: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), self.taps() * self.shape.cout);
        with_maps!(self.kind, maps => dispatch!(self.isa, s => self.reduce_generic(s, maps, ci, sums, out)))
    }

    #[inline(always)]
    fn reduce_generic<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        ci: usize,
        sums: &[f32],
        out: &mut [f32],
    ) {
        let cout = self.shape.cout;
        for c in (0..cout).step_by(S::F32_LANES) {
            let lanes = S::F32_LANES.min(cout - c);
            let mut u = [[s.splat_f32s(0.0); D]; D];
            for i in 0..D {
                for j in 0..D {
                    let at = (i * D + j) * self.sums_len().0 + ci * self.columns + c;
                    u[i][j] = load(s, &sums[at..at + S::F32_LANES]);
                }
            }
            let w = F::weights_grad(s, u);
            for i in 0..R {
                for j in 0..R {
                    store(s, &mut out[(i * R + j) * cout + c..][..lanes], w[i][j]);
                }
            }
        }
    }
}

/// Puts a vector at every point.
#[inline(always)]
fn put<S: Simd, const D: usize>(s: S, values: [[S::f32s; D]; D], to: &mut [f32], at: usize, point: usize) {
    for i in 0..D {
        for j in 0..D {
            let at = at + (i * D + j) * point;
            store(s, &mut to[at..at + S::F32_LANES], values[i][j]);
        }
    }
}

/// One panel of columns against all rows: sums over the block's runs, one behind the other.
#[inline(always)]
fn column_of_tiles<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    of: &WinogradGrad,
    product: impl Product,
    point: usize,
    j: usize,
    v: &[f32],
    y: &[f32],
    sums: &mut [f32],
    add: bool,
) {
    let nr = NV * S::F32_LANES;
    let [v_run, y_run, _] = of.run_len();
    let (v_point, y_point) = (point * of.input_point(), point * of.output_point() + j * RUN * nr);
    for i in 0..of.rows / MR {
        let a_start = v_point + i * MR / K_RUN * (RUN * K_RUN) + i * MR % K_RUN;
        let mut acc = tile::zero::<S, MR, NV>(s);
        for (v, y) in v.chunks_exact(v_run).zip(y.chunks_exact(y_run)) {
            let a = &v[a_start..][..(RUN - 1) * K_RUN + MR];
            let b = S::as_simd_f32s(&y[y_point..][..RUN * nr]).0;
            tile::columns_apart(s, product, a, b, &mut acc);
        }
        for (r, acc) in acc.iter().enumerate() {
            let at = (i * MR + r) * of.columns + j * nr;
            tile::store_row(s, acc, &mut sums[at..at + nr], add);
        }
    }
}
