//! Converts `unet/config.json` of `UNet2DModel` to our settings and back.

use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::{ConfigReader, VERSION, as_integer};
use crate::Result;
use crate::config::Size;
use crate::nets::{ActFn, BlockType, ResampleKind, TimeScaleShift, Unet2dConfig};

/// The supported network class.
const UNET: &str = "UNet2DModel";

/// The default settings of `UNet2DModel`.
pub(crate) fn defaults() -> Unet2dConfig {
    use BlockType::{
        AttnDownBlock2D as AttnDown, AttnUpBlock2D as AttnUp, DownBlock2D as Down, UpBlock2D as Up,
    };
    Unet2dConfig {
        block_out_channels: vec![224, 448, 672, 896],
        down_block_types: vec![Down, AttnDown, AttnDown, AttnDown],
        up_block_types: vec![AttnUp, AttnUp, AttnUp, Up],
        attention_head_dim: Some(8),
        norm_eps: 1e-5,
        downsample_padding: 1,
        flip_sin_to_cos: true,
        freq_shift: 0.0,
        ..Unet2dConfig::default()
    }
}
/// Parses a block type, also in the naming of early diffusers versions.
fn block(value: &Value) -> Option<BlockType> {
    let name = value.as_str()?;
    Some(match name.strip_prefix("UNetRes").unwrap_or(name) {
        "DownBlock2D" => BlockType::DownBlock2D,
        "AttnDownBlock2D" => BlockType::AttnDownBlock2D,
        "UpBlock2D" => BlockType::UpBlock2D,
        "AttnUpBlock2D" => BlockType::AttnUpBlock2D,
        _ => return None,
    })
}

/// A network's settings, image channels and, if recorded, image size.
pub(crate) struct Unet {
    pub config: Unet2dConfig,
    pub channels: usize,
    /// Whether it has twice the output channels, to predict the variance.
    pub learned_variance: bool,
    pub size: Option<Size>,
}

/// Whether a `config.json` describes a network that [`unet`] supports.
pub(crate) fn is_unet(json: &Value) -> bool {
    json.get("_class_name").is_some_and(|class| class == UNET)
}

/// Reads the `config.json` at `path`.
///
/// # Errors
/// [`Error::ConfigFile`] for anything our network does not support, with the key, value and choices.
pub(crate) fn unet(path: &Path, json: &Value) -> Result<Unet> {
    let r = ConfigReader::new(path, json)?;
    if let Some(class) = r.get("_class_name")
        && class != UNET
    {
        return r.refuse("_class_name", class, "the supported network is UNet2DModel");
    }
    let size = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([h, w]) => Some(Some(Size { height: as_integer(h)?, width: as_integer(w)? })),
        _ => as_integer(value).map(|side| Some(Size { height: side, width: side })),
    };
    let size = r.get_or("sample_size", None, "give a side or [height, width]", size)?;
    let channels = r.integer("in_channels", 3)?;
    let out = r.integer("out_channels", 3)?;
    let twice = channels.saturating_mul(2);
    if out != channels && out != twice {
        let choices =
            format!("give {channels}, equal to in_channels, or {twice} if the network learns the variance");
        return r.refuse("out_channels", &json!(out), &choices);
    }
    r.allow_only("time_embedding_type", &[json!("positional")], "give \"positional\"")?;
    if matches!(r.keys.get("mid_block_type"), Some(Value::Null)) {
        return r.refuse("mid_block_type", &Value::Null, "give \"UNetMidBlock2D\"");
    }
    r.allow_only("mid_block_type", &[json!("UNetMidBlock2D")], "give \"UNetMidBlock2D\"")?;
    r.allow_only("class_embed_type", &[], "give null: integer classes are embedded with num_class_embeds")?;
    r.get("num_train_timesteps"); // only used by learned timestep embeddings
    // Bookkeeping of EMAModel, stored among the network's settings.
    for unused in [
        "decay",
        "min_decay",
        "optimization_step",
        "update_after_step",
        "use_ema_warmup",
        "inv_gamma",
        "power",
    ] {
        r.get(unused);
    }
    let config = unet_settings(&r)?;
    let dim = config.block_out_channels.first().map_or(0, |c| c.saturating_mul(4));
    if let Some(value) = r.get("time_embedding_dim")
        && as_integer(value) != Some(dim)
    {
        return r.refuse(
            "time_embedding_dim",
            value,
            &format!("give {dim}, four times the first of block_out_channels"),
        );
    }
    r.finish()?;
    Ok(Unet { config, channels, learned_variance: out != channels, size })
}

