//! Every kernel against its naive version (`ddpm_kernels::reference`), on every instruction set of this machine.
//!
//! Outputs and scratch memory hold NaN before each call, so that a number that is left out, or that is read without
//! having been written, is noticed. The worst error of each comparison is printed (`-- --nocapture`).
#![allow(missing_docs, reason = "nothing here is for others")]

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

/// Xorshift (Marsaglia 2003): the tests need numbers without pattern, not good ones.
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

    /// Uniform numbers in [-1, 1), with all bits of the mantissa in use.
    pub fn vec(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as i64 as f64 / -(i64::MIN as f64)) as f32).collect()
    }
}

/// The same numbers in f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Their absolute values in f64.
pub fn magnitudes(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v).abs()).collect()
}

/// `n` times NaN.
pub fn unwritten(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

/// The places that hold NaN.
pub fn nans(x: impl IntoIterator<Item = f64>) -> Vec<bool> {
    x.into_iter().map(f64::is_nan).collect()
}

/// The bits of every number, to compare NaN and signs of zero too.
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
            // The second term: below it the result is no normal number.
            let unit = f64::from(f32::EPSILON) * magnitude + f64::from(f32::MIN_POSITIVE) * 1e-3;
            let error = (f64::from(got) - want).abs() / unit;
            assert!(
                error <= self.bound,
                "{} on {isa}, {case:?}: number {at} is {got}, not {want}: {error:.1} of {} allowed units",
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
        println!("{}: worst {:.2} of {} in {} numbers", self.what, self.worst, self.bound, self.compared);
    }
}

#[test]
fn the_instruction_sets_of_this_machine_are_covered() {
    let all = Isa::all();
    println!("instruction sets: {all:?}");
    assert!(all.iter().any(|isa| isa.name() == "portable"));
}
