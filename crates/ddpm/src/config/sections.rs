//! The sections of the settings that belong to no network and to no device, and the list of all sections.
//!
//! The structs, their documentation, the commented TOML and the "did you mean" suggestions are generated from the sections. A
//! new setting is one entry in its section and a check in `validate.rs`; a new section is one line in the list.

use super::types::{EmaKind, LrScheduleKind, OptimizerKind, Size};
use crate::data::{Alpha, OnBadFile, Resize};
use crate::hardware::ComputeConfig;
use crate::nets::{self, NetworkKind, NetworkSettings};
use crate::objective::{LossKind, Weighting};
use crate::process::Prediction;
use crate::sampler::{Spacing, Threshold, Variance};
use crate::schedule::ScheduleKind;
use crate::settings::{Section, Settings, section};
use serde::{Deserialize, Serialize};

section! {
    /// The training images.
    pub struct DataConfig {
        /// A folder or zip file of images, a folder of IDX files or CIFAR batches, or a single such file; "digits" selects the built-in digits.
        free path: String = "digits".into(),
        /// Image size in pixels after resizing: one side or [height, width]; unset: the size of the data.
        breaking size: Option<Size> = None,
        /// Channels after conversion: 1 grey, 2 grey+alpha, 3 RGB, 4 RGB+alpha; unset: the channels of the data.
        breaking channels: Option<usize> = None,
        /// What to do with files that cannot be decoded: "fail" or "skip".
        free on_bad_file: OnBadFile = OnBadFile::Fail,
        /// Transparency: "keep" the alpha channel, or composite images over "black" or "white"; unset: keep if channels is 2 or 4, else black.
        noted alpha: Option<Alpha> = None,
        /// How images are resized: "short-side" keeps the aspect ratio and takes a center crop, "exact" scales both sides to size.
        noted resize: Resize = Resize::ShortSide,
        /// Length of the short side, in pixels, to which images are resized before cropping; unset: that of size, or no resizing before random crops.
        noted resize_side: Option<usize> = None,
        /// Smallest and largest fraction of the image area that random crops cover, e.g. [0.8, 1.0]; unset: no random crops.
        noted random_crop_scale: Option<[f64; 2]> = None,
        /// Mirror each image left to right with probability 1/2, resampled every epoch; unsuitable for letters and X-rays.
        noted horizontal_flip: bool = false,
        /// CSV file with one image id per row: only the files in path that it lists are used; unset: all files.
        free csv: Option<String> = None,
        /// Name of the CSV column with the ids; unset: the first column.
        free csv_id_column: Option<String> = None,
        /// Suffix appended to an id to form the file name.
        free csv_extension: String = ".png".into(),
        /// Name of the CSV column with the class labels; unset: no classes.
        noted csv_label_column: Option<String> = None,
        /// Keep all decoded images in memory if they fit into this many MiB; otherwise decode each image every time it is read.
        free memory_mib: u64 = 2048,
        /// Number of built-in digits to generate (only for path = "digits").
        noted digits_count: usize = 10_000,
    }
}

section! {
    /// The forward process q(x_t | x_0).
    pub struct DiffusionConfig {
        /// Number of diffusion steps T.
        breaking timesteps: usize = 1000,
        /// Noise schedule: "linear", "scaled-linear" (also called "quadratic"), "cosine", "sigmoid" or "sigmoid-beta".
        breaking schedule: ScheduleKind = ScheduleKind::Linear,
        /// beta_1, the variance added by the first step (not used by "cosine" and "sigmoid").
        breaking beta_start: f64 = 1e-4,
        /// beta_T, the variance added by the last step (not used by "cosine" and "sigmoid").
        breaking beta_end: f64 = 0.02,
        /// Upper bound of every beta_t for "cosine" and "sigmoid"; diffusers uses 0.999.
        breaking max_beta: f64 = 0.9999,
        /// Rescale the schedule to zero signal-to-noise ratio at step T (with prediction "eps", sampling starts at an earlier step).
        breaking zero_terminal_snr: bool = false,
        /// What the network predicts: "eps" (the noise), "x0" (the image) or "v" (a combination of both; more stable at high noise levels).
        breaking prediction: Prediction = Prediction::Eps,
        /// Also learn the variance of the reverse process, with twice as many output channels (Nichol and Dhariwal 2021).
        breaking learned_variance: bool = false,
    }
}

