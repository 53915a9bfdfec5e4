//! The phases of the forward pass and the data gradient: U, V, M and the outputs.

use super::super::{CACHE_SET_PAD, Epilogue};
use super::plan::{Part, Winograd};
use super::points::{Inputs, PointPacking, TransposedWeights, Weights, pack_points};
use super::quantized::{self, Gains};
use super::transform::Maps;
use super::{Kind, M, Tile, load, store, transform, with_maps};
use crate::isa::dispatch;
use crate::tile::{self, DotKernel, K_RUN, with_tile};
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Prefetch distance for weights, in vectors.
const PREFETCH_VECTORS: usize = 8;

/// Words of neighbouring panels of weights from `first` on, one for each of `scales`.
pub(super) struct PanelWords<'a, const D: usize> {
    pub(super) first: usize,
    pub(super) scales: &'a [Gains<D>],
    pub(super) words: Range<usize>,
    pub(super) weights: &'a [f32],
}

/// The group of tiles `group` of a block that begins at tile row `first_row`, for the panels from `panel` on.
#[derive(Clone, Copy)]
struct TileGroup {
    first_row: usize,
    group: usize,
    panel: usize,
}

/// V of a block and U of `panels` panels, to be multiplied at a point.
#[derive(Clone, Copy)]
struct BlockProduct<'a> {
    point: usize,
    panels: usize,
    values: &'a [f32],
    packed: &'a [f32],
}

/// A row of tiles of a block that begins at tile row `first_row`, and M of the block in some panels.
struct RowOperands<'a> {
    first_row: usize,
    row: usize,
    panels: Range<usize>,
    products: &'a [f32],
    epilogue: Epilogue<'a>,
}

impl Winograd {
    /// U of panel `panel`, `[points][k][nr]`, from the weights `[kh, kw, shape.cin, shape.cout]`.
    pub fn pack_panel(&self, panel: usize, weights: &[f32], out: &mut [f32]) {
        assert_eq!(weights.len(), self.shape.weights());
        assert_eq!(out.len(), self.panel_len());
        with_maps!(self.kind, maps => dispatch!(self.isa, self.packing, s, dot or int16 if self.int16 => self.pack_panel_generic(
            s, maps, dot, panel, weights, out
        )))
    }

