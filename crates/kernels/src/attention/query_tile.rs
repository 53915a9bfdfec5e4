//! The products of a query tile and keys in the forward pass.

use super::operands::{
    PANEL, Part, Strided, columns, exp2_bounded, exp2_clamped, in_rows, load, max_tile_rows, pair_rows,
    panel_columns, row, short_rows, store,
};
use super::{vectors, vectors_mut};
use crate::tile::{self, PackLanes};
use crate::vector;
use pulp::Simd;

/// Maximum score bound, to base 2, of a query that needs no maximum: its exponentials are in 2^-60 .. 2^60,
/// and a sum of 2^20 of them times a value of 2^40 does not overflow.
pub(super) const MAX_SAFE_SCORE: f32 = 60.0;

/// Packed operands of a query tile: `words` for each key and query; all keys and values, or those from the first of
/// a block on.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    pub words: usize,
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub queries: &'a [f32],
}

/// Bounds of the scores of each query of a tile, and their running maxima.
pub(super) struct Maxima<'a> {
    pub bound: &'a [f32],
    pub max: &'a mut [f32],
}

/// `weights[key][query] = 2^(k . q)`, and the sums over keys.
#[inline(always)]
pub(super) fn bounded_weights<S: Simd, P: PackLanes, const NV: usize>(
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
        queries: &[S::f32s],
        weights: &mut [S::f32s],
        sum: &mut [S::f32s; NV],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        panel_columns(s, dot, keys, Strided { x: queries, stride: NV }, part, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                acc[r][v] = exp2_bounded::<S, P>(s, acc[r][v]);
                sum[v] = s.add_f32s(sum[v], acc[r][v]);
            }
        }
        store::<S, MR, NV>(&acc, weights, NV);
    }
    let (queries, weights, sum) = (vectors::<S>(queries), vectors_mut::<S>(weights), vectors_mut::<S>(sum));
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
pub(super) fn online_weights<S: Simd, P: PackLanes, const NV: usize>(
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
        queries: &[S::f32s],
        scores: &mut [S::f32s],
        max: &mut [S::f32s; NV],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        panel_columns(s, dot, keys, Strided { x: queries, stride: NV }, part, &mut acc);
        for r in 0..MR {
            for v in 0..NV {
                max[v] = s.max_f32s(max[v], acc[r][v]);
            }
        }
        store::<S, MR, NV>(&acc, scores, NV);
    }
    let (queries, weights, out) = (vectors::<S>(queries), vectors_mut::<S>(weights), vectors_mut::<S>(out));
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
pub(super) fn add_values<S: Simd, P: PackLanes, const NV: usize>(
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
pub(super) fn fused<
    S: Simd,
    P: PackLanes,
    const W: usize,
    const D: usize,
    const NV: usize,
    const V: usize,
>(
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
