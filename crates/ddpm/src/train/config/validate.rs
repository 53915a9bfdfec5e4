//! What the settings may be.

use std::fmt::Display;

use super::{Config, EmaKind, Size, limits, networks};
use crate::model::fitting_sizes;
use crate::objective::{Objective, Weighting};
use crate::process::Prediction;
use crate::sampler::{Options, Variance};
use crate::schedule::{MIN_BETA, Schedule};
use crate::train::posthoc;
use crate::{Error, Result, nets};

/// Largest side of an image, in pixels.
const MAX_SIDE: usize = 4096;

pub(super) fn refuse<T>(key: &str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Config { key: key.into(), reason: reason.into() })
}

pub(super) fn within<T: PartialOrd + Display>(key: &str, value: T, low: T, high: T) -> Result<()> {
    match value >= low && value <= high {
        true => Ok(()),
        false => refuse(key, format!("{value} is out of range; give {low} to {high}")),
    }
}

fn within_size(key: &str, size: Option<Size>) -> Result<()> {
    let Some(size) = size else { return Ok(()) };
    within(key, size.height, 1, MAX_SIDE)?;
    within(key, size.width, 1, MAX_SIDE)
}

/// Whether `value` is above 0 as f32 too, in which it is used, and not above `most`.
pub(super) fn positive(value: f64, most: f64) -> bool {
    value >= f64::from(f32::MIN_POSITIVE) && value <= most
}

/// As [`positive`], or why not.
fn above_zero(key: &str, value: f64, most: f64, usual: impl Display) -> Result<()> {
    match positive(value, most) {
        true => Ok(()),
        false => refuse(
            key,
            format!("{value} is out of range; give a number above 0 and at most {most}; {usual} is usual"),
        ),
    }
}

/// `value` in [0, 1).
pub(super) fn decay(key: &str, value: f64) -> Result<()> {
    match (0.0..1.0).contains(&value) {
        true => Ok(()),
        false => {
            refuse(key, format!("{value} is out of range; give a number from 0 up to, not including, 1"))
        }
    }
}

impl Config {
    /// Checks every setting and how they fit together; what depends on the data only where it is filled in.
    ///
    /// # Errors
    /// [`Error::Config`] with the first setting that does not do, why, and what would.
    pub fn validate(&self) -> Result<()> {
        self.validate_data()?;
        self.validate_diffusion()?;
        self.validate_network()?;
        self.validate_train()
    }

    fn validate_data(&self) -> Result<()> {
        let data = &self.data;
        if data.path.is_empty() {
            return refuse(
                "data.path",
                "is empty; give a folder of images, or \"digits\" for the built-in ones",
            );
        }
        within_size("data.size", data.size)?;
        data.channels.map_or(Ok(()), |c| within("data.channels", c, 1, 4))?;
        within("data.digits_count", data.digits_count, 1, 10_000_000)?;
        // 2^44 MiB are all the bytes that a u64 counts.
        within("data.memory_mib", data.memory_mib, 0, (1 << 44) - 1)?;
        if data.csv.is_none() {
            for (key, given) in [
                ("data.csv_id_column", data.csv_id_column.is_some()),
                ("data.csv_label_column", data.csv_label_column.is_some()),
            ] {
                if given {
                    return refuse(key, "is given without a CSV file; give that too, data.csv");
                }
            }
        } else if data.path == "digits" {
            return refuse(
                "data.path",
                "is the built-in digits; give the folder of the images that data.csv names",
            );
        }
        self.data_options().check()
    }

