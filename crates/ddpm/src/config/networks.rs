//! Validation of the networks' settings.

use super::validate::{decay, positive, refuse, within};
use super::{AttentionConfig, BlockType, Config, DoubleConvConfig, NetworkKind, SimpleConfig, Unet2dConfig};
use crate::Result;
use crate::nets::attention::{GROUPS as NORM_GROUPS, LAST_CHANNELS};

/// Maximum channels of a network's block; keeps all products of sizes far from overflow.
const MAX_CHANNELS: usize = 1 << 14;
/// Maximum number of resolution levels; more would need images with sides of 2^15 pixels.
const MAX_LEVELS: usize = 16;

/// Validates the settings of the selected network.
pub(super) fn validate(config: &Config) -> Result<()> {
    match config.network.name {
        NetworkKind::Attention => attention(&config.attention),
        NetworkKind::Simple => simple(&config.simple),
        NetworkKind::DoubleConv => double_conv(&config.double_conv),
        NetworkKind::Unet2d => unet2d(&config.unet2d),
    }
}

/// The setting that determines how often the resolution is halved.
pub(super) fn halving_key(kind: NetworkKind) -> &'static str {
    match kind {
        NetworkKind::Attention => "attention.down_sample",
        NetworkKind::Simple => "simple.widths",
        NetworkKind::DoubleConv => "the network double-conv",
        NetworkKind::Unet2d => "unet2d.block_out_channels",
    }
}

/// Checks the dimension of a time embedding: even and at least `min`.
fn embedding(key: &str, dim: usize, min: usize) -> Result<()> {
    within(key, dim, min, MAX_CHANNELS)?;
    if !dim.is_multiple_of(2) {
        let reason = format!("is odd, but half are sines and half cosines; use {} or {}", dim - 1, dim + 1);
        return refuse(key, reason);
    }
    Ok(())
}

fn classes(key: &str, classes: Option<usize>) -> Result<()> {
    classes.map_or(Ok(()), |n| within(key, n, 1, 1 << 20))
}

fn num_entries(key: &str, len: usize, min: usize) -> Result<()> {
    if (min..=MAX_LEVELS).contains(&len) {
        return Ok(());
    }
    refuse(key, format!("has {len} entries; give {min} to {MAX_LEVELS}"))
}

/// Checks that `unit` divides the channels; `why` explains the unit.
fn divisible(key: &str, channels: usize, unit: usize, why: &str) -> Result<()> {
    within(key, channels, 1, MAX_CHANNELS)?;
    if channels.is_multiple_of(unit) {
        return Ok(());
    }
    let (below, above) = (channels / unit * unit, channels.next_multiple_of(unit));
    let near = if below == 0 { format!("{above}") } else { format!("{below} or {above}") };
    refuse(key, format!("{channels} is not divisible by {unit} ({why}); use {near}"))
}

fn attention(attention: &AttentionConfig) -> Result<()> {
    let (down, mid, heads) = (&attention.down_channels, &attention.mid_channels, attention.num_heads);
    if heads == 0 || !LAST_CHANNELS.is_multiple_of(heads) {
        let reason = format!(
            "{heads} heads do not divide the {LAST_CHANNELS} channels of the last block; give 1, 2, 4, 8 or 16"
        );
        return refuse("attention.num_heads", reason);
    }
    let unit = NORM_GROUPS.max(heads);
    let why = format!("the normalisation's {NORM_GROUPS} groups, {heads} heads");
    for (key, list) in [("attention.down_channels", down), ("attention.mid_channels", mid)] {
        num_entries(key, list.len(), 2)?;
        for &channels in list {
            divisible(key, channels, unit, &why)?;
        }
    }
    if attention.down_sample.len() != down.len() - 1 {
        let reason = format!(
            "has {} entries; give {}, one fewer than attention.down_channels",
            attention.down_sample.len(),
            down.len() - 1
        );
        return refuse("attention.down_sample", reason);
    }
    let (first, last) = (down[down.len() - 1], down[down.len() - 2]);
    if mid[0] != first {
        let reason =
            format!("starts with {}; it must start with the last entry of down_channels, {first}", mid[0]);
        return refuse("attention.mid_channels", reason);
    }
    if mid[mid.len() - 1] != last {
        let end = mid[mid.len() - 1];
        let reason =
            format!("ends with {end}; it must end with the second-to-last entry of down_channels, {last}");
        return refuse("attention.mid_channels", reason);
    }
    embedding("attention.time_emb_dim", attention.time_emb_dim, 2)?;
    within("attention.num_down_layers", attention.num_down_layers, 1, 64)?;
    within("attention.num_mid_layers", attention.num_mid_layers, 1, 64)?;
    within("attention.num_up_layers", attention.num_up_layers, 1, 64)?;
    classes("attention.num_class_embeds", attention.num_class_embeds)
}

