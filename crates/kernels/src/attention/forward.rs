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
//! Softmax does not depend on m; it only has to keep the powers in range. Where `|q| max |k|`, which no score exceeds
//! (Cauchy and Schwarz), is small, m is 0, and there is neither a maximum to find nor anything to scale again. Only
//! other queries need the running maximum and the rescaling of the online softmax (Milakov and Gimelshein 2018).

use super::product::{columns, in_rows, load, row, store};
use super::{Attention, Splitter, pack_columns, pack_rows, vectors, vectors_mut};
use crate::random::Dropout;
use crate::tile;
use crate::vector;
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};

/// Keys of a block: their scores against a query tile stay in the first-level cache.
const KEY_BLOCK: usize = 64;

/// Largest bound on the base-2 scores of a query without a maximum: its powers then lie in 2^-60 .. 2^60, and a sum of
/// 2^20 of them times a value of 2^40 is still a number.
const BOUND: f32 = 60.0;

/// Vectors of queries in a tile.
const fn tile_vectors(lanes: usize) -> usize {
    if lanes == 1 { 8 } else { 2 }
}

impl Attention {
    /// Queries of a tile.
    fn nr(&self) -> usize {
        tile_vectors(self.isa.lanes()) * self.isa.lanes()
    }

    /// Queries of a forward task, a multiple of the tile: fixed, so that tasks do not depend on the machine.
    pub fn task_queries(&self) -> usize {
        self.nr() * 128usize.div_ceil(self.nr())
    }

    /// Numbers of a forward task's scratch memory.
    pub fn scratch_len(&self) -> usize {
        Splitter::total(&self.parts())
    }

    /// Numbers and lengths of the parts of the scratch memory: keys and values; queries and output; weights; maxima,
    /// sums and bounds.
    fn parts(&self) -> [(usize, usize); 4] {
        let (width, nr) = (self.width(), self.nr());
        [(2, self.tokens * width), (2, width * nr), (1, KEY_BLOCK * nr), (3, nr)]
    }

    #[inline(always)]
    pub(super) fn forward_generic<S: Simd>(
        &self,
        s: S,
        qkv: &[f32],
        first: usize,
        dropout: Option<Dropout>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        match S::F32_LANES {
            1 => self.forward_tiles::<S, 8>(s, qkv, first, dropout, o, lse, scratch),
            _ => self.forward_tiles::<S, 2>(s, qkv, first, dropout, o, lse, scratch),
        }
    }

    #[inline(always)]
    fn forward_tiles<S: Simd, const NV: usize>(
        &self,
        s: S,
        qkv: &[f32],
        first: usize,
        dropout: Option<Dropout>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (width, nr, stride, c) = (self.width(), NV * S::F32_LANES, 3 * self.channels, self.channels);
        let mut split = Splitter(scratch);
        let [rows, tiles, block, lanes] = self.parts().map(|(_, len)| len);
        let [keys, values] = split.take(rows);
        let [queries, out] = split.take(tiles);
        let [weights] = split.take(block);
        let [max, sum, bound] = split.take(lanes);
        let count = o.len() / c;
        for head in 0..self.heads {
            pack_rows(width, qkv, stride, self.part(1, head), keys);
            pack_rows(width, qkv, stride, self.part(2, head), values);
            let longest = longest(s, width, keys);
            for start in (0..count).step_by(nr) {
                let tile = nr.min(count - start);
                let (at, scale) = (self.part(0, head), self.scale() * LOG2_E);
                pack_columns(width, qkv, stride, at, first + start, tile, scale, nr, queries);
                out.fill(0.0);
                sum.fill(0.0);
                bound.fill(0.0);
                for row in queries.chunks_exact(nr) {
                    vector::map2(
                        s,
                        bound,
                        row,
                        #[inline(always)]
                        |sum, q| s.mul_add_e_f32s(q, q, sum),
                    );
                }
                let mut bounded = true;
                for (bound, max) in bound.iter_mut().zip(&mut *max) {
                    *bound = bound.sqrt() * longest;
                    let small = *bound <= BOUND;
                    *max = if small { 0.0 } else { f32::NEG_INFINITY };
                    bounded &= small;
                }
                if bounded && dropout.is_none() && (width == 4 || width == 8) {
                    if width == 4 {
                        fused::<S, 4, NV, NV>(s, keys, values, queries, sum, out);
                    } else {
                        fused::<S, 8, NV, 1>(s, keys, values, queries, sum, out);
                    }
                    self.finish::<S>(
                        s,
                        width,
                        head,
                        tile,
                        max,
                        sum,
                        out,
                        &mut o[start * c..],
                        &mut lse[start * self.heads..],
                    );
                    continue;
                }
                for key in (0..self.tokens).step_by(KEY_BLOCK) {
                    let block = KEY_BLOCK.min(self.tokens - key);
                    let (keys, values) = (&keys[key * width..], &values[key * width..]);
                    let weights = &mut weights[..block * nr];
                    if bounded {
                        bounded_weights::<S, NV>(s, width, keys, queries, weights, sum);
                    } else {
                        online_weights::<S, NV>(s, width, keys, queries, weights, bound, max, sum, out);
                    }
                    if let Some(masks) = dropout {
                        masks.apply_weights(head, self.tokens, key, first + start, nr, weights);
                    }
                    add_values::<S, NV>(s, width, values, weights, out);
                }
                self.finish::<S>(
                    s,
                    width,
                    head,
                    tile,
                    max,
                    sum,
                    out,
                    &mut o[start * c..],
                    &mut lse[start * self.heads..],
                );
            }
        }
    }

