//! Rows of the A panels that gathered inputs are copied to.

use crate::bf16::{self, Words};
use crate::tile::{K_RUN, Lanes};
use pulp::Simd;

/// Row `r` of a blocked panel `[k / 16][mr][16 words]`.
pub(super) struct Row<'a> {
    pub(super) panel: &'a mut [f32],
    pub(super) mr: usize,
    pub(super) r: usize,
    pub(super) words: Words,
}

impl Row<'_> {
    /// Puts `len` numbers (zeros without a source) to the places `at ..`.
    #[inline(always)]
    pub(super) fn put<S: Simd, P: Lanes>(
        &mut self,
        s: S,
        product: P,
        at: usize,
        len: usize,
        source: Option<&[f32]>,
    ) {
        // A constant, or all that follows would divide.
        let run = K_RUN * P::PER_WORD;
        debug_assert_eq!(P::PER_WORD, self.words.numbers());
        if len == 0 {
            return;
        }
        if at.is_multiple_of(run) && len.is_multiple_of(run) {
            let first = (at / run * self.mr + self.r) * K_RUN;
            let runs = self.panel[first..].chunks_mut(self.mr * K_RUN).take(len / run);
            match (source, self.words) {
                (Some(source), Words::Single | Words::Rounded) => {
                    for (to, from) in runs.zip(source.chunks_exact(K_RUN)) {
                        to[..K_RUN].copy_from_slice(from);
                    }
                }
                (Some(source), Words::Pairs) => {
                    for (to, from) in runs.zip(source.chunks_exact(2 * K_RUN)) {
                        product.pair_lanes(s, from, &mut to[..K_RUN]);
                    }
                }
                (None, _) => runs.for_each(|to| to[..K_RUN].fill(0.0)),
            }
            return;
        }
        if self.words == Words::Pairs && at.is_multiple_of(K_RUN) && len.is_multiple_of(K_RUN) {
            // Halves of runs, of channels that are not a multiple of a whole one.
            for piece in (0..len).step_by(K_RUN) {
                let word = (at + piece) / 2;
                let first = (word / K_RUN * self.mr + self.r) * K_RUN + word % K_RUN;
                let to = &mut self.panel[first..first + K_RUN / 2];
                let (mut numbers, mut words) = ([0.0; 2 * K_RUN], [0.0; K_RUN]);
                if let Some(source) = source {
                    numbers[..K_RUN].copy_from_slice(&source[piece..piece + K_RUN]);
                    product.pair_lanes(s, &numbers, &mut words);
                }
                to.copy_from_slice(&words[..K_RUN / 2]);
            }
            return;
        }
        for i in 0..len {
            let (k, x) = (at + i, source.map_or(0.0, |s| s[i]));
            let first = (k / run * self.mr + self.r) * K_RUN;
            let to = &mut self.panel[first..first + K_RUN];
            match self.words {
                Words::Single | Words::Rounded => to[k % run] = x,
                Words::Pairs => bytemuck::cast_slice_mut::<f32, u16>(to)[k % run] = bf16::round(x),
            }
        }
    }
}