    #[inline(always)]
    fn pack_panel_generic<S: Simd, P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        maps: F,
        dot: P,
        panel: usize,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let step = if P::IS_INT { self.weight_step::<S, F, D, R>(s, panel, 0..self.k, weights) } else { 0.0 };
        let (scale, step) = quantized::weight_scales::<P, F, D, R>(step);
        if P::IS_INT {
            out[self.points() * self.packed_point()] = step;
        }
        let panels = PanelWords { first: panel, scales: &[scale], words: 0..self.k, weights };
        self.pack_generic(s, maps, dot, panels, out);
    }

    /// U of words of neighbouring panels: `[panels][points][words][nr]`.
    #[inline(always)]
    pub(super) fn pack_generic<S: Simd, P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        dot: P,
        PanelWords { first, scales, words, weights }: PanelWords<'_, D>,
        out: &mut [f32],
    ) {
        let (nr, nv, panels) = (self.nr(), self.tile.nv, self.panels_of_part());
        let point_len = self.packed_words(words.len());
        let (part, first) = (first / panels, first % panels);
        let vectors = scales.len() * nv;
        let source = |v: usize| Weights::<F> {
            maps: PhantomData,
            conv: self,
            part,
            column: first * nr + v * S::F32_LANES,
            weights,
        };
        let offset = |v: usize, word: usize| {
            v / nv * self.points() * point_len + (word - words.start) * nr + v % nv * S::F32_LANES
        };
        let packing = |v: usize| PointPacking { packing: self.packing, scale: &scales[v / nv], point_len };
        let mut point_vectors = [[s.splat_f32s(0.0); D]; D];
        if self.transposed {
            let mut block = TransposedWeights::new();
            for v in 0..vectors {
                // The channels of a vector of words are contiguous.
                for word in words.clone().step_by(S::F32_LANES) {
                    let channel = P::ELEMS_PER_WORD * word;
                    block.fill::<S, F, R>(&source(v), channel, P::ELEMS_PER_WORD);
                    for i in 0..S::F32_LANES {
                        let at = offset(v, word + i);
                        let source = &(PhantomData::<F>, &block);
                        let (even, odd) = ((source, i), (source, i + S::F32_LANES));
                        pack_points(s, dot, packing(v), &mut point_vectors, even, odd, &mut out[at..]);
                    }
                }
            }
            return;
        }
        // Rows of weights are read sequentially across the panels, and prefetched: their stride is too long
        // for the hardware prefetcher.
        let ahead = PREFETCH_VECTORS.div_ceil(vectors);
        for word in words.clone() {
            // The channels of a word are a vector apart.
            let channel = word / S::F32_LANES * (P::ELEMS_PER_WORD * S::F32_LANES) + word % S::F32_LANES;
            for v in 0..vectors {
                let source = source(v);
                let (even, odd) = ((&source, channel), (&source, channel + S::F32_LANES));
                for i in 0..P::ELEMS_PER_WORD {
                    source.prefetch::<R>(channel + ahead + i * S::F32_LANES);
                }
                let at = offset(v, word);
                pack_points(s, dot, packing(v), &mut point_vectors, even, odd, &mut out[at..]);
            }
        }
    }

    /// Maps the summed channel `channel`, for a part of the output, to a part and channel of the input, if it
    /// exists.
    #[inline(always)]
    pub(super) fn summed(&self, output_part: usize, channel: usize) -> Option<(Part, usize)> {
        let (part, c) = match self.transposed {
            false => (channel / self.cin, channel % self.cin),
            true if channel >= self.cin => return None,
            true => (output_part, channel),
        };
        self.parts.get(part).map(|part| (*part, c))
    }

    /// V of the group of tiles `group` in a block that begins at tile row `first_row`, for the panels from
    /// `panel` on: `[points][k / 16][mr][16]`.
    pub fn values(&self, first_row: usize, group: usize, panel: usize, input: &[f32], out: &mut [f32]) {
        let (h, w) = self.tiles.from;
        assert_eq!(input.len(), self.tiles.n * h * w * self.cin);
        assert_eq!(out.len(), self.values_len());
        let group = TileGroup { first_row, group, panel };
        with_maps!(self.kind, maps => dispatch!(self.isa, self.packing, s, dot or int16 if self.int16 => self.values_generic(
            s, maps, dot, group, input, out
        )))
    }

    #[inline(always)]
    fn values_generic<S: Simd, P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        maps: F,
        dot: P,
        TileGroup { first_row, group, panel }: TileGroup,
        input: &[f32],
        out: &mut [f32],
    ) {
        let (mr, output_part) = (self.tile.mr, panel / self.panels_of_part());
        let first = first_row * self.tiles.grid.1 + group * mr;
        let mut point_vectors = [[s.splat_f32s(0.0); D]; D];
        let gains = if P::IS_INT { quantized::input_gains::<F, D, R>() } else { quantized::unscaled() };
        for r in 0..mr {
            let tile = self.tiles.get(first + r);
            let mut scale = gains;
            if P::IS_INT {
                let step = self.value_step::<S, D>(s, tile, input);
                (scale, out[self.points() * self.point_len() + r]) = quantized::quant_scales(&gains, step);
            }
            for word in (0..self.k).step_by(S::F32_LANES) {
                // Which channels share a word does not matter, as long as it is the same in U.
                let channel = P::ELEMS_PER_WORD * word;
                let (even, c) = self.inputs(maps, tile, output_part, channel, input);
                let (odd, odd_c) = self.inputs(maps, tile, output_part, channel + S::F32_LANES, input);
                let at = (word / K_RUN * mr + r) * K_RUN + word % K_RUN;
                let (even, odd, out) = ((&even, c), (&odd, odd_c), &mut out[at..]);
                let packing =
                    PointPacking { packing: self.packing, scale: &scale, point_len: self.point_len() };
                pack_points(s, dot, packing, &mut point_vectors, even, odd, out);
            }
        }
    }

    /// The inputs of a tile for the summed channel `channel`, and its channel there.
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
        (Inputs { maps: PhantomData, window, input, cin: self.cin }, c)
    }

    /// M at one point, `[panels][tiles][nr]`, for the `panels` panels in `packed`.
    pub fn multiply(&self, point: usize, panels: usize, values: &[f32], packed: &[f32], out: &mut [f32]) {
        let operands = BlockProduct { point, panels, values, packed };
        with_maps!(self.kind, maps => dispatch!(self.isa, self.packing, s, dot or int16 if self.int16 => self.multiply_generic(
            s, maps, dot, operands, out
        )))
    }

    #[inline(always)]
    fn multiply_generic<S: Simd, P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        dot: P,
        BlockProduct { point, panels, values, packed }: BlockProduct<'_>,
        out: &mut [f32],
    ) {
        let nr = self.nr();
        let len = values.len() / self.values_len() * self.tile.mr * nr;
        for (j, out) in out.chunks_exact_mut(len).take(panels).enumerate() {
            let panel = &packed[j * self.panel_len()..][..self.panel_len()];
            let b = S::as_simd_f32s(&panel[point * self.packed_point()..][..self.k * nr]).0;
            let mut unit = 1.0;
            if P::IS_INT {
                unit = panel[self.points() * self.packed_point()] * quantized::dequant_at::<F, D, R>(point);
            }
            let product = PointProduct { conv: self, point, unit, words: (0, self.k), values };
            with_tile!(self.tile, point_panels::<S>(s, dot, product, b, out));
        }
    }

    /// The outputs of a row of tiles, in the columns of the panels `panels`, from M of a block that begins at
    /// tile row `first_row`.
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
        let operands = RowOperands { first_row, row, panels, products, epilogue };
        with_maps!(self.kind, maps => dispatch!(self.isa, s => self.outputs_generic(s, maps, &operands, out)))
    }

    #[inline(always)]
    fn outputs_generic<S: Simd, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        operands: &RowOperands<'_>,
        out: &mut [f32],
    ) {
        let RowOperands { first_row, row, ref panels, products, epilogue } = *operands;
        let (nr, width, cout, step) = (self.nr(), self.to.1, self.cout, self.step());
        let point_len = products.len() / self.points();
        let panel_len = (point_len - CACHE_SET_PAD) / panels.len();
        let part = panels.start / self.panels_of_part();
        let first_column = (panels.start - part * self.panels_of_part()) * nr;
        // First row and column of the part in the output.
        let (top, left) = (part / step, part % step);
        let first_pixel = (self.tiles.tile(row * self.tiles.grid.1).image * self.to.0
            + row % self.tiles.grid.0 * M * step)
            * width;
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
                if let Some(b) = epilogue.per_image_bias {
                    bias = s.add_f32s(bias, load(s, &b[tile.image * cout + c..][..lanes]));
                }
                F::output(
                    s,
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

/// A product of values at one point and a panel of weights, for some words of k.
#[derive(Clone, Copy)]
pub(super) struct PointProduct<'a> {
    pub(super) conv: &'a Winograd,
    pub(super) point: usize,
    /// Scales integer sums, in addition to the steps of the tiles.
    pub(super) unit: f32,
    /// The first word, and the end.
    pub(super) words: (usize, usize),
    pub(super) values: &'a [f32],
}

/// All groups of tiles at one point against one panel of weights; all words but the first continue from the sums
/// in `out`, bit-identical to a single pass.
#[inline(always)]
pub(super) fn point_panels<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl DotKernel,
    product: PointProduct<'_>,
    b: &[S::f32s],
    out: &mut [f32],
) {
    let PointProduct { conv, point, words: (first, end), values, .. } = product;
    let nr = NV * S::F32_LANES;
    for (values, out) in values.chunks_exact(conv.values_len()).zip(out.chunks_exact_mut(MR * nr)) {
        if is_int(dot) {
            quantized_sums::<S, MR, NV>(s, dot, PointProduct { values, ..product }, b, out);
            continue;
        }
        let a = &values[point * conv.point_len() + first * MR..][..(end - first) * MR];
        let mut acc = tile::zero::<S, MR, NV>(s);
        if first > 0 {
            tile::load_acc::<S, MR, NV>(out, &mut acc);
        }
        tile::blocked(s, dot, a, b, &mut acc);
        for (acc, row) in acc.iter().zip(out.chunks_exact_mut(nr)) {
            tile::store_row(s, acc, row, false);
        }
    }
}

fn is_int<P: DotKernel>(_: P) -> bool {
    P::IS_INT
}

/// The same for one group of tiles with integers: exact over a run of words, then accumulated in f32.
#[inline(always)]
fn quantized_sums<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl DotKernel,
    PointProduct { conv, point, unit, words: (start, end), values }: PointProduct<'_>,
    b: &[S::f32s],
    out: &mut [f32],
) {
    let steps = &values[conv.points() * conv.point_len()..][..MR];
    let values = &values[point * conv.point_len()..];
    for first in (start..end).step_by(quantized::RUN) {
        let run = first..end.min(first + quantized::RUN);
        let (a, b) = (&values[first * MR..run.end * MR], &b[(first - start) * NV..][..run.len() * NV]);
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::blocked(s, dot, a, b, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                acc[r][v] = s.mul_f32s(dot.sums(s, acc[r][v]), s.splat_f32s(steps[r] * unit));
            }
        }
        for (acc, row) in acc.iter().zip(out.chunks_exact_mut(NV * S::F32_LANES)) {
            tile::store_row(s, acc, row, first > 0);
        }
    }
}
