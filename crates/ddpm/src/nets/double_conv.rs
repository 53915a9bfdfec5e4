//! The U-Net of the CIFAR-10 notebook: pairs of convolutions, GELU, max-pooling, bilinear upsampling,
//! attention with a small MLP after each level; 23,563,011 parameters for RGB images.

use super::blocks::ConvLayer;
use super::{Builder, Inputs, Network, blocks};
use crate::config::DoubleConvConfig;
use crate::error::Result;
use ddpm_engine::Tensor;
use ddpm_engine::ops::{Activation, SinusoidalEmbedding, Taps};

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
