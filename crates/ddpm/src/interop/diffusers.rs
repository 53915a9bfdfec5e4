//! The settings of diffusers' unconditional pipelines, as ours and back: `unet/config.json` of `UNet2DModel`,
//! `scheduler/scheduler_config.json` of `DDPMScheduler` and `DDIMScheduler`, `model_index.json`.

use std::cell::RefCell;
use std::collections::HashSet;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::process::Prediction;
use crate::sampler::{Threshold, Variance};
use crate::schedule::Schedule;
use crate::train::config::{
    ActFn, BlockType, Config, DiffusionConfig, ResampleKind, ScheduleKind, Size, TimeScaleShift, Unet2dConfig,
};
use crate::train::disk;
use crate::{Error, Result};

/// Largest file of settings that is read, in bytes; one may list all variances.
const MAX_FILE: u64 = 4 << 20;
/// The largest variance of a step in diffusers' cosine schedule.
const MAX_BETA: f64 = 0.999;
/// Relative difference of variances, which diffusers keeps in f32, that counts as none.
const SAME_BETA: f64 = 1e-6;
/// The part of a picture's numbers that dynamic thresholding leaves in their range, there and here.
const DYNAMIC_RATIO: f64 = 0.995;
/// The most that diffusers divides a picture by, where ours knows no most: past every picture of a network that has not gone
/// wrong, and a float.
const DYNAMIC_MOST: f64 = 1e30;
/// Its class of networks that we have.
const UNET: &str = "UNet2DModel";
/// The version of diffusers whose files these are.
const VERSION: &str = "0.42.1";

/// The settings of `UNet2DModel()`.
pub(super) fn defaults() -> Unet2dConfig {
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

/// One of diffusers' files of settings, being read: every key must be asked for.
struct Reader<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
    asked: RefCell<HashSet<&'static str>>,
}

/// A value for a message.
fn shown(value: &Value) -> String {
    let text: String = value.to_string().chars().take(100).collect();
    text
}

impl<'a> Reader<'a> {
    fn new(path: &'a Path, json: &'a Value) -> Result<Self> {
        match json.as_object() {
            Some(keys) => Ok(Self { path, keys, asked: RefCell::default() }),
            None => Err(wrong(path, "is no object with settings in it".into())),
        }
    }

    fn refuse<T>(&self, key: &str, value: &Value, choices: &str) -> Result<T> {
        Err(wrong(self.path, format!("{key}: {} is not supported; {choices}", shown(value))))
    }

    /// The value of a key; `None` if it is not given, or given as nothing.
    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key);
        self.keys.get(key).filter(|v| !v.is_null())
    }

    fn or<T>(
        &self,
        key: &'static str,
        default: T,
        what: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => read(value).map_or_else(|| self.refuse(key, value, what), Ok),
        }
    }

    fn whole(&self, key: &'static str, default: usize) -> Result<usize> {
        self.or(key, default, "give a whole number", whole)
    }

    fn number(&self, key: &'static str, default: f64) -> Result<f64> {
        self.or(key, default, "give a number", Value::as_f64)
    }

    fn flag(&self, key: &'static str, default: bool) -> Result<bool> {
        self.or(key, default, "give true or false", Value::as_bool)
    }

    fn choice<T: Copy>(&self, key: &'static str, default: T, choices: &[(&str, T)]) -> Result<T> {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        let one = |value: &Value| choices.iter().find(|(name, _)| value.as_str() == Some(name)).map(|c| c.1);
        self.or(key, default, &format!("give one of {}", names.join(", ")), one)
    }

    fn list<T>(
        &self,
        key: &'static str,
        default: Vec<T>,
        what: &str,
        one: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>> {
        self.or(key, default, what, |value| value.as_array()?.iter().map(&one).collect())
    }

    /// Refuses a key that says other than `only`, where it says something.
    fn only(&self, key: &'static str, only: &[Value], choices: &str) -> Result<()> {
        match self.get(key) {
            Some(value) if !only.contains(value) => self.refuse(key, value, choices),
            _ => Ok(()),
        }
    }

    /// Refuses what nobody has asked for.
    fn finish(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let unknown = |(key, value): &(&String, &Value)| {
            !key.starts_with('_') && !value.is_null() && !asked.contains(key.as_str())
        };
        match self.keys.iter().find(unknown) {
            None => Ok(()),
            Some((key, value)) => {
                let key: String = key.chars().take(100).collect();
                self.refuse(
                    &key,
                    value,
                    "no setting of this name is known; take it out if it changes nothing",
                )
            }
        }
    }
}

