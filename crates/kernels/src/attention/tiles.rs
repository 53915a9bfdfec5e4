//! The products of a query tile and a block of keys in the backward pass.

use super::backward::tile_vectors;
use super::operands::{
    PANEL, Part, Strided, columns, exp2_clamped, in_rows, load, max_tile_rows, panel_at, panel_columns, row,
    short_rows, store,
};
use super::{vectors, vectors_mut};
use crate::tile::{self, Acc, PackLanes};
use pulp::Simd;
use std::ops::Range;

/// Operands of the weights of a block of keys and a tile of queries.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// Words of the width.
    pub words: usize,
    /// Keys of the block, and vectors of the tile that hold queries.
    pub block: usize,
    pub used: usize,
    /// Panels of keys and of values.
    pub keys: &'a [f32],
    pub values: &'a [f32],
    /// Columns of queries and of output gradients.
    pub q: &'a [f32],
    pub d_o: &'a [f32],
    /// What the accumulators of the scores and of the weight gradients start from, for each query.
    pub shift: &'a [f32],
    pub delta: &'a [f32],
    /// Dropout mask, `[keys][queries]`.
    pub masks: Option<&'a [f32]>,
}

/// The same with vectors of queries.
#[derive(Clone, Copy)]
struct Vectors<'a, S: Simd> {
    keys: &'a [f32],
    values: &'a [f32],
    q: &'a [S::f32s],
    d_o: &'a [S::f32s],
    shift: &'a [S::f32s],
    delta: &'a [S::f32s],
    masks: Option<&'a [S::f32s]>,
}

/// `p = 2^(k . q + shift)` and `ds = p (v . do + delta)` for a block of keys, `[keys][queries]`. With a
/// dropout mask D in `masks`, `p` becomes `p D`, and `v . do` is multiplied by D.
#[inline(always)]
pub(super) fn weights_and_gradients<S: Simd, P: PackLanes, const NV: usize>(
    s: S,
    dot: P,
    Operands { words, block, used, keys, values, q, d_o, shift, delta, masks }: Operands<'_>,
    p: &mut [f32],
    ds: &mut [f32],
    ds_words: &mut [f32],
) {
    let operands = Vectors::<S> {
        keys,
        values,
        q: vectors::<S>(q),
        d_o: vectors::<S>(d_o),
        shift: vectors::<S>(shift),
        delta: vectors::<S>(delta),
        masks: masks.map(|x| vectors::<S>(x)),
    };
    let (p, ds, ds_words) = (vectors_mut::<S>(p), vectors_mut::<S>(ds), vectors_mut::<S>(ds_words));
    if P::ELEMS_PER_WORD == 1 {
        match (words, masks) {
            (4, None) => return all_short::<S, P, 4>(s, dot, block, used, operands, p, ds),
            (8, None) => return all_short::<S, P, 8>(s, dot, block, used, operands, p, ds),
            _ => {}
        }
    }
    let stride = tile_vectors(S::F32_LANES);
    for v in (0..used).step_by(NV) {
        let of_rows = |i: usize| Vectors {
            keys: &keys[i / PANEL * PANEL * words..],
            values: &values[i / PANEL * PANEL * words..],
            masks: operands.masks.map(|m| &m[i * stride + v..]),
            ..operands
        };
        in_rows!(
            S,
            P,
            [NV],
            block,
            max_tile_rows::<S>() / 2,
            tile_of_keys(
                i,
                s,
                dot,
                of_rows(i),
                Part { words, row: i % PANEL, v },
                &mut p[(i * stride + v) / P::ELEMS_PER_WORD..],
                &mut ds[(i * stride + v) / P::ELEMS_PER_WORD..],
                if P::ELEMS_PER_WORD == 1 { &mut [] } else { &mut ds_words[i / 2 * stride + v..] },
            )
        );
    }
}

