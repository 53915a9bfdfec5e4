//! Losses and their gradients.

use crate::elementwise::lengths;
use crate::{Rng, Within, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::loss::{self, Loss};
use ddpm_kernels::reference;

/// A sum of elements of one sign, relative to itself: nothing cancels; a lane adds up to 4096 (portable) of
/// them.
const SUM: f64 = 32.0;
/// A factor, a difference and a product: half a unit each.
const GRAD: f64 = 2.0;

/// With differences on both sides of Huber's delta, all below it, and all above.
const LOSSES: [Loss; 5] = [
    Loss::Mse,
    Loss::L1,
    Loss::Huber { delta: 0.3 },
    Loss::Huber { delta: 5.0 },
    Loss::Huber { delta: 1e-6 },
];

#[test]
fn sums_and_gradients_agree_with_the_oracle_at_every_length() {
    let mut rng = Rng::new(42);
    let (mut sums, mut grads) = (Within::new("loss sum", SUM), Within::new("loss grad", GRAD));
    for n in lengths().chain([100_000]) {
        let (a, b) = (rng.vec(n), rng.vec(n));
        let (wide_a, wide_b) = (wide(&a), wide(&b));
        for loss in LOSSES {
            let want = reference::loss_sum(loss, &wide_a, &wide_b);
            let dloss = 3.7;
            let factor = (dloss / n as f64) as f32;
            let want_grad = reference::loss_grad(loss, &wide_a, &wide_b, dloss);
            // The rounding of the factor scales with the gradient, that of the difference with the inputs.
            let size: Vec<f64> = (0..n)
                .map(|i| want_grad[i].abs() + 2.0 * f64::from(factor) * (wide_a[i].abs() + wide_b[i].abs()))
                .collect();
            for isa in Isa::all() {
                sums.check(isa, &(loss, n), &[loss::sum(isa, loss, &a, &b) as f32], &[want], &[want]);
                let mut got = unwritten(n);
                loss::grad(isa, loss, factor, &a, &b, &mut got);
                grads.check(isa, &(loss, n), &got, &want_grad, &size);
            }
        }
    }
}

#[test]
fn equal_inputs_have_zero_loss_and_gradient() {
    for isa in Isa::all() {
        for loss in LOSSES {
            let (a, mut got) = (vec![0.7; 37], unwritten(37));
            assert_eq!(loss::sum(isa, loss, &a, &a), 0.0, "{isa} {loss:?}");
            loss::grad(isa, loss, 1.0, &a, &a, &mut got);
            assert!(got.iter().all(|g| *g == 0.0), "{isa} {loss:?}: {got:?}");
        }
    }
}

#[test]
fn huber_is_smooth_at_delta() {
    let loss = Loss::Huber { delta: 0.5 };
    for isa in Isa::all() {
        for (d, value, grad) in
            [(0.5, 0.125, 0.5), (-0.5, 0.125, -0.5), (2.0, 0.875, 0.5), (-0.25, 0.03125, -0.25)]
        {
            let mut got = [f32::NAN];
            assert_eq!(loss::sum(isa, loss, &[d], &[0.0]), value, "{isa}");
            loss::grad(isa, loss, 1.0, &[d], &[0.0], &mut got);
            assert_eq!(got, [grad], "{isa}");
        }
    }
}

#[test]
fn nan_propagates() {
    for isa in Isa::all() {
        for loss in LOSSES {
            for (n, at) in [(1, 0), (16, 3), (37, 36)] {
                let (mut a, b) = (vec![0.5; n], vec![0.25; n]);
                a[at] = f32::NAN;
                for (a, b) in [(&a, &b), (&b, &a)] {
                    assert!(loss::sum(isa, loss, a, b).is_nan(), "{isa} {loss:?}");
                    let mut y = unwritten(n);
                    loss::grad(isa, loss, 1.0, a, b, &mut y);
                    assert!(
                        y.iter().enumerate().all(|(i, v)| v.is_nan() == (i == at)),
                        "{isa} {loss:?}: {y:?}"
                    );
                }
            }
        }
    }
}
