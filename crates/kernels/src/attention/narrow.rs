//! The backward pass of heads of width 4 and 8 that are narrower than a vector, without dropout.
//!
//! Two keys are fixed, and the queries walked over:
//!
//! ```text
//! for each chunk of queries:
//!     for every two keys:
//!         for each record of the chunk:           a vector of queries; two, where a word has two numbers
//!             p, ds of both keys                  in registers
//!             dq[d][query]     += ds k[d]         in the record
//!             dk[key][d][lane] += ds q;   dv[key][d][lane] += p do        in registers all the way
//! ```
//!
//! Of a width for which the sums of dk and dv need more registers than there are, the chunk is walked over twice: for dv, and
//! with the weights that the first walk left in the records for dk and dq.

use super::product::{PANEL, Rows, dot, panel_at, power, put_rows, row};
use super::ranges::Layout;
use super::{Attention, L2_ELEMS, Saved, Splitter, vectors_mut};
use crate::bf16::Words;
use crate::random::Dropout;
use crate::tile::{Lanes, Single};
use pulp::Simd;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Numbers of a chunk's records: little of a second-level cache, from which they are fetched in good time.
const CHUNK: usize = 32 << 10;

/// Where the parts of a record of `V` vectors of queries begin, in vectors. Where a word has one number, `q` and `do` serve
/// the sums over lanes too; where it has two, these take words of neighbouring queries.
struct Record<const D: usize, const V: usize>;

impl<const D: usize, const V: usize> Record<D, V> {
    /// Words of q, `[words of the width][V]`.
    const Q: usize = 0;
    const DO: usize = D;
    /// Words of neighbouring queries, `[D]`.
    const Q_LANES: usize = if V == 1 { Self::Q } else { 2 * D };
    const DO_LANES: usize = Self::Q_LANES + D;
    /// `[D][V]`.
    const DQ: usize = Self::DO_LANES + D;
    /// What the scores begin with, `-lse`, and the gradients of the weights, `-do . o`.
    const SHIFT: usize = Self::DQ + D * V;
    const DELTA: usize = Self::SHIFT + V;
    /// Weights of two keys, from one walk to the next.
    const P: usize = Self::DELTA + V;
    const LEN: usize = Self::P + 2 * V;
}

/// Two keys and their values as words down a panel, and these keys' words in rows.
#[derive(Clone, Copy)]
struct Keys<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    rows: &'a [f32],
}

impl Attention {
    /// Whether the backward pass goes this way.
    pub(super) fn supports_small_heads(&self, dropout: Option<Dropout>) -> bool {
        let sizes = [(16, 4), (16, 8), (8, 4)];
        sizes.contains(&(self.isa.lanes(), self.width())) && dropout.is_none() && self.words != Words::Rounded
    }

    /// Queries of a record.
    fn record_queries(&self) -> usize {
        self.words.numbers() * self.isa.lanes()
    }

    /// Numbers of a record.
    fn record_len(&self) -> usize {
        (3 * self.width() + 4) * self.record_queries()
    }

    /// Queries of a chunk, in whole records.
    fn walk_chunk(&self) -> usize {
        let most = CHUNK / self.record_len() * self.record_queries();
        self.tokens.div_ceil(self.tokens.div_ceil(most)).next_multiple_of(self.record_queries())
    }

    /// Numbers and lengths of the parts of the scratch memory: panels of keys and values, and rows of keys; the records of a
    /// chunk; sums of dk and dv of two keys.
    pub(super) fn walk_parts(&self) -> [(usize, usize); 3] {
        let records = self.walk_chunk() / self.record_queries();
        let sums = 2 * 2 * self.width() * self.isa.lanes();
        [(3, self.tokens.next_multiple_of(PANEL) * self.width()), (1, records * self.record_len()), (1, sums)]
    }

    /// A head's `dq` as far as some keys make it, and these keys' `dk` and `dv`.
    #[inline(always)]
    pub(super) fn small_head_backward<S: Simd, P: Lanes>(
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
        // Nested matches of constants, so that what is not needed on an instruction set is not compiled.
        match S::F32_LANES {
            16 => match P::PER_WORD {
                1 => match self.width() {
                    4 => self.walk_queries::<S, P, 4, 1, 16, true>(
                        s, product, saved, head, keys, layout, out, scratch,
                    ),
                    _ => self.walk_queries::<S, P, 8, 1, 28, false>(
                        s, product, saved, head, keys, layout, out, scratch,
                    ),
                },
                _ => match self.width() {
                    4 => self.walk_queries::<S, P, 4, 2, 32, true>(
                        s, product, saved, head, keys, layout, out, scratch,
                    ),
                    _ => self.walk_queries::<S, P, 8, 2, 56, false>(
                        s, product, saved, head, keys, layout, out, scratch,
                    ),
                },
            },
            8 => self
                .walk_queries::<S, P, 4, 1, 16, false>(s, product, saved, head, keys, layout, out, scratch),
            _ => unreachable!("no head is walked over with such vectors"),
        }
    }

