//! The paper's U-Net as built by `diffusers.UNet2DModel`, with the settings of its configuration files;
//! 35,746,307 parameters for CIFAR-10.

use super::blocks::ConvLayer;
use super::{Builder, Inputs, Network};
use crate::config::{BlockType, ResampleKind, TimeScaleShift, Unet2dConfig};
use crate::error::Result;
use ddpm_engine::Tensor;
use ddpm_engine::ops::{Activation, Padding, SinusoidalEmbedding, Taps};

/// The network with its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Unet2d {
    /// Channels of the images.
    pub channels: usize,
    /// Whether it also predicts the variance ([`Network::learned_variance`]).
    pub learned_variance: bool,
    /// Its settings.
    pub config: Unet2dConfig,
}

/// Options of a ResNet block.
#[derive(Clone, Copy)]
struct Resnet {
    out: usize,
    /// Resamples after the first activation and on the residual connection.
    resample: Option<fn(usize) -> Taps>,
    /// The sum with the input is divided by this.
    scale: f64,
}

impl Unet2d {
    fn activation(&self) -> Activation {
        self.config.act_fn.activation()
    }

    fn group_norm(&self, b: &mut Builder, name: &str, x: Tensor, groups: usize) -> Result<Tensor> {
        b.group_norm(name, x, groups, self.config.norm_eps as f32)
    }

    /// Norm, activation, 3x3, time; norm, activation, dropout, 3x3; + the input, through 1x1 if its channels differ.
    fn resnet(&self, b: &mut Builder, name: &str, x: Tensor, t: Tensor, how: Resnet) -> Result<Tensor> {
        let (at, act) = (|part: &str| format!("{name}.{part}"), self.activation());
        let (groups, out) = (self.config.norm_num_groups, how.out);
        let mut input = x;
        let h = self.group_norm(b, &at("norm1"), x, groups)?;
        let mut h = b.activate(&at("norm1"), h, act)?;
        if let Some(taps) = how.resample {
            h = b.resample(name, h, taps)?;
            input = b.resample(name, input, taps)?;
        }
        let h = b.conv(&at("conv1"), h, ConvLayer::new(out, 3))?;
        let proj = at("time_emb_proj");
        let t = b.activate(&proj, t, act)?;
        let h = match self.config.resnet_time_scale_shift {
            TimeScaleShift::Default => {
                let t = b.linear(&proj, t, out)?;
                let h = b.add_per_channel(&proj, h, t)?;
                self.group_norm(b, &at("norm2"), h, groups)?
            }
            TimeScaleShift::ScaleShift => {
                let t = b.linear(&proj, t, 2 * out)?;
                let h = self.group_norm(b, &at("norm2"), h, groups)?;
                let (scale, shift) = (b.slice(&proj, t, 0, out)?, b.slice(&proj, t, out, out)?);
                let h = b.modulate(&proj, h, scale)?;
                b.add_per_channel(&proj, h, shift)?
            }
        };
        let h = b.activate(&at("norm2"), h, act)?;
        let h = b.dropout(&at("dropout"), h, self.config.dropout)?;
        let h = b.conv(&at("conv2"), h, ConvLayer::new(out, 3))?;
        if b.channels(input) != out {
            input = b.conv(&at("conv_shortcut"), input, ConvLayer::new(out, 1))?;
        }
        let sum = b.add(name, h, input)?;
        b.affine(name, sum, 1.0 / how.scale, 0.0)
    }

    /// Norm (if any), attention with separate projections for queries, keys and values; + the input.
    fn attention(
        &self,
        b: &mut Builder,
        name: &str,
        x: Tensor,
        groups: Option<usize>,
        scale: f64,
    ) -> Result<Tensor> {
        let (at, c) = (|part: &str| format!("{name}.{part}"), b.channels(x));
        let h = match groups {
            Some(groups) => self.group_norm(b, &at("group_norm"), x, groups)?,
            None => x,
        };
        let q = b.linear(&at("to_q"), h, c)?;
        let k = b.linear(&at("to_k"), h, c)?;
        let v = b.linear(&at("to_v"), h, c)?;
        let qk = b.concat(name, q, k)?;
        let qkv = b.concat(name, qk, v)?;
        let h = b.attend(name, qkv, c / self.config.attention_head_dim.unwrap_or(c), 0.0)?;
        let h = b.linear(&at("to_out.0"), h, c)?;
        let sum = b.add(name, h, x)?;
        b.affine(name, sum, 1.0 / scale, 0.0)
    }

    /// A ResNet block, followed by attention if the stage has it.
    fn layer(
        &self,
        b: &mut Builder,
        stage: &str,
        i: usize,
        kind: BlockType,
        x: Tensor,
        t: Tensor,
        out: usize,
    ) -> Result<Tensor> {
        let how = Resnet { out, resample: None, scale: 1.0 };
        let x = self.resnet(b, &format!("{stage}.resnets.{i}"), x, t, how)?;
        if !kind.attends() {
            return Ok(x);
        }
        self.attention(b, &format!("{stage}.attentions.{i}"), x, Some(self.config.norm_num_groups), 1.0)
    }

