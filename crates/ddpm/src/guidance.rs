//! Class-conditional sampling with classifier-free guidance.

use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::process::Prediction;
use crate::sampler::DeviceDenoiser;
use crate::sampler::buffers::UNCOND;
use crate::schedule::Schedule;
use ddpm_engine::{BufferId, SamplerBuffers};

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
    /// [`Error::Config`] for an invalid scale or interval.
    pub fn check(self) -> Result<()> {
        let invalid = |key: &str, reason: String| Err(Error::Config { key: key.to_owned(), reason });
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
    /// The network, which must take classes.
    pub model: &'a mut Model,
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
        model: &'a mut Model,
        schedule: &'a Schedule,
        labels: Vec<Option<u32>>,
        guidance: Guidance,
    ) -> Self {
        Self { model, schedule, labels, guidance, uncond: Vec::new(), uploaded_labels: None }
    }

    /// The guidance scale at a timestep.
    fn scale(&self, t: f64) -> f64 {
        let (sigma, (low, high)) = (self.schedule.level(t).karras_sigma(), self.guidance.interval);
        if sigma >= low && sigma <= high { self.guidance.scale } else { 1.0 }
    }
}

impl Denoiser for Guided<'_> {
    fn batch(&self) -> usize {
        self.model.batch()
    }

    fn image_len(&self) -> usize {
        self.model.image_len()
    }

    fn prediction(&self) -> Prediction {
        self.model.prediction()
    }

    /// ```text
    /// eps(x) + w (eps(x, c) - eps(x))                                                       (Ho, Salimans, eq. 6)
    /// ```
    /// with w = 1 for no guidance, where the paper writes 1 + w. Images and v are linear in the noise, so the
    /// same holds for them. A learned variance is the conditional one, which is evaluated last.
    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        let scale = self.scale(t);
        if scale != 1.0 {
            self.model.set_labels(&vec![None; self.labels.len()])?;
            if scale == 0.0 {
                return self.model.predict(x_t, t, output);
            }
            self.uncond.resize(output.len(), 0.0);
            self.model.predict(x_t, t, &mut self.uncond)?;
        }
        self.model.set_labels(&self.labels)?;
        self.model.predict(x_t, t, output)?;
        if scale != 1.0 {
            let scale = scale as f32;
            output.iter_mut().zip(&self.uncond).for_each(|(y, u)| *y = u + scale * (*y - u));
        }
        Ok(())
    }

    fn variance(&self) -> Option<&[f32]> {
        self.model.variance()
    }

    fn as_device_denoiser(&mut self) -> Option<&mut dyn DeviceDenoiser> {
        if self.model.as_device_denoiser().is_some() { Some(self) } else { None }
    }
}

/// The same in device memory, where the labels are kept too.
impl DeviceDenoiser for Guided<'_> {
    fn buffers(&mut self) -> Result<&mut dyn SamplerBuffers> {
        self.model.buffers()
    }

    fn predict_buffer(&mut self, x_t: BufferId, t: f64, output: BufferId) -> Result<()> {
        let scale = self.scale(t);
        if scale != 1.0 {
            self.model.select_labels(false)?;
            if scale == 0.0 {
                return self.model.predict_buffer(x_t, t, output);
            }
            self.model.predict_buffer(x_t, t, UNCOND)?;
        }
        if self.uploaded_labels.as_ref() != Some(&self.labels) {
            self.model.upload_labels(&self.labels)?;
            self.uploaded_labels = Some(self.labels.clone());
        }
        self.model.select_labels(true)?;
        self.model.predict_buffer(x_t, t, output)?;
        if scale != 1.0 {
            self.model.plan_buffers()?.extrapolate(output, UNCOND, scale as f32)?;
        }
        Ok(())
    }

    fn copy_variance(&mut self, to: BufferId) -> Result<bool> {
        self.model.copy_variance(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::nets::from_config;

    fn config() -> Config {
        let pairs = [
            ("attention.down_channels", "8, 16"),
            ("attention.mid_channels", "16, 8"),
            ("attention.down_sample", "true"),
            ("attention.num_class_embeds", "3"),
        ];
        let pairs: Vec<_> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        Config::load(Some("digits"), None, &pairs).unwrap()
    }

    #[test]
    fn guidance_extrapolates_from_unconditional_to_conditional_within_its_interval() {
        let (schedule, config) = (Schedule::linear(1000, 1e-4, 0.02).unwrap(), config());
        let mut model = Model::new(&*from_config(&config, 1), [2, 4, 4, 1], 1).unwrap();
        for i in 0..model.parameters().len() {
            let weights = model.parameters()[i].init(3, i);
            model.set_parameter(i, &weights).unwrap();
        }
        let x: Vec<f32> = (0..32).map(|i| (i % 7) as f32 / 3.0 - 1.0).collect();
        let mut predict = |labels: [Option<u32>; 2], scale, interval, t| {
            let guidance = Guidance { scale, interval };
            let mut y = vec![0.0; 32];
            let mut guided = Guided::new(&mut model, &schedule, labels.to_vec(), guidance);
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
