//! Every setting with its default and one line of documentation.
//!
//! The table below is the only list of settings: the structs, their documentation, the commented TOML and the "did you
//! mean" suggestions are generated from it. A new setting is one entry here and a check in `validate.rs`. Each entry
//! starts with the effect of changing it in a resumed run: `free`, `noted` or `breaking` ([`Change`]); it is mandatory.

use super::types::{
    ActFn, BlockType, EmaKind, LrScheduleKind, NetworkKind, OptimizerKind, Precision, ResampleKind, Size,
    TimeScaleShift,
};
use crate::data::{Alpha, OnBadFile, Resize};
use crate::hardware::{DeviceChoice, Hardware};
use crate::objective::{LossKind, Weighting};
use crate::process::Prediction;
use crate::sampler::{Spacing, Threshold, Variance};
use crate::schedule::ScheduleKind;
use ddpm_engine::{ComputeOptions, MatmulDtype};
use serde::{Deserialize, Serialize};

/// One setting of the table.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The key inside its section, e.g. `batch_size`.
    pub name: &'static str,
    /// Meaning, unit, and what leaving it unset does.
    pub doc: &'static str,
    /// The effect of changing it in a resumed run.
    pub change: Change,
}

/// The effect of changing a setting in a run that is already partly trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// None: it does not affect what is learnt.
    Free,
    /// Training continues, but differs from the original plan; the user gets a note.
    Noted,
    /// Weights trained with the old value are of little use with the new one. Refused unless forced.
    Breaking,
}

macro_rules! change {
    (free) => {
        Change::Free
    };
    (noted) => {
        Change::Noted
    };
    (breaking) => {
        Change::Breaking
    };
}

