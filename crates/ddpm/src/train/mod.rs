//! Training: settings, run folders, checkpoints, the loop.

pub mod checkpoint;
pub mod config;
mod disk;
pub mod run;
