//! Image editing: the methods of [`ddpm_diffusion::edit`], and masks from image files.

mod mask;

pub use ddpm_diffusion::edit::*;
pub use mask::{InpaintMask, gap};
