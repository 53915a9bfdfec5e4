//! Validation of settings.

use super::{
    Config, EmaConfig, EmaKind, LossConfig, LrScheduleConfig, OptimizerConfig, OutputConfig, Size,
    TrainConfig, limits,
};
use crate::nets::fitting_sizes;
use crate::objective::Weighting;
use crate::power_ema;
use crate::process::Prediction;
use crate::sampler::Variance;
use crate::schedule::{MIN_BETA, Schedule};
use crate::settings::check::{above_zero, below_one, refuse, within};
use crate::{Error, Result};

/// Maximum side of an image, in pixels.
const MAX_SIDE: usize = 4096;

fn within_size(key: &str, size: Option<Size>) -> Result<()> {
    let Some(size) = size else { return Ok(()) };
    within(key, size.height, 1, MAX_SIDE)?;
    within(key, size.width, 1, MAX_SIDE)
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
        self.train.validate()?;
        self.loss.validate()?;
        self.validate_weights()?;
        self.optimizer.validate()?;
        self.lr_schedule.validate(self.optimizer.lr)?;
        self.ema.validate()?;
        within("compute.threads", self.compute.threads, 0, limits::THREADS)?;
        self.output.validate()
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
        Ok(self.data_options().check()?)
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
        let reason = match self.loss.weighting {
            Weighting::SnrTruncated => format!(
                "\"snr-truncated\" with prediction = eps is infinite where almost no signal is left, here from t = {t} on; \
                 use diffusion.prediction = v or x0, or another loss weight"
            ),
            _ => format!(
                "is infinite at t = {t}; set loss.p2_gamma and loss.p2_k closer to 1, or use another loss weight"
            ),
        };
        refuse("loss.weighting", reason)
    }

    fn validate_network(&self) -> Result<()> {
        let network = &self.network;
        network.im_channels.map_or(Ok(()), |c| within("network.im_channels", c, 1, 4))?;
        within_size("network.im_size", network.im_size)?;
        self.selected_network().validate()?;
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
        let factor = self.build_network(1).size_factor();
        if let Some(Size { height, width }) = self.image_size()
            && (height % factor != 0 || width % factor != 0)
        {
            let key = if data.size.is_some() { "data.size" } else { "network.im_size" };
            let reason = format!(
                "{height}x{width} cannot be halved {} times, as {} requires; use {}, or fewer halvings",
                factor.trailing_zeros(),
                self.selected_network().halving_key(),
                fitting_sizes(height, width, factor)
            );
            return refuse(key, reason);
        }
        Ok(())
    }
}

impl TrainConfig {
    fn validate(&self) -> Result<()> {
        match (self.steps, self.epochs) {
            (Some(steps), None) => within("train.steps", steps, 1, limits::STEPS)?,
            (None, Some(epochs)) => within("train.epochs", epochs, 1, limits::STEPS)?,
            (Some(_), Some(_)) => {
                return refuse("train.steps", "train.epochs is set too; set only one of them");
            }
            (None, None) => {
                return refuse("train.steps", "neither this nor train.epochs is set; set one of them");
            }
        }
        within("train.batch_size", self.batch_size, 1, limits::BATCH_SIZE)?;
        within("train.accumulate", self.accumulate, 1, 1 << 16)?;
        if let Some(steps) = self.steps
            && steps.saturating_mul(self.accumulate as u64) > limits::STEPS
        {
            let reason = format!(
                "{} is out of range: a run has at most {} micro-batches, and train.steps is {steps}",
                self.accumulate,
                limits::STEPS
            );
            return refuse("train.accumulate", reason);
        }
        within("train.label_dropout", self.label_dropout, 0.0, 1.0)?;
        if i64::try_from(self.seed).is_err() {
            return refuse("train.seed", format!("{} is out of range; give 0 to {}", self.seed, i64::MAX));
        }
        Ok(())
    }
}

