//! Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and
//! dropout masks generated from it on the fly (with fewer rounds for attention weights), so that the backward
//! pass regenerates the same masks.

use crate::isa::{Isa, dispatch};
use ddpm_rng::{philox, philox4x32};
use pulp::Simd;

/// Counters processed together.
const LANES: usize = 16;

/// Philox on `LANES` counters that differ only in their first word.
#[inline(always)]
fn philox_lanes(first: [u32; LANES], rest: [u32; 3], key: [u32; 2]) -> [[u32; LANES]; 4] {
    let mut c = [first, [rest[0]; LANES], [rest[1]; LANES], [rest[2]; LANES]];
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        for i in 0..LANES {
            let p0 = u64::from(c[0][i]) * 0xD251_1F53;
            let p1 = u64::from(c[2][i]) * 0xCD9E_8D57;
            c[0][i] = (p1 >> 32) as u32 ^ c[1][i] ^ k0;
            c[1][i] = p1 as u32;
            c[2][i] = (p0 >> 32) as u32 ^ c[3][i] ^ k1;
            c[3][i] = p0 as u32;
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

/// [`philox`] on a vector of counters.
#[inline(always)]
fn philox_vectors<S: Simd, const ROUNDS: usize>(
    s: S,
    [mut c0, mut c1, mut c2, mut c3]: [S::u32s; 4],
    [mut k0, mut k1]: [u32; 2],
) -> [S::u32s; 4] {
    for _ in 0..ROUNDS {
        let (low0, high0) = s.widening_mul_u32s(c0, s.splat_u32s(0xD251_1F53));
        let (low1, high1) = s.widening_mul_u32s(c2, s.splat_u32s(0xCD9E_8D57));
        c0 = s.xor_u32s(s.xor_u32s(high1, c1), s.splat_u32s(k0));
        c2 = s.xor_u32s(s.xor_u32s(high0, c3), s.splat_u32s(k1));
        (c1, c3) = (low1, low0);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Rounds for the masks of attention weights, of which there are so many that they cost as much as the
/// products: the fewest with which Philox passes all of BigCrush (Salmon et al. 2011, table 2).
const WEIGHT_ROUNDS: usize = 7;
/// Attention weights sharing a counter, those of neighbouring keys; each uses 16 bits of it.
const PER_COUNTER: usize = 8;

/// The 16-bit threshold below which an attention weight is dropped with probability `p`, and the scale of the
/// kept ones.
pub fn weight_threshold(p: f64) -> (u32, f32) {
    let threshold = ((p * 65_536.0).round() as u32).min(65_535);
    (threshold, 65_536.0 / (65_536 - threshold) as f32)
}

/// A block of attention weights `[keys][queries]` of a head, in vectors of queries.
#[derive(Clone, Copy)]
pub(crate) struct WeightBlock {
    pub(crate) head: usize,
    /// Tokens of the image.
    pub(crate) tokens: usize,
    /// The first key, a multiple of 8.
    pub(crate) key: usize,
    /// The first query.
    pub(crate) query: usize,
    /// Vectors of a row.
    pub(crate) columns: usize,
}

/// Dropout masks of one node in one step.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// An element is dropped if its random word is below this: the probability times 2^32.
    threshold: u32,
    /// Scale of the kept elements: `1 / (1 - p)`.
    scale: f32,
    /// Threshold and scale for attention weights, with 16-bit words; the scale matches the rounded
    /// probability exactly.
    weight_threshold: u32,
    weight_scale: f32,
    /// The last three words of the counter: image index, step, purpose.
    rest: [u32; 3],
    key: [u32; 2],
}

impl Dropout {
    /// Masks that drop with probability `p` in [0, 1). A mask depends only on the seed (`key`) and the last
    /// words of the counter, `rest`.
    pub fn new(p: f64, rest: [u32; 3], key: [u32; 2]) -> Self {
        assert!((0.0..1.0).contains(&p), "drop probability must be in [0, 1)");
        let (weight_threshold, weight_scale) = weight_threshold(p);
        Self {
            threshold: (p * 4_294_967_296.0) as u32,
            scale: (1.0 / (1.0 - p)) as f32,
            weight_threshold,
            weight_scale,
            rest,
            key,
        }
    }

    /// The masks of another image: `index` is added to the first of `rest`.
    pub fn image(self, index: u32) -> Self {
        Self { rest: [self.rest[0].wrapping_add(index), self.rest[1], self.rest[2]], ..self }
    }

    /// 0 or `1 / (1 - p)` for element `i` of an image. Elements are in blocks of 64: word j of counter
    /// `16 b + l` belongs to element `64 b + 16 j + l`.
    pub fn factor(&self, i: usize) -> f32 {
        let (block, j, lane) = (i / (4 * LANES), i / LANES % 4, i % LANES);
        let counter = [(block * LANES + lane) as u32, self.rest[0], self.rest[1], self.rest[2]];
        self.keep(philox4x32(counter, self.key)[j])
    }

    #[inline(always)]
    fn keep(&self, word: u32) -> f32 {
        if word < self.threshold { 0.0 } else { self.scale }
    }

    /// Applies the mask to elements `64 * block ..` of an image (at most 64).
    #[inline(always)]
    fn apply_block(&self, block: usize, y: &mut [f32]) {
        let mut first = [0; LANES];
        for (lane, v) in first.iter_mut().enumerate() {
            *v = (block * LANES + lane) as u32;
        }
        let words = philox_lanes(first, self.rest, self.key);
        for (words, y) in words.iter().zip(y.chunks_mut(LANES)) {
            for (word, y) in words.iter().zip(y) {
                *y *= self.keep(*word);
            }
        }
    }

    /// Applies the mask to a block of attention weights. See [`weight_factor`](Self::weight_factor).
    #[inline(always)]
    pub(crate) fn apply_weights<S: Simd>(&self, s: S, block: WeightBlock, weights: &mut [S::f32s]) {
        let WeightBlock { head, tokens, key, query, columns } = block;
        let step = tokens.div_ceil(PER_COUNTER);
        let mut lanes = [0; LANES];
        for (lane, v) in lanes.iter_mut().enumerate().take(S::F32_LANES) {
            *v = (lane * step) as u32;
        }
        let lanes = S::as_simd_u32s(&lanes[..S::F32_LANES]).0[0];
        let [rest0, rest1, rest2] = self.rest;
        let rest = [s.splat_u32s(rest0), s.splat_u32s(rest1), s.splat_u32s(rest2)];
        let (threshold, low) = (s.splat_u32s(self.weight_threshold), s.splat_u32s(0xffff));
        let (drop, keep) = (s.splat_f32s(0.0), s.splat_f32s(self.weight_scale));
        for (i, rows) in weights.chunks_mut(PER_COUNTER * columns).enumerate() {
            for v in 0..columns {
                let first = (head * tokens + query + v * S::F32_LANES) * step + key / PER_COUNTER + i;
                let counter = s.add_u32s(s.splat_u32s(first as u32), lanes);
                let words = [counter, rest[0], rest[1], rest[2]];
                let words = philox_vectors::<S, WEIGHT_ROUNDS>(s, words, self.key);
                for (r, weight) in rows[v..].iter_mut().step_by(columns).enumerate() {
                    let word = words[r / 2];
                    let bits = match r % 2 {
                        0 => s.and_u32s(word, low),
                        _ => s.wrapping_dyn_shr_u32s(word, s.splat_u32s(16)),
                    };
                    let factor = s.select_f32s(s.less_than_u32s(bits, threshold), drop, keep);
                    *weight = s.mul_f32s(*weight, factor);
                }
            }
        }
    }

    /// The mask factor of weight (head, query, key) in attention over `tokens` tokens: half `key % 8` of the
    /// words of counter `(head * tokens + query) * ceil(tokens / 8) + key / 8`, the lower half of a word
    /// first.
    pub fn weight_factor(&self, head: usize, tokens: usize, query: usize, key: usize) -> f32 {
        let first = (head * tokens + query) * tokens.div_ceil(PER_COUNTER) + key / PER_COUNTER;
        let counter = [first as u32, self.rest[0], self.rest[1], self.rest[2]];
        let half = key % PER_COUNTER;
        let bits = philox::<WEIGHT_ROUNDS>(counter, self.key)[half / 2] >> (16 * (half % 2)) & 0xffff;
        if bits < self.weight_threshold { 0.0 } else { self.weight_scale }
    }
}

/// Applies the mask to elements `first ..` of an image; `first` is a multiple of 64.
pub fn dropout(isa: Isa, masks: Dropout, first: usize, y: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(_: S, masks: Dropout, first: usize, y: &mut [f32]) {
        for (i, y) in y.chunks_mut(4 * LANES).enumerate() {
            masks.apply_block(first / (4 * LANES) + i, y);
        }
    }
    assert_eq!(first % (4 * LANES), 0, "must be a multiple of the block");
    dispatch!(isa, s => run(s, masks, first, y))
}