    fn validate_diffusion(&self) -> Result<()> {
        let diffusion = &self.diffusion;
        within("diffusion.timesteps", diffusion.timesteps, 1, limits::TIMESTEPS)?;
        let (start, end) = (diffusion.beta_start, diffusion.beta_end);
        if !(MIN_BETA..1.0).contains(&start) {
            return refuse(
                "diffusion.beta_start",
                format!("{start} is out of range; give a number between 0 and 1"),
            );
        }
        if !(end > start && end < 1.0) {
            let reason = format!("{end} is out of range; give a number between beta_start, {start}, and 1");
            return refuse("diffusion.beta_end", reason);
        }
        // Below it the signal schedules would keep most of the image to the end.
        if !(0.5..1.0).contains(&diffusion.max_beta) {
            let reason = format!(
                "{} is out of range; give a number from 0.5 up to, not including, 1; 0.999 and 0.9999 are usual",
                diffusion.max_beta
            );
            return refuse("diffusion.max_beta", reason);
        }
        if diffusion.zero_terminal_snr && diffusion.timesteps < 2 {
            let reason = "needs at least 2 timesteps: of one, the image cannot be both kept and lost";
            return refuse("diffusion.zero_terminal_snr", reason);
        }
        if diffusion.learned_variance && diffusion.prediction == Prediction::Eps {
            // A schedule that cannot be made is refused where it is.
            let lost = |s: Schedule| s.timesteps_with_signal() < s.timesteps();
            if Schedule::from_config(diffusion).is_ok_and(lost) {
                let reason = "learns from the image that the noise means, and at the last timesteps nothing is left of it; \
                              use diffusion.prediction = v or x0, or a schedule without diffusion.zero_terminal_snr";
                return refuse("diffusion.learned_variance", reason);
            }
        }
        if self.sampling.variance == Some(Variance::Learned) && !diffusion.learned_variance {
            let reason = "is learned, but the network learns none (diffusion.learned_variance); give small or large, or leave \
                          it unset";
            return refuse("sampling.variance", reason);
        }
        // A schedule that cannot be made is refused where it is.
        let Ok(schedule) = Schedule::from_config(diffusion) else { return Ok(()) };
        let sampler = Options::of_run(&self.sampling)
            .and_then(|options| options.build(&schedule, diffusion.prediction));
        sampler.map(drop).map_err(|error| match error {
            Error::Config { key, reason } => Error::Config { key: format!("sampling.{key}"), reason },
            other => other,
        })
    }

    /// The weights of all timesteps, of settings that are fine each on its own.
    fn validate_weights(&self) -> Result<()> {
        // A schedule that cannot be made is refused where it is.
        let Ok(schedule) = Schedule::from_config(&self.diffusion) else { return Ok(()) };
        let weights = Objective::from_config(self).weights(&schedule).unwrap_or_default();
        let Some(t) = weights.iter().position(|w| !w.is_finite()) else { return Ok(()) };
        let reason = match self.train.loss_weight {
            Weighting::SnrTruncated => format!(
                "\"snr-truncated\" weighs noise infinitely where nothing is left of the image, or hardly anything, here \
                 from t = {t} on; use diffusion.prediction = v or x0, or another weight"
            ),
            _ => format!(
                "weighs t = {t} infinitely; take train.p2_gamma and train.p2_k nearer to 1, or another weight"
            ),
        };
        refuse("train.loss_weight", reason)
    }

    fn validate_network(&self) -> Result<()> {
        let network = &self.network;
        network.im_channels.map_or(Ok(()), |c| within("network.im_channels", c, 1, 4))?;
        within_size("network.im_size", network.im_size)?;
        networks::validate(self)?;
        self.validate_fit()
    }

    /// The network against the images.
    fn validate_fit(&self) -> Result<()> {
        let (data, network) = (&self.data, &self.network);
        if let (Some(ours), Some(theirs)) = (network.im_channels, data.channels)
            && ours != theirs
        {
            let reason = format!(
                "is {ours} but data.channels is {theirs}; make them the same or leave this one unset"
            );
            return refuse("network.im_channels", reason);
        }
        if let (Some(ours), Some(theirs)) = (network.im_size, data.size)
            && ours != theirs
        {
            let reason =
                format!("is {ours} but data.size is {theirs}; make them the same or leave this one unset");
            return refuse("network.im_size", reason);
        }
        let factor = nets::from_config(self, 1).size_factor();
        if let Some(Size { height, width }) = self.image_size()
            && (height % factor != 0 || width % factor != 0)
        {
            let key = if data.size.is_some() { "data.size" } else { "network.im_size" };
            let reason = format!(
                "{height}x{width} cannot be halved {} times, as {} asks; use {}, or fewer halvings there",
                factor.trailing_zeros(),
                networks::halving_key(network.name),
                fitting_sizes(height, width, factor)
            );
            return refuse(key, reason);
        }
        Ok(())
    }

