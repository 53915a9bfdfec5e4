//! Vector math shared by several kernels.

use pulp::Simd;

/// Maximum error of [`exp`] in ULP, over the range with normal results. (Over all f32 it is 2.74, and 3.03
/// without fused multiply-add.)
pub const EXP_ULP: u32 = 4;

/// `e^x` of every lane. Below -87.3 the result is 0; above 88.37 it stays at e^88.37 = 2.4e38; NaN stays NaN.
///
/// `e^x = 2^n e^r` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`; `e^r` by its Taylor polynomial of degree
/// 6 in Horner form, with `ln 2` split in two parts so that `r` is exact to the last bits (Cody and Waite).
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to an integer, which ends up in the low bits of the mantissa.
    let magic = s.splat_f32s(12_582_912.0);
    // A comparison, because min with NaN returns a number on some machines. No clamp from below is needed:
    // those results are replaced by 0.
    let largest = s.splat_f32s(88.37);
    let clamped = s.select_f32s(s.greater_than_f32s(x, largest), largest, x);
    let shifted = s.mul_add_e_f32s(clamped, s.splat_f32s(std::f32::consts::LOG2_E), magic);
    let n = s.sub_f32s(shifted, magic);
    let r = s.mul_add_e_f32s(n, s.splat_f32s(-0.693_359_4), clamped);
    let r = s.mul_add_e_f32s(n, s.splat_f32s(2.121_944_4e-4), r);
    let mut p = s.splat_f32s(1.0 / 720.0);
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.mul_add_e_f32s(p, r, s.splat_f32s(c));
    }
    // 2^n: shifts the low bits of n + 127 into the exponent field. It is in range wherever the result is
    // used.
    let bits = s.transmute_u32s_f32s(s.add_f32s(shifted, s.splat_f32s(127.0)));
    let scale = s.transmute_f32s_u32s(s.wrapping_dyn_shl_u32s(bits, s.splat_u32s(23)));
    let y = s.mul_f32s(p, scale);
    s.select_f32s(s.less_than_f32s(x, s.splat_f32s(-87.3)), s.splat_f32s(0.0), y)
}

/// Maximum error of [`exp2`] in ULP, for x from -125 to 127.
pub const EXP2_ULP: u32 = 3;

/// `2^x` of every lane for x up to 127, clamped to 2^-125 from below. Fewer instructions than [`exp`] at
/// nearly its accuracy, for softmax. A NaN stays NaN unless it has a payload in the low bits.
///
/// `2^x = 2^n 2^r` with `n = round(x)` and `|r| <= 1/2`, which is exact; `2^r` by a polynomial of degree 5
/// that is 1 at 0, fitted by `tools/fit/exp2.py` (relative error 9.2e-8); n is added to its exponent.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    exp2_unclamped(s, clamp_min(s, -125.0, x))
}

/// Maximum of every lane and a scalar; NaN stays NaN.
#[inline(always)]
pub fn clamp_min<S: Simd>(s: S, least: f32, x: S::f32s) -> S::f32s {
    let least = s.splat_f32s(least);
    // On x86 max with a NaN returns the second operand, elsewhere NaN, except for the scalar one, which drops
    // it.
    match S::F32_LANES {
        1 => s.select_f32s(s.less_than_f32s(x, least), least, x),
        _ => s.max_f32s(least, x),
    }
}

/// [`exp2`] for x known to be at least -125.
#[inline(always)]
#[allow(clippy::approx_constant, reason = "a fitted coefficient near ln 2, not ln 2")]
pub fn exp2_unclamped<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    exp2_by(s, x, [0.001_326_472_7, 0.009_671_513, 0.055_507_337, 0.240_222_42, 0.693_147])
}

/// Maximum relative error of [`exp2_unclamped_fast`].
pub const EXP2_FAST_ERROR: f64 = 1.1e-4;

/// [`exp2_unclamped`] with a polynomial of degree 3, for operands that are then rounded to bf16, which is ten
/// times coarser.
#[inline(always)]
#[allow(clippy::approx_constant, reason = "a fitted coefficient near ln 2, not ln 2")]
pub fn exp2_unclamped_fast<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    exp2_by(s, x, [0.055_008_93, 0.242_210_96, 0.693_282_9])
}

