//! Tests every kernel against its naive version (`ddpm_kernels::reference`), on every instruction set of this
//! machine.
//!
//! Outputs and scratch memory hold NaN before each call, so that elements that are not written, or read
//! before they are written, are noticed. The worst error of each comparison is printed (`-- --nocapture`).
#![allow(missing_docs, reason = "internal to the tests")]

mod activation;
mod attention;
mod bf16;
mod conv;
mod dropout;
mod elementwise;
mod loss;
mod norm;
mod resample;
mod rows;
mod winograd;

use ddpm_kernels::Isa;
use std::fmt::Debug;

/// Xorshift (Marsaglia 2003): the tests need values without a pattern, not good randomness.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    /// Uniform in [-1, 1), using all bits of the mantissa.
    pub fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as i64 as f64 / -(i64::MIN as f64)) as f32).collect()
    }
}

/// Converts to f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Absolute values in f64.
pub fn magnitudes(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v).abs()).collect()
}

/// `n` times NaN.
pub fn unwritten(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

/// Which elements are NaN.
pub fn nans(x: impl IntoIterator<Item = f64>) -> Vec<bool> {
    x.into_iter().map(f64::is_nan).collect()
}

/// The bits of every element, to also compare NaN and signed zeros.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// A comparison with a bound: `|got - want| <= bound * f32::EPSILON * magnitude`.
pub struct Within {
    what: &'static str,
    bound: f64,
    worst: f64,
    compared: usize,
}

impl Within {
    pub fn new(what: &'static str, bound: f64) -> Self {
        Self { what, bound, worst: 0.0, compared: 0 }
    }

    pub fn check(
        &mut self,
        isa: Isa,
        case: &(impl Debug + ?Sized),
        got: &[f32],
        want: &[f64],
        magnitude: &[f64],
    ) {
        assert_eq!((got.len(), got.len()), (want.len(), magnitude.len()), "{}: {case:?}", self.what);
        for (at, ((&got, &want), &magnitude)) in got.iter().zip(want).zip(magnitude).enumerate() {
            // The second term covers subnormal results.
            let unit = f64::from(f32::EPSILON) * magnitude + f64::from(f32::MIN_POSITIVE) * 1e-3;
            let error = (f64::from(got) - want).abs() / unit;
            assert!(
                error <= self.bound,
                "{} on {isa}, {case:?}: element {at} is {got}, expected {want}: {error:.1} of {} allowed units",
                self.what,
                self.bound
            );
            self.worst = self.worst.max(error);
        }
        self.compared += got.len();
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        println!("{}: worst {:.2} of {} in {} values", self.what, self.worst, self.bound, self.compared);
    }
}

/// Every test below runs on `Isa::all()`, so none may be missing there.
#[test]
fn the_instruction_sets_of_this_machine_are_covered() {
    let mut expected = vec!["portable"];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            expected.push("avx2");
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            expected.push("avx512");
            if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni") {
                expected.push("avx512bf16");
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    expected.push("neon");
    expected.reverse();
    let all: Vec<&str> = Isa::all().iter().map(|isa| isa.name()).collect();
    println!("instruction sets: {all:?}");
    assert_eq!(all, expected);
}
