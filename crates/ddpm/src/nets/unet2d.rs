//! The paper's U-Net as built by `diffusers.UNet2DModel`, with the settings of its configuration files;
//! 35,746,307 parameters for CIFAR-10.

use super::blocks::ConvLayer;
use super::check::{MAX_CHANNELS, classes, divisible, embedding, num_entries};
use super::{Builder, Inputs, Network, NetworkSettings};
use crate::error::Result;
use crate::settings::{
    check::{below_one, positive, refuse, within},
    section,
};
use ddpm_engine::Tensor;
use ddpm_engine::ops::{Activation, Padding, SinusoidalEmbedding, Taps};
use serde::{Deserialize, Serialize};

section! {
    /// The network "unet2d": the paper's U-Net with the settings of diffusers' UNet2DModel.
    pub struct Unet2dConfig {
        /// ResNet blocks per down block; up blocks have one more.
        breaking layers_per_block: usize = 2,
        /// Channels of each block; every block but the last halves the resolution.
        breaking block_out_channels: Vec<usize> = vec![128, 256, 256, 256],
        /// Type of each down block: "DownBlock2D", or "AttnDownBlock2D" with attention.
        breaking down_block_types: Vec<BlockType> = vec![
            BlockType::DownBlock2D, BlockType::AttnDownBlock2D, BlockType::DownBlock2D, BlockType::DownBlock2D,
        ],
        /// Type of each up block, deepest first: "UpBlock2D", or "AttnUpBlock2D" with attention.
        breaking up_block_types: Vec<BlockType> = vec![
            BlockType::UpBlock2D, BlockType::UpBlock2D, BlockType::AttnUpBlock2D, BlockType::UpBlock2D,
        ],
        /// Channels per attention head; unset: a single head.
        breaking attention_head_dim: Option<usize> = None,
        /// Whether the middle block has attention.
        breaking add_attention: bool = true,
        /// Groups of the group normalisation layers; must divide every entry of block_out_channels.
        breaking norm_num_groups: usize = 32,
        /// Groups of the group normalisation in the middle attention; unset: norm_num_groups, or none if resnet_time_scale_shift is "scale_shift".
        breaking attn_norm_num_groups: Option<usize> = None,
        /// Epsilon added to the variance in group normalisation.
        breaking norm_eps: f64 = 1e-6,
        /// Activation of the ResNet blocks: "silu", "relu", "gelu" or "mish".
        breaking act_fn: ActFn = ActFn::Silu,
        /// Dropout probability in each ResNet block.
        noted dropout: f64 = 0.0,
        /// Zero padding of downsampling convolutions; 0: only one row at the bottom and one column at the right.
        breaking downsample_padding: usize = 0,
        /// How blocks with attention downsample: "conv" (strided convolution) or "resnet" (a ResNet block with 2x2 average pooling).
        breaking downsample_type: ResampleKind = ResampleKind::Conv,
        /// How blocks with attention upsample: "conv" (nearest neighbour, then a convolution) or "resnet" (a ResNet block).
        breaking upsample_type: ResampleKind = ResampleKind::Conv,
        /// Whether the timestep embedding has cosines first, then sines.
        breaking flip_sin_to_cos: bool = false,
        /// Subtracted from the number of frequencies in the exponent of the timestep embedding: 0 or 1.
        breaking freq_shift: f64 = 1.0,
        /// Whether the network maps its input from [0, 1] to [-1, 1].
        breaking center_input_sample: bool = false,
        /// Divisor of the residual sums in the middle block.
        breaking mid_block_scale_factor: f64 = 1.0,
        /// How the timestep embedding enters ResNet blocks: "default" (added) or "scale_shift" (scales and shifts the normalised activations).
        breaking resnet_time_scale_shift: TimeScaleShift = TimeScaleShift::Default,
        /// Number of classes of a class-conditional network; unset: unconditional.
        breaking num_class_embeds: Option<usize> = None,
    }
}

