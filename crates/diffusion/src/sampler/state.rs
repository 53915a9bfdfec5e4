//! What all samplers share: evaluate the network, threshold the predicted image, combine buffers linearly.

use super::host::{HostBuffers, HostDenoiser};
use super::{LazyBatch, NoiseKey, SampleStep};
use crate::buffers::{BufferId, EPS, LEARNED, MAX_TERMS, OUTPUT, SamplerBuffers, X, X_0, Z};
use crate::denoiser::{Denoiser, DeviceDenoiser};
use crate::error::Result;
use crate::process::{Prediction, no_signal};
use crate::schedule::Level;
use ddpm_rng::Purpose;
use serde::{Deserialize, Serialize};
use std::cell::{LazyCell, RefCell};

/// Quantile of an image's magnitudes at which [`Threshold::Dynamic`] clips (0.995 in Saharia et al. 2022).
const DYNAMIC_QUANTILE: f64 = 0.995;

/// Treatment of predicted images outside [-1, 1], the range of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Threshold {
    /// Nothing.
    None,
    /// Clip each value to the range, as in Ho et al.'s code.
    #[default]
    Clip,
    /// Dynamic thresholding: values are clipped to [-s, s] and divided by s, the 99.5th percentile of the
    /// image's magnitudes but at least 1 (Saharia et al., "Photorealistic Text-to-Image Diffusion Models",
    /// 2022, section 2.3).
    Dynamic,
}

impl Threshold {
    /// The name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Clip => "clip",
            Self::Dynamic => "dynamic",
        }
    }

    /// Applies the threshold to one image.
    pub(crate) fn apply(self, image: &mut [f32]) {
        if self != Self::None {
            clamp_rescale(image, self.part());
        }
    }

    /// The quantile that dynamic thresholding clips at.
    fn part(self) -> Option<f64> {
        (self == Self::Dynamic).then_some(DYNAMIC_QUANTILE)
    }
}

/// Clips an image to [-s, s] and divides it by s: the `part` quantile of the magnitudes, but at least 1.
pub(super) fn clamp_rescale(image: &mut [f32], part: Option<f64>) {
    let bound = part.map_or(1.0, |part| quantile(image, part).max(1.0));
    image.iter_mut().for_each(|x| *x = x.clamp(-bound, bound) / bound);
}

/// The `part` quantile of the magnitudes, with linear interpolation.
fn quantile(values: &[f32], part: f64) -> f32 {
    let mut magnitudes: Vec<f32> = values.iter().map(|x| x.abs()).collect();
    magnitudes.sort_unstable_by(f32::total_cmp);
    let Some(last) = magnitudes.len().checked_sub(1) else { return 0.0 };
    let at = part * last as f64;
    let (low, high) = (magnitudes[at.floor() as usize], magnitudes[at.ceil() as usize]);
    low + (high - low) * at.fract() as f32
}

/// `x = keep x + sum of c y`, elementwise in f64, rounded once.
pub(crate) fn axpby<const N: usize>(x: &mut [f32], keep: f64, terms: [(f64, &[f32]); N]) {
    for (i, x) in x.iter_mut().enumerate() {
        let mut sum = keep * f64::from(*x);
        for (c, y) in terms {
            sum += c * f64::from(y[i]);
        }
        *x = sum as f32;
    }
}

/// The network and the buffers of the batch: in host memory, or in the memory of the device that runs the network.
enum Network<'a> {
    Host(HostDenoiser<'a>),
    Device(&'a mut dyn DeviceDenoiser),
}

impl<'a> Network<'a> {
    /// The only place that decides where the batch lives.
    fn new(denoiser: &'a mut dyn Denoiser) -> Self {
        if denoiser.as_device_denoiser().is_some() {
            Self::Device(denoiser.as_device_denoiser().expect("checked above"))
        } else {
            let buffers = HostBuffers::new(denoiser.batch(), denoiser.image_len());
            Self::Host(HostDenoiser { denoiser, buffers })
        }
    }

    fn get(&mut self) -> &mut dyn DeviceDenoiser {
        match self {
            Self::Host(network) => network,
            Self::Device(network) => *network,
        }
    }

    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers> {
        self.get().buffers()
    }

    /// The first `len` values of a buffer.
    fn values(&mut self, v: BufferId, len: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; len];
        self.buffers()?.read(v, &mut values)?;
        Ok(values)
    }
}

/// The state of a sampling run: a batch on its way from noise to images, in named buffers ([`X`] and so on),
/// and the operations that samplers apply to them. All of them return the errors of the denoiser's device.
pub struct SamplerState<'a> {
    network: Network<'a>,
    on_step: &'a mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    prediction: Prediction,
    len: usize,
    key: NoiseKey,
    threshold: Threshold,
    steps: usize,
    done: usize,
}

