//! bf16 (f32 without the lower 16 bits), and dot products of bf16 pairs accumulated in f32.
//!
//! Matmul operands are packed in *pairs*: two neighbours along k, the even one in the lower half of a 32-bit
//! word. A panel of pairs is a panel of words, stored in f32 slices whose values have no meaning as floats.

use pulp::Simd;

/// Precision of matmul operands; accumulation is in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatmulDtype {
    /// Full precision.
    #[default]
    F32,
    /// Rounded to bf16, two to a word.
    Bf16,
}

/// Rounds to bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// Converts back to f32, exactly.
#[inline(always)]
pub fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Rounds every element; both slices have the same length.
#[inline(always)]
pub(crate) fn round_each(from: &[f32], to: &mut [u16]) {
    for (to, &x) in to.iter_mut().zip(from) {
        *to = round(x);
    }
}

/// Widens every element; both slices have the same length.
#[inline(always)]
pub(crate) fn widen_each(from: &[u16], to: &mut [f32]) {
    for (to, &x) in to.iter_mut().zip(from) {
        *to = widen(x);
    }
}

/// Rounds and packs two elements a word: `to` has half the length, rounded up; a missing last half is zero.
#[inline(always)]
pub(crate) fn round_run(from: &[f32], to: &mut [f32]) {
    let halves: &mut [u16] = bytemuck::cast_slice_mut(to);
    round_each(from, halves);
    halves[from.len()..].fill(0);
}

/// Packs two elements into a word.
#[inline(always)]
pub(crate) fn pair(even: f32, odd: f32) -> f32 {
    f32::from_bits(u32::from(round(odd)) << 16 | u32::from(round(even)))
}

/// Packs two rows element by element.
#[inline(always)]
pub(crate) fn pair_rows(even: &[f32], odd: &[f32], to: &mut [f32]) {
    for ((to, &even), &odd) in to.iter_mut().zip(even).zip(odd) {
        *to = pair(even, odd);
    }
}

/// Rounds every lane to bf16.
#[inline(always)]
pub(crate) fn round_vector<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let bits = s.transmute_u32s_f32s(x);
    let last = s.and_u32s(s.wrapping_dyn_shr_u32s(bits, s.splat_u32s(16)), s.splat_u32s(1));
    let sum = s.add_u32s(bits, s.add_u32s(last, s.splat_u32s(0x7fff)));
    let quiet = s.or_u32s(bits, s.splat_u32s(0x40_0000));
    let rounded = s.select_u32s(s.equal_f32s(x, x), sum, quiet);
    s.transmute_f32s_u32s(s.and_u32s(rounded, s.splat_u32s(0xffff_0000)))
}

/// How matmul operands are stored in memory, as 32-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// One f32 a word.
    F32,
    /// One f32 a word, rounded to bf16: for instruction sets without a pairwise dot product.
    Rounded,
    /// Two 16-bit elements a word.
    Pairs,
}

impl Packing {
    /// Elements a word.
    pub(crate) fn elems_per_word(self) -> usize {
        if self == Self::Pairs { 2 } else { 1 }
    }

