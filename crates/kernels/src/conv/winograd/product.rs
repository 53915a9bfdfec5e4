//! Forward pass and data gradient.

use super::super::{APART, ConvShape, Epilogue, Factors};
use super::points::{Inputs, Space, Weights, words_of};
use super::transform::Maps;
use super::whole::{self, Gains};
use super::{BLOCK, Kind, M, Tile, Tiles, load, pays, rows_of_block, store, transform, with_maps};
use crate::bf16::Words;
use crate::isa::{Isa, dispatch};
use crate::tile::{self, K_RUN, Product, TileShape, with_tile};
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Tiles of a block of many channels, if there are as many.
const FEWEST: usize = 128;
/// Multiply-adds of the products beside which making U does not count.
const MANY_PRODUCTS: usize = 256 << 20;
/// Most numbers of U that are kept of weights that do not change, each up to four times: sampling should take little memory.
const MOST_KEPT: usize = 8 << 20;
/// Pictures of a batch, as far as the choice of the way to compute goes where weights do not change.
const NOMINAL_BATCH: usize = 16;
/// Numbers of U that are made at a time where one block of tiles is all there is.
const GROUP: usize = 4 << 20;
/// Panels that are made at a time at least, side by side.
const FEWEST_PANELS: usize = 4;
/// Numbers of V of a block that is one thread's own, if one row of tiles has as few: they stay in the core's own cache beside
/// what else comes there.
const OWN_VALUES: usize = 56 << 10;
/// Most numbers of V of such a block.
const MOST_OWN_VALUES: usize = 112 << 10;
/// Most numbers of U for which there are such blocks, since each block reads them all: the last-level cache should hold them.
const MOST_OWN_WEIGHTS: usize = 3 << 20;
/// Fewest such blocks: enough to share them out.
const FEWEST_OWN: usize = 8;
/// Most tiles of a batch of pictures of which the products with a panel of weights stay in the core's own cache.
const FEW_TILES: usize = 64;
/// Numbers of U that are made at a time for so few tiles: they are read a few times and never leave that cache.
const PART_OF_U: usize = 48 << 10;

/// A convolution, or its data gradient, prepared for one instruction set.
#[derive(Clone, Debug)]
pub struct Winograd {
    pub(super) isa: Isa,
    pub(super) kind: Kind,
    pub(super) tile: TileShape,
    pub(super) words: Words,
    /// Whether pairs are of whole numbers.
    pub(super) whole: bool,
    pub(super) shape: ConvShape,
    /// Data gradient: input and output, `cin` and `cout` have changed places, the weights are turned round.
    pub(super) transposed: bool,
    pub(super) tiles: Tiles,
    /// Height and width of the output.
    to: (usize, usize),
    /// The inputs' parts forward, the outputs' in the data gradient.
    pub(super) parts: Vec<Part>,
    /// Channels of the input, and of the output.
    pub(super) cin: usize,
    pub(super) cout: usize,
    /// Words of all channels that are summed over, rounded up to [`K_RUN`].
    pub(super) k: usize,
    /// Rows of tiles of a block.
    block_rows: usize,
    /// Panels of columns of a group.
    pub(super) group: usize,
    /// Whether each block is one thread's own, from inputs to outputs.
    pub(super) own_blocks: bool,
    /// Whether each panel of the weights is one thread's own, from weights to products.
    pub(super) own_panels: bool,
    /// Whether weights do not change from pass to pass.
    fixed_weights: bool,
}

/// Every other row and column, or all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Its first tap.
    pub(super) tap: (usize, usize),
    /// The row and column of the input where the first output's inputs begin.
    pub(super) first: (isize, isize),
}

impl Winograd {
    /// The convolution `y = x * w`, if there is a way for it. Factors of 16 bits are whole numbers, where there are products of pairs,
    /// else f32: rounded to bf16 at the points they would not be exact enough.
    pub fn forward(isa: Isa, factors: Factors, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let tiles = Tiles::of_output(kind, &shape);
        let part = |tap: (usize, usize)| {
            let first = (tap.0 as isize - shape.pad.0 as isize, tap.1 as isize - shape.pad.1 as isize);
            Part { tap, first }
        };
        let parts = kind.parts().map(part).collect();
        let (words, whole) = match Words::of(isa, factors) {
            Words::Pairs => (Words::Pairs, true),
            _ => (Words::Single, false),
        };
        Some(Self::new(isa, words, whole, kind, shape, false, tiles, parts))
    }

