//! What a denoiser can do with images that are there: fill a part of one, vary one, go from one to another, take the noise
//! from one. A file each, following its paper.
//!
//! As samplers do, these know noise levels, scalars, slices and the [`Denoiser`](crate::denoiser::Denoiser) trait, never a
//! graph. Images are numbers in [-1, 1], all of one shape (height, width, channels).

pub mod denoise;
pub mod inpaint;
pub mod interpolate;
mod mask;
mod noise;
#[cfg(test)]
mod support;
pub mod vary;

pub use denoise::{Denoise, most_noise};
pub use inpaint::RePaint;
pub use interpolate::{Inversion, slerp};
pub use mask::{Gap, gap};
pub use noise::{Estimate, estimate};
pub use vary::Vary;

use crate::error::Error;

/// A flag or setting that does not do.
fn refused(key: &str, reason: String) -> Error {
    Error::Config { key: key.to_owned(), reason }
}
