//! The linear transforms of F(4x4, 3x3) and F(4x4, 2x2): in one dimension, then by rows and columns.
//!
//! A convolution of a row with R weights that makes M outputs is a product of polynomials, and a product of
//! polynomials is determined by its values at M + R - 1 points (Toom and Cook; Winograd 1980; for images
//! Lavin and Gray, arXiv:1509.09308), infinity among them. The points are chosen for small rounding errors in
//! f32: near 1, few digits, and in pairs a, -a, whose values share their even and odd parts.

use super::M;
use pulp::Simd;

/// Defines a two-dimensional transform: applies the one-dimensional one to all columns of `get(row, column)`,
/// then to all rows of the result, which go to `put(row, column, vector)`. The columns and rows are unrolled
/// by hand, because the intermediate values stay in registers only without loops.
macro_rules! both_ways {
    ($name:ident, $line:ident, [$($column:literal)*] -> [$($row:literal)*]) => {
        #[inline(always)]
        fn $name<S: Simd>(
            s: S,
            get: impl Fn(usize, usize) -> S::f32s,
            mut put: impl FnMut(usize, usize, S::f32s),
        ) {
            const FROM: usize = [$($column),*].len();
            let mut lines = [[s.splat_f32s(0.0); FROM]; [$($row),*].len()];
            $(
                let mut column = [s.splat_f32s(0.0); FROM];
                for i in 0..FROM {
                    column[i] = get(i, $column);
                }
                let column = Self::$line(s, column);
                for i in 0..column.len() {
                    lines[i][$column] = column[i];
                }
            )*
            $(
                let row = Self::$line(s, lines[$row]);
                for j in 0..row.len() {
                    put($row, j, row[j]);
                }
            )*
        }
    };
}

/// Declares the two-dimensional transforms of a trait, which [`both_ways`] defines.
macro_rules! maps {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $(
            $(#[$doc])*
            fn $name<S: Simd>(s: S, get: impl Fn(usize, usize) -> S::f32s, put: impl FnMut(usize, usize, S::f32s));
        )*
    };
}

/// The transforms of F(M x M, R x R) with `D = M + R - 1` points a row.
pub trait Maps<const D: usize, const R: usize>: Copy {
    /// `B^T d`.
    fn input_line<S: Simd>(s: S, d: [S::f32s; D]) -> [S::f32s; D];
    /// `G g`.
    fn weights_line<S: Simd>(s: S, g: [S::f32s; R]) -> [S::f32s; D];
    /// `A^T m`.
    fn output_line<S: Simd>(s: S, m: [S::f32s; D]) -> [S::f32s; M];
    /// `A y`.
    fn output_grad_line<S: Simd>(s: S, y: [S::f32s; M]) -> [S::f32s; D];
    /// `G^T u`.
    fn weights_grad_line<S: Simd>(s: S, u: [S::f32s; D]) -> [S::f32s; R];

    maps! {
        /// `B^T d B`: inputs to their values at the points.
        input;
        /// `G g G^T`: weights to their values at the points.
        weights;
        /// `A^T m A`: products of the values to outputs.
        output;
        /// `A y A^T`, the transpose of the output transform: gradients of outputs to gradients of products.
        output_grad;
        /// `G^T u G`, the transpose of the weight transform: gradients of the values to gradients of weights.
        weights_grad;
    }
}

/// `c x`.
#[inline(always)]
fn times<S: Simd>(s: S, c: f32, x: S::f32s) -> S::f32s {
    s.mul_f32s(s.splat_f32s(c), x)
}

/// `c x + y`.
#[inline(always)]
fn fma<S: Simd>(s: S, c: f32, x: S::f32s, y: S::f32s) -> S::f32s {
    s.mul_add_e_f32s(s.splat_f32s(c), x, y)
}

/// F(4x4, 3x3), with the points 0, a, -a, b, -b and infinity. The customary a = 1, b = 2 gives small integers
/// but doubles the rounding error: a = 3/4, b = 3/2 are just as exact in f32 and keep the points close to 1.
#[derive(Clone, Copy)]
pub struct F43;

impl Maps<6, 3> for F43 {
    both_ways! { input, input_line, [0 1 2 3 4 5] -> [0 1 2 3 4 5] }
    both_ways! { weights, weights_line, [0 1 2] -> [0 1 2 3 4 5] }
    both_ways! { output, output_line, [0 1 2 3 4 5] -> [0 1 2 3] }
    both_ways! { output_grad, output_grad_line, [0 1 2 3] -> [0 1 2 3 4 5] }
    both_ways! { weights_grad, weights_grad_line, [0 1 2 3 4 5] -> [0 1 2] }

