//! Detects a network and its settings from the names and shapes of its tensors.

use std::collections::HashMap;

use super::choose::Candidate;
use crate::config::Config;
use crate::nets::{BlockType, NetworkKind, ResampleKind, SimpleConfig, TimeScaleShift, Unet2dConfig};

/// Maximum number of stages or layers counted; the settings allow fewer.
const MAX_LAYERS: usize = 100;
/// A tensor that only this network has.
pub(super) const SIGNATURES: [(NetworkKind, &str); 4] = [
    (NetworkKind::Attention, "t_proj.0.weight"),
    (NetworkKind::Simple, "conv0.weight"),
    (NetworkKind::DoubleConv, "conv1.double_conv.0.weight"),
    (NetworkKind::Unet2d, "time_embedding.linear_1.weight"),
];

/// Whether a tensor's name, with any prefix, is a signature of a network.
pub(super) fn is_signature(name: &str) -> bool {
    SIGNATURES.iter().any(|(_, signature)| name.ends_with(signature))
}

/// Whether a tensor is a buffer, which is neither optimized nor averaged.
pub(super) fn is_buffer(name: &str) -> bool {
    ["running_mean", "running_var", "num_batches_tracked"].iter().any(|end| name.ends_with(end))
}

/// Whether it has a second tensor of its network, as a signature may match by chance.
pub(super) fn is_plausible(candidate: &Candidate) -> bool {
    let other = match candidate.kind {
        NetworkKind::Attention | NetworkKind::Unet2d => "conv_in.weight",
        NetworkKind::Simple => "time_mlp.1.weight",
        NetworkKind::DoubleConv => "down1.pos_embed.1.weight",
    };
    candidate
        .tensors
        .iter()
        .map(|t| &t.name)
        .chain(candidate.unsupported.iter().map(|u| &u.0))
        .any(|n| n == other)
}

/// A setting that the shapes do not determine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assumed {
    /// The setting's name, such as `diffusion.timesteps`.
    pub key: &'static str,
    /// The assumed value.
    pub value: String,
}

impl Assumed {
    pub(super) fn new(key: &'static str, value: impl ToString) -> Self {
        Self { key, value: value.to_string() }
    }
}

struct Shapes<'a>(HashMap<&'a str, &'a [usize]>);

impl Shapes<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// One dimension of a tensor.
    fn extent(&self, name: &str, axis: usize) -> Result<usize, String> {
        let shape = self.0.get(name).ok_or_else(|| format!("has no tensor {name}"))?;
        shape.get(axis).copied().ok_or_else(|| format!("has a tensor {name} of unexpected shape {shape:?}"))
    }

    /// Rows of the class embedding, if there is one.
    fn classes(&self) -> Option<usize> {
        self.extent("class_embedding.weight", 0).ok()
    }

    /// Number of consecutive indices from 0 for which the tensor `name(i)` exists.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..MAX_LAYERS).take_while(|&i| self.has(&name(i))).count()
    }
}

/// Stores the network and its settings in `config`; returns the number of image channels and what was assumed. The error
/// is the reason without a path.
pub(super) fn settings(candidate: &Candidate, config: &mut Config) -> Result<(usize, Vec<Assumed>), String> {
    let shapes = candidate.tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice()));
    let shapes = Shapes(shapes.collect());
    config.network.name = candidate.kind;
    let (channels, mut assumed) = match candidate.kind {
        NetworkKind::Attention => attention(&shapes, config)?,
        NetworkKind::Simple => {
            let mut widths = vec![shapes.extent("conv0.weight", 0)?];
            for i in 0..shapes.count(|i| format!("downs.{i}.conv1.weight")) {
                widths.push(shapes.extent(&format!("downs.{i}.conv1.weight"), 0)?);
            }
            let time_emb_dim = shapes.extent("time_mlp.1.weight", 0)?;
            let num_class_embeds = shapes.classes();
            config.simple = SimpleConfig { widths, time_emb_dim, num_class_embeds };
            // As in the notebook that defines this network.
            config.diffusion.timesteps = 300;
            (shapes.extent("conv0.weight", 1)?, Vec::new())
        }
        NetworkKind::DoubleConv => {
            let net = &mut config.double_conv;
            net.base_channels = shapes.extent("conv1.double_conv.0.weight", 0)?;
            net.time_emb_dim = shapes.extent("down1.pos_embed.1.weight", 1)?;
            let heads = Assumed::new("double_conv.num_heads", net.num_heads);
            (shapes.extent("conv1.double_conv.0.weight", 1)?, vec![heads])
        }
        NetworkKind::Unet2d => unet2d(&shapes, config)?,
    };
    assumed.extend(diffusion(config));
    let last = match candidate.kind {
        NetworkKind::Attention | NetworkKind::Unet2d => "conv_out.weight",
        NetworkKind::Simple => "output.weight",
        NetworkKind::DoubleConv => "convOut.weight",
    };
    config.diffusion.learned_variance = shapes.extent(last, 0) == Ok(channels.saturating_mul(2));
    Ok((channels, assumed))
}

/// The diffusion settings assumed without a scheduler configuration.
pub(super) fn diffusion(config: &Config) -> [Assumed; 5] {
    let d = &config.diffusion;
    [
        Assumed::new("diffusion.timesteps", d.timesteps),
        Assumed::new("diffusion.schedule", d.schedule),
        Assumed::new("diffusion.beta_start", d.beta_start),
        Assumed::new("diffusion.beta_end", d.beta_end),
        Assumed::new("diffusion.prediction", d.prediction),
    ]
}

