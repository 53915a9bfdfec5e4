//! Class-conditional sampling with classifier-free guidance.

use crate::buffers::{BufferId, UNCOND};
use crate::denoiser::{ConditionalDenoiser, ConditionalDeviceDenoiser, Denoiser};
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::sampler::{DeviceDenoiser, SamplerBuffers};
use crate::schedule::Schedule;

/// Strength of guidance towards the class (Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// 0: unconditional; 1: class-conditional without guidance; above 1: closer to the class, with less
    /// variety.
    pub scale: f64,
    /// The interval of sigmas ([`Level::karras_sigma`](crate::schedule::Level::karras_sigma)) in which
    /// guidance applies; outside it the scale is 1 (Kynkäänniemi et al., "Applying Guidance in a Limited
    /// Interval", 2024).
    pub interval: (f64, f64),
}

impl Default for Guidance {
    fn default() -> Self {
        Self { scale: 1.0, interval: (0.0, f64::INFINITY) }
    }
}

impl Guidance {
    /// # Errors
    /// [`Error::Option`] for an invalid scale or interval.
    pub fn check(self) -> Result<()> {
        let invalid = |key: &str, reason: String| Err(Error::option(key, reason));
        let Self { scale, interval: (low, high) } = self;
        if !(0.0..=1000.0).contains(&scale) {
            let reason = format!(
                "{scale} is out of range; give 0 (no class), 1 (no guidance) or more; 2 to 5 is usual"
            );
            return invalid("guidance", reason);
        }
        if !(low >= 0.0 && low < high) {
            let reason =
                format!("{low},{high} is not an interval; give two sigmas, 0 or more, the lower first");
            return invalid("guidance interval", reason);
        }
        Ok(())
    }
}

/// A class-conditional network, evaluated twice where guidance applies.
pub struct Guided<'a> {
    /// The network.
    pub network: &'a mut dyn ConditionalDenoiser,
    /// Its schedule.
    pub schedule: &'a Schedule,
    /// The class of each image in the batch.
    pub labels: Vec<Option<u32>>,
    /// The guidance.
    pub guidance: Guidance,
    /// The unconditional prediction.
    uncond: Vec<f32>,
    /// The labels that are in device memory.
    uploaded_labels: Option<Vec<Option<u32>>>,
}

impl<'a> Guided<'a> {
    /// A network with the labels of a batch.
    pub fn new(
        network: &'a mut dyn ConditionalDenoiser,
        schedule: &'a Schedule,
        labels: Vec<Option<u32>>,
        guidance: Guidance,
    ) -> Self {
        Self { network, schedule, labels, guidance, uncond: Vec::new(), uploaded_labels: None }
    }

    /// The guidance scale at a timestep.
    fn scale(&self, t: f64) -> f64 {
        let (sigma, (low, high)) = (self.schedule.level(t).karras_sigma(), self.guidance.interval);
        if sigma >= low && sigma <= high { self.guidance.scale } else { 1.0 }
    }

    fn device(&mut self) -> Result<&mut dyn ConditionalDeviceDenoiser> {
        let reason = "the network is not on a device".to_owned();
        let missing = || Error::option("device", reason);
        self.network.as_conditional_device_denoiser().ok_or_else(missing)
    }
}

impl Denoiser for Guided<'_> {
    fn batch(&self) -> usize {
        self.network.batch()
    }

    fn image_len(&self) -> usize {
        self.network.image_len()
    }

    fn prediction(&self) -> Prediction {
        self.network.prediction()
    }

    /// ```text
    /// eps(x) + w (eps(x, c) - eps(x))                                                       (Ho, Salimans, eq. 6)
    /// ```
    /// with w = 1 for no guidance, where the paper writes 1 + w. Images and v are linear in the noise, so the
    /// same holds for them. A learned variance is the conditional one, which is evaluated last.
    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        let scale = self.scale(t);
        if scale != 1.0 {
            self.network.set_labels(&vec![None; self.labels.len()])?;
            if scale == 0.0 {
                return self.network.predict(x_t, t, output);
            }
            self.uncond.resize(output.len(), 0.0);
            self.network.predict(x_t, t, &mut self.uncond)?;
        }
        self.network.set_labels(&self.labels)?;
        self.network.predict(x_t, t, output)?;
        if scale != 1.0 {
            let scale = scale as f32;
            output.iter_mut().zip(&self.uncond).for_each(|(y, u)| *y = u + scale * (*y - u));
        }
        Ok(())
    }

    fn variance(&self) -> Option<&[f32]> {
        self.network.variance()
    }

    fn as_device_denoiser(&mut self) -> Option<&mut dyn DeviceDenoiser> {
        if self.network.as_conditional_device_denoiser().is_some() { Some(self) } else { None }
    }
}