    /// Records have `R` vectors; `ONCE` says whether one walk makes everything.
    #[inline(always)]
    fn walk_queries<S: Simd, P: Lanes, const D: usize, const V: usize, const R: usize, const ONCE: bool>(
        &self,
        s: S,
        product: P,
        saved: &Saved<'_>,
        head: usize,
        range: Range<usize>,
        layout: Layout,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        const { assert!(R == Record::<D, V>::LEN) };
        let (tokens, words, lanes) = (self.tokens, D / P::PER_WORD, S::F32_LANES);
        let mut split = Splitter(scratch);
        let [tokens_len, records_len, sums_len] = self.walk_parts().map(|(_, len)| len);
        let [keys, values, key_rows] = split.take(tokens_len);
        let [records] = split.take(records_len);
        let [sums] = split.take(sums_len);
        let [k, v] = [1, 2].map(|part| self.rows(saved.qkv, part, head));
        if saved.qkv.len() > L2_ELEMS {
            [k, v].iter().for_each(Rows::prefetch_rows);
        }
        k.panels::<P>(&mut keys[..tokens.div_ceil(PANEL) * words * PANEL]);
        v.panels::<P>(&mut values[..tokens.div_ceil(PANEL) * words * PANEL]);
        k.down::<P>(D, &mut key_rows[..tokens.div_ceil(P::PER_WORD) * D]);
        for start in (0..tokens).step_by(self.walk_chunk()) {
            let count = self.walk_chunk().min(tokens - start).div_ceil(V * lanes);
            let records = &mut records[..count * R * lanes];
            self.fill_records::<S, P, D, V>(s, product, saved, head, start, records);
            for key in range.clone().step_by(2) {
                let count = 2.min(range.end - key);
                let sums = &mut sums[..count * 2 * D * lanes];
                let at = panel_at(key, words);
                let of = Keys {
                    keys: &keys[at..],
                    values: &values[at..],
                    rows: &key_rows[key / P::PER_WORD * D..],
                };
                let (records, sums) =
                    (vectors_mut::<S>(records).as_chunks_mut::<R>().0, vectors_mut::<S>(sums));
                if count == 2 {
                    supports_small_heads::<S, P, 2, D, V, R, ONCE>(s, product, of, records, sums);
                } else {
                    supports_small_heads::<S, P, 1, D, V, R, ONCE>(s, product, of, records, sums);
                }
                // In the records q is times log2(e) / sqrt(width).
                for (i, sums) in sums.chunks_exact(2 * D).enumerate() {
                    for (part, sums, scale) in [(1, &sums[..D], LN_2), (2, &sums[D..], 1.0)] {
                        let at = layout.begin[part] + (key - range.start + i) * layout.stride;
                        let to = &mut out[at..][..D];
                        for d in 0..D {
                            let sum = s.reduce_sum_f32s(sums[d]) * scale;
                            to[d] = if start == 0 { sum } else { to[d] + sum };
                        }
                    }
                }
            }
            for (i, record) in records.chunks_exact(R * lanes).enumerate() {
                let (first, dq) = (start + i * V * lanes, &record[Record::<D, V>::DQ * lanes..]);
                let at = layout.begin[0] + first * layout.stride;
                put_rows(dq, V * lanes, tokens - first, self.scale(), D, out, at, layout.stride);
            }
        }
    }

    /// The records of the queries from `start` on, with dq at 0. A query behind the last one has zero queries and gradients,
    /// so whatever p is, it adds nothing.
    #[inline(always)]
    fn fill_records<S: Simd, P: Lanes, const D: usize, const V: usize>(
        &self,
        s: S,
        product: P,
        &Saved { qkv, o, lse, d_o, .. }: &Saved<'_>,
        head: usize,
        start: usize,
        records: &mut [f32],
    ) {
        let (lanes, queries) = (S::F32_LANES, V * S::F32_LANES);
        let q = self.rows(qkv, 0, head);
        let gradients = Rows { x: d_o, stride: self.channels, at: head * D, width: D };
        let o = Rows { x: o, ..gradients };
        let count = records.len() / (Record::<D, V>::LEN * lanes) * queries;
        if qkv.len() > L2_ELEMS {
            [q, gradients, o].iter().for_each(|rows| rows.part(start, count).prefetch_rows());
        }
        let scale = self.scale() * LOG2_E;
        for (i, record) in records.chunks_exact_mut(Record::<D, V>::LEN * lanes).enumerate() {
            let first = start + i * queries;
            record.fill(0.0);
            let parts = [
                (q, scale, Record::<D, V>::Q, Record::<D, V>::Q_LANES),
                (gradients, 1.0, Record::<D, V>::DO, Record::<D, V>::DO_LANES),
            ];
            for (rows, scale, at, at_lanes) in parts {
                rows.columns::<P>(first, queries, scale, &mut record[at * lanes..][..D * lanes]);
                if V == 2 {
                    let mut numbers = [0.0; 2 * 16 * 8];
                    let numbers = &mut numbers[..D * queries];
                    rows.columns::<Single>(first, queries, scale, numbers);
                    product.pair_lanes(s, numbers, &mut record[at_lanes * lanes..][..D * lanes]);
                }
            }
            for i in 0..queries.min(self.tokens - first) {
                record[Record::<D, V>::SHIFT * lanes + i] = -lse[(first + i) * self.heads + head] * LOG2_E;
                let dot = dot(s, &gradients.row(first + i)[..D], &o.row(first + i)[..D]);
                record[Record::<D, V>::DELTA * lanes + i] = -dot;
            }
        }
    }
}

