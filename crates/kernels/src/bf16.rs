//! bf16: f32 with the lower half of its bits rounded away, and products of pairs of them summed in f32.
//!
//! Numbers that are multiplied with one another stand in *pairs*: two neighbours along k, the even one in the lower half
//! of a 32-bit word. A panel of pairs is a panel of words, kept in slices of f32 whose values mean nothing.

use crate::isa::Isa;
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
pub fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Rounds a run of numbers into the halves of words: `to` has half as many, rounded up; a missing last half is zero.
#[inline(always)]
pub(crate) fn round_run(from: &[f32], to: &mut [f32]) {
    let halves: &mut [u16] = bytemuck::cast_slice_mut(to);
    for (to, &x) in halves.iter_mut().zip(from) {
        *to = round(x);
    }
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

/// Words of two vectors.
#[inline(always)]
pub(crate) fn pair_vectors<S: Simd>(s: S, even: S::f32s, odd: S::f32s) -> S::f32s {
    let (even, odd) = (rounded_bits(s, even), rounded_bits(s, odd));
    let even = s.wrapping_dyn_shr_u32s(even, s.splat_u32s(16));
    s.transmute_f32s_u32s(s.or_u32s(even, odd))
}

/// The bits of every lane rounded to bf16, the lower half zero.
#[inline(always)]
fn rounded_bits<S: Simd>(s: S, x: S::f32s) -> S::u32s {
    let bits = s.transmute_u32s_f32s(x);
    let last = s.and_u32s(s.wrapping_dyn_shr_u32s(bits, s.splat_u32s(16)), s.splat_u32s(1));
    let sum = s.add_u32s(bits, s.add_u32s(last, s.splat_u32s(0x7fff)));
    let quiet = s.or_u32s(bits, s.splat_u32s(0x40_0000));
    s.and_u32s(s.select_u32s(s.equal_f32s(x, x), sum, quiet), s.splat_u32s(0xffff_0000))
}

/// Words are pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Pairs(pub Isa);

impl Product for Pairs {
    /// `acc += even x even + odd x odd`, without an instruction for it: a bf16 is an f32 once it stands in the upper half.
    #[inline(always)]
    fn multiply<S: Simd, const NV: usize>(self, s: S, a: f32, b: [S::f32s; NV], acc: &mut [S::f32s; NV]) {
        let (upper, sixteen) = (s.splat_u32s(0xffff_0000), s.splat_u32s(16));
        let even = s.splat_f32s(f32::from_bits(a.to_bits() << 16));
        let odd = s.splat_f32s(f32::from_bits(a.to_bits() & 0xffff_0000));
        for v in 0..NV {
            let bits = s.transmute_u32s_f32s(b[v]);
            let b_even = s.transmute_f32s_u32s(s.wrapping_dyn_shl_u32s(bits, sixteen));
            let b_odd = s.transmute_f32s_u32s(s.and_u32s(bits, upper));
            acc[v] = s.mul_add_e_f32s(even, b_even, acc[v]);
            acc[v] = s.mul_add_e_f32s(odd, b_odd, acc[v]);
        }
    }

    #[inline(always)]
    fn native(self) -> Option<Native> {
        self.0.bf16()
    }
}

/// The instruction for products of pairs: AVX-512's extension BF16. Holding a value proves its detection.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub struct Native(());

/// There is none on this architecture, and no value of this type.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy)]
pub enum Native {}

#[cfg(not(target_arch = "x86_64"))]
impl Native {
    pub(crate) fn blocked<const MR: usize, const NV: usize>(self, _: &[f32], _: &[f32], _: &mut [f32]) {
        match self {}
    }

    pub(crate) fn columns<const MR: usize, const NV: usize>(self, _: &[f32], _: &[f32], _: &mut [f32]) {
        match self {}
    }

    fn rounds(self, _: u64) -> u64 {
        match self {}
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "pulp does not have this extension: functions compiled for it are called from here"
)]
mod native {
    use super::Native;
    use crate::tile::K_RUN;
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    /// f32 lanes, and pairs, of a vector.
    const LANES: usize = 16;

    impl Native {
        /// The extension, if this machine has it.
        pub(crate) fn try_new() -> Option<Self> {
            (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"))
                .then_some(Self(()))
        }

        /// `acc [MR][NV][16] += A B` of pairs, A `[k / 32][MR][16]`.
        #[inline(always)]
        pub(crate) fn blocked<const MR: usize, const NV: usize>(self, a: &[f32], b: &[f32], acc: &mut [f32]) {
            // SAFETY: the value proves that the machine has the features that the function is compiled for.
            unsafe { blocked::<MR, NV>(a, b, acc) }
        }

        /// `acc [MR][NV][16] += A B` of pairs, A `[k / 2][MR]`.
        #[inline(always)]
        pub(crate) fn columns<const MR: usize, const NV: usize>(self, a: &[f32], b: &[f32], acc: &mut [f32]) {
            // SAFETY: as above.
            unsafe { columns::<MR, NV>(a, b, acc) }
        }

        /// As [`multiply_add_rounds`](crate::elementwise::multiply_add_rounds), with this instruction.
        pub(crate) fn rounds(self, rounds: u64) -> u64 {
            // SAFETY: as above.
            unsafe { rounds_(rounds) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn blocked<const MR: usize, const NV: usize>(a: &[f32], b: &[f32], acc: &mut [f32]) {
        let mut c = get::<MR, NV>(acc);
        for (a, b) in a.chunks_exact(MR * K_RUN).zip(b.chunks_exact(NV * LANES * K_RUN)) {
            for k in 0..K_RUN {
                let row = vectors::<NV>(&b[k * NV * LANES..]);
                for r in 0..MR {
                    let x = _mm512_set1_ps(a[r * K_RUN + k]);
                    for v in 0..NV {
                        c[r][v] = _mm512_dpbf16_ps(c[r][v], pairs(x), pairs(row[v]));
                    }
                }
            }
        }
        put(&c, acc);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn columns<const MR: usize, const NV: usize>(a: &[f32], b: &[f32], acc: &mut [f32]) {
        let mut c = get::<MR, NV>(acc);
        for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NV * LANES)) {
            let row = vectors::<NV>(b);
            for r in 0..MR {
                let x = _mm512_set1_ps(a[r]);
                for v in 0..NV {
                    c[r][v] = _mm512_dpbf16_ps(c[r][v], pairs(x), pairs(row[v]));
                }
            }
        }
        put(&c, acc);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn rounds_(rounds: u64) -> u64 {
        const SUMS: usize = 12;
        let a = pairs(_mm512_set1_ps(std::hint::black_box(0.5)));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        std::hint::black_box(sums);
        rounds * (4 * SUMS * LANES) as u64
    }

    /// The same bits, as pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pairs(x: __m512) -> __m512bh {
        // SAFETY: both are 64 bytes, any of whose bits are valid.
        unsafe { std::mem::transmute(x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn vectors<const NV: usize>(b: &[f32]) -> [__m512; NV] {
        let b = &b[..NV * LANES];
        let mut row = [_mm512_setzero_ps(); NV];
        for v in 0..NV {
            // SAFETY: v * LANES .. + LANES is inside of the slice, whose length was just checked.
            row[v] = unsafe { _mm512_loadu_ps(b.as_ptr().add(v * LANES)) };
        }
        row
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn get<const MR: usize, const NV: usize>(acc: &[f32]) -> [[__m512; NV]; MR] {
        let acc = &acc[..MR * NV * LANES];
        let mut c = [[_mm512_setzero_ps(); NV]; MR];
        for r in 0..MR {
            c[r] = vectors::<NV>(&acc[r * NV * LANES..]);
        }
        c
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn put<const MR: usize, const NV: usize>(c: &[[__m512; NV]; MR], acc: &mut [f32]) {
        let acc = &mut acc[..MR * NV * LANES];
        for (c, to) in c.as_flattened().iter().zip(acc.chunks_exact_mut(LANES)) {
            // SAFETY: the chunk has LANES numbers.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), *c) }
        }
    }
}

/// As [`multiply_add_rounds`](crate::elementwise::multiply_add_rounds), of pairs where the machine has an instruction
/// for them.
pub fn multiply_add_rounds(isa: Isa, rounds: u64) -> Option<u64> {
    isa.bf16().map(|native| native.rounds(rounds))
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