/// The settings of the network.
fn unet_settings(r: &ConfigReader<'_>) -> Result<Unet2dConfig> {
    let d = defaults();
    let downs = "supported blocks are DownBlock2D and AttnDownBlock2D";
    let ups = "supported blocks are UpBlock2D and AttnUpBlock2D";
    let resample = [("conv", ResampleKind::Conv), ("resnet", ResampleKind::Resnet)];
    let acts = [
        ("silu", ActFn::Silu),
        ("swish", ActFn::Silu),
        ("relu", ActFn::Relu),
        ("gelu", ActFn::Gelu),
        ("mish", ActFn::Mish),
    ];
    let shifts = [("default", TimeScaleShift::Default), ("scale_shift", TimeScaleShift::ScaleShift)];
    // Null means one head; a missing key means eight channels per head.
    let head_dim = match r.keys.get("attention_head_dim") {
        Some(Value::Null) => None,
        _ => Some(r.integer("attention_head_dim", 8)?),
    };
    Ok(Unet2dConfig {
        layers_per_block: r.integer("layers_per_block", d.layers_per_block)?,
        block_out_channels: r.list(
            "block_out_channels",
            d.block_out_channels,
            "give a list of channels",
            as_integer,
        )?,
        down_block_types: r.list("down_block_types", d.down_block_types, downs, block)?,
        up_block_types: r.list("up_block_types", d.up_block_types, ups, block)?,
        attention_head_dim: head_dim,
        add_attention: r.flag("add_attention", d.add_attention)?,
        norm_num_groups: r.integer("norm_num_groups", d.norm_num_groups)?,
        attn_norm_num_groups: r
            .get_or("attn_norm_num_groups", None, "give an integer or null", |v| as_integer(v).map(Some))?,
        norm_eps: r.number("norm_eps", d.norm_eps)?,
        act_fn: r.choice("act_fn", d.act_fn, &acts)?,
        dropout: r.number("dropout", d.dropout)?,
        downsample_padding: r.integer("downsample_padding", d.downsample_padding)?,
        downsample_type: r.choice("downsample_type", d.downsample_type, &resample)?,
        upsample_type: r.choice("upsample_type", d.upsample_type, &resample)?,
        flip_sin_to_cos: r.flag("flip_sin_to_cos", d.flip_sin_to_cos)?,
        freq_shift: r.number("freq_shift", d.freq_shift)?,
        center_input_sample: r.flag("center_input_sample", d.center_input_sample)?,
        mid_block_scale_factor: r.number("mid_block_scale_factor", d.mid_block_scale_factor)?,
        resnet_time_scale_shift: r.choice("resnet_time_scale_shift", d.resnet_time_scale_shift, &shifts)?,
        num_class_embeds: r
            .get_or("num_class_embeds", None, "give an integer or null", |v| as_integer(v).map(Some))?,
    })
}