section! {
    /// Default sampling settings of the run.
    pub struct SamplingConfig {
        /// Sampler name; `ddpm sample --help` lists all samplers.
        free sampler: String = "ddpm".into(),
        /// Number of sampling steps; unset: the sampler's default.
        free steps: Option<usize> = None,
        /// Spacing of the noise levels: "linspace", "uniform" (diffusers' "leading"), "trailing", "quadratic", "karras", "exponential" or "sigma"; unset: the sampler's default.
        free spacing: Option<Spacing> = None,
        /// Variance of ancestral steps: "small" (the posterior variance), "large" (beta_t) or "learned"; unset: learned if the network learns it, else small.
        free variance: Option<Variance> = None,
        /// How the predicted x_0 is clipped to [-1, 1] at every step: "clip", "dynamic" (dynamic thresholding) or "none".
        free threshold: Threshold = Threshold::Clip,
        /// Whether ddim recomputes the noise from the clipped x_0 instead of using the predicted noise; as in diffusers, where the default is false (false for imported pipelines).
        free use_clipped_model_output: bool = true,
    }
}

section! {
    /// The denoising network.
    pub struct NetworkConfig {
        /// Architecture: "attention", "simple", "double-conv" or "unet2d", each configured in its own section.
        breaking name: NetworkKind = NetworkKind::Attention,
        /// Number of image channels; unset: the channels of the data.
        breaking im_channels: Option<usize> = None,
        /// Image size in pixels: one side or [height, width]; unset: the size of the data.
        breaking im_size: Option<Size> = None,
    }
}

section! {
    /// Training: its length, its batches and its randomness.
    pub struct TrainConfig {
        /// Total number of optimizer steps; set this or epochs.
        noted steps: Option<u64> = None,
        /// Total number of passes over the data; set this or steps.
        noted epochs: Option<u64> = Some(40),
        /// Images per step; with accumulate > 1, images per micro-batch.
        noted batch_size: usize = 64,
        /// Gradient accumulation: micro-batches per step, whose gradients are averaged; gives a large batch in the memory of a small one.
        noted accumulate: usize = 1,
        /// Probability of dropping an image's class label in class-conditional training; classifier-free guidance needs more than 0.
        noted label_dropout: f64 = 0.1,
        /// Random seed of the run.
        noted seed: u64 = 0,
    }
}

section! {
    /// The training objective.
    pub struct LossConfig {
        /// Loss function: "mse", "l1" or "huber".
        #[alias = "train.loss"]
        noted name: LossKind = LossKind::Mse,
        /// Loss weighting over timesteps: "plain" (uniform), "min-snr", "p2" or "snr-truncated".
        #[alias = "train.loss_weight"]
        noted weighting: Weighting = Weighting::Plain,
        /// gamma of "min-snr": timesteps with a higher signal-to-noise ratio are weighted down.
        #[alias = "train.min_snr_gamma"]
        noted min_snr_gamma: f64 = 5.0,
        /// gamma of "p2": the exponent; larger values weight low noise levels down more.
        #[alias = "train.p2_gamma"]
        noted p2_gamma: f64 = 1.0,
        /// k of "p2": signal-to-noise ratio at which the weights start to fall.
        #[alias = "train.p2_k"]
        noted p2_k: f64 = 1.0,
        /// delta of "huber": errors below it are penalised quadratically (half of "mse"), larger ones linearly.
        #[alias = "train.huber_delta"]
        noted huber_delta: f64 = 1.0,
        /// Weight of the variational bound in the loss, which trains a learned variance; the paper uses 0.001.
        #[alias = "train.vlb_weight"]
        noted vlb_weight: f64 = 0.001,
        /// Strength of offset noise, which is constant over each image and channel and helps learn very dark and bright images; 0: off, 0.1 is typical.
        #[alias = "train.offset_noise"]
        noted offset_noise: f64 = 0.0,
        /// Strength of extra noise added to the network's input but not to its target, which imitates sampling errors; 0: off, 0.1 is typical.
        #[alias = "train.input_perturbation"]
        noted input_perturbation: f64 = 0.0,
    }
}

