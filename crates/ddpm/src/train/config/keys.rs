//! Every setting with its default and its one line of explanation.
//!
//! The table below is the only place a setting is listed: the structs, their documentation, the commented TOML and
//! "did you mean" are all made from it. A new setting is one entry here, and a check in `validate.rs`. Each entry begins
//! with what a change means for a run that is taken up: `free`, `noted` or `learnt` ([`Change`]); without it nothing compiles.

use crate::data::{Alpha, OnBadFile, Resize};
use crate::hardware::{DeviceChoice, Hardware};
use crate::objective::Weighting;
use crate::process::Prediction;
use crate::sampler::{Spacing, Threshold, Variance};
use crate::{Error, Result};
use ddpm_engine::ops::Activation;
use ddpm_engine::{ComputeOptions, MatmulDtype};
use serde::{Deserialize, Serialize};

/// One setting, as the table has it.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The key inside its section, as `batch_size`.
    pub name: &'static str,
    /// What it is, its unit, and what leaving it unset means.
    pub doc: &'static str,
    /// What a change of it does to a run that is taken up.
    pub change: Change,
}

/// What a change of a setting does to a run that has learnt something already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: it has no part in what is learnt.
    Free,
    /// The run goes on, but no longer as it was planned; whoever takes it up is told.
    Noted,
    /// The weights are worth little with another value: it is part of what they learnt. Refused unless forced.
    Learnt,
}

