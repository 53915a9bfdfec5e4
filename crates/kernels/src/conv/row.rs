//! Rows of the A panels that gathered inputs are packed into.

use crate::bf16::{self, Packing};
use crate::tile::{K_RUN, PackLanes};
use pulp::Simd;

/// Row `r` of a blocked panel `[k / 16][mr][16 words]`.
pub(super) struct Row<'a> {
    pub(super) panel: &'a mut [f32],
    pub(super) mr: usize,
    pub(super) r: usize,
    pub(super) packing: Packing,
}

impl Row<'_> {
    /// Packs `len` elements (zeros without a source) at `at ..`.
    #[inline(always)]
    pub(super) fn put<S: Simd, P: PackLanes>(
        &mut self,
        s: S,
        dot: P,
        at: usize,
        len: usize,
        source: Option<&[f32]>,
    ) {
        // A constant, to avoid divisions below.
        let run = K_RUN * P::ELEMS_PER_WORD;
        debug_assert_eq!(P::ELEMS_PER_WORD, self.packing.elems_per_word());
        if len == 0 {
            return;
        }
        if at.is_multiple_of(run) && len.is_multiple_of(run) {
            let first = (at / run * self.mr + self.r) * K_RUN;
            let runs = self.panel[first..].chunks_mut(self.mr * K_RUN).take(len / run);
            match (source, self.packing) {
                (Some(source), Packing::F32 | Packing::Rounded) => {
                    for (to, from) in runs.zip(source.chunks_exact(K_RUN)) {
                        to[..K_RUN].copy_from_slice(from);
                    }
                }
                (Some(source), Packing::Pairs) => {
                    for (to, from) in runs.zip(source.chunks_exact(2 * K_RUN)) {
                        dot.pair_lanes(s, from, &mut to[..K_RUN]);
                    }
                }
                (None, _) => runs.for_each(|to| to[..K_RUN].fill(0.0)),
            }
            return;
        }
        if self.packing == Packing::Pairs && at.is_multiple_of(K_RUN) && len.is_multiple_of(K_RUN) {
            // Half runs, of channels that are not a multiple of a full one.
            for piece in (0..len).step_by(K_RUN) {
                let word = (at + piece) / 2;
                let first = (word / K_RUN * self.mr + self.r) * K_RUN + word % K_RUN;
                let to = &mut self.panel[first..first + K_RUN / 2];
                let (mut elems, mut words) = ([0.0; 2 * K_RUN], [0.0; K_RUN]);
                if let Some(source) = source {
                    elems[..K_RUN].copy_from_slice(&source[piece..piece + K_RUN]);
                    dot.pair_lanes(s, &elems, &mut words);
                }
                to.copy_from_slice(&words[..K_RUN / 2]);
            }
            return;
        }
        for i in 0..len {
            let (k, x) = (at + i, source.map_or(0.0, |s| s[i]));
            let first = (k / run * self.mr + self.r) * K_RUN;
            let to = &mut self.panel[first..first + K_RUN];
            match self.packing {
                Packing::F32 | Packing::Rounded => to[k % run] = x,
                Packing::Pairs => bytemuck::cast_slice_mut::<f32, u16>(to)[k % run] = bf16::round(x),
            }
        }
    }
}
