//! Activation functions and their derivatives.

use crate::elementwise::{lengths, map, sweep};
use crate::{Rng, Within, magnitudes, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::activation::{Activation, activate, activate_backward};
use ddpm_kernels::reference::{self, normal_cdf, sigmoid};

/// Bound for values and derivatives, in the units of [`magnitude`] and [`derivative_magnitude`]: an
/// exponential, a division and a few roundings.
const BOUND: f64 = 6.0;

/// The unit of rounding errors of `act(x)`. A relative error of `x^2 / 2` is magnified by `x^2 / 2` in
/// `e^(-x^2 / 2)`.
fn magnitude(act: Activation, x: f64) -> f64 {
    let y = reference::activate(act, x).abs();
    if act == Activation::Gelu && x < 0.0 { y * (1.0 + x * x / 2.0) } else { y }
}

/// The derivative with the absolute value of every term.
fn derivative_magnitude(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => sigmoid(x) * (1.0 + x.abs()),
        Activation::Relu => 1.0,
        Activation::Gelu => {
            let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
            (normal_cdf(x) + x.abs() * density) * (1.0 + x * x / 2.0)
        }
        Activation::Mish => {
            let w = x.exp().ln_1p().tanh();
            w + x.abs() * (1.0 - w * w) * sigmoid(x)
        }
    }
}

/// Where the exponential leaves the range of normal numbers, it is 0 or clamped to the end of the range.
fn floor(x: f64) -> f64 {
    2e-38 * (1.0 + x.abs()) / f64::from(f32::EPSILON)
}

#[test]
fn activations_and_their_derivatives_agree_with_the_oracle() {
    for act in Activation::ALL {
        let mut value = Within::new(act.name(), BOUND);
        let mut derivative = Within::new("its derivative", BOUND);
        for x in [sweep(-1e-6, -1e4), sweep(1e-6, 1e4), vec![0.0, -0.0]] {
            // Every 4th value of the sweep: four functions and their f64 versions are slow.
            let x: Vec<f32> = x.into_iter().step_by(4).collect();
            let of = |f: &dyn Fn(f64) -> f64| x.iter().map(|&x| f(f64::from(x))).collect::<Vec<_>>();
            let want = of(&|x| reference::activate(act, x));
            let grad = of(&|x| reference::activation_derivative(act, x));
            let (size, derivative_size) =
                (of(&|x| magnitude(act, x) + floor(x)), of(&|x| derivative_magnitude(act, x) + floor(x)));
            for isa in Isa::all() {
                let got = map(isa, &x, |isa, x, y| activate(isa, act, x, y));
                value.check(isa, act.name(), &got, &want, &size);
                let mut g = vec![1.0; x.len()];
                activate_backward(isa, act, &x, &mut g);
                derivative.check(isa, act.name(), &g, &grad, &derivative_size);
            }
        }
    }
}

#[test]
fn gradients_are_multiplied_at_every_length_and_nan_propagates() {
    let mut rng = Rng::new(60);
    let mut within = Within::new("activation gradients", 1.0);
    for act in Activation::ALL {
        for n in lengths() {
            let (mut x, dy) = (rng.vec(n), rng.vec(n));
            for isa in Isa::all() {
                let (mut got, mut grad) = (dy.clone(), vec![1.0; n]);
                activate_backward(isa, act, &x, &mut got);
                activate_backward(isa, act, &x, &mut grad);
                let want: Vec<f64> = wide(&grad).iter().zip(wide(&dy)).map(|(s, dy)| s * dy).collect();
                within.check(isa, &(act, n), &got, &want, &magnitudes(&got));
            }
            if n < 40 {
                let at = rng.below(n);
                x[at] = f32::NAN;
                for isa in Isa::all() {
                    let y = map(isa, &x, |isa, x, y| activate(isa, act, x, y));
                    let there: Vec<usize> = (0..n).filter(|&i| y[i].is_nan()).collect();
                    assert_eq!(there, [at], "{act:?} on {isa}");
                }
            }
        }
    }
}
