//! The backward pass without dropout for heads of width 4 and 8 that are narrower than a vector.
//!
//! Fixes two keys and iterates over the queries:
//!
//! ```text
//! for each chunk of queries:
//!     for every two keys:
//!         for each query tile of the chunk:       one vector of queries; two if words have two elements
//!             p, ds of both keys                  in registers
//!             dq[d][query]     += ds k[d]         in the tile
//!             dk[key][d][lane] += ds q;   dv[key][d][lane] += p do        in registers all the way
//! ```
//!
//! For a width whose dk and dv sums exceed the register file there are two passes over the chunk: one for dv,
//! and one for dk and dq with the weights that the first pass left in the tiles.

use super::backward::HeadTask;
use super::key_split::Layout;
use super::operands::{Columns, PANEL, Rows, exp2_clamped, inner_product, panel_at, row};
use super::{Attention, L2_ELEMS, Saved, Splitter, vectors_mut};
use crate::bf16::Packing;
use crate::random::Dropout;
use crate::tile::{F32, PackLanes};
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};

/// Length of the query tiles of a chunk, in f32s: a small part of an L2 cache, from which they are prefetched
/// in time.
const CHUNK: usize = 32 << 10;

/// Offsets in a query tile of `V` vectors of queries, in vectors. If words have one element, `q` and `do`
/// also serve the sums over lanes; if two, those use separate copies with pairs of neighbouring queries.
struct QueryTile<const D: usize, const V: usize>;

impl<const D: usize, const V: usize> QueryTile<D, V> {
    /// q packed along the width, `[words of the width][V]`.
    const Q: usize = 0;
    const DO: usize = D;
    /// q packed in pairs of neighbouring queries, `[D]`.
    const Q_LANES: usize = if V == 1 { Self::Q } else { 2 * D };
    const DO_LANES: usize = Self::Q_LANES + D;
    /// `[D][V]`.
    const DQ: usize = Self::DO_LANES + D;
    /// Initial accumulators of the scores, `-lse`, and of the weight gradients, `-do . o`.
    const SHIFT: usize = Self::DQ + D * V;
    const DELTA: usize = Self::SHIFT + V;
    /// Weights of two keys, passed from one pass to the next.
    const P: usize = Self::DELTA + V;
    const LEN: usize = Self::P + 2 * V;
}

/// Two keys and their values packed as panel columns, and the same keys packed as rows.
#[derive(Clone, Copy)]
struct Keys<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    rows: &'a [f32],
}

impl Attention {
    /// Whether the backward pass has this implementation for the head.
    pub(super) fn supports_small_heads(&self, dropout: Option<Dropout>) -> bool {
        let sizes = [(16, 4), (16, 8), (8, 4)];
        sizes.contains(&(self.isa.lanes(), self.width()))
            && dropout.is_none()
            && self.packing != Packing::Rounded
    }

    /// Queries of a tile.
    fn tile_queries(&self) -> usize {
        self.packing.elems_per_word() * self.isa.lanes()
    }

    /// Length of a query tile, in f32s.
    fn tile_len(&self) -> usize {
        (3 * self.width() + 4) * self.tile_queries()
    }

    /// Queries of a chunk, a multiple of the tile.
    fn small_head_chunk(&self) -> usize {
        let max_tokens = CHUNK / self.tile_len() * self.tile_queries();
        self.tokens.div_ceil(self.tokens.div_ceil(max_tokens)).next_multiple_of(self.tile_queries())
    }

    /// Counts and lengths of the scratch parts: panels of keys and of values, and rows of keys; the query
    /// tiles of a chunk; sums of dk and dv of two keys.
    pub(super) fn small_head_parts(&self) -> [(usize, usize); 3] {
        let tiles = self.small_head_chunk() / self.tile_queries();
        let sums = 2 * 2 * self.width() * self.isa.lanes();
        [(3, self.tokens.next_multiple_of(PANEL) * self.width()), (1, tiles * self.tile_len()), (1, sums)]
    }

