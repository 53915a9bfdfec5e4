//! The control block at the start of GPU memory: everything that changes from run to run. Mirrors `Control` in `common.cu`.

use ddpm_engine::{AdamStep, RngKey, StepOutcome};

/// Bytes reserved for the block, including padding.
pub const BYTES: usize = 256;
/// Offset of the optimizer's constants.
pub const ADAM: usize = 16;
/// Offset of the step's outcome; its first word is nonzero if the update was skipped.
pub const OUTCOME: usize = 56;
/// Offset of the squared gradient norm, an f64.
pub const SQUARED_NORM: usize = 64;

/// Key of the random numbers.
pub fn rng_key(key: RngKey) -> [u32; 4] {
    [key.seed as u32, (key.seed >> 32) as u32, key.step, key.first_index]
}

/// Constants of an optimizer step, computed in f64 as on the CPU, followed by a cleared skip flag.
pub fn adam(step: &AdamStep) -> [u32; 11] {
    let correction1 = 1.0 - step.beta1.powf(step.step as f64);
    let correction2 = (1.0 - step.beta2.powf(step.step as f64)).sqrt();
    let (decay, shrink) =
        if step.decoupled { (0.0, 1.0 - step.lr * step.weight_decay) } else { (step.weight_decay, 1.0) };
    let constants = [
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
    std::array::from_fn(|i| constants.get(i).map_or(0, |&v| (v as f32).to_bits()))
}

/// Key and optimizer constants, from the start of the block.
pub fn training(key: RngKey, step: &AdamStep) -> [u32; 15] {
    let (key, adam) = (rng_key(key), adam(step));
    std::array::from_fn(|i| if i < 4 { key[i] } else { adam[i - 4] })
}

/// Decodes the 16 bytes at [`OUTCOME`]: skip flag, loss, squared gradient norm.
pub fn outcome(bytes: [u8; 16]) -> StepOutcome {
    let [first, norm]: [u64; 2] = bytemuck::cast(bytes);
    match first as u32 {
        0 => StepOutcome::Applied {
            loss: f32::from_bits((first >> 32) as u32),
            gradient_norm: f64::from_bits(norm).sqrt(),
        },
        _ => StepOutcome::NonFinite { updated: 0 },
    }
}