    #[inline(always)]
    fn input_line<S: Simd>(s: S, d: [S::f32s; 6]) -> [S::f32s; 6] {
        let (even_a, odd_a) = (fma(s, -B2, d[2], d[4]), fma(s, -B2, d[1], d[3]));
        let (even_b, odd_b) = (fma(s, -A2, d[2], d[4]), fma(s, -A2, d[1], d[3]));
        [
            fma(s, A2 * B2, d[0], fma(s, -(A2 + B2), d[2], d[4])),
            fma(s, A, odd_a, even_a),
            fma(s, -A, odd_a, even_a),
            fma(s, B, odd_b, even_b),
            fma(s, -B, odd_b, even_b),
            fma(s, A2 * B2, d[1], fma(s, -(A2 + B2), d[3], d[5])),
        ]
    }

    #[inline(always)]
    fn weights_line<S: Simd>(s: S, g: [S::f32s; 3]) -> [S::f32s; 6] {
        let even_a = times(s, OF_A, fma(s, A2, g[2], g[0]));
        let even_b = times(s, OF_B, fma(s, B2, g[2], g[0]));
        [
            times(s, OF_ZERO, g[0]),
            fma(s, A * OF_A, g[1], even_a),
            fma(s, -A * OF_A, g[1], even_a),
            fma(s, B * OF_B, g[1], even_b),
            fma(s, -B * OF_B, g[1], even_b),
            g[2],
        ]
    }

    #[inline(always)]
    fn output_line<S: Simd>(s: S, m: [S::f32s; 6]) -> [S::f32s; 4] {
        let (even_a, odd_a) = (s.add_f32s(m[1], m[2]), s.sub_f32s(m[1], m[2]));
        let (even_b, odd_b) = (s.add_f32s(m[3], m[4]), s.sub_f32s(m[3], m[4]));
        [
            s.add_f32s(m[0], s.add_f32s(even_a, even_b)),
            fma(s, A, odd_a, times(s, B, odd_b)),
            fma(s, A2, even_a, times(s, B2, even_b)),
            fma(s, A3, odd_a, fma(s, B3, odd_b, m[5])),
        ]
    }

    #[inline(always)]
    fn output_grad_line<S: Simd>(s: S, y: [S::f32s; 4]) -> [S::f32s; 6] {
        let (even_a, odd_a) = (fma(s, A2, y[2], y[0]), fma(s, A3, y[3], times(s, A, y[1])));
        let (even_b, odd_b) = (fma(s, B2, y[2], y[0]), fma(s, B3, y[3], times(s, B, y[1])));
        [
            y[0],
            s.add_f32s(even_a, odd_a),
            s.sub_f32s(even_a, odd_a),
            s.add_f32s(even_b, odd_b),
            s.sub_f32s(even_b, odd_b),
            y[3],
        ]
    }

    #[inline(always)]
    fn weights_grad_line<S: Simd>(s: S, u: [S::f32s; 6]) -> [S::f32s; 3] {
        let (even_a, odd_a) = (times(s, OF_A, s.add_f32s(u[1], u[2])), s.sub_f32s(u[1], u[2]));
        let (even_b, odd_b) = (times(s, OF_B, s.add_f32s(u[3], u[4])), s.sub_f32s(u[3], u[4]));
        [
            fma(s, OF_ZERO, u[0], s.add_f32s(even_a, even_b)),
            fma(s, A * OF_A, odd_a, times(s, B * OF_B, odd_b)),
            fma(s, A2, even_a, fma(s, B2, even_b, u[5])),
        ]
    }
}

const A: f32 = 0.75;
const B: f32 = 1.5;
const A2: f32 = A * A;
const B2: f32 = B * B;
const A3: f32 = A * A * A;
const B3: f32 = B * B * B;
/// Divisor of the values at each point, on the weights' side: the product of its distances to the others.
const OF_ZERO: f32 = 1.0 / (A2 * B2);
const OF_A: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
const OF_B: f32 = 1.0 / (2.0 * B2 * (B2 - A2));