    /// The contribution of a task's keys to its head's `dq`, and the `dk` and `dv` of these keys.
    #[inline(always)]
    pub(super) fn small_head_backward<S: Simd, P: PackLanes>(
        &self,
        s: S,
        dot: P,
        saved: &Saved<'_>,
        task: &HeadTask,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        // Nested matches of constants, so that unused combinations are not compiled for an instruction set.
        match S::F32_LANES {
            16 => match P::ELEMS_PER_WORD {
                1 => match self.width() {
                    4 => self.backward_key_pairs::<S, P, 4, 1, 16, true>(s, dot, saved, task, out, scratch),
                    _ => self.backward_key_pairs::<S, P, 8, 1, 28, false>(s, dot, saved, task, out, scratch),
                },
                _ => match self.width() {
                    4 => self.backward_key_pairs::<S, P, 4, 2, 32, true>(s, dot, saved, task, out, scratch),
                    _ => self.backward_key_pairs::<S, P, 8, 2, 56, false>(s, dot, saved, task, out, scratch),
                },
            },
            8 => self.backward_key_pairs::<S, P, 4, 1, 16, false>(s, dot, saved, task, out, scratch),
            _ => unreachable!("unsupported vector length"),
        }
    }

    /// Tiles have `R` vectors; `SINGLE_PASS` says whether one pass computes everything.
    #[inline(always)]
    fn backward_key_pairs<
        S: Simd,
        P: PackLanes,
        const D: usize,
        const V: usize,
        const R: usize,
        const SINGLE_PASS: bool,
    >(
        &self,
        s: S,
        dot: P,
        saved: &Saved<'_>,
        HeadTask { head, keys: range, layout }: &HeadTask,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        const { assert!(R == QueryTile::<D, V>::LEN) };
        let (tokens, words, lanes) = (self.tokens, D / P::ELEMS_PER_WORD, S::F32_LANES);
        let mut split = Splitter(scratch);
        let [tokens_len, tiles_len, sums_len] = self.small_head_parts().map(|(_, len)| len);
        let [keys, values, key_rows] = split.take(tokens_len);
        let [tiles] = split.take(tiles_len);
        let [sums] = split.take(sums_len);
        let [k, v] = [1, 2].map(|part| self.rows(saved.qkv, part, *head));
        if saved.qkv.len() > L2_ELEMS {
            [k, v].iter().for_each(Rows::prefetch_rows);
        }
        k.pack_panels::<P>(&mut keys[..tokens.div_ceil(PANEL) * words * PANEL]);
        v.pack_panels::<P>(&mut values[..tokens.div_ceil(PANEL) * words * PANEL]);
        k.pack_rows::<P>(D, &mut key_rows[..tokens.div_ceil(P::ELEMS_PER_WORD) * D]);
        for start in (0..tokens).step_by(self.small_head_chunk()) {
            let count = self.small_head_chunk().min(tokens - start).div_ceil(V * lanes);
            let tiles = &mut tiles[..count * R * lanes];
            self.fill_records::<S, P, D, V>(s, dot, saved, *head, start, tiles);
            for key in range.clone().step_by(2) {
                let count = 2.min(range.end - key);
                let sums = &mut sums[..count * 2 * D * lanes];
                let at = panel_at(key, words);
                let pair = Keys {
                    keys: &keys[at..],
                    values: &values[at..],
                    rows: &key_rows[key / P::ELEMS_PER_WORD * D..],
                };
                let (tiles, sums) = (vectors_mut::<S>(tiles).as_chunks_mut::<R>().0, vectors_mut::<S>(sums));
                if count == 2 {
                    key_passes::<S, P, 2, D, V, R, SINGLE_PASS>(s, dot, pair, tiles, sums);
                } else {
                    key_passes::<S, P, 1, D, V, R, SINGLE_PASS>(s, dot, pair, tiles, sums);
                }
                put_keys::<S, D>(s, *layout, key - range.start, start == 0, sums, out);
            }
            for (i, tile) in tiles.chunks_exact(R * lanes).enumerate() {
                let (first, dq) = (start + i * V * lanes, &tile[QueryTile::<D, V>::DQ * lanes..]);
                let at = layout.begin[0] + first * layout.stride;
                let dq = Columns { x: dq, width: D, columns: V * lanes, count: tokens - first };
                dq.unpack(self.scale(), out, at, layout.stride);
            }
        }
    }

