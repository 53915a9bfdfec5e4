//! What the settings may be.

use std::fmt::Display;

use super::{Config, Size};
use crate::{Error, Result};

/// Groups of every group normalisation of the tutorial's network.
const NORM_GROUPS: usize = 8;
/// Channels the tutorial's network has before its last convolution.
const LAST_CHANNELS: usize = 16;
/// Most channels a network's block may have; keeps every product of sizes far from overflow.
const MAX_CHANNELS: usize = 1 << 14;
/// Largest side of a picture, in pixels.
const MAX_SIDE: usize = 4096;

fn refuse<T>(key: &str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Config { key: key.into(), reason: reason.into() })
}

fn within<T: PartialOrd + Display>(key: &str, value: T, low: T, high: T) -> Result<()> {
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

/// `value` in [0, 1).
fn decay(key: &str, value: f64) -> Result<()> {
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
                "is empty; give a folder of pictures, or \"digits\" for the built-in ones",
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
                "is the built-in digits; give the folder of the pictures that data.csv names",
            );
        }
        self.data_options().check()
    }

    fn validate_diffusion(&self) -> Result<()> {
        let diffusion = &self.diffusion;
        within("diffusion.timesteps", diffusion.timesteps, 1, 1_000_000)?;
        let (start, end) = (diffusion.beta_start, diffusion.beta_end);
        if !(start > 0.0 && start < 1.0) {
            return refuse(
                "diffusion.beta_start",
                format!("{start} is out of range; give a number between 0 and 1"),
            );
        }
        if !(end > start && end < 1.0) {
            let reason = format!("{end} is out of range; give a number between beta_start, {start}, and 1");
            return refuse("diffusion.beta_end", reason);
        }
        Ok(())
    }

    fn validate_network(&self) -> Result<()> {
        let network = &self.network;
        let (down, mid, heads) = (&network.down_channels, &network.mid_channels, network.num_heads);
        network.im_channels.map_or(Ok(()), |c| within("network.im_channels", c, 1, 4))?;
        within_size("network.im_size", network.im_size)?;
        if heads == 0 || !LAST_CHANNELS.is_multiple_of(heads) {
            let reason = format!(
                "{heads} heads do not divide the {LAST_CHANNELS} channels of the last block; give 1, 2, 4, 8 or 16"
            );
            return refuse("network.num_heads", reason);
        }
        let unit = NORM_GROUPS.max(heads);
        for (key, list) in [("network.down_channels", down), ("network.mid_channels", mid)] {
            if !(2..=16).contains(&list.len()) {
                return refuse(key, format!("has {} entries; give 2 to 16", list.len()));
            }
            for &channels in list {
                within(key, channels, 1, MAX_CHANNELS)?;
                if channels % unit != 0 {
                    let (below, above) = (channels / unit * unit, channels.next_multiple_of(unit));
                    let near = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
                    let reason = format!(
                        "{channels} is not divisible by {unit} (the normalisation's {NORM_GROUPS} groups, {heads} heads); use {near}"
                    );
                    return refuse(key, reason);
                }
            }
        }
        if network.down_sample.len() != down.len() - 1 {
            let reason = format!(
                "has {} entries; give {}, one fewer than network.down_channels",
                network.down_sample.len(),
                down.len() - 1
            );
            return refuse("network.down_sample", reason);
        }
        let (first, last) = (down[down.len() - 1], down[down.len() - 2]);
        if mid[0] != first {
            let reason =
                format!("begins with {}; it must begin with down_channels' last entry, {first}", mid[0]);
            return refuse("network.mid_channels", reason);
        }
        if mid[mid.len() - 1] != last {
            let end = mid[mid.len() - 1];
            let reason =
                format!("ends with {end}; it must end with down_channels' last but one entry, {last}");
            return refuse("network.mid_channels", reason);
        }
        within("network.time_emb_dim", network.time_emb_dim, 2, MAX_CHANNELS)?;
        if !network.time_emb_dim.is_multiple_of(2) {
            let (below, above) = (network.time_emb_dim - 1, network.time_emb_dim + 1);
            return refuse(
                "network.time_emb_dim",
                format!("is odd; half are sines and half cosines: use {below} or {above}"),
            );
        }
        within("network.num_down_layers", network.num_down_layers, 1, 64)?;
        within("network.num_mid_layers", network.num_mid_layers, 1, 64)?;
        within("network.num_up_layers", network.num_up_layers, 1, 64)?;
        self.validate_fit()
    }

    /// The network against the pictures.
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
        // At most 16 down blocks, so the shift cannot overflow.
        let factor = 1 << network.down_sample.iter().filter(|&&halves| halves).count();
        if let Some(Size { height, width }) = self.picture_size()
            && (height % factor != 0 || width % factor != 0)
        {
            let nearest = |side: usize| side.next_multiple_of(factor);
            let use_size = Size { height: nearest(height), width: nearest(width) };
            let key = if data.size.is_some() { "data.size" } else { "network.im_size" };
            let reason = format!(
                "{height}x{width} cannot be halved {} times, as network.down_sample asks; use {use_size}, or fewer true there",
                factor.trailing_zeros()
            );
            return refuse(key, reason);
        }
        Ok(())
    }

    fn validate_train(&self) -> Result<()> {
        let train = &self.train;
        // Steps and epochs are 32-bit words in the random numbers' counter.
        const MOST: u64 = u32::MAX as u64;
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
        within("train.batch_size", train.batch_size, 1, 1 << 16)?;
        if !(train.lr > 0.0 && train.lr <= 10.0) {
            let reason = format!("{} is out of range; give a number above 0, 1e-4 being usual", train.lr);
            return refuse("train.lr", reason);
        }
        decay("train.beta1", train.beta1)?;
        decay("train.beta2", train.beta2)?;
        if !(train.adam_eps > 0.0 && train.adam_eps <= 1.0) {
            let reason =
                format!("{} is out of range; give a number above 0, 1e-8 being usual", train.adam_eps);
            return refuse("train.adam_eps", reason);
        }
        within("train.weight_decay", train.weight_decay, 0.0, 1e3)?;
        decay("train.ema_decay", train.ema_decay)?;
        if i64::try_from(train.seed).is_err() {
            return refuse("train.seed", format!("{} is out of range; give 0 to {}", train.seed, i64::MAX));
        }
        within("train.threads", train.threads, 0, 1024)?;
        within("train.sample_count", train.sample_count, 0, 1 << 16)?;
        within("train.keep", train.keep, 2, 1_000_000)
    }
}
