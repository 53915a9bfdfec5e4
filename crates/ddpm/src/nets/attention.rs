//! The attention U-Net of the DDPM-Pytorch tutorial: ResNet blocks with the time embedding, each followed by
//! self-attention over the pixels; 10,188,081 parameters at its defaults.

use super::blocks::{self, ConvLayer};
use super::{Builder, Inputs, Network};
use crate::config::AttentionConfig;
use crate::error::Result;
use ddpm_engine::Tensor;
use ddpm_engine::ops::SinusoidalEmbedding;

/// Groups of every normalisation.
pub(crate) const GROUPS: usize = 8;
/// Channels after the last block.
pub(crate) const LAST_CHANNELS: usize = 16;

/// The network with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionUnet {
    /// Channels of the images.
    pub channels: usize,
    /// Whether it also predicts the variance ([`Network::learned_variance`]).
    pub learned_variance: bool,
    /// Its settings, with the tutorial's names.
    pub config: AttentionConfig,
}

impl AttentionUnet {
    /// ResNet block `i` of a stage: norm, SiLU, 3x3, + time; norm, SiLU, 3x3, + 1x1 of the input.
    fn resnet(
        &self,
        b: &mut Builder,
        stage: &str,
        i: usize,
        x: Tensor,
        t: Tensor,
        out: usize,
    ) -> Result<Tensor> {
        let h = self.norm_act_conv(b, &format!("{stage}.resnet_conv_first.{i}"), x, out)?;
        let time = format!("{stage}.t_emb_layers.{i}");
        let t = b.silu(&format!("{time}.0"), t)?;
        let t = b.linear(&format!("{time}.1"), t, out)?;
        let h = b.add_per_channel(&time, h, t)?;
        let h = self.norm_act_conv(b, &format!("{stage}.resnet_conv_second.{i}"), h, out)?;
        let residual = format!("{stage}.residual_input_conv.{i}");
        let x = b.conv(&residual, x, ConvLayer::new(out, 1))?;
        b.add(&residual, h, x)
    }

    fn norm_act_conv(&self, b: &mut Builder, name: &str, x: Tensor, out: usize) -> Result<Tensor> {
        let h = b.group_norm(&format!("{name}.0"), x, GROUPS, blocks::EPS)?;
        let h = b.silu(&format!("{name}.1"), h)?;
        b.conv(&format!("{name}.2"), h, ConvLayer::new(out, 3))
    }

    /// Attention block `i` of a stage, with a residual connection.
    fn attend(&self, b: &mut Builder, stage: &str, i: usize, x: Tensor) -> Result<Tensor> {
        let h = b.group_norm(&format!("{stage}.attention_norms.{i}"), x, GROUPS, blocks::EPS)?;
        let name = format!("{stage}.attentions.{i}");
        let h = b.attention(&name, h, self.config.num_heads, 0.0)?;
        b.add(&name, h, x)
    }

    /// Layers of a down or up block.
    fn layers(
        &self,
        b: &mut Builder,
        stage: &str,
        layers: usize,
        mut x: Tensor,
        t: Tensor,
        out: usize,
    ) -> Result<Tensor> {
        for i in 0..layers {
            x = self.resnet(b, stage, i, x, t, out)?;
            x = self.attend(b, stage, i, x)?;
        }
        Ok(x)
    }
}

impl Network for AttentionUnet {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    fn size_factor(&self) -> usize {
        1 << self.config.down_sample.iter().filter(|&&d| d).count()
    }

    fn classes(&self) -> Option<usize> {
        self.config.num_class_embeds
    }

    fn build(&self, b: &mut Builder, Inputs { x, t, label }: Inputs) -> Result<Tensor> {
        let (config, dim) = (&self.config, self.config.time_emb_dim);
        let t = b.time_embedding(t, SinusoidalEmbedding { dim, shift: 0.0, cosines_first: false })?;
        let t = b.linear("t_proj.0", t, dim)?;
        let t = b.silu("t_proj.1", t)?;
        let t = b.linear("t_proj.2", t, dim)?;
        let t = b.add_class(t, label, config.num_class_embeds)?;

        let mut x = b.conv("conv_in", x, ConvLayer::new(config.down_channels[0], 3))?;
        let mut skips = Vec::new();
        for (i, (&out, &halve)) in config.down_channels[1..].iter().zip(&config.down_sample).enumerate() {
            let stage = format!("downs.{i}");
            skips.push(x);
            x = self.layers(b, &stage, config.num_down_layers, x, t, out)?;
            if halve {
                let layer = ConvLayer::new(out, 4).strided(2, 1);
                x = b.conv(&format!("{stage}.down_sample_conv"), x, layer)?;
            }
        }
        for (i, &out) in config.mid_channels[1..].iter().enumerate() {
            let stage = format!("mids.{i}");
            x = self.resnet(b, &stage, 0, x, t, out)?;
            for layer in 0..config.num_mid_layers {
                x = self.attend(b, &stage, layer, x)?;
                x = self.resnet(b, &stage, layer + 1, x, t, out)?;
            }
        }
        let ups = config.down_sample.len();
        for i in 0..ups {
            let level = ups - 1 - i;
            let stage = format!("ups.{i}");
            let out = if level == 0 { LAST_CHANNELS } else { config.down_channels[level - 1] };
            if config.down_sample[level] {
                let layer = ConvLayer::new(config.down_channels[level], 4).strided(2, 1);
                x = b.conv_transpose(&format!("{stage}.up_sample_conv"), x, layer)?;
            }
            let skip = skips.pop().expect("a skip for every up block");
            x = b.concat(&stage, x, skip)?;
            x = self.layers(b, &stage, config.num_up_layers, x, t, out)?;
        }
        assert!(skips.is_empty(), "every skip is used");
        let x = b.group_norm("norm_out", x, GROUPS, blocks::EPS)?;
        let x = b.silu("act_out", x)?;
        b.conv("conv_out", x, ConvLayer::new(self.out_channels(), 3))
    }
}