    /// Divides by the sums and writes a tile's results to the rows of `o` and `lse`.
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        s: S,
        width: usize,
        head: usize,
        tile: usize,
        max: &[f32],
        sum: &mut [f32],
        out: &mut [f32],
        o: &mut [f32],
        lse: &mut [f32],
    ) {
        let nr = sum.len();
        for q in 0..tile {
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
        for q in 0..tile {
            let row = &mut o[q * self.channels + head * width..][..width];
            for (d, v) in row.iter_mut().enumerate() {
                *v = out[d * nr + q];
            }
        }
    }
}

/// The length of the longest row.
#[inline(always)]
fn longest<S: Simd>(s: S, width: usize, rows: &[f32]) -> f32 {
    #[inline(always)]
    fn short(width: usize, rows: &[f32]) -> f32 {
        let mut most = 0.0_f32;
        for row in rows.chunks_exact(width) {
            let mut square = 0.0;
            for v in row {
                square += v * v;
            }
            most = if square > most { square } else { most };
        }
        most
    }
    let most = match width {
        4 => short(4, rows),
        8 => short(8, rows),
        _ if width < S::F32_LANES => short(width, rows),
        _ => {
            let mut most = 0.0_f32;
            for row in rows.chunks_exact(width) {
                let (whole, rest) = S::as_simd_f32s(row);
                let rest = s.partial_load_f32s(rest);
                let mut squares = s.mul_f32s(rest, rest);
                for v in whole {
                    squares = s.mul_add_e_f32s(*v, *v, squares);
                }
                let square = s.reduce_sum_f32s(squares);
                most = if square > most { square } else { most };
            }
            most
        }
    };
    most.sqrt()
}

/// `weights[key][query] = 2^(k . q)`, and the sums over keys.
#[inline(always)]
fn bounded_weights<S: Simd, const NV: usize>(
    s: S,
    width: usize,
    keys: &[f32],
    queries: &[f32],
    weights: &mut [f32],
    sum: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, const MR: usize, const NV: usize>(
        s: S,
        width: usize,
        keys: &[f32],
        queries: &[S::f32s],
        weights: &mut [S::f32s],
        sum: &mut [S::f32s; NV],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::rows_strided(s, keys, width, queries, NV, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                acc[r][v] = vector::exp2_above(s, acc[r][v]);
                sum[v] = s.add_f32s(sum[v], acc[r][v]);
            }
        }
        store::<S, MR, NV>(&acc, weights, NV);
    }
    let (queries, weights, sum) = (vectors::<S>(queries), vectors_mut::<S>(weights), vectors_mut::<S>(sum));
    let mut total = row::<S, NV>(sum);
    in_rows!(
        S,
        [NV],
        weights.len() / NV,
        most_rows::<S>(),
        rows(i, s, width, &keys[i * width..], queries, &mut weights[i * NV..], &mut total)
    );
    sum.copy_from_slice(&total);
}