/// `MR` keys and `NV` vectors of queries.
#[inline(always)]
fn tile_of_keys<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
    s: S,
    dot: P,
    Vectors { keys, values, q, d_o, shift, delta, masks }: Vectors<'_, S>,
    part: Part,
    p: &mut [S::f32s],
    ds: &mut [S::f32s],
    ds_words: &mut [S::f32s],
) {
    let stride = tile_vectors(S::F32_LANES);
    let (q, d_o) = (Strided { x: q, stride }, Strided { x: d_o, stride });
    let mut score = [row::<S, NV>(&shift[part.v..]); MR];
    panel_columns(s, dot, keys, q, part, &mut score);
    let delta = row::<S, NV>(&delta[part.v..]);
    let Some(masks) = masks else {
        let mut gradient = [delta; MR];
        panel_columns(s, dot, values, d_o, part, &mut gradient);
        for r in 0..MR {
            for v in 0..NV {
                score[r][v] = exp2_clamped::<S, P>(s, score[r][v]);
                gradient[r][v] = s.mul_f32s(score[r][v], gradient[r][v]);
            }
        }
        store_tiles::<S, P, MR, NV>(s, dot, &score, &gradient, p, ds, ds_words);
        return;
    };
    let mut gradient = tile::zero::<S, MR, NV>(s);
    panel_columns(s, dot, values, d_o, part, &mut gradient);
    for r in 0..MR {
        let mask = row::<S, NV>(&masks[r * stride..]);
        for v in 0..NV {
            let weight = exp2_clamped::<S, P>(s, score[r][v]);
            gradient[r][v] = s.mul_f32s(weight, s.mul_add_e_f32s(gradient[r][v], mask[v], delta[v]));
            score[r][v] = s.mul_f32s(weight, mask[v]);
        }
    }
    store_tiles::<S, P, MR, NV>(s, dot, &score, &gradient, p, ds, ds_words);
}

/// All keys of the block for rows of `W` words, of which all operands stay in registers, for p and then for ds;
/// there are not enough for both at once.
#[inline(always)]
fn all_short<S: Simd, P: PackLanes, const W: usize>(
    s: S,
    dot: P,
    block: usize,
    used: usize,
    Vectors { keys, values, q, d_o, shift, delta, .. }: Vectors<'_, S>,
    p: &mut [S::f32s],
    ds: &mut [S::f32s],
) {
    let columns = tile_vectors(S::F32_LANES);
    for v in 0..used {
        let at = |i: usize| i * columns + v;
        let q = load::<S, W, 1>(&q[v..], columns);
        in_rows!(
            S,
            P,
            [W],
            block,
            max_tile_rows::<S>(),
            short_p(i, s, dot, &keys[panel_at(i, W)..], &q, shift[v], &mut p[at(i)..])
        );
        let d_o = load::<S, W, 1>(&d_o[v..], columns);
        in_rows!(
            S,
            P,
            [W],
            block,
            max_tile_rows::<S>(),
            short_ds(i, s, dot, &values[panel_at(i, W)..], &d_o, delta[v], &p[at(i)..], &mut ds[at(i)..])
        );
    }
}

#[inline(always)]
fn short_p<S: Simd, P: PackLanes, const MR: usize, const W: usize>(
    s: S,
    dot: P,
    keys: &[f32],
    q: &Acc<S, W, 1>,
    shift: S::f32s,
    p: &mut [S::f32s],
) {
    let mut score = [[shift]; MR];
    short_rows(s, dot, keys, q, &mut score);
    for r in 0..MR {
        score[r][0] = exp2_clamped::<S, P>(s, score[r][0]);
    }
    store::<S, MR, 1>(&score, p, tile_vectors(S::F32_LANES));
}

#[inline(always)]
fn short_ds<S: Simd, P: PackLanes, const MR: usize, const W: usize>(
    s: S,
    dot: P,
    values: &[f32],
    d_o: &Acc<S, W, 1>,
    delta: S::f32s,
    p: &[S::f32s],
    ds: &mut [S::f32s],
) {
    let columns = tile_vectors(S::F32_LANES);
    let (mut gradient, p) = ([[delta]; MR], load::<S, MR, 1>(p, columns));
    short_rows(s, dot, values, d_o, &mut gradient);
    for r in 0..MR {
        gradient[r][0] = s.mul_f32s(p[r][0], gradient[r][0]);
    }
    store::<S, MR, 1>(&gradient, ds, columns);
}

