//! The optimizer's step.

use crate::elementwise::AdamStep;

/// A weight with its optimizer state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trained {
    /// The weight.
    pub weight: f64,
    /// The gradient's moving average.
    pub exp_avg: f64,
    /// The squared gradient's moving average.
    pub exp_avg_sq: f64,
    /// The weight's moving average.
    pub ema: f64,
}

/// One step of Adam (Kingma and Ba 2015, algorithm 1, with L2 decay added to the gradient) or, decoupled, of AdamW
/// (Loshchilov and Hutter 2019, algorithm 2), then `ema = decay ema + (1 - decay) weight`.
pub fn adam(step: &AdamStep, grad: f64, old: Trained) -> Trained {
    let AdamStep { lr, beta1, beta2, eps, weight_decay, decoupled, .. } = *step;
    let t = step.step as f64;
    let mut g = grad * step.grad_scale;
    let mut weight = old.weight;
    if decoupled {
        weight -= lr * weight_decay * weight;
    } else {
        g += weight_decay * weight;
    }
    let exp_avg = beta1 * old.exp_avg + (1.0 - beta1) * g;
    let exp_avg_sq = beta2 * old.exp_avg_sq + (1.0 - beta2) * g * g;
    let (m_hat, v_hat) = (exp_avg / (1.0 - beta1.powf(t)), exp_avg_sq / (1.0 - beta2.powf(t)));
    weight -= lr * m_hat / (v_hat.sqrt() + eps);
    let ema = step.ema_decay * old.ema + (1.0 - step.ema_decay) * weight;
    Trained { weight, exp_avg, exp_avg_sq, ema }
}