macro_rules! change {
    (free) => {
        Change::Free
    };
    (noted) => {
        Change::Noted
    };
    (learnt) => {
        Change::Learnt
    };
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
            $( #[doc = $doc:literal] $change:ident $field:ident: $type:ty = $default:expr, )+
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
                settings: &[ $( Setting {
                    name: stringify!($field),
                    doc: $doc.trim_ascii(),
                    change: change!($change),
                }, )+ ],
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
    /// The images to learn from.
    data: DataConfig {
        /// A folder or a zip of images, or a folder of IDX files or CIFAR batches, or one such file; "digits" is the built-in digits.
        free path: String = "digits".into(),
        /// Size the images are brought to, in pixels: one side or [height, width]; unset: the data's own.
        learnt size: Option<Size> = None,
        /// Channels the images are brought to: 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha; unset: the data's own.
        learnt channels: Option<usize> = None,
        /// What to do about files that cannot be read as images: "fail" or "skip".
        free on_bad_file: OnBadFile = OnBadFile::Fail,
        /// What becomes of transparency: "keep" as a channel, or lay images on "black" or "white"; unset: kept if channels is 2 or 4, else black.
        noted alpha: Option<Alpha> = None,
        /// How images get their size: "short-side" keeps the aspect and cuts the middle out, "exact" resizes both sides.
        noted resize: Resize = Resize::ShortSide,
        /// The short side, in pixels, that images are resized to before the crop; unset: that of size, or none before random crops.
        noted resize_side: Option<usize> = None,
        /// Least and greatest part of the area that random crops take, as [0.8, 1.0]; unset: no random crops.
        noted random_crop_scale: Option<[f64; 2]> = None,
        /// Whether half of the images are mirrored left to right, drawn anew each epoch; wrong for letters and X-rays.
        noted horizontal_flip: bool = false,
        /// A CSV file with an id in each row: the images are the files of path that it names; unset: all there are.
        free csv: Option<String> = None,
        /// The CSV file's column of ids; unset: the first.
        free csv_id_column: Option<String> = None,
        /// What is added to an id to make the file's name.
        free csv_extension: String = ".png".into(),
        /// The CSV file's column of classes; unset: no classes.
        noted csv_label_column: Option<String> = None,
        /// Decoded images are kept in memory up to this many MiB in all; of more, each is decoded whenever it is read.
        free memory_mib: u64 = 2048,
        /// How many of the built-in digits are made (used with path = "digits" only).
        noted digits_count: usize = 10_000,
    }

    /// The forward process q(x_t | x_0).
    diffusion: DiffusionConfig {
        /// Number of diffusion steps T.
        learnt timesteps: usize = 1000,
        /// How the noise grows: "linear", "scaled-linear", "quadratic" (its other name), "cosine", "sigmoid", "sigmoid-beta".
        learnt schedule: ScheduleKind = ScheduleKind::Linear,
        /// beta_1, the variance added by the first step ("cosine" and "sigmoid" have their own).
        learnt beta_start: f64 = 1e-4,
        /// beta_T, the variance added by the last step ("cosine" and "sigmoid" have their own).
        learnt beta_end: f64 = 0.02,
        /// Largest variance that a step of "cosine" and "sigmoid" adds; diffusers takes 0.999.
        learnt max_beta: f64 = 0.9999,
        /// Whether the schedule is stretched until nothing is left of the image at step T (with "eps" sampling starts before it).
        learnt zero_terminal_snr: bool = false,
        /// What the network predicts: "eps", the noise, "x0", the image, or "v", both (steadier where little is left of it).
        learnt prediction: Prediction = Prediction::Eps,
        /// Whether the network learns the variance of the steps back too, in as many channels more (Nichol, Dhariwal 2021).
        learnt learned_variance: bool = false,
    }

    /// How images are drawn from the run where nothing else is asked for.
    sampling: SamplingConfig {
        /// The sampler, by its name; `ddpm sample --help` lists them.
        free sampler: String = "ddpm".into(),
        /// Number of steps of that sampler; unset: its own.
        free steps: Option<usize> = None,
        /// Which noise levels that sampler visits: "linspace", "uniform" (diffusers' "leading"), "trailing", "quadratic", "karras", "exponential" or "sigma"; unset: its own.
        free spacing: Option<Spacing> = None,
        /// Variance of the noise that ancestral steps add: "small", the posterior's, "large", beta_t, or "learned"; unset: learned where it is, else small.
        free variance: Option<Variance> = None,
        /// How expected images are held within black and white at every step: "clip", "dynamic", or "none".
        free threshold: Threshold = Threshold::Clip,
        /// Whether ddim takes the noise of a step from the image that the threshold has changed, or as it was predicted: the argument of that name in diffusers, where it is false by default; imported pipelines have false.
        free use_clipped_model_output: bool = true,
    }

    /// The network that predicts the noise.
    network: NetworkConfig {
        /// Which network: "attention", "simple", "double-conv" or "unet2d"; its settings are in the section of its name.
        learnt name: NetworkKind = NetworkKind::Attention,
        /// Channels of its images; unset: the data's.
        learnt im_channels: Option<usize> = None,
        /// Size of its images, in pixels: one side or [height, width]; unset: the data's.
        learnt im_size: Option<Size> = None,
    }

    /// The network "attention": the DDPM-Pytorch tutorial's U-Net.
    attention: AttentionConfig {
        /// Channels at the entrance and after each down block; each divisible by 8 and by num_heads.
        learnt down_channels: Vec<usize> = vec![32, 64, 128, 256],
        /// Channels at the entrance of the middle and after each of its blocks, from down_channels' last to its last but one.
        learnt mid_channels: Vec<usize> = vec![256, 256, 128],
        /// Whether each down block halves the image; one fewer than down_channels.
        learnt down_sample: Vec<bool> = vec![true, true, false],
        /// Length of the embedding of the timestep; even.
        learnt time_emb_dim: usize = 128,
        /// Residual layers in each down block.
        learnt num_down_layers: usize = 2,
        /// Attention and residual layers in each middle block.
        learnt num_mid_layers: usize = 2,
        /// Residual layers in each up block.
        learnt num_up_layers: usize = 2,
        /// Heads of each attention; 1, 2, 4, 8 or 16.
        learnt num_heads: usize = 4,
        /// Number of classes that are embedded beside the timestep; unset: none.
        learnt num_class_embeds: Option<usize> = None,
    }

    /// The network "simple": DeepFindr's notebook and its X-ray descendant.
    simple: SimpleConfig {
        /// Channels at the entrance and after each block; each block halves the image.
        learnt widths: Vec<usize> = vec![64, 128, 256, 512, 1024],
        /// Length of the embedding of the timestep; even, at least 4.
        learnt time_emb_dim: usize = 32,
        /// Number of classes that are embedded beside the timestep; unset: none.
        learnt num_class_embeds: Option<usize> = None,
    }

    /// The network "double-conv": the CIFAR-10 notebook's U-Net.
    double_conv: DoubleConvConfig {
        /// Channels of the first level; the deeper ones have 2, 4 and 8 times as many. Divisible by num_heads.
        learnt base_channels: usize = 64,
        /// Length of the embedding of the timestep; even.
        learnt time_emb_dim: usize = 128,
        /// Heads of each attention.
        learnt num_heads: usize = 4,
        /// Share of the attention weights that are dropped in training.
        noted dropout: f64 = 0.2,
    }

    /// The network "unet2d": the paper's U-Net with the settings of diffusers' UNet2DModel.
    unet2d: Unet2dConfig {
        /// ResNet blocks of each down block; up blocks have one more.
        learnt layers_per_block: usize = 2,
        /// Channels of each block; all but the last halve the image.
        learnt block_out_channels: Vec<usize> = vec![128, 256, 256, 256],
        /// For each block "DownBlock2D", or "AttnDownBlock2D" with attention.
        learnt down_block_types: Vec<BlockType> = vec![
            BlockType::DownBlock2D, BlockType::AttnDownBlock2D, BlockType::DownBlock2D, BlockType::DownBlock2D,
        ],
        /// For each block from the deepest "UpBlock2D", or "AttnUpBlock2D" with attention.
        learnt up_block_types: Vec<BlockType> = vec![
            BlockType::UpBlock2D, BlockType::UpBlock2D, BlockType::AttnUpBlock2D, BlockType::UpBlock2D,
        ],
        /// Channels of an attention head; unset: one head.
        learnt attention_head_dim: Option<usize> = None,
        /// Whether the middle block has attention.
        learnt add_attention: bool = true,
        /// Groups of each group normalisation; they divide all channels.
        learnt norm_num_groups: usize = 32,
        /// Groups of the middle attention's normalisation; unset: norm_num_groups, or no normalisation with "scale_shift".
        learnt attn_norm_num_groups: Option<usize> = None,
        /// Added to the variances.
        learnt norm_eps: f64 = 1e-6,
        /// Activation of the ResNet blocks: "silu", "relu", "gelu" or "mish".
        learnt act_fn: ActFn = ActFn::Silu,
        /// Share of the numbers in each ResNet block that are dropped in training.
        noted dropout: f64 = 0.0,
        /// Zeros around the input of a halving convolution; 0: one row below and one column at the right.
        learnt downsample_padding: usize = 0,
        /// How blocks with attention halve images: "conv", or "resnet", a ResNet block around the mean of each 2x2 pixels.
        learnt downsample_type: ResampleKind = ResampleKind::Conv,
        /// How blocks with attention double images: "conv" behind repeated pixels, or "resnet".
        learnt upsample_type: ResampleKind = ResampleKind::Conv,
        /// Whether the cosines stand before the sines in the embedding of the timestep.
        learnt flip_sin_to_cos: bool = false,
        /// Taken off the number of the embedding's frequencies where it divides: 0 or 1.
        learnt freq_shift: f64 = 1.0,
        /// Whether images are taken for numbers in [0, 1] and brought to [-1, 1].
        learnt center_input_sample: bool = false,
        /// What the sums of the middle block are divided by.
        learnt mid_block_scale_factor: f64 = 1.0,
        /// How the timestep enters: "default", added, or "scale_shift", scaling and shifting what the norm gives.
        learnt resnet_time_scale_shift: TimeScaleShift = TimeScaleShift::Default,
        /// Number of classes that are embedded beside the timestep; unset: none.
        learnt num_class_embeds: Option<usize> = None,
    }

    /// How the network is trained.
    train: TrainConfig {
        /// Optimiser steps in all; give this or epochs.
        noted steps: Option<u64> = None,
        /// Passes over the data in all; give this or steps.
        noted epochs: Option<u64> = Some(40),
        /// Images per step (of each micro-batch, where accumulate is more than 1).
        noted batch_size: usize = 64,
        /// Micro-batches per step, whose gradients are averaged: a larger batch in the memory of a small one.
        noted accumulate: usize = 1,
        /// What is made of the difference between the noise (or what is predicted) and its prediction: "mse", "l1" or "huber".
        noted loss: LossKind = LossKind::Mse,
        /// How much timesteps count: "plain" (all alike), "min-snr", "p2" or "snr-truncated".
        noted loss_weight: Weighting = Weighting::Plain,
        /// Signal-to-noise ratio from which on "min-snr" lets timesteps count less.
        noted min_snr_gamma: f64 = 5.0,
        /// How fast weights fall with "p2".
        noted p2_gamma: f64 = 1.0,
        /// Signal-to-noise ratio at which they begin to fall with "p2".
        noted p2_k: f64 = 1.0,
        /// Weight of the variational bound in the loss, from which a learned variance learns; 0.001 is the paper's.
        noted vlb_weight: f64 = 0.001,
        /// Size of noise alike in all pixels that is added to the noise, so that very dark and bright images are learnt; 0: none, 0.1 is usual.
        noted offset_noise: f64 = 0.0,
        /// Size of noise that is added to the noisy image unsaid, as errors of sampling are; 0: none, 0.1 is usual.
        noted input_perturbation: f64 = 0.0,
        /// Difference from which on "huber" grows like "l1" and no longer like half of "mse".
        noted huber_delta: f64 = 1.0,
        /// Share of the images whose class the network is not told, of networks with classes; guidance needs some.
        noted label_dropout: f64 = 0.1,
        /// Learning rate, before lr_schedule lowers it.
        noted lr: f64 = 1e-4,
        /// How it goes on: "constant", "cosine" (falls towards lr_min) or "plateau" (falls when the loss does not).
        noted lr_schedule: LrScheduleKind = LrScheduleKind::Constant,
        /// Steps over which the learning rate rises linearly at first; 0: none.
        noted warmup_steps: u64 = 0,
        /// Learning rate below which "cosine" and "plateau" do not go.
        noted lr_min: f64 = 0.0,
        /// Epochs without a lower mean loss that "plateau" bears; the next one lowers the learning rate.
        noted plateau_patience: u64 = 10,
        /// What "plateau" multiplies the learning rate by.
        noted plateau_factor: f64 = 0.1,
        /// Share by which an epoch's mean loss must be lower than the lowest before to count for "plateau".
        noted plateau_threshold: f64 = 1e-4,
        /// The optimiser: "adam" or "adamw".
        noted optimizer: OptimizerKind = OptimizerKind::Adam,
        /// Decay of Adam's running mean of the gradients.
        noted beta1: f64 = 0.9,
        /// Decay of Adam's running mean of the squared gradients.
        noted beta2: f64 = 0.999,
        /// Adam's epsilon, added to the denominator.
        noted adam_eps: f64 = 1e-8,
        /// Weight decay: with "adam" added to the gradient, with "adamw" taken off the weights.
        noted weight_decay: f64 = 0.0,
        /// Largest L2 norm of all gradients together: longer ones are shortened to it; 0: they stay as they are.
        noted clip_norm: f64 = 0.0,
        /// Decay per step of the averaged weights; 0: no averaging.
        noted ema_decay: f64 = 0.995,
        /// How they follow: "warm-up" (closely at first), "fixed" (always by ema_decay) or "half-life" (by ema_half_life).
        noted ema: EmaKind = EmaKind::WarmUp,
        /// Images after which half of the average is new with "half-life", approached from below.
        noted ema_half_life: f64 = 500_000.0,
        /// More averages of the weights, each with its own decay, as [0.999, 0.9999]; `ddpm sample --weights ema-0.999` draws with one.
        noted ema_decays: Vec<f64> = Vec::new(),
        /// Relative widths of power-function averages, as [0.05, 0.1], of which `ddpm average` makes others afterwards (Karras et al. 2024).
        noted power_ema: Vec<f64> = Vec::new(),
        /// Steps between the snapshots of these that are kept; 0: only at the end.
        free snapshot_every: u64 = 200,
        /// Seed of every random number of the run.
        noted seed: u64 = 0,
        /// What computes: "cpu", "cuda" (an NVIDIA GPU; "cuda:1" is the second), or "auto": a GPU if there is one and the program was built for it.
        free device: DeviceChoice = DeviceChoice::Auto,
        /// Threads to compute with; 0: all of the machine's.
        free threads: usize = 0,
        /// What factors are rounded to before they are multiplied: "f32" (nothing), "bf16", faster on GPUs and where the CPU has AVX512-BF16 (on any CPU training keeps some numbers so, in less memory), or "tf32", on GPUs alone.
        noted precision: Precision = Precision::F32,
        /// Whether a GPU's results repeat to the bit: by the program's own kernels alone. Else cuDNN and cuBLASLt, where they are there, make what they are faster at by the clock, and the last bits may differ from start to start. The CPU's results repeat either way.
        noted deterministic: bool = false,
        /// Whether convolutions of 3x3, and of 4x4 with stride 2, may take Winograd's way: up to 3 times as fast, about 5 times the rounding error of f32.
        noted winograd: bool = true,
        /// Steps between sample sheets; 0: only at the end.
        free sample_every: u64 = 1000,
        /// Images on a sample sheet; 0: no sheets.
        free sample_count: usize = 64,
        /// Denoising steps of these sheets; 0: all of the schedule's.
        free sample_steps: usize = 100,
        /// Steps between checkpoints; 0: only at the end.
        free checkpoint_every: u64 = 1000,
        /// Newest checkpoints kept besides the best one; at least 2.
        free keep: usize = 2,
        /// Whether event files for TensorBoard are written into the run's folder.
        free tensorboard: bool = true,
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

/// How the noise grows with t.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// [`Schedule::linear`](crate::schedule::Schedule::linear) from `beta_start` to `beta_end`.
    Linear,
    /// [`Schedule::scaled_linear`](crate::schedule::Schedule::scaled_linear) from `beta_start` to `beta_end`.
    ScaledLinear,
    /// The same under the name that Ho et al.'s program and many tutorials use.
    Quadratic,
    /// [`Schedule::cosine`](crate::schedule::Schedule::cosine).
    Cosine,
    /// [`Schedule::sigmoid`](crate::schedule::Schedule::sigmoid).
    Sigmoid,
    /// [`Schedule::sigmoid_beta`](crate::schedule::Schedule::sigmoid_beta) from `beta_start` to `beta_end`.
    SigmoidBeta,
}

impl ScheduleKind {
    /// Every schedule.
    pub const ALL: [Self; 6] =
        [Self::Linear, Self::ScaledLinear, Self::Quadratic, Self::Cosine, Self::Sigmoid, Self::SigmoidBeta];

    /// Whether it goes from `beta_start` to `beta_end`.
    pub fn has_ends(self) -> bool {
        !matches!(self, Self::Cosine | Self::Sigmoid)
    }

    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::ScaledLinear => "scaled-linear",
            Self::Quadratic => "quadratic",
            Self::Cosine => "cosine",
            Self::Sigmoid => "sigmoid",
            Self::SigmoidBeta => "sigmoid-beta",
        }
    }
}

