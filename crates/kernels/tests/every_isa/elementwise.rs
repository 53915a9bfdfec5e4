//! Elementwise arithmetic, sums, and the optimizer step.

use crate::{Rng, Within, bits, magnitudes, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::elementwise::{self, AdamStep};
use ddpm_kernels::reference::{self, Trained};
use ddpm_kernels::vector::EXP_ULP;

/// Half a unit each for the rounding of a factor, of a product and of the result.
const TWO_TERMS: f64 = 2.0;
/// Sums of a few hundred rows, in order: errors of both signs, in units of the sum of absolute values.
const SUM: f64 = 4.0;
/// One Adam step: about ten roundings, the largest of which are constants such as 1 - beta2 in f32.
const ADAM: f64 = 4.0;

/// Lengths around multiples of every vector length, and around the 4096 elements of a partial sum.
pub fn lengths() -> impl Iterator<Item = usize> {
    (1..70).chain([255, 256, 257, 4095, 4096, 4097, 8192, 8200])
}

/// About 4 million f32 from `from` to `to`, equally spaced in bits, so that all magnitudes are covered.
pub(crate) fn sweep(from: f32, to: f32) -> Vec<f32> {
    assert_eq!(from.is_sign_negative(), to.is_sign_negative());
    let (low, high) = (from.to_bits().min(to.to_bits()), from.to_bits().max(to.to_bits()));
    let step = ((high - low) / 4_000_000).max(1) | 1;
    (low..=high).step_by(step as usize).map(f32::from_bits).chain([from, to]).collect()
}

/// The spacing of f32 at `x`, a normal number.
fn ulp(x: f64) -> f64 {
    2f64.powi((x.abs().to_bits() >> 52) as i32 - 1023 - 23)
}

pub(crate) fn map(isa: Isa, x: &[f32], kernel: impl Fn(Isa, &[f32], &mut [f32])) -> Vec<f32> {
    let mut y = unwritten(x.len());
    kernel(isa, x, &mut y);
    y
}

#[test]
fn exp_error_is_within_bound() {
    // The worst inputs of all f32, with fused multiply-add and without.
    let worst = [5.198_666_6, -27.379_168, 48.867_237, -26.686_005];
    let special = [worst.to_vec(), vec![0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE]].concat();
    for x in [sweep(-87.3, -1e-10), sweep(1e-10, 88.37), special] {
        let want: Vec<f64> = x.iter().map(|&x| f64::from(x).exp()).collect();
        for isa in Isa::all() {
            let got = map(isa, &x, elementwise::exp);
            let mut worst = (0.0, 0.0);
            for ((&x, &got), &want) in x.iter().zip(&got).zip(&want) {
                let error = (f64::from(got) - want).abs() / ulp(want);
                assert!(error <= f64::from(EXP_ULP), "{isa}: e^{x} = {got}, not {want}: {error} ulp");
                worst = if error > worst.0 { (error, x) } else { worst };
            }
            println!("exp on {isa}: worst {:.3} ulp at {} in {} values", worst.0, worst.1, x.len());
        }
    }
}

#[test]
fn exp_underflows_to_zero_saturates_and_keeps_nan() {
    for isa in Isa::all() {
        let of = |x: f32| map(isa, &[x; 19], elementwise::exp);
        for x in [-87.31, -88.0, -100.0, -1e4, -1e20, f32::MIN, f32::NEG_INFINITY] {
            assert!(of(x).iter().all(|&y| y == 0.0), "{isa}: e^{x} = {:?}", of(x));
        }
        let largest = f64::from(88.37f32).exp();
        for x in [88.37, 88.4, 89.0, 200.0, 1e20, f32::MAX, f32::INFINITY] {
            assert!(
                of(x).iter().all(|&y| (f64::from(y) / largest - 1.0).abs() < 1e-6),
                "{isa}: e^{x} = {:?}",
                of(x)
            );
        }
        assert!(of(0.0).iter().all(|&y| y == 1.0), "{isa}");
        assert!(of(f32::NAN).iter().chain(&of(-f32::NAN)).all(|y| y.is_nan()), "{isa}: {:?}", of(f32::NAN));
    }
}

#[test]
fn pointwise_kernels_agree_with_the_oracle_at_every_length() {
    let mut rng = Rng::new(40);
    let mut within = Within::new("pointwise", TWO_TERMS);
    for n in lengths() {
        let (x, y) = (rng.vec(n), rng.vec(n));
        let (wide_x, wide_y) = (wide(&x), wide(&y));
        let size = |a: f64, b: f64| reference::combine(a, &magnitudes(&x), b, &magnitudes(&y));
        for isa in Isa::all() {
            let mut got = y.clone();
            elementwise::add_assign(isa, &x, &mut got);
            let want = reference::combine(1.0, &wide_x, 1.0, &wide_y);
            within.check(isa, &("add_assign", n), &got, &want, &size(1.0, 1.0));

            let mut got = unwritten(n);
            elementwise::combine(isa, 0.8, &x, -0.6, &y, &mut got);
            let want = reference::combine(f64::from(0.8f32), &wide_x, f64::from(-0.6f32), &wide_y);
            within.check(isa, &("combine", n), &got, &want, &size(0.8, 0.6));

            let mut got = y.clone();
            elementwise::mul_assign(isa, &x, &mut got);
            let want: Vec<f64> = wide_x.iter().zip(&wide_y).map(|(x, y)| x * y).collect();
            within.check(isa, &("mul_assign", n), &got, &want, &magnitudes(&got));

            let mut got = y.clone();
            elementwise::affine(isa, -0.7, 0.3, &mut got);
            let (a, b) = (f64::from(-0.7f32), f64::from(0.3f32));
            let want: Vec<f64> = wide_y.iter().map(|y| a * y + b).collect();
            let size: Vec<f64> = wide_y.iter().map(|y| (a * y).abs() + b).collect();
            within.check(isa, &("affine", n), &got, &want, &size);

            let mut got = [&y[..], &x].concat();
            elementwise::scale_rows(isa, &x, &mut got);
            let scaled = |y: &[f64]| y.iter().zip(&wide_x).map(|(y, x)| y * (1.0 + x)).collect::<Vec<_>>();
            let want = [scaled(&wide_y), scaled(&wide_x)].concat();
            let size: Vec<f64> = wide_y.iter().chain(&wide_x).map(|y| 2.0 * y.abs()).collect();
            within.check(isa, &("scale_rows", n), &got, &want, &size);
        }
    }
}

#[test]
fn row_kernels_agree_with_the_oracle() {
    let mut rng = Rng::new(41);
    let mut sum = Within::new("sum_rows", SUM);
    let mut add = Within::new("add_rows", TWO_TERMS);
    for columns in [1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 64] {
        for rows in [0, 1, 2, 3, 50, 513] {
            let (x, row) = (rng.vec(rows * columns), rng.vec(columns));
            for isa in Isa::all() {
                let case = (rows, columns);
                let mut got = unwritten(columns);
                elementwise::sum_rows(isa, &x, &mut got);
                let size = reference::sum_rows(&magnitudes(&x), columns);
                sum.check(isa, &case, &got, &reference::sum_rows(&wide(&x), columns), &size);

                let mut got = x.clone();
                elementwise::add_rows(isa, &row, &mut got);
                let size = reference::add_rows(&magnitudes(&row), &magnitudes(&x));
                add.check(isa, &case, &got, &reference::add_rows(&wide(&row), &wide(&x)), &size);
            }
        }
    }
}

#[test]
fn the_squared_norm_agrees_with_the_oracle_at_every_length() {
    // Relative: nothing cancels in a sum of squares; a lane adds up to 4096 (portable) of them.
    const SQUARES: f64 = 32.0;
    let mut rng = Rng::new(42);
    let mut within = Within::new("squared norm", SQUARES);
    for n in lengths().chain([100_000]) {
        let x = rng.vec(n);
        let want = wide(&x).iter().map(|x| x * x).sum();
        for isa in Isa::all() {
            within.check(isa, &n, &[elementwise::squared_norm(isa, &x) as f32], &[want], &[want]);
        }
    }
}

fn adam_steps() -> Vec<AdamStep> {
    let base = AdamStep {
        lr: 2e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        decoupled: false,
        step: 1,
        ema_decay: 0.995,
        grad_scale: 1.0,
    };
    vec![
        base,
        AdamStep { step: 2, grad_scale: 0.37, ..base },
        AdamStep { step: 1000, weight_decay: 0.1, ..base },
        AdamStep { step: 1_000_000, weight_decay: 0.1, decoupled: true, ema_decay: 0.0, ..base },
        AdamStep {
            step: 3,
            beta1: 0.5,
            beta2: 0.99,
            eps: 1e-3,
            lr: 0.1,
            weight_decay: 0.5,
            decoupled: true,
            ..base
        },
        AdamStep { step: 7, beta1: 0.0, beta2: 0.9, ema_decay: 0.9999, ..base },
    ]
}

#[test]
fn an_adam_step_agrees_with_the_oracle_at_every_length() {
    let mut rng = Rng::new(43);
    let names = ["adam, weight", "adam, exp_avg", "adam, exp_avg_sq", "adam, ema"];
    let mut within = names.map(|name| Within::new(name, ADAM));
    for step in adam_steps() {
        for n in (1..40).chain([1000]) {
            let grad = rng.vec(n);
            let mut state = [rng.vec(n), rng.vec(n), rng.vec(n), rng.vec(n)]; // weight, exp_avg, exp_avg_sq, ema
            state[2].iter_mut().for_each(|v| *v = v.abs() * 0.1);
            let mut want = [const { Vec::new() }; 4];
            let mut size = [const { Vec::new() }; 4];
            for i in 0..n {
                let [weight, exp_avg, exp_avg_sq, ema] = [0, 1, 2, 3].map(|s| f64::from(state[s][i]));
                let new =
                    reference::adam(&step, f64::from(grad[i]), Trained { weight, exp_avg, exp_avg_sq, ema });
                // Numerators of absolute values; the square of g also bounds a possible cancellation in g.
                let g = f64::from(grad[i]).abs() * step.grad_scale + step.weight_decay * weight.abs();
                let m = step.beta1 * exp_avg.abs() + (1.0 - step.beta1) * (g + 2.0 * exp_avg.abs());
                let v = new.exp_avg_sq + (1.0 - step.beta2) * g * g;
                let t = step.step as f64;
                let root = (new.exp_avg_sq / (1.0 - step.beta2.powf(t))).sqrt() + step.eps;
                let w = weight.abs() + step.lr * m / (1.0 - step.beta1.powf(t)) / root * (v / new.exp_avg_sq);
                let e = ema.abs() + (1.0 - step.ema_decay) * (w + ema.abs());
                for (s, (value, magnitude)) in
                    [(new.weight, w), (new.exp_avg, m), (new.exp_avg_sq, v), (new.ema, e)]
                        .into_iter()
                        .enumerate()
                {
                    want[s].push(value);
                    size[s].push(magnitude);
                }
            }
            for isa in Isa::all() {
                let [mut w, mut m, mut v, mut e] = state.clone();
                elementwise::adam(isa, &step, &grad, &mut w, &mut m, &mut v, &mut e);
                for (s, got) in [&w, &m, &v, &e].into_iter().enumerate() {
                    within[s].check(isa, &(n, step), got, &want[s], &size[s]);
                }
                // Without a moving average the other results are the same.
                let [mut w2, mut m2, mut v2, _] = state.clone();
                elementwise::adam(isa, &step, &grad, &mut w2, &mut m2, &mut v2, &mut []);
                assert_eq!([bits(&w), bits(&m), bits(&v)], [bits(&w2), bits(&m2), bits(&v2)], "{isa}, {n}");
            }
        }
    }
}

#[test]
fn every_pointwise_kernel_propagates_nan() {
    for isa in Isa::all() {
        for n in [1, 5, 16, 37] {
            for at in 0..n {
                let mut x = vec![0.5; n];
                x[at] = f32::NAN;
                let clean = vec![0.25; n];
                let only_there = |y: &[f32]| y.iter().enumerate().all(|(i, v)| v.is_nan() == (i == at));
                let on = |f: &dyn Fn(&mut [f32])| {
                    let mut y = clean.clone();
                    f(&mut y);
                    y
                };
                let results = [
                    ("exp", on(&|y| elementwise::exp(isa, &x, y))),
                    ("mul_assign", on(&|y| elementwise::mul_assign(isa, &x, y))),
                    ("scale_rows", on(&|y| elementwise::scale_rows(isa, &x, y))),
                    ("add_assign", on(&|y| elementwise::add_assign(isa, &x, y))),
                    ("add_rows", on(&|y| elementwise::add_rows(isa, &x, y))),
                    ("sum_rows", on(&|y| elementwise::sum_rows(isa, &x, y))),
                    ("combine", on(&|y| elementwise::combine(isa, 0.5, &x, 0.5, &clean, y))),
                ];
                for (name, y) in results {
                    assert!(only_there(&y), "{name} on {isa}: {y:?}");
                }
                assert!(elementwise::squared_norm(isa, &x).is_nan(), "{isa}");
                let (mut w, mut m, mut v, mut e) =
                    (clean.clone(), clean.clone(), clean.clone(), clean.clone());
                elementwise::adam(isa, &adam_steps()[0], &x, &mut w, &mut m, &mut v, &mut e);
                assert!([w, m, v, e].iter().all(|y| only_there(y)), "adam on {isa}");
            }
        }
    }
}
