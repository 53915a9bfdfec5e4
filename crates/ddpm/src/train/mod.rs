//! Training: settings, run folders, checkpoints, the loop.
