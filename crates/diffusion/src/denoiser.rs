//! The interface between samplers and networks.

use crate::buffers::{BufferId, SamplerBuffers};
use crate::error::Result;
use crate::process::Prediction;

/// Predicts the noise in a batch of images, `eps_theta` of Ho et al. 2020, or an equivalent.
/// The crate `ddpm` implements it with its networks; anything that can predict will do.
pub trait Denoiser {
    /// Number of images per batch.
    fn batch(&self) -> usize;

    /// Number of elements per image.
    fn image_len(&self) -> usize;

    /// What [`predict`](Self::predict) returns.
    fn prediction(&self) -> Prediction {
        Prediction::Eps
    }

    /// `eps_theta(x_t, t)`: the predicted noise of each image, or whatever [`prediction`](Self::prediction)
    /// says. `x_t` and `output` hold `batch * image_len` elements; all images are at timestep `t`, which may
    /// be fractional.
    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()>;

    /// The learned variance that belongs to the last prediction, one value per element of `output`, if the
    /// network has it: -1 stands for `beta_tilde_t`, 1 for `beta_t`, and the log variance is linear in
    /// between (Nichol, Dhariwal 2021, eq. 15).
    fn variance(&self) -> Option<&[f32]> {
        None
    }

    /// The same network for batches that stay in device memory, if it runs on a device. Whether this is
    /// `Some` must never change.
    fn as_device_denoiser(&mut self) -> Option<&mut dyn DeviceDenoiser> {
        None
    }
}

/// A network that reads and writes [`SamplerBuffers`]; a network on a device keeps them in device memory
/// ([`Denoiser::as_device_denoiser`]).
pub trait DeviceDenoiser {
    /// The buffers, one batch each.
    ///
    /// # Errors
    /// Device errors.
    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers>;

    /// Like [`Denoiser::predict`], from one buffer to another.
    ///
    /// # Errors
    /// Like [`Denoiser::predict`].
    fn predict_buffer(&mut self, x_t: BufferId, t: f64, output: BufferId) -> Result<()>;

    /// Copies the learned variance of the last prediction to a buffer; returns whether there is one.
    ///
    /// # Errors
    /// Device errors.
    fn copy_variance(&mut self, to: BufferId) -> Result<bool>;
}

/// A closure as a denoiser: `predict(x_t, t, output)`.
///
/// ```
/// use ddpm_diffusion::denoiser::FnDenoiser;
/// use ddpm_diffusion::process::Prediction;
/// // One image of 16 values; a network without skill.
/// let network = FnDenoiser::new([1, 16], Prediction::Eps, |_x_t: &[f32], _t: f64, eps: &mut [f32]| {
///     eps.fill(0.0);
///     Ok(())
/// });
/// ```
pub struct FnDenoiser<F> {
    batch: usize,
    image_len: usize,
    prediction: Prediction,
    predict: F,
}

impl<F: FnMut(&[f32], f64, &mut [f32]) -> Result<()>> FnDenoiser<F> {
    /// A denoiser for `batch` images of `image_len` values.
    pub fn new([batch, image_len]: [usize; 2], prediction: Prediction, predict: F) -> Self {
        Self { batch, image_len, prediction, predict }
    }
}

impl<F: FnMut(&[f32], f64, &mut [f32]) -> Result<()>> Denoiser for FnDenoiser<F> {
    fn batch(&self) -> usize {
        self.batch
    }

    fn image_len(&self) -> usize {
        self.image_len
    }

    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        (self.predict)(x_t, t, output)
    }
}

/// A denoiser that takes the class of each image, or none.
pub trait ConditionalDenoiser: Denoiser {
    /// Sets the class of each image in the batch; `None` for unconditional.
    ///
    /// # Errors
    /// If the network takes no classes.
    fn set_labels(&mut self, labels: &[Option<u32>]) -> Result<()>;

    /// [`as_device_denoiser`](Denoiser::as_device_denoiser) with classes; `Some` where that is `Some`.
    fn as_conditional_device_denoiser(&mut self) -> Option<&mut dyn ConditionalDeviceDenoiser> {
        None
    }
}

/// A [`ConditionalDenoiser`] in device memory, where the labels are kept too.
pub trait ConditionalDeviceDenoiser: DeviceDenoiser {
    /// Uploads the class of each image in the batch, for [`select_labels`](Self::select_labels).
    ///
    /// # Errors
    /// Device errors.
    fn upload_labels(&mut self, labels: &[Option<u32>]) -> Result<()>;

    /// Sets the class of each image to the uploaded labels, or to none, without a transfer from the host.
    ///
    /// # Errors
    /// Device errors; if the network takes no classes.
    fn select_labels(&mut self, conditional: bool) -> Result<()>;
}
