//! Networks, built from common blocks, with PyTorch's parameter names.
//!
//! [`Builder`] adds layers to a graph and records every parameter's PyTorch name, shape and layout; the
//! records serve initialisation ([`ParameterSpec::init`]) and checkpoints ([`ParameterSpec::to_torch`],
//! [`ParameterSpec::from_torch`]).

mod attention;
mod blocks;
mod check;
mod double_conv;
mod parameters;
mod simple;
mod unet2d;

pub use attention::{AttentionConfig, AttentionUnet};
pub use blocks::{Builder, ConvLayer, EPS, Mode};
pub use double_conv::{DoubleConvConfig, DoubleConvUnet};
pub use parameters::{Init, Layout, ParameterSpec, StateSpec};
pub use simple::{SimpleConfig, SimpleUnet};
pub use unet2d::{ActFn, BlockType, ResampleKind, TimeScaleShift, Unet2d, Unet2dConfig};

use crate::error::Result;
use ddpm_engine::{Graph, Tensor};
use serde::{Deserialize, Serialize};

/// Passes the list of networks to a macro: doc, [`NetworkKind`], name in the settings, and the section that configures it.
/// A new network is a file with its section, and a line here.
macro_rules! for_each_network {
    ($callback:ident $args:tt) => {
        $callback! { $args
            /// The U-Net of explainingai-code/DDPM-Pytorch.
            Attention = "attention", attention: AttentionConfig;
            /// The U-Net of DeepFindr's notebook.
            Simple = "simple", simple: SimpleConfig;
            /// The U-Net of the CIFAR-10 notebook.
            DoubleConv = "double-conv", double_conv: DoubleConvConfig;
            /// The U-Net of Ho et al. 2020, as diffusers builds it.
            Unet2d = "unet2d", unet2d: Unet2dConfig;
        }
    };
}
pub(crate) use for_each_network;

macro_rules! network_kind {
    ({} $( #[doc = $doc:literal] $kind:ident = $name:literal, $section:ident: $config:ident; )+) => {
        /// The network architecture.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum NetworkKind {
            $( #[doc = $doc] #[serde(rename = $name)] $kind, )+
        }

        impl NetworkKind {
            /// The networks and the sections that configure them.
            pub(crate) const SECTIONS: &[(Self, &str)] = &[ $( (Self::$kind, stringify!($section)), )+ ];
        }
    };
}

for_each_network!(network_kind {});

/// The settings of a network.
pub(crate) trait NetworkSettings {
    /// Checks every setting and their combinations.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with the first invalid setting, the reason, and a remedy.
    fn validate(&self) -> Result<()>;

    /// The setting that determines how often the resolution is halved.
    fn halving_key(&self) -> &'static str;

    /// The network for images with this many channels.
    fn build(&self, channels: usize, learned_variance: bool) -> Box<dyn Network>;
}

/// A network built into a graph.
#[derive(Clone, Debug)]
pub struct Built {
    /// The graph.
    pub graph: Graph,
    /// All parameters, in graph order.
    pub parameters: Vec<ParameterSpec>,
    /// All states (PyTorch's buffers), in graph order.
    pub states: Vec<StateSpec>,
    /// The predicted noise, with the input's shape, or twice its channels if the variance is learned.
    pub prediction: Tensor,
}

/// The inputs of a network.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// Noisy images `[n, h, w, c]`.
    pub x: Tensor,
    /// Timesteps `[n]`.
    pub t: Tensor,
    /// Classes `[n]`, if the network takes them.
    pub label: Option<Tensor>,
}

/// A network that predicts noise.
pub trait Network: Send + Sync {
    /// The name in the settings.
    fn name(&self) -> &'static str;

    /// Number of image channels.
    fn channels(&self) -> usize;

    /// Whether it also predicts the variance ([`Denoiser::variance`](crate::denoiser::Denoiser::variance)),
    /// in as many additional channels after the others.
    fn learned_variance(&self) -> bool {
        false
    }

    /// Number of output channels.
    fn out_channels(&self) -> usize {
        self.channels() * if self.learned_variance() { 2 } else { 1 }
    }

    /// Image heights and widths must be divisible by this.
    fn size_factor(&self) -> usize;

    /// Number of classes that it is conditioned on; `None` if it takes none.
    fn classes(&self) -> Option<usize> {
        None
    }

    /// Adds the network to a graph; returns the predicted noise `[n, h, w, c]`, c =
    /// [`out_channels`](Self::out_channels).
    fn build(&self, b: &mut Builder, inputs: Inputs) -> Result<Tensor>;
}

/// Names with shapes.
pub type Shapes = Vec<(String, Vec<usize>)>;

/// Names and PyTorch shapes of a network's state dict: parameters, then states (PyTorch's buffers).
///
/// # Errors
/// [`Error::Engine`](crate::Error::Engine) for a network whose size overflows.
pub fn tensors_of(net: &dyn Network) -> Result<(Shapes, Shapes)> {
    let (mut b, side) = (Builder::new(Mode::Sampling), net.size_factor());
    let x = b.graph.input("x_t", [1, side, side, net.channels()]);
    let t = b.graph.input("t", [1]);
    let label = net.classes().map(|_| b.graph.input("label", [1]));
    let prediction = net.build(&mut b, Inputs { x, t, label })?;
    let built = b.finish(prediction);
    let parameters = built.parameters.into_iter().map(|p| (p.name, p.shape)).collect();
    Ok((parameters, built.states.into_iter().map(|s| (s.name, s.shape)).collect()))
}

/// Refuses image sizes that a network does not support, and suggests sizes that it does.
pub fn check_size(net: &dyn Network, height: usize, width: usize) -> Result<()> {
    let factor = net.size_factor();
    if height.is_multiple_of(factor) && width.is_multiple_of(factor) && height > 0 && width > 0 {
        return Ok(());
    }
    let reason = format!(
        "the {} network downsamples images to 1/{factor} of their size, but {height}x{width} is not divisible by {factor}: \
         resize or pad them to {} (--size)",
        net.name(),
        fitting_sizes(height, width, factor)
    );
    Err(crate::Error::Config { key: "data.size".to_owned(), reason })
}

/// The closest sizes divisible by `factor`, nearest first: "32x32 or 36x36".
pub(crate) fn fitting_sizes(height: usize, width: usize, factor: usize) -> String {
    let below = [height, width].map(|s| (s / factor).max(1) * factor);
    let above = [height, width].map(|s| s.div_ceil(factor).max(1) * factor);
    let far = |to: [usize; 2]| to[0].abs_diff(height) + to[1].abs_diff(width);
    let (first, second) = if far(below) <= far(above) { (below, above) } else { (above, below) };
    if first == second {
        format!("{}x{}", first[0], first[1])
    } else {
        format!("{}x{} or {}x{}", first[0], first[1], second[0], second[1])
    }
}