/// Stores p and ds, if words have one element; else packs both in pairs of neighbouring queries, and ds also
/// in pairs of neighbouring keys.
#[inline(always)]
fn store_tiles<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
    s: S,
    dot: P,
    weights: &Acc<S, MR, NV>,
    gradients: &Acc<S, MR, NV>,
    p: &mut [S::f32s],
    ds: &mut [S::f32s],
    ds_words: &mut [S::f32s],
) {
    let stride = tile_vectors(S::F32_LANES);
    if P::ELEMS_PER_WORD == 1 {
        store::<S, MR, NV>(weights, p, stride);
        store::<S, MR, NV>(gradients, ds, stride);
        return;
    }
    let (p, ds) = (&mut p[..(MR - 1) * stride / 2 + NV / 2], &mut ds[..(MR - 1) * stride / 2 + NV / 2]);
    for r in 0..MR {
        for v in 0..NV / 2 {
            p[r * stride / 2 + v] = dot.pair_vectors(s, weights[r][2 * v], weights[r][2 * v + 1]);
            ds[r * stride / 2 + v] = dot.pair_vectors(s, gradients[r][2 * v], gradients[r][2 * v + 1]);
        }
    }
    let ds_words = &mut ds_words[..(MR - 1) / 2 * stride + NV];
    for r in (0..MR).step_by(2) {
        for v in 0..NV {
            let odd = if r + 1 < MR { gradients[r + 1][v] } else { s.splat_f32s(0.0) };
            ds_words[r / 2 * stride + v] = dot.pair(s, gradients[r][v], odd);
        }
    }
}

/// A block of keys and a tile of queries.
#[derive(Clone, Copy)]
pub(super) struct BlockShape {
    pub width: usize,
    /// Keys of the block.
    pub block: usize,
    /// Vectors of the tile that hold queries.
    pub used: usize,
}

/// `dq[d][query] += sum over a block of keys of keys[key][d] ds[key][query]`.
#[inline(always)]
pub(super) fn add_keys<S: Simd, P: PackLanes, const NV: usize>(
    s: S,
    dot: P,
    BlockShape { width, block, used }: BlockShape,
    keys: &[f32],
    ds: &[f32],
    dq: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
        s: S,
        dot: P,
        width: usize,
        block: usize,
        keys: &[f32],
        ds: &[S::f32s],
        dq: &mut [S::f32s],
    ) {
        let stride = tile_vectors(S::F32_LANES);
        let mut acc = load::<S, MR, NV>(dq, stride);
        columns(s, dot, Strided { x: keys, stride: width }, Strided { x: ds, stride }, block, &mut acc);
        store::<S, MR, NV>(&acc, dq, stride);
    }
    let stride = tile_vectors(S::F32_LANES);
    let (ds, dq) = (vectors::<S>(ds), vectors_mut::<S>(dq));
    let block = block.div_ceil(P::ELEMS_PER_WORD);
    for v in (0..used).step_by(NV) {
        in_rows!(
            S,
            P,
            [NV],
            width,
            max_tile_rows::<S>(),
            rows(i, s, dot, width, block, &keys[i..], &ds[v..], &mut dq[i * stride + v..])
        );
    }
}

