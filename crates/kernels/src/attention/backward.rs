//! The backward pass.
//!
//! It recomputes the weights from the logarithms of the denominators (Dao et al. 2022):
//!
//! ```text
//! for each block of keys:
//!     for each query tile:
//!         p[key][query]  = 2^(k[key] . q[query] - lse)                      in registers
//!         ds[key][query] = p (v[key] . do[query] - do . o)
//!         dq[d][query]  += sum over keys of ds k
//!         dk[key][d]    += sum over queries of ds q;    dv[key][d] += sum over queries of p do
//! ```
//!
//! `-lse` and `-do . o` are what the products begin with. The sums over queries run across the lanes: for a head
//! narrower than a vector every lane has its own sums `[key][d][lane]`, which are added when the block of keys is done;
//! for others they are products with rows of q and do, d across the lanes.

use super::product::{columns, in_rows, load, row, short_rows, store};
use super::ranges::Layout;
use super::{Attention, Splitter, pack_columns, pack_rows, vectors, vectors_mut};
use crate::random::Dropout;
use crate::tile::{self, Acc, TileShape, with_tile};
use crate::vector;
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Keys of a block, a multiple of the 4 that dropout draws at once.
pub(super) const KEY_BLOCK: usize = 32;

/// Vectors of queries in a tile.
const fn tile_vectors(lanes: usize) -> usize {
    if lanes == 1 { 8 } else { 4 }
}

/// What the backward pass of a picture reads: the operands, what the forward pass made of them, and the gradient.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// Queries, keys and values, `[tokens, 3 * channels]`.
    pub qkv: &'a [f32],
    /// The result, `[tokens, channels]`.
    pub o: &'a [f32],
    /// The logarithms of the denominators, `[tokens, heads]`.
    pub lse: &'a [f32],
    /// The result's gradient, `[tokens, channels]`.
    pub d_o: &'a [f32],
    /// The masks that the forward pass had.
    pub dropout: Option<Dropout>,
}

impl Attention {
    /// Whether a vector is longer than a head's numbers.
    fn narrow(&self) -> bool {
        self.width() < self.isa.lanes()
    }

    /// Queries of a backward tile.
    fn columns(&self) -> usize {
        tile_vectors(self.isa.lanes()) * self.isa.lanes()
    }

    /// Tokens in whole backward tiles.
    fn padded_tokens(&self) -> usize {
        self.tokens.next_multiple_of(self.columns())
    }

    /// Tile of the products with d across the lanes.
    fn wide_tile(&self) -> TileShape {
        TileShape::pick(self.isa.lanes(), self.width())
    }

    /// The width in whole tiles of these products.
    fn padded_width(&self) -> usize {
        self.width().next_multiple_of(self.wide_tile().nv * self.isa.lanes())
    }

    /// Numbers of a backward task's scratch memory.
    pub fn backward_scratch_len(&self) -> usize {
        Splitter::total(&self.backward_parts())
    }

    /// Numbers and lengths of the parts of the scratch memory: keys and values; q, do and dq with queries side by side;
    /// lse and delta; p, ds and masks; rows of q and do; sums of dk and dv.
    fn backward_parts(&self) -> [(usize, usize); 6] {
        let (width, lanes, padded) = (self.width(), self.isa.lanes(), self.padded_tokens());
        let (rows, sums) = match self.narrow() {
            true => (0, KEY_BLOCK * width * lanes),
            false => (self.tokens * self.padded_width(), KEY_BLOCK * width),
        };
        let block = KEY_BLOCK * self.columns();
        [(2, self.tokens * width), (3, padded * width), (2, padded), (3, block), (2, rows), (2, sums)]
    }

    #[inline(always)]
    pub(super) fn backward_picture<S: Simd>(
        &self,
        s: S,
        saved: &Saved<'_>,
        dqkv: &mut [f32],
        scratch: &mut [f32],
    ) {
        for head in 0..self.heads {
            let begin = [0, 1, 2].map(|part| self.part(part, head));
            let layout = Layout { begin, stride: 3 * self.channels };
            self.backward_head(s, saved, head, 0..self.tokens, layout, dqkv, scratch);
        }
    }