/// `2^x` by a polynomial with these coefficients, highest power first, then 1.
#[inline(always)]
fn exp2_by<S: Simd, const N: usize>(s: S, x: S::f32s, coefficients: [f32; N]) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to an integer, which ends up in the low bits of the mantissa.
    let magic = s.splat_f32s(12_582_912.0);
    let shifted = s.add_f32s(x, magic);
    let r = s.sub_f32s(x, s.sub_f32s(shifted, magic));
    let mut p = s.splat_f32s(coefficients[0]);
    for i in 1..N {
        p = s.mul_add_e_f32s(p, r, s.splat_f32s(coefficients[i]));
    }
    p = s.mul_add_e_f32s(p, r, s.splat_f32s(1.0));
    let n = s.wrapping_dyn_shl_u32s(s.transmute_u32s_f32s(shifted), s.splat_u32s(23));
    s.transmute_f32s_u32s(s.add_u32s(s.transmute_u32s_f32s(p), n))
}

/// `1 / (1 + e^-x)` of every lane.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let one = s.splat_f32s(1.0);
    s.div_f32s(one, s.add_f32s(one, exp(s, s.neg_f32s(x))))
}

/// SiLU, `x sigmoid(x)`, of every lane.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    s.mul_f32s(x, sigmoid(s, x))
}

/// The derivative of SiLU: `sigmoid(x) (1 + x (1 - sigmoid(x)))`.
#[inline(always)]
pub fn silu_derivative<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let one = s.splat_f32s(1.0);
    let g = sigmoid(s, x);
    s.mul_f32s(g, s.mul_add_e_f32s(x, s.sub_f32s(one, g), one))
}

/// Standard normal CDF `Phi(x)` and density `phi(x)` of every lane.
///
/// `Phi(-z) = e^(-z^2 / 2) p(t)` for `z >= 0` with `t = 1 / (1 + 0.35 z)` and a polynomial p of degree 9,
/// fitted by `tools/fit/normal_cdf.py` (relative error 3.2e-8 up to z = 14, beyond which results are
/// subnormal in f32).
#[inline(always)]
pub fn normal<S: Simd>(s: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let (one, half) = (s.splat_f32s(1.0), s.splat_f32s(0.5));
    let z = s.abs_f32s(x);
    let bell = exp(s, s.neg_f32s(s.mul_f32s(half, s.mul_f32s(z, z))));
    let t = s.div_f32s(one, s.mul_add_e_f32s(s.splat_f32s(0.35), z, one));
    let mut p = s.splat_f32s(-0.029_146_135);
    for c in [
        0.143_972_68,
        -0.255_716_26,
        0.159_176_43,
        -0.023_111_373,
        0.105_508_64,
        0.119_832_71,
        0.139_861_9,
        0.139_621_4,
    ] {
        p = s.mul_add_e_f32s(p, t, s.splat_f32s(c));
    }
    let below = s.mul_f32s(bell, s.mul_f32s(p, t));
    let positive = s.greater_than_f32s(x, s.splat_f32s(0.0));
    let cdf = s.select_f32s(positive, s.sub_f32s(one, below), below);
    (cdf, s.mul_f32s(bell, s.splat_f32s(0.398_942_3)))
}

/// GELU, `x Phi(x)` (Hendrycks and Gimpel 2016), of every lane.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    s.mul_f32s(x, normal(s, x).0)
}

/// The derivative of GELU: `Phi(x) + x phi(x)`.
#[inline(always)]
pub fn gelu_derivative<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let (cdf, density) = normal(s, x);
    s.mul_add_e_f32s(x, density, cdf)
}

/// `tanh(ln(1 + e^x)) = n / (n + 2)` with `n = e^x (e^x + 2)`, and `e^x`. The exponent is clamped to 20,
/// where the quotient is 1 and n still finite.
#[inline(always)]
fn tanh_softplus<S: Simd>(s: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let (two, max) = (s.splat_f32s(2.0), s.splat_f32s(20.0));
    let e = exp(s, s.select_f32s(s.greater_than_f32s(x, max), max, x));
    let n = s.mul_f32s(e, s.add_f32s(e, two));
    (s.div_f32s(n, s.add_f32s(n, two)), e)
}

/// Mish, `x tanh(ln(1 + e^x))` (Misra 2019), of every lane.
#[inline(always)]
pub fn mish<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    s.mul_f32s(x, tanh_softplus(s, x).0)
}

/// The derivative of Mish: with `w = tanh(ln(1 + e^x))`, `w + x (1 - w^2) sigmoid(x)`.
#[inline(always)]
pub fn mish_derivative<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let (w, e) = tanh_softplus(s, x);
    // 1 - w^2 without cancellation: 4 (n + 1) / (n + 2)^2 with n + 1 = (e + 1)^2; times sigmoid(x) = e / (e + 1).
    let (one, two) = (s.splat_f32s(1.0), s.splat_f32s(2.0));
    let n2 = s.mul_add_e_f32s(e, s.add_f32s(e, two), two);
    let slope = s.mul_f32s(s.splat_f32s(4.0), s.mul_f32s(e, s.add_f32s(e, one)));
    let slope = s.div_f32s(s.div_f32s(slope, n2), n2);
    s.mul_add_e_f32s(x, slope, w)
}

