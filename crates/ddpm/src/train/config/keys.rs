//! Every setting with its default and its one line of explanation.
//!
//! The table below is the only place a setting is listed: the structs, their documentation, the commented TOML and
//! "did you mean" are all made from it. A new setting is one entry here, and a check in `validate.rs`.

use crate::data::{Alpha, OnBadFile, Resize};
use serde::{Deserialize, Serialize};

/// One setting, as the table has it.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The key inside its section, as `batch_size`.
    pub name: &'static str,
    /// What it is, its unit, and what leaving it unset means.
    pub doc: &'static str,
}

/// One section of the settings.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// The section's name, as `train`.
    pub name: &'static str,
    /// What the section is about.
    pub about: &'static str,
    /// Its settings in the order they are printed.
    pub settings: &'static [Setting],
}

macro_rules! settings {
    ($(
        #[doc = $about:literal]
        $section:ident: $config:ident {
            $( #[doc = $doc:literal] $field:ident: $type:ty = $default:expr, )+
        }
    )+) => {
        $(
            #[doc = $about]
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            #[serde(deny_unknown_fields)]
            pub struct $config {
                $( #[doc = $doc] pub $field: $type, )+
            }

            impl Default for $config {
                fn default() -> Self {
                    Self { $( $field: $default, )+ }
                }
            }
        )+

        /// All settings of a training run. The default is the DDPM-Pytorch tutorial's network and training on the
        /// built-in digits.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Config {
            $( #[doc = $about] pub $section: $config, )+
        }

        /// Every section with every setting.
        pub const SECTIONS: &[Section] = &[ $(
            Section {
                name: stringify!($section),
                about: $about.trim_ascii(),
                settings: &[ $( Setting { name: stringify!($field), doc: $doc.trim_ascii() }, )+ ],
            },
        )+ ];

        impl Config {
            /// The values in the order of [`SECTIONS`]; `None` where unset.
            pub(crate) fn values(&self) -> Vec<Vec<Option<toml::Value>>> {
                vec![ $( vec![ $( toml::Value::try_from(&self.$section.$field).ok(), )+ ], )+ ]
            }
        }
    };
}

settings! {
    /// The pictures to learn from.
    data: DataConfig {
        /// A folder or a zip of pictures, or a folder of IDX files or CIFAR batches, or one such file; "digits" is the built-in digits.
        path: String = "digits".into(),
        /// Size the pictures are brought to, in pixels: one side or [height, width]; unset: the data's own.
        size: Option<Size> = None,
        /// Channels the pictures are brought to: 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha; unset: the data's own.
        channels: Option<usize> = None,
        /// What to do about files that cannot be read as pictures: "fail" or "skip".
        on_bad_file: OnBadFile = OnBadFile::Fail,
        /// What becomes of transparency: "keep" as a channel, or lay pictures on "black" or "white"; unset: kept if channels is 2 or 4, else black.
        alpha: Option<Alpha> = None,
        /// How pictures get their size: "short-side" keeps the aspect and cuts the middle out, "exact" resizes both sides.
        resize: Resize = Resize::ShortSide,
        /// The short side, in pixels, that pictures are resized to before the crop; unset: that of size, or none before random crops.
        resize_side: Option<usize> = None,
        /// Least and greatest part of the area that random crops take, as [0.8, 1.0]; unset: no random crops.
        random_crop_scale: Option<[f64; 2]> = None,
        /// Whether half of the pictures are mirrored left to right, drawn anew each epoch; wrong for letters and X-rays.
        horizontal_flip: bool = false,
        /// A CSV file with an id in each row: the pictures are the files of path that it names; unset: all there are.
        csv: Option<String> = None,
        /// The CSV file's column of ids; unset: the first.
        csv_id_column: Option<String> = None,
        /// What is added to an id to make the file's name.
        csv_extension: String = ".png".into(),
        /// The CSV file's column of classes; unset: no classes.
        csv_label_column: Option<String> = None,
        /// Decoded pictures are kept in memory up to this many MiB in all; of more, each is decoded whenever it is read.
        memory_mib: u64 = 2048,
        /// How many of the built-in digits are made (used with path = "digits" only).
        digits_count: usize = 10_000,
    }

    /// The forward process q(x_t | x_0).
    diffusion: DiffusionConfig {
        /// Number of diffusion steps T.
        timesteps: usize = 1000,
        /// How beta_t grows from beta_start to beta_end: "linear".
        schedule: ScheduleKind = ScheduleKind::Linear,
        /// beta_1, the variance added by the first step.
        beta_start: f64 = 1e-4,
        /// beta_T, the variance added by the last step.
        beta_end: f64 = 0.02,
    }

    /// The network that predicts the noise.
    network: NetworkConfig {
        /// Which network: "attention", the DDPM-Pytorch tutorial's U-Net.
        name: NetworkKind = NetworkKind::Attention,
        /// Channels of its pictures; unset: the data's.
        im_channels: Option<usize> = None,
        /// Size of its pictures, in pixels: one side or [height, width]; unset: the data's.
        im_size: Option<Size> = None,
        /// Channels at the entrance and after each down block; each divisible by 8 and by num_heads.
        down_channels: Vec<usize> = vec![32, 64, 128, 256],
        /// Channels at the entrance of the middle and after each of its blocks, from down_channels' last to its last but one.
        mid_channels: Vec<usize> = vec![256, 256, 128],
        /// Whether each down block halves the picture; one fewer than down_channels.
        down_sample: Vec<bool> = vec![true, true, false],
        /// Length of the embedding of the timestep; even.
        time_emb_dim: usize = 128,
        /// Residual layers in each down block.
        num_down_layers: usize = 2,
        /// Attention and residual layers in each middle block.
        num_mid_layers: usize = 2,
        /// Residual layers in each up block.
        num_up_layers: usize = 2,
        /// Heads of each attention; 1, 2, 4, 8 or 16.
        num_heads: usize = 4,
    }

    /// How the network is trained.
    train: TrainConfig {
        /// Optimiser steps in all; give this or epochs.
        steps: Option<u64> = None,
        /// Passes over the data in all; give this or steps.
        epochs: Option<u64> = Some(40),
        /// Pictures per step.
        batch_size: usize = 64,
        /// Learning rate.
        lr: f64 = 1e-4,
        /// The optimiser: "adam" or "adamw".
        optimizer: OptimizerKind = OptimizerKind::Adam,
        /// Decay of Adam's running mean of the gradients.
        beta1: f64 = 0.9,
        /// Decay of Adam's running mean of the squared gradients.
        beta2: f64 = 0.999,
        /// Adam's epsilon, added to the denominator.
        adam_eps: f64 = 1e-8,
        /// Weight decay: with "adam" added to the gradient, with "adamw" taken off the weights.
        weight_decay: f64 = 0.0,
        /// Decay per step of the averaged weights, approached from below over the first steps; 0: no averaging.
        ema_decay: f64 = 0.995,
        /// Seed of every random number of the run.
        seed: u64 = 0,
        /// Threads to compute with; 0: all of the machine's.
        threads: usize = 0,
        /// Steps between sample sheets; 0: only at the end.
        sample_every: u64 = 1000,
        /// Pictures on a sample sheet; 0: no sheets.
        sample_count: usize = 64,
        /// Denoising steps of these sheets; 0: all of the schedule's.
        sample_steps: usize = 100,
        /// Steps between checkpoints; 0: only at the end.
        checkpoint_every: u64 = 1000,
        /// Newest checkpoints kept besides the best one; at least 2.
        keep: usize = 2,
    }
}

/// Height and width in pixels; in a file of settings one number where they are equal, else `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "SizeText", into = "SizeText")]
pub struct Size {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.height, self.width)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one side in pixels or [height, width]")]
enum SizeText {
    Side(usize),
    Sides([usize; 2]),
}

impl From<SizeText> for Size {
    fn from(text: SizeText) -> Self {
        match text {
            SizeText::Side(side) => Self { height: side, width: side },
            SizeText::Sides([height, width]) => Self { height, width },
        }
    }
}

impl From<Size> for SizeText {
    fn from(Size { height, width }: Size) -> Self {
        if height == width { Self::Side(height) } else { Self::Sides([height, width]) }
    }
}

/// How beta_t grows with t.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Linearly from `beta_start` to `beta_end`.
    Linear,
}

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// The U-Net of explainingai-code/DDPM-Pytorch.
    Attention,
}

/// Which optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam; weight decay is added to the gradient.
    Adam,
    /// Adam with weight decay apart from the gradient.
    AdamW,
}