    /// The data gradient `dx` from `dy`, if there is a way for the convolution.
    pub fn data_grad(isa: Isa, factors: Factors, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let (stride, taps) = (kind.stride(), kind.taps());
        let to = (shape.input.0 / stride, shape.input.1 / stride);
        let tiles = Tiles::new(shape.n, shape.output, 1, to);
        // Row `stride i + r` takes from row o where it is `stride o + k - pad`: with the taps k = tap + stride a,
        // o = i + (r + pad - tap) / stride - a.
        let row = |r: usize, pad: usize| {
            let tap = (r + pad) % stride;
            (tap, ((r + pad - tap) / stride) as isize - (taps as isize - 1))
        };
        let part = |r: (usize, usize)| {
            let (y, x) = (row(r.0, shape.pad.0), row(r.1, shape.pad.1));
            Part { tap: (y.0, x.0), first: (y.1, x.1) }
        };
        let parts = kind.parts().map(part).collect();
        Some(Self::new(isa, Words::of(isa, factors), false, kind, shape, true, tiles, parts))
    }

    fn new(
        isa: Isa,
        words: Words,
        whole: bool,
        kind: Kind,
        shape: ConvShape,
        transposed: bool,
        tiles: Tiles,
        parts: Vec<Part>,
    ) -> Self {
        let (cin, cout, to, summed) = match transposed {
            false => (shape.cin, shape.cout, shape.output, parts.len() * shape.cin),
            true => (shape.cout, shape.cin, shape.input, shape.cout),
        };
        let tile = match tiles.count() {
            ..=4 => TileShape::pick_few(isa.lanes(), cout),
            _ => TileShape::pick(isa.lanes(), cout),
        };
        let nr = tile.nv * isa.lanes();
        let numbers = words.numbers() * isa.lanes();
        let k = (summed.div_ceil(numbers) * isa.lanes()).next_multiple_of(K_RUN);
        let panels = cout.div_ceil(nr);
        let own_rows = rows_of_block(&tiles, (OWN_VALUES / (kind.points() * k)).max(tile.mr), tile.mr);
        let own_tiles = (own_rows * tiles.grid.1).next_multiple_of(tile.mr);
        let own_blocks = kind.points() * k * own_tiles <= MOST_OWN_VALUES
            && kind.points() * k * panels * nr <= MOST_OWN_WEIGHTS
            && tiles.rows() >= FEWEST_OWN * own_rows;
        let block_rows = match own_blocks {
            true => own_rows,
            false => {
                let wanted = (BLOCK / (kind.points() * (k + panels * nr))).max(FEWEST);
                rows_of_block(&tiles, wanted, tile.mr)
            }
        };
        let own_panels = !own_blocks && block_rows == tiles.rows() && tiles.count() <= FEW_TILES;
        let group = match block_rows == tiles.rows() && !own_panels {
            true => (GROUP / (kind.points() * k * nr)).clamp(FEWEST_PANELS.min(panels), panels),
            false => panels,
        };
        Self {
            isa,
            kind,
            tile,
            words,
            whole,
            shape,
            transposed,
            tiles,
            to,
            parts,
            cin,
            cout,
            k,
            block_rows,
            group,
            own_blocks,
            own_panels,
            fixed_weights: false,
        }
    }

    /// With blocks of `rows` rows of tiles, and groups of `panels` panels if one block is all; for tests, which would
    /// need large pictures otherwise.
    pub fn in_blocks(mut self, rows: usize, panels: usize) -> Self {
        (self.own_blocks, self.own_panels) = (false, false);
        self.block_rows = rows.clamp(1, self.tiles.rows());
        self.group = match self.block_rows == self.tiles.rows() {
            true => panels.clamp(1, self.panels_of_part()),
            false => self.panels_of_part(),
        };
        self
    }

    /// For weights that do not change from pass to pass: U is made once and kept, where making it would be a good part of
    /// a pass and it is not too large (it has up to four times as many numbers as the weights).
    pub fn with_fixed_weights(self) -> Self {
        let of = Self { fixed_weights: true, ..self };
        match of.keeps_weights() {
            true => Self { own_panels: false, group: of.panels_of_part(), ..of },
            false => of,
        }
    }

    /// Whether weights do not change from pass to pass.
    pub fn has_fixed_weights(&self) -> bool {
        self.fixed_weights
    }

