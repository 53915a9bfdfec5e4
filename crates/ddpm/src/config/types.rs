//! The types of settings that are not plain numbers, text or lists.

use ddpm_engine::ops::Activation;
use serde::{Deserialize, Serialize};

/// Height and width in pixels; in a settings file one number if they are equal, else `[height, width]`.
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

/// The network architecture.
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
    /// The networks and the sections that configure them.
    pub(crate) const SECTIONS: [(Self, &str); 4] = [
        (Self::Attention, "attention"),
        (Self::Simple, "simple"),
        (Self::DoubleConv, "double_conv"),
        (Self::Unet2d, "unet2d"),
    ];
}

/// Block types of "unet2d", with diffusers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are diffusers'")]
pub enum BlockType {
    DownBlock2D,
    AttnDownBlock2D,
    UpBlock2D,
    AttnUpBlock2D,
}

impl BlockType {
    /// Whether each ResNet block is followed by attention.
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
    /// The engine's equivalent.
    pub fn activation(self) -> Activation {
        match self {
            Self::Silu => Activation::Silu,
            Self::Relu => Activation::Relu,
            Self::Gelu => Activation::Gelu,
            Self::Mish => Activation::Mish,
        }
    }
}

/// How the resolution is halved and doubled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResampleKind {
    /// With a convolution.
    Conv,
    /// With a ResNet block.
    Resnet,
}

/// How the timestep embedding enters a ResNet block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeScaleShift {
    /// It is added.
    Default,
    /// It scales and shifts.
    ScaleShift,
}

/// How the decay of the averaged weights is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmaKind {
    /// Rises to `ema_decay` over the first steps.
    WarmUp,
    /// `ema_decay` from the first step.
    Fixed,
    /// A half-life in images seen (Karras et al. 2022).
    HalfLife,
}

/// The learning-rate schedule after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduleKind {
    /// Unchanged.
    Constant,
    /// Decays to `lr_min` along half a cosine.
    Cosine,
    /// Drops when the epoch's mean loss stops falling.
    Plateau,
}

/// Precision of the operands of convolutions and linear layers; accumulation and weights are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// No rounding.
    #[default]
    F32,
    /// bf16: 8 bits of mantissa.
    Bf16,
    /// tf32 on GPUs: 11 bits of mantissa. No rounding on the CPU.
    Tf32,
}

/// The optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam; weight decay is added to the gradient.
    Adam,
    /// Adam with decoupled weight decay.
    AdamW,
}