    /// Rounds packed words in place if this packing needs it.
    #[inline(always)]
    pub(crate) fn round(self, words: &mut [f32]) {
        if self == Self::Rounded {
            for x in words {
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
    reason = "pulp lacks these extensions, so functions compiled for them are called from here"
)]
mod native {
    use super::round_run;
    use crate::tile::{DotKernel, PackLanes};
    use pulp::Simd;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh,
        _mm512_cvtps_epi32, _mm512_dpbf16_ps, _mm512_dpwssd_epi32, _mm512_mask_blend_epi16,
        _mm512_permutexvar_epi16, _mm512_set_epi16, _mm512_slli_epi32,
    };
    use std::mem::transmute;

    /// AVX-512 with the BF16 and VNNI extensions; multiplies bf16 pairs. Holding a value proves that the
    /// machine has them.
    #[derive(Clone, Copy)]
    pub(crate) struct Native(());

    impl Native {
        /// The token, if this machine has the extensions and everything in pulp's `V4`.
        pub(crate) fn try_new() -> Option<Self> {
            let extensions = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
            (pulp::x86::V4::try_new().is_some() && extensions).then_some(Self(()))
        }

        /// The dot kernel for int16 pairs.
        #[inline(always)]
        pub(crate) fn int16(self) -> Int16Dot {
            Int16Dot(self)
        }

        /// Calls `f` inside a function compiled for the extensions and for pulp's `V4`.
        #[inline(always)]
        pub(crate) fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
            // SAFETY: the token proves that the machine has the features the function is compiled for.
            unsafe { vectorize(f) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,avx512vnni")]
    #[target_feature(enable = "avx2,bmi1,bmi2,fma,lzcnt,popcnt,fxsr")]
    fn vectorize<R>(f: impl FnOnce() -> R) -> R {
        f()
    }

    /// The bits of a pulp vector.
    #[inline(always)]
    fn bits<V: bytemuck::NoUninit>(v: V) -> __m512i {
        assert_eq!(size_of::<V>(), size_of::<__m512i>(), "the extension has 512-bit vectors");
        // SAFETY: both types have the same size, V has no padding, and any bits are a valid result.
        unsafe { std::mem::transmute_copy(&v) }
    }

    /// The counterpart of [`bits`].
    #[inline(always)]
    fn vector<V: bytemuck::AnyBitPattern>(x: __m512i) -> V {
        assert_eq!(size_of::<V>(), size_of::<__m512i>(), "the extension has 512-bit vectors");
        // SAFETY: both types have the same size, and any bits are a valid V.
        unsafe { std::mem::transmute_copy(&x) }
    }

    impl DotKernel for Native {
        const ELEMS_PER_WORD: usize = 2;

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
            // SAFETY: the token proves that the machine has the features of pulp's `V4`.
            vector(unsafe { _mm512_permutexvar_epi16(interleaved(), both) })
        }
    }

    impl PackLanes for Native {
        #[inline(always)]
        fn pair_vectors<S: Simd>(self, _: S, first: S::f32s, second: S::f32s) -> S::f32s {
            vector(round_two(self, bits(first), bits(second)))
        }

        #[inline(always)]
        fn pair_lanes<S: Simd>(self, s: S, from: &[f32], to: &mut [f32]) {
            let full = from.len() / (2 * S::F32_LANES);
            let (pairs, rest) = from.split_at(2 * S::F32_LANES * full);
            let (words, last) = to.split_at_mut(S::F32_LANES * full);
            let words = S::as_mut_simd_f32s(words).0.iter_mut();
            for (word, pair) in words.zip(S::as_simd_f32s(pairs).0.chunks_exact(2)) {
                *word = self.pair_vectors(s, pair[0], pair[1]);
            }
            round_run(rest, last);
        }
    }

    /// Multiplies pairs of 16-bit integers, accumulating in 32 bits; the caller must rule out overflow.
    #[derive(Clone, Copy)]
    pub(crate) struct Int16Dot(Native);

    impl DotKernel for Int16Dot {
        const ELEMS_PER_WORD: usize = 2;
        const IS_INT: bool = true;

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
                // SAFETY: the token proves that the machine has the instruction.
                acc[v] = vector(unsafe { _mm512_dpwssd_epi32(bits(acc[v]), a, bits(b[v])) });
            }
        }

        #[inline(always)]
        fn pair<S: Simd>(self, _: S, even: S::f32s, odd: S::f32s) -> S::f32s {
            // SAFETY: the token proves that the machine has the features of pulp's `V4`.
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

    /// `acc + even * even + odd * odd` for every pair.
    #[inline(always)]
    fn multiply_pairs(_: Native, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token proves that the machine has the instruction; the transmutes keep all 512 bits,
        // and any bits are valid.
        unsafe {
            let [a, b] = [a, b].map(|x| transmute::<__m512i, __m512bh>(x));
            _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), a, b))
        }
    }

    /// Rounds two vectors to bf16, the first into the lower half.
    #[inline(always)]
    fn round_two(_: Native, first: __m512i, second: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let [first, second] = [first, second].map(|x| _mm512_castsi512_ps(x));
            transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first))
        }
    }

    /// Indices 0, 16, 1, 17, ... of a vector of 32 elements.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn interleaved() -> __m512i {
        _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
            18, 2, 17, 1, 16, 0,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_nearest_even() {
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