    /// Whether U is to be kept.
    pub fn keeps_weights(&self) -> bool {
        self.fixed_weights && self.small() && self.weights_len() * self.tiles.count() < MANY_PRODUCTS
    }

    /// Whether U is small enough to be kept.
    fn small(&self) -> bool {
        self.weights_len() <= MOST_KEPT
    }

    /// Numbers of all of U.
    fn weights_len(&self) -> usize {
        self.panels() * self.panel_len()
    }

    /// Whether this is expected to take less time than the plain way with such factors. With fixed weights, when pictures
    /// are drawn, the answer is the same for every size of a batch: a picture must not depend on its neighbours.
    pub fn pays(&self, factors: Factors) -> bool {
        let n = if self.fixed_weights { NOMINAL_BATCH } else { self.shape.n };
        let tiles = Tiles { n, ..self.tiles }.count();
        // Each part of the inputs forward; both sides for each part of the outputs in the data gradient.
        let brought = match self.transposed {
            false => self.parts.len() * self.cin + self.cout,
            true => self.parts.len() * (self.cin + self.cout),
        };
        let words = [Words::of(self.isa, factors), self.words];
        let kept = self.fixed_weights && self.small();
        pays(words, kept, self.kind, &ConvShape { n, ..self.shape }, tiles, brought)
    }

    pub(super) fn nr(&self) -> usize {
        self.tile.nv * self.isa.lanes()
    }

    /// Panels of columns of the weights, those of each of the output's parts behind each other.
    pub fn panels(&self) -> usize {
        self.output_parts() * self.panels_of_part()
    }

    /// Parts of the output, which are made one after the other.
    fn output_parts(&self) -> usize {
        if self.transposed { self.parts.len() } else { 1 }
    }

    pub(super) fn panels_of_part(&self) -> usize {
        self.cout.div_ceil(self.nr())
    }

    /// Groups of panels that are worked on one after the other, each of one part of the output, with whether it is the first
    /// of its part. A part has more than one only if there is one block.
    pub fn groups(&self) -> impl Iterator<Item = (Range<usize>, bool)> + use<> {
        let (panels, group) = (self.panels_of_part(), self.group);
        (0..self.output_parts()).flat_map(move |part| {
            let range = move |first: usize| part * panels + first..part * panels + panels.min(first + group);
            (0..panels).step_by(group).map(move |first| (range(first), first == 0))
        })
    }

