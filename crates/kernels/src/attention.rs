//! Multi-head self-attention of one picture, in tiles, without ever storing the N x N weights.
//!
//! Input is `qkv`, `[tokens, 3 * channels]`: for each token the queries of all heads, then the keys, then the values
//! (the layout of PyTorch's `in_proj_weight`); head `h` owns `width = channels / heads` numbers of each.
//! `o = softmax(q k^T / sqrt(width)) v` (Vaswani et al. 2017).
//!
//! A tile has one or two vectors of *queries* side by side and a block of keys below each other, so that
//! maxima, sums and rescaling work lane by lane and a head of width 4 fills the vectors as well as one of width 64:
//!
//! ```text
//! for each query tile:                                   (online softmax: Milakov and Gimelshein 2018)
//!     for each block of keys:
//!         s[key][query]  = k[key] . q[query]             tile product, A = keys, B = queries transposed
//!         m'             = max(m, max over keys of s);   o, l *= e^(m - m')
//!         p[key][query]  = e^(s - m');                   l += sum over keys of p
//!         o[d][query]   += sum over keys of v[key][d] p  tile product, A = values
//!     out = o / l;  lse = m + ln l
//! ```
//!
//! The backward pass recomputes `p = e^(s - lse)` tile by tile (Dao et al. 2022):
//!
//! ```text
//! dv[key] += sum over queries of p do         dp[key][query] = v[key] . do[query]
//! ds = p (dp - do . o) / sqrt(width)          dq[query] += sum over keys of ds k;   dk[key] += sum of ds q
//! ```
//!
//! Dropout multiplies the softmax's results with factors D that are drawn tile by tile, in both passes the same ones:
//! `o = (p D) v`, `dv += (p D) do`, `dp = D (v . do)`; the sums `l`, and `do . o` in ds, need no change.

use crate::isa::{Isa, dispatch};
use crate::random::Dropout;
use crate::tile::{self, TileShape, with_tile};
use crate::vector;
use pulp::Simd;

/// Keys of a block: their scores against a query tile stay in the first-level cache.
const KEY_BLOCK: usize = 96;

/// The sizes of an attention, prepared for one instruction set.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    isa: Isa,
    tokens: usize,
    channels: usize,
    heads: usize,
    /// Queries side by side; rows of keys.
    tile: TileShape,
    /// Tile of the products whose columns are a head's numbers.
    narrow: TileShape,
}

impl Attention {
    /// Prepares; `heads` must divide `channels`.
    pub fn new(isa: Isa, tokens: usize, channels: usize, heads: usize) -> Self {
        assert_eq!(channels % heads, 0, "heads divide channels");
        let tile = TileShape::pick(isa.lanes(), tokens);
        let narrow = TileShape::pick(isa.lanes(), channels / heads);
        Self { isa, tokens, channels, heads, tile, narrow }
    }

    fn width(&self) -> usize {
        self.channels / self.heads
    }

    /// Queries of a tile.
    fn nr(&self) -> usize {
        self.tile.nv * self.isa.lanes()
    }

    /// Columns of a packed `[query][d]` tile.
    fn narrow_columns(&self) -> usize {
        self.width().next_multiple_of(self.narrow.nv * self.isa.lanes())
    }

    fn padded_tokens(&self) -> usize {
        self.tokens.next_multiple_of(KEY_BLOCK)
    }

    /// The width in whole A panels.
    fn padded_width(&self) -> usize {
        self.width().next_multiple_of(self.tile.mr)
    }

    /// Queries of a forward task, a multiple of the tile: fixed, so that tasks do not depend on the machine.
    pub fn task_queries(&self) -> usize {
        self.nr() * 128usize.div_ceil(self.nr())
    }

    /// Numbers of a forward task's scratch memory.
    pub fn scratch_len(&self) -> usize {
        let (width, nr) = (self.width(), self.nr());
        self.padded_tokens() * (width + self.padded_width()) // keys, values
            + (width + self.padded_width()) * nr // queries, output
            + (KEY_BLOCK + 2) * nr // scores, maximum, sum
    }

