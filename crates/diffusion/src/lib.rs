//! Diffusion models on slices: noise schedules, samplers, classifier-free guidance, editing and the variational
//! bound, for any network that can denoise.
//!
//! Nothing here knows an engine, a file or a configuration. A network is a [`Denoiser`](denoiser::Denoiser), in its
//! simplest form a closure; batches are slices of `batch * image_len` values, nominally in [-1, 1].
//!
//! ```
//! use ddpm_diffusion::denoiser::FnDenoiser;
//! use ddpm_diffusion::process::Prediction;
//! use ddpm_diffusion::sampler::{NoiseKey, SamplerOptions, find};
//! use ddpm_diffusion::schedule::Schedule;
//!
//! // Data that is always 0.5: the ideal network predicts this image whatever the noise.
//! let mut denoiser = FnDenoiser::new([4, 16], Prediction::X0, |_x_t: &[f32], _t, x_0: &mut [f32]| {
//!     x_0.fill(0.5);
//!     Ok(())
//! });
//! let schedule = Schedule::linear(1000, 1e-4, 0.02)?;
//! let options = SamplerOptions { sampler: find("dpm++2m")?, steps: Some(10), ..SamplerOptions::default() };
//! let sampler = options.build(&schedule, Prediction::X0)?;
//! let images = sampler.sample(&mut denoiser, NoiseKey { seed: 1, first: 0 }, &mut |_step| Ok(()))?;
//! assert!(images.len() == 4 * 16 && images.iter().all(|x| (x - 0.5).abs() < 1e-5));
//! # Ok::<(), ddpm_diffusion::Error>(())
//! ```
//!
//! | module | |
//! |---|---|
//! | [`schedule`], [`process`] | noise schedules; the forward process, its posterior, and what networks predict |
//! | [`objective`] | losses and the weights of timesteps |
//! | [`denoiser`], [`guidance`] | the interface to networks; classifier-free guidance |
//! | [`sampler`] | samplers, one file each, and the list of them ([`sampler::SAMPLERS`]) |
//! | [`edit`] | inpainting, variation, interpolation, denoising |
//! | [`vlb`] | the variational bound |
#![forbid(unsafe_code)]

pub mod buffers;
pub mod denoiser;
pub mod edit;
mod error;
pub mod guidance;
pub mod noise;
pub mod objective;
pub mod process;
pub mod sampler;
pub mod schedule;
pub mod vlb;

pub use error::{Error, Result};
