//! Multi-head self-attention of one image, tiled, never materializing the N x N weights.
//!
//! Input is `qkv`, `[tokens, 3 * channels]`: for each token the queries of all heads, then the keys, then the
//! values (the layout of PyTorch's `in_proj_weight`); head `h` owns `width = channels / heads` elements of
//! each. `o = softmax(q k^T / sqrt(width)) v` (Vaswani et al. 2017).
//!
//! A tile has one or more vectors of *queries* across the lanes and a block of keys down its rows, so that
//! maxima, sums and rescaling work lane by lane and a head of width 4 fills the vectors as well as one of
//! width 64. All exponentials are to base 2: queries are multiplied by `log2(e) / sqrt(width)` when they are
//! packed.
//!
//! With bf16 operands all five products use bf16 pairs (`operands.rs`); scores, sums and exponentials stay
//! f32.
//!
//! Dropout multiplies the softmax by a mask D that is generated tile by tile, identically in both passes:
//! `o = (p D) v`, `dv += (p D) do`, `dp = D (v . do)`; the sums of p, and `do . o` in ds, need no change.

mod backward;
mod forward;
mod key_split;
mod narrow;
mod operands;
mod query_tile;
mod tiles;

pub use backward::Saved;

use self::backward::HeadTask;
use self::forward::Queries;
use self::key_split::Layout;
use self::operands::Rows;
use crate::bf16::{MatmulDtype, Packing};
use crate::isa::{Isa, dispatch};
use crate::random::Dropout;
use pulp::Simd;
use std::ops::Range;

/// An attention of fixed size, prepared for one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    isa: Isa,
    packing: Packing,
    tokens: usize,
    channels: usize,
    heads: usize,
}

impl Attention {
    /// `heads` must divide `channels`.
    pub fn new(isa: Isa, dtype: MatmulDtype, tokens: usize, channels: usize, heads: usize) -> Self {
        assert_eq!(channels % heads, 0, "heads must divide channels");
        Self { isa, packing: isa.packing(dtype), tokens, channels, heads }
    }

    fn width(&self) -> usize {
        self.channels / self.heads
    }

    /// Forward pass of the queries `first ..` that fit into `o` (`[queries, channels]`). `lse`
    /// (`[queries, heads]`) receives the logarithm of each softmax denominator.
    pub fn forward(
        &self,
        qkv: &[f32],
        first: usize,
        dropout: Option<Dropout>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(qkv.len(), self.tokens * 3 * self.channels);
        assert_eq!(o.len() * self.heads, lse.len() * self.channels);
        prefetch_rows([qkv, o]);
        let queries = Queries { qkv, first, dropout };
        dispatch!(self.isa, self.packing, s, dot => self.forward_generic(s, dot, queries, o, lse, scratch));
    }

    /// Backward pass of one image; `dqkv` is `[tokens, 3 * channels]`.
    pub fn backward(&self, saved: &Saved<'_>, dqkv: &mut [f32], scratch: &mut [f32]) {
        self.check(saved);
        assert_eq!(dqkv.len(), saved.qkv.len());
        prefetch_rows([dqkv, saved.qkv, saved.o, saved.d_o]);
        self.backward_heads(saved, 0..self.heads, 0..self.tokens, None, dqkv, scratch);
    }

    /// Task `task` of the `heads * ranges` of an image's backward pass: head `task / ranges`, key range
    /// `task % ranges`. `out` has length [`partial_len`](Self::partial_len); [`add_ranges`](Self::add_ranges)
    /// sums the partial results.
    pub fn backward_range(
        &self,
        saved: &Saved<'_>,
        task: usize,
        ranges: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        self.check(saved);
        assert_eq!(out.len(), self.partial_len(ranges));
        let (head, keys) = (task / ranges, self.key_range(ranges, task % ranges));
        self.backward_heads(saved, head..head + 1, keys, Some(self.partial_layout(ranges)), out, scratch);
    }

    /// Backward pass of some heads and keys; without a layout `out` is laid out as `dqkv`. (A single call
    /// site, so that the kernel is compiled once.)
    fn backward_heads(
        &self,
        saved: &Saved<'_>,
        heads: Range<usize>,
        keys: Range<usize>,
        layout: Option<Layout>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        dispatch!(self.isa, self.packing, s, dot => for head in heads {
            let begin = [0, 1, 2].map(|part| self.part_offset(part, head));
            let layout = layout.unwrap_or(Layout { begin, stride: 3 * self.channels });
            let task = HeadTask { head, keys: keys.clone(), layout };
            self.backward_head(s, dot, saved, &task, out, scratch);
        });
    }

    fn check(&self, saved: &Saved<'_>) {
        let len = self.tokens * self.channels;
        assert_eq!(saved.qkv.len(), 3 * len);
        assert_eq!((saved.o.len(), saved.d_o.len()), (len, len));
        assert_eq!(saved.lse.len(), self.tokens * self.heads);
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width() as f32).sqrt()
    }

    /// Queries (0), keys (1) or values (2) of a head.
    fn rows<'a>(&self, qkv: &'a [f32], part: usize, head: usize) -> Rows<'a> {
        Rows { x: qkv, stride: 3 * self.channels, at: self.part_offset(part, head), width: self.width() }
    }

    /// Offset of part `part` (0 queries, 1 keys, 2 values) of `head` in the row of a token.
    fn part_offset(&self, part: usize, head: usize) -> usize {
        part * self.channels + head * self.width()
    }
}

/// Maximum length of queries, keys and values to be prefetched into the L2 cache, in f32s.
const L2_ELEMS: usize = 160 << 10;

/// Reads memory sequentially, which is fast, before the heads read it with long strides, which is slow unless
/// it is cached. Does nothing if the first part is too long. Outputs are included, because a write loads the
/// cache line first.
fn prefetch_rows<const N: usize>(parts: [&[f32]; N]) {
    if parts[0].len() <= L2_ELEMS {
        let lines = parts.iter().flat_map(|part| part.iter().step_by(LINE));
        std::hint::black_box(lines.fold(0, |bits, x| bits | x.to_bits()));
    }
}

/// Elements of a cache line. Scratch parts are aligned to it, because vectors that cross two lines are slow.
const LINE: usize = 16;

/// Splits a scratch slice into parts, one after the other.
struct Splitter<'a>(&'a mut [f32]);

impl<'a> Splitter<'a> {
    fn take<const N: usize>(&mut self, len: usize) -> [&'a mut [f32]; N] {
        std::array::from_fn(|_| {
            let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len.next_multiple_of(LINE));
            self.0 = rest;
            &mut part[..len]
        })
    }

    /// Total length of parts given as (count, length).
    fn total(parts: &[(usize, usize)]) -> usize {
        parts.iter().map(|(count, len)| count * len.next_multiple_of(LINE)).sum()
    }
}

/// A slice as vectors; its length must be a multiple of the lanes.
#[inline(always)]
fn vectors<S: Simd>(x: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(x).0
}

/// Mutable counterpart of [`vectors`].
#[inline(always)]
fn vectors_mut<S: Simd>(x: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(x).0
}
