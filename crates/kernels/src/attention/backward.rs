//! The backward pass.
//!
//! It recomputes the weights from the logarithms of the denominators (Dao et al. 2022):
//!
//! ```text
//! for each chunk of queries:                    as many as the L2 cache holds
//!     for each block of keys:
//!         for each query tile of the chunk:
//!             p[key][query]  = 2^(k[key] . q[query] - lse)                      in registers
//!             ds[key][query] = p (v[key] . do[query] - do . o)
//!             dq[d][query]  += sum over keys of ds k
//!             dk[key][d]    += sum over queries of ds q;    dv[key][d] += sum over queries of p do
//! ```
//!
//! The accumulators of the products start from `-lse` and `-do . o`. The sums over queries run across the
//! lanes: for a head narrower than a vector every lane has its own sums `[key][d][lane]`, which are reduced
//! when the block of keys is done; for others they are products with rows of q and do, d across the lanes.
//! Where words have two elements, p and ds are packed both ways as they are computed: pairs of neighbouring
//! keys for dq, of neighbouring queries for dk and dv.

use super::key_split::Layout;
use super::operands::{Columns, PANEL, inner_product};
use super::tiles::{BlockShape, Operands, RowShape, add_keys, add_lanes, add_rows, weights_and_gradients};
use super::{Attention, L2_ELEMS, Rows, Splitter, vectors, vectors_mut};
use crate::bf16::Packing;
use crate::random::{Dropout, WeightBlock};
use crate::tile::{F32, PackLanes, TileShape, with_tile};
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Length of the data of a chunk of queries, in f32s: less than half of an L2 cache.
const CHUNK: usize = 96 << 10;

/// Keys of a block, a multiple of the 8 for which dropout masks are generated at once.
pub(super) const KEY_BLOCK: usize = 32;

/// Maximum length of a query tile of a narrow head, in f32s.
const MAX_NARROW_TILE: usize = 64 * 15;

/// Vectors of queries in a tile.
pub(super) const fn tile_vectors(lanes: usize) -> usize {
    if lanes == 1 { 8 } else { 4 }
}

/// Inputs of the backward pass of an image: the operands and results of the forward pass, and the output
/// gradient.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Queries, keys and values, `[tokens, 3 * channels]`.
    pub qkv: &'a [f32],
    /// The output, `[tokens, channels]`.
    pub o: &'a [f32],
    /// The logarithms of the denominators, `[tokens, heads]`.
    pub lse: &'a [f32],
    /// The output gradient, `[tokens, channels]`.
    pub d_o: &'a [f32],
    /// The dropout masks of the forward pass.
    pub dropout: Option<Dropout>,
}

/// A head and some of its keys, and where their gradients go.
pub(super) struct HeadTask {
    pub head: usize,
    pub keys: Range<usize>,
    pub layout: Layout,
}

/// A chunk of a head's queries: `count` from `start` on.
#[derive(Clone, Copy)]
struct Chunk {
    head: usize,
    start: usize,
    count: usize,
}

