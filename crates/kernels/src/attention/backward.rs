//! The backward pass.
//!
//! It recomputes the weights from the logarithms of the denominators (Dao et al. 2022):
//!
//! ```text
//! for each chunk of queries:                    as many as the second-level cache holds
//!     for each block of keys:
//!         for each query tile of the chunk:
//!             p[key][query]  = 2^(k[key] . q[query] - lse)                      in registers
//!             ds[key][query] = p (v[key] . do[query] - do . o)
//!             dq[d][query]  += sum over keys of ds k
//!             dk[key][d]    += sum over queries of ds q;    dv[key][d] += sum over queries of p do
//! ```
//!
//! `-lse` and `-do . o` are what the products begin with. The sums over queries run across the lanes: for a head
//! narrower than a vector every lane has its own sums `[key][d][lane]`, which are added when the block of keys is done;
//! for others they are products with rows of q and do, d across the lanes. With words of two numbers p and ds are paired
//! both ways: neighbouring keys for dq, neighbouring queries for dk and dv.

use super::product::{PANEL, columns, in_rows, load, pair_lanes, pair_rows, power, row, short_rows, store};
use super::ranges::Layout;
use super::{Attention, NEAR, Rows, Splitter, vectors, vectors_mut};
use crate::bf16::Words;
use crate::random::Dropout;
use crate::tile::{self, Acc, Product, Single, TileShape, with_tile};
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Numbers of what belongs to a chunk of queries: less than half of a second-level cache.
const CHUNK: usize = 96 << 10;

/// Keys of a block, a multiple of the 8 that dropout draws at once.
pub(super) const KEY_BLOCK: usize = 32;

