//! The U-Net of the CIFAR-10 notebook: pairs of convolutions, GELU, max-pooling, bilinear upsampling,
//! attention with a small MLP after each level; 23,563,011 parameters for RGB images.

use super::blocks::ConvLayer;
use super::check::{MAX_CHANNELS, divisible, embedding};
use super::{Builder, Inputs, Network, NetworkSettings, blocks};
use crate::error::Result;
use crate::settings::{
    check::{below_one, within},
    section,
};
use ddpm_engine::Tensor;
use ddpm_engine::ops::{Activation, SinusoidalEmbedding, Taps};

section! {
    /// The network "double-conv": the CIFAR-10 notebook's U-Net.
    pub struct DoubleConvConfig {
        /// Channels at full resolution; deeper levels have 2, 4 and 8 times as many; divisible by num_heads.
        breaking base_channels: usize = 64,
        /// Dimension of the timestep embedding; even.
        breaking time_emb_dim: usize = 128,
        /// Attention heads.
        breaking num_heads: usize = 4,
        /// Dropout probability of the attention weights.
        noted dropout: f64 = 0.2,
    }
}

impl NetworkSettings for DoubleConvConfig {
    fn validate(&self) -> Result<()> {
        within("double_conv.num_heads", self.num_heads, 1, MAX_CHANNELS)?;
        let why = format!("{} heads", self.num_heads);
        divisible("double_conv.base_channels", self.base_channels, self.num_heads, &why)?;
        within("double_conv.base_channels", self.base_channels, 1, MAX_CHANNELS / 8)?;
        embedding("double_conv.time_emb_dim", self.time_emb_dim, 2)?;
        below_one("double_conv.dropout", self.dropout)
    }

    fn halving_key(&self) -> &'static str {
        "the network double-conv"
    }

    fn build(&self, channels: usize, learned_variance: bool) -> Box<dyn Network> {
        Box::new(DoubleConvUnet { channels, learned_variance, config: self.clone() })
    }
}

/// The network with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleConvUnet {
    /// Channels of the images.
    pub channels: usize,
    /// Whether it also predicts the variance ([`Network::learned_variance`]).
    pub learned_variance: bool,
    /// Its settings.
    pub config: DoubleConvConfig,
}

impl DoubleConvUnet {
    /// Two convolutions without bias, each normalised over all channels, with GELU between them; with
    /// `residual`, the input is added and GELU applied.
    fn double_conv(
        &self,
        b: &mut Builder,
        name: &str,
        x: Tensor,
        mid: usize,
        out: usize,
        residual: bool,
    ) -> Result<Tensor> {
        let at = |i: usize| format!("{name}.double_conv.{i}");
        let h = b.conv(&at(0), x, ConvLayer::new(mid, 3).without_bias())?;
        let h = b.group_norm(&at(1), h, 1, blocks::EPS)?;
        let h = b.activate(&at(2), h, Activation::Gelu)?;
        let h = b.conv(&at(3), h, ConvLayer::new(out, 3).without_bias())?;
        let h = b.group_norm(&at(4), h, 1, blocks::EPS)?;
        if !residual {
            return Ok(h);
        }
        let h = b.add(name, x, h)?;
        b.activate(name, h, Activation::Gelu)
    }

    /// Adds the time embedding, projected to the channels of `x`.
    fn add_time(&self, b: &mut Builder, name: &str, x: Tensor, t: Tensor) -> Result<Tensor> {
        let (name, out) = (format!("{name}.pos_embed"), b.channels(x));
        let t = b.silu(&format!("{name}.0"), t)?;
        let t = b.linear(&format!("{name}.1"), t, out)?;
        b.add_per_channel(&name, x, t)
    }

    fn down(&self, b: &mut Builder, name: &str, x: Tensor, t: Tensor, out: usize) -> Result<Tensor> {
        let (at, c) = (|i: usize| format!("{name}.maxpool_conv.{i}"), b.channels(x));
        let x = b.max_pool(&at(0), x)?;
        let x = self.double_conv(b, &at(1), x, c, c, true)?;
        let x = self.double_conv(b, &at(2), x, out, out, false)?;
        self.add_time(b, name, x, t)
    }

    fn up(
        &self,
        b: &mut Builder,
        name: &str,
        x: Tensor,
        skip: Tensor,
        t: Tensor,
        out: usize,
    ) -> Result<Tensor> {
        let x = b.resample(&format!("{name}.up"), x, Taps::linear_double)?;
        let x = b.concat(name, skip, x)?;
        let (at, c) = (|i: usize| format!("{name}.conv.{i}"), b.channels(x));
        let x = self.double_conv(b, &at(0), x, c, c, true)?;
        let x = self.double_conv(b, &at(1), x, c / 2, out, false)?;
        self.add_time(b, name, x, t)
    }

    /// Attention and an MLP, each with pre-normalization and a residual connection.
    fn attend(&self, b: &mut Builder, name: &str, x: Tensor) -> Result<Tensor> {
        let (at, c) = (|part: &str| format!("{name}.{part}"), b.channels(x));
        let q = b.layer_norm(&at("ln"), x)?;
        let h = b.attention(&at("mha"), q, self.config.num_heads, self.config.dropout)?;
        let x = b.add(&at("mha"), h, x)?;
        let h = b.layer_norm(&at("ff_self.0"), x)?;
        let h = b.linear(&at("ff_self.1"), h, 2 * c)?;
        let h = b.activate(&at("ff_self.2"), h, Activation::Gelu)?;
        let h = b.linear(&at("ff_self.3"), h, c)?;
        b.add(&at("ff_self"), h, x)
    }
}

impl Network for DoubleConvUnet {
    fn name(&self) -> &'static str {
        "double-conv"
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    fn size_factor(&self) -> usize {
        8
    }

    fn build(&self, b: &mut Builder, Inputs { x, t, .. }: Inputs) -> Result<Tensor> {
        let (c, dim) = (self.config.base_channels, self.config.time_emb_dim);
        let t = b.time_embedding(t, SinusoidalEmbedding { dim, shift: 0.0, cosines_first: false })?;
        let x1 = self.double_conv(b, "conv1", x, c, c, false)?;
        let mut skips = vec![x1];
        let mut x = x1;
        for (i, out) in [2 * c, 4 * c, 4 * c].into_iter().enumerate() {
            x = self.down(b, &format!("down{}", i + 1), x, t, out)?;
            x = self.attend(b, &format!("att{}", i + 1), x)?;
            skips.push(x);
        }
        skips.pop();
        for (i, out) in [8 * c, 8 * c, 4 * c].into_iter().enumerate() {
            x = self.double_conv(b, &format!("bottl{}", i + 1), x, out, out, false)?;
        }
        for (i, out) in [2 * c, c, c].into_iter().enumerate() {
            let skip = skips.pop().expect("a skip for every level");
            x = self.up(b, &format!("up{}", i + 1), x, skip, t, out)?;
            x = self.attend(b, &format!("att{}", i + 4), x)?;
        }
        b.conv("convOut", x, ConvLayer::new(self.out_channels(), 1))
    }
}
