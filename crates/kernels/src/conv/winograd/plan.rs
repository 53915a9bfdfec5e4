//! Forward pass and data gradient: sizes, and the split into blocks, panels and groups. The computation is in
//! `phases.rs`.

use super::super::{CACHE_SET_PAD, ConvShape, MatmulDtype};
use super::{BLOCK, Kind, Tiles, is_faster, quantized, rows_of_block};
use crate::bf16::Packing;
use crate::isa::Isa;
use crate::tile::{K_RUN, TileShape};
use std::ops::Range;

/// Maximum number of panels for which U is computed together with per-thread panels.
pub(super) const MAX_PANELS: usize = 8;

/// Sizes that decide how a pass is split, fitted to measurements; lengths are in f32s.
struct Limits {
    /// Tiles of a block with many channels, at least, if there are that many.
    min_block_tiles: usize,
    /// Multiply-adds of the products above which computing U is negligible.
    many_products: usize,
    /// Length of U that is kept for fixed weights, up to four times that of the weights, at most: sampling should
    /// take little memory.
    max_kept_u: usize,
    /// Tiles up to which U in f32 is recomputed each time: computing it is then as fast as reading it.
    max_recomputed_tiles: usize,
    /// Batch size assumed when choosing the algorithm for fixed weights.
    nominal_batch: usize,
    /// Length of U that is computed at a time if there is only one block of tiles.
    group: usize,
    /// Panels that are computed together, at least.
    min_group_panels: usize,
    /// Length of V of a per-thread block, if one row of tiles is that short: it stays in the core's private cache
    /// along with the other operands.
    per_thread_values: usize,
    /// Length of V of such a block, at most.
    max_per_thread_values: usize,
    /// Length of U for per-thread blocks, at most: each block reads all of it, so it should fit the last-level
    /// cache.
    max_per_thread_u: usize,
    /// Per-thread blocks, at least, for load balancing.
    min_per_thread_blocks: usize,
    /// Tiles of a batch for which the products with a panel of weights stay in the core's private cache, at most.
    max_per_thread_tiles: usize,
    /// Length of U that is computed at a time for so few tiles: it is read a few times and never leaves that cache.
    u_part: usize,
}

const LIMITS: Limits = Limits {
    min_block_tiles: 128,
    many_products: 256 << 20,
    max_kept_u: 8 << 20,
    max_recomputed_tiles: 4,
    nominal_batch: 16,
    group: 4 << 20,
    min_group_panels: 4,
    per_thread_values: 56 << 10,
    max_per_thread_values: 112 << 10,
    max_per_thread_u: 3 << 20,
    min_per_thread_blocks: 8,
    max_per_thread_tiles: 64,
    u_part: 80 << 10,
};

/// A convolution, or its data gradient, prepared for one instruction set.
#[derive(Clone, Debug)]
pub struct Winograd {
    pub(super) isa: Isa,
    pub(super) kind: Kind,
    pub(super) tile: TileShape,
    pub(super) packing: Packing,
    /// Whether pairs are int16 instead of bf16.
    pub(super) int16: bool,
    pub(super) shape: ConvShape,
    /// Data gradient: input and output, `cin` and `cout` are swapped, the weights mirrored.
    pub(super) transposed: bool,
    pub(super) tiles: Tiles,
    /// Height and width of the output.
    pub(super) to: (usize, usize),
    /// Parts of the input in the forward pass, of the output in the data gradient.
    pub(super) parts: Vec<Part>,
    /// Channels of the input, and of the output.
    pub(super) cin: usize,
    pub(super) cout: usize,
    /// All summed channels in words, rounded up to [`K_RUN`].
    pub(super) k: usize,
    /// Rows of tiles in a block.
    block_rows: usize,
    /// Panels of columns in a group.
    pub(super) group: usize,
    /// Whether each block is computed by one thread, from inputs to outputs.
    pub(super) per_thread_blocks: bool,
    /// Whether each panel of the weights is computed by one thread, from weights to products.
    pub(super) per_thread_panels: bool,
    /// Whether weights are the same in every pass.
    fixed_weights: bool,
}

/// A part of the image: every other row and column, or all.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Its first tap.
    pub(super) tap: (usize, usize),
    /// Row and column of the input where the inputs of the first output begin.
    pub(super) first: (isize, isize),
}

/// What distinguishes the forward pass and the data gradient.
struct Pass {
    packing: Packing,
    int16: bool,
    kind: Kind,
    transposed: bool,
    tiles: Tiles,
    parts: Vec<Part>,
}

