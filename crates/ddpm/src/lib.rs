//! Denoising diffusion probabilistic models on CPUs: schedules, networks, samplers, data and training.
//!
//! The model is that of Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020
//! ([arXiv:2006.11239](https://arxiv.org/abs/2006.11239)); equation numbers are the paper's. Timesteps `t` count from
//! 0 to T - 1 here and from 1 to T there.
//!
//! # The method, and where it is
//!
//! An image `x_0` loses itself in noise over T steps with variances `beta_t` ([`schedule::Schedule`]: the paper's
//! linear ones, cosine, sigmoid and others). With `alpha_t = 1 - beta_t` and `alpha_bar_t` the product of all `alpha` up
//! to t, any step can be reached at once ([`process::q_sample`]):
//!
//! ```text
//! x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)                                (eq. 4)
//! ```
//!
//! A network `eps_theta` ([`nets`]) learns to tell the noise from the noisy image ([`model::TrainingGraph`],
//! algorithm 1, stepped by [`train::Trainer`]):
//!
//! ```text
//! L_simple = E || eps - eps_theta(x_t, t) ||^2,   t uniform, eps ~ N(0, I)                               (eq. 14)
//! ```
//!
//! Knowing both ends, the way back is a normal distribution ([`schedule::Posterior`], [`process::posterior_mean`]):
//!
//! ```text
//! q(x_{t-1} | x_t, x_0) = N(mu_tilde_t(x_t, x_0), beta_tilde_t I)                                         (eq. 6)
//! mu_tilde_t   = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
//!              + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t                              (eq. 7)
//! beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t                                         (eq. 7)
//! ```
//!
//! Sampling ([`sampler::Ddpm`], algorithm 2) walks it from pure noise, with the image that the predicted noise
//! implies in the place of `x_0` ([`process::predict_x0`], eq. 15). [`sampler::SAMPLERS`] lists it and those that need fewer
//! steps; [`objective::Objective`] what else a network may learn, [`guidance`] how it is told classes; [`edit`] what else than
//! drawing from noise can be done with it.
//!
//! # From images to images
//!
//! [`data::open`] reads folders of images and IDX files, [`train::config::Config`] holds all settings,
//! [`train::Session`] trains in a run folder with checkpoints ([`train::checkpoint`]), [`generate::Generator`] draws
//! images from one. To put in something of your own, implement [`data::Dataset`], [`denoiser::Denoiser`],
//! [`sampler::Sampler`] or [`nets::Network`]; the crate's `examples` show the first two.
//!
//! ```
//! use ddpm::data::digits::Digits;
//! use ddpm::train::{Trainer, config::Config};
//!
//! let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
//! let tiny = [
//!     set("attention.down_channels", "8, 16"),
//!     set("attention.mid_channels", "16, 8"),
//!     set("attention.down_sample", "true"),
//!     set("train.batch_size", "4"),
//! ];
//! let config = Config::load(Some("digits"), None, &tiny)?;
//! let mut trainer = Trainer::new(&config, Box::new(Digits::new(0, 16, 100)?))?;
//! let loss = trainer.step()?.loss;
//! // The network starts by predicting almost nothing, and the noise has variance 1.
//! assert!(loss > 0.5 && loss < 2.0);
//! # Ok::<(), ddpm::Error>(())
//! ```
//!
//! Everything is a function of the settings and the seed: neither the number of threads nor stopping and going on
//! changes a bit of the result. Nothing in the library prints.
#![forbid(unsafe_code)]

pub mod bound;
pub mod data;
pub mod denoiser;
pub mod edit;
mod error;
pub mod generate;
pub mod guidance;
pub mod hardware;
pub mod image;
pub mod interop;
mod memory;
pub mod model;
pub mod nearest;
pub mod nets;
pub mod objective;
pub mod output;
pub mod plot;
pub mod process;
pub mod rates;
pub mod sampler;
pub mod schedule;
pub mod text;
pub mod train;

pub use error::{Error, Result};
