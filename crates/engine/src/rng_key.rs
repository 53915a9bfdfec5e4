//! The key of a run's random numbers.

/// Key of the random numbers of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngKey {
    /// The seed.
    pub seed: u64,
    /// The training or sampling step; with gradient accumulation, the micro-batch, counted over all steps.
    pub step: u32,
    /// Index of the first image of the batch.
    pub first_index: u32,
}
