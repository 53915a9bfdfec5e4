//! Classes in sampling, with classifier-free guidance.

use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::process::Prediction;
use crate::sampler::Resident;
use crate::sampler::vectors::WITHOUT;
use crate::schedule::Schedule;
use ddpm_engine::{Vector, Vectors};

/// How much further than told images go towards their class (Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// 0: the class is not told; 1: it is told and no more; above 1: images are more of their class and less varied.
    pub scale: f64,
    /// The sigmas ([`Level::ratio`](crate::schedule::Level::ratio)) between which it acts; outside, the class is told and
    /// no more (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
    pub interval: (f64, f64),
}

impl Default for Guidance {
    fn default() -> Self {
        Self { scale: 1.0, interval: (0.0, f64::INFINITY) }
    }
}

impl Guidance {
    /// # Errors
    /// [`Error::Config`] for a scale or an interval that means nothing.
    pub fn check(self) -> Result<()> {
        let refused = |key: &str, reason: String| Err(Error::Config { key: key.to_owned(), reason });
        let Self { scale, interval: (low, high) } = self;
        if !(0.0..=1000.0).contains(&scale) {
            let reason =
                format!("{scale} is out of range; give 0 (no class), 1 (none) or more, 2 to 5 being usual");
            return refused("guidance", reason);
        }
        if !(low >= 0.0 && low < high) {
            let reason = format!("{low},{high} is no interval; give two sigmas, 0 or more, the lower first");
            return refused("guidance interval", reason);
        }
        Ok(())
    }
}

/// A network that is told the class of each image, and asked twice where guidance acts.
pub struct Guided<'a> {
    /// The network, which takes classes.
    pub model: &'a mut Model,
    /// Its schedule.
    pub schedule: &'a Schedule,
    /// The class of each image of the batch.
    pub labels: Vec<Option<u32>>,
    /// How far.
    pub guidance: Guidance,
    /// What is predicted without the class.
    without: Vec<f32>,
    /// The classes that are kept in a device's memory.
    kept: Option<Vec<Option<u32>>>,
}

impl<'a> Guided<'a> {
    /// A network with the classes of a batch.
    pub fn new(
        model: &'a mut Model,
        schedule: &'a Schedule,
        labels: Vec<Option<u32>>,
        guidance: Guidance,
    ) -> Self {
        Self { model, schedule, labels, guidance, without: Vec::new(), kept: None }
    }

    /// How far towards the class at a timestep.
    fn scale(&self, t: f64) -> f64 {
        let (sigma, (low, high)) = (self.schedule.level(t).ratio(), self.guidance.interval);
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
    /// with w = 1 for the class alone, where the paper writes 1 + w. Images and v are linear in the noise, so that the
    /// same holds for them. A learned variance is that of the class as told, for which the network is asked last.
    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        let scale = self.scale(t);
        if scale != 1.0 {
            self.model.set_labels(&vec![None; self.labels.len()])?;
            if scale == 0.0 {
                return self.model.predict(x_t, t, output);
            }
            self.without.resize(output.len(), 0.0);
            self.model.predict(x_t, t, &mut self.without)?;
        }
        self.model.set_labels(&self.labels)?;
        self.model.predict(x_t, t, output)?;
        if scale != 1.0 {
            let scale = scale as f32;
            output.iter_mut().zip(&self.without).for_each(|(y, u)| *y = u + scale * (*y - u));
        }
        Ok(())
    }

    fn variance(&self) -> Option<&[f32]> {
        self.model.variance()
    }

    fn resident(&mut self) -> Option<&mut dyn Resident> {
        if self.model.resident().is_some() { Some(self) } else { None }
    }
}

/// The same with everything in the device's memory, where the classes are kept too.
impl Resident for Guided<'_> {
    fn vectors(&mut self) -> Result<&mut dyn Vectors> {
        self.model.vectors()
    }

    fn predict_vector(&mut self, x_t: Vector, t: f64, output: Vector) -> Result<()> {
        let scale = self.scale(t);
        if scale != 1.0 {
            self.model.select_labels(false)?;
            if scale == 0.0 {
                return self.model.predict_vector(x_t, t, output);
            }
            self.model.predict_vector(x_t, t, WITHOUT)?;
        }
        if self.kept.as_ref() != Some(&self.labels) {
            self.model.keep_labels(&self.labels)?;
            self.kept = Some(self.labels.clone());
        }
        self.model.select_labels(true)?;
        self.model.predict_vector(x_t, t, output)?;
        if scale != 1.0 {
            self.model.plan_vectors()?.extrapolate(output, WITHOUT, scale as f32)?;
        }
        Ok(())
    }

    fn bring_variance(&mut self, to: Vector) -> Result<bool> {
        self.model.bring_variance(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nets::from_config;
    use crate::train::config::Config;

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
    fn guidance_goes_on_from_no_class_to_the_class_within_its_interval() {
        let (schedule, config) = (Schedule::linear(1000, 1e-4, 0.02).unwrap(), config());
        let mut model = Model::new(&*from_config(&config, 1), [2, 4, 4, 1], 1).unwrap();
        for i in 0..model.parameters().len() {
            let weights = model.parameters()[i].init(3, i);
            model.set_parameter(i, &weights).unwrap();
        }
        let x: Vec<f32> = (0..32).map(|i| (i % 7) as f32 / 3.0 - 1.0).collect();
        let mut ask = |labels: [Option<u32>; 2], scale, interval, t| {
            let guidance = Guidance { scale, interval };
            let mut y = vec![0.0; 32];
            let mut guided = Guided::new(&mut model, &schedule, labels.to_vec(), guidance);
            guided.predict(&x, t, &mut y).unwrap();
            y
        };
        let all = (0.0, f64::INFINITY);
        let told = [Some(2), Some(0)];
        let (with, without) = (ask(told, 1.0, all, 500.0), ask([None, None], 1.0, all, 500.0));
        assert!(with != without && ask([Some(1), Some(0)], 1.0, all, 500.0) != with);
        assert_eq!(ask(told, 0.0, all, 500.0), without);
        let three = ask(told, 3.0, all, 500.0);
        for ((y, c), u) in three.iter().zip(&with).zip(&without) {
            assert_eq!(*y, u + 3.0 * (c - u));
        }
        let sigma = schedule.level(500.0).ratio();
        assert_eq!(ask(told, 3.0, (0.0, sigma), 500.0), three);
        assert_eq!(ask(told, 3.0, (0.0, 0.9 * sigma), 500.0), with);
        assert_eq!(ask(told, 3.0, (1.1 * sigma, 100.0), 500.0), with);
    }

    #[test]
    fn guidance_that_means_nothing_is_refused() {
        let all = (0.0, f64::INFINITY);
        for (scale, interval) in [(-1.0, all), (f64::NAN, all), (2.0, (3.0, 1.0)), (2.0, (-1.0, 1.0))] {
            assert!(Guidance { scale, interval }.check().is_err(), "{scale}, {interval:?}");
        }
        assert!(Guidance::default().check().is_ok());
    }
}