/// ReLU, `max(x, 0)`, of every lane.
#[inline(always)]
pub fn relu<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    let zero = s.splat_f32s(0.0);
    // Not a max, so that NaN stays NaN.
    s.select_f32s(s.less_than_f32s(x, zero), zero, x)
}

/// The derivative of ReLU: 1 above 0, else 0.
#[inline(always)]
pub fn relu_derivative<S: Simd>(s: S, x: S::f32s) -> S::f32s {
    s.select_f32s(s.greater_than_f32s(x, s.splat_f32s(0.0)), s.splat_f32s(1.0), s.splat_f32s(0.0))
}

/// Applies `f` to full vectors of `y` and `x`, then to the zero-padded tail, and stores into `y`.
#[inline(always)]
pub fn map2<S: Simd>(s: S, y: &mut [f32], x: &[f32], f: impl Fn(S::f32s, S::f32s) -> S::f32s) {
    assert_eq!(y.len(), x.len());
    let (y_body, y_tail) = S::as_mut_simd_f32s(y);
    let (x_body, x_tail) = S::as_simd_f32s(x);
    for (y, x) in y_body.iter_mut().zip(x_body) {
        *y = f(*y, *x);
    }
    if !y_tail.is_empty() {
        let v = f(s.partial_load_f32s(y_tail), s.partial_load_f32s(x_tail));
        s.partial_store_f32s(y_tail, v);
    }
}

/// Folds runs of 4096 pairs of elements into a total, lane by lane, and adds the totals in f64. `f` must not
/// change the total for a pair of zeros, which pad the last vector.
#[inline(always)]
pub fn fold2<S: Simd>(s: S, a: &[f32], b: &[f32], f: impl Fn(S::f32s, S::f32s, S::f32s) -> S::f32s) -> f64 {
    let mut sum = 0.0;
    for (a, b) in a.chunks(4096).zip(b.chunks(4096)) {
        let ((a, a_tail), (b, b_tail)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
        let mut total = f(s.partial_load_f32s(a_tail), s.partial_load_f32s(b_tail), s.splat_f32s(0.0));
        for (a, b) in a.iter().zip(b) {
            total = f(*a, *b, total);
        }
        sum += f64::from(s.reduce_sum_f32s(total));
    }
    sum
}

/// The sum of a slice: lane by lane, then over the lanes.
#[inline(always)]
pub fn sum<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (body, tail) = S::as_simd_f32s(x);
    let mut total = s.partial_load_f32s(tail);
    for v in body {
        total = s.add_f32s(total, *v);
    }
    s.reduce_sum_f32s(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, dispatch};

    /// `exp2` of every element.
    fn exp2_of(isa: Isa, x: &[f32]) -> Vec<f32> {
        #[inline(always)]
        fn run<S: Simd>(s: S, y: &mut [f32], x: &[f32]) {
            map2(
                s,
                y,
                x,
                #[inline(always)]
                |_, x| exp2(s, x),
            );
        }
        let mut y = vec![f32::NAN; x.len()];
        dispatch!(isa, s => run(s, &mut y, x));
        y
    }

    #[test]
    fn exp2_error_is_within_bound() {
        let steps = 1_000_003;
        let x: Vec<f32> = (0..=steps).map(|i| -125.0 + 252.0 * (i as f32 / steps as f32)).collect();
        for isa in Isa::all() {
            let mut worst = 0.0_f64;
            for (x, y) in x.iter().zip(exp2_of(isa, &x)) {
                let want = f64::from(*x).exp2();
                let ulp = 2f64.powf(want.log2().floor() - 23.0);
                let error = (f64::from(y) - want).abs() / ulp;
                assert!(error <= f64::from(EXP2_ULP), "{isa}: 2^{x} = {y}, not {want}: {error} ulp");
                worst = worst.max(error);
            }
            println!("exp2 on {isa}: worst {worst:.2} ulp");
        }
    }

    #[test]
    fn exp2_is_exact_for_integers_clamped_and_keeps_nan() {
        for isa in Isa::all() {
            for n in -125..=127 {
                assert_eq!(exp2_of(isa, &[n as f32; 17]), [2f32.powi(n); 17], "{isa}");
            }
            for x in [-125.1, -126.0, -1e3, -1e30, f32::MIN, f32::NEG_INFINITY] {
                assert_eq!(exp2_of(isa, &[x; 17]), [2f32.powi(-125); 17], "{isa}: 2^{x}");
            }
            assert!(exp2_of(isa, &[f32::NAN, -f32::NAN]).iter().all(|y| y.is_nan()), "{isa}");
        }
    }
}