/// One walk or two of `K` keys.
#[inline(always)]
fn supports_small_heads<
    S: Simd,
    P: Lanes,
    const K: usize,
    const D: usize,
    const V: usize,
    const R: usize,
    const ONCE: bool,
>(
    s: S,
    product: P,
    keys: Keys<'_>,
    records: &mut [[S::f32s; R]],
    sums: &mut [S::f32s],
) {
    if ONCE {
        walk::<S, P, K, D, V, R, true, true>(s, product, keys, records, sums);
    } else {
        walk::<S, P, K, D, V, R, true, false>(s, product, keys, records, sums);
        walk::<S, P, K, D, V, R, false, true>(s, product, keys, records, sums);
    }
}

/// `VALUES`: p and dv; `KEYS`: ds, dq and dk.
#[inline(always)]
fn walk<
    S: Simd,
    P: Lanes,
    const K: usize,
    const D: usize,
    const V: usize,
    const R: usize,
    const VALUES: bool,
    const KEYS: bool,
>(
    s: S,
    product: P,
    Keys { keys, values, rows }: Keys<'_>,
    records: &mut [[S::f32s; R]],
    sums: &mut [S::f32s],
) {
    let words = D / P::PER_WORD;
    let panel = (words - 1) * PANEL + K;
    let (keys, values, rows) = (&keys[..panel], &values[..panel], &rows[..K.div_ceil(P::PER_WORD) * D]);
    let sums = &mut sums[..2 * D * K];
    let zero = s.splat_f32s(0.0);
    let (mut dk, mut dv) = ([[zero; K]; D], [[zero; K]; D]);
    for record in records {
        let mut p = [[zero; V]; K];
        if VALUES {
            p = [row::<S, V>(&record[Record::<D, V>::SHIFT..]); K];
            for w in 0..words {
                let q = row::<S, V>(&record[Record::<D, V>::Q + w * V..]);
                for k in 0..K {
                    product.multiply(s, keys[w * PANEL + k], q, &mut p[k]);
                }
            }
            for k in 0..K {
                for v in 0..V {
                    p[k][v] = power::<S, P>(s, p[k][v]);
                }
            }
            let mut lanes = [zero; K];
            for k in 0..K {
                lanes[k] = product.pair_vectors(s, p[k][0], p[k][V - 1]);
            }
            for d in 0..D {
                product.multiply_vectors(s, record[Record::<D, V>::DO_LANES + d], lanes, &mut dv[d]);
            }
        }
        if VALUES && !KEYS {
            for k in 0..K {
                for v in 0..V {
                    record[Record::<D, V>::P + k * V + v] = p[k][v];
                }
            }
        }
        if KEYS {
            let mut ds = [row::<S, V>(&record[Record::<D, V>::DELTA..]); K];
            for w in 0..words {
                let d_o = row::<S, V>(&record[Record::<D, V>::DO + w * V..]);
                for k in 0..K {
                    product.multiply(s, values[w * PANEL + k], d_o, &mut ds[k]);
                }
            }
            for k in 0..K {
                for v in 0..V {
                    let p = if VALUES { p[k][v] } else { record[Record::<D, V>::P + k * V + v] };
                    ds[k][v] = s.mul_f32s(p, ds[k][v]);
                }
            }
            let (mut pairs, mut lanes) = (ds, [zero; K]);
            for k in (0..K).step_by(P::PER_WORD) {
                for v in 0..V {
                    let odd = if k + 1 < K { ds[k + 1][v] } else { zero };
                    pairs[k / P::PER_WORD][v] = product.pair(s, ds[k][v], odd);
                }
            }
            for k in 0..K {
                lanes[k] = product.pair_vectors(s, ds[k][0], ds[k][V - 1]);
            }
            for d in 0..D {
                let at = Record::<D, V>::DQ + d * V;
                let mut dq = row::<S, V>(&record[at..]);
                for k in 0..K.div_ceil(P::PER_WORD) {
                    product.multiply(s, rows[k * D + d], pairs[k], &mut dq);
                }
                record[at..at + V].copy_from_slice(&dq);
                product.multiply_vectors(s, record[Record::<D, V>::Q_LANES + d], lanes, &mut dk[d]);
            }
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
