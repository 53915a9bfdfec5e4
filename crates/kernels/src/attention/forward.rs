//! The forward pass.
//!
//! ```text
//! for each query tile:
//!     for each block of keys:
//!         s[key][query]  = k[key] . q[query]             in registers
//!         p[key][query]  = 2^(s - m);                    l += sum over keys of p
//!         o[d][query]   += sum over keys of v[key][d] p
//!     out = o / l;  lse = (m + log2 l) ln 2
//! ```
//!
//! Softmax does not depend on m, which only keeps the exponentials in range. Where `|q| max |k|`, an upper
//! bound on all scores (Cauchy-Schwarz), is small, m is 0, and no maximum or rescaling is needed. Only the
//! other queries need the running maximum and rescaling of the online softmax (Milakov and Gimelshein 2018).

use super::operands::{Columns, PANEL, Rows};
use super::query_tile::{MAX_SAFE_SCORE, Maxima, Packed, add_values, bounded_weights, fused, online_weights};
use super::{Attention, L2_ELEMS, Splitter, vectors_mut};
use crate::bf16::Packing;
use crate::random::{Dropout, WeightBlock};
use crate::tile::PackLanes;
use crate::vector;
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};

/// Keys of a block, chosen so that their scores against a query tile fit the L1 cache.
const KEY_BLOCK: usize = 64;

/// Vectors of queries in a tile.
const fn tile_vectors(lanes: usize) -> usize {
    if lanes == 1 { 8 } else { 2 }
}

/// The queries of a task: those from `first` on that fit into its output.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    pub qkv: &'a [f32],
    pub first: usize,
    pub dropout: Option<Dropout>,
}

/// A tile of queries of a head: `count` from `first` on.
#[derive(Clone, Copy)]
struct Tile {
    head: usize,
    first: usize,
    count: usize,
}

/// Scratch memory of a task.
struct Memory<'a> {
    /// A head's keys in panels, and its values in rows.
    keys: &'a mut [f32],
    values: &'a mut [f32],
    /// Queries and output of a tile as columns.
    queries: &'a mut [f32],
    out: &'a mut [f32],
    /// Weights of a block of keys, and the same as words.
    weights: &'a mut [f32],
    words: &'a mut [f32],
    /// Maximum score, sum of the weights and bound of the scores of each query.
    max: &'a mut [f32],
    sum: &'a mut [f32],
    bound: &'a mut [f32],
}

impl Attention {
    /// Queries of a tile.
    fn nr(&self) -> usize {
        tile_vectors(self.isa.lanes()) * self.isa.lanes()
    }

    /// Queries of a forward task in a batch of images, a multiple of the tile: small enough for many threads,
    /// and large enough that repacking keys and values for each task is negligible.
    pub fn task_queries(&self, images: usize) -> usize {
        const TASKS: usize = 16;
        const MIN_QUERIES: usize = 128;
        let parts = TASKS.div_ceil(images).min(self.tokens / MIN_QUERIES).max(1);
        self.tokens.div_ceil(parts).next_multiple_of(self.nr())
    }

    /// Scratch length of a forward task, in f32s.
    pub fn scratch_len(&self) -> usize {
        Splitter::total(&self.parts())
    }

    /// Counts and lengths of the scratch parts: panels of keys and of values; queries and output; weights;
    /// packed weights; maxima, sums and bounds.
    fn parts(&self) -> [(usize, usize); 5] {
        let (width, nr, block) = (self.width(), self.nr(), KEY_BLOCK * self.nr());
        let words = if self.packing == Packing::Pairs { block / 2 } else { 0 };
        [(2, self.tokens.next_multiple_of(PANEL) * width), (2, width * nr), (1, block), (1, words), (3, nr)]
    }