impl NetworkSettings for Unet2dConfig {
    fn validate(&self) -> Result<()> {
        let blocks = self.block_out_channels.len();
        num_entries("unet2d.block_out_channels", blocks, 1)?;
        within("unet2d.layers_per_block", self.layers_per_block, 1, 64)?;
        within("unet2d.norm_num_groups", self.norm_num_groups, 1, MAX_CHANNELS)?;
        let groups = format!("norm_num_groups is {}", self.norm_num_groups);
        for &channels in &self.block_out_channels {
            divisible("unet2d.block_out_channels", channels, self.norm_num_groups, &groups)?;
            if let Some(dim) = self.attention_head_dim {
                within("unet2d.attention_head_dim", dim, 1, MAX_CHANNELS)?;
                divisible(
                    "unet2d.block_out_channels",
                    channels,
                    dim,
                    &format!("attention_head_dim is {dim}"),
                )?;
            }
        }
        let first = self.block_out_channels[0];
        embedding("unet2d.block_out_channels", first, 2)?;
        let up = [BlockType::UpBlock2D, BlockType::AttnUpBlock2D];
        let down = [BlockType::DownBlock2D, BlockType::AttnDownBlock2D];
        for (key, types, known) in [
            ("unet2d.down_block_types", &self.down_block_types, down),
            ("unet2d.up_block_types", &self.up_block_types, up),
        ] {
            if types.len() != blocks {
                let reason =
                    format!("has {} entries; give {blocks}, as many as block_out_channels", types.len());
                return refuse(key, reason);
            }
            if let Some(wrong) = types.iter().find(|t| !known.contains(t)) {
                return refuse(
                    key,
                    format!("{wrong:?} is not allowed here; use {:?} or {:?}", known[0], known[1]),
                );
            }
        }
        if let Some(groups) = self.attn_norm_num_groups {
            within("unet2d.attn_norm_num_groups", groups, 1, MAX_CHANNELS)?;
            let last = self.block_out_channels[blocks - 1];
            if !last.is_multiple_of(groups) {
                let reason = format!("{groups} groups do not divide the {last} channels of the middle block");
                return refuse("unet2d.attn_norm_num_groups", reason);
            }
        }
        if !positive(self.norm_eps, 1.0) {
            let reason = format!("{} is out of range; give a number above 0; 1e-6 is usual", self.norm_eps);
            return refuse("unet2d.norm_eps", reason);
        }
        below_one("unet2d.dropout", self.dropout)?;
        within("unet2d.downsample_padding", self.downsample_padding, 0, 1)?;
        within("unet2d.freq_shift", self.freq_shift, 0.0, 1.0)?;
        if first as f64 / 2.0 <= self.freq_shift {
            return refuse(
                "unet2d.freq_shift",
                "is as large as the number of frequencies; use 0, or more block_out_channels",
            );
        }
        within("unet2d.mid_block_scale_factor", self.mid_block_scale_factor, 1e-3, 1e3)?;
        classes("unet2d.num_class_embeds", self.num_class_embeds)
    }

    fn halving_key(&self) -> &'static str {
        "unet2d.block_out_channels"
    }

    fn build(&self, channels: usize, learned_variance: bool) -> Box<dyn Network> {
        Box::new(Unet2d { channels, learned_variance, config: self.clone() })
    }
}

/// Block types of "unet2d", with diffusers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are diffusers'")]
pub enum BlockType {
    DownBlock2D,
    AttnDownBlock2D,
    UpBlock2D,
    AttnUpBlock2D,
}

impl BlockType {
    /// Whether each ResNet block is followed by attention.
    pub fn attends(self) -> bool {
        matches!(self, Self::AttnDownBlock2D | Self::AttnUpBlock2D)
    }
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActFn {
    /// `x sigmoid(x)`, also called swish.
    #[serde(alias = "swish")]
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)`.
    Gelu,
    /// `x tanh(ln(1 + e^x))`.
    Mish,
}

impl ActFn {
    /// The engine's equivalent.
    pub fn activation(self) -> Activation {
        match self {
            Self::Silu => Activation::Silu,
            Self::Relu => Activation::Relu,
            Self::Gelu => Activation::Gelu,
            Self::Mish => Activation::Mish,
        }
    }
}

/// How the resolution is halved and doubled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResampleKind {
    /// With a convolution.
    Conv,
    /// With a ResNet block.
    Resnet,
}

/// How the timestep embedding enters a ResNet block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeScaleShift {
    /// It is added.
    Default,
    /// It scales and shifts.
    ScaleShift,
}

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

/// Layer `i` of a stage.
struct Layer<'a> {
    stage: &'a str,
    i: usize,
    kind: BlockType,
    /// Output channels.
    out: usize,
}

/// Down- or upsampling at the end of a stage.
struct Resize<'a> {
    name: &'a str,
    kind: BlockType,
    setting: ResampleKind,
    /// What a ResNet block resamples with.
    taps: fn(usize) -> Taps,
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
    fn layer(&self, b: &mut Builder, x: Tensor, t: Tensor, layer: Layer<'_>) -> Result<Tensor> {
        let Layer { stage, i, kind, out } = layer;
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
        x: Tensor,
        t: Tensor,
        resize: Resize<'_>,
        conv: impl FnOnce(&mut Builder, &str, usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (Resize { name, kind, setting, taps }, out) = (resize, b.channels(x));
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
                x = self.layer(b, x, t, Layer { stage: &stage, i: layer, kind, out })?;
                skips.push(x);
            }
            if i < last {
                let (name, setting) = (&*format!("{stage}.downsamplers.0"), config.downsample_type);
                let down = Resize { name, kind, setting, taps: Taps::mean_half };
                x = self.resize(b, x, t, down, |b, name, out| {
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
                x = self.layer(b, x, t, Layer { stage: &stage, i: layer, kind, out })?;
            }
            if i < last {
                let (name, setting) = (&*format!("{stage}.upsamplers.0"), config.upsample_type);
                let up = Resize { name, kind, setting, taps: Taps::nearest_double };
                x = self.resize(b, x, t, up, |b, name, out| {
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
