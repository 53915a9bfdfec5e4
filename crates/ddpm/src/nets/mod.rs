//! Networks, built from common blocks, with PyTorch's parameter names.
//!
//! [`Builder`] adds layers to a graph and records every parameter's PyTorch name, shape and layout; the
//! records serve initialisation ([`ParameterSpec::init`]) and checkpoints ([`ParameterSpec::to_torch`],
//! [`ParameterSpec::from_torch`]).

pub(crate) mod attention;
mod blocks;
mod double_conv;
mod parameters;
mod simple;
mod unet2d;

pub use attention::AttentionUnet;
pub use blocks::{Builder, ConvLayer, EPS, Mode};
pub use double_conv::DoubleConvUnet;
pub use parameters::{Init, Layout, ParameterSpec, StateSpec};
pub use simple::SimpleUnet;
pub use unet2d::Unet2d;

use crate::config::{Config, NetworkKind};
use crate::error::Result;
use ddpm_engine::{Graph, Tensor};

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

/// The network selected by the settings. Add new networks here.
pub fn from_config(config: &Config, channels: usize) -> Box<dyn Network> {
    let learned_variance = config.diffusion.learned_variance;
    match config.network.name {
        NetworkKind::Attention => {
            Box::new(AttentionUnet { channels, learned_variance, config: config.attention.clone() })
        }
        NetworkKind::Simple => {
            Box::new(SimpleUnet { channels, learned_variance, config: config.simple.clone() })
        }
        NetworkKind::DoubleConv => {
            Box::new(DoubleConvUnet { channels, learned_variance, config: config.double_conv.clone() })
        }
        NetworkKind::Unet2d => Box::new(Unet2d { channels, learned_variance, config: config.unet2d.clone() }),
    }
}