/// Most numbers that a tile of queries of a narrow head has.
const MOST_NARROW: usize = 64 * 15;

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

    /// Queries of a chunk, in whole tiles.
    fn chunk(&self) -> usize {
        let most = CHUNK / (3 * self.width() + 2 * self.row_width());
        let chunks = self.tokens.div_ceil(most.max(self.columns()));
        self.tokens.div_ceil(chunks).next_multiple_of(self.columns())
    }

    /// Tile of the products with d across the lanes.
    fn wide_tile(&self) -> TileShape {
        TileShape::pick(self.isa.lanes(), self.width())
    }

    /// Numbers of a row of q or do: the width in whole tiles of these products. (For narrow heads, of what a query has in
    /// columns of words of neighbouring queries.)
    fn row_width(&self) -> usize {
        match self.narrow() {
            true => self.width(),
            false => self.width().next_multiple_of(self.wide_tile().nv * self.isa.lanes()),
        }
    }

    /// Numbers of a backward task's scratch memory.
    pub fn backward_scratch_len(&self) -> usize {
        Splitter::total(&self.backward_parts())
    }

    /// Numbers and lengths of the parts of the scratch memory: panels of keys and values, and rows of keys; q, do and dq with
    /// queries side by side; rows of q and do; lse and delta; p, ds and masks, and words of them; sums of dk and dv.
    fn backward_parts(&self) -> [(usize, usize); 7] {
        let (width, lanes, chunk) = (self.width(), self.isa.lanes(), self.chunk());
        let block = KEY_BLOCK * self.columns();
        let words = if self.words == Words::Pairs { block / 2 } else { 0 };
        let rows = if self.narrow() && words == 0 { 0 } else { chunk * self.row_width() };
        let sums = KEY_BLOCK * width * if self.narrow() { lanes } else { 1 };
        [
            (3, self.tokens.next_multiple_of(PANEL) * width),
            (3, chunk * width),
            (2, rows),
            (2, chunk),
            (3, block),
            (3, words),
            (2, sums),
        ]
    }

    #[inline(always)]
    pub(super) fn backward_picture<S: Simd>(
        &self,
        s: S,
        product: impl Product,
        saved: &Saved<'_>,
        dqkv: &mut [f32],
        scratch: &mut [f32],
    ) {
        for head in 0..self.heads {
            let begin = [0, 1, 2].map(|part| self.part(part, head));
            let layout = Layout { begin, stride: 3 * self.channels };
            self.backward_head(s, product, saved, head, 0..self.tokens, layout, dqkv, scratch);
        }
    }

    #[inline(always)]
    pub(super) fn backward_partial<S: Simd>(
        &self,
        s: S,
        product: impl Product,
        saved: &Saved<'_>,
        task: usize,
        ranges: usize,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let keys = self.key_range(ranges, task % ranges);
        self.backward_head(s, product, saved, task / ranges, keys, self.partial_layout(ranges), out, scratch);
    }

    /// A head's `dq` as far as some keys make it, and these keys' `dk` and `dv`.
    #[inline(always)]
    fn backward_head<S: Simd, P: Product>(
        &self,
        s: S,
        product: P,
        saved: &Saved<'_>,
        head: usize,
        keys: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        match S::F32_LANES {
            1 => self.backward_tiles::<S, P, 8>(s, product, saved, head, keys, layout, out, scratch),
            _ => self.backward_tiles::<S, P, 2>(s, product, saved, head, keys, layout, out, scratch),
        }
    }

    #[inline(always)]
    fn backward_tiles<S: Simd, P: Product, const NV: usize>(
        &self,
        s: S,
        product: P,
        &Saved { qkv, o, lse, d_o, dropout }: &Saved<'_>,
        head: usize,
        range: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (width, tokens, c) = (self.width(), self.tokens, self.channels);
        let nr = tile_vectors(S::F32_LANES) * S::F32_LANES;
        let (words, narrow) = (width.div_ceil(P::PER_WORD), width < S::F32_LANES);
        let mut split = Splitter(scratch);
        let [tokens_len, columns_len, rows_len, chunk_len, block_len, words_len, sums_len] =
            self.backward_parts().map(|(_, len)| len);
        let [keys, values, key_rows] = split.take(tokens_len);
        let [q_columns, do_columns, dq] = split.take(columns_len);
        let [q_rows, do_rows] = split.take(rows_len);
        let [shift, delta] = split.take(chunk_len);
        let [p, ds, mask] = split.take(block_len);
        let [p_lanes, ds_lanes, ds_rows] = split.take(words_len);
        let [dk, dv] = split.take(sums_len);
        let [q, k, v] = [0, 1, 2].map(|part| self.rows(qkv, part, head));
        let gradients = Rows { x: d_o, stride: c, at: head * width, width };
        if qkv.len() > NEAR {
            [k, v].iter().for_each(Rows::bring_near);
        }
        k.panels::<P>(&mut keys[..tokens.div_ceil(PANEL) * words * PANEL]);
        v.panels::<P>(&mut values[..tokens.div_ceil(PANEL) * words * PANEL]);
        k.down::<P>(width, &mut key_rows[..tokens.div_ceil(P::PER_WORD) * width]);
        let factors = self.words;
        for x in [&mut *keys, values, key_rows] {
            factors.round(x);
        }
        for start in (0..tokens).step_by(self.chunk()) {
            let chunk = self.chunk().min(tokens - start);
            let (q, gradients) = (q.part(start, chunk), gradients.part(start, chunk));
            if qkv.len() > NEAR {
                [q, gradients, Rows { x: o, ..gradients }.part(start, chunk)]
                    .iter()
                    .for_each(Rows::bring_near);
            }
            let scale = self.scale() * LOG2_E;
            for first in (0..chunk).step_by(nr) {
                let range = first * words..(first + nr) * words;
                q.columns::<P>(first, nr, scale, &mut q_columns[range.clone()]);
                gradients.columns::<P>(first, nr, 1.0, &mut do_columns[range]);
                // Of narrow heads words of neighbouring queries, if a word has two numbers.
                if narrow && P::PER_WORD == 2 {
                    let range = first * width / 2..(first + nr) * width / 2;
                    let mut numbers = [0.0; MOST_NARROW];
                    let numbers = &mut numbers[..nr * width];
                    q.columns::<Single>(first, nr, scale, numbers);
                    product.pair_lanes(s, numbers, &mut q_rows[range.clone()]);
                    gradients.columns::<Single>(first, nr, 1.0, numbers);
                    product.pair_lanes(s, numbers, &mut do_rows[range]);
                }
            }
            if !narrow {
                let len = chunk.div_ceil(P::PER_WORD) * self.row_width();
                q.down::<P>(self.row_width(), &mut q_rows[..len]);
                gradients.down::<P>(self.row_width(), &mut do_rows[..len]);
            }
            for x in [&mut *q_columns, do_columns, q_rows, do_rows] {
                factors.round(x);
            }
            // A query behind the last one has zero queries and gradients, so whatever p is, it adds nothing.
            shift.fill(0.0);
            delta.fill(0.0);
            for token in 0..chunk {
                let at = (start + token) * c + head * width;
                shift[token] = -lse[(start + token) * self.heads + head] * LOG2_E;
                let dot = |(d_o, o): (&f32, &f32)| d_o * o;
                delta[token] = -d_o[at..][..width].iter().zip(&o[at..][..width]).map(dot).sum::<f32>();
            }
            dq.fill(0.0);
            for key in range.clone().step_by(KEY_BLOCK) {
                let block = KEY_BLOCK.min(range.end - key);
                let (keys, values) = (&keys[key * words..], &values[key * words..]);
                let key_rows = &key_rows[key / P::PER_WORD * width..];
                dk.fill(0.0);
                dv.fill(0.0);
                for first in (0..chunk).step_by(nr) {
                    let count = nr.min(chunk - first);
                    // The vectors of the tile that hold queries.
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
                    let (p, ds) = (&mut p[..block * nr], &mut ds[..block * nr]);
                    weights_and_gradients::<S, P, NV>(
                        s, product, words, block, used, keys, values, q, d_o, shift, delta, masks, p, ds,
                    );
                    for x in [&mut *p, ds] {
                        factors.round(x);
                    }
                    let dq = &mut dq[first * width..(first + nr) * width];
                    add_keys::<S, P, NV>(s, product, width, block, used, key_rows, ds, ds_rows, dq);
                    let ds = pair_lanes::<S, P>(s, product, ds, ds_lanes);
                    let p = pair_lanes::<S, P>(s, product, p, p_lanes);
                    if narrow {
                        let range = first * width / 2..(first + nr) * width / 2;
                        let (q, d_o) = match P::PER_WORD {
                            1 => (q, d_o),
                            _ => (&q_rows[range.clone()], &do_rows[range]),
                        };
                        let used = used.div_ceil(P::PER_WORD);
                        add_lanes(s, product, width, block, used, ds, q, dk);
                        add_lanes(s, product, width, block, used, p, d_o, dv);
                    } else {
                        let at = first / P::PER_WORD * self.row_width();
                        let (q, d_o) = (&q_rows[at..], &do_rows[at..]);
                        let count = count.div_ceil(P::PER_WORD);
                        let (tile, columns) = (self.wide_tile(), self.row_width());
                        with_tile!(tile, add_rows::<S>(s, product, width, count, block, ds, q, columns, dk));
                        with_tile!(tile, add_rows::<S>(s, product, width, count, block, p, d_o, columns, dv));
                    }
                }
                // In the columns q is times log2(e) / sqrt(width); in the rows it is not.
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
                for q in 0..nr.min(chunk - first) {
                    let at = layout.begin[0] + (start + first + q) * layout.stride;
                    for (d, v) in out[at..][..width].iter_mut().enumerate() {
                        *v = dq[d * nr + q] * self.scale();
                    }
                }
            }
        }
    }
}