impl Winograd {
    /// The convolution `y = x * w`, if it is supported. 16-bit operands are int16 on machines that multiply
    /// pairs, else f32: rounding to bf16 at the points would not be accurate enough.
    pub fn forward(isa: Isa, dtype: MatmulDtype, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let tiles = Tiles::of_output(kind, &shape);
        let part = |tap: (usize, usize)| {
            let first = (tap.0 as isize - shape.pad.0 as isize, tap.1 as isize - shape.pad.1 as isize);
            Part { tap, first }
        };
        let parts = kind.parts().map(part).collect();
        let (packing, int16) = match isa.packing(dtype) {
            Packing::Pairs => (Packing::Pairs, true),
            _ => (Packing::F32, false),
        };
        Some(Self::new(isa, shape, Pass { packing, int16, kind, transposed: false, tiles, parts }))
    }

    /// The data gradient `dx` from `dy`, if the convolution is supported.
    pub fn data_grad(isa: Isa, dtype: MatmulDtype, shape: ConvShape) -> Option<Self> {
        let kind = Kind::of(&shape)?;
        let (stride, taps) = (kind.stride(), kind.taps());
        let to = (shape.input.0 / stride, shape.input.1 / stride);
        let tiles = Tiles::new(shape.n, shape.output, 1, to);
        // Row `stride i + r` reads row o where it is `stride o + k - pad`: with the taps k = tap + stride a,
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
        let packing = isa.packing(dtype);
        Some(Self::new(isa, shape, Pass { packing, int16: false, kind, transposed: true, tiles, parts }))
    }