    /// Numbers of a backward task's scratch memory.
    pub fn backward_scratch_len(&self) -> usize {
        let (width, nr) = (self.width(), self.nr());
        self.padded_tokens() * (2 * width + self.padded_width() + 2 * width)
            + (2 * width + self.padded_width() + 2 * self.narrow_columns()) * nr
            + (3 * KEY_BLOCK + 2) * nr
    }

    /// Forward pass of the queries `first ..` that `o` (`[queries, channels]`) holds. `lse` (`[queries, heads]`)
    /// receives the logarithm of each softmax's denominator.
    pub fn forward(
        &self,
        qkv: &[f32],
        first: usize,
        dropout: Option<Dropout>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(qkv.len(), self.tokens * 3 * self.channels);
        assert_eq!(o.len() * self.heads, lse.len() * self.channels);
        dispatch!(self.isa, s => self.forward_generic(s, qkv, first, dropout, o, lse, scratch))
    }

    /// Backward pass of one picture: `o` and `lse` are what the forward pass made, `dqkv` is `[tokens, 3 * channels]`.
    pub fn backward(
        &self,
        qkv: &[f32],
        o: &[f32],
        lse: &[f32],
        d_o: &[f32],
        dropout: Option<Dropout>,
        dqkv: &mut [f32],
        scratch: &mut [f32],
    ) {
        assert_eq!(qkv.len(), self.tokens * 3 * self.channels);
        assert_eq!((o.len(), d_o.len()), (self.tokens * self.channels, self.tokens * self.channels));
        assert_eq!(dqkv.len(), qkv.len());
        dispatch!(self.isa, s => self.backward_generic(s, qkv, o, lse, d_o, dropout, dqkv, scratch))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.width() as f32).sqrt()
    }

    /// Where part `part` (0 queries, 1 keys, 2 values) of `head` begins in a token's row.
    fn part(&self, part: usize, head: usize) -> usize {
        part * self.channels + head * self.width()
    }

    /// Tokens as rows of a product: panels `[token panel][d][mr]`, zeros behind the last token.
    #[inline(always)]
    fn pack_tokens(&self, x: &[f32], stride: usize, at: usize, out: &mut [f32]) {
        let (mr, width) = (self.tile.mr, self.width());
        for (p, panel) in out.chunks_exact_mut(mr * width).enumerate() {
            for r in 0..mr {
                let token = p * mr + r;
                for d in 0..width {
                    panel[d * mr + r] = if token < self.tokens { x[token * stride + at + d] } else { 0.0 };
                }
            }
        }
    }

    /// A head's numbers as rows of a product: panels `[d panel][token][mr]`, zeros behind the last number and token.
    #[inline(always)]
    fn pack_numbers(&self, x: &[f32], stride: usize, at: usize, out: &mut [f32]) {
        let (mr, tokens) = (self.tile.mr, self.padded_tokens());
        for (p, panel) in out.chunks_exact_mut(mr * tokens).enumerate() {
            let from = p * mr;
            let len = mr.min(self.width() - from);
            for (token, to) in panel.chunks_exact_mut(mr).enumerate() {
                if token < self.tokens {
                    for r in 0..mr {
                        to[r] = if r < len { x[token * stride + at + from + r] } else { 0.0 };
                    }
                } else {
                    to.fill(0.0);
                }
            }
        }
    }

    /// Tokens `first ..` as columns of a product, `[d][nr]`, times `scale`, zeros behind the last.
    #[inline(always)]
    fn pack_columns(
        &self,
        x: &[f32],
        stride: usize,
        at: usize,
        first: usize,
        count: usize,
        scale: f32,
        out: &mut [f32],
    ) {
        let nr = self.nr();
        for (d, row) in out.chunks_exact_mut(nr).enumerate() {
            for (q, v) in row.iter_mut().enumerate() {
                *v = if q < count { x[(first + q) * stride + at + d] * scale } else { 0.0 };
            }
        }
    }

    #[inline(always)]
    fn forward_generic<S: Simd>(
        &self,
        s: S,
        qkv: &[f32],
        first: usize,
        dropout: Option<Dropout>,
        o: &mut [f32],
        lse: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (width, nr, stride, c) = (self.width(), self.nr(), 3 * self.channels, self.channels);
        let mut split = Splitter(scratch);
        let keys = split.take(self.padded_tokens() * width);
        let values = split.take(self.padded_tokens() * self.padded_width());
        let queries = split.take(width * nr);
        let out = split.take(self.padded_width() * nr);
        let scores = split.take(KEY_BLOCK * nr);
        let (max, sum) = split.take(2 * nr).split_at_mut(nr);
        let count = o.len() / c;
        for head in 0..self.heads {
            self.pack_tokens(qkv, stride, self.part(1, head), keys);
            self.pack_numbers(qkv, stride, self.part(2, head), values);
            for start in (0..count).step_by(nr) {
                let tile = nr.min(count - start);
                self.pack_columns(
                    qkv,
                    stride,
                    self.part(0, head),
                    first + start,
                    tile,
                    self.scale(),
                    queries,
                );
                out.fill(0.0);
                max.fill(f32::NEG_INFINITY);
                sum.fill(0.0);
                for key in (0..self.tokens).step_by(KEY_BLOCK) {
                    let valid = KEY_BLOCK.min(self.tokens - key);
                    self.token_product(s, keys, key, queries, scores);
                    with_tile!(self.tile, online_softmax::<S>(s, &mut scores[..valid * nr], max, sum, out));
                    if let Some(masks) = dropout {
                        let weights = &mut scores[..valid * nr];
                        masks.apply_weights(head, self.tokens, key, first + start, nr, weights);
                    }
                    scores[valid * nr..].fill(0.0);
                    self.number_product(s, values, key, scores, out);
                }
                for q in 0..tile {
                    let row = &mut o[(start + q) * c + head * width..][..width];
                    for (d, v) in row.iter_mut().enumerate() {
                        *v = out[d * nr + q] / sum[q];
                    }
                    lse[(start + q) * self.heads + head] = max[q] + sum[q].ln();
                }
            }
        }
    }

    /// `out[key][query] = sum over d of tokens[key][d] columns[d][query]` for a block of keys.
    #[inline(always)]
    fn token_product<S: Simd>(&self, s: S, tokens: &[f32], key: usize, columns: &[f32], out: &mut [f32]) {
        let a = &tokens[key * self.width()..][..KEY_BLOCK * self.width()];
        let b = S::as_simd_f32s(columns).0;
        with_tile!(self.tile, product_columns::<S>(s, a, b, self.nr(), out, false));
    }

    /// `out[d][query] += sum over a block of keys of numbers[d][key] columns[key][query]`.
    #[inline(always)]
    fn number_product<S: Simd>(&self, s: S, numbers: &[f32], key: usize, columns: &[f32], out: &mut [f32]) {
        let (mr, nr) = (self.tile.mr, self.nr());
        let b = S::as_simd_f32s(columns).0;
        let panels = numbers.chunks_exact(mr * self.padded_tokens());
        for (panel, out) in panels.zip(out.chunks_exact_mut(mr * nr)) {
            let a = &panel[key * mr..][..KEY_BLOCK * mr];
            with_tile!(self.tile, product_columns::<S>(s, a, b, nr, out, true));
        }
    }

    #[inline(always)]
    fn backward_generic<S: Simd>(
        &self,
        s: S,
        qkv: &[f32],
        o: &[f32],
        lse: &[f32],
        d_o: &[f32],
        dropout: Option<Dropout>,
        dqkv: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (width, nr, stride, c) = (self.width(), self.nr(), 3 * self.channels, self.channels);
        let (padded, columns) = (self.padded_tokens(), self.narrow_columns());
        let mut split = Splitter(scratch);
        let keys = split.take(padded * width);
        let values = split.take(padded * width);
        let key_numbers = split.take(padded * self.padded_width());
        let (dk, dv) = split.take(2 * padded * width).split_at_mut(padded * width);
        let q_columns = split.take(width * nr);
        let do_columns = split.take(width * nr);
        let dq = split.take(self.padded_width() * nr);
        let q_rows = split.take(nr * columns);
        let do_rows = split.take(nr * columns);
        let p = split.take(KEY_BLOCK * nr);
        let ds = split.take(KEY_BLOCK * nr);
        let mask = split.take(KEY_BLOCK * nr);
        let (tile_lse, delta) = split.take(2 * nr).split_at_mut(nr);
        for head in 0..self.heads {
            self.pack_tokens(qkv, stride, self.part(1, head), keys);
            self.pack_tokens(qkv, stride, self.part(2, head), values);
            self.pack_numbers(qkv, stride, self.part(1, head), key_numbers);
            dk.fill(0.0);
            dv.fill(0.0);
            for first in (0..self.tokens).step_by(nr) {
                let tile = nr.min(self.tokens - first);
                self.pack_columns(qkv, stride, self.part(0, head), first, tile, self.scale(), q_columns);
                self.pack_columns(d_o, c, head * width, first, tile, 1.0, do_columns);
                for q in 0..nr {
                    // A query behind the last one has zero queries and gradients, so whatever p is, it adds nothing.
                    let token = first + q;
                    let at = token * c + head * width;
                    let inside = q < tile;
                    tile_lse[q] = if inside { lse[token * self.heads + head] } else { 0.0 };
                    let dot = |i: usize| d_o[at + i] * o[at + i];
                    delta[q] = if inside { (0..width).map(dot).sum() } else { 0.0 };
                    let (q_row, do_row) =
                        (&mut q_rows[q * columns..][..columns], &mut do_rows[q * columns..][..columns]);
                    q_row.fill(0.0);
                    do_row.fill(0.0);
                    if inside {
                        let from = &qkv[token * stride + self.part(0, head)..][..width];
                        for i in 0..width {
                            q_row[i] = from[i] * self.scale();
                            do_row[i] = d_o[at + i];
                        }
                    }
                }
                dq.fill(0.0);
                for key in (0..self.tokens).step_by(KEY_BLOCK) {
                    self.token_product(s, keys, key, q_columns, p);
                    self.token_product(s, values, key, do_columns, ds);
                    if let Some(masks) = dropout {
                        mask.fill(1.0);
                        masks.apply_weights(head, self.tokens, key, first, nr, mask);
                        vector::map2(
                            s,
                            ds,
                            mask,
                            #[inline(always)]
                            |dp, d| s.mul_f32s(dp, d),
                        );
                    }
                    with_tile!(self.tile, softmax_gradient::<S>(s, p, ds, tile_lse, delta));
                    if dropout.is_some() {
                        vector::map2(
                            s,
                            p,
                            mask,
                            #[inline(always)]
                            |p, d| s.mul_f32s(p, d),
                        );
                    }
                    let valid = KEY_BLOCK.min(self.tokens - key);
                    p[valid * nr..].fill(0.0);
                    ds[valid * nr..].fill(0.0);
                    self.number_product(s, key_numbers, key, ds, dq);
                    self.outer_product(s, ds, q_rows, &mut dk[key * width..][..valid * width]);
                    self.outer_product(s, p, do_rows, &mut dv[key * width..][..valid * width]);
                }
                for q in 0..tile {
                    let row = &mut dqkv[(first + q) * stride + self.part(0, head)..][..width];
                    for (d, v) in row.iter_mut().enumerate() {
                        *v = dq[d * nr + q] * self.scale();
                    }
                }
            }
            for token in 0..self.tokens {
                let row = &mut dqkv[token * stride..][..stride];
                row[self.part(1, head)..][..width].copy_from_slice(&dk[token * width..][..width]);
                row[self.part(2, head)..][..width].copy_from_slice(&dv[token * width..][..width]);
            }
        }
    }

    /// `out[key][d] += sum over queries of weights[key][query] rows[query][d]`; `out` is `[keys, width]`.
    #[inline(always)]
    fn outer_product<S: Simd>(&self, s: S, weights: &[f32], rows: &[f32], out: &mut [f32]) {
        with_tile!(
            self.narrow,
            product_rows::<S>(
                s,
                weights,
                self.nr(),
                S::as_simd_f32s(rows).0,
                self.narrow_columns(),
                self.width(),
                out
            )
        );
    }
}