/// `p = 2^(k . q + shift)` and `ds = p (v . do + delta)` of a block of keys, `[keys][queries]`. With dropout's factors
/// D in `masks`, `p` becomes `p D`, and `v . do` is multiplied with D.
#[inline(always)]
fn weights_and_gradients<S: Simd, P: Product, const NV: usize>(
    s: S,
    product: P,
    words: usize,
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
    fn rows<S: Simd, P: Product, const MR: usize, const NV: usize>(
        s: S,
        product: P,
        words: usize,
        [keys, values]: [&[f32]; 2],
        [q, d_o, shift, delta]: [&[S::f32s]; 4],
        masks: Option<&[S::f32s]>,
        p: &mut [S::f32s],
        ds: &mut [S::f32s],
    ) {
        let stride = tile_vectors(S::F32_LANES);
        let mut score = [row::<S, NV>(shift); MR];
        columns(s, product, keys, PANEL, q, stride, words, &mut score);
        let delta = row::<S, NV>(delta);
        let Some(masks) = masks else {
            let mut gradient = [delta; MR];
            columns(s, product, values, PANEL, d_o, stride, words, &mut gradient);
            for r in 0..MR {
                for v in 0..NV {
                    score[r][v] = power::<S, P>(s, score[r][v]);
                    gradient[r][v] = s.mul_f32s(score[r][v], gradient[r][v]);
                }
            }
            store::<S, MR, NV>(&score, p, stride);
            store::<S, MR, NV>(&gradient, ds, stride);
            return;
        };
        let mut gradient = tile::zero::<S, MR, NV>(s);
        columns(s, product, values, PANEL, d_o, stride, words, &mut gradient);
        for r in 0..MR {
            let mask = row::<S, NV>(&masks[r * stride..]);
            for v in 0..NV {
                let weight = power::<S, P>(s, score[r][v]);
                gradient[r][v] = s.mul_f32s(weight, s.mul_add_e_f32s(gradient[r][v], mask[v], delta[v]));
                score[r][v] = s.mul_f32s(weight, mask[v]);
            }
        }
        store::<S, MR, NV>(&score, p, stride);
        store::<S, MR, NV>(&gradient, ds, stride);
    }
    // Of a short row all operands stay in registers, for p and then for ds; for both at once there are not enough.
    #[inline(always)]
    fn short_p<S: Simd, P: Product, const MR: usize, const W: usize>(
        s: S,
        product: P,
        keys: &[f32],
        q: &Acc<S, W, 1>,
        shift: S::f32s,
        p: &mut [S::f32s],
    ) {
        let mut score = [[shift]; MR];
        short_rows(s, product, keys, q, &mut score);
        for r in 0..MR {
            score[r][0] = power::<S, P>(s, score[r][0]);
        }
        store::<S, MR, 1>(&score, p, tile_vectors(S::F32_LANES));
    }
    #[inline(always)]
    fn short_ds<S: Simd, P: Product, const MR: usize, const W: usize>(
        s: S,
        product: P,
        values: &[f32],
        d_o: &Acc<S, W, 1>,
        delta: S::f32s,
        p: &[S::f32s],
        ds: &mut [S::f32s],
    ) {
        let columns = tile_vectors(S::F32_LANES);
        let (mut gradient, p) = ([[delta]; MR], load::<S, MR, 1>(p, columns));
        short_rows(s, product, values, d_o, &mut gradient);
        for r in 0..MR {
            gradient[r][0] = s.mul_f32s(p[r][0], gradient[r][0]);
        }
        store::<S, MR, 1>(&gradient, ds, columns);
    }
    #[inline(always)]
    fn all_short<S: Simd, P: Product, const W: usize>(
        s: S,
        product: P,
        block: usize,
        used: usize,
        [keys, values]: [&[f32]; 2],
        [q, d_o, shift, delta]: [&[S::f32s]; 4],
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
                most_rows::<S>(),
                short_p(i, s, product, &keys[panel_at(i, W)..], &q, shift[v], &mut p[at(i)..])
            );
            let d_o = load::<S, W, 1>(&d_o[v..], columns);
            in_rows!(
                S,
                P,
                [W],
                block,
                most_rows::<S>(),
                short_ds(
                    i,
                    s,
                    product,
                    &values[panel_at(i, W)..],
                    &d_o,
                    delta[v],
                    &p[at(i)..],
                    &mut ds[at(i)..]
                )
            );
        }
    }
    let [q, d_o, shift, delta] = [q, d_o, shift, delta].map(|x| vectors::<S>(x));
    let masks = masks.map(|x| vectors::<S>(x));
    let (p, ds) = (vectors_mut::<S>(p), vectors_mut::<S>(ds));
    let (panels, columns) = ([keys, values], [q, d_o, shift, delta]);
    match (words, masks) {
        (2, None) => return all_short::<S, P, 2>(s, product, block, used, panels, columns, p, ds),
        (4, None) => return all_short::<S, P, 4>(s, product, block, used, panels, columns, p, ds),
        (8, None) => return all_short::<S, P, 8>(s, product, block, used, panels, columns, p, ds),
        _ => {}
    }
    let stride = tile_vectors(S::F32_LANES);
    for v in (0..used).step_by(NV) {
        in_rows!(
            S,
            P,
            [NV],
            block,
            most_rows::<S>() / 2,
            rows(
                i,
                s,
                product,
                words,
                panels.map(|x| &x[panel_at(i, words)..]),
                columns.map(|x| &x[v..]),
                masks.map(|m| &m[i * stride + v..]),
                &mut p[i * stride + v..],
                &mut ds[i * stride + v..],
            )
        );
    }
}

