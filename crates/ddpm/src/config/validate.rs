//! Validation of settings.

use std::fmt::Display;

use super::{Config, EmaKind, Size, limits, networks};
use crate::model::fitting_sizes;
use crate::objective::Weighting;
use crate::process::Prediction;
use crate::sampler::Variance;
use crate::schedule::{MIN_BETA, Schedule};
use crate::train::posthoc;
use crate::{Error, Result, nets};

/// Maximum side of an image, in pixels.
const MAX_SIDE: usize = 4096;

pub(super) fn refuse<T>(key: &str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Config { key: key.into(), reason: reason.into() })
}

pub(super) fn within<T: PartialOrd + Display>(key: &str, value: T, low: T, high: T) -> Result<()> {
    if value >= low && value <= high {
        Ok(())
    } else {
        refuse(key, format!("{value} is out of range; give {low} to {high}"))
    }
}

fn within_size(key: &str, size: Option<Size>) -> Result<()> {
    let Some(size) = size else { return Ok(()) };
    within(key, size.height, 1, MAX_SIDE)?;
    within(key, size.width, 1, MAX_SIDE)
}

/// Whether `value` is above 0, even as the f32 that is computed with, and at most `max`.
pub(super) fn positive(value: f64, max: f64) -> bool {
    value >= f64::from(f32::MIN_POSITIVE) && value <= max
}

/// Checks that `value` is [`positive`].
fn above_zero(key: &str, value: f64, max: f64, usual: impl Display) -> Result<()> {
    match positive(value, max) {
        true => Ok(()),
        false => refuse(
            key,
            format!("{value} is out of range; give a number above 0 and at most {max}; {usual} is usual"),
        ),
    }
}

/// Checks that `value` is in [0, 1).
pub(super) fn decay(key: &str, value: f64) -> Result<()> {
    match (0.0..1.0).contains(&value) {
        true => Ok(()),
        false => refuse(key, format!("{value} is out of range; give a number of at least 0 and less than 1")),
    }
}