/// `out[m][..] = A B` with A in column panels and B one panel of `nr` columns; `out` is `[m, nr]`.
#[inline(always)]
fn product_columns<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    a: &[f32],
    b: &[S::f32s],
    nr: usize,
    out: &mut [f32],
    add: bool,
) {
    let k = b.len() / NV;
    for (a, out) in a.chunks_exact(MR * k).zip(out.chunks_exact_mut(MR * nr)) {
        let mut acc = tile::zero::<S, MR, NV>(s);
        tile::columns(s, a, b, &mut acc);
        for (acc, row) in acc.iter().zip(out.chunks_exact_mut(nr)) {
            tile::store_row(s, acc, row, add);
        }
    }
}

/// `out[m][..width] += A B` with A `[m, k]` row by row and B `[k][columns]`.
#[inline(always)]
fn product_rows<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    a: &[f32],
    k: usize,
    b: &[S::f32s],
    columns: usize,
    width: usize,
    out: &mut [f32],
) {
    let vectors = columns / S::F32_LANES;
    let rows = out.len() / width;
    for j in (0..vectors).step_by(NV) {
        let at = j * S::F32_LANES..width.min((j + NV) * S::F32_LANES);
        for first in (0..rows).step_by(MR) {
            let mut acc = tile::zero::<S, MR, NV>(s);
            // A's rows go on behind the last valid one up to the key block, which MR divides.
            tile::rows_strided(s, &a[first * k..], k, &b[j..], vectors, &mut acc);
            for (r, acc) in acc.iter().enumerate().take(rows - first) {
                let row = &mut out[(first + r) * width..][..width];
                tile::store_row(s, acc, &mut row[at.clone()], true);
            }
        }
    }
}