section! {
    /// The optimizer.
    pub struct OptimizerConfig {
        /// Optimizer: "adam" or "adamw".
        #[alias = "train.optimizer"]
        noted name: OptimizerKind = OptimizerKind::Adam,
        /// Base learning rate.
        #[alias = "train.lr"]
        noted lr: f64 = 1e-4,
        /// Adam's beta1, the decay of the running mean of the gradients.
        #[alias = "train.beta1"]
        noted beta1: f64 = 0.9,
        /// Adam's beta2, the decay of the running mean of the squared gradients.
        #[alias = "train.beta2"]
        noted beta2: f64 = 0.999,
        /// Adam's epsilon, added to the denominator.
        #[alias = "train.adam_eps"]
        noted eps: f64 = 1e-8,
        /// Weight decay: added to the gradient with "adam" (L2 regularisation), subtracted from the weights with "adamw" (decoupled).
        #[alias = "train.weight_decay"]
        noted weight_decay: f64 = 0.0,
        /// Gradient clipping: maximum L2 norm of all gradients together; 0: no clipping.
        #[alias = "train.clip_norm"]
        noted clip_norm: f64 = 0.0,
    }
}

section! {
    /// The learning-rate schedule.
    pub struct LrScheduleConfig {
        /// Learning-rate schedule: "constant", "cosine" (decays to min_lr) or "plateau" (drops when the loss stops falling).
        #[alias = "train.lr_schedule"]
        noted name: LrScheduleKind = LrScheduleKind::Constant,
        /// Steps of linear learning-rate warm-up; 0: none.
        #[alias = "train.warmup_steps"]
        noted warmup_steps: u64 = 0,
        /// Lowest learning rate of "cosine" and "plateau".
        #[alias = "train.lr_min"]
        noted min_lr: f64 = 0.0,
        /// Epochs without improvement that "plateau" tolerates; the next one lowers the learning rate.
        #[alias = "train.plateau_patience"]
        noted plateau_patience: u64 = 10,
        /// Factor by which "plateau" multiplies the learning rate.
        #[alias = "train.plateau_factor"]
        noted plateau_factor: f64 = 0.1,
        /// Relative drop of an epoch's mean loss below the previous best that "plateau" counts as an improvement.
        #[alias = "train.plateau_threshold"]
        noted plateau_threshold: f64 = 1e-4,
    }
}

section! {
    /// Averages of the weights.
    pub struct EmaConfig {
        /// Decay per step of the exponential moving average (EMA) of the weights; 0: no averaging.
        #[alias = "train.ema_decay"]
        noted decay: f64 = 0.995,
        /// How the EMA decay is chosen: "warm-up" (increases to decay), "fixed" (always decay) or "half-life" (from half_life).
        #[alias = "train.ema"]
        noted schedule: EmaKind = EmaKind::WarmUp,
        /// Half-life of the EMA in images with "half-life"; shorter at the start of training.
        #[alias = "train.ema_half_life"]
        noted half_life: f64 = 500_000.0,
        /// Decays of additional EMAs of the weights, e.g. [0.999, 0.9999]; sample from one with `ddpm sample --weights ema-0.999`.
        #[alias = "train.ema_decays"]
        noted extra_decays: Vec<f64> = Vec::new(),
        /// Relative widths of power-function EMAs, e.g. [0.05, 0.1], from which `ddpm average` reconstructs any other width after training (Karras et al. 2024).
        #[alias = "train.power_ema"]
        noted power_widths: Vec<f64> = Vec::new(),
        /// Steps between saved snapshots of the power-function EMAs; 0: only at the end.
        #[alias = "train.snapshot_every"]
        free snapshot_every: u64 = 200,
    }
}