    #[inline(always)]
    pub(super) fn forward_generic<S: Simd, P: PackLanes>(
        &self,
        s: S,
        dot: P,
        queries: Queries<'_>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        match S::F32_LANES {
            1 => self.forward_tiles::<S, P, 8>(s, dot, queries, o, lse, scratch),
            _ => self.forward_tiles::<S, P, 2>(s, dot, queries, o, lse, scratch),
        }
    }

    #[inline(always)]
    fn forward_tiles<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        Queries { qkv, first, dropout }: Queries<'_>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (tokens, width, nr, c) = (self.tokens, self.width(), NV * S::F32_LANES, self.channels);
        let width_words = width.div_ceil(P::ELEMS_PER_WORD);
        let (count, packing) = (o.len() / c, self.packing);
        let Memory { keys, values, queries, out, weights, words, max, sum, bound } =
            self.forward_memory::<P>(scratch);
        for head in 0..self.heads {
            let max_row_norm = self.pack_head::<S, P>(s, qkv, head, keys, values);
            for start in (0..count).step_by(nr) {
                let tile = Tile { head, first: first + start, count: nr.min(count - start) };
                let rows = self.rows(qkv, 0, head).part(tile.first, tile.count);
                let bounded = self.pack_tile::<S, P>(s, rows, max_row_norm, queries, bound, max);
                out.fill(0.0);
                sum.fill(0.0);
                let all = Packed { words: width_words, keys, values, queries };
                let in_registers = bounded && dropout.is_none() && packing != Packing::Rounded;
                match (in_registers, P::ELEMS_PER_WORD, width) {
                    (true, 1, 4) => fused::<S, P, 4, 4, NV, NV>(s, dot, tokens, all, sum, out),
                    (true, 1, 8) => fused::<S, P, 8, 8, NV, 1>(s, dot, tokens, all, sum, out),
                    (true, 2, 4) => fused::<S, P, 2, 4, NV, NV>(s, dot, tokens, all, sum, out),
                    (true, 2, 8) => fused::<S, P, 4, 8, NV, 1>(s, dot, tokens, all, sum, out),
                    _ => {
                        for key in (0..tokens).step_by(KEY_BLOCK) {
                            let block = KEY_BLOCK.min(tokens - key);
                            let values = &values[key / P::ELEMS_PER_WORD * width..];
                            let packed = Packed { keys: &keys[key * width_words..], values, ..all };
                            let weights = &mut weights[..block * nr];
                            if bounded {
                                bounded_weights::<S, P, NV>(s, dot, packed, weights, sum);
                            } else {
                                let maxima = Maxima { bound, max };
                                online_weights::<S, P, NV>(s, dot, packed, weights, maxima, sum, out);
                            }
                            if let Some(masks) = dropout {
                                let at = WeightBlock { head, tokens, key, query: tile.first, columns: NV };
                                masks.apply_weights(s, at, vectors_mut::<S>(weights));
                            }
                            packing.round(weights);
                            add_values::<S, P, NV>(s, dot, width, values, weights, words, out);
                        }
                    }
                }
                self.put_lse(tile, max, sum, &mut lse[start * self.heads..]);
                self.put_output(s, tile, sum, out, &mut o[start * c..]);
            }
        }
    }

    /// Splits the scratch memory of a task.
    #[inline(always)]
    fn forward_memory<'a, P: PackLanes>(&self, scratch: &'a mut [f32]) -> Memory<'a> {
        let width = self.width();
        let width_words = width.div_ceil(P::ELEMS_PER_WORD);
        let mut split = Splitter(scratch);
        let [rows, tiles, block, words, lanes] = self.parts().map(|(_, len)| len);
        let [keys, values] = split.take(rows);
        let [queries, out] = split.take(tiles);
        let [weights] = split.take(block);
        let [words] = split.take(words);
        let [max, sum, bound] = split.take(lanes);
        let keys = &mut keys[..self.tokens.div_ceil(PANEL) * width_words * PANEL];
        let values = &mut values[..self.tokens.div_ceil(P::ELEMS_PER_WORD) * width];
        Memory { keys, values, queries, out, weights, words, max, sum, bound }
    }

    /// Packs the keys and values of a head; returns the largest norm of a key.
    #[inline(always)]
    fn pack_head<S: Simd, P: PackLanes>(
        &self,
        s: S,
        qkv: &[f32],
        head: usize,
        keys: &mut [f32],
        values: &mut [f32],
    ) -> f32 {
        let [k, v] = [1, 2].map(|part| self.rows(qkv, part, head));
        if qkv.len() > L2_ELEMS {
            k.prefetch_rows();
            v.prefetch_rows();
        }
        k.pack_panels::<P>(keys);
        v.pack_rows::<P>(self.width(), values);
        self.packing.round(keys);
        self.packing.round(values);
        k.max_row_norm(s)
    }

    /// Packs the queries of a tile, and sets the bounds of their scores and the maxima that the softmax begins with.
    /// Returns whether no query needs its maximum.
    #[inline(always)]
    fn pack_tile<S: Simd, P: PackLanes>(
        &self,
        s: S,
        rows: Rows<'_>,
        max_row_norm: f32,
        queries: &mut [f32],
        bound: &mut [f32],
        max: &mut [f32],
    ) -> bool {
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let scale = self.scale() * LOG2_E;
        let width_words = self.width().div_ceil(P::ELEMS_PER_WORD);
        score_bounds(s, rows, scale * max_row_norm, bound);
        let mut bounded = true;
        for (bound, max) in bound.iter().zip(max) {
            let small = *bound <= MAX_SAFE_SCORE;
            *max = if small { 0.0 } else { f32::NEG_INFINITY };
            bounded &= small;
        }
        rows.pack_columns::<P>(0, nr, scale, &mut queries[..width_words * nr]);
        self.packing.round(queries);
        bounded
    }

    /// Writes the logarithms of a tile's denominators to the rows of `lse`.
    #[inline(always)]
    fn put_lse(&self, Tile { head, count, .. }: Tile, max: &[f32], sum: &[f32], lse: &mut [f32]) {
        for q in 0..count {
            lse[q * self.heads + head] = max[q] * LN_2 + sum[q].ln();
        }
    }

    /// Divides by the sums and writes the output of a tile to the rows of `o`.
    #[inline(always)]
    fn put_output<S: Simd>(&self, s: S, tile: Tile, sum: &[f32], out: &mut [f32], o: &mut [f32]) {
        let (nr, width) = (sum.len(), self.width());
        for row in out.chunks_exact_mut(nr) {
            vector::map2(
                s,
                row,
                sum,
                #[inline(always)]
                |o, sum| s.div_f32s(o, sum),
            );
        }
        let out = Columns { x: out, width, columns: nr, count: tile.count };
        out.unpack(1.0, o, tile.head * width, self.channels);
    }
}

/// Upper bound on the scores of each query: its norm times `scale`; 0 past the last query.
#[inline(always)]
fn score_bounds<S: Simd>(s: S, queries: Rows<'_>, scale: f32, bound: &mut [f32]) {
    bound.fill(0.0);
    for (q, bound) in bound.iter_mut().enumerate().take(queries.count()) {
        *bound = queries.part(q, 1).max_row_norm(s) * scale;
    }
}
