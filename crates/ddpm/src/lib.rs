//! Denoising diffusion probabilistic models: schedules, networks, samplers, data and training.
#![forbid(unsafe_code)]

pub mod data;
mod error;
pub mod picture;
pub mod train;

pub use error::{Error, Result};