/// One section of the settings.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// The section's name, e.g. `train`.
    pub name: &'static str,
    /// What the section configures.
    pub about: &'static str,
    /// Its settings, in print order.
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

        /// All sections with all their settings.
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
    /// The training images.
    data: DataConfig {
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

    /// The forward process q(x_t | x_0).
    diffusion: DiffusionConfig {
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

    /// Default sampling settings of the run.
    sampling: SamplingConfig {
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

    /// The denoising network.
    network: NetworkConfig {
        /// Architecture: "attention", "simple", "double-conv" or "unet2d", each configured in its own section.
        breaking name: NetworkKind = NetworkKind::Attention,
        /// Number of image channels; unset: the channels of the data.
        breaking im_channels: Option<usize> = None,
        /// Image size in pixels: one side or [height, width]; unset: the size of the data.
        breaking im_size: Option<Size> = None,
    }

    /// The network "attention": the DDPM-Pytorch tutorial's U-Net.
    attention: AttentionConfig {
        /// Channels at the input and after each down block; each divisible by 8 and by num_heads.
        breaking down_channels: Vec<usize> = vec![32, 64, 128, 256],
        /// Channels at the input of the middle and after each middle block; starts with the last entry of down_channels and ends with the second to last.
        breaking mid_channels: Vec<usize> = vec![256, 256, 128],
        /// Whether each down block halves the resolution; one entry fewer than down_channels.
        breaking down_sample: Vec<bool> = vec![true, true, false],
        /// Dimension of the timestep embedding; even.
        breaking time_emb_dim: usize = 128,
        /// Residual layers in each down block.
        breaking num_down_layers: usize = 2,
        /// Pairs of attention and residual layers in each middle block.
        breaking num_mid_layers: usize = 2,
        /// Residual layers in each up block.
        breaking num_up_layers: usize = 2,
        /// Attention heads: 1, 2, 4, 8 or 16.
        breaking num_heads: usize = 4,
        /// Number of classes of a class-conditional network; unset: unconditional.
        breaking num_class_embeds: Option<usize> = None,
    }

    /// The network "simple": DeepFindr's notebook and its X-ray descendant.
    simple: SimpleConfig {
        /// Channels at the input and after each down block; each down block halves the resolution.
        breaking widths: Vec<usize> = vec![64, 128, 256, 512, 1024],
        /// Dimension of the timestep embedding; even, at least 4.
        breaking time_emb_dim: usize = 32,
        /// Number of classes of a class-conditional network; unset: unconditional.
        breaking num_class_embeds: Option<usize> = None,
    }

    /// The network "double-conv": the CIFAR-10 notebook's U-Net.
    double_conv: DoubleConvConfig {
        /// Channels at full resolution; deeper levels have 2, 4 and 8 times as many; divisible by num_heads.
        breaking base_channels: usize = 64,
        /// Dimension of the timestep embedding; even.
        breaking time_emb_dim: usize = 128,
        /// Attention heads.
        breaking num_heads: usize = 4,
        /// Dropout probability of the attention weights.
        noted dropout: f64 = 0.2,
    }

    /// The network "unet2d": the paper's U-Net with the settings of diffusers' UNet2DModel.
    unet2d: Unet2dConfig {
        /// ResNet blocks per down block; up blocks have one more.
        breaking layers_per_block: usize = 2,
        /// Channels of each block; every block but the last halves the resolution.
        breaking block_out_channels: Vec<usize> = vec![128, 256, 256, 256],
        /// Type of each down block: "DownBlock2D", or "AttnDownBlock2D" with attention.
        breaking down_block_types: Vec<BlockType> = vec![
            BlockType::DownBlock2D, BlockType::AttnDownBlock2D, BlockType::DownBlock2D, BlockType::DownBlock2D,
        ],
        /// Type of each up block, deepest first: "UpBlock2D", or "AttnUpBlock2D" with attention.
        breaking up_block_types: Vec<BlockType> = vec![
            BlockType::UpBlock2D, BlockType::UpBlock2D, BlockType::AttnUpBlock2D, BlockType::UpBlock2D,
        ],
        /// Channels per attention head; unset: a single head.
        breaking attention_head_dim: Option<usize> = None,
        /// Whether the middle block has attention.
        breaking add_attention: bool = true,
        /// Groups of the group normalisation layers; must divide every entry of block_out_channels.
        breaking norm_num_groups: usize = 32,
        /// Groups of the group normalisation in the middle attention; unset: norm_num_groups, or none if resnet_time_scale_shift is "scale_shift".
        breaking attn_norm_num_groups: Option<usize> = None,
        /// Epsilon added to the variance in group normalisation.
        breaking norm_eps: f64 = 1e-6,
        /// Activation of the ResNet blocks: "silu", "relu", "gelu" or "mish".
        breaking act_fn: ActFn = ActFn::Silu,
        /// Dropout probability in each ResNet block.
        noted dropout: f64 = 0.0,
        /// Zero padding of downsampling convolutions; 0: only one row at the bottom and one column at the right.
        breaking downsample_padding: usize = 0,
        /// How blocks with attention downsample: "conv" (strided convolution) or "resnet" (a ResNet block with 2x2 average pooling).
        breaking downsample_type: ResampleKind = ResampleKind::Conv,
        /// How blocks with attention upsample: "conv" (nearest neighbour, then a convolution) or "resnet" (a ResNet block).
        breaking upsample_type: ResampleKind = ResampleKind::Conv,
        /// Whether the timestep embedding has cosines first, then sines.
        breaking flip_sin_to_cos: bool = false,
        /// Subtracted from the number of frequencies in the exponent of the timestep embedding: 0 or 1.
        breaking freq_shift: f64 = 1.0,
        /// Whether the network maps its input from [0, 1] to [-1, 1].
        breaking center_input_sample: bool = false,
        /// Divisor of the residual sums in the middle block.
        breaking mid_block_scale_factor: f64 = 1.0,
        /// How the timestep embedding enters ResNet blocks: "default" (added) or "scale_shift" (scales and shifts the normalised activations).
        breaking resnet_time_scale_shift: TimeScaleShift = TimeScaleShift::Default,
        /// Number of classes of a class-conditional network; unset: unconditional.
        breaking num_class_embeds: Option<usize> = None,
    }

    /// Training.
    train: TrainConfig {
        /// Total number of optimizer steps; set this or epochs.
        noted steps: Option<u64> = None,
        /// Total number of passes over the data; set this or steps.
        noted epochs: Option<u64> = Some(40),
        /// Images per step; with accumulate > 1, images per micro-batch.
        noted batch_size: usize = 64,
        /// Gradient accumulation: micro-batches per step, whose gradients are averaged; gives a large batch in the memory of a small one.
        noted accumulate: usize = 1,
        /// Loss function: "mse", "l1" or "huber".
        noted loss: LossKind = LossKind::Mse,
        /// Loss weighting over timesteps: "plain" (uniform), "min-snr", "p2" or "snr-truncated".
        noted loss_weight: Weighting = Weighting::Plain,
        /// gamma of "min-snr": timesteps with a higher signal-to-noise ratio are weighted down.
        noted min_snr_gamma: f64 = 5.0,
        /// gamma of "p2": the exponent; larger values weight low noise levels down more.
        noted p2_gamma: f64 = 1.0,
        /// k of "p2": signal-to-noise ratio at which the weights start to fall.
        noted p2_k: f64 = 1.0,
        /// Weight of the variational bound in the loss, which trains a learned variance; the paper uses 0.001.
        noted vlb_weight: f64 = 0.001,
        /// Strength of offset noise, which is constant over each image and channel and helps learn very dark and bright images; 0: off, 0.1 is typical.
        noted offset_noise: f64 = 0.0,
        /// Strength of extra noise added to the network's input but not to its target, which imitates sampling errors; 0: off, 0.1 is typical.
        noted input_perturbation: f64 = 0.0,
        /// delta of "huber": errors below it are penalised quadratically (half of "mse"), larger ones linearly.
        noted huber_delta: f64 = 1.0,
        /// Probability of dropping an image's class label in class-conditional training; classifier-free guidance needs more than 0.
        noted label_dropout: f64 = 0.1,
        /// Base learning rate.
        noted lr: f64 = 1e-4,
        /// Learning-rate schedule: "constant", "cosine" (decays to lr_min) or "plateau" (drops when the loss stops falling).
        noted lr_schedule: LrScheduleKind = LrScheduleKind::Constant,
        /// Steps of linear learning-rate warm-up; 0: none.
        noted warmup_steps: u64 = 0,
        /// Lowest learning rate of "cosine" and "plateau".
        noted lr_min: f64 = 0.0,
        /// Epochs without improvement that "plateau" tolerates; the next one lowers the learning rate.
        noted plateau_patience: u64 = 10,
        /// Factor by which "plateau" multiplies the learning rate.
        noted plateau_factor: f64 = 0.1,
        /// Relative drop of an epoch's mean loss below the previous best that "plateau" counts as an improvement.
        noted plateau_threshold: f64 = 1e-4,
        /// Optimizer: "adam" or "adamw".
        noted optimizer: OptimizerKind = OptimizerKind::Adam,
        /// Adam's beta1, the decay of the running mean of the gradients.
        noted beta1: f64 = 0.9,
        /// Adam's beta2, the decay of the running mean of the squared gradients.
        noted beta2: f64 = 0.999,
        /// Adam's epsilon, added to the denominator.
        noted adam_eps: f64 = 1e-8,
        /// Weight decay: added to the gradient with "adam" (L2 regularisation), subtracted from the weights with "adamw" (decoupled).
        noted weight_decay: f64 = 0.0,
        /// Gradient clipping: maximum L2 norm of all gradients together; 0: no clipping.
        noted clip_norm: f64 = 0.0,
        /// Decay per step of the exponential moving average (EMA) of the weights; 0: no averaging.
        noted ema_decay: f64 = 0.995,
        /// How the EMA decay is chosen: "warm-up" (increases to ema_decay), "fixed" (always ema_decay) or "half-life" (from ema_half_life).
        noted ema: EmaKind = EmaKind::WarmUp,
        /// Half-life of the EMA in images with "half-life"; shorter at the start of training.
        noted ema_half_life: f64 = 500_000.0,
        /// Decays of additional EMAs of the weights, e.g. [0.999, 0.9999]; sample from one with `ddpm sample --weights ema-0.999`.
        noted ema_decays: Vec<f64> = Vec::new(),
        /// Relative widths of power-function EMAs, e.g. [0.05, 0.1], from which `ddpm average` reconstructs any other width after training (Karras et al. 2024).
        noted power_ema: Vec<f64> = Vec::new(),
        /// Steps between saved snapshots of the power-function EMAs; 0: only at the end.
        free snapshot_every: u64 = 200,
        /// Random seed of the run.
        noted seed: u64 = 0,
        /// Device: "cpu", "cuda" (an NVIDIA GPU; "cuda:1" is the second one) or "auto" (a GPU if one is found and the program was built with CUDA support, else the CPU).
        free device: DeviceChoice = DeviceChoice::Auto,
        /// CPU threads; 0: all of the machine's.
        free threads: usize = 0,
        /// Precision of matmul operands: "f32", "bf16" (faster on GPUs and on CPUs with AVX512-BF16; on every CPU, training also stores some activations in bf16 to save memory) or "tf32" (GPUs only).
        noted precision: Precision = Precision::F32,
        /// Make GPU results bit-for-bit reproducible by using only the built-in kernels; otherwise cuDNN and cuBLASLt, if installed, are used where they measure faster, and the last bits may differ between runs. CPU results are always reproducible.
        noted deterministic: bool = false,
        /// Allow the Winograd algorithm for 3x3 convolutions and 4x4 convolutions with stride 2: up to 3 times as fast, with about 5 times the rounding error of f32.
        noted winograd: bool = true,
        /// Steps between sample sheets; 0: only at the end.
        free sample_every: u64 = 1000,
        /// Images on a sample sheet; 0: no sheets.
        free sample_count: usize = 64,
        /// Sampling steps for sample sheets; 0: all timesteps of the schedule.
        free sample_steps: usize = 100,
        /// Steps between checkpoints; 0: only at the end.
        free checkpoint_every: u64 = 1000,
        /// Number of newest checkpoints to keep in addition to the best one; at least 2.
        free keep: usize = 2,
        /// Write TensorBoard event files to the run's folder.
        free tensorboard: bool = true,
    }
}

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

impl TrainConfig {
    /// The executor's numeric options.
    pub fn compute_options(&self) -> ComputeOptions {
        let matmul_dtype = match self.precision {
            Precision::F32 | Precision::Tf32 => MatmulDtype::F32,
            Precision::Bf16 => MatmulDtype::Bf16,
        };
        ComputeOptions { winograd: self.winograd, matmul_dtype }
    }

    /// The device and its options.
    pub fn hardware(&self) -> Hardware {
        let tf32 = self.precision == Precision::Tf32;
        Hardware { device: self.device, threads: self.threads, tf32, deterministic: self.deterministic }
    }
}