/// `sums[key][d][lane] += sum over the tile's vectors of weights[key] columns[d]`.
#[inline(always)]
pub(super) fn add_lanes<S: Simd, P: PackLanes>(
    s: S,
    dot: P,
    BlockShape { width, block, used }: BlockShape,
    weights: &[f32],
    columns: &[f32],
    sums: &mut [f32],
) {
    #[inline(always)]
    fn tile<S: Simd, P: PackLanes, const K: usize, const D: usize>(
        s: S,
        dot: P,
        width: usize,
        used: usize,
        weights: &[S::f32s],
        columns: &[S::f32s],
        sums: &mut [S::f32s],
    ) {
        let stride = (tile_vectors(S::F32_LANES) / P::ELEMS_PER_WORD).max(1);
        let mut acc = load::<S, K, D>(sums, width);
        let (weights, columns) = (&weights[..K * stride], &columns[..D * stride]);
        for v in 0..used.min(stride) {
            let mut c = [weights[0]; D];
            for d in 0..D {
                c[d] = columns[d * stride + v];
            }
            for k in 0..K {
                dot.multiply_vectors(s, weights[k * stride + v], c, &mut acc[k]);
            }
        }
        store::<S, K, D>(&acc, sums, width);
    }
    let (weights, columns, sums) = (vectors::<S>(weights), vectors::<S>(columns), vectors_mut::<S>(sums));
    let stride = (tile_vectors(S::F32_LANES) / P::ELEMS_PER_WORD).max(1);
    let mut d = 0;
    while d + 4 <= width {
        in_rows!(
            S,
            P,
            [4],
            block,
            4,
            tile(
                k,
                s,
                dot,
                width,
                used,
                &weights[k * stride..],
                &columns[d * stride..],
                &mut sums[k * width + d..]
            )
        );
        d += 4;
    }
    while d < width {
        in_rows!(
            S,
            P,
            [1],
            block,
            4,
            tile(
                k,
                s,
                dot,
                width,
                used,
                &weights[k * stride..],
                &columns[d * stride..],
                &mut sums[k * width + d..]
            )
        );
        d += 1;
    }
}

/// A block of keys and rows of queries.
#[derive(Clone, Copy)]
pub(super) struct RowShape {
    pub width: usize,
    /// Keys of the block.
    pub block: usize,
    /// Words of queries.
    pub count: usize,
    /// Length of a row, a multiple of the tile.
    pub columns: usize,
}

/// `out[key][d] += sum over count words of queries of weights[key][query] rows[query][d]`; `out` is
/// `[keys, width]`.
#[inline(always)]
pub(super) fn add_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl PackLanes,
    shape: RowShape,
    weights: &[f32],
    rows: &[f32],
    out: &mut [f32],
) {
    #[inline(always)]
    fn tile<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
        s: S,
        dot: P,
        RowShape { width, count, columns, .. }: RowShape,
        weights: &[f32],
        rows: &[S::f32s],
        at: Range<usize>,
        out: &mut [f32],
    ) {
        // Constants, so that all rows are addressed from one register and checked at once.
        let stride = tile_vectors(S::F32_LANES) * S::F32_LANES / P::ELEMS_PER_WORD;
        let weights = &weights[..MR * stride];
        let mut acc = tile::zero::<S, MR, NV>(s);
        for (q, b) in rows.chunks(columns / S::F32_LANES).take(count.min(stride)).enumerate() {
            let b = row::<S, NV>(b);
            for r in 0..MR {
                dot.multiply(s, weights[r * stride + q], b, &mut acc[r]);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            tile::store_row(s, acc, &mut out[r * width..][at.clone()], true);
        }
    }
    let RowShape { width, block, columns, .. } = shape;
    let rows = vectors::<S>(rows);
    let stride = weights.len() / block;
    for v in (0..columns / S::F32_LANES).step_by(NV) {
        let at = v * S::F32_LANES..width.min((v + NV) * S::F32_LANES);
        let mut k = 0;
        while k + MR <= block {
            let (weights, out) = (&weights[k * stride..], &mut out[k * width..]);
            tile::<S, _, MR, NV>(s, dot, shape, weights, &rows[v..], at.clone(), out);
            k += MR;
        }
        while k < block {
            let (weights, out) = (&weights[k * stride..], &mut out[k * width..]);
            tile::<S, _, 1, NV>(s, dot, shape, weights, &rows[v..], at.clone(), out);
            k += 1;
        }
    }
}