/// Scratch memory of a task ([`Attention::backward_parts`]).
struct Memory<'a> {
    /// All keys and values of the head in panels, and the keys in rows.
    keys: &'a mut [f32],
    values: &'a mut [f32],
    key_rows: &'a mut [f32],
    /// Queries and output gradients of a chunk as columns, tile by tile; dq likewise.
    q_columns: &'a mut [f32],
    do_columns: &'a mut [f32],
    dq: &'a mut [f32],
    /// Queries and output gradients as rows.
    q_rows: &'a mut [f32],
    do_rows: &'a mut [f32],
    /// What the accumulators of the scores and of the weight gradients start from.
    shift: &'a mut [f32],
    delta: &'a mut [f32],
    /// Weights, score gradients and dropout masks of a block of keys and a tile.
    p: &'a mut [f32],
    ds: &'a mut [f32],
    mask: &'a mut [f32],
    /// Score gradients in pairs of neighbouring keys.
    ds_words: &'a mut [f32],
    /// Sums of dk and dv of a block of keys.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl Attention {
    /// Whether a head is narrower than a vector.
    fn narrow(&self) -> bool {
        self.width() < self.isa.lanes()
    }

    /// Queries of a backward tile.
    fn columns(&self) -> usize {
        tile_vectors(self.isa.lanes()) * self.isa.lanes()
    }

    /// Queries of a chunk, a multiple of the tile.
    fn chunk(&self) -> usize {
        let max_tokens = CHUNK / (3 * self.width() + 2 * self.row_width());
        let chunks = self.tokens.div_ceil(max_tokens.max(self.columns()));
        self.tokens.div_ceil(chunks).next_multiple_of(self.columns())
    }

    /// Tile of the products with d across the lanes.
    fn wide_tile(&self) -> TileShape {
        TileShape::pick(self.isa.lanes(), self.width())
    }

    /// Length of a row of q or do: the width, padded to the tile of these products. (For narrow heads, the
    /// length for each query of columns with pairs of neighbouring queries.)
    fn row_width(&self) -> usize {
        if self.narrow() {
            self.width()
        } else {
            self.width().next_multiple_of(self.wide_tile().nv * self.isa.lanes())
        }
    }

    /// Scratch length of a backward task, in f32s.
    pub fn backward_scratch_len(&self) -> usize {
        let small_head_len =
            if self.supports_small_heads(None) { Splitter::total(&self.small_head_parts()) } else { 0 };
        Splitter::total(&self.backward_parts()).max(small_head_len)
    }

    /// Counts and lengths of the scratch parts: panels of keys and of values, and rows of keys; columns of q,
    /// do and dq; rows of q and do; lse and delta; p, ds and masks; ds packed along the keys; sums of dk and
    /// dv.
    fn backward_parts(&self) -> [(usize, usize); 7] {
        let (width, lanes, chunk) = (self.width(), self.isa.lanes(), self.chunk());
        let block = KEY_BLOCK * self.columns();
        let words = if self.packing == Packing::Pairs { block / 2 } else { 0 };
        let rows = if self.narrow() && words == 0 { 0 } else { chunk * self.row_width() };
        let sums = KEY_BLOCK * width * if self.narrow() { lanes } else { 1 };
        [
            (3, self.tokens.next_multiple_of(PANEL) * width),
            (3, chunk * width),
            (2, rows),
            (2, chunk),
            (3, block),
            (1, words),
            (2, sums),
        ]
    }

    /// The contribution of a task's keys to its head's `dq`, and the `dk` and `dv` of these keys.
    #[inline(always)]
    pub(super) fn backward_head<S: Simd, P: PackLanes>(
        &self,
        s: S,
        dot: P,
        saved: &Saved<'_>,
        task: &HeadTask,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        if self.supports_small_heads(saved.dropout) {
            return self.small_head_backward(s, dot, saved, task, out, scratch);
        }
        match S::F32_LANES {
            1 => self.backward_tiles::<S, P, 8>(s, dot, saved, task, out, scratch),
            _ => self.backward_tiles::<S, P, 2>(s, dot, saved, task, out, scratch),
        }
    }

    #[inline(always)]
    fn backward_tiles<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        saved: &Saved<'_>,
        task: &HeadTask,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (head, layout, width) = (task.head, task.layout, self.width());
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let mut memory = self.backward_memory(scratch);
        self.pack_keys::<P>(saved.qkv, head, &mut memory);
        for start in (0..self.tokens).step_by(self.chunk()) {
            let chunk = Chunk { head, start, count: self.chunk().min(self.tokens - start) };
            self.pack_chunk(s, dot, saved, chunk, &mut memory);
            memory.dq.fill(0.0);
            for key in task.keys.clone().step_by(KEY_BLOCK) {
                let keys = key..task.keys.end.min(key + KEY_BLOCK);
                memory.dk.fill(0.0);
                memory.dv.fill(0.0);
                self.add_block::<S, P, NV>(s, dot, saved.dropout, chunk, keys.clone(), &mut memory);
                self.put_block(s, task, keys, start == 0, &memory, out);
            }
            for (first, dq) in (0..chunk.count).step_by(nr).zip(memory.dq.chunks_exact(nr * width)) {
                let at = layout.begin[0] + (start + first) * layout.stride;
                let dq = Columns { x: dq, width, columns: nr, count: chunk.count - first };
                dq.unpack(self.scale(), out, at, layout.stride);
            }
        }
    }

    /// Splits the scratch memory of a task.
    #[inline(always)]
    fn backward_memory<'a>(&self, scratch: &'a mut [f32]) -> Memory<'a> {
        let mut split = Splitter(scratch);
        let [tokens, columns, rows, chunk, block, words, sums] = self.backward_parts().map(|(_, len)| len);
        let [keys, values, key_rows] = split.take(tokens);
        let [q_columns, do_columns, dq] = split.take(columns);
        let [q_rows, do_rows] = split.take(rows);
        let [shift, delta] = split.take(chunk);
        let [p, ds, mask] = split.take(block);
        let [ds_words] = split.take(words);
        let [dk, dv] = split.take(sums);
        Memory {
            keys,
            values,
            key_rows,
            q_columns,
            do_columns,
            dq,
            q_rows,
            do_rows,
            shift,
            delta,
            p,
            ds,
            mask,
            ds_words,
            dk,
            dv,
        }
    }

    /// Packs all keys and values of a head.
    #[inline(always)]
    fn pack_keys<P: PackLanes>(&self, qkv: &[f32], head: usize, memory: &mut Memory<'_>) {
        let (tokens, width) = (self.tokens, self.width());
        let words = width.div_ceil(P::ELEMS_PER_WORD);
        let [k, v] = [1, 2].map(|part| self.rows(qkv, part, head));
        if qkv.len() > L2_ELEMS {
            [k, v].iter().for_each(Rows::prefetch_rows);
        }
        k.pack_panels::<P>(&mut memory.keys[..tokens.div_ceil(PANEL) * words * PANEL]);
        v.pack_panels::<P>(&mut memory.values[..tokens.div_ceil(PANEL) * words * PANEL]);
        k.pack_rows::<P>(width, &mut memory.key_rows[..tokens.div_ceil(P::ELEMS_PER_WORD) * width]);
        for x in [&mut *memory.keys, memory.values, memory.key_rows] {
            self.packing.round(x);
        }
    }

    /// Packs the queries and output gradients of a chunk, and computes what the accumulators start from.
    #[inline(always)]
    fn pack_chunk<S: Simd, P: PackLanes>(
        &self,
        s: S,
        dot: P,
        saved: &Saved<'_>,
        chunk: Chunk,
        memory: &mut Memory<'_>,
    ) {
        let (width, c, scale) = (self.width(), self.channels, self.scale() * LOG2_E);
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let (words, narrow) = (width.div_ceil(P::ELEMS_PER_WORD), width < S::F32_LANES);
        let Chunk { head, start, count } = chunk;
        let Memory { q_columns, do_columns, q_rows, do_rows, .. } = memory;
        let gradients = Rows { x: saved.d_o, stride: c, at: head * width, width };
        let q = self.rows(saved.qkv, 0, head).part(start, count);
        let gradients = gradients.part(start, count);
        if saved.qkv.len() > L2_ELEMS {
            let o = Rows { x: saved.o, ..gradients }.part(start, count);
            [q, gradients, o].iter().for_each(Rows::prefetch_rows);
        }
        for first in (0..count).step_by(nr) {
            let range = first * words..(first + nr) * words;
            q.pack_columns::<P>(first, nr, scale, &mut q_columns[range.clone()]);
            gradients.pack_columns::<P>(first, nr, 1.0, &mut do_columns[range]);
            // Narrow heads use pairs of neighbouring queries if words have two elements.
            if narrow && P::ELEMS_PER_WORD == 2 {
                let range = first * width / 2..(first + nr) * width / 2;
                let mut elems = [0.0; MAX_NARROW_TILE];
                let elems = &mut elems[..nr * width];
                q.pack_columns::<F32>(first, nr, scale, elems);
                dot.pair_lanes(s, elems, &mut q_rows[range.clone()]);
                gradients.pack_columns::<F32>(first, nr, 1.0, elems);
                dot.pair_lanes(s, elems, &mut do_rows[range]);
            }
        }
        if !narrow {
            let len = count.div_ceil(P::ELEMS_PER_WORD) * self.row_width();
            q.pack_rows::<P>(self.row_width(), &mut q_rows[..len]);
            gradients.pack_rows::<P>(self.row_width(), &mut do_rows[..len]);
        }
        for x in [&mut **q_columns, do_columns, q_rows, do_rows] {
            self.packing.round(x);
        }
        // Padding queries have zero queries and gradients, so whatever p is, they contribute nothing.
        memory.shift.fill(0.0);
        memory.delta.fill(0.0);
        for token in 0..count {
            let at = (start + token) * c + head * width;
            memory.shift[token] = -saved.lse[(start + token) * self.heads + head] * LOG2_E;
            memory.delta[token] = -inner_product(s, &saved.d_o[at..][..width], &saved.o[at..][..width]);
        }
    }

    /// Adds the products of a block of keys and the tiles of a chunk to the sums of dq, dk and dv.
    #[inline(always)]
    fn add_block<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        dropout: Option<Dropout>,
        chunk: Chunk,
        keys: Range<usize>,
        memory: &mut Memory<'_>,
    ) {
        let width = self.width();
        let (words, block) = (width.div_ceil(P::ELEMS_PER_WORD), keys.len());
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let block_words = block * nr / P::ELEMS_PER_WORD;
        for first in (0..chunk.count).step_by(nr) {
            let (p, ds) = (&mut memory.p[..block_words], &mut memory.ds[..block_words]);
            let mask = &mut *memory.mask;
            let count = nr.min(chunk.count - first);
            // Vectors of the tile that hold queries.
            let used = count.div_ceil(NV * S::F32_LANES) * NV;
            if let Some(masks) = dropout {
                mask.fill(1.0);
                let at = WeightBlock {
                    head: chunk.head,
                    tokens: self.tokens,
                    key: keys.start,
                    query: chunk.start + first,
                    columns: tile_vectors(S::F32_LANES),
                };
                masks.apply_weights(s, at, vectors_mut::<S>(&mut mask[..block * nr]));
            }
            let range = first * words..(first + nr) * words;
            let operands = Operands {
                words,
                block,
                used,
                keys: &memory.keys[keys.start * words..],
                values: &memory.values[keys.start * words..],
                q: &memory.q_columns[range.clone()],
                d_o: &memory.do_columns[range],
                shift: &memory.shift[first..][..nr],
                delta: &memory.delta[first..][..nr],
                masks: if dropout.is_some() { Some(&*mask) } else { None },
            };
            weights_and_gradients::<S, P, NV>(s, dot, operands, p, ds, memory.ds_words);
            for x in [&mut *p, ds] {
                self.packing.round(x);
            }
            let shape = BlockShape { width, block, used };
            self.add_tile::<S, P, NV>(s, dot, shape, keys.start, first..first + count, memory);
        }
    }

    /// Adds the products of a block of keys from `key` on and a tile, with p and ds in memory. `queries` are those
    /// of the tile in its chunk.
    #[inline(always)]
    fn add_tile<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        shape: BlockShape,
        key: usize,
        queries: Range<usize>,
        memory: &mut Memory<'_>,
    ) {
        let BlockShape { width, block, used } = shape;
        let (words, first) = (width.div_ceil(P::ELEMS_PER_WORD), queries.start);
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let block_words = block * nr / P::ELEMS_PER_WORD;
        let (p, ds) = (&memory.p[..block_words], &memory.ds[..block_words]);
        let key_rows = &memory.key_rows[key / P::ELEMS_PER_WORD * width..];
        let dq = &mut memory.dq[first * width..(first + nr) * width];
        let ds_by_key = if P::ELEMS_PER_WORD == 1 { ds } else { &*memory.ds_words };
        add_keys::<S, P, NV>(s, dot, shape, key_rows, ds_by_key, dq);
        let (dk, dv) = (&mut *memory.dk, &mut *memory.dv);
        if width < S::F32_LANES {
            let (q, d_o) = match P::ELEMS_PER_WORD {
                1 => {
                    let range = first * words..(first + nr) * words;
                    (&memory.q_columns[range.clone()], &memory.do_columns[range])
                }
                _ => {
                    let range = first * width / 2..(first + nr) * width / 2;
                    (&memory.q_rows[range.clone()], &memory.do_rows[range])
                }
            };
            let shape = BlockShape { used: used.div_ceil(P::ELEMS_PER_WORD), ..shape };
            add_lanes(s, dot, shape, ds, q, dk);
            add_lanes(s, dot, shape, p, d_o, dv);
        } else {
            let at = first / P::ELEMS_PER_WORD * self.row_width();
            let (q, d_o) = (&memory.q_rows[at..], &memory.do_rows[at..]);
            let count = queries.len().div_ceil(P::ELEMS_PER_WORD);
            let (tile, shape) =
                (self.wide_tile(), RowShape { width, block, count, columns: self.row_width() });
            with_tile!(tile, add_rows::<S>(s, dot, shape, ds, q, dk));
            with_tile!(tile, add_rows::<S>(s, dot, shape, p, d_o, dv));
        }
    }

    /// Stores the sums of dk and dv of a block of keys if they are those of the `first` chunk; else adds them.
    #[inline(always)]
    fn put_block<S: Simd>(
        &self,
        s: S,
        task: &HeadTask,
        keys: Range<usize>,
        first: bool,
        memory: &Memory<'_>,
        out: &mut [f32],
    ) {
        let (width, layout) = (self.width(), task.layout);
        let narrow = width < S::F32_LANES;
        // In the columns q is scaled by log2(e) / sqrt(width); in the rows it is not.
        let scale = if narrow { LN_2 } else { self.scale() };
        for k in 0..keys.len() {
            for (part, sums, scale) in [(1, &*memory.dk, scale), (2, &*memory.dv, 1.0)] {
                let at = layout.begin[part] + (keys.start - task.keys.start + k) * layout.stride;
                let to = &mut out[at..][..width];
                if first {
                    to.fill(0.0);
                }
                if narrow {
                    let sums = &vectors::<S>(sums)[k * width..][..width];
                    for (v, sum) in to.iter_mut().zip(sums) {
                        *v += s.reduce_sum_f32s(*sum) * scale;
                    }
                } else {
                    for (v, sum) in to.iter_mut().zip(&sums[k * width..]) {
                        *v += sum * scale;
                    }
                }
            }
        }
    }
}