    /// Blocks of rows of tiles.
    pub fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, block) = (self.tiles.rows(), self.block_rows);
        (0..rows).step_by(block).map(move |first| first..rows.min(first + block))
    }

    /// Numbers of one panel of U. Behind whole numbers is their step.
    pub fn panel_len(&self) -> usize {
        self.points() * self.packed_point() + if self.whole { APART } else { 0 }
    }

    fn packed_point(&self) -> usize {
        self.packed_words(self.k)
    }

    /// Numbers of U at one point for so many words of k.
    pub(super) fn packed_words(&self, k: usize) -> usize {
        k * self.nr() + APART
    }

    /// Words of k of which U is made at a time, if panels are threads' own.
    pub(super) fn part_of_k(&self) -> usize {
        let run = if self.whole { whole::RUN } else { K_RUN };
        (PART_OF_U / (self.points() * self.nr()) / run * run).max(run).min(self.k)
    }

    /// Numbers of U of a group, of all if it is kept, or of a part of a panel.
    pub fn packed_len(&self) -> usize {
        if self.own_panels {
            return self.points() * self.packed_words(self.part_of_k());
        }
        let panels = if self.keeps_weights() { self.panels() } else { self.group };
        panels * self.panel_len()
    }

    fn point_len(&self) -> usize {
        self.k * self.tile.mr + APART
    }

    /// Numbers of V of one group of tiles, of which a block has [`Winograd::value_groups`]. Behind whole numbers are the tiles'
    /// steps.
    pub fn values_len(&self) -> usize {
        let steps = if self.whole { self.tile.mr.next_multiple_of(APART) } else { 0 };
        self.points() * self.point_len() + steps
    }

    /// Groups of tiles of a block of `rows` rows.
    pub fn value_groups(&self, rows: usize) -> usize {
        (rows * self.tiles.grid.1).div_ceil(self.tile.mr)
    }

    /// Numbers of M at one point, for a block of `rows` rows and `panels` panels.
    pub fn products_len(&self, rows: usize, panels: usize) -> usize {
        panels * self.value_groups(rows) * self.tile.mr * self.nr() + APART
    }

    /// Points.
    pub fn points(&self) -> usize {
        self.kind.points()
    }

    /// Numbers of scratch memory: U of a group (of a part of a panel, if panels are threads' own), V of a block, and M of a block
    /// (of one panel, if blocks are threads' own; one panel's after the other, if panels are).
    pub fn shared_len(&self) -> [usize; 3] {
        let (panels, times) = match (self.own_blocks, self.own_panels) {
            (true, _) => (1, 1),
            (_, true) => (1, self.group),
            _ => (self.group, 1),
        };
        [
            self.packed_len(),
            self.value_groups(self.block_rows) * self.values_len(),
            times * self.points() * self.products_len(self.block_rows, panels),
        ]
    }

    /// Numbers of output that a row of tiles makes.
    pub fn row_len(&self, row: usize) -> usize {
        self.tiles.pixel_rows(row) * self.step() * self.to.1 * self.cout
    }

    /// Rows and columns of the output between those of a part.
    fn step(&self) -> usize {
        if self.transposed { self.kind.stride() } else { 1 }
    }

    /// Numbers of the output, `[n, h, w, cout]`.
    pub fn output_len(&self) -> usize {
        self.tiles.n * self.to.0 * self.to.1 * self.cout
    }

    /// U of panel `panel`, `[points][k][nr]`, from the weights `[kh, kw, shape.cin, shape.cout]`.
    pub fn pack_panel(&self, panel: usize, weights: &[f32], out: &mut [f32]) {
        assert_eq!(weights.len(), self.shape.weights());
        assert_eq!(out.len(), self.panel_len());
        with_maps!(self.kind, maps => dispatch!(self.isa, self.words, s, product or whole if self.whole => self.pack_whole_panel(
            s, maps, product, panel, weights, out
        )))
    }

    #[inline(always)]
    fn pack_whole_panel<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        maps: F,
        product: P,
        panel: usize,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let step = if P::WHOLE { self.weight_step::<S, F, D, R>(s, panel, 0..self.k, weights) } else { 0.0 };
        let (scale, step) = whole::weight_factors::<P, F, D, R>(step);
        if P::WHOLE {
            out[self.points() * self.packed_point()] = step;
        }
        self.pack_generic(s, maps, product, panel, 0..self.k, &scale, weights, out);
    }

    #[inline(always)]
    pub(super) fn pack_generic<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        product: P,
        panel: usize,
        words: Range<usize>,
        scale: &Gains<D>,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let (nr, panels, point_len) = (self.nr(), self.panels_of_part(), self.packed_words(words.len()));
        let (part, panel) = (panel / panels, panel % panels);
        let mut space = Space::new(s);
        for v in 0..self.tile.nv {
            let column = panel * nr + v * S::F32_LANES;
            let source = Weights { of_maps: PhantomData::<F>, of: self, part, column, weights };
            for word in words.clone() {
                // The channels of a word are a vector apart.
                let channel = word / S::F32_LANES * (P::PER_WORD * S::F32_LANES) + word % S::F32_LANES;
                let (even, odd) = ((&source, channel), (&source, channel + S::F32_LANES));
                let at = (word - words.start) * nr + v * S::F32_LANES;
                words_of(
                    s,
                    product,
                    self.words,
                    scale,
                    &mut space,
                    even,
                    odd,
                    #[inline(always)]
                    |point, u| store(s, &mut out[point * point_len + at..][..S::F32_LANES], u),
                );
            }
        }
    }

    /// Part and channel of the input of channel `channel` of those that are summed over, for a part of the output, if there
    /// is such a channel.
    #[inline(always)]
    pub(super) fn summed(&self, output_part: usize, channel: usize) -> Option<(Part, usize)> {
        let (part, c) = match self.transposed {
            false => (channel / self.cin, channel % self.cin),
            true if channel >= self.cin => return None,
            true => (output_part, channel),
        };
        self.parts.get(part).map(|part| (*part, c))
    }

    /// V of the group of tiles `group` of a block that begins at tile row `first_row`, for the panels from `panel` on:
    /// `[points][k / 16][mr][16]`.
    pub fn values(&self, first_row: usize, group: usize, panel: usize, input: &[f32], out: &mut [f32]) {
        let (h, w) = self.tiles.from;
        assert_eq!(input.len(), self.tiles.n * h * w * self.cin);
        assert_eq!(out.len(), self.values_len());
        with_maps!(self.kind, maps => dispatch!(self.isa, self.words, s, product or whole if self.whole => self.values_generic(
            s, maps, product, first_row, group, panel, input, out
        )))
    }

    #[inline(always)]
    fn values_generic<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        maps: F,
        product: P,
        first_row: usize,
        group: usize,
        panel: usize,
        input: &[f32],
        out: &mut [f32],
    ) {
        let (mr, output_part) = (self.tile.mr, panel / self.panels_of_part());
        let first = first_row * self.tiles.grid.1 + group * mr;
        let mut space = Space::new(s);
        let gains = if P::WHOLE { whole::input_gains::<F, D, R>() } else { whole::none() };
        for r in 0..mr {
            let tile = self.tiles.get(first + r);
            let mut scale = gains;
            if P::WHOLE {
                let step = self.value_step::<S, D>(s, tile, input);
                (scale, out[self.points() * self.point_len() + r]) = whole::factors(&gains, step);
            }
            for word in (0..self.k).step_by(S::F32_LANES) {
                // Of which channels a word is made is nobody's business, as long as it is the same in U.
                let channel = P::PER_WORD * word;
                let (even, c) = self.inputs(maps, tile, output_part, channel, input);
                let (odd, odd_c) = self.inputs(maps, tile, output_part, channel + S::F32_LANES, input);
                let at = (word / K_RUN * mr + r) * K_RUN + word % K_RUN;
                words_of(
                    s,
                    product,
                    self.words,
                    &scale,
                    &mut space,
                    (&even, c),
                    (&odd, odd_c),
                    #[inline(always)]
                    |point, v| store(s, &mut out[point * self.point_len() + at..][..S::F32_LANES], v),
                );
            }
        }
    }

    /// The inputs of a tile that summed channel `channel` is among, and its channel there.
    #[inline(always)]
    fn inputs<'a, F>(
        &self,
        _: F,
        tile: Option<Tile>,
        output_part: usize,
        channel: usize,
        input: &'a [f32],
    ) -> (Inputs<'a, F>, usize) {
        let (window, c) = match (tile, self.summed(output_part, channel)) {
            (Some(tile), Some((part, c))) => (Some(self.tiles.window(tile, part.first)), c),
            _ => (None, 0),
        };
        (Inputs { of: PhantomData, window, input, cin: self.cin }, c)
    }

    /// M at one point, `[panels][tiles][nr]`, for the `panels` panels that `packed` holds.
    pub fn multiply(&self, point: usize, panels: usize, values: &[f32], packed: &[f32], out: &mut [f32]) {
        with_maps!(self.kind, maps => dispatch!(self.isa, self.words, s, product or whole if self.whole => self.multiply_generic(
            s, maps, product, point, panels, values, packed, out
        )))
    }

    #[inline(always)]
    fn multiply_generic<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        product: P,
        point: usize,
        panels: usize,
        values: &[f32],
        packed: &[f32],
        out: &mut [f32],
    ) {
        let nr = self.nr();
        let len = values.len() / self.values_len() * self.tile.mr * nr;
        for (j, out) in out.chunks_exact_mut(len).take(panels).enumerate() {
            let panel = &packed[j * self.panel_len()..][..self.panel_len()];
            let b = S::as_simd_f32s(&panel[point * self.packed_point()..][..self.k * nr]).0;
            let mut unit = 1.0;
            if P::WHOLE {
                unit = panel[self.points() * self.packed_point()] * whole::unit_at::<F, D, R>(point);
            }
            with_tile!(
                self.tile,
                point_panels::<S>(s, self, product, point, unit, 0..self.k, values, b, out)
            );
        }
    }

    /// The outputs of a row of tiles, in the columns of the panels `panels`, from M of a block that begins at tile row
    /// `first_row`.
    pub fn outputs(
        &self,
        first_row: usize,
        row: usize,
        panels: Range<usize>,
        products: &[f32],
        epilogue: Epilogue<'_>,
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), self.row_len(row));
        with_maps!(self.kind, maps => dispatch!(self.isa, s => self.outputs_generic(
            s, maps, first_row, row, panels, products, epilogue, out
        )))
    }

    #[inline(always)]
    fn outputs_generic<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        first_row: usize,
        row: usize,
        panels: Range<usize>,
        products: &[f32],
        epilogue: Epilogue<'_>,
        out: &mut [f32],
    ) {
        let (nr, width, cout, step) = (self.nr(), self.to.1, self.cout, self.step());
        let point_len = products.len() / self.points();
        let panel_len = (point_len - APART) / panels.len();
        let part = panels.start / self.panels_of_part();
        let first_column = (panels.start - part * self.panels_of_part()) * nr;
        // The part's first row and column of the output.
        let (top, left) = (part / step, part % step);
        let first_pixel = (self.tiles.tile(row * self.tiles.grid.1).picture * self.to.0
            + row % self.tiles.grid.0 * M * step)
            * width;
        let mut lines = [[s.splat_f32s(0.0); D]; D];
        for column in 0..self.tiles.grid.1 {
            let local = (row - first_row) * self.tiles.grid.1 + column;
            let tile = self.tiles.tile(row * self.tiles.grid.1 + column);
            for c in (first_column..cout.min(first_column + panels.len() * nr)).step_by(S::F32_LANES) {
                let lanes = S::F32_LANES.min(cout - c);
                let inside = c - first_column;
                let at = inside / nr * panel_len + local * nr + inside % nr;
                let mut bias = s.splat_f32s(0.0);
                if let Some(b) = epilogue.bias {
                    bias = load(s, &b[c..c + lanes]);
                }
                if let Some(b) = epilogue.picture_bias {
                    bias = s.add_f32s(bias, load(s, &b[tile.picture * cout + c..][..lanes]));
                }
                F::output(
                    s,
                    &mut lines,
                    #[inline(always)]
                    |i: usize, j: usize| load(s, &products[(i * D + j) * point_len + at..][..S::F32_LANES]),
                    #[inline(always)]
                    |i, j, y| {
                        if tile.y + i >= self.tiles.to.0 || tile.x + j >= self.tiles.to.1 {
                            return;
                        }
                        let pixel = (i * step + top) * width + (tile.x + j) * step + left;
                        let mut y = s.add_f32s(y, bias);
                        if let Some(r) = epilogue.residual {
                            let r = load(s, &r[(first_pixel + pixel) * cout + c..][..lanes]);
                            y = s.add_f32s(y, r);
                        }
                        store(s, &mut out[pixel * cout + c..][..lanes], y);
                    },
                );
            }
        }
    }
}