/// The `unet/config.json` of a network.
pub(crate) fn unet_json(config: &Unet2dConfig, channels: usize, learned_variance: bool, size: Size) -> Value {
    let side = if size.height == size.width { json!(size.height) } else { json!([size.height, size.width]) };
    // Written as an integer if it is one, as diffusers does.
    let shift = if config.freq_shift.fract() == 0.0 {
        json!(config.freq_shift as u64)
    } else {
        json!(config.freq_shift)
    };
    json!({
        "_class_name": UNET,
        "_diffusers_version": VERSION,
        "act_fn": value(&config.act_fn),
        "add_attention": config.add_attention,
        "attention_head_dim": config.attention_head_dim,
        "attn_norm_num_groups": config.attn_norm_num_groups,
        "block_out_channels": config.block_out_channels,
        "center_input_sample": config.center_input_sample,
        "class_embed_type": null,
        "down_block_types": value(&config.down_block_types),
        "downsample_padding": config.downsample_padding,
        "downsample_type": value(&config.downsample_type),
        "dropout": config.dropout,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": shift,
        "in_channels": channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": config.mid_block_scale_factor,
        "mid_block_type": "UNetMidBlock2D",
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "num_class_embeds": config.num_class_embeds,
        "num_train_timesteps": null,
        "out_channels": if learned_variance { 2 * channels } else { channels },
        "resnet_time_scale_shift": value(&config.resnet_time_scale_shift),
        "sample_size": side,
        "time_embedding_dim": null,
        "time_embedding_type": "positional",
        "up_block_types": value(&config.up_block_types),
        "upsample_type": value(&config.upsample_type),
    })
}

/// A setting's serialised name; serialising these types cannot fail.
fn value(setting: &impl Serialize) -> Value {
    serde_json::to_value(setting).unwrap_or_default()
}
#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: Value) -> String {
        unet(Path::new("config.json"), &json).err().expect("a refusal").to_string()
    }

    #[test]
    fn unsupported_settings_are_rejected_with_key_value_and_choices() {
        for (json, parts) in [
            (json!({"class_embed_type": "timestep"}), ["class_embed_type: \"timestep\"", "num_class_embeds"]),
            (json!({"class_embed_type": "identity"}), ["class_embed_type: \"identity\"", "null"]),
            (json!({"time_embedding_type": "fourier"}), ["time_embedding_type: \"fourier\"", "positional"]),
            (json!({"out_channels": 5}), ["out_channels: 5", "give 3, equal to in_channels, or 6"]),
            (json!({"down_block_types": ["SkipDownBlock2D"]}), ["SkipDownBlock2D", "AttnDownBlock2D"]),
            (json!({"mid_block_type": null}), ["mid_block_type: null", "UNetMidBlock2D"]),
            (json!({"act_fn": "elu"}), ["act_fn: \"elu\"", "silu, swish, relu, gelu, mish"]),
            (json!({"time_embedding_dim": 100}), ["time_embedding_dim: 100", "896"]),
            (
                json!({"_class_name": "UNet2DConditionModel"}),
                ["UNet2DConditionModel", "supported network is UNet2DModel"],
            ),
            (json!({"cross_attention_dim": 768}), ["cross_attention_dim: 768", "unknown setting"]),
            (json!({"layers_per_block": -1}), ["layers_per_block: -1", "integer"]),
            (json!([]), ["config.json: ", "not a JSON object"]),
        ] {
            let message = refused(json);
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn network_settings_round_trip() {
        for (config, channels, size) in [
            (defaults(), 3, Size { height: 32, width: 32 }),
            (Unet2dConfig::default(), 1, Size { height: 16, width: 24 }),
            (
                Unet2dConfig {
                    attention_head_dim: None,
                    num_class_embeds: Some(10),
                    attn_norm_num_groups: Some(4),
                    resnet_time_scale_shift: TimeScaleShift::ScaleShift,
                    downsample_type: ResampleKind::Resnet,
                    act_fn: ActFn::Mish,
                    dropout: 0.1,
                    freq_shift: 0.5,
                    ..defaults()
                },
                4,
                Size { height: 8, width: 8 },
            ),
        ] {
            for learned in [false, true] {
                let json = unet_json(&config, channels, learned, size);
                let back = unet(Path::new("config.json"), &json).unwrap();
                assert_eq!((back.channels, back.learned_variance), (channels, learned));
                assert_eq!((back.config, back.size), (config.clone(), Some(size)));
            }
        }
        // Block names of early diffusers versions.
        let old = json!({"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]});
        let old = unet(Path::new("config.json"), &old).unwrap().config;
        assert_eq!(old.down_block_types, [BlockType::DownBlock2D, BlockType::AttnDownBlock2D]);
    }
}