    /// The averages that are kept besides the first.
    fn validate_averages(&self) -> Result<()> {
        // Each takes the memory of the weights.
        const MOST: usize = 8;
        let train = &self.train;
        train.ema_decays.iter().try_for_each(|&d| decay("train.ema_decays", d))?;
        if !train.ema_decays.is_empty() && train.ema == EmaKind::HalfLife {
            let reason =
                "are not looked at with train.ema = half-life; leave them out, or use warm-up or fixed";
            return refuse("train.ema_decays", reason);
        }
        for &width in &train.power_ema {
            posthoc::gamma(width).map_err(|e| match e {
                Error::Config { reason, .. } => Error::Config { key: "train.power_ema".into(), reason },
                other => other,
            })?;
        }
        for (key, all) in [("train.ema_decays", &train.ema_decays), ("train.power_ema", &train.power_ema)] {
            within(key, all.len(), 0, MOST)?;
            if let Some(twice) = all.iter().enumerate().find(|(i, x)| all[..*i].contains(x)) {
                return refuse(key, format!("{} is there twice", twice.1));
            }
        }
        Ok(())
    }

    fn validate_train(&self) -> Result<()> {
        let train = &self.train;
        const MOST: u64 = limits::STEPS;
        match (train.steps, train.epochs) {
            (Some(steps), None) => within("train.steps", steps, 1, MOST)?,
            (None, Some(epochs)) => within("train.epochs", epochs, 1, MOST)?,
            (Some(_), Some(_)) => {
                return refuse("train.steps", "train.epochs is given too; give one of the two");
            }
            (None, None) => {
                return refuse("train.steps", "is not given, nor is train.epochs; give one of the two");
            }
        }
        within("train.batch_size", train.batch_size, 1, limits::BATCH_SIZE)?;
        within("train.accumulate", train.accumulate, 1, 1 << 16)?;
        if let Some(steps) = train.steps
            && steps.saturating_mul(train.accumulate as u64) > MOST
        {
            let reason = format!(
                "{} is out of range: a run has at most {MOST} micro-batches, and train.steps is {steps}",
                train.accumulate
            );
            return refuse("train.accumulate", reason);
        }
        above_zero("train.huber_delta", train.huber_delta, 1e3, 1)?;
        for (key, value, usual) in [
            ("train.min_snr_gamma", train.min_snr_gamma, 5),
            ("train.p2_gamma", train.p2_gamma, 1),
            ("train.p2_k", train.p2_k, 1),
            ("train.ema_half_life", train.ema_half_life, 500_000),
        ] {
            above_zero(key, value, 1e12, usual)?;
        }
        self.validate_weights()?;
        within("train.label_dropout", train.label_dropout, 0.0, 1.0)?;
        within("train.vlb_weight", train.vlb_weight, 0.0, 1e3)?;
        within("train.offset_noise", train.offset_noise, 0.0, 10.0)?;
        within("train.input_perturbation", train.input_perturbation, 0.0, 10.0)?;
        if !(train.lr > 0.0 && train.lr <= limits::LR) {
            // Smaller ones than f32 has are no mistake: nothing is learnt then.
            return above_zero("train.lr", train.lr, limits::LR, "1e-4");
        }
        within("train.warmup_steps", train.warmup_steps, 0, MOST)?;
        within("train.lr_min", train.lr_min, 0.0, train.lr)?;
        within("train.plateau_patience", train.plateau_patience, 0, MOST)?;
        if !(train.plateau_factor > 0.0 && train.plateau_factor < 1.0) {
            let reason =
                format!("{} is out of range; give a number between 0 and 1, as 0.5", train.plateau_factor);
            return refuse("train.plateau_factor", reason);
        }
        decay("train.plateau_threshold", train.plateau_threshold)?;
        decay("train.beta1", train.beta1)?;
        decay("train.beta2", train.beta2)?;
        above_zero("train.adam_eps", train.adam_eps, 1.0, "1e-8")?;
        within("train.weight_decay", train.weight_decay, 0.0, 1e3)?;
        within("train.clip_norm", train.clip_norm, 0.0, 1e9)?;
        decay("train.ema_decay", train.ema_decay)?;
        self.validate_averages()?;
        if i64::try_from(train.seed).is_err() {
            return refuse("train.seed", format!("{} is out of range; give 0 to {}", train.seed, i64::MAX));
        }
        within("train.threads", train.threads, 0, limits::THREADS)?;
        within("train.sample_count", train.sample_count, 0, 1 << 16)?;
        within("train.sample_steps", train.sample_steps, 0, limits::TIMESTEPS)?;
        for (key, every) in [
            ("train.sample_every", train.sample_every),
            ("train.checkpoint_every", train.checkpoint_every),
            ("train.snapshot_every", train.snapshot_every),
        ] {
            within(key, every, 0, MOST)?;
        }
        within("train.keep", train.keep, 2, 1_000_000)
    }
}
