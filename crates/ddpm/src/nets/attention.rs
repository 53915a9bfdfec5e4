//! The attention U-Net of the DDPM-Pytorch tutorial: ResNet blocks with the time embedding, each followed by
//! self-attention over the pixels; 10,188,081 parameters at its defaults.

use super::blocks::{self, ConvLayer};
use super::check::{classes, divisible, embedding, num_entries};
use super::{Builder, Inputs, Network, NetworkSettings};
use crate::error::Result;
use crate::settings::{
    check::{refuse, within},
    section,
};
use ddpm_engine::Tensor;
use ddpm_engine::ops::SinusoidalEmbedding;

/// Groups of every normalisation.
const GROUPS: usize = 8;
/// Channels after the last block.
const LAST_CHANNELS: usize = 16;

section! {
    /// The network "attention": the DDPM-Pytorch tutorial's U-Net.
    pub struct AttentionConfig {
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
}

impl NetworkSettings for AttentionConfig {
    fn validate(&self) -> Result<()> {
        let (down, mid, heads) = (&self.down_channels, &self.mid_channels, self.num_heads);
        if heads == 0 || !LAST_CHANNELS.is_multiple_of(heads) {
            let reason = format!(
                "{heads} heads do not divide the {LAST_CHANNELS} channels of the last block; give 1, 2, 4, 8 or 16"
            );
            return refuse("attention.num_heads", reason);
        }
        let unit = GROUPS.max(heads);
        let why = format!("the normalisation's {GROUPS} groups, {heads} heads");
        for (key, list) in [("attention.down_channels", down), ("attention.mid_channels", mid)] {
            num_entries(key, list.len(), 2)?;
            for &channels in list {
                divisible(key, channels, unit, &why)?;
            }
        }
        if self.down_sample.len() != down.len() - 1 {
            let reason = format!(
                "has {} entries; give {}, one fewer than attention.down_channels",
                self.down_sample.len(),
                down.len() - 1
            );
            return refuse("attention.down_sample", reason);
        }
        let (first, last) = (down[down.len() - 1], down[down.len() - 2]);
        if mid[0] != first {
            let reason = format!(
                "starts with {}; it must start with the last entry of down_channels, {first}",
                mid[0]
            );
            return refuse("attention.mid_channels", reason);
        }
        if mid[mid.len() - 1] != last {
            let end = mid[mid.len() - 1];
            let reason = format!(
                "ends with {end}; it must end with the second-to-last entry of down_channels, {last}"
            );
            return refuse("attention.mid_channels", reason);
        }
        embedding("attention.time_emb_dim", self.time_emb_dim, 2)?;
        within("attention.num_down_layers", self.num_down_layers, 1, 64)?;
        within("attention.num_mid_layers", self.num_mid_layers, 1, 64)?;
        within("attention.num_up_layers", self.num_up_layers, 1, 64)?;
        classes("attention.num_class_embeds", self.num_class_embeds)
    }

    fn halving_key(&self) -> &'static str {
        "attention.down_sample"
    }

    fn build(&self, channels: usize, learned_variance: bool) -> Box<dyn Network> {
        Box::new(AttentionUnet { channels, learned_variance, config: self.clone() })
    }
}

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