fn whole(value: &Value) -> Option<usize> {
    // Some tools write 2.0 for 2.
    let float = value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..9e15).contains(f)).map(|f| f as u64);
    usize::try_from(value.as_u64().or(float)?).ok()
}

fn wrong(path: &Path, reason: String) -> Error {
    Error::ConfigFile { path: path.to_owned(), reason }
}

/// Reads one of diffusers' files of settings.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = disk::read(path, "read the settings", MAX_FILE)?;
    parse_json(path, &bytes)
}

/// The JSON of the file `path`.
pub(super) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|e| wrong(path, format!("is no JSON: {e}")))
}

/// A block's type by its name, of today or of diffusers' first versions.
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

/// A network's settings, the channels of its pictures and their size, where it says one.
pub(super) struct Unet {
    pub config: Unet2dConfig,
    pub channels: usize,
    /// Whether it has as many channels more, for the variance.
    pub learned_variance: bool,
    pub size: Option<Size>,
}

/// Whether a `config.json` says that it is of a network that [`unet`] reads.
pub(super) fn is_unet(json: &Value) -> bool {
    json.get("_class_name").is_some_and(|class| class == UNET)
}

/// The network that the `config.json` at `path` describes.
///
/// # Errors
/// [`Error::ConfigFile`] for anything that our network has not, by its key and value, with the choices.
pub(super) fn unet(path: &Path, json: &Value) -> Result<Unet> {
    let r = Reader::new(path, json)?;
    if let Some(class) = r.get("_class_name")
        && class != UNET
    {
        return r.refuse("_class_name", class, "the networks UNet2DModel are read");
    }
    let d = defaults();
    let size = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([h, w]) => Some(Some(Size { height: whole(h)?, width: whole(w)? })),
        _ => whole(value).map(|side| Some(Size { height: side, width: side })),
    };
    let size = r.or("sample_size", None, "give a side or [height, width]", size)?;
    let channels = r.whole("in_channels", 3)?;
    let out = r.whole("out_channels", 3)?;
    let twice = channels.saturating_mul(2);
    if out != channels && out != twice {
        let choices =
            format!("give {channels}, as many as in_channels, or {twice}, where it learns the variance too");
        return r.refuse("out_channels", &json!(out), &choices);
    }
    let downs = "its blocks may be DownBlock2D, AttnDownBlock2D";
    let ups = "its blocks may be UpBlock2D, AttnUpBlock2D";
    let resample = [("conv", ResampleKind::Conv), ("resnet", ResampleKind::Resnet)];
    let acts = [
        ("silu", ActFn::Silu),
        ("swish", ActFn::Silu),
        ("relu", ActFn::Relu),
        ("gelu", ActFn::Gelu),
        ("mish", ActFn::Mish),
    ];
    let shifts = [("default", TimeScaleShift::Default), ("scale_shift", TimeScaleShift::ScaleShift)];
    // Given as nothing means one head; not given at all, eight channels each.
    let head_dim = match r.keys.get("attention_head_dim") {
        Some(Value::Null) => None,
        _ => Some(r.whole("attention_head_dim", 8)?),
    };
    r.only("time_embedding_type", &[json!("positional")], "give \"positional\"")?;
    if matches!(r.keys.get("mid_block_type"), Some(Value::Null)) {
        return r.refuse("mid_block_type", &Value::Null, "give \"UNetMidBlock2D\"");
    }
    r.only("mid_block_type", &[json!("UNetMidBlock2D")], "give \"UNetMidBlock2D\"")?;
    r.only("class_embed_type", &[], "give null: classes are embedded by num_class_embeds, of whole numbers")?;
    r.get("num_train_timesteps"); // of learned embeddings of the timestep
    // What an average of weights notes of itself beside the network's settings.
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
    let config = Unet2dConfig {
        layers_per_block: r.whole("layers_per_block", d.layers_per_block)?,
        block_out_channels: r.list(
            "block_out_channels",
            d.block_out_channels,
            "give a list of channels",
            whole,
        )?,
        down_block_types: r.list("down_block_types", d.down_block_types, downs, block)?,
        up_block_types: r.list("up_block_types", d.up_block_types, ups, block)?,
        attention_head_dim: head_dim,
        add_attention: r.flag("add_attention", d.add_attention)?,
        norm_num_groups: r.whole("norm_num_groups", d.norm_num_groups)?,
        attn_norm_num_groups: r
            .or("attn_norm_num_groups", None, "give a whole number or null", |v| whole(v).map(Some))?,
        norm_eps: r.number("norm_eps", d.norm_eps)?,
        act_fn: r.choice("act_fn", d.act_fn, &acts)?,
        dropout: r.number("dropout", d.dropout)?,
        downsample_padding: r.whole("downsample_padding", d.downsample_padding)?,
        downsample_type: r.choice("downsample_type", d.downsample_type, &resample)?,
        upsample_type: r.choice("upsample_type", d.upsample_type, &resample)?,
        flip_sin_to_cos: r.flag("flip_sin_to_cos", d.flip_sin_to_cos)?,
        freq_shift: r.number("freq_shift", d.freq_shift)?,
        center_input_sample: r.flag("center_input_sample", d.center_input_sample)?,
        mid_block_scale_factor: r.number("mid_block_scale_factor", d.mid_block_scale_factor)?,
        resnet_time_scale_shift: r.choice("resnet_time_scale_shift", d.resnet_time_scale_shift, &shifts)?,
        num_class_embeds: r
            .or("num_class_embeds", None, "give a whole number or null", |v| whole(v).map(Some))?,
    };
    let dim = config.block_out_channels.first().map_or(0, |c| c.saturating_mul(4));
    if let Some(value) = r.get("time_embedding_dim")
        && whole(value) != Some(dim)
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

