//! The largest values of settings that flags have too.

/// Most steps, epochs and micro-batches: they are 32-bit words in the random numbers' counter.
pub const STEPS: u64 = u32::MAX as u64;
/// Most images of a batch.
pub const BATCH_SIZE: usize = 1 << 16;
/// Most threads.
pub const THREADS: usize = ddpm_engine::MOST_THREADS;
/// Most diffusion steps.
pub const TIMESTEPS: usize = 1_000_000;
/// Highest learning rate.
pub const LR: f64 = 10.0;
