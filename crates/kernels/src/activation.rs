//! Activation functions, forward and backward.

use crate::isa::{Isa, dispatch};
use crate::vector::{self, map2};
use pulp::Simd;

/// An elementwise activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)` (Elfwing et al. 2018).
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)` with the exact normal CDF, not its tanh approximation (Hendrycks and Gimpel 2016).
    Gelu,
    /// `x tanh(ln(1 + e^x))` (Misra 2019).
    Mish,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Self; 4] = [Self::Silu, Self::Relu, Self::Gelu, Self::Mish];

    /// Its name in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Relu => "relu",
            Self::Gelu => "gelu",
            Self::Mish => "mish",
        }
    }
}

/// `y = act(x)`.
pub fn activate(isa: Isa, act: Activation, x: &[f32], y: &mut [f32]) {
    dispatch!(isa, s => forward(s, act, x, y))
}

/// `g = dy * act'(x)`; `g` holds `dy` on entry.
pub fn activate_backward(isa: Isa, act: Activation, x: &[f32], g: &mut [f32]) {
    dispatch!(isa, s => backward(s, act, x, g))
}

#[inline(always)]
fn forward<S: Simd>(s: S, act: Activation, x: &[f32], y: &mut [f32]) {
    match act {
        Activation::Silu => map2(
            s,
            y,
            x,
            #[inline(always)]
            |_, x| vector::silu(s, x),
        ),
        Activation::Relu => map2(
            s,
            y,
            x,
            #[inline(always)]
            |_, x| vector::relu(s, x),
        ),
        Activation::Gelu => map2(
            s,
            y,
            x,
            #[inline(always)]
            |_, x| vector::gelu(s, x),
        ),
        Activation::Mish => map2(
            s,
            y,
            x,
            #[inline(always)]
            |_, x| vector::mish(s, x),
        ),
    }
}

#[inline(always)]
fn backward<S: Simd>(s: S, act: Activation, x: &[f32], g: &mut [f32]) {
    match act {
        Activation::Silu => map2(
            s,
            g,
            x,
            #[inline(always)]
            |g, x| s.mul_f32s(g, vector::silu_derivative(s, x)),
        ),
        Activation::Relu => map2(
            s,
            g,
            x,
            #[inline(always)]
            |g, x| s.mul_f32s(g, vector::relu_derivative(s, x)),
        ),
        Activation::Gelu => map2(
            s,
            g,
            x,
            #[inline(always)]
            |g, x| s.mul_f32s(g, vector::gelu_derivative(s, x)),
        ),
        Activation::Mish => map2(
            s,
            g,
            x,
            #[inline(always)]
            |g, x| s.mul_f32s(g, vector::mish_derivative(s, x)),
        ),
    }
}