    fn middle(&self, b: &mut Builder, x: Tensor, t: Tensor) -> Result<Tensor> {
        let config = &self.config;
        let scale = config.mid_block_scale_factor;
        let how = Resnet { out: b.channels(x), resample: None, scale };
        let mut x = self.resnet(b, "mid_block.resnets.0", x, t, how)?;
        if config.add_attention {
            let groups = match config.resnet_time_scale_shift {
                TimeScaleShift::Default => {
                    Some(config.attn_norm_num_groups.unwrap_or(config.norm_num_groups))
                }
                TimeScaleShift::ScaleShift => config.attn_norm_num_groups,
            };
            x = self.attention(b, "mid_block.attentions.0", x, groups, scale)?;
        }
        self.resnet(b, "mid_block.resnets.1", x, t, how)
    }

    /// Down- or upsampling by 2, by a ResNet block or by `conv`: in diffusers the setting applies only to
    /// blocks with attention, and the others use a convolution.
    fn resize(
        &self,
        b: &mut Builder,
        name: &str,
        (kind, setting): (BlockType, ResampleKind),
        x: Tensor,
        t: Tensor,
        taps: fn(usize) -> Taps,
        conv: impl FnOnce(&mut Builder, &str, usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let out = b.channels(x);
        if kind.attends() && setting == ResampleKind::Resnet {
            return self.resnet(b, name, x, t, Resnet { out, resample: Some(taps), scale: 1.0 });
        }
        conv(b, &format!("{name}.conv"), out)
    }
}

impl Network for Unet2d {
    fn name(&self) -> &'static str {
        "unet2d"
    }

    fn channels(&self) -> usize {
        self.channels
    }

    fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    fn size_factor(&self) -> usize {
        1 << (self.config.block_out_channels.len() - 1)
    }

    fn classes(&self) -> Option<usize> {
        self.config.num_class_embeds
    }

    fn build(&self, b: &mut Builder, Inputs { x, t, label }: Inputs) -> Result<Tensor> {
        let config = &self.config;
        let (channels, layers) = (&config.block_out_channels, config.layers_per_block);
        let time_dim = 4 * channels[0];
        let embedding = SinusoidalEmbedding {
            dim: channels[0],
            shift: config.freq_shift,
            cosines_first: config.flip_sin_to_cos,
        };
        let t = b.time_embedding(t, embedding)?;
        let t = b.linear("time_embedding.linear_1", t, time_dim)?;
        let t = b.silu("time_embedding.act", t)?;
        let t = b.linear("time_embedding.linear_2", t, time_dim)?;
        let t = b.add_class(t, label, config.num_class_embeds)?;

        let x = if config.center_input_sample { b.affine("center_input_sample", x, 2.0, -1.0)? } else { x };
        let mut x = b.conv("conv_in", x, ConvLayer::new(channels[0], 3))?;
        let mut skips = vec![x];
        let last = channels.len() - 1;
        for (i, (&out, &kind)) in channels.iter().zip(&config.down_block_types).enumerate() {
            let stage = format!("down_blocks.{i}");
            for layer in 0..layers {
                x = self.layer(b, &stage, layer, kind, x, t, out)?;
                skips.push(x);
            }
            if i < last {
                let (name, how) = (format!("{stage}.downsamplers.0"), (kind, config.downsample_type));
                x = self.resize(b, &name, how, x, t, Taps::mean_half, |b, name, out| {
                    let pad = match config.downsample_padding {
                        0 => Padding { before: (0, 0), after: (1, 1) },
                        pad => Padding::even(pad),
                    };
                    b.conv(name, x, ConvLayer { stride: 2, pad, ..ConvLayer::new(out, 3) })
                })?;
                skips.push(x);
            }
        }
        x = self.middle(b, x, t)?;
        for (i, (&out, &kind)) in channels.iter().rev().zip(&config.up_block_types).enumerate() {
            let stage = format!("up_blocks.{i}");
            for layer in 0..layers + 1 {
                let skip = skips.pop().expect("a skip for every layer");
                x = b.concat(&stage, x, skip)?;
                x = self.layer(b, &stage, layer, kind, x, t, out)?;
            }
            if i < last {
                let (name, how) = (format!("{stage}.upsamplers.0"), (kind, config.upsample_type));
                x = self.resize(b, &name, how, x, t, Taps::nearest_double, |b, name, out| {
                    let x = b.resample(name, x, Taps::nearest_double)?;
                    b.conv(name, x, ConvLayer::new(out, 3))
                })?;
            }
        }
        assert!(skips.is_empty(), "every skip is used");
        let x = self.group_norm(b, "conv_norm_out", x, config.norm_num_groups)?;
        let x = b.silu("conv_act", x)?;
        b.conv("conv_out", x, ConvLayer::new(self.out_channels(), 3))
    }
}
