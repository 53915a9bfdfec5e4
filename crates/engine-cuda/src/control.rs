//! The control block: what changes from run to run, at the start of the GPU's memory. `Control` in `common.cu`.

use ddpm_engine::{AdamStep, Draws, StepOutcome};

/// Bytes of the block, with room behind it.
pub const BYTES: usize = 256;
/// Where the numbers of an optimizer's step begin.
pub const ADAM: usize = 16;
/// Where a word is that is not 0 if the weights were held back.
pub const HELD: usize = 56;
/// Where the squared norm of the gradients is, an f64.
pub const SQUARED_NORM: usize = 64;

/// What random draws depend on.
pub fn draws(draws: Draws) -> [u32; 4] {
    [draws.seed as u32, (draws.seed >> 32) as u32, draws.step, draws.first_index]
}

/// The words of an optimizer's step, computed in f64, as the CPU's, and that the weights are not held back.
pub fn adam(step: &AdamStep) -> [u32; 11] {
    let correction1 = 1.0 - step.beta1.powf(step.step as f64);
    let correction2 = (1.0 - step.beta2.powf(step.step as f64)).sqrt();
    let (decay, shrink) = match step.decoupled {
        true => (0.0, 1.0 - step.lr * step.weight_decay),
        false => (step.weight_decay, 1.0),
    };
    let numbers = [
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
    ];
    std::array::from_fn(|i| numbers.get(i).map_or(0, |&v| (v as f32).to_bits()))
}

/// Draws and an optimizer's step, from the start of the block on.
pub fn training(of: Draws, step: &AdamStep) -> [u32; 15] {
    let (draws, adam) = (draws(of), adam(step));
    std::array::from_fn(|i| if i < 4 { draws[i] } else { adam[i - 4] })
}

/// What came of a training run, from the bytes at [`HELD`]: whether the weights were held back, the loss, the squared norm of
/// the gradients.
pub fn outcome(bytes: [u8; 16]) -> StepOutcome {
    let [first, norm]: [u64; 2] = bytemuck::cast(bytes);
    match first as u32 {
        0 => StepOutcome::Whole {
            loss: f32::from_bits((first >> 32) as u32),
            gradient_norm: f64::from_bits(norm).sqrt(),
        },
        _ => StepOutcome::Stopped { updated: 0 },
    }
}