/// `unet/config.json` of a network.
pub(super) fn unet_json(config: &Unet2dConfig, channels: usize, learned_variance: bool, size: Size) -> Value {
    let side = if size.height == size.width { json!(size.height) } else { json!([size.height, size.width]) };
    // Whole, as the class has it.
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

/// A setting by the name that files have; none of them can fail to be written.
fn value(setting: &impl Serialize) -> Value {
    serde_json::to_value(setting).unwrap_or_default()
}

/// Puts what the `scheduler_config.json` at `path` says into `config`; gives what has no meaning here.
///
/// # Errors
/// [`Error::ConfigFile`] for anything that our schedules and samplers have not, by its key and value, with the choices.
pub(super) fn scheduler(path: &Path, json: &Value, config: &mut Config) -> Result<Vec<String>> {
    let (r, mut notes) = (Reader::new(path, json)?, Vec::new());
    let classes = [json!("DDPMScheduler"), json!("DDIMScheduler")];
    let way_out = "the schedulers DDPMScheduler and DDIMScheduler are read; to leave it out, import the folder unet alone \
                   and give --timesteps, --schedule, --beta-start, --beta-end and --set diffusion.prediction=eps (x0, v)";
    r.only("_class_name", &classes, way_out)?;
    let diffusion = &mut config.diffusion;
    diffusion.timesteps = r.whole("num_train_timesteps", 1000)?;
    diffusion.beta_start = r.number("beta_start", 1e-4)?;
    diffusion.beta_end = r.number("beta_end", 0.02)?;
    diffusion.zero_terminal_snr = r.flag("rescale_betas_zero_snr", false)?;
    let schedules = [
        ("linear", ScheduleKind::Linear),
        ("scaled_linear", ScheduleKind::ScaledLinear),
        ("squaredcos_cap_v2", ScheduleKind::Cosine),
        ("sigmoid", ScheduleKind::SigmoidBeta),
    ];
    diffusion.schedule = r.choice("beta_schedule", ScheduleKind::Linear, &schedules)?;
    if diffusion.schedule == ScheduleKind::Cosine {
        diffusion.max_beta = MAX_BETA;
    }
    if let Some(betas) = r.get("trained_betas") {
        let given: Vec<f64> = r.list("trained_betas", Vec::new(), "give a list of numbers", Value::as_f64)?;
        match with_betas(diffusion, &given) {
            Some(found) => *diffusion = found,
            None => {
                return r.refuse(
                    "trained_betas",
                    betas,
                    "they are none of our schedules; give null, or those of one",
                );
            }
        }
    }
    diffusion.prediction = r.choice("prediction_type", Prediction::Eps, &PREDICTIONS)?;
    r.only("predict_epsilon", &[json!(true)], "give true")?; // its name before 0.10
    let dynamic = r.flag("thresholding", false)?;
    let (ratio, most) =
        (r.number("dynamic_thresholding_ratio", DYNAMIC_RATIO)?, r.number("sample_max_value", 1.0)?);
    if dynamic && ratio != DYNAMIC_RATIO {
        let choices = "give 0.995, the part that our dynamic thresholding keeps, or thresholding false";
        return r.refuse("dynamic_thresholding_ratio", &json!(ratio), choices);
    }
    // At 1 nothing is divided by more than 1, which is clipping.
    if dynamic && most != 1.0 && most < DYNAMIC_MOST {
        let choices = "with thresholding, give 1.0, which only clips, or 1e30, for our dynamic thresholding knows no most";
        return r.refuse("sample_max_value", &json!(most), choices);
    }
    for unused in ["tensor_format", "timestep_values"] {
        r.get(unused);
    }
    let variances = [
        ("fixed_small", Variance::Small),
        ("fixed_large", Variance::Large),
        ("learned_range", Variance::Learned),
    ];
    config.sampling.variance = Some(r.choice("variance_type", Variance::Small, &variances)?);
    let clip = r.flag("clip_sample", true)?;
    if clip && !dynamic && r.number("clip_sample_range", 1.0)? != 1.0 {
        let range = r.get("clip_sample_range").unwrap_or(&Value::Null);
        return r.refuse("clip_sample_range", range, "give 1.0, where pictures end");
    }
    r.get("clip_sample_range");
    // An argument of DDIMScheduler.step that no file holds; pipelines leave it at its default.
    config.sampling.use_clipped_model_output = false;
    config.sampling.threshold = match (dynamic, clip) {
        (true, _) if most >= DYNAMIC_MOST => Threshold::Dynamic,
        (true, _) | (_, true) => Threshold::Clip,
        _ => Threshold::None,
    };
    let spacings = [("leading", "leading"), ("linspace", "linspace"), ("trailing", "trailing")];
    let spacing = r.choice("timestep_spacing", "leading", &spacings)?;
    let offset = r.whole("steps_offset", 0)?;
    let to_one = r.flag("set_alpha_to_one", true)?;
    if spacing != "leading" || offset != 0 || !to_one {
        notes.push(format!(
            "timestep_spacing {spacing}, steps_offset {offset}, set_alpha_to_one {to_one} say which timesteps fewer steps \
             visit; `ddpm sample` has its own way to say it"
        ));
    }
    r.finish()?;
    Ok(notes)
}

/// The settings whose schedule has these variances.
fn with_betas(like: &DiffusionConfig, betas: &[f64]) -> Option<DiffusionConfig> {
    let same = |schedule: &Schedule| {
        schedule.timesteps() == betas.len()
            && betas.iter().enumerate().all(|(t, b)| (b / schedule.beta(t) - 1.0).abs() <= SAME_BETA)
    };
    if betas.is_empty() || betas.len() > 1_000_000 {
        return None;
    }
    let ends = [(like.beta_start, like.beta_end), (betas[0], betas[betas.len() - 1])];
    for schedule in ScheduleKind::ALL {
        for max_beta in [like.max_beta, MAX_BETA, DiffusionConfig::default().max_beta] {
            for (beta_start, beta_end) in ends {
                let timesteps = betas.len();
                let ours =
                    DiffusionConfig { schedule, timesteps, max_beta, beta_start, beta_end, ..like.clone() };
                // Without the stretching, which diffusers applies to these too.
                let plain = DiffusionConfig { zero_terminal_snr: false, ..ours.clone() };
                if Schedule::from_config(&plain).is_ok_and(|s| same(&s)) {
                    return Some(ours);
                }
            }
        }
    }
    None
}

/// What networks predict, by diffusers' names.
const PREDICTIONS: [(&str, Prediction); 3] =
    [("epsilon", Prediction::Eps), ("sample", Prediction::X0), ("v_prediction", Prediction::V)];

/// `scheduler/scheduler_config.json` of these settings. Schedules that not all of diffusers has are given by their variances.
pub(super) fn scheduler_json(config: &Config) -> Result<Value> {
    let (d, s) = (&config.diffusion, &config.sampling);
    let (schedule, known) = match d.schedule {
        ScheduleKind::Linear => ("linear", true),
        ScheduleKind::ScaledLinear | ScheduleKind::Quadratic => ("scaled_linear", true),
        ScheduleKind::Cosine => ("squaredcos_cap_v2", d.max_beta == MAX_BETA),
        // DDPMScheduler has the latter, and DDIMScheduler has not.
        ScheduleKind::Sigmoid | ScheduleKind::SigmoidBeta => ("linear", false),
    };
    let betas = match known {
        true => Value::Null,
        false => {
            let plain = Schedule::from_config(&DiffusionConfig { zero_terminal_snr: false, ..d.clone() })?;
            (0..plain.timesteps()).map(|t| plain.beta(t)).collect()
        }
    };
    Ok(json!({
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "beta_end": d.beta_end,
        "beta_schedule": schedule,
        "beta_start": d.beta_start,
        "clip_sample": s.threshold == Threshold::Clip,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": DYNAMIC_RATIO,
        "num_train_timesteps": d.timesteps,
        "prediction_type": PREDICTIONS.iter().find(|p| p.1 == d.prediction).map(|p| p.0),
        "rescale_betas_zero_snr": d.zero_terminal_snr,
        "sample_max_value": if s.threshold == Threshold::Dynamic { DYNAMIC_MOST } else { 1.0 },
        "steps_offset": 0,
        "thresholding": s.threshold == Threshold::Dynamic,
        "timestep_spacing": "leading",
        "trained_betas": betas,
        "variance_type": match s.variance {
            // Any other cannot take that network's output there.
            _ if d.learned_variance => "learned_range",
            Some(Variance::Learned) => "learned_range",
            Some(Variance::Small) | None => "fixed_small",
            Some(Variance::Large) => "fixed_large",
        },
    }))
}

/// Checks that the `model_index.json` at `path` is of an unconditional pipeline.
///
/// # Errors
/// [`Error::ConfigFile`] for any other, by its name.
pub(super) fn pipeline(path: &Path, json: &Value) -> Result<()> {
    let r = Reader::new(path, json)?;
    let known = [json!("DDPMPipeline"), json!("DDIMPipeline")];
    r.only(
        "_class_name",
        &known,
        "the pipelines DDPMPipeline and DDIMPipeline are read; or give the folder of its UNet2DModel",
    )
}

/// `model_index.json`.
pub(super) fn index_json() -> Value {
    json!({
        "_class_name": "DDPMPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: Value) -> String {
        unet(Path::new("config.json"), &json).err().expect("a refusal").to_string()
    }

    #[test]
    fn what_the_network_has_not_is_refused_by_its_key_and_value_with_the_choices() {
        for (json, parts) in [
            (json!({"class_embed_type": "timestep"}), ["class_embed_type: \"timestep\"", "num_class_embeds"]),
            (json!({"class_embed_type": "identity"}), ["class_embed_type: \"identity\"", "null"]),
            (json!({"time_embedding_type": "fourier"}), ["time_embedding_type: \"fourier\"", "positional"]),
            (json!({"out_channels": 5}), ["out_channels: 5", "give 3, as many as in_channels, or 6"]),
            (json!({"down_block_types": ["SkipDownBlock2D"]}), ["SkipDownBlock2D", "AttnDownBlock2D"]),
            (json!({"mid_block_type": null}), ["mid_block_type: null", "UNetMidBlock2D"]),
            (json!({"act_fn": "elu"}), ["act_fn: \"elu\"", "silu, swish, relu, gelu, mish"]),
            (json!({"time_embedding_dim": 100}), ["time_embedding_dim: 100", "896"]),
            (
                json!({"_class_name": "UNet2DConditionModel"}),
                ["UNet2DConditionModel", "UNet2DModel are read"],
            ),
            (json!({"cross_attention_dim": 768}), ["cross_attention_dim: 768", "no setting of this name"]),
            (json!({"layers_per_block": -1}), ["layers_per_block: -1", "whole number"]),
            (json!([]), ["config.json: ", "no object"]),
        ] {
            let message = refused(json);
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn settings_of_the_network_go_there_and_back() {
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
        // The first versions of diffusers named blocks otherwise.
        let old = json!({"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]});
        let old = unet(Path::new("config.json"), &old).unwrap().config;
        assert_eq!(old.down_block_types, [BlockType::DownBlock2D, BlockType::AttnDownBlock2D]);
    }

    #[test]
    fn every_schedule_and_sampling_setting_goes_there_and_back() {
        for schedule in ScheduleKind::ALL {
            for (zero_terminal_snr, max_beta, threshold, variance, prediction) in [
                (false, 0.9999, Threshold::Clip, Variance::Small, Prediction::V),
                (true, 0.999, Threshold::None, Variance::Large, Prediction::X0),
                (false, 0.999, Threshold::Dynamic, Variance::Large, Prediction::Eps),
                (false, 0.999, Threshold::Clip, Variance::Learned, Prediction::Eps),
            ] {
                let mut config = Config::default();
                config.diffusion = DiffusionConfig {
                    timesteps: 60,
                    schedule,
                    zero_terminal_snr,
                    max_beta,
                    prediction,
                    ..config.diffusion
                };
                (config.sampling.threshold, config.sampling.variance) = (threshold, Some(variance));
                config.sampling.use_clipped_model_output = false;
                let json = scheduler_json(&config).unwrap();
                let mut back = Config::default();
                assert_eq!(scheduler(Path::new("s.json"), &json, &mut back).unwrap(), Vec::<String>::new());
                // The same numbers; a schedule may have two names.
                let of = |c: &Config| Schedule::from_config(&c.diffusion).unwrap();
                assert_eq!(of(&back), of(&config), "{schedule}");
                assert_eq!(back.sampling, config.sampling);
                assert_eq!(back.diffusion.prediction, prediction);
                assert_eq!(scheduler_json(&back).unwrap(), json);
            }
        }
    }

    #[test]
    fn schedulers_that_are_not_ours_are_refused_by_name() {
        for (json, parts) in [
            (json!({"_class_name": "PNDMScheduler"}), ["PNDMScheduler", "DDIMScheduler are read"]),
            (json!({"beta_schedule": "laplace"}), ["beta_schedule: \"laplace\"", "squaredcos_cap_v2"]),
            (
                json!({"prediction_type": "flow_prediction"}),
                ["flow_prediction", "epsilon, sample, v_prediction"],
            ),
            (json!({"variance_type": "learned"}), ["\"learned\"", "fixed_small, fixed_large, learned_range"]),
            (json!({"thresholding": true, "sample_max_value": 1.5}), ["sample_max_value: 1.5", "1e30"]),
            (
                json!({"thresholding": true, "dynamic_thresholding_ratio": 0.9}),
                ["dynamic_thresholding_ratio: 0.9", "0.995"],
            ),
            (json!({"trained_betas": [0.1, 0.9, 0.3]}), ["trained_betas", "none of our schedules"]),
            (json!({"num_train_timesteps": "many"}), ["num_train_timesteps: \"many\"", "whole number"]),
        ] {
            let error =
                scheduler(Path::new("s.json"), &json, &mut Config::default()).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        // Divided by no more than 1, pictures are clipped.
        let mut config = Config::default();
        scheduler(Path::new("s.json"), &json!({"thresholding": true, "clip_sample": false}), &mut config)
            .unwrap();
        assert_eq!(config.sampling.threshold, Threshold::Clip);
        let note =
            scheduler(Path::new("s.json"), &json!({"steps_offset": 1}), &mut Config::default()).unwrap();
        assert!(note[0].contains("steps_offset 1"), "{note:?}");
    }
}