fn attention(shapes: &Shapes<'_>, config: &mut Config) -> Result<(usize, Vec<Assumed>), String> {
    let net = &mut config.attention;
    let first = |stage: &str, i: usize| format!("{stage}.{i}.resnet_conv_first.0.2.weight");
    let layers = |stage: &str| shapes.count(|i| format!("{stage}.0.resnet_conv_first.{i}.0.weight"));
    net.down_channels = vec![shapes.extent("conv_in.weight", 0)?];
    net.down_sample.clear();
    for i in 0..shapes.count(|i| first("downs", i)) {
        net.down_channels.push(shapes.extent(&first("downs", i), 0)?);
        net.down_sample.push(shapes.has(&format!("downs.{i}.down_sample_conv.weight")));
    }
    net.mid_channels = vec![shapes.extent(&first("mids", 0), 1)?];
    for i in 0..shapes.count(|i| first("mids", i)) {
        net.mid_channels.push(shapes.extent(&first("mids", i), 0)?);
    }
    net.time_emb_dim = shapes.extent("t_proj.0.weight", 1)?;
    net.num_class_embeds = shapes.classes();
    net.num_down_layers = layers("downs");
    net.num_mid_layers = layers("mids").saturating_sub(1);
    net.num_up_layers = layers("ups");
    let heads = Assumed::new("attention.num_heads", net.num_heads);
    Ok((shapes.extent("conv_in.weight", 1)?, vec![heads]))
}

/// For weights without `config.json`: what shapes do not determine takes the defaults of `diffusers.UNet2DModel`.
fn unet2d(shapes: &Shapes<'_>, config: &mut Config) -> Result<(usize, Vec<Assumed>), String> {
    if shapes.0.keys().any(|name| name.contains(".attn2.") || name.contains("transformer_blocks")) {
        return Err("is a conditional network (UNet2DConditionModel), which is not supported".into());
    }
    let conv = |stage: &str, i: usize| format!("{stage}_blocks.{i}.resnets.0.conv1.weight");
    let blocks = shapes.count(|i| conv("down", i));
    let widths = (0..blocks).map(|i| shapes.extent(&conv("down", i), 0)).collect::<Result<Vec<_>, _>>()?;
    let attends =
        |stage: &str, i: usize| shapes.has(&format!("{stage}_blocks.{i}.attentions.0.group_norm.weight"));
    let kinds =
        |stage, with, without| (0..blocks).map(|i| if attends(stage, i) { with } else { without }).collect();
    let resample = |stage: &str, part: &str| {
        if (0..blocks).any(|i| shapes.has(&format!("{stage}_blocks.{i}.{part}.0.conv1.weight"))) {
            ResampleKind::Resnet
        } else {
            ResampleKind::Conv
        }
    };
    let first = "down_blocks.0.resnets.0";
    let scale_shift = shapes.extent(&format!("{first}.time_emb_proj.weight"), 0)?
        == shapes.extent(&format!("{first}.conv1.weight"), 0)?.saturating_mul(2);
    // The class's default, reduced to a divisor of all channel counts.
    let dividing = |all: usize| widths.iter().fold(all, |a, &b| gcd(a, b));
    let net = Unet2dConfig {
        norm_num_groups: dividing(32),
        attention_head_dim: Some(dividing(8)),
        layers_per_block: shapes.count(|i| format!("down_blocks.0.resnets.{i}.conv1.weight")),
        block_out_channels: widths.clone(),
        down_block_types: kinds("down", BlockType::AttnDownBlock2D, BlockType::DownBlock2D),
        up_block_types: kinds("up", BlockType::AttnUpBlock2D, BlockType::UpBlock2D),
        add_attention: shapes.has("mid_block.attentions.0.to_q.weight")
            || shapes.has("mid_block.attentions.0.query.weight"),
        downsample_type: resample("down", "downsamplers"),
        upsample_type: resample("up", "upsamplers"),
        resnet_time_scale_shift: if scale_shift {
            TimeScaleShift::ScaleShift
        } else {
            TimeScaleShift::Default
        },
        num_class_embeds: shapes.classes(),
        ..super::diffusers::defaults()
    };
    let mut assumed = vec![
        Assumed::new(
            "unet2d.attention_head_dim",
            net.attention_head_dim.map_or("none".into(), |d| d.to_string()),
        ),
        Assumed::new("unet2d.norm_num_groups", net.norm_num_groups),
        Assumed::new("unet2d.norm_eps", net.norm_eps),
        Assumed::new("unet2d.act_fn", "silu"),
        Assumed::new("unet2d.downsample_padding", net.downsample_padding),
        Assumed::new("unet2d.flip_sin_to_cos", net.flip_sin_to_cos),
        Assumed::new("unet2d.freq_shift", net.freq_shift),
    ];
    if !net.down_block_types.iter().chain(&net.up_block_types).any(|t| t.attends()) && !net.add_attention {
        assumed.remove(0);
    }
    config.unet2d = net;
    Ok((shapes.extent("conv_in.weight", 1)?, assumed))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The tensor's name in current diffusers, which renamed the attention layers.
pub(super) fn current_name(kind: NetworkKind, name: &str) -> String {
    const OLD: [(&str, &str); 4] =
        [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
    if kind == NetworkKind::Unet2d
        && name.contains("attentions.")
        && let Some((old, new)) = OLD.iter().find(|(old, _)| name.contains(old))
    {
        return name.replace(old, new);
    }
    name.to_owned()
}
