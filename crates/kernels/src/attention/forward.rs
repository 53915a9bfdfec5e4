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

use super::operands::{
    Columns, PANEL, Part, Rows, Strided, columns, exp2_bounded, exp2_clamped, in_rows, load, pair_rows,
    panel_columns, row, short_rows, store,
};
use super::{Attention, L2_ELEMS, Splitter, vectors, vectors_mut};
use crate::bf16::Packing;
use crate::random::{Dropout, WeightBlock};
use crate::tile::{self, PackLanes};
use crate::vector;
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};

/// Keys of a block, chosen so that their scores against a query tile fit the L1 cache.
const KEY_BLOCK: usize = 64;

/// Maximum score bound, to base 2, of a query that needs no maximum: its exponentials are in 2^-60 .. 2^60,
/// and a sum of 2^20 of them times a value of 2^40 does not overflow.
const MAX_SAFE_SCORE: f32 = 60.0;

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
    dropout: Option<Dropout>,
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

/// Packed operands of a query tile: `words` for each key and query; all keys and values, or those from the first of
/// a block on.
#[derive(Clone, Copy)]
struct Packed<'a> {
    words: usize,
    keys: &'a [f32],
    values: &'a [f32],
    queries: &'a [f32],
}

/// Bounds of the scores of each query of a tile, and their running maxima.
struct Maxima<'a> {
    bound: &'a [f32],
    max: &'a mut [f32],
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
        let (nr, c) = (NV * S::F32_LANES, self.channels);
        let mut memory = self.forward_memory::<P>(scratch);
        let count = o.len() / c;
        for head in 0..self.heads {
            let max_row_norm = self.pack_head::<S, P>(s, qkv, head, &mut memory);
            for start in (0..count).step_by(nr) {
                let tile = Tile { head, first: first + start, count: nr.min(count - start), dropout };
                let queries = self.rows(qkv, 0, head).part(tile.first, tile.count);
                let bounded = self.pack_tile::<S, P>(s, queries, max_row_norm, &mut memory);
                self.tile_sums::<S, P, NV>(s, dot, tile, bounded, &mut memory);
                let (o, lse) = (&mut o[start * c..], &mut lse[start * self.heads..]);
                self.finish::<S>(s, tile, &mut memory, o, lse);
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
        memory: &mut Memory<'_>,
    ) -> f32 {
        let [k, v] = [1, 2].map(|part| self.rows(qkv, part, head));
        if qkv.len() > L2_ELEMS {
            k.prefetch_rows();
            v.prefetch_rows();
        }
        k.pack_panels::<P>(memory.keys);
        v.pack_rows::<P>(self.width(), memory.values);
        self.packing.round(memory.keys);
        self.packing.round(memory.values);
        k.max_row_norm(s)
    }

    /// Packs the queries of a tile, and sets the bounds of their scores, the maxima that the softmax begins with,
    /// and zero sums. Returns whether no query needs its maximum.
    #[inline(always)]
    fn pack_tile<S: Simd, P: PackLanes>(
        &self,
        s: S,
        queries: Rows<'_>,
        max_row_norm: f32,
        memory: &mut Memory<'_>,
    ) -> bool {
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let scale = self.scale() * LOG2_E;
        let width_words = self.width().div_ceil(P::ELEMS_PER_WORD);
        score_bounds(s, queries, scale * max_row_norm, memory.bound);
        let mut bounded = true;
        for (bound, max) in memory.bound.iter().zip(&mut *memory.max) {
            let small = *bound <= MAX_SAFE_SCORE;
            *max = if small { 0.0 } else { f32::NEG_INFINITY };
            bounded &= small;
        }
        queries.pack_columns::<P>(0, nr, scale, &mut memory.queries[..width_words * nr]);
        self.packing.round(memory.queries);
        memory.out.fill(0.0);
        memory.sum.fill(0.0);
        bounded
    }

    /// The sums of a tile over all keys: of the weights, and of the weighted values.
    #[inline(always)]
    fn tile_sums<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        tile: Tile,
        bounded: bool,
        memory: &mut Memory<'_>,
    ) {
        let (tokens, width) = (self.tokens, self.width());
        let words = width.div_ceil(P::ELEMS_PER_WORD);
        let in_registers = bounded && tile.dropout.is_none() && self.packing != Packing::Rounded;
        let Memory { keys, values, queries, out, sum, .. } = memory;
        let packed = Packed { words, keys, values, queries };
        match (in_registers, P::ELEMS_PER_WORD, width) {
            (true, 1, 4) => fused::<S, P, 4, 4, NV, NV>(s, dot, tokens, packed, sum, out),
            (true, 1, 8) => fused::<S, P, 8, 8, NV, 1>(s, dot, tokens, packed, sum, out),
            (true, 2, 4) => fused::<S, P, 2, 4, NV, NV>(s, dot, tokens, packed, sum, out),
            (true, 2, 8) => fused::<S, P, 4, 8, NV, 1>(s, dot, tokens, packed, sum, out),
            _ => self.block_sums::<S, P, NV>(s, dot, tile, bounded, memory),
        }
    }

    /// The same block of keys by block of keys.
    #[inline(always)]
    fn block_sums<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        tile: Tile,
        bounded: bool,
        memory: &mut Memory<'_>,
    ) {
        let (tokens, width, nr) = (self.tokens, self.width(), NV * S::F32_LANES);
        let width_words = width.div_ceil(P::ELEMS_PER_WORD);
        let Memory { keys, values, queries, out, weights, words, max, sum, bound } = memory;
        for key in (0..tokens).step_by(KEY_BLOCK) {
            let block = KEY_BLOCK.min(tokens - key);
            let packed = Packed {
                words: width_words,
                keys: &keys[key * width_words..],
                values: &values[key / P::ELEMS_PER_WORD * width..],
                queries,
            };
            let weights = &mut weights[..block * nr];
            if bounded {
                bounded_weights::<S, P, NV>(s, dot, packed, weights, sum);
            } else {
                let maxima = Maxima { bound, max };
                online_weights::<S, P, NV>(s, dot, packed, weights, maxima, sum, out);
            }
            if let Some(masks) = tile.dropout {
                let at = WeightBlock { head: tile.head, tokens, key, query: tile.first, columns: NV };
                masks.apply_weights(s, at, vectors_mut::<S>(weights));
            }
            self.packing.round(weights);
            add_values::<S, P, NV>(s, dot, width, packed.values, weights, words, out);
        }
    }

    /// Divides by the sums and writes the results of a tile to the rows of `o` and `lse`.
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        s: S,
        Tile { head, count, .. }: Tile,
        memory: &mut Memory<'_>,
        o: &mut [f32],
        lse: &mut [f32],
    ) {
        let Memory { max, sum, out, .. } = memory;
        let (nr, width) = (sum.len(), self.width());
        for q in 0..count {
            lse[q * self.heads + head] = max[q] * LN_2 + sum[q].ln();
        }
        for row in out.chunks_exact_mut(nr) {
            vector::map2(
                s,
                row,
                sum,
                #[inline(always)]
                |o, sum| s.div_f32s(o, sum),
            );
        }
        Columns { x: out, width, columns: nr, count }.unpack(1.0, o, head * width, self.channels);
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

/// `weights[key][query] = 2^(k . q)`, and the sums over keys.
#[inline(always)]
fn bounded_weights<S: Simd, P: PackLanes, const NV: usize>(
    s: S,
    dot: P,
    Packed { words, keys, queries, .. }: Packed<'_>,
    weights: &mut [f32],
    sum: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
        s: S,
        dot: P,
        part: Part,
        keys: &[f32],
        queries: Strided<'_, S::f32s>,
        weights: &mut [S::f32s],
        sum: &mut [S::f32s; NV],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        panel_columns(s, dot, keys, queries, part, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                acc[r][v] = exp2_bounded::<S, P>(s, acc[r][v]);
                sum[v] = s.add_f32s(sum[v], acc[r][v]);
            }
        }
        store::<S, MR, NV>(&acc, weights, NV);
    }
    let queries = Strided { x: vectors::<S>(queries), stride: NV };
    let (weights, sum) = (vectors_mut::<S>(weights), vectors_mut::<S>(sum));
    let mut total = row::<S, NV>(sum);
    let panel = |i: usize| &keys[i / PANEL * PANEL * words..];
    let part = |i: usize| Part { words, row: i % PANEL, v: 0 };
    in_rows!(
        S,
        P,
        [NV],
        weights.len() / NV,
        max_tile_rows::<S>(),
        rows(i, s, dot, part(i), panel(i), queries, &mut weights[i * NV..], &mut total)
    );
    sum.copy_from_slice(&total);
}

