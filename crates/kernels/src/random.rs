//! Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and dropout
//! masks drawn from it where they are needed, so that the backward pass draws the same ones again.

use crate::isa::{Isa, dispatch};
use pulp::Simd;

/// One Philox 4x32-10 block: ten rounds on `counter` under `key`.
#[inline(always)]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// Counters side by side in one pass.
const LANES: usize = 16;

/// Philox on `LANES` counters that differ in their first word only.
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

/// The dropout masks of one node in one step.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// A number is dropped where its word is below this: the probability times 2^32.
    threshold: u32,
    /// What the kept numbers are multiplied by: `1 / (1 - p)`.
    scale: f32,
    /// The last three words of the counter: index of the picture, step, purpose.
    rest: [u32; 3],
    key: [u32; 2],
}

impl Dropout {
    /// Masks that drop with probability `p` (from 0 up to, not including, 1). A mask is a function of the seed (`key`)
    /// and the counter's last words `rest` alone.
    pub fn new(p: f64, rest: [u32; 3], key: [u32; 2]) -> Self {
        assert!((0.0..1.0).contains(&p), "a probability below 1");
        Self { threshold: (p * 4_294_967_296.0) as u32, scale: (1.0 / (1.0 - p)) as f32, rest, key }
    }

    /// The same for another picture: `index` is added to the first of the counter's last words.
    pub fn picture(self, index: u32) -> Self {
        Self { rest: [self.rest[0].wrapping_add(index), self.rest[1], self.rest[2]], ..self }
    }

    /// 0 or `1 / (1 - p)` for number `i` of a picture. Numbers stand in blocks of 64: word j of counter `16 b + l`
    /// belongs to number `64 b + 16 j + l`.
    pub fn factor(&self, i: usize) -> f32 {
        let (block, j, lane) = (i / (4 * LANES), i / LANES % 4, i % LANES);
        let counter = [(block * LANES + lane) as u32, self.rest[0], self.rest[1], self.rest[2]];
        self.keep(philox4x32(counter, self.key)[j])
    }

    #[inline(always)]
    fn keep(&self, word: u32) -> f32 {
        if word < self.threshold { 0.0 } else { self.scale }
    }

    /// Multiplies numbers `64 * block ..` of a picture (at most 64) with their factors.
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

    /// Multiplies weights `[keys][queries]` (`nr` queries a row) of a head with their factors: keys `key ..`, a multiple
    /// of 4, and queries `query ..`. See [`weight_factor`](Self::weight_factor).
    #[inline(always)]
    pub(crate) fn apply_weights(
        &self,
        head: usize,
        tokens: usize,
        key: usize,
        query: usize,
        nr: usize,
        weights: &mut [f32],
    ) {
        let fours = tokens.div_ceil(4);
        for (four, rows) in weights.chunks_mut(4 * nr).enumerate() {
            for start in (0..nr).step_by(LANES) {
                let mut first = [0; LANES];
                for (lane, v) in first.iter_mut().enumerate() {
                    *v = ((head * tokens + query + start + lane) * fours + key / 4 + four) as u32;
                }
                let words = philox_lanes(first, self.rest, self.key);
                for (words, row) in words.iter().zip(rows.chunks_mut(nr)) {
                    for (word, w) in words.iter().zip(&mut row[start..nr.min(start + LANES)]) {
                        *w *= self.keep(*word);
                    }
                }
            }
        }
    }

    /// The factor of weight (head, query, key) of an attention over `tokens` tokens: that of word `key % 4` of the counter
    /// `(head * tokens + query) * ceil(tokens / 4) + key / 4`.
    pub fn weight_factor(&self, head: usize, tokens: usize, query: usize, key: usize) -> f32 {
        let first = ((head * tokens + query) * tokens.div_ceil(4) + key / 4) as u32;
        self.keep(philox4x32([first, self.rest[0], self.rest[1], self.rest[2]], self.key)[key % 4])
    }
}

/// `y *= factors`, for numbers `first ..` of a picture; `first` is a multiple of 64.
pub fn dropout(isa: Isa, masks: Dropout, first: usize, y: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(_: S, masks: Dropout, first: usize, y: &mut [f32]) {
        for (i, y) in y.chunks_mut(4 * LANES).enumerate() {
            masks.apply_block(first / (4 * LANES) + i, y);
        }
    }
    assert_eq!(first % (4 * LANES), 0, "blocks are whole");
    dispatch!(isa, s => run(s, masks, first, y))
}
