//! The U-Net of DeepFindr's notebook and its X-ray descendant: convolution, ReLU, batch normalisation; 62,437,601
//! parameters for grey images.

use super::blocks::ConvLayer;
use super::check::{MAX_CHANNELS, classes, embedding, num_entries};
use super::{Builder, Inputs, Network, NetworkSettings};
use crate::error::Result;
use crate::settings::{check::within, section};
use ddpm_engine::Tensor;
use ddpm_engine::ops::{Activation, SinusoidalEmbedding};

section! {
    /// The network "simple": DeepFindr's notebook and its X-ray descendant.
    pub struct SimpleConfig {
        /// Channels at the input and after each down block; each down block halves the resolution.
        breaking widths: Vec<usize> = vec![64, 128, 256, 512, 1024],
        /// Dimension of the timestep embedding; even, at least 4.
        breaking time_emb_dim: usize = 32,
        /// Number of classes of a class-conditional network; unset: unconditional.
        breaking num_class_embeds: Option<usize> = None,
    }
}

impl NetworkSettings for SimpleConfig {
    fn validate(&self) -> Result<()> {
        num_entries("simple.widths", self.widths.len(), 2)?;
        for &width in &self.widths {
            within("simple.widths", width, 1, MAX_CHANNELS)?;
        }
        // A dimension of 2 has a single frequency, whose exponent would be divided by 0.
        embedding("simple.time_emb_dim", self.time_emb_dim, 4)?;
        classes("simple.num_class_embeds", self.num_class_embeds)
    }

    fn halving_key(&self) -> &'static str {
        "simple.widths"
    }

    fn build(&self, channels: usize, learned_variance: bool) -> Box<dyn Network> {
        Box::new(SimpleUnet { channels, learned_variance, config: self.clone() })
    }
}

/// The network with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct SimpleUnet {
    /// Channels of the images.
    pub channels: usize,
    /// Whether it also predicts the variance ([`Network::learned_variance`]).
    pub learned_variance: bool,
    /// Its settings.
    pub config: SimpleConfig,
}

impl SimpleUnet {
    /// Convolution, ReLU, norm, + time; convolution, ReLU, norm; then down- or upsampling by 2.
    fn block(
        &self,
        b: &mut Builder,
        name: &str,
        x: Tensor,
        t: Tensor,
        out: usize,
        up: bool,
    ) -> Result<Tensor> {
        let at = |part: &str| format!("{name}.{part}");
        let relu = Activation::Relu;
        let h = b.conv(&at("conv1"), x, ConvLayer::new(out, 3))?;
        let h = b.activate(&at("relu"), h, relu)?;
        let h = b.batch_norm(&at("bnorm1"), h)?;
        let t = b.linear(&at("time_mlp"), t, out)?;
        let t = b.activate(&at("relu"), t, relu)?;
        let h = b.add_per_channel(name, h, t)?;
        let h = b.conv(&at("conv2"), h, ConvLayer::new(out, 3))?;
        let h = b.activate(&at("relu"), h, relu)?;
        let h = b.batch_norm(&at("bnorm2"), h)?;
        let layer = ConvLayer::new(out, 4).strided(2, 1);
        if up { b.conv_transpose(&at("transform"), h, layer) } else { b.conv(&at("transform"), h, layer) }
    }
}

impl Network for SimpleUnet {
    fn name(&self) -> &'static str {
        "simple"
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    fn size_factor(&self) -> usize {
        1 << (self.config.widths.len() - 1)
    }

    fn classes(&self) -> Option<usize> {
        self.config.num_class_embeds
    }

    fn build(&self, b: &mut Builder, Inputs { x, t, label }: Inputs) -> Result<Tensor> {
        let (widths, dim) = (&self.config.widths, self.config.time_emb_dim);
        let t = b.time_embedding(t, SinusoidalEmbedding { dim, shift: 1.0, cosines_first: false })?;
        let t = b.linear("time_mlp.1", t, dim)?;
        let t = b.activate("time_mlp.2", t, Activation::Relu)?;
        let t = b.add_class(t, label, self.config.num_class_embeds)?;

        let mut x = b.conv("conv0", x, ConvLayer::new(widths[0], 3))?;
        let mut skips = Vec::new();
        for (i, &out) in widths[1..].iter().enumerate() {
            x = self.block(b, &format!("downs.{i}"), x, t, out, false)?;
            skips.push(x);
        }
        for (i, &out) in widths[..widths.len() - 1].iter().rev().enumerate() {
            let name = format!("ups.{i}");
            let skip = skips.pop().expect("a skip for every up block");
            x = b.concat(&name, x, skip)?;
            x = self.block(b, &name, x, t, out, true)?;
        }
        b.conv("output", x, ConvLayer::new(self.out_channels(), 1))
    }
}