fn simple(simple: &SimpleConfig) -> Result<()> {
    num_entries("simple.widths", simple.widths.len(), 2)?;
    for &width in &simple.widths {
        within("simple.widths", width, 1, MAX_CHANNELS)?;
    }
    // A dimension of 2 has a single frequency, whose exponent would be divided by 0.
    embedding("simple.time_emb_dim", simple.time_emb_dim, 4)?;
    classes("simple.num_class_embeds", simple.num_class_embeds)
}

fn double_conv(net: &DoubleConvConfig) -> Result<()> {
    within("double_conv.num_heads", net.num_heads, 1, MAX_CHANNELS)?;
    let why = format!("{} heads", net.num_heads);
    divisible("double_conv.base_channels", net.base_channels, net.num_heads, &why)?;
    within("double_conv.base_channels", net.base_channels, 1, MAX_CHANNELS / 8)?;
    embedding("double_conv.time_emb_dim", net.time_emb_dim, 2)?;
    decay("double_conv.dropout", net.dropout)
}

fn unet2d(net: &Unet2dConfig) -> Result<()> {
    let blocks = net.block_out_channels.len();
    num_entries("unet2d.block_out_channels", blocks, 1)?;
    within("unet2d.layers_per_block", net.layers_per_block, 1, 64)?;
    within("unet2d.norm_num_groups", net.norm_num_groups, 1, MAX_CHANNELS)?;
    let groups = format!("norm_num_groups is {}", net.norm_num_groups);
    for &channels in &net.block_out_channels {
        divisible("unet2d.block_out_channels", channels, net.norm_num_groups, &groups)?;
        if let Some(dim) = net.attention_head_dim {
            within("unet2d.attention_head_dim", dim, 1, MAX_CHANNELS)?;
            divisible("unet2d.block_out_channels", channels, dim, &format!("attention_head_dim is {dim}"))?;
        }
    }
    let first = net.block_out_channels[0];
    embedding("unet2d.block_out_channels", first, 2)?;
    let up = [BlockType::UpBlock2D, BlockType::AttnUpBlock2D];
    let down = [BlockType::DownBlock2D, BlockType::AttnDownBlock2D];
    for (key, types, known) in [
        ("unet2d.down_block_types", &net.down_block_types, down),
        ("unet2d.up_block_types", &net.up_block_types, up),
    ] {
        if types.len() != blocks {
            let reason = format!("has {} entries; give {blocks}, as many as block_out_channels", types.len());
            return refuse(key, reason);
        }
        if let Some(wrong) = types.iter().find(|t| !known.contains(t)) {
            return refuse(
                key,
                format!("{wrong:?} is not allowed here; use {:?} or {:?}", known[0], known[1]),
            );
        }
    }
    if let Some(groups) = net.attn_norm_num_groups {
        within("unet2d.attn_norm_num_groups", groups, 1, MAX_CHANNELS)?;
        let last = net.block_out_channels[blocks - 1];
        if !last.is_multiple_of(groups) {
            let reason = format!("{groups} groups do not divide the {last} channels of the middle block");
            return refuse("unet2d.attn_norm_num_groups", reason);
        }
    }
    if !positive(net.norm_eps, 1.0) {
        let reason = format!("{} is out of range; give a number above 0; 1e-6 is usual", net.norm_eps);
        return refuse("unet2d.norm_eps", reason);
    }
    decay("unet2d.dropout", net.dropout)?;
    within("unet2d.downsample_padding", net.downsample_padding, 0, 1)?;
    within("unet2d.freq_shift", net.freq_shift, 0.0, 1.0)?;
    if first as f64 / 2.0 <= net.freq_shift {
        return refuse(
            "unet2d.freq_shift",
            "is as large as the number of frequencies; use 0, or more block_out_channels",
        );
    }
    within("unet2d.mid_block_scale_factor", net.mid_block_scale_factor, 1e-3, 1e3)?;
    classes("unet2d.num_class_embeds", net.num_class_embeds)
}
