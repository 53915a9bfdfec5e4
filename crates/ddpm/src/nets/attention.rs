//! The attention U-Net of the DDPM-Pytorch tutorial: ResNet blocks with the time embedding, each followed by
//! self-attention over the pixels; 10,188,081 parameters at its defaults.

use super::{Builder, Network};
use crate::error::Result;
use crate::train::config::NetworkConfig;
use ddpm_engine::Tensor;

/// Groups of every normalisation.
const GROUPS: usize = 8;
/// Channels behind the last block.
const LAST_CHANNELS: usize = 16;

/// The network's settings, with the tutorial's names.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionUnet {
    /// Channels of the pictures.
    pub im_channels: usize,
    /// Channels behind the first convolution and behind each down block.
    pub down_channels: Vec<usize>,
    /// Channels before the first and behind each middle block.
    pub mid_channels: Vec<usize>,
    /// Whether each down block halves the size (and its up block doubles it).
    pub down_sample: Vec<bool>,
    /// Numbers of the time embedding.
    pub time_emb_dim: usize,
    /// Layers (ResNet block and attention) of each down block.
    pub num_down_layers: usize,
    /// Layers of each middle block.
    pub num_mid_layers: usize,
    /// Layers of each up block.
    pub num_up_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
}

impl Default for AttentionUnet {
    fn default() -> Self {
        Self {
            im_channels: 1,
            down_channels: vec![32, 64, 128, 256],
            mid_channels: vec![256, 256, 128],
            down_sample: vec![true, true, false],
            time_emb_dim: 128,
            num_down_layers: 2,
            num_mid_layers: 2,
            num_up_layers: 2,
            num_heads: 4,
        }
    }
}

impl AttentionUnet {
    /// The network of these settings for pictures of `channels` channels.
    pub fn from_config(config: &NetworkConfig, channels: usize) -> Self {
        Self {
            im_channels: channels,
            down_channels: config.down_channels.clone(),
            mid_channels: config.mid_channels.clone(),
            down_sample: config.down_sample.clone(),
            time_emb_dim: config.time_emb_dim,
            num_down_layers: config.num_down_layers,
            num_mid_layers: config.num_mid_layers,
            num_up_layers: config.num_up_layers,
            num_heads: config.num_heads,
        }
    }

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
        let h = b.add_picture(&time, h, t)?;
        let h = self.norm_act_conv(b, &format!("{stage}.resnet_conv_second.{i}"), h, out)?;
        let residual = format!("{stage}.residual_input_conv.{i}");
        let x = b.conv(&residual, x, out, 1, 1, 0)?;
        b.add(&residual, h, x)
    }

    fn norm_act_conv(&self, b: &mut Builder, name: &str, x: Tensor, out: usize) -> Result<Tensor> {
        let h = b.group_norm(&format!("{name}.0"), x, GROUPS)?;
        let h = b.silu(&format!("{name}.1"), h)?;
        b.conv(&format!("{name}.2"), h, out, 3, 1, 1)
    }

    /// Attention `i` of a stage, around which the input is added.
    fn attend(&self, b: &mut Builder, stage: &str, i: usize, x: Tensor) -> Result<Tensor> {
        let h = b.group_norm(&format!("{stage}.attention_norms.{i}"), x, GROUPS)?;
        let name = format!("{stage}.attentions.{i}");
        let h = b.attention(&name, h, self.num_heads)?;
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
        self.im_channels
    }

    fn size_factor(&self) -> usize {
        1 << self.down_sample.iter().filter(|&&d| d).count()
    }

    fn build(&self, b: &mut Builder, x: Tensor, t: Tensor) -> Result<Tensor> {
        let t = b.time_embedding(t, self.time_emb_dim)?;
        let t = b.linear("t_proj.0", t, self.time_emb_dim)?;
        let t = b.silu("t_proj.1", t)?;
        let t = b.linear("t_proj.2", t, self.time_emb_dim)?;

        let mut x = b.conv("conv_in", x, self.down_channels[0], 3, 1, 1)?;
        let mut skips = Vec::new();
        for (i, (&out, &halve)) in self.down_channels[1..].iter().zip(&self.down_sample).enumerate() {
            let stage = format!("downs.{i}");
            skips.push(x);
            x = self.layers(b, &stage, self.num_down_layers, x, t, out)?;
            if halve {
                x = b.conv(&format!("{stage}.down_sample_conv"), x, out, 4, 2, 1)?;
            }
        }
        for (i, &out) in self.mid_channels[1..].iter().enumerate() {
            let stage = format!("mids.{i}");
            x = self.resnet(b, &stage, 0, x, t, out)?;
            for layer in 0..self.num_mid_layers {
                x = self.attend(b, &stage, layer, x)?;
                x = self.resnet(b, &stage, layer + 1, x, t, out)?;
            }
        }
        let ups = self.down_sample.len();
        for i in 0..ups {
            let level = ups - 1 - i;
            let stage = format!("ups.{i}");
            let out = if level == 0 { LAST_CHANNELS } else { self.down_channels[level - 1] };
            if self.down_sample[level] {
                x = b.conv_transpose(
                    &format!("{stage}.up_sample_conv"),
                    x,
                    self.down_channels[level],
                    4,
                    2,
                    1,
                )?;
            }
            let skip = skips.pop().expect("a skip for every up block");
            x = b.concat(&stage, x, skip)?;
            x = self.layers(b, &stage, self.num_up_layers, x, t, out)?;
        }
        assert!(skips.is_empty(), "every skip is used");
        let x = b.group_norm("norm_out", x, GROUPS)?;
        let x = b.silu("act_out", x)?;
        b.conv("conv_out", x, self.im_channels, 3, 1, 1)
    }
}
