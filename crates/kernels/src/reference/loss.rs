//! Losses and their gradient.

use crate::loss::Loss;

/// The sum of the losses of `a - b`.
pub fn loss_sum(loss: Loss, a: &[f64], b: &[f64]) -> f64 {
    let one = |d: f64| match loss {
        Loss::Mse => d * d,
        Loss::L1 => d.abs(),
        Loss::Huber { delta } if d.abs() <= f64::from(delta) => d * d / 2.0,
        Loss::Huber { delta } => f64::from(delta) * (d.abs() - f64::from(delta) / 2.0),
    };
    a.iter().zip(b).map(|(a, b)| one(a - b)).sum()
}

/// The mean of the losses of `a - b`.
pub fn loss_mean(loss: Loss, a: &[f64], b: &[f64]) -> f64 {
    loss_sum(loss, a, b) / a.len() as f64
}

/// The gradient of [`loss_mean`] with respect to `a`, times `dloss`.
pub fn loss_grad(loss: Loss, a: &[f64], b: &[f64], dloss: f64) -> Vec<f64> {
    let grad = |d: f64| match loss {
        Loss::Mse => 2.0 * d,
        Loss::L1 if d == 0.0 => 0.0,
        Loss::L1 => d.signum(),
        Loss::Huber { delta } => d.clamp(-f64::from(delta), f64::from(delta)),
    };
    let share = dloss / a.len() as f64;
    a.iter().zip(b).map(|(a, b)| share * grad(a - b)).collect()
}