/// Where token `i` begins in panels of so many words.
#[inline(always)]
fn panel_at(i: usize, words: usize) -> usize {
    i / PANEL * PANEL * words + i % PANEL
}

/// `dq[d][query] += sum over a block of keys of keys[key][d] ds[key][query]`.
#[inline(always)]
fn add_keys<S: Simd, P: Product, const NV: usize>(
    s: S,
    product: P,
    width: usize,
    block: usize,
    used: usize,
    keys: &[f32],
    ds: &[f32],
    words: &mut [f32],
    dq: &mut [f32],
) {
    #[inline(always)]
    fn rows<S: Simd, P: Product, const MR: usize, const NV: usize>(
        s: S,
        product: P,
        width: usize,
        block: usize,
        keys: &[f32],
        ds: &[S::f32s],
        dq: &mut [S::f32s],
    ) {
        let stride = tile_vectors(S::F32_LANES);
        let mut acc = load::<S, MR, NV>(dq, stride);
        columns(s, product, keys, width, ds, stride, block, &mut acc);
        store::<S, MR, NV>(&acc, dq, stride);
    }
    let stride = tile_vectors(S::F32_LANES);
    let (ds, dq) = (vectors::<S>(ds), vectors_mut::<S>(dq));
    let ds = pair_rows(s, product, ds, stride, vectors_mut::<S>(words));
    let block = block.div_ceil(P::PER_WORD);
    for v in (0..used).step_by(NV) {
        in_rows!(
            S,
            P,
            [NV],
            width,
            most_rows::<S>(),
            rows(i, s, product, width, block, &keys[i..], &ds[v..], &mut dq[i * stride + v..])
        );
    }
}

