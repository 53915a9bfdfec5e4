//! Image editing with a denoiser: inpainting, variation, interpolation, denoising. One file each, following
//! its paper.
//!
//! Like samplers, these know noise levels, scalars, slices and the [`Denoiser`](crate::denoiser::Denoiser)
//! trait, but no graphs. Images hold values in [-1, 1] and all have the same shape (height, width, channels).

pub mod denoise;
pub mod inpaint;
pub mod interpolate;
mod noise;
#[cfg(test)]
mod test_util;
pub mod vary;

pub use denoise::{Denoise, max_noise};
pub use inpaint::RePaint;
pub use interpolate::{Inversion, slerp};
pub use noise::{Estimate, estimate};
pub use vary::Vary;

use crate::error::Error;

/// The error for an invalid flag or setting.
fn invalid(key: &str, reason: String) -> Error {
    Error::option(key, reason)
}
