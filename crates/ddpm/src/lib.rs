//! Denoising diffusion probabilistic models: training and sampling on CPUs and NVIDIA GPUs.
//!
//! # Training and sampling
//!
//! ```
//! use ddpm::data::digits::Digits;
//! use ddpm::generate::{Pipeline, SampleRequest};
//! use ddpm::sampler::{self, SamplerOptions};
//! use ddpm::config::Config;
//! use ddpm::train::Trainer;
//! use std::path::Path;
//!
//! // Settings: a preset and overrides, as on the command line.
//! let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
//! let overrides = [
//!     set("attention.down_channels", "8, 16"),
//!     set("attention.mid_channels", "16, 8"),
//!     set("attention.down_sample", "true"),
//!     set("train.batch_size", "4"),
//! ];
//! let config = Config::load(Some("digits"), None, &overrides)?;
//!
//! // Train on 100 built-in 16x16 images.
//! let mut trainer = Trainer::new(&config, Box::new(Digits::new(0, 16, 100)?))?;
//! let loss = trainer.step()?.loss;
//! // The untrained network predicts almost zero, and the noise has variance 1.
//! assert!(loss > 0.5 && loss < 2.0);
//!
//! // Sample from the averaged (EMA) weights with 5 steps of DDIM; 0 threads means all cores.
//! let weights = trainer.checkpoint(None)?.ema;
//! let pipeline = Pipeline::new(trainer.config(), weights, Path::new("digits"), 0)?;
//! let sampling = SamplerOptions { sampler: sampler::find("ddim")?, steps: Some(5), ..SamplerOptions::default() };
//! let request = SampleRequest { count: 2, seed: 1, sampling, ..SampleRequest::default() };
//! let images = pipeline.sample(request, &mut |_, _| Ok(()))?;
//! assert_eq!(images.len(), 2);
//! # Ok::<(), ddpm::Error>(())
//! ```
//!
//! [`train::Session`] trains in a run folder, with logs and checkpoints; [`generate::Pipeline::open`] samples from a
//! checkpoint on disk. Results depend only on the settings and the seed: the number of threads or resuming from a
//! checkpoint does not change a bit. The library never prints.
//!
//! # Modules
//!
//! | task | modules |
//! |---|---|
//! | data | [`data`]: image folders, IDX files and other sources; [`image`]: PNG, GIF, grids |
//! | model | [`nets`]: networks; [`schedule`]: noise schedules; [`objective`]: loss functions; [`model`]: the training graph |
//! | training | [`train`]: [`Config`](config::Config), [`Trainer`](train::Trainer), [`Session`](train::Session), checkpoints |
//! | sampling | [`generate`]; [`sampler`]: DDPM, DDIM and faster samplers ([`sampler::SAMPLERS`]); [`guidance`]: class conditioning |
//! | editing | [`edit`]: inpainting, interpolation and other uses of a trained model |
//! | evaluation | [`vlb`]: the variational bound; [`nearest`]: memorization |
//! | other programs | [`interop`]: PyTorch, safetensors and diffusers checkpoints |
//! | tools | [`plot`], [`hardware`], [`roofline`], [`output`], [`text`] |
//!
//! To extend the library, implement [`data::Dataset`], [`denoiser::Denoiser`], [`sampler::Sampler`] or
//! [`nets::Network`]. The crate's `examples` show the first two.
//!
//! # The method
//!
//! The model is that of Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020
//! ([arXiv:2006.11239](https://arxiv.org/abs/2006.11239)); equation numbers are the paper's. Timesteps `t` count from
//! 0 to T - 1 here, and from 1 to T in the paper.
//!
//! The forward process adds noise to an image `x_0` over T steps with variances `beta_t` ([`schedule::Schedule`]). With
//! `alpha_t = 1 - beta_t` and `alpha_bar_t` the product of all `alpha` up to t, any step has a closed form
//! ([`process::q_sample`]):
//!
//! ```text
//! x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                                (eq. 4)
//! ```
//!
//! A network `eps_theta` learns to predict the noise from the noisy image ([`model::TrainingGraph`], algorithm 1):
//!
//! ```text
//! L_simple = E || eps - eps_theta(x_t, t) ||^2,   t uniform, eps ~ N(0, I)                               (eq. 14)
//! ```
//!
//! Given `x_0`, the reverse step is a normal distribution ([`schedule::Posterior`], [`process::posterior_mean`]):
//!
//! ```text
//! q(x_{t-1} | x_t, x_0) = N(mu_tilde_t(x_t, x_0), beta_tilde_t I)                                         (eq. 6)
//! mu_tilde_t   = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
//!              + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t                              (eq. 7)
//! beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t                                         (eq. 7)
//! ```
//!
//! Sampling ([`sampler::Ddpm`], algorithm 2) iterates this step from pure noise, replacing `x_0` by the estimate that the
//! predicted noise implies ([`process::predict_x0`], eq. 15).
#![forbid(unsafe_code)]

pub mod config;
pub mod data;
pub mod edit;
mod error;
pub mod generate;
pub mod hardware;
pub mod image;
pub mod interop;
mod memory;
pub mod model;
pub mod nearest;
pub mod nets;
pub mod output;
pub mod plot;
pub mod power_ema;
pub mod roofline;
mod settings;
mod storage;
pub mod train;
pub mod vlb;

pub use ddpm_diffusion as diffusion;
pub use ddpm_diffusion::{denoiser, guidance, objective, process, sampler, schedule};
pub use ddpm_text as text;
pub use error::{Error, Result};
