//! The phases of the forward pass and the data gradient: U, V, M and the outputs.

use super::super::{CACHE_SET_PAD, Epilogue};
use super::points::{Inputs, Turned, Weights, words_of};
use super::product::{Part, Winograd};
use super::transform::Maps;
use super::whole::{self, Gains};
use super::{Kind, M, Tile, load, store, transform, with_maps};
use crate::isa::dispatch;
use crate::tile::{self, K_RUN, Product, with_tile};
use pulp::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// How many vectors of weights before its turn one is asked for.
const VECTORS_AHEAD: usize = 8;

impl Winograd {
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
        self.pack_generic(s, maps, product, panel, &[scale], 0..self.k, weights, out);
    }

    /// U of the words `words` in neighbouring panels from `first` on, one for each of `scales`: `[panels][points][words][nr]`.
    #[inline(always)]
    pub(super) fn pack_generic<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        product: P,
        first: usize,
        scales: &[Gains<D>],
        words: Range<usize>,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let (nr, nv, panels) = (self.nr(), self.tile.nv, self.panels_of_part());
        let point_len = self.packed_words(words.len());
        let (part, first) = (first / panels, first % panels);
        let vectors = scales.len() * nv;
        let source = |v: usize| Weights::<F> {
            of_maps: PhantomData,
            of: self,
            part,
            column: first * nr + v * S::F32_LANES,
            weights,
        };
        let place = |v: usize, word: usize| {
            v / nv * self.points() * point_len + (word - words.start) * nr + v % nv * S::F32_LANES
        };
        let mut space = [[s.splat_f32s(0.0); D]; D];
        if self.transposed {
            let mut block = Turned::new();
            for v in 0..vectors {
                // The channels of a vector of words are neighbours.
                for word in words.clone().step_by(S::F32_LANES) {
                    let channel = P::PER_WORD * word;
                    block.fill::<S, F, R>(&source(v), channel, P::PER_WORD);
                    for i in 0..S::F32_LANES {
                        let at = place(v, word + i);
                        words_of(
                            s,
                            product,
                            self.words,
                            &scales[v / nv],
                            &mut space,
                            (&(PhantomData::<F>, &block), i),
                            (&(PhantomData::<F>, &block), i + S::F32_LANES),
                            &mut out[at..],
                            point_len,
                        );
                    }
                }
            }
            return;
        }
        // Rows of weights are read front to back, as far as the panels go, and asked for before: they lie so far apart that the
        // machine does not guess the next.
        let ahead = VECTORS_AHEAD.div_ceil(vectors);
        for word in words.clone() {
            // The channels of a word are a vector apart.
            let channel = word / S::F32_LANES * (P::PER_WORD * S::F32_LANES) + word % S::F32_LANES;
            for v in 0..vectors {
                let source = source(v);
                let (even, odd) = ((&source, channel), (&source, channel + S::F32_LANES));
                for i in 0..P::PER_WORD {
                    source.prefetch::<R>(channel + ahead + i * S::F32_LANES);
                }
                let at = place(v, word);
                words_of(
                    s,
                    product,
                    self.words,
                    &scales[v / nv],
                    &mut space,
                    even,
                    odd,
                    &mut out[at..],
                    point_len,
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
        let mut space = [[s.splat_f32s(0.0); D]; D];
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
                    &mut out[at..],
                    self.point_len(),
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
        let panel_len = (point_len - CACHE_SET_PAD) / panels.len();
        let part = panels.start / self.panels_of_part();
        let first_column = (panels.start - part * self.panels_of_part()) * nr;
        // The part's first row and column of the output.
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
            tile::load_acc::<S, MR, NV>(out, &mut acc);
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