section! {
    /// What a run writes: checkpoints, sample sheets and logs.
    pub struct OutputConfig {
        /// Steps between checkpoints; 0: only at the end.
        #[alias = "train.checkpoint_every"]
        free checkpoint_every: u64 = 1000,
        /// Number of newest checkpoints to keep in addition to the best one; at least 2.
        #[alias = "train.keep"]
        free keep_checkpoints: usize = 2,
        /// Steps between sample sheets; 0: only at the end.
        #[alias = "train.sample_every"]
        free sample_every: u64 = 1000,
        /// Images on a sample sheet; 0: no sheets.
        #[alias = "train.sample_count"]
        free sample_count: usize = 64,
        /// Sampling steps for sample sheets; 0: all timesteps of the schedule.
        #[alias = "train.sample_steps"]
        free sample_steps: usize = 100,
        /// Write TensorBoard event files to the run's folder.
        #[alias = "train.tensorboard"]
        free tensorboard: bool = true,
    }
}

/// Declares [`Config`] and what depends on the list of sections: those before the networks', the networks', those after.
macro_rules! sections {
    (
        { $( $before:ident: $before_config:ident, )+ ; $( $after:ident: $after_config:ident, )+ }
        $( #[doc = $doc:literal] $kind:ident = $name:literal, $network:ident: $network_config:ident; )+
    ) => {
        sections! { @all
            $( $before: $before_config, )+
            $( $network: nets::$network_config, )+
            $( $after: $after_config, )+
        }

        impl Config {
            /// The settings of the selected network.
            pub(super) fn selected_network(&self) -> &dyn NetworkSettings {
                match self.network.name {
                    $( NetworkKind::$kind => &self.$network, )+
                }
            }
        }
    };
    (@all $( $section:ident: $config:ty, )+) => {
        /// All settings of a training run. The default is the DDPM-Pytorch tutorial's network and training on the
        /// built-in digits.
        #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Config {
            $(
                #[doc = concat!("The section `", stringify!($section), "`.")]
                pub $section: $config,
            )+
        }

        /// All sections with all their settings.
        pub const SECTIONS: &[Section] = &[ $(
            Section {
                name: stringify!($section),
                about: <$config as Settings>::ABOUT,
                settings: <$config as Settings>::SETTINGS,
            },
        )+ ];

        impl Config {
            /// The values in the order of [`SECTIONS`]; `None` where unset.
            pub(crate) fn values(&self) -> Vec<Vec<Option<toml::Value>>> {
                vec![ $( self.$section.values(), )+ ]
            }
        }
    };
}

nets::for_each_network!(sections {
    data: DataConfig,
    diffusion: DiffusionConfig,
    sampling: SamplingConfig,
    network: NetworkConfig,
    ;
    train: TrainConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    lr_schedule: LrScheduleConfig,
    ema: EmaConfig,
    compute: ComputeConfig,
    output: OutputConfig,
});

impl Config {
    /// The section that configures the selected network.
    pub(crate) fn network_section(&self) -> &'static str {
        let of = |&&(kind, _): &&(NetworkKind, &'static str)| kind == self.network.name;
        NetworkKind::SECTIONS.iter().find(of).map_or("network", |&(_, name)| name)
    }

    /// Whether a section applies: those of the networks that are not selected are ignored.
    pub(crate) fn uses(&self, section: &str) -> bool {
        !NetworkKind::SECTIONS.iter().any(|&(kind, name)| name == section && kind != self.network.name)
    }
}