impl std::fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::Config {
            key: "diffusion.schedule".to_owned(),
            reason: format!(
                "there is no schedule {name:?}; give one of {}",
                Self::ALL.map(Self::name).join(", ")
            ),
        })
    }
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

impl Config {
    /// The section of the network that is used.
    pub(crate) fn network_section(&self) -> &'static str {
        let of = |&&(kind, _): &&(NetworkKind, &'static str)| kind == self.network.name;
        NetworkKind::SECTIONS.iter().find(of).map_or("network", |&(_, name)| name)
    }

    /// Whether these settings make use of a section: those of other networks are not looked at.
    pub(crate) fn uses(&self, section: &str) -> bool {
        !NetworkKind::SECTIONS.iter().any(|&(kind, name)| name == section && kind != self.network.name)
    }
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

/// How images are halved and doubled.
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

/// Which loss of the predicted noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// The mean square, as in the paper.
    Mse,
    /// The mean absolute value.
    L1,
    /// Squares of small differences, absolute values of large ones; they meet at `huber_delta`.
    Huber,
}

/// How closely the averaged weights follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmaKind {
    /// `ema_decay`, approached from below over the first steps.
    WarmUp,
    /// `ema_decay` from the first step on.
    Fixed,
    /// By images seen, not by steps (Karras et al. 2022).
    HalfLife,
}

/// How the learning rate goes on after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduleKind {
    /// It stays.
    Constant,
    /// It falls to `lr_min` along half a cosine.
    Cosine,
    /// It is lowered when an epoch's mean loss no longer falls.
    Plateau,
}

/// What factors of convolutions and linear layers are rounded to; sums, weights and activations are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Nothing.
    #[default]
    F32,
    /// bf16: 8 bits of mantissa.
    Bf16,
    /// tf32 on GPUs: 11 bits of mantissa. Nothing on the CPU.
    Tf32,
}

impl TrainConfig {
    /// How an executor may compute.
    pub fn arithmetic(&self) -> ComputeOptions {
        let factors = match self.precision {
            Precision::F32 | Precision::Tf32 => MatmulDtype::F32,
            Precision::Bf16 => MatmulDtype::Bf16,
        };
        ComputeOptions { winograd: self.winograd, factors }
    }

    /// What it computes on.
    pub fn hardware(&self) -> Hardware {
        let tf32 = self.precision == Precision::Tf32;
        Hardware { device: self.device, threads: self.threads, tf32, deterministic: self.deterministic }
    }
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