/// The same with a running maximum: `weights[key][query] = 2^(k . q - max)`; what was summed before is scaled to the new
/// maximum. Where `bound` is small the maximum stays 0.
#[inline(always)]
fn online_weights<S: Simd, const NV: usize>(
    s: S,
    width: usize,
    keys: &[f32],
    queries: &[f32],
    weights: &mut [f32],
    bound: &[f32],
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, const MR: usize, const NV: usize>(
        s: S,
        width: usize,
        keys: &[f32],
        queries: &[S::f32s],
        scores: &mut [S::f32s],
        max: &mut [S::f32s; NV],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::rows_strided(s, keys, width, queries, NV, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                max[v] = s.max_f32s(max[v], acc[r][v]);
            }
        }
        store::<S, MR, NV>(&acc, scores, NV);
    }
    let (queries, weights, out) = (vectors::<S>(queries), vectors_mut::<S>(weights), vectors_mut::<S>(out));
    let (bound, max, sum) = (vectors::<S>(bound), vectors_mut::<S>(max), vectors_mut::<S>(sum));
    let mut most = row::<S, NV>(max);
    in_rows!(
        S,
        [NV],
        weights.len() / NV,
        most_rows::<S>(),
        rows(i, s, width, &keys[i * width..], queries, &mut weights[i * NV..], &mut most)
    );
    let (mut total, mut rescale) = (row::<S, NV>(sum), most);
    for v in 0..NV {
        let small = s.less_than_or_equal_f32s(bound[v], s.splat_f32s(BOUND));
        most[v] = s.select_f32s(small, max[v], most[v]);
        rescale[v] = vector::exp2(s, s.sub_f32s(max[v], most[v]));
        total[v] = s.mul_f32s(total[v], rescale[v]);
    }
    for row in out.chunks_exact_mut(NV) {
        for v in 0..NV {
            row[v] = s.mul_f32s(row[v], rescale[v]);
        }
    }
    for row in weights.chunks_exact_mut(NV) {
        for v in 0..NV {
            row[v] = vector::exp2(s, s.sub_f32s(row[v], most[v]));
            total[v] = s.add_f32s(total[v], row[v]);
        }
    }
    max.copy_from_slice(&most);
    sum.copy_from_slice(&total);
}

/// `out[d][query] += sum over keys of values[key][d] weights[key][query]`.
#[inline(always)]
fn add_values<S: Simd, const NV: usize>(
    s: S,
    width: usize,
    values: &[f32],
    weights: &[f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, const MR: usize, const NV: usize>(
        s: S,
        width: usize,
        values: &[f32],
        weights: &[S::f32s],
        out: &mut [S::f32s],
    ) {
        let mut acc = load::<S, MR, NV>(out, NV);
        columns(s, values, width, weights, NV, weights.len() / NV, &mut acc);
        store::<S, MR, NV>(&acc, out, NV);
    }
    let (weights, out) = (vectors::<S>(weights), vectors_mut::<S>(out));
    in_rows!(S, [NV], width, most_rows::<S>(), rows(i, s, width, &values[i..], weights, &mut out[i * NV..]));
}

/// Rows of a tile that fills the registers.
#[inline(always)]
fn most_rows<S: Simd>() -> usize {
    match S::F32_LANES {
        16 | 4 => 8,
        _ => 4,
    }
}

/// All keys at once, everything in registers.
#[inline(always)]
fn fused<S: Simd, const D: usize, const NV: usize, const V: usize>(
    s: S,
    keys: &[f32],
    values: &[f32],
    queries: &[f32],
    sum: &mut [f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn group<S: Simd, const D: usize, const V: usize, const MR: usize>(
        s: S,
        keys: &[f32],
        values: &[f32],
        q: &[[S::f32s; V]; D],
        o: &mut [[S::f32s; V]; D],
        sum: &mut [S::f32s; V],
    ) {
        let (keys, values) = (&keys[..MR * D], &values[..MR * D]);
        let mut acc = [[sum[0]; V]; MR];
        for r in 0..MR {
            for v in 0..V {
                acc[r][v] = s.mul_f32s(s.splat_f32s(keys[r * D]), q[0][v]);
            }
        }
        for d in 1..D {
            for r in 0..MR {
                let x = s.splat_f32s(keys[r * D + d]);
                for v in 0..V {
                    acc[r][v] = s.mul_add_e_f32s(x, q[d][v], acc[r][v]);
                }
            }
        }
        for r in 0..MR {
            for v in 0..V {
                acc[r][v] = vector::exp2_above(s, acc[r][v]);
                sum[v] = s.add_f32s(sum[v], acc[r][v]);
            }
        }
        for r in 0..MR {
            for d in 0..D {
                let x = s.splat_f32s(values[r * D + d]);
                for v in 0..V {
                    o[d][v] = s.mul_add_e_f32s(x, acc[r][v], o[d][v]);
                }
            }
        }
    }
    let (queries, sum, out) = (vectors::<S>(queries), vectors_mut::<S>(sum), vectors_mut::<S>(out));
    for v in (0..NV).step_by(V) {
        let q = load::<S, D, V>(&queries[v..], NV);
        let mut o = load::<S, D, V>(&out[v..], NV);
        let mut total = row::<S, V>(&sum[v..]);
        let whole = keys.len() / (8 * D) * 8 * D;
        let groups = keys[..whole].chunks_exact(8 * D).zip(values[..whole].chunks_exact(8 * D));
        for (k, x) in groups {
            group::<S, D, V, 8>(s, k, x, &q, &mut o, &mut total);
        }
        for (k, x) in keys[whole..].chunks_exact(D).zip(values[whole..].chunks_exact(D)) {
            group::<S, D, V, 1>(s, k, x, &q, &mut o, &mut total);
        }
        store::<S, D, V>(&o, &mut out[v..], NV);
        sum[v..][..V].copy_from_slice(&total);
    }
}
