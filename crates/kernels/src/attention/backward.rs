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
use super::operands::{PANEL, inner_product, unpack_columns};
use super::tiles::{add_keys, add_lanes, add_rows, weights_and_gradients};
use super::{Attention, L2_ELEMS, Rows, Splitter, vectors, vectors_mut};
use crate::bf16::Packing;
use crate::random::Dropout;
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
        match self.narrow() {
            true => self.width(),
            false => self.width().next_multiple_of(self.wide_tile().nv * self.isa.lanes()),
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

    /// The contribution of some keys to a head's `dq`, and the `dk` and `dv` of these keys.
    #[inline(always)]
    pub(super) fn backward_head<S: Simd, P: PackLanes>(
        &self,
        s: S,
        dot: P,
        saved: &Saved<'_>,
        head: usize,
        keys: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        if self.supports_small_heads(saved.dropout) {
            return self.small_head_backward(s, dot, saved, head, keys, layout, out, scratch);
        }
        match S::F32_LANES {
            1 => self.backward_tiles::<S, P, 8>(s, dot, saved, head, keys, layout, out, scratch),
            _ => self.backward_tiles::<S, P, 2>(s, dot, saved, head, keys, layout, out, scratch),
        }
    }

    #[inline(always)]
    fn backward_tiles<S: Simd, P: PackLanes, const NV: usize>(
        &self,
        s: S,
        dot: P,
        &Saved { qkv, o, lse, d_o, dropout }: &Saved<'_>,
        head: usize,
        range: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (width, tokens, c) = (self.width(), self.tokens, self.channels);
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let (words, narrow) = (width.div_ceil(P::ELEMS_PER_WORD), width < S::F32_LANES);
        let mut split = Splitter(scratch);
        let [tokens_len, columns_len, rows_len, chunk_len, block_len, words_len, sums_len] =
            self.backward_parts().map(|(_, len)| len);
        let [keys, values, key_rows] = split.take(tokens_len);
        let [q_columns, do_columns, dq] = split.take(columns_len);
        let [q_rows, do_rows] = split.take(rows_len);
        let [shift, delta] = split.take(chunk_len);
        let [p, ds, mask] = split.take(block_len);
        let [ds_words] = split.take(words_len);
        let [dk, dv] = split.take(sums_len);
        let [q, k, v] = [0, 1, 2].map(|part| self.rows(qkv, part, head));
        let gradients = Rows { x: d_o, stride: c, at: head * width, width };
        if qkv.len() > L2_ELEMS {
            [k, v].iter().for_each(Rows::prefetch_rows);
        }
        k.pack_panels::<P>(&mut keys[..tokens.div_ceil(PANEL) * words * PANEL]);
        v.pack_panels::<P>(&mut values[..tokens.div_ceil(PANEL) * words * PANEL]);
        k.pack_rows::<P>(width, &mut key_rows[..tokens.div_ceil(P::ELEMS_PER_WORD) * width]);
        let packing = self.packing;
        for x in [&mut *keys, values, key_rows] {
            packing.round(x);
        }
        for start in (0..tokens).step_by(self.chunk()) {
            let chunk = self.chunk().min(tokens - start);
            let (q, gradients) = (q.part(start, chunk), gradients.part(start, chunk));
            if qkv.len() > L2_ELEMS {
                [q, gradients, Rows { x: o, ..gradients }.part(start, chunk)]
                    .iter()
                    .for_each(Rows::prefetch_rows);
            }
            let scale = self.scale() * LOG2_E;
            for first in (0..chunk).step_by(nr) {
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
                let len = chunk.div_ceil(P::ELEMS_PER_WORD) * self.row_width();
                q.pack_rows::<P>(self.row_width(), &mut q_rows[..len]);
                gradients.pack_rows::<P>(self.row_width(), &mut do_rows[..len]);
            }
            for x in [&mut *q_columns, do_columns, q_rows, do_rows] {
                packing.round(x);
            }
            // Padding queries have zero queries and gradients, so whatever p is, they contribute nothing.
            shift.fill(0.0);
            delta.fill(0.0);
            for token in 0..chunk {
                let at = (start + token) * c + head * width;
                shift[token] = -lse[(start + token) * self.heads + head] * LOG2_E;
                delta[token] = -inner_product(s, &d_o[at..][..width], &o[at..][..width]);
            }
            dq.fill(0.0);
            for key in range.clone().step_by(KEY_BLOCK) {
                let block = KEY_BLOCK.min(range.end - key);
                let (keys, values) = (&keys[key * words..], &values[key * words..]);
                let key_rows = &key_rows[key / P::ELEMS_PER_WORD * width..];
                dk.fill(0.0);
                dv.fill(0.0);
                for first in (0..chunk).step_by(nr) {
                    let count = nr.min(chunk - first);
                    // Vectors of the tile that hold queries.
                    let used = count.div_ceil(NV * S::F32_LANES) * NV;
                    let range = first * words..(first + nr) * words;
                    let (q, d_o) = (&q_columns[range.clone()], &do_columns[range]);
                    let (shift, delta) = (&shift[first..][..nr], &delta[first..][..nr]);
                    if let Some(masks) = dropout {
                        mask.fill(1.0);
                        let (mask, columns) =
                            (vectors_mut::<S>(&mut mask[..block * nr]), tile_vectors(S::F32_LANES));
                        masks.apply_weights(s, head, tokens, key, start + first, columns, mask);
                    }
                    let masks = if dropout.is_some() { Some(&*mask) } else { None };
                    let (p, ds) =
                        (&mut p[..block * nr / P::ELEMS_PER_WORD], &mut ds[..block * nr / P::ELEMS_PER_WORD]);
                    weights_and_gradients::<S, P, NV>(
                        s, dot, words, block, used, keys, values, q, d_o, shift, delta, masks, p, ds,
                        ds_words,
                    );
                    for x in [&mut *p, ds] {
                        packing.round(x);
                    }
                    let dq = &mut dq[first * width..(first + nr) * width];
                    let ds_by_key = if P::ELEMS_PER_WORD == 1 { &*ds } else { &*ds_words };
                    add_keys::<S, P, NV>(s, dot, width, block, used, key_rows, ds_by_key, dq);
                    if narrow {
                        let range = first * width / 2..(first + nr) * width / 2;
                        let (q, d_o) = match P::ELEMS_PER_WORD {
                            1 => (q, d_o),
                            _ => (&q_rows[range.clone()], &do_rows[range]),
                        };
                        let used = used.div_ceil(P::ELEMS_PER_WORD);
                        add_lanes(s, dot, width, block, used, ds, q, dk);
                        add_lanes(s, dot, width, block, used, p, d_o, dv);
                    } else {
                        let at = first / P::ELEMS_PER_WORD * self.row_width();
                        let (q, d_o) = (&q_rows[at..], &do_rows[at..]);
                        let count = count.div_ceil(P::ELEMS_PER_WORD);
                        let (tile, columns) = (self.wide_tile(), self.row_width());
                        with_tile!(tile, add_rows::<S>(s, dot, width, count, block, ds, q, columns, dk));
                        with_tile!(tile, add_rows::<S>(s, dot, width, count, block, p, d_o, columns, dv));
                    }
                }
                // In the columns q is scaled by log2(e) / sqrt(width); in the rows it is not.
                let scale = if narrow { LN_2 } else { self.scale() };
                for k in 0..block {
                    for (part, sums, scale) in [(1, &*dk, scale), (2, &*dv, 1.0)] {
                        let at = layout.begin[part] + (key - range.start + k) * layout.stride;
                        let to = &mut out[at..][..width];
                        if start == 0 {
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
            for (first, dq) in (0..chunk).step_by(nr).zip(dq.chunks_exact(nr * width)) {
                let at = layout.begin[0] + (start + first) * layout.stride;
                unpack_columns(dq, nr, chunk - first, self.scale(), width, out, at, layout.stride);
            }
        }
    }
}