/// The same with a running maximum: `weights[key][query] = 2^(k . q - max)`; earlier sums are rescaled to the
/// new maximum. Where `bound` is small the maximum stays 0.
#[inline(always)]
fn online_weights<S: Simd, P: PackLanes, const NV: usize>(
    s: S,
    dot: P,
    Packed { words, keys, queries, .. }: Packed<'_>,
    weights: &mut [f32],
    Maxima { bound, max }: Maxima<'_>,
    sum: &mut [f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
        s: S,
        dot: P,
        part: Part,
        keys: &[f32],
        queries: Strided<'_, S::f32s>,
        scores: &mut [S::f32s],
        max: &mut [S::f32s; NV],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        panel_columns(s, dot, keys, queries, part, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                max[v] = s.max_f32s(max[v], acc[r][v]);
            }
        }
        store::<S, MR, NV>(&acc, scores, NV);
    }
    let queries = Strided { x: vectors::<S>(queries), stride: NV };
    let (weights, out) = (vectors_mut::<S>(weights), vectors_mut::<S>(out));
    let (bound, max, sum) = (vectors::<S>(bound), vectors_mut::<S>(max), vectors_mut::<S>(sum));
    let mut new_max = row::<S, NV>(max);
    let panel = |i: usize| &keys[i / PANEL * PANEL * words..];
    let part = |i: usize| Part { words, row: i % PANEL, v: 0 };
    in_rows!(
        S,
        P,
        [NV],
        weights.len() / NV,
        max_tile_rows::<S>(),
        rows(i, s, dot, part(i), panel(i), queries, &mut weights[i * NV..], &mut new_max)
    );
    let (mut total, mut rescale) = (row::<S, NV>(sum), new_max);
    for v in 0..NV {
        let small = s.less_than_or_equal_f32s(bound[v], s.splat_f32s(MAX_SAFE_SCORE));
        new_max[v] = s.select_f32s(small, max[v], new_max[v]);
        rescale[v] = vector::exp2(s, s.sub_f32s(max[v], new_max[v]));
        total[v] = s.mul_f32s(total[v], rescale[v]);
    }
    for row in out.chunks_exact_mut(NV) {
        for v in 0..NV {
            row[v] = s.mul_f32s(row[v], rescale[v]);
        }
    }
    for row in weights.chunks_exact_mut(NV) {
        for v in 0..NV {
            row[v] = exp2_clamped::<S, P>(s, s.sub_f32s(row[v], new_max[v]));
            total[v] = s.add_f32s(total[v], row[v]);
        }
    }
    max.copy_from_slice(&new_max);
    sum.copy_from_slice(&total);
}