impl<'a> SamplerState<'a> {
    /// Starts a run of `steps` steps from the batch `start`, or from pure noise.
    ///
    /// # Errors
    /// Device errors.
    ///
    /// # Panics
    /// If `start` does not have the length of the denoiser's batches.
    pub fn new(
        start: Option<&[f32]>,
        denoiser: &'a mut dyn Denoiser,
        key: NoiseKey,
        threshold: Threshold,
        steps: usize,
        on_step: &'a mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Self> {
        let (prediction, len) = (denoiser.prediction(), denoiser.batch() * denoiser.image_len());
        let network = Network::new(denoiser);
        let mut d = Self { network, on_step, prediction, len, key, threshold, steps, done: 0 };
        match start {
            Some(start) => {
                assert_eq!(start.len(), len, "start has the length of a batch");
                d.network.buffers()?.write(X, start)?;
            }
            None => d.fill_normal(X, Purpose::SampleStart, 0)?,
        }
        Ok(d)
    }

    /// Evaluates the network on [`X`] at a level and sets [`X_0`] to the predicted image, thresholded.
    ///
    /// # Errors
    /// Those of the denoiser; a noise prediction at a level without signal.
    pub fn denoise(&mut self, level: Level) -> Result<()> {
        if self.prediction == Prediction::Eps && level.alpha == 0.0 {
            return Err(no_signal(level.t));
        }
        self.network.get().predict_buffer(X, level.t, OUTPUT)?;
        self.convert_output(X_0, self.prediction.x_0_coefficients(level.alpha, level.sigma))?;
        if self.threshold != Threshold::None {
            self.network.buffers()?.threshold(X_0, self.threshold.part())?;
        }
        Ok(())
    }

    /// Sets [`EPS`] to the noise predicted by the last evaluation, which was at this level; [`X`] must not
    /// have changed since.
    pub fn predict_eps(&mut self, level: Level) -> Result<()> {
        self.convert_output(EPS, self.prediction.eps_coefficients(level.alpha, level.sigma))
    }

    /// Converts x and the network's output by [`Prediction`]'s coefficients. Terms with coefficient 0 are
    /// skipped: at the ends of the schedule (`alpha` or `sigma` 0) only one term remains, such as `x_0 = -v`
    /// where `alpha` is 0.
    fn convert_output(&mut self, to: BufferId, [of_x, of_output, divisor]: [f64; 3]) -> Result<()> {
        let buffers = self.network.buffers()?;
        if of_x == 0.0 {
            buffers.linear_combination(to, &[(of_output, OUTPUT)], divisor)
        } else if of_output == 0.0 {
            buffers.linear_combination(to, &[(of_x, X)], divisor)
        } else {
            buffers.linear_combination(to, &[(of_x, X), (of_output, OUTPUT)], divisor)
        }
    }

    /// Recomputes [`EPS`] from [`X`] and [`X_0`], which a threshold may have changed.
    pub fn recompute_eps(&mut self, level: Level) -> Result<()> {
        self.network.buffers()?.linear_combination(EPS, &[(1.0, X), (-level.alpha, X_0)], level.sigma)
    }

    /// `to = keep to + sum of c y`, elementwise in f64, rounded once.
    pub fn axpby<const N: usize>(
        &mut self,
        to: BufferId,
        keep: f64,
        terms: [(f64, BufferId); N],
    ) -> Result<()> {
        const { assert!(N < MAX_TERMS, "`to` itself is one more term") };
        let mut all = [(keep, to); MAX_TERMS];
        all[1..=N].copy_from_slice(&terms);
        self.network.buffers()?.linear_combination(to, &all[..=N], 1.0)
    }

    /// `to = from`.
    pub fn copy(&mut self, to: BufferId, from: BufferId) -> Result<()> {
        self.network.buffers()?.copy(to, from)
    }

    /// `to = 0`.
    pub fn clear(&mut self, to: BufferId) -> Result<()> {
        self.network.buffers()?.linear_combination(to, &[], 1.0)
    }

    /// Fills a buffer with standard normal noise, the same as [`NoiseKey::fill`].
    pub fn fill_normal(&mut self, to: BufferId, purpose: Purpose, step: u32) -> Result<()> {
        self.network.buffers()?.normal(to, self.key, purpose, step)
    }

    /// Samples [`Z`] for the current step.
    pub fn sample_noise(&mut self) -> Result<()> {
        self.fill_normal(Z, Purpose::SampleNoise, (self.steps - self.done - 1) as u32)
    }

    /// Sets [`LEARNED`] to the noise [`Z`] scaled by the learned standard deviation of the last evaluation,
    /// interpolated between two variances (Nichol, Dhariwal 2021, eq. 15). Returns whether there is a learned
    /// variance.
    pub fn learned_noise(&mut self, small: f64, large: f64) -> Result<bool> {
        let learned = self.network.get().copy_variance(LEARNED)?;
        if learned {
            self.network.buffers()?.apply_learned_std(LEARNED, Z, [small.ln(), large.ln()])?;
        }
        Ok(learned)
    }

    /// A copy of a buffer.
    pub fn values(&mut self, v: BufferId) -> Result<Vec<f32>> {
        self.network.values(v, self.len)
    }