impl Config {
    /// Checks every setting and their combinations; what depends on the data is checked only once it is filled in.
    ///
    /// # Errors
    /// [`Error::Config`] with the first invalid setting, the reason, and a remedy.
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
        // 2^44 MiB would overflow a u64 count of bytes.
        within("data.memory_mib", data.memory_mib, 0, (1 << 44) - 1)?;
        if data.csv.is_none() {
            for (key, given) in [
                ("data.csv_id_column", data.csv_id_column.is_some()),
                ("data.csv_label_column", data.csv_label_column.is_some()),
            ] {
                if given {
                    return refuse(key, "is given without a CSV file; set data.csv too");
                }
            }
        } else if data.path == "digits" {
            return refuse(
                "data.path",
                "selects the built-in digits; give the folder of the images that data.csv lists",
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
        // A lower bound would keep most of the signal up to the last step.
        if !(0.5..1.0).contains(&diffusion.max_beta) {
            let reason = format!(
                "{} is out of range; give a number of at least 0.5 and less than 1; 0.999 and 0.9999 are usual",
                diffusion.max_beta
            );
            return refuse("diffusion.max_beta", reason);
        }
        if diffusion.zero_terminal_snr && diffusion.timesteps < 2 {
            let reason = "needs at least 2 timesteps: the first must keep signal and the last must not";
            return refuse("diffusion.zero_terminal_snr", reason);
        }
        if diffusion.learned_variance && diffusion.prediction == Prediction::Eps {
            // An invalid schedule is reported where it is built.
            let lost = |s: Schedule| s.timesteps_with_signal() < s.timesteps();
            if self.schedule().is_ok_and(lost) {
                let reason = "with prediction = eps needs an estimate of x_0, which does not exist at the last timesteps, where no \
                              signal is left; use diffusion.prediction = v or x0, or a schedule without \
                              diffusion.zero_terminal_snr";
                return refuse("diffusion.learned_variance", reason);
            }
        }
        if self.sampling.variance == Some(Variance::Learned) && !diffusion.learned_variance {
            let reason = "is learned, but the network learns no variance (diffusion.learned_variance = false); use small or \
                          large, or leave it unset";
            return refuse("sampling.variance", reason);
        }
        // An invalid schedule is reported where it is built.
        let Ok(schedule) = self.schedule() else { return Ok(()) };
        let sampler =
            self.sampling.options().and_then(|options| Ok(options.build(&schedule, diffusion.prediction)?));
        sampler.map(drop).map_err(|error| match error {
            Error::Config { key, reason } => Error::Config { key: format!("sampling.{key}"), reason },
            other => other,
        })
    }

    /// Checks that the loss weights of all timesteps are finite, for settings that are each valid on their own.
    fn validate_weights(&self) -> Result<()> {
        // An invalid schedule is reported where it is built.
        let Ok(schedule) = self.schedule() else { return Ok(()) };
        let weights = self.objective().weights(&schedule).unwrap_or_default();
        let Some(t) = weights.iter().position(|w| !w.is_finite()) else { return Ok(()) };
        let reason = match self.train.loss_weight {
            Weighting::SnrTruncated => format!(
                "\"snr-truncated\" with prediction = eps is infinite where almost no signal is left, here from t = {t} on; \
                 use diffusion.prediction = v or x0, or another loss weight"
            ),
            _ => format!(
                "is infinite at t = {t}; set train.p2_gamma and train.p2_k closer to 1, or use another loss weight"
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

    /// Checks that the network fits the images.
    fn validate_fit(&self) -> Result<()> {
        let (data, network) = (&self.data, &self.network);
        if let (Some(ours), Some(theirs)) = (network.im_channels, data.channels)
            && ours != theirs
        {
            let reason =
                format!("is {ours} but data.channels is {theirs}; make them equal or leave this one unset");
            return refuse("network.im_channels", reason);
        }
        if let (Some(ours), Some(theirs)) = (network.im_size, data.size)
            && ours != theirs
        {
            let reason =
                format!("is {ours} but data.size is {theirs}; make them equal or leave this one unset");
            return refuse("network.im_size", reason);
        }
        let factor = nets::from_config(self, 1).size_factor();
        if let Some(Size { height, width }) = self.image_size()
            && (height % factor != 0 || width % factor != 0)
        {
            let key = if data.size.is_some() { "data.size" } else { "network.im_size" };
            let reason = format!(
                "{height}x{width} cannot be halved {} times, as {} requires; use {}, or fewer halvings",
                factor.trailing_zeros(),
                networks::halving_key(network.name),
                fitting_sizes(height, width, factor)
            );
            return refuse(key, reason);
        }
        Ok(())
    }

    /// Checks the additional averages of the weights.
    fn validate_averages(&self) -> Result<()> {
        // Each takes as much memory as the weights.
        const MAX_AVERAGES: usize = 8;
        let train = &self.train;
        train.ema_decays.iter().try_for_each(|&d| decay("train.ema_decays", d))?;
        if !train.ema_decays.is_empty() && train.ema == EmaKind::HalfLife {
            let reason = "have no effect with train.ema = half-life; remove them, or use warm-up or fixed";
            return refuse("train.ema_decays", reason);
        }
        for &width in &train.power_ema {
            posthoc::gamma(width).map_err(|e| match e {
                Error::Config { reason, .. } => Error::Config { key: "train.power_ema".into(), reason },
                other => other,
            })?;
        }
        for (key, all) in [("train.ema_decays", &train.ema_decays), ("train.power_ema", &train.power_ema)] {
            within(key, all.len(), 0, MAX_AVERAGES)?;
            if let Some(twice) = all.iter().enumerate().find(|(i, x)| all[..*i].contains(x)) {
                return refuse(key, format!("lists {} twice", twice.1));
            }
        }
        Ok(())
    }

    fn validate_train(&self) -> Result<()> {
        let train = &self.train;
        const MAX_STEPS: u64 = limits::STEPS;
        match (train.steps, train.epochs) {
            (Some(steps), None) => within("train.steps", steps, 1, MAX_STEPS)?,
            (None, Some(epochs)) => within("train.epochs", epochs, 1, MAX_STEPS)?,
            (Some(_), Some(_)) => {
                return refuse("train.steps", "train.epochs is set too; set only one of them");
            }
            (None, None) => {
                return refuse("train.steps", "neither this nor train.epochs is set; set one of them");
            }
        }
        within("train.batch_size", train.batch_size, 1, limits::BATCH_SIZE)?;
        within("train.accumulate", train.accumulate, 1, 1 << 16)?;
        if let Some(steps) = train.steps
            && steps.saturating_mul(train.accumulate as u64) > MAX_STEPS
        {
            let reason = format!(
                "{} is out of range: a run has at most {MAX_STEPS} micro-batches, and train.steps is {steps}",
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
            // A rate that underflows in f32 is allowed: it trains nothing.
            return above_zero("train.lr", train.lr, limits::LR, "1e-4");
        }
        within("train.warmup_steps", train.warmup_steps, 0, MAX_STEPS)?;
        within("train.lr_min", train.lr_min, 0.0, train.lr)?;
        within("train.plateau_patience", train.plateau_patience, 0, MAX_STEPS)?;
        if !(train.plateau_factor > 0.0 && train.plateau_factor < 1.0) {
            let reason =
                format!("{} is out of range; give a number between 0 and 1, e.g. 0.5", train.plateau_factor);
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
            within(key, every, 0, MAX_STEPS)?;
        }
        within("train.keep", train.keep, 2, 1_000_000)
    }
}