/// `out[d][query] += sum over keys of values[key][d] weights[key][query]`.
#[inline(always)]
fn add_values<S: Simd, P: PackLanes, const NV: usize>(
    s: S,
    dot: P,
    width: usize,
    values: &[f32],
    weights: &[f32],
    words: &mut [f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
        s: S,
        dot: P,
        width: usize,
        values: &[f32],
        weights: &[S::f32s],
        out: &mut [S::f32s],
    ) {
        let mut acc = load::<S, MR, NV>(out, NV);
        let (values, count) = (Strided { x: values, stride: width }, weights.len() / NV);
        columns(s, dot, values, Strided { x: weights, stride: NV }, count, &mut acc);
        store::<S, MR, NV>(&acc, out, NV);
    }
    let (weights, out) = (vectors::<S>(weights), vectors_mut::<S>(out));
    let count = (weights.len() / NV).div_ceil(P::ELEMS_PER_WORD);
    let weights = &pair_rows(s, dot, weights, NV, vectors_mut::<S>(words))[..count * NV];
    in_rows!(
        S,
        P,
        [NV],
        width,
        max_tile_rows::<S>(),
        rows(i, s, dot, width, &values[i..], weights, &mut out[i * NV..])
    );
}

/// All keys at once, everything in registers: `D` elements packed in `W` words.
#[inline(always)]
fn fused<S: Simd, P: PackLanes, const W: usize, const D: usize, const NV: usize, const V: usize>(
    s: S,
    dot: P,
    tokens: usize,
    Packed { keys, values, queries, .. }: Packed<'_>,
    sum: &mut [f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn group<S: Simd, P: PackLanes, const MR: usize, const W: usize, const D: usize, const V: usize>(
        s: S,
        dot: P,
        keys: &[f32],
        values: &[f32],
        q: &[[S::f32s; V]; W],
        o: &mut [[S::f32s; V]; D],
        sum: &mut [S::f32s; V],
    ) {
        let mut acc = tile::zero::<S, MR, V>(s);
        short_rows(s, dot, keys, q, &mut acc);
        for r in 0..MR {
            for v in 0..V {
                acc[r][v] = exp2_bounded::<S, P>(s, acc[r][v]);
                sum[v] = s.add_f32s(sum[v], acc[r][v]);
            }
        }
        let values = &values[..MR.div_ceil(P::ELEMS_PER_WORD) * D];
        for r in (0..MR).step_by(P::ELEMS_PER_WORD) {
            let mut weights = acc[r];
            if P::ELEMS_PER_WORD == 2 {
                for v in 0..V {
                    let odd = if r + 1 < MR { acc[r + 1][v] } else { s.splat_f32s(0.0) };
                    weights[v] = dot.pair(s, acc[r][v], odd);
                }
            }
            for d in 0..D {
                dot.multiply(s, values[r / P::ELEMS_PER_WORD * D + d], weights, &mut o[d]);
            }
        }
    }
    let (queries, sum, out) = (vectors::<S>(queries), vectors_mut::<S>(sum), vectors_mut::<S>(out));
    let full = tokens / PANEL;
    let (panels, last_keys) = keys.split_at(full * PANEL * W);
    let (blocks, last_values) = values.split_at(full * PANEL / P::ELEMS_PER_WORD * D);
    for v in (0..NV).step_by(V) {
        let q = load::<S, W, V>(&queries[v..], NV);
        let mut o = load::<S, D, V>(&out[v..], NV);
        let mut total = row::<S, V>(&sum[v..]);
        let blocks = blocks.chunks_exact(PANEL / P::ELEMS_PER_WORD * D);
        for (k, x) in panels.chunks_exact(PANEL * W).zip(blocks) {
            group::<S, P, PANEL, W, D, V>(s, dot, k, x, &q, &mut o, &mut total);
        }
        in_rows!(
            S,
            P,
            [W, D, V],
            tokens - full * PANEL,
            2,
            group(
                i,
                s,
                dot,
                &last_keys[i..],
                &last_values[i / P::ELEMS_PER_WORD * D..],
                &q,
                &mut o,
                &mut total
            )
        );
        store::<S, D, V>(&o, &mut out[v..], NV);
        sum[v..][..V].copy_from_slice(&total);
    }
}

/// Rows of a tile that fills the register file.
#[inline(always)]
fn max_tile_rows<S: Simd>() -> usize {
    match S::F32_LANES {
        16 | 4 => 8,
        _ => 4,
    }
}
