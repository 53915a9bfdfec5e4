//! What a sampler needs of a network.

use crate::error::Result;
use crate::process::Prediction;
use crate::sampler::Resident;

/// Predicts the noise in a batch of images, `eps_theta` of Ho et al. 2020, or what says the same.
/// [`Model`](crate::model::Model) is the network's; anything else that knows an answer will do.
pub trait Denoiser {
    /// Images of a batch.
    fn batch(&self) -> usize;

    /// Numbers of an image.
    fn image_len(&self) -> usize;

    /// What [`predict`](Self::predict) gives.
    fn prediction(&self) -> Prediction {
        Prediction::Eps
    }

    /// `eps_theta(x_t, t)`: the predicted noise of each image (or the other [`prediction`](Self::prediction)); `x_t` and
    /// `output` hold `batch * image_len` numbers, all images at timestep `t`, which may lie between two.
    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()>;

    /// The variance of a step back from what was predicted last, a number for each of `output`'s, where the network tells it
    /// too: at -1 it is `beta_tilde_t`, at 1 `beta_t`, and its logarithm is linear in it (Nichol, Dhariwal 2021, eq. 15).
    fn variance(&self) -> Option<&[f32]> {
        None
    }

    /// The same network for batches that stay in the memory of the device that it runs on, where there is such; once for all of
    /// its life.
    fn resident(&mut self) -> Option<&mut dyn Resident> {
        None
    }
}
