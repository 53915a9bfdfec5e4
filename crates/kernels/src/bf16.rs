//! bf16: f32 with the lower half of its bits rounded away, and products of pairs of them summed in f32.
//!
//! Numbers that are multiplied with one another stand in *pairs*: two neighbours along k, the even one in the lower half
//! of a 32-bit word. A panel of pairs is a panel of words, kept in slices of f32 whose values mean nothing.

use crate::conv::MatmulDtype;
use crate::isa::{Isa, dispatch};
use crate::tile::Product;
use pulp::Simd;

/// Rounds to bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// The f32 of the same value.
#[inline(always)]
pub fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Every number rounded: `to` has as many.
pub fn round_all(isa: Isa, from: &[f32], to: &mut [u16]) {
    assert_eq!(from.len(), to.len(), "a number for each");
    dispatch!(isa, _s => round_each(from, to))
}

/// Every number in f32: `to` has as many.
pub fn widen_all(isa: Isa, from: &[u16], to: &mut [f32]) {
    #[inline(always)]
    fn run(from: &[u16], to: &mut [f32]) {
        for (to, &x) in to.iter_mut().zip(from) {
            *to = widen(x);
        }
    }
    assert_eq!(from.len(), to.len(), "a number for each");
    dispatch!(isa, _s => run(from, to))
}

/// Rounds as many numbers as there are.
#[inline(always)]
fn round_each(from: &[f32], to: &mut [u16]) {
    for (to, &x) in to.iter_mut().zip(from) {
        *to = round(x);
    }
}

/// Rounds a run of numbers into the halves of words: `to` has half as many, rounded up; a missing last half is zero.
#[inline(always)]
pub(crate) fn round_run(from: &[f32], to: &mut [f32]) {
    let halves: &mut [u16] = bytemuck::cast_slice_mut(to);
    round_each(from, halves);
    halves[from.len()..].fill(0);
}

/// Words of two numbers.
#[inline(always)]
pub(crate) fn pair(even: f32, odd: f32) -> f32 {
    f32::from_bits(u32::from(round(odd)) << 16 | u32::from(round(even)))
}

/// Words of two rows.
#[inline(always)]
pub(crate) fn pair_rows(even: &[f32], odd: &[f32], to: &mut [f32]) {
    for ((to, &even), &odd) in to.iter_mut().zip(even).zip(odd) {
        *to = pair(even, odd);
    }
}

/// Every lane rounded to bf16.
#[inline(always)]
pub(crate) fn round_vector<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let bits = s.transmute_u32s_f32s(x);
    let last = s.and_u32s(s.wrapping_dyn_shr_u32s(bits, s.splat_u32s(16)), s.splat_u32s(1));
    let sum = s.add_u32s(bits, s.add_u32s(last, s.splat_u32s(0x7fff)));
    let quiet = s.or_u32s(bits, s.splat_u32s(0x40_0000));
    let rounded = s.select_u32s(s.equal_f32s(x, x), sum, quiet);
    s.transmute_f32s_u32s(s.and_u32s(rounded, s.splat_u32s(0xffff_0000)))
}

/// How the factors of a product stand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    /// One number a word.
    Single,
    /// One number a word, rounded to bf16: for instruction sets that do not multiply pairs.
    Rounded,
    /// Two numbers of bf16.
    Pairs,
}

impl Words {
    /// Those for such factors on an instruction set.
    pub(crate) fn of(isa: Isa, factors: MatmulDtype) -> Self {
        match factors {
            MatmulDtype::F32 => Self::Single,
            MatmulDtype::Bf16 if isa.has_bf16() => Self::Pairs,
            MatmulDtype::Bf16 => Self::Rounded,
        }
    }

    /// Numbers of a word.
    pub(crate) fn numbers(self) -> usize {
        if self == Self::Pairs { 2 } else { 1 }
    }

