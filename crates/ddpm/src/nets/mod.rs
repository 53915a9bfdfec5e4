//! Networks: graphs built from common blocks, with PyTorch's parameter names.
//!
//! [`Builder`] adds layers to a graph and notes every parameter with the name, shape and layout that it has in
//! PyTorch; the same notes serve initialisation ([`ParameterSpec::init`]) and checkpoints ([`ParameterSpec::to_torch`],
//! [`ParameterSpec::from_torch`]).

mod attention;
mod blocks;
mod parameters;

pub use attention::AttentionUnet;
pub use blocks::Builder;
pub use parameters::{Init, Layout, ParameterSpec};

use crate::error::Result;
use crate::train::config::{NetworkConfig, NetworkKind};
use ddpm_engine::{Graph, Tensor};

/// A network under a graph: its parameters, in the graph's order, and its prediction.
#[derive(Clone, Debug)]
pub struct Built {
    /// The graph.
    pub graph: Graph,
    /// All parameters, in the order in which the graph has them.
    pub parameters: Vec<ParameterSpec>,
    /// The predicted noise, of the input's shape.
    pub prediction: Tensor,
}

/// A network that predicts noise.
pub trait Network: Send + Sync {
    /// Its name in settings.
    fn name(&self) -> &'static str;

    /// Channels of its pictures.
    fn channels(&self) -> usize;

    /// What heights and widths must be divisible by.
    fn size_factor(&self) -> usize;

    /// Adds the network to a graph: `x [n, h, w, c]` and timesteps `t [n]` to the predicted noise `[n, h, w, c]`.
    fn build(&self, b: &mut Builder, x: Tensor, t: Tensor) -> Result<Tensor>;
}

/// The network that the settings describe; a new network is one more line.
pub fn from_config(config: &NetworkConfig, channels: usize) -> Box<dyn Network> {
    match config.name {
        NetworkKind::Attention => Box::new(AttentionUnet::from_config(config, channels)),
    }
}