    #[inline(always)]
    pub(super) fn backward_partial<S: Simd>(
        &self,
        s: S,
        saved: &Saved<'_>,
        task: usize,
        ranges: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let keys = self.key_range(ranges, task % ranges);
        self.backward_head(s, saved, task / ranges, keys, self.partial_layout(ranges), out, scratch);
    }

    /// A head's `dq` as far as some keys make it, and these keys' `dk` and `dv`.
    #[inline(always)]
    fn backward_head<S: Simd>(
        &self,
        s: S,
        saved: &Saved<'_>,
        head: usize,
        keys: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        match S::F32_LANES {
            1 => self.backward_tiles::<S, 8>(s, saved, head, keys, layout, out, scratch),
            _ => self.backward_tiles::<S, 2>(s, saved, head, keys, layout, out, scratch),
        }
    }

    #[inline(always)]
    fn backward_tiles<S: Simd, const NV: usize>(
        &self,
        s: S,
        &Saved { qkv, o, lse, d_o, dropout }: &Saved<'_>,
        head: usize,
        range: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (width, tokens, stride, c) = (self.width(), self.tokens, 3 * self.channels, self.channels);
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let narrow = width < S::F32_LANES;
        let mut split = Splitter(scratch);
        let [tokens_len, columns_len, padded_len, block_len, rows_len, sums_len] =
            self.backward_parts().map(|(_, len)| len);
        let [keys, values] = split.take(tokens_len);
        let [q_columns, do_columns, dq] = split.take(columns_len);
        let [shift, delta] = split.take(padded_len);
        let [p, ds, mask] = split.take(block_len);
        let [q_rows, do_rows] = split.take(rows_len);
        let [dk, dv] = split.take(sums_len);
        pack_rows(width, qkv, stride, self.part(1, head), keys);
        pack_rows(width, qkv, stride, self.part(2, head), values);
        for first in (0..tokens).step_by(nr) {
            let count = nr.min(tokens - first);
            let range = first * width..(first + nr) * width;
            let (at, scale) = (self.part(0, head), self.scale() * LOG2_E);
            pack_columns(width, qkv, stride, at, first, count, scale, nr, &mut q_columns[range.clone()]);
            pack_columns(width, d_o, c, head * width, first, count, 1.0, nr, &mut do_columns[range]);
        }
        if !narrow {
            let pack = |x: &[f32], stride: usize, at: usize, out: &mut [f32]| {
                for (row, out) in x.chunks_exact(stride).zip(out.chunks_exact_mut(self.padded_width())) {
                    out[..width].copy_from_slice(&row[at..][..width]);
                    out[width..].fill(0.0);
                }
            };
            pack(qkv, stride, self.part(0, head), q_rows);
            pack(d_o, c, head * width, do_rows);
        }
        // A query behind the last one has zero queries and gradients, so whatever p is, it adds nothing.
        shift.fill(0.0);
        delta.fill(0.0);
        for token in 0..tokens {
            let at = token * c + head * width;
            shift[token] = -lse[token * self.heads + head] * LOG2_E;
            let dot = |(d_o, o): (&f32, &f32)| d_o * o;
            delta[token] = -d_o[at..][..width].iter().zip(&o[at..][..width]).map(dot).sum::<f32>();
        }
        dq.fill(0.0);
        for key in range.clone().step_by(KEY_BLOCK) {
            let block = KEY_BLOCK.min(range.end - key);
            let (keys, values) = (&keys[key * width..], &values[key * width..]);
            dk.fill(0.0);
            dv.fill(0.0);
            for first in (0..tokens).step_by(nr) {
                let count = nr.min(tokens - first);
                // The vectors of the tile that hold queries.
                let used = count.div_ceil(NV * S::F32_LANES) * NV;
                let range = first * width..(first + nr) * width;
                let (q, d_o) = (&q_columns[range.clone()], &do_columns[range.clone()]);
                let (shift, delta) = (&shift[first..][..nr], &delta[first..][..nr]);
                let masks = dropout.map(|masks| {
                    mask.fill(1.0);
                    masks.apply_weights(head, tokens, key, first, nr, &mut mask[..block * nr]);
                    &*mask
                });
                weights_and_gradients::<S, NV>(
                    s, width, block, used, keys, values, q, d_o, shift, delta, masks, p, ds,
                );
                add_keys::<S, NV>(s, width, block, used, keys, ds, &mut dq[range]);
                if narrow {
                    add_lanes(s, width, block, used, ds, q, dk);
                    add_lanes(s, width, block, used, p, d_o, dv);
                } else {
                    let columns = self.padded_width();
                    let (q, d_o) = (&q_rows[first * columns..], &do_rows[first * columns..]);
                    let tile = self.wide_tile();
                    with_tile!(tile, add_rows::<S>(s, width, count, block, ds, nr, q, columns, dk));
                    with_tile!(tile, add_rows::<S>(s, width, count, block, p, nr, d_o, columns, dv));
                }
            }
            // In the columns q is times log2(e) / sqrt(width); in the rows it is not.
            let scale = if narrow { LN_2 } else { self.scale() };
            for k in 0..block {
                for (part, sums, scale) in [(1, &*dk, scale), (2, &*dv, 1.0)] {
                    let at = layout.begin[part] + (key - range.start + k) * layout.stride;
                    let to = &mut out[at..][..width];
                    if narrow {
                        let sums = &vectors::<S>(sums)[k * width..][..width];
                        for (v, sum) in to.iter_mut().zip(sums) {
                            *v = s.reduce_sum_f32s(*sum) * scale;
                        }
                    } else {
                        for (v, sum) in to.iter_mut().zip(&sums[k * width..]) {
                            *v = sum * scale;
                        }
                    }
                }
            }
        }
        for (tile, dq) in dq.chunks_exact(nr * width).enumerate() {
            for q in 0..nr.min(tokens - tile * nr) {
                let row = &mut out[layout.begin[0] + (tile * nr + q) * layout.stride..][..width];
                for (d, v) in row.iter_mut().enumerate() {
                    *v = dq[d * nr + q] * self.scale();
                }
            }
        }
    }
}

