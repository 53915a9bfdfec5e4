//! The backward pass of small batches, split into heads and ranges of a head's keys. Each task computes the
//! dq contribution of its keys, and their dk and dv; the contributions are summed in order.

use super::Attention;
use super::backward::KEY_BLOCK;
use std::ops::Range;

/// Offsets of dq, dk and dv of a head, and the stride between tokens. In the layout of a key range dk and dv
/// begin with the first key of the range.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) begin: [usize; 3],
    pub(super) stride: usize,
}

impl Attention {
    /// The keys of range `i` of `ranges`; all ranges but the last have the same length.
    pub(super) fn key_range(&self, ranges: usize, i: usize) -> Range<usize> {
        let len = self.tokens.div_ceil(ranges).next_multiple_of(KEY_BLOCK);
        (i * len).min(self.tokens)..((i + 1) * len).min(self.tokens)
    }

    /// Number of key ranges for each head, chosen so that small batches still occupy many threads.
    pub fn key_ranges(&self, images: usize) -> usize {
        const TASKS: usize = 16;
        const MIN_KEYS: usize = 128;
        TASKS.div_ceil(images * self.heads).min(self.tokens / MIN_KEYS).max(1)
    }

    /// Length of the output of [`backward_range`](Self::backward_range), in f32s.
    pub fn partial_len(&self, ranges: usize) -> usize {
        (self.tokens + 2 * self.key_range(ranges, 0).len()) * self.width()
    }

    /// Layout of a partial result: dq, dk, dv.
    pub(super) fn partial_layout(&self, ranges: usize) -> Layout {
        let (width, keys) = (self.width(), self.key_range(ranges, 0).len());
        Layout { begin: [0, self.tokens * width, (self.tokens + keys) * width], stride: width }
    }

    /// Sums the partial results of an image's heads and ranges, `[heads][ranges][partial_len]`, into the rows
    /// of `dqkv` for the tokens `first ..`.
    pub fn add_ranges(&self, partials: &[f32], ranges: usize, first: usize, dqkv: &mut [f32]) {
        let (width, layout) = (self.width(), self.partial_layout(ranges));
        let keys = self.key_range(ranges, 0).len();
        for (token, to) in (first..).zip(dqkv.chunks_exact_mut(3 * self.channels)) {
            for (head, partials) in partials.chunks_exact(ranges * self.partial_len(ranges)).enumerate() {
                let partial = |range: usize| &partials[range * self.partial_len(ranges)..];
                let dq = &mut to[self.part_offset(0, head)..][..width];
                dq.copy_from_slice(&partial(0)[token * width..][..width]);
                for range in 1..ranges {
                    dq.iter_mut().zip(&partial(range)[token * width..]).for_each(|(sum, dq)| *sum += dq);
                }
                let (range, key) = (token / keys, token % keys);
                for part in [1, 2] {
                    let from = &partial(range)[layout.begin[part] + key * width..][..width];
                    to[self.part_offset(part, head)..][..width].copy_from_slice(from);
                }
            }
        }
    }
}
