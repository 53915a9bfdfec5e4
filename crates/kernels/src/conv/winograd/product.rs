//! Forward pass and data gradient: their sizes, and how they are cut into blocks, panels and groups. `phases.rs` computes.

use super::super::{CACHE_SET_PAD, ConvShape, MatmulDtype};
use super::{BLOCK, Kind, Tiles, is_faster, rows_of_block, whole};
use crate::bf16::Words;
use crate::isa::Isa;
use crate::tile::{K_RUN, TileShape};
use std::ops::Range;

/// Tiles of a block of many channels, if there are as many.
const FEWEST: usize = 128;
/// Multiply-adds of the products beside which making U does not count.
const MANY_PRODUCTS: usize = 256 << 20;
/// Most numbers of U that are kept of weights that do not change, each up to four times: sampling should take little memory.
const MOST_KEPT: usize = 8 << 20;
/// Tiles of a batch of images for which U in f32 is made anew each time: they need so little of a pass that reading it takes as long.
const FEW_KEPT: usize = 4;
/// Images of a batch, as far as the choice of the way to compute goes where weights do not change.
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
/// Most tiles of a batch of images of which the products with a panel of weights stay in the core's own cache.
const FEW_TILES: usize = 64;
/// Numbers of U that are made at a time for so few tiles: they are read a few times and never leave that cache.
const PART_OF_U: usize = 80 << 10;
/// Most panels of which U is made at a time then.
pub(super) const MOST_PANELS: usize = 8;

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
    pub(super) to: (usize, usize),
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
    pub(super) per_thread_blocks: bool,
    /// Whether each panel of the weights is one thread's own, from weights to products.
    pub(super) per_thread_panels: bool,
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
    pub fn forward(isa: Isa, factors: MatmulDtype, shape: ConvShape) -> Option<Self> {
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
    pub fn data_grad(isa: Isa, factors: MatmulDtype, shape: ConvShape) -> Option<Self> {
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
            few @ ..=4 => TileShape::pick_few(isa.lanes(), cout, few),
            _ => TileShape::pick(isa.lanes(), cout),
        };
        let nr = tile.nv * isa.lanes();
        let numbers = words.numbers() * isa.lanes();
        let k = (summed.div_ceil(numbers) * isa.lanes()).next_multiple_of(K_RUN);
        let panels = cout.div_ceil(nr);
        let own_rows = rows_of_block(&tiles, (OWN_VALUES / (kind.points() * k)).max(tile.mr), tile.mr);
        let own_tiles = (own_rows * tiles.grid.1).next_multiple_of(tile.mr);
        let per_thread_blocks = kind.points() * k * own_tiles <= MOST_OWN_VALUES
            && kind.points() * k * panels * nr <= MOST_OWN_WEIGHTS
            && tiles.rows() >= FEWEST_OWN * own_rows;
        let block_rows = match per_thread_blocks {
            true => own_rows,
            false => {
                let wanted = (BLOCK / (kind.points() * (k + panels * nr))).max(FEWEST);
                rows_of_block(&tiles, wanted, tile.mr)
            }
        };
        let per_thread_panels =
            !per_thread_blocks && block_rows == tiles.rows() && tiles.count() <= FEW_TILES;
        let group = match block_rows == tiles.rows() && !per_thread_panels {
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
            per_thread_blocks,
            per_thread_panels,
            fixed_weights: false,
        }
    }

    /// With blocks of `rows` rows of tiles, and groups of `panels` panels if one block is all; for tests, which would
    /// need large images otherwise.
    pub fn in_blocks(mut self, rows: usize, panels: usize) -> Self {
        (self.per_thread_blocks, self.per_thread_panels) = (false, false);
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
            true => Self { per_thread_panels: false, group: of.panels_of_part(), ..of },
            false => of,
        }
    }

    /// Whether weights do not change from pass to pass.
    pub fn has_fixed_weights(&self) -> bool {
        self.fixed_weights
    }

    /// Whether U is to be kept.
    pub fn keeps_weights(&self) -> bool {
        let worth = self.whole || self.tiles.count() > FEW_KEPT;
        self.fixed_weights && worth && self.small() && self.weights_len() * self.tiles.count() < MANY_PRODUCTS
    }

    /// Whether U is small enough to be kept.
    fn small(&self) -> bool {
        self.weights_len() <= MOST_KEPT
    }

    /// Numbers of all of U.
    fn weights_len(&self) -> usize {
        self.panels() * self.panel_len()
    }

    /// Whether this is expected to take less time than the plain way with such factors. With fixed weights, when images
    /// are drawn, the answer is the same for every size of a batch: an image must not depend on its neighbours.
    pub fn is_faster(&self, factors: MatmulDtype) -> bool {
        let n = if self.fixed_weights { NOMINAL_BATCH } else { self.shape.n };
        let tiles = Tiles { n, ..self.tiles }.count();
        // Each part of the inputs forward; both sides for each part of the outputs in the data gradient.
        let brought = match self.transposed {
            false => self.parts.len() * self.cin + self.cout,
            true => self.parts.len() * (self.cin + self.cout),
        };
        let words = [Words::of(self.isa, factors), self.words];
        let kept = self.fixed_weights && self.small();
        is_faster(words, kept, self.kind, &ConvShape { n, ..self.shape }, tiles, brought)
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
        self.points() * self.packed_point() + if self.whole { CACHE_SET_PAD } else { 0 }
    }

    pub(super) fn packed_point(&self) -> usize {
        self.packed_words(self.k)
    }

    /// Numbers of U at one point for so many words of k.
    pub(super) fn packed_words(&self, k: usize) -> usize {
        k * self.nr() + CACHE_SET_PAD
    }

    /// Words of k of which U is made at a time, if panels are threads' own: few, of as many panels as there is room for, so that rows
    /// of weights are read in long pieces. (Rows are often a power of two apart, and long columns of them fall into few sets of a cache.)
    pub(super) fn part_of_k(&self) -> usize {
        if self.whole { whole::RUN.min(self.k) } else { K_RUN }
    }

    /// Panels of which U is made at a time.
    pub(super) fn panels_at_once(&self) -> usize {
        (PART_OF_U / (self.points() * self.packed_words(self.part_of_k()))).clamp(1, MOST_PANELS)
    }

    /// Numbers of U of a group, of all if it is kept, or of a part of some panels.
    pub fn packed_len(&self) -> usize {
        if self.per_thread_panels {
            return self.panels_at_once() * self.points() * self.packed_words(self.part_of_k());
        }
        let panels = if self.keeps_weights() { self.panels() } else { self.group };
        panels * self.panel_len()
    }

    pub(super) fn point_len(&self) -> usize {
        self.k * self.tile.mr + CACHE_SET_PAD
    }

    /// Numbers of V of one group of tiles, of which a block has [`Winograd::value_groups`]. Behind whole numbers are the tiles'
    /// steps.
    pub fn values_len(&self) -> usize {
        let steps = if self.whole { self.tile.mr.next_multiple_of(CACHE_SET_PAD) } else { 0 };
        self.points() * self.point_len() + steps
    }

    /// Groups of tiles of a block of `rows` rows.
    pub fn value_groups(&self, rows: usize) -> usize {
        (rows * self.tiles.grid.1).div_ceil(self.tile.mr)
    }

    /// Numbers of M at one point, for a block of `rows` rows and `panels` panels.
    pub fn products_len(&self, rows: usize, panels: usize) -> usize {
        panels * self.value_groups(rows) * self.tile.mr * self.nr() + CACHE_SET_PAD
    }

    /// Points.
    pub fn points(&self) -> usize {
        self.kind.points()
    }

    /// Numbers of scratch memory: U of a group (of a part of some panels, if these are threads' own), V of a block, and M of a block
    /// (of one panel, if blocks are threads' own; one panel's after the other, if panels are).
    pub fn shared_len(&self) -> [usize; 3] {
        let (panels, times) = match (self.per_thread_blocks, self.per_thread_panels) {
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
    pub(super) fn step(&self) -> usize {
        if self.transposed { self.kind.stride() } else { 1 }
    }

    /// Numbers of the output, `[n, h, w, cout]`.
    pub fn output_len(&self) -> usize {
        self.tiles.n * self.to.0 * self.to.1 * self.cout
    }
}