    fn new(isa: Isa, shape: ConvShape, pass: Pass) -> Self {
        let Pass { packing, int16, kind, transposed, tiles, parts } = pass;
        let (cin, cout, to, summed) = if transposed {
            (shape.cout, shape.cin, shape.input, shape.cout)
        } else {
            (shape.cin, shape.cout, shape.output, parts.len() * shape.cin)
        };
        let tile = match tiles.count() {
            few @ ..=4 => TileShape::pick_few_rows(isa.lanes(), cout, few),
            _ => TileShape::pick(isa.lanes(), cout),
        };
        let nr = tile.nv * isa.lanes();
        let elems_per_vector = packing.elems_per_word() * isa.lanes();
        let k = (summed.div_ceil(elems_per_vector) * isa.lanes()).next_multiple_of(K_RUN);
        let panels = cout.div_ceil(nr);
        let per_thread_rows =
            rows_of_block(&tiles, (LIMITS.per_thread_values / (kind.points() * k)).max(tile.mr), tile.mr);
        let per_thread_tiles = (per_thread_rows * tiles.grid.1).next_multiple_of(tile.mr);
        let per_thread_blocks = kind.points() * k * per_thread_tiles <= LIMITS.max_per_thread_values
            && kind.points() * k * panels * nr <= LIMITS.max_per_thread_u
            && tiles.rows() >= LIMITS.min_per_thread_blocks * per_thread_rows;
        let block_rows = if per_thread_blocks {
            per_thread_rows
        } else {
            let wanted = (BLOCK / (kind.points() * (k + panels * nr))).max(LIMITS.min_block_tiles);
            rows_of_block(&tiles, wanted, tile.mr)
        };
        let per_thread_panels =
            !per_thread_blocks && block_rows == tiles.rows() && tiles.count() <= LIMITS.max_per_thread_tiles;
        let group = if block_rows == tiles.rows() && !per_thread_panels {
            (LIMITS.group / (kind.points() * k * nr)).clamp(LIMITS.min_group_panels.min(panels), panels)
        } else {
            panels
        };
        Self {
            isa,
            kind,
            tile,
            packing,
            int16,
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

    /// Sets blocks of `rows` rows of tiles, and groups of `panels` panels if there is only one block; for
    /// tests, which would need large images otherwise.
    pub fn with_blocks(mut self, rows: usize, panels: usize) -> Self {
        (self.per_thread_blocks, self.per_thread_panels) = (false, false);
        self.block_rows = rows.clamp(1, self.tiles.rows());
        self.group = if self.block_rows == self.tiles.rows() {
            panels.clamp(1, self.panels_of_part())
        } else {
            self.panels_of_part()
        };
        self
    }

    /// For weights that are the same in every pass: U is computed once and kept if that saves a considerable
    /// part of a pass and U is not too large (up to four times the weights).
    pub fn with_fixed_weights(self) -> Self {
        let conv = Self { fixed_weights: true, ..self };
        if conv.keeps_weights() {
            Self { per_thread_panels: false, group: conv.panels_of_part(), ..conv }
        } else {
            conv
        }
    }

    /// Whether weights are the same in every pass.
    pub fn has_fixed_weights(&self) -> bool {
        self.fixed_weights
    }

    /// Whether U is kept across passes.
    pub fn keeps_weights(&self) -> bool {
        let worth = self.int16 || self.tiles.count() > LIMITS.max_recomputed_tiles;
        self.fixed_weights
            && worth
            && self.fits_cache()
            && self.weights_len() * self.tiles.count() < LIMITS.many_products
    }

    /// Whether U is small enough to be kept.
    fn fits_cache(&self) -> bool {
        self.weights_len() <= LIMITS.max_kept_u
    }

    /// Length of all of U.
    fn weights_len(&self) -> usize {
        self.panels() * self.panel_len()
    }

    /// Whether this is estimated to be faster than direct convolution with this dtype. With fixed weights, as
    /// in sampling, the answer does not depend on the batch size: an image must not depend on the others in
    /// its batch.
    pub fn is_faster(&self, dtype: MatmulDtype) -> bool {
        let n = if self.fixed_weights { LIMITS.nominal_batch } else { self.shape.n };
        let tiles = Tiles { n, ..self.tiles }.count();
        // Forward: each part of the input, and the output. Data gradient: both for each part of the output.
        let transformed = if self.transposed {
            self.parts.len() * (self.cin + self.cout)
        } else {
            self.parts.len() * self.cin + self.cout
        };
        let packings = [self.isa.packing(dtype), self.packing];
        let kept = self.fixed_weights && self.fits_cache();
        is_faster(packings, kept, self.kind, &ConvShape { n, ..self.shape }, tiles, transformed)
    }

    pub(super) fn nr(&self) -> usize {
        self.tile.nv * self.isa.lanes()
    }

    /// Panels of columns of the weights, grouped by part of the output.
    pub fn panels(&self) -> usize {
        self.output_parts() * self.panels_of_part()
    }

    /// Parts of the output, computed one after the other.
    fn output_parts(&self) -> usize {
        if self.transposed { self.parts.len() } else { 1 }
    }

    pub(super) fn panels_of_part(&self) -> usize {
        self.cout.div_ceil(self.nr())
    }

    /// Groups of panels that are processed in sequence, each within one part of the output, and whether it is
    /// the first of its part. A part has more than one group only if there is one block.
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

    /// Length of one panel of U, in f32s. The quantization step follows integer values.
    pub fn panel_len(&self) -> usize {
        self.points() * self.packed_point() + if self.int16 { CACHE_SET_PAD } else { 0 }
    }

    pub(super) fn packed_point(&self) -> usize {
        self.packed_words(self.k)
    }

    /// Length of U at one point for `k` words of k.
    pub(super) fn packed_words(&self, k: usize) -> usize {
        k * self.nr() + CACHE_SET_PAD
    }

    /// Words of k for which U is computed at a time with per-thread panels: few, and for as many panels as
    /// fit, so that rows of weights are read in long runs. (Rows are often a power of two apart, and long
    /// columns map to few cache sets.)
    pub(super) fn part_of_k(&self) -> usize {
        if self.int16 { quantized::RUN.min(self.k) } else { K_RUN }
    }

    /// Panels for which U is computed together.
    pub(super) fn panels_at_once(&self) -> usize {
        (LIMITS.u_part / (self.points() * self.packed_words(self.part_of_k()))).clamp(1, MAX_PANELS)
    }

    /// Length of U for a group, for all panels if it is kept, or for part of k in some panels.
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

    /// Length of V for one group of tiles; a block has [`Winograd::value_groups`] of them. The quantization
    /// steps of the tiles follow integer values.
    pub fn values_len(&self) -> usize {
        let steps = if self.int16 { self.tile.mr.next_multiple_of(CACHE_SET_PAD) } else { 0 };
        self.points() * self.point_len() + steps
    }

    /// Groups of tiles in a block of `rows` rows.
    pub fn value_groups(&self, rows: usize) -> usize {
        (rows * self.tiles.grid.1).div_ceil(self.tile.mr)
    }

    /// Length of M at one point, for a block of `rows` rows and `panels` panels.
    pub fn products_len(&self, rows: usize, panels: usize) -> usize {
        panels * self.value_groups(rows) * self.tile.mr * self.nr() + CACHE_SET_PAD
    }

    /// Number of points.
    pub fn points(&self) -> usize {
        self.kind.points()
    }

    /// Lengths of the shared memory: U of a group (with per-thread panels, a part of some panels), V of a
    /// block, and M of a block (of one panel with per-thread blocks, of all panels one after the other with
    /// per-thread panels).
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

    /// Length of the output that a row of tiles covers.
    pub fn row_len(&self, row: usize) -> usize {
        self.tiles.pixel_rows(row) * self.step() * self.to.1 * self.cout
    }

    /// Stride between the output rows and columns of a part.
    pub(super) fn step(&self) -> usize {
        if self.transposed { self.kind.stride() } else { 1 }
    }

    /// Length of the output, `[n, h, w, cout]`.
    pub fn output_len(&self) -> usize {
        self.tiles.n * self.to.0 * self.to.1 * self.cout
    }
}
