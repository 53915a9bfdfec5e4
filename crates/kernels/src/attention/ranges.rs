//! The backward pass of few images in parts: heads, and ranges of a head's keys. Each part has the dq that its keys make,
//! and their dk and dv; they are added in order.

use super::Attention;
use super::backward::KEY_BLOCK;
use std::ops::Range;

/// Where dq, dk and dv of a head begin, and how far apart two tokens are. In one with a range of keys dk and dv begin with the
/// range's first key.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) begin: [usize; 3],
    pub(super) stride: usize,
}

impl Attention {
    /// The keys of range `i` of `ranges`, all ranges but the last equally long.
    pub(super) fn key_range(&self, ranges: usize, i: usize) -> Range<usize> {
        let len = self.tokens.div_ceil(ranges).next_multiple_of(KEY_BLOCK);
        (i * len).min(self.tokens)..((i + 1) * len).min(self.tokens)
    }

    /// How many ranges of keys to make of each head, so that a few images are work for many threads.
    pub fn key_ranges(&self, images: usize) -> usize {
        const TASKS: usize = 16;
        const LEAST_KEYS: usize = 128;
        TASKS.div_ceil(images * self.heads).min(self.tokens / LEAST_KEYS).max(1)
    }

    /// Numbers of what [`backward_range`](Self::backward_range) makes.
    pub fn partial_len(&self, ranges: usize) -> usize {
        (self.tokens + 2 * self.key_range(ranges, 0).len()) * self.width()
    }

    /// Where a partial result has its parts; dq first.
    pub(super) fn partial_layout(&self, ranges: usize) -> Layout {
        let (width, keys) = (self.width(), self.key_range(ranges, 0).len());
        Layout { begin: [0, self.tokens * width, (self.tokens + keys) * width], stride: width }
    }

    /// Adds the partial results of an image's heads and ranges, `[heads][ranges][partial_len]`, into the rows of `dqkv` for
    /// the tokens `first ..`.
    pub fn add_ranges(&self, partials: &[f32], ranges: usize, first: usize, dqkv: &mut [f32]) {
        let (width, layout) = (self.width(), self.partial_layout(ranges));
        let keys = self.key_range(ranges, 0).len();
        for (token, to) in (first..).zip(dqkv.chunks_exact_mut(3 * self.channels)) {
            for (head, partials) in partials.chunks_exact(ranges * self.partial_len(ranges)).enumerate() {
                let partial = |range: usize| &partials[range * self.partial_len(ranges)..];
                let dq = &mut to[self.part(0, head)..][..width];
                dq.copy_from_slice(&partial(0)[token * width..][..width]);
                for range in 1..ranges {
                    dq.iter_mut().zip(&partial(range)[token * width..]).for_each(|(sum, dq)| *sum += dq);
                }
                let (range, key) = (token / keys, token % keys);
                for part in [1, 2] {
                    let from = &partial(range)[layout.begin[part] + key * width..][..width];
                    to[self.part(part, head)..][..width].copy_from_slice(from);
                }
            }
        }
    }
}