/// `p = 2^(k . q + shift)` and `ds = p (v . do + delta)` of a block of keys, `[keys][queries]`. With dropout's factors
/// D in `masks`, `p` becomes `p D`, and `v . do` is multiplied with D.
#[inline(always)]
fn weights_and_gradients<S: Simd, const NV: usize>(
    s: S,
    width: usize,
    block: usize,
    used: usize,
    keys: &[f32],
    values: &[f32],
    q: &[f32],
    d_o: &[f32],
    shift: &[f32],
    delta: &[f32],
    masks: Option<&[f32]>,
    p: &mut [f32],
    ds: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, const MR: usize, const NV: usize>(
        s: S,
        width: usize,
        columns: usize,
        [keys, values]: [&[f32]; 2],
        [q, d_o, shift, delta]: [&[S::f32s]; 4],
        masks: Option<&[S::f32s]>,
        p: &mut [S::f32s],
        ds: &mut [S::f32s],
    ) {
        let mut score = [row::<S, NV>(shift); MR];
        tile::rows_strided(s, keys, width, q, columns, &mut score);
        let delta = row::<S, NV>(delta);
        let Some(masks) = masks else {
            let mut gradient = [delta; MR];
            tile::rows_strided(s, values, width, d_o, columns, &mut gradient);
            for r in 0..MR {
                for v in 0..NV {
                    score[r][v] = vector::exp2(s, score[r][v]);
                    gradient[r][v] = s.mul_f32s(score[r][v], gradient[r][v]);
                }
            }
            store::<S, MR, NV>(&score, p, columns);
            store::<S, MR, NV>(&gradient, ds, columns);
            return;
        };
        let mut gradient = tile::zero::<S, MR, NV>(s);
        tile::rows_strided(s, values, width, d_o, columns, &mut gradient);
        for r in 0..MR {
            let mask = row::<S, NV>(&masks[r * columns..]);
            for v in 0..NV {
                let weight = vector::exp2(s, score[r][v]);
                gradient[r][v] = s.mul_f32s(weight, s.mul_add_e_f32s(gradient[r][v], mask[v], delta[v]));
                score[r][v] = s.mul_f32s(weight, mask[v]);
            }
        }
        store::<S, MR, NV>(&score, p, columns);
        store::<S, MR, NV>(&gradient, ds, columns);
    }
    // Of a short row all operands stay in registers, for p and then for ds; for both at once there are not enough.
    #[inline(always)]
    fn short_p<S: Simd, const MR: usize, const D: usize>(
        s: S,
        keys: &[f32],
        q: &Acc<S, D, 1>,
        shift: S::f32s,
        p: &mut [S::f32s],
    ) {
        let mut score = [[shift]; MR];
        short_rows(s, keys, q, &mut score);
        for r in 0..MR {
            score[r][0] = vector::exp2(s, score[r][0]);
        }
        store::<S, MR, 1>(&score, p, tile_vectors(S::F32_LANES));
    }
    #[inline(always)]
    fn short_ds<S: Simd, const MR: usize, const D: usize>(
        s: S,
        values: &[f32],
        d_o: &Acc<S, D, 1>,
        delta: S::f32s,
        p: &[S::f32s],
        ds: &mut [S::f32s],
    ) {
        let columns = tile_vectors(S::F32_LANES);
        let (mut gradient, p) = ([[delta]; MR], load::<S, MR, 1>(p, columns));
        short_rows(s, values, d_o, &mut gradient);
        for r in 0..MR {
            gradient[r][0] = s.mul_f32s(p[r][0], gradient[r][0]);
        }
        store::<S, MR, 1>(&gradient, ds, columns);
    }
    #[inline(always)]
    fn all_short<S: Simd, const D: usize>(
        s: S,
        block: usize,
        used: usize,
        [keys, values]: [&[f32]; 2],
        [q, d_o, shift, delta]: [&[S::f32s]; 4],
        p: &mut [S::f32s],
        ds: &mut [S::f32s],
    ) {
        let columns = tile_vectors(S::F32_LANES);
        for v in 0..used {
            let q = load::<S, D, 1>(&q[v..], columns);
            let keys = |i: usize| &keys[i * D..];
            let at = |i: usize| i * columns + v;
            in_rows!(S, [D], block, most_rows::<S>(), short_p(i, s, keys(i), &q, shift[v], &mut p[at(i)..]));
            let d_o = load::<S, D, 1>(&d_o[v..], columns);
            in_rows!(
                S,
                [D],
                block,
                most_rows::<S>(),
                short_ds(i, s, &values[i * D..], &d_o, delta[v], &p[at(i)..], &mut ds[at(i)..])
            );
        }
    }
    let [q, d_o, shift, delta] = [q, d_o, shift, delta].map(|x| vectors::<S>(x));
    let masks = masks.map(|x| vectors::<S>(x));
    let (p, ds) = (vectors_mut::<S>(p), vectors_mut::<S>(ds));
    let columns = tile_vectors(S::F32_LANES);
    match (width, masks) {
        (4, None) => return all_short::<S, 4>(s, block, used, [keys, values], [q, d_o, shift, delta], p, ds),
        (8, None) => return all_short::<S, 8>(s, block, used, [keys, values], [q, d_o, shift, delta], p, ds),
        _ => {}
    }
    for v in (0..used).step_by(NV) {
        in_rows!(
            S,
            [NV],
            block,
            most_rows::<S>() / 2,
            rows(
                i,
                s,
                width,
                columns,
                [&keys[i * width..], &values[i * width..]],
                [&q[v..], &d_o[v..], &shift[v..], &delta[v..]],
                masks.map(|m| &m[i * columns + v..]),
                &mut p[i * columns + v..],
                &mut ds[i * columns + v..],
            )
        );
    }
}

