//! Every registered sampler, with an exactly known denoiser.

mod distribution;
mod golden;
mod matrix;
mod mixture;