    /// Fills the tiles of the queries from `start` on, with dq at 0. Padding queries have zero queries and
    /// gradients, so whatever p is, they contribute nothing.
    #[inline(always)]
    fn fill_records<S: Simd, P: PackLanes, const D: usize, const V: usize>(
        &self,
        s: S,
        dot: P,
        &Saved { qkv, o, lse, d_o, .. }: &Saved<'_>,
        head: usize,
        start: usize,
        tiles: &mut [f32],
    ) {
        let (lanes, queries) = (S::F32_LANES, V * S::F32_LANES);
        let q = self.rows(qkv, 0, head);
        let gradients = Rows { x: d_o, stride: self.channels, at: head * D, width: D };
        let o = Rows { x: o, ..gradients };
        let count = tiles.len() / (QueryTile::<D, V>::LEN * lanes) * queries;
        if qkv.len() > L2_ELEMS {
            [q, gradients, o].iter().for_each(|rows| rows.part(start, count).prefetch_rows());
        }
        let scale = self.scale() * LOG2_E;
        for (i, tile) in tiles.chunks_exact_mut(QueryTile::<D, V>::LEN * lanes).enumerate() {
            let first = start + i * queries;
            tile.fill(0.0);
            let parts = [
                (q, scale, QueryTile::<D, V>::Q, QueryTile::<D, V>::Q_LANES),
                (gradients, 1.0, QueryTile::<D, V>::DO, QueryTile::<D, V>::DO_LANES),
            ];
            for (rows, scale, at, at_lanes) in parts {
                rows.pack_columns::<P>(first, queries, scale, &mut tile[at * lanes..][..D * lanes]);
                if V == 2 {
                    let mut elems = [0.0; 2 * 16 * 8];
                    let elems = &mut elems[..D * queries];
                    rows.pack_columns::<F32>(first, queries, scale, elems);
                    dot.pair_lanes(s, elems, &mut tile[at_lanes * lanes..][..D * lanes]);
                }
            }
            for i in 0..queries.min(self.tokens - first) {
                tile[QueryTile::<D, V>::SHIFT * lanes + i] = -lse[(first + i) * self.heads + head] * LOG2_E;
                let dot = inner_product(s, &gradients.row(first + i)[..D], &o.row(first + i)[..D]);
                tile[QueryTile::<D, V>::DELTA * lanes + i] = -dot;
            }
        }
    }
}

/// One pass or two for `K` keys.
#[inline(always)]
fn key_passes<
    S: Simd,
    P: PackLanes,
    const K: usize,
    const D: usize,
    const V: usize,
    const R: usize,
    const SINGLE_PASS: bool,
>(
    s: S,
    dot: P,
    keys: Keys<'_>,
    tiles: &mut [[S::f32s; R]],
    sums: &mut [S::f32s],
) {
    if SINGLE_PASS {
        key_pass::<S, P, K, D, V, R, true, true>(s, dot, keys, tiles, sums);
    } else {
        key_pass::<S, P, K, D, V, R, true, false>(s, dot, keys, tiles, sums);
        key_pass::<S, P, K, D, V, R, false, true>(s, dot, keys, tiles, sums);
    }
}

/// Stores the sums of dk and dv of some keys, the first of which is key `key` of the task, if they are those of the
/// `first` chunk; else adds them.
#[inline(always)]
fn put_keys<S: Simd, const D: usize>(
    s: S,
    layout: Layout,
    key: usize,
    first: bool,
    sums: &[S::f32s],
    out: &mut [f32],
) {
    // In the tiles q is scaled by log2(e) / sqrt(width).
    for (i, sums) in sums.chunks_exact(2 * D).enumerate() {
        for (part, sums, scale) in [(1, &sums[..D], LN_2), (2, &sums[D..], 1.0)] {
            let at = layout.begin[part] + (key + i) * layout.stride;
            let to = &mut out[at..][..D];
            for d in 0..D {
                let sum = s.reduce_sum_f32s(sums[d]) * scale;
                to[d] = if first { sum } else { to[d] + sum };
            }
        }
    }
}

/// `VALUES` computes p and dv; `KEYS` computes ds, dq and dk.
#[inline(always)]
fn key_pass<
    S: Simd,
    P: PackLanes,
    const K: usize,
    const D: usize,
    const V: usize,
    const R: usize,
    const VALUES: bool,
    const KEYS: bool,