    /// Replaces the contents of [`X`].
    ///
    /// # Panics
    /// If `x` is longer than a batch.
    pub fn set_x(&mut self, x: &[f32]) -> Result<()> {
        self.network.buffers()?.write(X, x)
    }

    /// Finishes the step that started at level `from` and reports it.
    ///
    /// # Errors
    /// Those of the step callback.
    pub fn step(&mut self, from: Level) -> Result<()> {
        self.done += 1;
        let (t, done, steps, len) = (from.t, self.done, self.steps, self.len);
        self.network.buffers()?.throttle()?;
        let (network, failed) = (RefCell::new(&mut self.network), RefCell::new(None));
        let read = |v: BufferId| {
            network.borrow_mut().values(v, len).unwrap_or_else(|error| {
                *failed.borrow_mut() = Some(error);
                vec![0.0; len]
            })
        };
        let (x, x_0) = (LazyCell::new(|| read(X)), LazyCell::new(|| read(X_0)));
        let result = (self.on_step)(SampleStep { t, done, steps, x: LazyBatch(&x), x_0: LazyBatch(&x_0) });
        // After a failed read, the batch that the callback saw is invalid.
        failed.take().map_or(result, Err)
    }

    /// The final batch.
    pub fn finish(mut self) -> Result<Vec<f32>> {
        self.values(X)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_thresholding_adapts_to_the_image() {
        let image: Vec<f32> = (0..201).map(|i| (i as f32 - 100.0) / 50.0).collect();
        let with = |threshold: Threshold| {
            let mut p = image.clone();
            threshold.apply(&mut p);
            p
        };
        assert_eq!(with(Threshold::None), image);
        assert_eq!(with(Threshold::Clip)[..3], [-1.0; 3]);
        // The sorted magnitudes are 0, then each of 1/50 .. 100/50 twice; the 0.995 quantile of 201 values is
        // at index 199, which is 2.
        assert_eq!(with(Threshold::Dynamic)[25], image[25] / 2.0);
        let mut small = [0.25, -0.5];
        Threshold::Dynamic.apply(&mut small);
        assert_eq!(small, [0.25, -0.5], "never scaled up");
        assert_eq!(quantile(&[4.0, -1.0, 2.0], 0.75), 3.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    /// Outputs the same value for every image.
    struct Constant(Prediction, f32);

    impl Denoiser for Constant {
        fn batch(&self) -> usize {
            1
        }

        fn image_len(&self) -> usize {
            1
        }

        fn prediction(&self) -> Prediction {
            self.0
        }

        fn predict(&mut self, _: &[f32], _: f64, output: &mut [f32]) -> Result<()> {
            output.fill(self.1);
            Ok(())
        }
    }

    #[test]
    fn outputs_convert_exactly_at_both_ends_of_the_schedule() {
        let noise = Level { t: 9.0, alpha: 0.0, sigma: 1.0 };
        let (x, output) = (0.75f32, 0.3f32);
        let converted = |prediction, level: Level| {
            let (mut denoiser, key) = (Constant(prediction, output), NoiseKey { seed: 0, first: 0 });
            let mut on_step = |_: SampleStep<'_>| Ok(());
            let mut d = SamplerState::new(Some(&[x]), &mut denoiser, key, Threshold::None, 1, &mut on_step)?;
            d.denoise(level)?;
            d.predict_eps(level)?;
            Ok::<_, crate::Error>([X_0, EPS].map(|v| d.values(v).unwrap()[0]))
        };
        // x_0 = alpha x - sigma v, eps = sigma x + alpha v.
        assert_eq!(converted(Prediction::V, noise).unwrap(), [-output, x]);
        assert_eq!(converted(Prediction::V, Level::CLEAN).unwrap(), [x, output]);
        // eps = (x - alpha x_0) / sigma.
        assert_eq!(converted(Prediction::X0, noise).unwrap(), [output, x]);
        assert_eq!(converted(Prediction::X0, Level::CLEAN).unwrap()[0], output);
        // x_0 = (x - sigma eps) / alpha, undefined where there is no signal.
        assert_eq!(converted(Prediction::Eps, Level::CLEAN).unwrap(), [x, output]);
        assert!(converted(Prediction::Eps, noise).unwrap_err().to_string().contains("does not determine"));
        // All conversions agree.
        for prediction in [Prediction::X0, Prediction::V] {
            let (of_x, of_output) = prediction.to_x_0(noise);
            let x_0 = of_x * f64::from(x) + of_output * f64::from(output);
            assert_eq!(x_0, prediction.x_0(noise, f64::from(x), f64::from(output)));
            assert_eq!(x_0 as f32, converted(prediction, noise).unwrap()[0]);
        }
    }

    #[test]
    fn axpby_scales_and_adds() {
        let mut x = [1.0, 2.0];
        axpby(&mut x, 0.5, [(2.0, &[1.0, 0.0]), (-1.0, &[0.0, 4.0])]);
        assert_eq!(x, [2.5, -3.0]);
    }
}
