//! Work of the forward pass and the data gradient that stays on one thread: blocks of tiles, from inputs to
//! outputs, or panels of weights, from weights to products. Intermediate results stay in the core's private
//! cache.

use super::super::Operands;
use super::phases::{PanelWords, PointProduct, point_panels};
use super::plan::{MAX_PANELS, Winograd};
use super::transform::Maps;
use super::{Kind, quantized, transform, with_maps};
use crate::isa::dispatch;
use crate::tile::{DotKernel, with_tile};
use pulp::Simd;
use std::ops::Range;

/// Operands of M of the panels `panels`: V of all tiles, the weights, and the quantization steps of the panels.
struct PanelOperands<'a> {
    panels: Range<usize>,
    values: &'a [f32],
    weights: &'a [f32],
    steps: &'a [f32],
}

impl Winograd {
    /// Sets per-thread blocks of `rows` rows of tiles; for tests, like [`Winograd::with_blocks`].
    pub fn with_per_thread_blocks(self, rows: usize) -> Self {
        let mut conv = self.with_blocks(rows, usize::MAX);
        (conv.per_thread_blocks, conv.group) = (true, conv.panels_of_part());
        conv
    }

    /// Sets per-thread panels; for tests, like [`Winograd::with_blocks`].
    pub fn with_per_thread_panels(self) -> Self {
        let mut conv = self.with_blocks(usize::MAX, usize::MAX);
        conv.per_thread_panels = true;
        conv
    }

    /// Whether each block is computed by one thread ([`Winograd::compute_block`]), instead of each phase of a
    /// block by all threads: V and M then stay in the core's private cache, but all of U is read for every
    /// block.
    pub fn uses_per_thread_blocks(&self) -> bool {
        self.per_thread_blocks
    }

    /// Computes a block of rows of tiles for the panels `panels`, whose U is packed; `memory` holds V and M,
    /// with the lengths of [`Winograd::shared_len`].
    pub fn compute_block(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        Operands { input, packed, epilogue }: Operands<'_>,
        out: &mut [f32],
        memory: &mut [f32],
    ) {
        let (values, products) = memory.split_at_mut(self.value_groups(rows.len()) * self.values_len());
        for (group, to) in values.chunks_exact_mut(self.values_len()).enumerate() {
            self.values(rows.start, group, panels.start, input, to);
        }
        let len = self.products_len(rows.len(), 1);
        let products = &mut products[..self.points() * len];
        for (panel, packed) in panels.zip(packed.chunks_exact(self.panel_len())) {
            for (point, to) in products.chunks_exact_mut(len).enumerate() {
                self.multiply(point, 1, values, packed, to);
            }
            let mut rest = &mut *out;
            for row in rows.clone() {
                let (part, tail) = rest.split_at_mut(self.row_len(row));
                self.outputs(rows.start, row, panel..panel + 1, products, epilogue, part);
                rest = tail;
            }
        }
    }

    /// Whether each panel is computed by one thread ([`Winograd::compute_panels`]), instead of first all of U
    /// by all threads: with few tiles, computing U and moving it to memory and back would take longest.
    pub fn uses_per_thread_panels(&self) -> bool {
        self.per_thread_panels
    }

    /// Length of [`Winograd::steps`] for the panels of a part: one each if U is quantized.
    pub fn steps_len(&self) -> usize {
        if self.int16 { self.panels_of_part() } else { 0 }
    }

    /// Quantization steps of the weights, one for each panel.
    pub fn steps(&self, panels: Range<usize>, weights: &[f32], steps: &mut [f32]) {
        with_maps!(self.kind, maps => dispatch!(self.isa, self.packing, s, dot or int16 if self.int16 => {
            self.steps_generic(s, maps, dot, panels, weights, steps)
        }))
    }

    #[inline(always)]
    fn steps_generic<S: Simd, P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        _: P,
        panels: Range<usize>,
        weights: &[f32],
        steps: &mut [f32],
    ) {
        steps.fill(0.0);
        for words in self.parts_of_k().filter(|_| P::IS_INT) {
            for (panel, step) in panels.clone().zip(&mut *steps) {
                let of_part = self.weight_step::<S, F, D, R>(s, panel, words.clone(), weights);
                *step = quantized::nan_max(*step, of_part);
            }
        }
    }

    fn parts_of_k(&self) -> impl Iterator<Item = Range<usize>> {
        let (k, part) = (self.k, self.part_of_k());
        (0..k).step_by(part).map(move |first| first..k.min(first + part))
    }

    /// M of the panels `panels`, each `[points][tiles][nr]`, for all tiles, with V in `values`; `memory` has
    /// length [`Winograd::packed_len`], `steps` comes from [`Winograd::steps`]. Iterates over parts of k for
    /// all these panels together, so that rows of weights are read in runs as long as the panels are wide.
    pub fn compute_panels(
        &self,
        panels: Range<usize>,
        values: &[f32],
        weights: &[f32],
        steps: &[f32],
        products: &mut [f32],
        memory: &mut [f32],
    ) {
        assert_eq!(weights.len(), self.shape.weights());
        let operands = PanelOperands { panels, values, weights, steps };
        with_maps!(self.kind, maps => dispatch!(self.isa, self.packing, s, dot or int16 if self.int16 => {
            self.compute_panels_generic(s, maps, dot, &operands, products, memory)
        }))
    }

    #[inline(always)]
    fn compute_panels_generic<S: Simd, P: DotKernel, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        maps: F,
        dot: P,
        PanelOperands { panels, values, weights, steps }: &PanelOperands<'_>,
        products: &mut [f32],
        memory: &mut [f32],
    ) {
        let first = panels.start;
        let (nr, panel_len, wide) = (self.nr(), products.len() / panels.len(), self.panels_at_once());
        for words in self.parts_of_k() {
            let point_len = self.packed_words(words.len());
            for (of_wide, products) in products.chunks_mut(wide * panel_len).enumerate() {
                let panels = of_wide * wide..of_wide * wide + products.len() / panel_len;
                let (mut scales, mut units) = ([quantized::unscaled(); MAX_PANELS], [1.0; MAX_PANELS]);
                for (i, panel) in panels.clone().enumerate().filter(|_| P::IS_INT) {
                    (scales[i], units[i]) = quantized::weight_scales::<P, F, D, R>(steps[panel]);
                }
                let packed = &mut memory[..panels.len() * self.points() * point_len];
                let (first, scales) = (first + panels.start, &scales[..panels.len()]);
                let wide = PanelWords { first, scales, words: words.clone(), weights };
                self.pack_generic(s, maps, dot, wide, packed);
                let each = packed.chunks_exact(self.points() * point_len);
                for ((packed, to), step) in each.zip(products.chunks_exact_mut(panel_len)).zip(units) {
                    let to = to.chunks_exact_mut(panel_len / self.points());
                    for (point, (b, to)) in packed.chunks_exact(point_len).zip(to).enumerate() {
                        let b = S::as_simd_f32s(&b[..words.len() * nr]).0;
                        let unit =
                            if P::IS_INT { step * quantized::dequant_at::<F, D, R>(point) } else { 1.0 };
                        let words = (words.start, words.end);
                        let product = PointProduct { conv: self, point, unit, words, values };
                        with_tile!(self.tile, point_panels::<S>(s, dot, product, b, to));
                    }
                }
            }
        }
    }
}