/// `sums[key][d][lane] += sum over the tile's vectors of weights[key] columns[d]`.
#[inline(always)]
fn add_lanes<S: Simd, P: Product>(
    s: S,
    product: P,
    width: usize,
    block: usize,
    used: usize,
    weights: &[f32],
    columns: &[f32],
    sums: &mut [f32],
) {
    #[inline(always)]
    fn tile<S: Simd, P: Product, const K: usize, const D: usize>(
        s: S,
        product: P,
        width: usize,
        used: usize,
        weights: &[S::f32s],
        columns: &[S::f32s],
        sums: &mut [S::f32s],
    ) {
        let stride = (tile_vectors(S::F32_LANES) / P::PER_WORD).max(1);
        let mut acc = load::<S, K, D>(sums, width);
        let (weights, columns) = (&weights[..K * stride], &columns[..D * stride]);
        for v in 0..used.min(stride) {
            let mut c = [weights[0]; D];
            for d in 0..D {
                c[d] = columns[d * stride + v];
            }
            for k in 0..K {
                product.multiply_vectors(s, weights[k * stride + v], c, &mut acc[k]);
            }
        }
        store::<S, K, D>(&acc, sums, width);
    }
    let (weights, columns, sums) = (vectors::<S>(weights), vectors::<S>(columns), vectors_mut::<S>(sums));
    let stride = (tile_vectors(S::F32_LANES) / P::PER_WORD).max(1);
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
                product,
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
                product,
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

/// `out[key][d] += sum over count words of queries of weights[key][query] rows[query][d]`; `out` is `[keys, width]`.
#[inline(always)]
fn add_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    product: impl Product,
    width: usize,
    count: usize,
    block: usize,
    weights: &[f32],
    rows: &[f32],
    columns: usize,
    out: &mut [f32],
) {
    #[inline(always)]
    fn tile<S: Simd, P: Product, const MR: usize, const NV: usize>(
        s: S,
        product: P,
        width: usize,
        count: usize,
        weights: &[f32],
        rows: &[S::f32s],
        columns: usize,
        at: Range<usize>,
        out: &mut [f32],
    ) {
        // Constants: all rows are addressed from one register, and checked at once.
        let stride = tile_vectors(S::F32_LANES) * S::F32_LANES / P::PER_WORD;
        let weights = &weights[..MR * stride];
        let mut acc = tile::zero::<S, MR, NV>(s);
        for (q, b) in rows.chunks(columns).take(count.min(stride)).enumerate() {
            let b = row::<S, NV>(b);
            for r in 0..MR {
                product.multiply(s, weights[r * stride + q], b, &mut acc[r]);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            tile::store_row(s, acc, &mut out[r * width..][at.clone()], true);
        }
    }
    let (rows, vectors) = (vectors::<S>(rows), columns / S::F32_LANES);
    let stride = weights.len() / block;
    for v in (0..vectors).step_by(NV) {
        let at = v * S::F32_LANES..width.min((v + NV) * S::F32_LANES);
        let mut k = 0;
        while k + MR <= block {
            let (weights, out) = (&weights[k * stride..], &mut out[k * width..]);
            tile::<S, _, MR, NV>(s, product, width, count, weights, &rows[v..], vectors, at.clone(), out);
            k += MR;
        }
        while k < block {
            let (weights, out) = (&weights[k * stride..], &mut out[k * width..]);
            tile::<S, _, 1, NV>(s, product, width, count, weights, &rows[v..], vectors, at.clone(), out);
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
