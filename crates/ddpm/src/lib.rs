//! Denoising diffusion probabilistic models: schedules, networks, samplers, data and training.
#![forbid(unsafe_code)]

pub mod data;
pub mod denoiser;
mod error;
pub mod generate;
pub mod model;
pub mod nets;
pub mod picture;
pub mod process;
pub mod sampler;
pub mod schedule;
pub mod train;

pub use error::{Error, Result};
