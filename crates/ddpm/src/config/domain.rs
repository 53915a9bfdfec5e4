//! What the settings describe: how images are read, the schedule, the network, the objective and the sampler.

use super::{Config, DiffusionConfig, SamplingConfig};
use crate::Result;
use crate::data::{CsvOptions, DataOptions};
use crate::nets::Network;
use crate::objective::{LossKind, Objective};
use crate::sampler::{self, SamplerOptions};
use crate::schedule::{Schedule, ScheduleOptions};
use ddpm_engine::ops::Loss;
use std::path::PathBuf;

impl DiffusionConfig {
    /// The parameters of the noise schedule.
    pub fn schedule_options(&self) -> ScheduleOptions {
        ScheduleOptions {
            kind: self.schedule,
            timesteps: self.timesteps,
            beta_start: self.beta_start,
            beta_end: self.beta_end,
            max_beta: self.max_beta,
            zero_terminal_snr: self.zero_terminal_snr,
        }
    }
}

impl Config {
    /// The options for reading the images.
    pub fn data_options(&self) -> DataOptions {
        let d = &self.data;
        DataOptions {
            size: self.image_size().map(|s| (s.height, s.width)),
            channels: self.image_channels(),
            on_bad_file: d.on_bad_file,
            alpha: d.alpha,
            resize: d.resize,
            resize_side: d.resize_side,
            random_crop_scale: d.random_crop_scale,
            horizontal_flip: d.horizontal_flip,
            csv: d.csv.as_ref().map(|path| CsvOptions {
                path: PathBuf::from(path),
                id_column: d.csv_id_column.clone(),
                extension: d.csv_extension.clone(),
                label_column: d.csv_label_column.clone(),
            }),
        }
    }

    /// The noise schedule.
    ///
    /// # Errors
    /// Those of [`ScheduleOptions::build`].
    pub fn schedule(&self) -> Result<Schedule> {
        Ok(self.diffusion.schedule_options().build()?)
    }

    /// The network, for images with this many channels.
    pub fn build_network(&self, channels: usize) -> Box<dyn Network> {
        self.selected_network().build(channels, self.diffusion.learned_variance)
    }

    /// The training objective.
    pub fn objective(&self) -> Objective {
        let loss = &self.loss;
        Objective {
            prediction: self.diffusion.prediction,
            loss: match loss.name {
                LossKind::Mse => Loss::Mse,
                LossKind::L1 => Loss::L1,
                LossKind::Huber => Loss::Huber { delta: loss.huber_delta as f32 },
            },
            weighting: loss.weighting,
            min_snr_gamma: loss.min_snr_gamma,
            p2: (loss.p2_gamma, loss.p2_k),
            offset_noise: loss.offset_noise,
            input_perturbation: loss.input_perturbation,
            vlb_weight: loss.vlb_weight,
        }
    }
}

impl SamplingConfig {
    /// The run's default sampling options.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for an unknown sampler.
    pub fn options(&self) -> Result<SamplerOptions> {
        let sampler = sampler::find(&self.sampler)?;
        Ok(self.apply_to(SamplerOptions { sampler, ..SamplerOptions::default() }))
    }

    /// `options`, with these settings as defaults where the sampler supports them.
    pub fn apply_to(&self, options: SamplerOptions) -> SamplerOptions {
        let sampler = options.sampler;
        let variance = options.variance.or(if sampler.variances { self.variance } else { None });
        let of_run = sampler.clipped_output.then_some(self.use_clipped_model_output);
        let use_clipped_model_output = options.use_clipped_model_output.or(of_run);
        let threshold = options.threshold.or(Some(self.threshold));
        // Steps and spacing that suit one sampler need not suit another.
        let same_sampler = sampler.name == self.sampler;
        let steps = options.steps.or(self.steps.filter(|_| same_sampler));
        let spacing = options.spacing.or(self.spacing.filter(|_| same_sampler));
        SamplerOptions { variance, threshold, use_clipped_model_output, steps, spacing, ..options }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{Spacing, Threshold, Variance, find};

    #[test]
    fn a_runs_settings_are_the_defaults() {
        let run = SamplingConfig {
            variance: Some(Variance::Large),
            threshold: Threshold::None,
            use_clipped_model_output: false,
            ..SamplingConfig::default()
        };
        let defaults = run.apply_to(SamplerOptions::default());
        assert_eq!((defaults.variance, defaults.threshold), (run.variance, Some(run.threshold)));
        let (variance, threshold) = (Some(Variance::Small), Some(Threshold::Clip));
        let explicit = run.apply_to(SamplerOptions { variance, threshold, ..SamplerOptions::default() });
        assert_eq!((explicit.variance, explicit.threshold), (variance, threshold));
        // Options that a sampler lacks are not passed to it.
        let ddim = SamplerOptions { sampler: find("ddim").unwrap(), ..SamplerOptions::default() };
        assert_eq!(run.apply_to(ddim).variance, None);
        assert_eq!(run.apply_to(ddim).use_clipped_model_output, Some(false));
        assert_eq!(defaults.use_clipped_model_output, None);
        let explicit = SamplerOptions { use_clipped_model_output: Some(true), ..ddim };
        assert_eq!(run.apply_to(explicit).use_clipped_model_output, Some(true));
        // The run's steps and spacing apply only to its own sampler.
        let run = SamplingConfig {
            sampler: "ddim".to_owned(),
            steps: Some(7),
            spacing: Some(Spacing::Uniform),
            ..SamplingConfig::default()
        };
        let own = run.options().unwrap();
        assert_eq!((own.sampler.name, own.steps, own.spacing()), ("ddim", Some(7), Spacing::Uniform));
        assert_eq!(run.apply_to(SamplerOptions { steps: Some(3), ..ddim }).steps, Some(3));
        let heun = SamplerOptions { sampler: find("heun").unwrap(), ..SamplerOptions::default() };
        let other = run.apply_to(heun);
        assert_eq!((other.steps, other.spacing), (None, None));
    }
}
