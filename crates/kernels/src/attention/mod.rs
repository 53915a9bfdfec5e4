//! Multi-head self-attention of one image, in tiles, without ever storing the N x N weights.
//!
//! Input is `qkv`, `[tokens, 3 * channels]`: for each token the queries of all heads, then the keys, then the values
//! (the layout of PyTorch's `in_proj_weight`); head `h` owns `width = channels / heads` numbers of each.
//! `o = softmax(q k^T / sqrt(width)) v` (Vaswani et al. 2017).
//!
//! A tile has one or more vectors of *queries* side by side and a block of keys below each other, so that
//! maxima, sums and rescaling work lane by lane and a head of width 4 fills the vectors as well as one of width 64.
//! All exponents are to base 2: queries are multiplied by `log2(e) / sqrt(width)` when they are packed.
//!
//! With bf16 factors all five products are of pairs (`product.rs`); scores, sums and the powers themselves stay f32.
//!
//! Dropout multiplies the softmax's results with factors D that are drawn tile by tile, in both passes the same ones:
//! `o = (p D) v`, `dv += (p D) do`, `dp = D (v . do)`; the sums of p, and `do . o` in ds, need no change.

mod backward;
mod forward;
mod narrow;
mod product;
mod ranges;
mod tiles;

pub use backward::Saved;

use self::product::Rows;
use self::ranges::Layout;
use crate::bf16::Words;
use crate::conv::MatmulDtype;
use crate::isa::{Isa, dispatch};
use crate::random::Dropout;
use pulp::Simd;
use std::ops::Range;

/// The sizes of an attention, prepared for one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    isa: Isa,
    words: Words,
    tokens: usize,
    channels: usize,
    heads: usize,
}

impl Attention {
    /// Prepares; `heads` must divide `channels`.
    pub fn new(isa: Isa, factors: MatmulDtype, tokens: usize, channels: usize, heads: usize) -> Self {
        assert_eq!(channels % heads, 0, "heads divide channels");
        Self { isa, words: Words::of(isa, factors), tokens, channels, heads }
    }

    fn width(&self) -> usize {
        self.channels / self.heads
    }

    /// Forward pass of the queries `first ..` that `o` (`[queries, channels]`) holds. `lse` (`[queries, heads]`)
    /// receives the logarithm of each softmax's denominator.
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
        dispatch!(self.isa, self.words, s, product => self.forward_generic(
            s, product, qkv, first, dropout, o, lse, scratch
        ));
    }

    /// Backward pass of one image; `dqkv` is `[tokens, 3 * channels]`.
    pub fn backward(&self, saved: &Saved<'_>, dqkv: &mut [f32], scratch: &mut [f32]) {
        self.check(saved);
        assert_eq!(dqkv.len(), saved.qkv.len());
        prefetch_rows([dqkv, saved.qkv, saved.o, saved.d_o]);
        self.backward_heads(saved, 0..self.heads, 0..self.tokens, None, dqkv, scratch);
    }

    /// Part `task` of the backward pass of one image, of `heads * ranges`: head `task / ranges`, and of its keys range
    /// `task % ranges`. `out` holds [`partial_len`](Self::partial_len) numbers, which
    /// [`add_ranges`](Self::add_ranges) adds.
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

    /// Some heads of the backward pass with some keys; without a layout `out` is that of an image's `dqkv`. (One place for both
    /// ways, so that the kernel is compiled once.)
    fn backward_heads(
        &self,
        saved: &Saved<'_>,
        heads: Range<usize>,
        keys: Range<usize>,
        layout: Option<Layout>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        dispatch!(self.isa, self.words, s, product => for head in heads {
            let begin = [0, 1, 2].map(|part| self.part(part, head));
            let layout = layout.unwrap_or(Layout { begin, stride: 3 * self.channels });
            self.backward_head(s, product, saved, head, keys.clone(), layout, out, scratch);
        });
    }

    fn check(&self, saved: &Saved<'_>) {
        let numbers = self.tokens * self.channels;
        assert_eq!(saved.qkv.len(), 3 * numbers);
        assert_eq!((saved.o.len(), saved.d_o.len()), (numbers, numbers));
        assert_eq!(saved.lse.len(), self.tokens * self.heads);
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width() as f32).sqrt()
    }

    /// Queries (0), keys (1) or values (2) of a head.
    fn rows<'a>(&self, qkv: &'a [f32], part: usize, head: usize) -> Rows<'a> {
        Rows { x: qkv, stride: 3 * self.channels, at: self.part(part, head), width: self.width() }
    }

    /// Where part `part` (0 queries, 1 keys, 2 values) of `head` begins in a token's row.
    fn part(&self, part: usize, head: usize) -> usize {
        part * self.channels + head * self.width()
    }
}

/// Most queries, keys and values that are brought into the second-level cache.
const L2_ELEMS: usize = 160 << 10;

/// Reads memory front to back, which is fast, before the heads read it in pieces far apart, which is slow unless it is near.
/// The first part says whether it is little enough. What will be written comes too, because a cache reads it first.
fn prefetch_rows<const N: usize>(parts: [&[f32]; N]) {
    if parts[0].len() <= L2_ELEMS {
        let lines = parts.iter().flat_map(|part| part.iter().step_by(LINE));
        std::hint::black_box(lines.fold(0, |bits, x| bits | x.to_bits()));
    }
}

/// Numbers of a cache line: parts of scratch memory begin at one, because vectors that cross two are slow.
const LINE: usize = 16;

/// Takes one part after the other from a scratch slice.
struct Splitter<'a>(&'a mut [f32]);

impl<'a> Splitter<'a> {
    fn take<const N: usize>(&mut self, len: usize) -> [&'a mut [f32]; N] {
        std::array::from_fn(|_| {
            let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len.next_multiple_of(LINE));
            self.0 = rest;
            &mut part[..len]
        })
    }

    /// What parts of these (number, length) take.
    fn total(parts: &[(usize, usize)]) -> usize {
        parts.iter().map(|(count, len)| count * len.next_multiple_of(LINE)).sum()
    }
}

/// The vectors of a slice whose length is a multiple of the lanes.
#[inline(always)]
fn vectors<S: Simd>(x: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(x).0
}

/// The same, to write to.
#[inline(always)]
fn vectors_mut<S: Simd>(x: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(x).0
}
