//! Denoising diffusion probabilistic models: training and sampling on CPUs and NVIDIA GPUs.
//!
//! # Training and sampling
//!
//! Train on a folder of images, in a run folder with checkpoints, metrics and sample sheets:
//!
//! ```no_run
//! use ddpm::{Config, Run};
//!
//! let config = Config::builder().data("photos").size(32).steps(20_000).build()?;
//! let outcome = Run::create("runs", &config)?.train()?;
//! println!("{outcome:?}");
//! # Ok::<(), ddpm::Error>(())
//! ```
//!
//! Sample from the run:
//!
//! ```no_run
//! use ddpm::{Pipeline, SampleRequest};
//!
//! let request = SampleRequest { count: 16, seed: 7, ..SampleRequest::default() };
//! Pipeline::open("runs/run-001")?.sample(request)?.grid(4).save("grid.png")?;
//! # Ok::<(), ddpm::Error>(())
//! ```
//!
//! Both use a GPU if there is one that can be used and the program was built with the feature `cuda`, else all cores of the CPU.
//! [`Config::builder`] has the presets and settings of the command line; [`Run::train_with`] and [`Pipeline::sample_with`] report
//! every step and can be stopped.
//!
//! Without files, step by step, on any [`Dataset`](data::Dataset):
//!
//! ```
//! use ddpm::data::digits::Digits;
//! use ddpm::sampler::{self, SamplerOptions};
//! use ddpm::{Config, SampleRequest, Trainer};
//!
//! let config = Config::builder()
//!     .preset("digits")
//!     .batch_size(4)
//!     .set("attention.down_channels", "8, 16")
//!     .set("attention.mid_channels", "16, 8")
//!     .set("attention.down_sample", "true")
//!     .build()?;
//!
//! // 100 built-in images of 16x16.
//! let mut trainer = Trainer::new(&config, Box::new(Digits::new(0, 16, 100)?))?;
//! let loss = trainer.step()?.loss;
//! // The untrained network predicts almost zero, and the noise has variance 1.
//! assert!(loss > 0.5 && loss < 2.0);
//!
//! // Five steps of DDIM with the averaged weights.
//! let sampling = SamplerOptions { sampler: sampler::find("ddim")?, steps: Some(5), ..SamplerOptions::default() };
//! let request = SampleRequest { count: 2, seed: 1, sampling, ..SampleRequest::default() };
//! let images = trainer.pipeline()?.sample(request)?;
//! assert_eq!(images.len(), 2);
//! # Ok::<(), ddpm::Error>(())
//! ```
//!
//! Results depend only on the settings and the seed: the number of threads or resuming from a checkpoint does not change a bit.
//! The library never prints.
//!
//! # Modules
//!
//! | task | modules |
//! |---|---|
//! | data | [`data`]: image folders, IDX files and other sources; [`image`]: PNG, GIF, grids |
//! | model | [`nets`]: networks; [`schedule`]: noise schedules; [`objective`]: loss functions; [`model`]: the training graph |
//! | settings | [`config`]: sources, presets, validation |
//! | training | [`train`]: [`Run`], [`Trainer`], checkpoints |
//! | sampling | [`pipeline`]; [`sampler`]: DDPM, DDIM and faster samplers ([`sampler::SAMPLERS`]); [`guidance`]: class conditioning |
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

pub mod checkpoint;
pub mod config;
pub mod edit;
mod error;
pub mod hardware;
pub mod image;
pub mod interop;
pub mod lr_schedule;
pub mod model;
pub mod nearest;
pub mod nets;
pub mod output;
pub mod pipeline;
pub mod plot;
pub mod power_ema;
pub mod roofline;
pub mod run_folder;
mod run_record;
mod settings;
pub mod storage;
pub mod train;
pub mod vlb;

pub use config::Config;
pub use ddpm_data as data;
pub use ddpm_diffusion as diffusion;
pub use ddpm_diffusion::{denoiser, guidance, objective, process, sampler, schedule};
pub use ddpm_text as text;
pub use error::{Error, Result};
pub use pipeline::{Pipeline, SampleRequest};
pub use train::{Run, Trainer};