/// F(4x4, 2x2), with the points p, -p, q, -q and infinity: p = 1/2, q = 5/4 have the smallest error among
/// multiples of 1/4, less than twice that of direct convolution.
#[derive(Clone, Copy)]
pub struct F42;

impl Maps<5, 2> for F42 {
    both_ways! { input, input_line, [0 1 2 3 4] -> [0 1 2 3 4] }
    both_ways! { weights, weights_line, [0 1] -> [0 1 2 3 4] }
    both_ways! { output, output_line, [0 1 2 3 4] -> [0 1 2 3] }
    both_ways! { output_grad, output_grad_line, [0 1 2 3] -> [0 1 2 3 4] }
    both_ways! { weights_grad, weights_grad_line, [0 1 2 3 4] -> [0 1] }

    #[inline(always)]
    fn input_line<S: Simd>(s: S, d: [S::f32s; 5]) -> [S::f32s; 5] {
        let (even_p, odd_p) = (fma(s, -P2, d[0], d[2]), fma(s, -P2, d[1], d[3]));
        let (even_q, odd_q) = (fma(s, -Q2, d[0], d[2]), fma(s, -Q2, d[1], d[3]));
        [
            fma(s, P, even_q, odd_q),
            fma(s, -P, even_q, odd_q),
            fma(s, Q, even_p, odd_p),
            fma(s, -Q, even_p, odd_p),
            fma(s, P2 * Q2, d[0], fma(s, -(P2 + Q2), d[2], d[4])),
        ]
    }

    #[inline(always)]
    fn weights_line<S: Simd>(s: S, g: [S::f32s; 2]) -> [S::f32s; 5] {
        let (zeroth_p, first_p) = (times(s, OF_P, g[0]), times(s, P * OF_P, g[1]));
        let (zeroth_q, first_q) = (times(s, OF_Q, g[0]), times(s, Q * OF_Q, g[1]));
        [
            s.add_f32s(first_p, zeroth_p),
            s.sub_f32s(first_p, zeroth_p),
            s.add_f32s(first_q, zeroth_q),
            s.sub_f32s(first_q, zeroth_q),
            g[1],
        ]
    }

    #[inline(always)]
    fn output_line<S: Simd>(s: S, m: [S::f32s; 5]) -> [S::f32s; M] {
        let (even_p, odd_p) = (s.add_f32s(m[0], m[1]), s.sub_f32s(m[0], m[1]));
        let (even_q, odd_q) = (s.add_f32s(m[2], m[3]), s.sub_f32s(m[2], m[3]));
        [
            s.add_f32s(even_p, even_q),
            fma(s, P, odd_p, times(s, Q, odd_q)),
            fma(s, P2, even_p, times(s, Q2, even_q)),
            fma(s, P3, odd_p, fma(s, Q3, odd_q, m[4])),
        ]
    }

    #[inline(always)]
    fn output_grad_line<S: Simd>(s: S, y: [S::f32s; M]) -> [S::f32s; 5] {
        let (even_p, odd_p) = (fma(s, P2, y[2], y[0]), fma(s, P3, y[3], times(s, P, y[1])));
        let (even_q, odd_q) = (fma(s, Q2, y[2], y[0]), fma(s, Q3, y[3], times(s, Q, y[1])));
        [
            s.add_f32s(even_p, odd_p),
            s.sub_f32s(even_p, odd_p),
            s.add_f32s(even_q, odd_q),
            s.sub_f32s(even_q, odd_q),
            y[3],
        ]
    }

    #[inline(always)]
    fn weights_grad_line<S: Simd>(s: S, u: [S::f32s; 5]) -> [S::f32s; 2] {
        let (even_p, odd_p) = (s.add_f32s(u[0], u[1]), s.sub_f32s(u[0], u[1]));
        let (even_q, odd_q) = (s.add_f32s(u[2], u[3]), s.sub_f32s(u[2], u[3]));
        [fma(s, OF_P, odd_p, times(s, OF_Q, odd_q)), fma(s, P * OF_P, even_p, fma(s, Q * OF_Q, even_q, u[4]))]
    }
}

const P: f32 = 0.5;
const Q: f32 = 1.25;
const P2: f32 = P * P;
const Q2: f32 = Q * Q;
const P3: f32 = P * P * P;
const Q3: f32 = Q * Q * Q;
const OF_P: f32 = 1.0 / (2.0 * P * (P2 - Q2));
const OF_Q: f32 = 1.0 / (2.0 * Q * (Q2 - P2));
