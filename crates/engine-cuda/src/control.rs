//! The control block: what changes from run to run, at the start of the GPU's memory. `Control` in `common.cu`.

use ddpm_engine::{AdamStep, Draws};

/// Bytes of the block, with room behind it.
pub const BYTES: usize = 256;
/// Where the numbers of an optimizer's step begin.
pub const ADAM: usize = 16;
/// Where the squared norm of the gradients is, an f64.
pub const SQUARED_NORM: usize = 64;

/// What random draws depend on.
pub fn draws(draws: Draws) -> [u32; 4] {
    [draws.seed as u32, (draws.seed >> 32) as u32, draws.step, draws.first_index]
}

/// The numbers of an optimizer's step; computed in f64, as the CPU's.
pub fn adam(step: &AdamStep) -> [f32; 10] {
    let correction1 = 1.0 - step.beta1.powf(step.step as f64);
    let correction2 = (1.0 - step.beta2.powf(step.step as f64)).sqrt();
    let (decay, shrink) = match step.decoupled {
        true => (0.0, 1.0 - step.lr * step.weight_decay),
        false => (step.weight_decay, 1.0),
    };
    [
        -step.lr / correction1,
        1.0 / correction2,
        step.eps,
        1.0 - step.beta1,
        step.beta2,
        1.0 - step.beta2,
        decay,
        shrink,
        1.0 - step.ema_decay,
        step.grad_scale,
    ]
    .map(|v| v as f32)
}