/// Turns scores `[keys][queries]` into unnormalised probabilities and rescales what was summed before.
#[inline(always)]
fn online_softmax<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    scores: &mut [f32],
    max: &mut [f32],
    sum: &mut [f32],
    out: &mut [f32],
) {
    let scores = S::as_mut_simd_f32s(scores).0;
    let (max, sum) = (&mut S::as_mut_simd_f32s(max).0[..NV], &mut S::as_mut_simd_f32s(sum).0[..NV]);
    let out = S::as_mut_simd_f32s(out).0;
    let mut m = [max[0]; NV];
    m.copy_from_slice(max);
    for row in scores.chunks_exact(NV) {
        for v in 0..NV {
            m[v] = s.max_f32s(m[v], row[v]);
        }
    }
    let mut rescale = m;
    for v in 0..NV {
        rescale[v] = vector::exp(s, s.sub_f32s(max[v], m[v]));
        sum[v] = s.mul_f32s(sum[v], rescale[v]);
    }
    let mut total = m;
    total.copy_from_slice(sum);
    for row in scores.chunks_exact_mut(NV) {
        for v in 0..NV {
            row[v] = vector::exp(s, s.sub_f32s(row[v], m[v]));
            total[v] = s.add_f32s(total[v], row[v]);
        }
    }
    for row in out.chunks_exact_mut(NV) {
        for v in 0..NV {
            row[v] = s.mul_f32s(row[v], rescale[v]);
        }
    }
    max.copy_from_slice(&m);
    sum.copy_from_slice(&total);
}

/// `p = e^(p - lse)` and `ds = p (ds - delta)`, lane by lane; `ds` holds dp before.
#[inline(always)]
fn softmax_gradient<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    p: &mut [f32],
    ds: &mut [f32],
    lse: &[f32],
    delta: &[f32],
) {
    let (p, ds) = (S::as_mut_simd_f32s(p).0, S::as_mut_simd_f32s(ds).0);
    let (lse, delta) = (&S::as_simd_f32s(lse).0[..NV], &S::as_simd_f32s(delta).0[..NV]);
    for (p, ds) in p.chunks_exact_mut(NV).zip(ds.chunks_exact_mut(NV)) {
        for v in 0..NV {
            p[v] = vector::exp(s, s.sub_f32s(p[v], lse[v]));
            ds[v] = s.mul_f32s(p[v], s.sub_f32s(ds[v], delta[v]));
        }
    }
}

/// Takes one part after the other from a scratch slice.
struct Splitter<'a>(&'a mut [f32]);

impl<'a> Splitter<'a> {
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        part
    }
}
