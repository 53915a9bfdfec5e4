//! What a session reports.

use std::path::Path;
use std::time::Duration;

/// A progress event; the command line displays it.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A step was completed.
    Step {
        /// Steps completed.
        step: u64,
        /// Total number of steps.
        steps: u64,
        /// Mean loss of the last steps (at most 100).
        loss: f64,
        /// Images per second.
        images_per_second: f64,
        /// Estimated remaining time.
        left: Duration,
    },
    /// A sample sheet is being generated.
    Sampling {
        /// Denoising steps completed.
        done: usize,
        /// Total number of denoising steps.
        steps: usize,
    },
    /// A sample sheet was written.
    Samples {
        /// Steps completed.
        step: u64,
        /// The file.
        path: &'a Path,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps completed.
        step: u64,
        /// The folder.
        path: &'a Path,
    },
    /// A stop was requested; a checkpoint will be written.
    Stopping {
        /// Steps completed.
        step: u64,
    },
    /// Something that may be unintended.
    Warning(String),
    /// Information for the user.
    Note(String),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were completed.
    Finished,
    /// All steps were completed, but the training has diverged; see [`Run::divergence`](super::Run::divergence).
    Diverged,
    /// Stopped on request; a checkpoint was written.
    Stopped,
}
