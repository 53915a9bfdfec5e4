//! Every sampler of the list, with a denoiser that is known exactly.

mod distribution;
mod golden;
mod matrix;
mod mixture;