/// The same in device memory.
impl DeviceDenoiser for Guided<'_> {
    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers> {
        self.device()?.buffers()
    }

    fn predict_buffer(&mut self, x_t: BufferId, t: f64, output: BufferId) -> Result<()> {
        let scale = self.scale(t);
        if scale != 1.0 {
            let device = self.device()?;
            device.select_labels(false)?;
            if scale == 0.0 {
                return device.predict_buffer(x_t, t, output);
            }
            device.predict_buffer(x_t, t, UNCOND)?;
        }
        if self.uploaded_labels.as_ref() != Some(&self.labels) {
            let labels = self.labels.clone();
            self.device()?.upload_labels(&labels)?;
            self.uploaded_labels = Some(labels);
        }
        let device = self.device()?;
        device.select_labels(true)?;
        device.predict_buffer(x_t, t, output)?;
        if scale != 1.0 {
            device.buffers()?.extrapolate(output, UNCOND, scale as f32)?;
        }
        Ok(())
    }

    fn copy_variance(&mut self, to: BufferId) -> Result<bool> {
        self.device()?.copy_variance(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outputs a multiple of its input that depends on the image's class and the timestep.
    struct Classes(Vec<Option<u32>>);

    impl Denoiser for Classes {
        fn batch(&self) -> usize {
            2
        }

        fn image_len(&self) -> usize {
            16
        }

        fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
            for (i, (y, x)) in output.iter_mut().zip(x_t).enumerate() {
                *y = x * (self.0[i / 16].map_or(0.3, |class| class as f32 - 0.6)) + t as f32;
            }
            Ok(())
        }
    }

    impl ConditionalDenoiser for Classes {
        fn set_labels(&mut self, labels: &[Option<u32>]) -> Result<()> {
            self.0 = labels.to_vec();
            Ok(())
        }
    }

    #[test]
    fn guidance_extrapolates_from_unconditional_to_conditional_within_its_interval() {
        let schedule = Schedule::linear(1000, 1e-4, 0.02).unwrap();
        let mut network = Classes(Vec::new());
        let x: Vec<f32> = (0..32).map(|i| (i % 7) as f32 / 3.0 - 1.0).collect();
        let mut predict = |labels: [Option<u32>; 2], scale, interval, t| {
            let guidance = Guidance { scale, interval };
            let mut y = vec![0.0; 32];
            let mut guided = Guided::new(&mut network, &schedule, labels.to_vec(), guidance);
            guided.predict(&x, t, &mut y).unwrap();
            y
        };
        let all = (0.0, f64::INFINITY);
        let labels = [Some(2), Some(0)];
        let (cond, uncond) = (predict(labels, 1.0, all, 500.0), predict([None, None], 1.0, all, 500.0));
        assert!(cond != uncond && predict([Some(1), Some(0)], 1.0, all, 500.0) != cond);
        assert_eq!(predict(labels, 0.0, all, 500.0), uncond);
        let three = predict(labels, 3.0, all, 500.0);
        for ((y, c), u) in three.iter().zip(&cond).zip(&uncond) {
            assert_eq!(*y, u + 3.0 * (c - u));
        }
        let sigma = schedule.level(500.0).karras_sigma();
        assert_eq!(predict(labels, 3.0, (0.0, sigma), 500.0), three);
        assert_eq!(predict(labels, 3.0, (0.0, 0.9 * sigma), 500.0), cond);
        assert_eq!(predict(labels, 3.0, (1.1 * sigma, 100.0), 500.0), cond);
    }

    #[test]
    fn invalid_guidance_is_refused() {
        let all = (0.0, f64::INFINITY);
        for (scale, interval) in [(-1.0, all), (f64::NAN, all), (2.0, (3.0, 1.0)), (2.0, (-1.0, 1.0))] {
            assert!(Guidance { scale, interval }.check().is_err(), "{scale}, {interval:?}");
        }
        assert!(Guidance::default().check().is_ok());
    }
}
