//! Parts of the forward pass and the data gradient that are one thread's own: blocks of tiles, from inputs to outputs, or panels of
//! weights, from weights to products. What is made on the way stays in the cache of the core that made it.

use super::super::Epilogue;
use super::phases::point_panels;
use super::product::{MOST_PANELS, Winograd};
use super::transform::Maps;
use super::{Kind, transform, whole, with_maps};
use crate::isa::dispatch;
use crate::tile::{Product, with_tile};
use pulp::Simd;
use std::ops::Range;

impl Winograd {
    /// With blocks of `rows` rows of tiles, each made from inputs to outputs; for tests, as [`Winograd::in_blocks`].
    pub fn in_own_blocks(self, rows: usize) -> Self {
        let mut of = self.in_blocks(rows, usize::MAX);
        (of.per_thread_blocks, of.group) = (true, of.panels_of_part());
        of
    }

    /// With panels that are each made from weights to products; for tests, as [`Winograd::in_blocks`].
    pub fn in_own_panels(self) -> Self {
        let mut of = self.in_blocks(usize::MAX, usize::MAX);
        of.per_thread_panels = true;
        of
    }

    /// Whether blocks are made by [`Winograd::own_block`], side by side, instead of each phase of a block by all threads: V
    /// and M then stay in the cache of the core that made them, but all of U comes to it for every block.
    pub fn has_own_blocks(&self) -> bool {
        self.per_thread_blocks
    }

    /// The outputs of a block of rows of tiles in the panels `panels`, whose U `packed` holds; `memory` has the V and M that
    /// [`Winograd::shared_len`] says.
    pub fn own_block(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        input: &[f32],
        packed: &[f32],
        epilogue: Epilogue<'_>,
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

    /// Whether panels are made by [`Winograd::per_thread_panels`], side by side, instead of first all of U by all threads: with few tiles
    /// making U and carrying it to memory and back would take longest.
    pub fn has_own_panels(&self) -> bool {
        self.per_thread_panels
    }

    /// Numbers of [`Winograd::steps`] of a part's panels: one each if U is of whole numbers.
    pub fn steps_len(&self) -> usize {
        if self.whole { self.panels_of_part() } else { 0 }
    }

    /// The steps of the panels' whole numbers, a number each.
    pub fn steps(&self, panels: Range<usize>, weights: &[f32], steps: &mut [f32]) {
        with_maps!(self.kind, maps => dispatch!(self.isa, self.words, s, product or whole if self.whole => {
            self.steps_generic(s, maps, product, panels, weights, steps)
        }))
    }

    #[inline(always)]
    fn steps_generic<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        _: F,
        _: P,
        panels: Range<usize>,
        weights: &[f32],
        steps: &mut [f32],
    ) {
        steps.fill(0.0);
        for words in self.parts_of_k().filter(|_| P::WHOLE) {
            for (panel, step) in panels.clone().zip(&mut *steps) {
                let of_part = self.weight_step::<S, F, D, R>(s, panel, words.clone(), weights);
                *step = whole::larger(*step, of_part);
            }
        }
    }

    fn parts_of_k(&self) -> impl Iterator<Item = Range<usize>> {
        let (k, part) = (self.k, self.part_of_k());
        (0..k).step_by(part).map(move |first| first..k.min(first + part))
    }

    /// M of the panels `panels`, each `[points][tiles][nr]`, of all tiles, whose V `values` holds; `memory` has the numbers that
    /// [`Winograd::packed_len`] says, `steps` what [`Winograd::steps`] put there. A part of k after the other for all these panels,
    /// so that rows of weights are read in runs as long as the panels are wide together.
    pub fn per_thread_panels(
        &self,
        panels: Range<usize>,
        values: &[f32],
        weights: &[f32],
        steps: &[f32],
        products: &mut [f32],
        memory: &mut [f32],
    ) {
        assert_eq!(weights.len(), self.shape.weights());
        with_maps!(self.kind, maps => dispatch!(self.isa, self.words, s, product or whole if self.whole => {
            self.own_panels_generic(s, maps, product, panels, values, weights, steps, products, memory)
        }))
    }

    #[inline(always)]
    fn own_panels_generic<S: Simd, P: Product, F: Maps<D, R>, const D: usize, const R: usize>(
        &self,
        s: S,
        maps: F,
        product: P,
        panels: Range<usize>,
        values: &[f32],
        weights: &[f32],
        steps: &[f32],
        products: &mut [f32],
        memory: &mut [f32],
    ) {
        let first = panels.start;
        let (nr, panel_len, wide) = (self.nr(), products.len() / panels.len(), self.panels_at_once());
        for words in self.parts_of_k() {
            let point_len = self.packed_words(words.len());
            for (of_wide, products) in products.chunks_mut(wide * panel_len).enumerate() {
                let panels = of_wide * wide..of_wide * wide + products.len() / panel_len;
                let (mut scales, mut units) = ([whole::none(); MOST_PANELS], [1.0; MOST_PANELS]);
                for (i, panel) in panels.clone().enumerate().filter(|_| P::WHOLE) {
                    (scales[i], units[i]) = whole::weight_factors::<P, F, D, R>(steps[panel]);
                }
                let packed = &mut memory[..panels.len() * self.points() * point_len];
                let (first, scales) = (first + panels.start, &scales[..panels.len()]);
                self.pack_generic(s, maps, product, first, scales, words.clone(), weights, packed);
                let each = packed.chunks_exact(self.points() * point_len);
                for ((packed, to), step) in each.zip(products.chunks_exact_mut(panel_len)).zip(units) {
                    let to = to.chunks_exact_mut(panel_len / self.points());
                    for (point, (b, to)) in packed.chunks_exact(point_len).zip(to).enumerate() {
                        let (b, words) = (S::as_simd_f32s(&b[..words.len() * nr]).0, words.clone());
                        let unit = if P::WHOLE { step * whole::unit_at::<F, D, R>(point) } else { 1.0 };
                        with_tile!(
                            self.tile,
                            point_panels::<S>(s, self, product, point, unit, words, values, b, to)
                        );
                    }
                }
            }
        }
    }
}
