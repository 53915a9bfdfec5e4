//! Counter-based random numbers: every value is a function of (seed, purpose, step, index).
//!
//! Nothing here has state, so there is none to save: a resumed run, another batch size or another number of
//! threads sees the same values. The generator is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
//! numbers: as easy as 1, 2, 3", SC 2011). Its counter holds four 32-bit words, used as
//! `(block, index, step, purpose)`; its key is the seed. `tools/golden/philox.py` is a numpy implementation.

#![forbid(unsafe_code)]

/// One Philox 4x32-10 block: ten rounds on `counter` under `key`.
#[inline(always)]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox::<10>(counter, key)
}

/// Philox 4x32 with any number of rounds.
#[inline(always)]
pub fn philox<const ROUNDS: usize>(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// What random numbers are for. Purposes never share a counter, so adding one leaves the others unchanged. All crates
/// share this one list, as the compiler rejects two purposes with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The noise `eps` of a training step; `index` is the image's index in the batch.
    Noise = 1,
    /// The timestep `t` of a training step; `index` is the image's index in the batch.
    Timestep = 2,
    /// The order of the data; `step` is the epoch.
    Shuffle = 3,
    /// Initial weights; `index` is the parameter's index.
    Init = 4,
    /// The initial noise `x_T` of a sample; `index` is the image's index.
    SampleStart = 5,
    /// The noise `z` of a sampling step; `index` is the image's index, `step` the number of remaining steps.
    SampleNoise = 6,
    /// Built-in digits; `index` is the image's index.
    Digits = 7,
    /// Data augmentation; `index` is the image's index, `step` the epoch.
    Augment = 8,
    /// Dropout masks; `index` is the image's index in the batch; the bits above the lowest 8 hold the dropout's index in the network.
    Dropout = 9,
    /// Which images drop their class label; `index` is the image's index in the batch.
    LabelDropout = 10,
    /// Offset noise, equal in all pixels of an image, of a training step; `index` is the image's index in the batch.
    OffsetNoise = 11,
    /// Noise added to the input, but not to the target, of a training step; `index` is the image's index in the batch.
    InputPerturbation = 12,
    /// Noise for evaluating the variational bound; `index` is the image's index, `step` the timestep.
    Bound = 13,
    /// Timesteps at which the variational bound is evaluated; `index` is the index of the group of images.
    BoundTimestep = 14,
    /// Noise re-added in inpainting (RePaint); `index` is the image's index, `step` the number of remaining moves.
    Resample = 20,
    /// Data of tests and benchmarks.
    Test = 100,
}

/// The infinite sequence of random words of one (seed, purpose, step, index).
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
    index: u32,
    step: u32,
    purpose: u32,
}

impl Stream {
    /// The sequence for `index` at `step`.
    pub fn new(seed: u64, purpose: Purpose, step: u32, index: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], index, step, purpose: purpose as u32 }
    }

    /// Words `4 block` to `4 block + 3`.
    pub fn block(&self, block: u32) -> [u32; 4] {
        philox4x32([block, self.index, self.step, self.purpose], self.key)
    }

    /// The words in order.
    pub fn words(self) -> impl Iterator<Item = u32> {
        (0..).flat_map(move |b| self.block(b))
    }

    /// Word `i` of the sequence.
    pub fn word(&self, i: u32) -> u32 {
        self.block(i / 4)[i as usize % 4]
    }

    /// Uniform values in (0, 1), one per word, never exactly 0 or 1.
    pub fn uniforms(self) -> impl Iterator<Item = f64> {
        self.words().map(unit)
    }

    /// Fills `out` with standard normal values (Box-Muller, computed in f64, rounded to f32).
    pub fn fill_normal(&self, out: &mut [f32]) {
        for (b, four) in out.chunks_mut(4).enumerate() {
            let [x0, x1, x2, x3] = self.block(b as u32).map(unit);
            let (r0, a0) = (libm::sqrt(-2.0 * libm::log(x0)), std::f64::consts::TAU * x1);
            let (r1, a1) = (libm::sqrt(-2.0 * libm::log(x2)), std::f64::consts::TAU * x3);
            let (s0, c0) = libm::sincos(a0);
            let (s1, c1) = libm::sincos(a1);
            let z = [r0 * c0, r0 * s0, r1 * c1, r1 * s1];
            for (o, z) in four.iter_mut().zip(z) {
                *o = z as f32;
            }
        }
    }
}

/// Maps a word to (0, 1): the midpoint of its cell of width 2^-32.
fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) * (1.0 / 4_294_967_296.0)
}

/// Maps a word to an integer below `n` by multiplication (bias below `n` / 2^32).
pub fn below(word: u32, n: u32) -> u32 {
    ((u64::from(word) * u64::from(n)) >> 32) as u32
}

/// A random permutation of `n` items for `epoch`: a Fisher-Yates shuffle from the end.
pub fn permutation(seed: u64, epoch: u32, n: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    let words = Stream::new(seed, Purpose::Shuffle, epoch, 0).words();
    for (i, word) in (1..n).rev().zip(words) {
        order.swap(i, below(word, i as u32 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // Random123's kat_vectors file, "philox4x32 10".
        let cases = [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn normal_values_have_the_moments_of_the_distribution() {
        let mut z = vec![0.0; 100_000];
        Stream::new(3, Purpose::Test, 0, 0).fill_normal(&mut z);
        let moment = |p: i32| z.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / z.len() as f64;
        // Four standard errors: sqrt(1/n), sqrt(2/n), sqrt(15/n), sqrt(96/n).
        for (p, expected, error) in [(1, 0.0, 0.0127), (2, 1.0, 0.0179), (3, 0.0, 0.049), (4, 3.0, 0.124)] {
            assert!((moment(p) - expected).abs() < error, "moment {p}: {}", moment(p));
        }
    }

    #[test]
    fn a_prefix_does_not_depend_on_the_length() {
        let s = Stream::new(9, Purpose::Noise, 5, 2);
        let (mut long, mut short) = (vec![0.0; 50], vec![0.0; 7]);
        s.fill_normal(&mut long);
        s.fill_normal(&mut short);
        assert_eq!(long[..7], short[..]);
        assert_eq!(s.words().nth(6), Some(s.word(6)));
    }

    #[test]
    fn permutations_are_valid_and_differ_by_epoch() {
        for n in [0, 1, 2, 3, 1000] {
            let mut p = permutation(1, 4, n);
            p.sort_unstable();
            assert!(p.iter().enumerate().all(|(i, &v)| i as u32 == v));
        }
        assert_ne!(permutation(1, 0, 100), permutation(1, 1, 100));
    }
}