    /// Rounds words that were copied, where that is asked for.
    #[inline(always)]
    pub(crate) fn round(self, numbers: &mut [f32]) {
        if self == Self::Rounded {
            for x in numbers {
                *x = widen(round(*x));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use native::Native;

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "pulp does not have this extension: functions compiled for it are called from here"
)]
mod native {
    use super::round_run;
    use crate::tile::{Lanes, Product};
    use pulp::Simd;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh,
        _mm512_cvtps_epi32, _mm512_dpbf16_ps, _mm512_dpwssd_epi32, _mm512_mask_blend_epi16,
        _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_slli_epi32,
    };
    use std::mem::transmute;

    /// AVX-512 with its extensions BF16 and VNNI, and products of bf16 pairs. Holding a value proves that the machine has them.
    #[derive(Clone, Copy)]
    pub(crate) struct Native(());

    impl Native {
        /// The extension, if this machine has it and all of what pulp calls `V4`.
        pub(crate) fn try_new() -> Option<Self> {
            let extensions = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
            (pulp::x86::V4::try_new().is_some() && extensions).then_some(Self(()))
        }

        /// Products of pairs of whole numbers.
        #[inline(always)]
        pub(crate) fn whole(self) -> Whole {
            Whole(self)
        }

        /// Calls `f` inside a function that is compiled for the extension, and for what pulp's `V4` stands for.
        #[inline(always)]
        pub(crate) fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
            // SAFETY: the value proves that the machine has the features that the function is compiled for.
            unsafe { vectorize(f) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,avx512vnni")]
    #[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt,fxsr")]
    fn vectorize<R>(f: impl FnOnce() -> R) -> R {
        f()
    }

    /// The bits of a vector of pulp's.
    #[inline(always)]
    fn bits<V: bytemuck::NoUninit>(v: V) -> __m512i {
        assert_eq!(size_of::<V>(), size_of::<__m512i>(), "the extension's vectors are of 512 bits");
        // SAFETY: both have one size, V has a value in every byte, and the result may have any.
        unsafe { std::mem::transmute_copy(&v) }
    }

    /// The counterpart of [`bits`].
    #[inline(always)]
    fn vector<V: bytemuck::AnyBitPattern>(x: __m512i) -> V {
        assert_eq!(size_of::<V>(), size_of::<__m512i>(), "the extension's vectors are of 512 bits");
        // SAFETY: both have one size, and V may hold any bits.
        unsafe { std::mem::transmute_copy(&x) }
    }

    impl Product for Native {
        const PER_WORD: usize = 2;

        #[inline(always)]
        fn multiply_vectors<S: Simd, const NV: usize>(
            self,
            _: S,
            a: S::f32s,
            b: [S::f32s; NV],
            acc: &mut [S::f32s; NV],
        ) {
            let a = bits(a);
            for v in 0..NV {
                acc[v] = vector(multiply_pairs(self, bits(acc[v]), a, bits(b[v])));
            }
        }

        #[inline(always)]
        fn pair<S: Simd>(self, _: S, even: S::f32s, odd: S::f32s) -> S::f32s {
            let both = round_two(self, bits(even), bits(odd));
            // SAFETY: the value proves that the machine has what pulp's `V4` stands for.
            vector(unsafe { _mm512_permutexvar_epi16(interleaved(), both) })
        }
    }

    impl Lanes for Native {
        #[inline(always)]
        fn pair_vectors<S: Simd>(self, _: S, first: S::f32s, second: S::f32s) -> S::f32s {
            vector(round_two(self, bits(first), bits(second)))
        }

        #[inline(always)]
        fn pair_lanes<S: Simd>(self, s: S, from: &[f32], to: &mut [f32]) {
            let whole = from.len() / (2 * S::F32_LANES);
            let (pairs, rest) = from.split_at(2 * S::F32_LANES * whole);
            let (words, last) = to.split_at_mut(S::F32_LANES * whole);
            let words = S::as_mut_simd_f32s(words).0.iter_mut();
            for (word, pair) in words.zip(S::as_simd_f32s(pairs).0.chunks_exact(2)) {
                *word = self.pair_vectors(s, pair[0], pair[1]);
            }
            round_run(rest, last);
        }
    }

    /// Products of pairs of 16-bit whole numbers, summed in 32 bits: they must not leave them.
    #[derive(Clone, Copy)]
    pub(crate) struct Whole(Native);

    impl Product for Whole {
        const PER_WORD: usize = 2;
        const WHOLE: bool = true;

        #[inline(always)]
        fn multiply_vectors<S: Simd, const NV: usize>(
            self,
            _: S,
            a: S::f32s,
            b: [S::f32s; NV],
            acc: &mut [S::f32s; NV],
        ) {
            let a = bits(a);
            for v in 0..NV {
                // SAFETY: the value proves that the machine has the instruction.
                acc[v] = vector(unsafe { _mm512_dpwssd_epi32(bits(acc[v]), a, bits(b[v])) });
            }
        }

        #[inline(always)]
        fn pair<S: Simd>(self, _: S, even: S::f32s, odd: S::f32s) -> S::f32s {
            // SAFETY: the value proves that the machine has what pulp's `V4` stands for.
            vector(unsafe {
                let even = _mm512_cvtps_epi32(_mm512_castsi512_ps(bits(even)));
                let odd = _mm512_cvtps_epi32(_mm512_castsi512_ps(bits(odd)));
                _mm512_mask_blend_epi16(0xaaaa_aaaa, even, _mm512_slli_epi32::<16>(odd))
            })
        }

        #[inline(always)]
        fn sums<S: Simd>(self, _: S, acc: S::f32s) -> S::f32s {
            // SAFETY: as above.
            vector(unsafe { _mm512_castps_si512(_mm512_cvtepi32_ps(bits(acc))) })
        }
    }

    /// `acc + even x even + odd x odd` of every pair.
    #[inline(always)]
    fn multiply_pairs(_: Native, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the value proves that the machine has the instruction; the transmutations keep all 512 bits, any of which
        // are valid.
        unsafe {
            let [a, b] = [a, b].map(|x| transmute::<__m512i, __m512bh>(x));
            _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), a, b))
        }
    }