impl LossConfig {
    fn validate(&self) -> Result<()> {
        above_zero("loss.huber_delta", self.huber_delta, 1e3, 1)?;
        for (key, value, usual) in [
            ("loss.min_snr_gamma", self.min_snr_gamma, 5),
            ("loss.p2_gamma", self.p2_gamma, 1),
            ("loss.p2_k", self.p2_k, 1),
        ] {
            above_zero(key, value, 1e12, usual)?;
        }
        within("loss.vlb_weight", self.vlb_weight, 0.0, 1e3)?;
        within("loss.offset_noise", self.offset_noise, 0.0, 10.0)?;
        within("loss.input_perturbation", self.input_perturbation, 0.0, 10.0)
    }
}

impl OptimizerConfig {
    fn validate(&self) -> Result<()> {
        if !(self.lr > 0.0 && self.lr <= limits::LR) {
            // A rate that underflows in f32 is allowed: it trains nothing.
            return above_zero("optimizer.lr", self.lr, limits::LR, "1e-4");
        }
        below_one("optimizer.beta1", self.beta1)?;
        below_one("optimizer.beta2", self.beta2)?;
        above_zero("optimizer.eps", self.eps, 1.0, "1e-8")?;
        within("optimizer.weight_decay", self.weight_decay, 0.0, 1e3)?;
        within("optimizer.clip_norm", self.clip_norm, 0.0, 1e9)
    }
}

impl LrScheduleConfig {
    /// `lr` is the base learning rate.
    fn validate(&self, lr: f64) -> Result<()> {
        within("lr_schedule.warmup_steps", self.warmup_steps, 0, limits::STEPS)?;
        within("lr_schedule.min_lr", self.min_lr, 0.0, lr)?;
        within("lr_schedule.plateau_patience", self.plateau_patience, 0, limits::STEPS)?;
        if !(self.plateau_factor > 0.0 && self.plateau_factor < 1.0) {
            let reason =
                format!("{} is out of range; give a number between 0 and 1, e.g. 0.5", self.plateau_factor);
            return refuse("lr_schedule.plateau_factor", reason);
        }
        below_one("lr_schedule.plateau_threshold", self.plateau_threshold)
    }
}

impl EmaConfig {
    fn validate(&self) -> Result<()> {
        // Each takes as much memory as the weights.
        const MAX_AVERAGES: usize = 8;
        above_zero("ema.half_life", self.half_life, 1e12, 500_000)?;
        below_one("ema.decay", self.decay)?;
        self.extra_decays.iter().try_for_each(|&d| below_one("ema.extra_decays", d))?;
        if !self.extra_decays.is_empty() && self.schedule == EmaKind::HalfLife {
            let reason = "have no effect with ema.schedule = half-life; remove them, or use warm-up or fixed";
            return refuse("ema.extra_decays", reason);
        }
        for &width in &self.power_widths {
            power_ema::gamma(width).map_err(|e| match e {
                Error::Config { reason, .. } => Error::Config { key: "ema.power_widths".into(), reason },
                other => other,
            })?;
        }
        for (key, all) in [("ema.extra_decays", &self.extra_decays), ("ema.power_widths", &self.power_widths)]
        {
            within(key, all.len(), 0, MAX_AVERAGES)?;
            if let Some(twice) = all.iter().enumerate().find(|(i, x)| all[..*i].contains(x)) {
                return refuse(key, format!("lists {} twice", twice.1));
            }
        }
        within("ema.snapshot_every", self.snapshot_every, 0, limits::STEPS)
    }
}

impl OutputConfig {
    fn validate(&self) -> Result<()> {
        within("output.sample_count", self.sample_count, 0, 1 << 16)?;
        within("output.sample_steps", self.sample_steps, 0, limits::TIMESTEPS)?;
        within("output.sample_every", self.sample_every, 0, limits::STEPS)?;
        within("output.checkpoint_every", self.checkpoint_every, 0, limits::STEPS)?;
        within("output.keep_checkpoints", self.keep_checkpoints, 2, 1_000_000)
    }
}