>(
    s: S,
    dot: P,
    keys: Keys<'_>,
    tiles: &mut [[S::f32s; R]],
    sums: &mut [S::f32s],
) {
    let words = D / P::ELEMS_PER_WORD;
    let panel = (words - 1) * PANEL + K;
    let keys = Keys {
        keys: &keys.keys[..panel],
        values: &keys.values[..panel],
        rows: &keys.rows[..K.div_ceil(P::ELEMS_PER_WORD) * D],
    };
    let sums = &mut sums[..2 * D * K];
    let zero = s.splat_f32s(0.0);
    let (mut dk, mut dv) = ([[zero; K]; D], [[zero; K]; D]);
    for tile in tiles {
        let mut p = [[zero; V]; K];
        if VALUES {
            p = add_to_dv::<S, P, K, D, V, R>(s, dot, keys.keys, tile, &mut dv);
        }
        if VALUES && !KEYS {
            for k in 0..K {
                for v in 0..V {
                    tile[QueryTile::<D, V>::P + k * V + v] = p[k][v];
                }
            }
        }
        if KEYS && !VALUES {
            for k in 0..K {
                for v in 0..V {
                    p[k][v] = tile[QueryTile::<D, V>::P + k * V + v];
                }
            }
        }
        if KEYS {
            add_to_dk::<S, P, K, D, V, R>(s, dot, keys, p, tile, &mut dk);
        }
    }
    for d in 0..D {
        for k in 0..K {
            if KEYS {
                sums[k * 2 * D + d] = dk[d][k];
            }
            if VALUES {
                sums[k * 2 * D + D + d] = dv[d][k];
            }
        }
    }
}

/// The weights p of a tile; adds p do to the sums of dv.
#[inline(always)]
fn add_to_dv<S: Simd, P: PackLanes, const K: usize, const D: usize, const V: usize, const R: usize>(
    s: S,
    dot: P,
    keys: &[f32],
    tile: &[S::f32s; R],
    dv: &mut [[S::f32s; K]; D],
) -> [[S::f32s; V]; K] {
    let mut p = [row::<S, V>(&tile[QueryTile::<D, V>::SHIFT..]); K];
    for w in 0..D / P::ELEMS_PER_WORD {
        let q = row::<S, V>(&tile[QueryTile::<D, V>::Q + w * V..]);
        for k in 0..K {
            dot.multiply(s, keys[w * PANEL + k], q, &mut p[k]);
        }
    }
    for k in 0..K {
        for v in 0..V {
            p[k][v] = exp2_clamped::<S, P>(s, p[k][v]);
        }
    }
    let mut lanes = [s.splat_f32s(0.0); K];
    for k in 0..K {
        lanes[k] = dot.pair_vectors(s, p[k][0], p[k][V - 1]);
    }
    for d in 0..D {
        dot.multiply_vectors(s, tile[QueryTile::<D, V>::DO_LANES + d], lanes, &mut dv[d]);
    }
    p
}

/// Adds ds q to the sums of dk, and ds k to dq in the tile.
#[inline(always)]
fn add_to_dk<S: Simd, P: PackLanes, const K: usize, const D: usize, const V: usize, const R: usize>(
    s: S,
    dot: P,
    Keys { values, rows, .. }: Keys<'_>,
    p: [[S::f32s; V]; K],
    tile: &mut [S::f32s; R],
    dk: &mut [[S::f32s; K]; D],
) {
    let zero = s.splat_f32s(0.0);
    let mut ds = [row::<S, V>(&tile[QueryTile::<D, V>::DELTA..]); K];
    for w in 0..D / P::ELEMS_PER_WORD {
        let d_o = row::<S, V>(&tile[QueryTile::<D, V>::DO + w * V..]);
        for k in 0..K {
            dot.multiply(s, values[w * PANEL + k], d_o, &mut ds[k]);
        }
    }
    for k in 0..K {
        for v in 0..V {
            ds[k][v] = s.mul_f32s(p[k][v], ds[k][v]);
        }
    }
    let (mut pairs, mut lanes) = (ds, [zero; K]);
    for k in (0..K).step_by(P::ELEMS_PER_WORD) {
        for v in 0..V {
            let odd = if k + 1 < K { ds[k + 1][v] } else { zero };
            pairs[k / P::ELEMS_PER_WORD][v] = dot.pair(s, ds[k][v], odd);
        }
    }
    for k in 0..K {
        lanes[k] = dot.pair_vectors(s, ds[k][0], ds[k][V - 1]);
    }
    for d in 0..D {
        let at = QueryTile::<D, V>::DQ + d * V;
        let mut dq = row::<S, V>(&tile[at..]);
        for k in 0..K.div_ceil(P::ELEMS_PER_WORD) {
            dot.multiply(s, rows[k * D + d], pairs[k], &mut dq);
        }
        tile[at..at + V].copy_from_slice(&dq);
        dot.multiply_vectors(s, tile[QueryTile::<D, V>::Q_LANES + d], lanes, &mut dk[d]);
    }
}