/// `dq[d][query] += sum over a block of keys of keys[key][d] ds[key][query]`.
#[inline(always)]
fn add_keys<S: Simd, const NV: usize>(
    s: S,
    width: usize,
    block: usize,
    used: usize,
    keys: &[f32],
    ds: &[f32],
    dq: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, const MR: usize, const NV: usize>(
        s: S,
        width: usize,
        block: usize,
        keys: &[f32],
        ds: &[S::f32s],
        columns_of: usize,
        dq: &mut [S::f32s],
    ) {
        let mut acc = load::<S, MR, NV>(dq, columns_of);
        columns(s, keys, width, ds, columns_of, block, &mut acc);
        store::<S, MR, NV>(&acc, dq, columns_of);
    }
    let (ds, dq) = (vectors::<S>(ds), vectors_mut::<S>(dq));
    let stride = tile_vectors(S::F32_LANES);
    for v in (0..used).step_by(NV) {
        in_rows!(
            S,
            [NV],
            width,
            most_rows::<S>(),
            rows(i, s, width, block, &keys[i..], &ds[v..], stride, &mut dq[i * stride + v..])
        );
    }
}

/// `sums[key][d][lane] += sum over the tile's vectors of weights[key] columns[d]`.
#[inline(always)]
fn add_lanes<S: Simd>(
    s: S,
    width: usize,
    block: usize,
    used: usize,
    weights: &[f32],
    columns: &[f32],
    sums: &mut [f32],
) {
    #[inline(always)]
    fn tile<S: Simd, const K: usize, const D: usize>(
        s: S,
        width: usize,
        stride: usize,
        used: usize,
        weights: &[S::f32s],
        columns: &[S::f32s],
        sums: &mut [S::f32s],
    ) {
        let mut acc = load::<S, K, D>(sums, width);
        let (mut w, mut c) = ([weights; K], [columns; D]);
        for k in 0..K {
            w[k] = &weights[k * stride..][..used];
        }
        for d in 0..D {
            c[d] = &columns[d * stride..][..used];
        }
        for v in 0..used {
            for k in 0..K {
                for d in 0..D {
                    acc[k][d] = s.mul_add_e_f32s(w[k][v], c[d][v], acc[k][d]);
                }
            }
        }
        store::<S, K, D>(&acc, sums, width);
    }
    let (weights, columns, sums) = (vectors::<S>(weights), vectors::<S>(columns), vectors_mut::<S>(sums));
    let stride = tile_vectors(S::F32_LANES);
    let mut d = 0;
    while d + 4 <= width {
        in_rows!(
            S,
            [4],
            block,
            4,
            tile(
                k,
                s,
                width,
                stride,
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
            [1],
            block,
            4,
            tile(
                k,
                s,
                width,
                stride,
                used,
                &weights[k * stride..],
                &columns[d * stride..],
                &mut sums[k * width + d..]
            )
        );
        d += 1;
    }
}

/// `out[key][d] += sum over count queries of weights[key][query] rows[query][d]`; `out` is `[keys, width]`.
#[inline(always)]
fn add_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    width: usize,
    count: usize,
    block: usize,
    weights: &[f32],
    stride: usize,
    rows: &[f32],
    columns: usize,
    out: &mut [f32],
) {
    #[inline(always)]
    fn tile<S: Simd, const MR: usize, const NV: usize>(
        s: S,
        width: usize,
        count: usize,
        weights: &[f32],
        stride: usize,
        rows: &[S::f32s],
        columns: usize,
        at: Range<usize>,
        out: &mut [f32],
    ) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        let mut a = [weights; MR];
        for r in 0..MR {
            a[r] = &weights[r * stride..][..count];
        }
        for (q, b) in rows.chunks(columns).take(count).enumerate() {
            let b = row::<S, NV>(b);
            for r in 0..MR {
                let x = s.splat_f32s(a[r][q]);
                for v in 0..NV {
                    acc[r][v] = s.mul_add_e_f32s(x, b[v], acc[r][v]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            tile::store_row(s, acc, &mut out[r * width..][at.clone()], true);
        }
    }
    let (rows, vectors) = (vectors::<S>(rows), columns / S::F32_LANES);
    for v in (0..vectors).step_by(NV) {
        let at = v * S::F32_LANES..width.min((v + NV) * S::F32_LANES);
        let mut k = 0;
        while k + MR <= block {
            tile::<S, MR, NV>(
                s,
                width,
                count,
                &weights[k * stride..],
                stride,
                &rows[v..],
                vectors,
                at.clone(),
                &mut out[k * width..],
            );
            k += MR;
        }
        while k < block {
            tile::<S, 1, NV>(
                s,
                width,
                count,
                &weights[k * stride..],
                stride,
                &rows[v..],
                vectors,
                at.clone(),
                &mut out[k * width..],
            );
            k += 1;
        }
    }
}

/// Rows of a tile that fills the registers.
#[inline(always)]
fn most_rows<S: Simd>() -> usize {
    match S::F32_LANES {
        16 | 4 => 8,
        _ => 4,
    }
}
