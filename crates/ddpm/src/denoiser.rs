//! What a sampler needs of a network.

use crate::error::Result;

/// Predicts the noise in a batch of pictures: `eps_theta` of Ho et al. 2020. [`Model`](crate::model::Model) is the
/// network's; anything else that knows an answer will do.
pub trait Denoiser {
    /// Pictures of a batch.
    fn batch(&self) -> usize;

    /// Numbers of a picture.
    fn picture_len(&self) -> usize;

    /// `eps_theta(x_t, t)`: the predicted noise of each picture; `x_t` and `eps` hold `batch * picture_len` numbers,
    /// all pictures at timestep `t`.
    fn predict(&mut self, x_t: &[f32], t: usize, eps: &mut [f32]) -> Result<()>;
}