    /// The numbers of two vectors rounded, those of the first in the lower half.
    #[inline(always)]
    fn round_two(_: Native, first: __m512i, second: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let [first, second] = [first, second].map(|x| _mm512_castsi512_ps(x));
            transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first))
        }
    }

    /// The places of the numbers 0, 16, 1, 17, .. of a vector of 32.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn interleaved() -> __m512i {
        _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
            18, 2, 17, 1, 16, 0,
        )
    }
}

/// As [`fma_throughput`](crate::elementwise::multiply_add_rounds), of pairs where the machine has an instruction
/// for them.
pub fn fma_throughput(isa: Isa, rounds: u64) -> Option<u64> {
    /// As there.
    const SUMS: usize = 12;
    #[inline(always)]
    fn run<S: Simd>(s: S, product: impl Product, rounds: u64) -> u64 {
        let a = std::hint::black_box(0.5);
        let b = s.splat_f32s(a);
        let mut sums = [[b]; SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                product.multiply(s, a, [b], sum);
            }
        }
        std::hint::black_box(sums);
        rounds * (4 * SUMS * S::F32_LANES) as u64
    }
    isa.has_bf16().then(|| dispatch!(isa, Words::Pairs, s, product => run(s, product, rounds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_takes_the_nearest_and_ties_go_to_even() {
        for (x, bits) in [
            (1.0, 0x3f80),
            (1.0 + 1.0 / 256.0, 0x3f80),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (1.0 + 1.1 / 256.0, 0x3f81),
            (-1.0, 0xbf80),
            (f32::INFINITY, 0x7f80),
            (f32::MAX, 0x7f80),
            (0.0, 0),
            (-0.0, 0x8000),
            (f32::from_bits(1), 0),
        ] {
            assert_eq!(round(x), bits, "{x}");
        }
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
            assert!(widen(round(nan)).is_nan(), "{:x}", nan.to_bits());
        }
        for bits in 0..=u16::MAX {
            let x = widen(bits);
            assert!(x.is_nan() || round(x) == bits, "{bits:x}");
        }
    }
}
