//! Activations, and arithmetic on elements and rows.

use crate::activation::Activation;

/// `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x sigmoid(x)`.
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// The derivative of [`silu`]: `sigmoid(x) + x sigmoid(x) (1 - sigmoid(x))`.
pub fn silu_derivative(x: f64) -> f64 {
    sigmoid(x) + x * sigmoid(x) * sigmoid(-x)
}

/// Standard normal CDF.
pub fn normal_cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x / std::f64::consts::SQRT_2)
}

/// The activation function.
pub fn activate(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => silu(x),
        Activation::Relu => x.max(0.0),
        Activation::Gelu => x * normal_cdf(x),
        Activation::Mish => x * x.exp().ln_1p().tanh(),
    }
}

/// The derivative of [`activate`]; ReLU's at 0 is 0.
pub fn activation_derivative(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => silu_derivative(x),
        Activation::Relu => f64::from(x > 0.0),
        Activation::Gelu => normal_cdf(x) + x * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt(),
        Activation::Mish => {
            let w = x.exp().ln_1p().tanh();
            w + x * (1.0 - w * w) * sigmoid(x)
        }
    }
}

/// `a x + b y`.
pub fn combine(a: f64, x: &[f64], b: f64, y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| a * x + b * y).collect()
}

/// `y[r, c] = x[r, c] + row[c]`.
pub fn add_rows(row: &[f64], x: &[f64]) -> Vec<f64> {
    x.iter().enumerate().map(|(at, x)| x + row[at % row.len()]).collect()
}

/// `y[c] = sum over r of x[r, c]`: the gradient of [`add_rows`] with respect to `row`.
pub fn sum_rows(x: &[f64], columns: usize) -> Vec<f64> {
    let mut y = vec![0.0; columns];
    for (at, x) in x.iter().enumerate() {
        y[at % columns] += x;
    }
    y
}
