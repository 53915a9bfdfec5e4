//! Upper limits of settings that also have a command-line flag.

/// Maximum number of steps, epochs and micro-batches: 32-bit words of the random number generator's counter.
pub const STEPS: u64 = u32::MAX as u64;
/// Maximum images per batch.
pub const BATCH_SIZE: usize = 1 << 16;
/// Maximum number of threads.
pub const THREADS: usize = ddpm_engine_cpu::MAX_THREADS;
/// Maximum number of diffusion steps.
pub const TIMESTEPS: usize = 1_000_000;
/// Maximum learning rate.
pub const LR: f64 = 10.0;
