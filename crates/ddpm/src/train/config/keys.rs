//! Every setting with its default and its one line of explanation.
//!
//! The table below is the only place a setting is listed: the structs, their documentation, the commented TOML and
//! "did you mean" are all made from it. A new setting is one entry here, and a check in `validate.rs`.

use crate::data::OnBadFile;
use ddpm_engine::ops::Activation;
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
        /// A folder of pictures or of IDX files, or one IDX file; "digits" is the built-in digits.
        path: String = "digits".into(),
        /// Size the pictures are brought to, in pixels: one side or [height, width]; unset: the data's own.
        size: Option<Size> = None,
        /// Channels the pictures are brought to: 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha; unset: the data's own.
        channels: Option<usize> = None,
        /// What to do about files that cannot be read as pictures: "fail" or "skip".
        on_bad_file: OnBadFile = OnBadFile::Fail,
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
        /// Which network: "attention", "simple", "double-conv" or "unet2d"; its settings are in the section of its name.
        name: NetworkKind = NetworkKind::Attention,
        /// Channels of its pictures; unset: the data's.
        im_channels: Option<usize> = None,
        /// Size of its pictures, in pixels: one side or [height, width]; unset: the data's.
        im_size: Option<Size> = None,
    }

    /// The network "attention": the DDPM-Pytorch tutorial's U-Net.
    attention: AttentionConfig {
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

    /// The network "simple": DeepFindr's notebook and its X-ray descendant.
    simple: SimpleConfig {
        /// Channels at the entrance and after each block; each block halves the picture.
        widths: Vec<usize> = vec![64, 128, 256, 512, 1024],
        /// Length of the embedding of the timestep; even, at least 4.
        time_emb_dim: usize = 32,
    }

    /// The network "double-conv": the CIFAR-10 notebook's U-Net.
    double_conv: DoubleConvConfig {
        /// Channels of the first level; the deeper ones have 2, 4 and 8 times as many. Divisible by num_heads.
        base_channels: usize = 64,
        /// Length of the embedding of the timestep; even.
        time_emb_dim: usize = 128,
        /// Heads of each attention.
        num_heads: usize = 4,
        /// Share of the attention weights that are dropped in training.
        dropout: f64 = 0.2,
    }

    /// The network "unet2d": the paper's U-Net with the settings of diffusers' UNet2DModel.
    unet2d: Unet2dConfig {
        /// ResNet blocks of each down block; up blocks have one more.
        layers_per_block: usize = 2,
        /// Channels of each block; all but the last halve the picture.
        block_out_channels: Vec<usize> = vec![128, 256, 256, 256],
        /// For each block "DownBlock2D", or "AttnDownBlock2D" with attention.
        down_block_types: Vec<BlockType> = vec![
            BlockType::DownBlock2D, BlockType::AttnDownBlock2D, BlockType::DownBlock2D, BlockType::DownBlock2D,
        ],
        /// For each block from the deepest "UpBlock2D", or "AttnUpBlock2D" with attention.
        up_block_types: Vec<BlockType> = vec![
            BlockType::UpBlock2D, BlockType::UpBlock2D, BlockType::AttnUpBlock2D, BlockType::UpBlock2D,
        ],
        /// Channels of an attention head; unset: one head.
        attention_head_dim: Option<usize> = None,
        /// Whether the middle block has attention.
        add_attention: bool = true,
        /// Groups of each group normalisation; they divide all channels.
        norm_num_groups: usize = 32,
        /// Groups of the middle attention's normalisation; unset: norm_num_groups, or no normalisation with "scale_shift".
        attn_norm_num_groups: Option<usize> = None,
        /// Added to the variances.
        norm_eps: f64 = 1e-6,
        /// Activation of the ResNet blocks: "silu", "relu", "gelu" or "mish".
        act_fn: ActFn = ActFn::Silu,
        /// Share of the numbers in each ResNet block that are dropped in training.
        dropout: f64 = 0.0,
        /// Zeros around the input of a halving convolution; 0: one row below and one column at the right.
        downsample_padding: usize = 0,
        /// How blocks with attention halve pictures: "conv", or "resnet", a ResNet block around the mean of each 2x2 pixels.
        downsample_type: ResampleKind = ResampleKind::Conv,
        /// How blocks with attention double pictures: "conv" behind repeated pixels, or "resnet".
        upsample_type: ResampleKind = ResampleKind::Conv,
        /// Whether the cosines stand before the sines in the embedding of the timestep.
        flip_sin_to_cos: bool = false,
        /// Taken off the number of the embedding's frequencies where it divides: 0 or 1.
        freq_shift: f64 = 1.0,
        /// Whether pictures are taken for numbers in [0, 1] and brought to [-1, 1].
        center_input_sample: bool = false,
        /// What the sums of the middle block are divided by.
        mid_block_scale_factor: f64 = 1.0,
        /// How the timestep enters: "default", added, or "scale_shift", scaling and shifting what the norm gives.
        resnet_time_scale_shift: TimeScaleShift = TimeScaleShift::Default,
        /// Number of classes that are embedded beside the timestep; unset: none.
        num_class_embeds: Option<usize> = None,
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
#[serde(rename_all = "kebab-case")]
pub enum NetworkKind {
    /// The U-Net of explainingai-code/DDPM-Pytorch.
    Attention,
    /// The U-Net of DeepFindr's notebook.
    Simple,
    /// The U-Net of the CIFAR-10 notebook.
    DoubleConv,
    /// The U-Net of Ho et al. 2020, as diffusers builds it.
    #[serde(rename = "unet2d")]
    Unet2d,
}

impl NetworkKind {
    /// The networks with the sections of their settings.
    pub(crate) const SECTIONS: [(Self, &str); 4] = [
        (Self::Attention, "attention"),
        (Self::Simple, "simple"),
        (Self::DoubleConv, "double_conv"),
        (Self::Unet2d, "unet2d"),
    ];
}

/// What a block of "unet2d" is made of, by diffusers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum BlockType {
    DownBlock2D,
    AttnDownBlock2D,
    UpBlock2D,
    AttnUpBlock2D,
}

impl BlockType {
    /// Whether there is attention behind each ResNet block.
    pub fn attends(self) -> bool {
        matches!(self, Self::AttnDownBlock2D | Self::AttnUpBlock2D)
    }
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActFn {
    /// `x sigmoid(x)`, also called swish.
    #[serde(alias = "swish")]
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)`.
    Gelu,
    /// `x tanh(ln(1 + e^x))`.
    Mish,
}

impl ActFn {
    /// The engine's.
    pub fn activation(self) -> Activation {
        match self {
            Self::Silu => Activation::Silu,
            Self::Relu => Activation::Relu,
            Self::Gelu => Activation::Gelu,
            Self::Mish => Activation::Mish,
        }
    }
}

/// How pictures are halved and doubled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResampleKind {
    /// By a convolution.
    Conv,
    /// By a ResNet block.
    Resnet,
}

/// How the timestep's embedding enters a ResNet block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeScaleShift {
    /// It is added.
    Default,
    /// It scales and shifts.
    ScaleShift,
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