/// All groups of tiles at one point against one panel of weights, as far as these words of k go; but for the first, sums go on
/// from what is there, which gives the bits of one go. `unit` is what whole numbers are multiplied with, besides the tiles' steps.
#[inline(always)]
pub(super) fn point_panels<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    of: &Winograd,
    product: impl Product,
    point: usize,
    unit: f32,
    words: Range<usize>,
    values: &[f32],
    b: &[S::f32s],
    out: &mut [f32],
) {
    let nr = NV * S::F32_LANES;
    for (values, out) in values.chunks_exact(of.values_len()).zip(out.chunks_exact_mut(MR * nr)) {
        if is_whole(product) {
            whole_sums::<S, MR, NV>(s, of, product, point, unit, words.clone(), values, b, out);
            continue;
        }
        let a = &values[point * of.point_len() + words.start * MR..][..words.len() * MR];
        let mut acc = tile::zero::<S, MR, NV>(s);
        if words.start > 0 {
            tile::take_up::<S, MR, NV>(out, &mut acc);
        }
        tile::blocked(s, product, a, b, &mut acc);
        for (acc, row) in acc.iter().zip(out.chunks_exact_mut(nr)) {
            tile::store_row(s, acc, row, false);
        }
    }
}

fn is_whole<P: Product>(_: P) -> bool {
    P::WHOLE
}

/// The same of one group of tiles in whole numbers: exactly for a run of words, then in f32.
#[inline(always)]
fn whole_sums<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    of: &Winograd,
    product: impl Product,
    point: usize,
    unit: f32,
    words: Range<usize>,
    values: &[f32],
    b: &[S::f32s],
    out: &mut [f32],
) {
    let steps = &values[of.points() * of.point_len()..][..MR];
    let values = &values[point * of.point_len()..];
    for first in words.clone().step_by(whole::RUN) {
        let run = first..words.end.min(first + whole::RUN);
        let (a, b) = (&values[first * MR..run.end * MR], &b[(first - words.start) * NV..][..run.len() * NV]);
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::blocked(s, product, a, b, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                acc[r][v] = s.mul_f32s(product.sums(s, acc[r][v]), s.splat_f32s(steps[r] * unit));
            }
        }
        for (acc, row) in acc.iter().zip(out.chunks_exact_mut(NV * S::F32_LANES)) {
            tile::store_row(s, acc, row, first > 0);
        }
    }
}
