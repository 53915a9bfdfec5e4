//! Converts `scheduler/scheduler_config.json` of `DDPMScheduler` and `DDIMScheduler` to our settings and back.

use std::path::Path;

use serde_json::{Value, json};

use super::{ConfigReader, VERSION};
use crate::Result;
use crate::config::{Config, DiffusionConfig, limits};
use crate::process::Prediction;
use crate::sampler::{Spacing, Threshold, Variance};
use crate::schedule::{Schedule, ScheduleKind, ScheduleOptions};

/// Maximum beta of diffusers' cosine schedule.
const MAX_BETA: f64 = 0.999;
/// Relative tolerance for equal betas, which diffusers keeps in f32.
const SAME_BETA: f64 = 1e-6;
/// Quantile used by dynamic thresholding, in diffusers and here.
const DYNAMIC_RATIO: f64 = 0.995;
/// Value of diffusers' `sample_max_value` that disables the cap on the dynamic threshold, which ours does not have:
/// above any value that a working network produces, and within f32.
const DYNAMIC_MAX: f64 = 1e30;

/// Applies the `scheduler_config.json` at `path` to `config`; returns notes on settings without an equivalent here.
///
/// # Errors
/// [`Error::ConfigFile`] for anything our schedules and samplers do not support, with the key, value and choices.
pub(crate) fn scheduler(path: &Path, json: &Value, config: &mut Config) -> Result<Vec<String>> {
    let (r, mut notes) = (ConfigReader::new(path, json)?, Vec::new());
    let classes = [json!(DDPM), json!(DDIM)];
    let choices = "supported schedulers are DDPMScheduler and DDIMScheduler; to ignore it, import only the folder unet and \
                   give --timesteps, --schedule, --beta-start, --beta-end and --set diffusion.prediction=eps (x0, v)";
    r.allow_only("_class_name", &classes, choices)?;
    let diffusion = &mut config.diffusion;
    diffusion.timesteps = r.integer("num_train_timesteps", 1000)?;
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
            Ok(found) => *diffusion = found,
            Err(nearest) => {
                let choices = format!("{nearest}; give null, or the betas of a supported schedule");
                return r.refuse("trained_betas", betas, &choices);
            }
        }
    }
    diffusion.prediction = r.choice("prediction_type", Prediction::Eps, &PREDICTIONS)?;
    r.allow_only("predict_epsilon", &[json!(true)], "give true")?; // its name before 0.10
    for unused in ["tensor_format", "timestep_values"] {
        r.get(unused);
    }
    let variances = [
        ("fixed_small", Variance::Small),
        ("fixed_large", Variance::Large),
        ("learned_range", Variance::Learned),
    ];
    config.sampling.variance = Some(r.choice("variance_type", Variance::Small, &variances)?);
    // An argument of DDIMScheduler.step that is not stored; pipelines use its default.
    config.sampling.use_clipped_model_output = false;
    config.sampling.threshold = threshold(&r)?;
    let spacing = r.choice("timestep_spacing", Spacing::Uniform, &SPACINGS)?;
    let offset = r.integer("steps_offset", 0)?;
    let to_one = r.flag("set_alpha_to_one", true)?;
    if offset != 0 || !to_one {
        notes.push(format!(
            "steps_offset {offset} and set_alpha_to_one {to_one} shift the timesteps of reduced-step sampling, which ddpm does not \
             support: samples with fewer steps differ slightly"
        ));
    }
    let ddim = r.get("_class_name").is_some_and(|class| class == DDIM);
    config.sampling.sampler = if ddim { "ddim" } else { "ddpm" }.to_owned();
    config.sampling.spacing = Some(spacing);
    config.sampling.steps = None;
    r.finish()?;
    Ok(notes)
}

/// How predicted images are thresholded.
fn threshold(r: &ConfigReader<'_>) -> Result<Threshold> {
    let dynamic = r.flag("thresholding", false)?;
    let (ratio, max_value) =
        (r.number("dynamic_thresholding_ratio", DYNAMIC_RATIO)?, r.number("sample_max_value", 1.0)?);
    if dynamic && ratio != DYNAMIC_RATIO {
        let choices = "give 0.995, the quantile of our dynamic thresholding, or set thresholding to false";
        return r.refuse("dynamic_thresholding_ratio", &json!(ratio), choices);
    }
    // With a maximum of 1 nothing is rescaled, so thresholding is plain clipping.
    if dynamic && max_value != 1.0 && max_value < DYNAMIC_MAX {
        let choices = "with thresholding, give 1.0, which only clips, or 1e30, as our dynamic thresholding has no maximum";
        return r.refuse("sample_max_value", &json!(max_value), choices);
    }
    let clip = r.flag("clip_sample", true)?;
    if clip && !dynamic && r.number("clip_sample_range", 1.0)? != 1.0 {
        let range = r.get("clip_sample_range").unwrap_or(&Value::Null);
        return r.refuse("clip_sample_range", range, "give 1.0, the range of images");
    }
    r.get("clip_sample_range");
    Ok(match (dynamic, clip) {
        (true, _) if max_value >= DYNAMIC_MAX => Threshold::Dynamic,
        (true, _) | (_, true) => Threshold::Clip,
        _ => Threshold::None,
    })
}

/// The settings whose schedule has these betas; the error says where the closest schedule first differs.
fn with_betas(like: &DiffusionConfig, betas: &[f64]) -> Result<DiffusionConfig, String> {
    if betas.is_empty() || betas.len() > limits::TIMESTEPS {
        return Err(format!("it has {} entries, but schedules have 1 to {}", betas.len(), limits::TIMESTEPS));
    }
    let differs = |schedule: &Schedule| {
        // NaN compares as different.
        let same = |(t, beta): (usize, &f64)| (beta / schedule.beta(t) - 1.0).abs() <= SAME_BETA;
        betas.iter().enumerate().position(|entry| !same(entry))
    };
    let mut nearest = (0, String::new());
    let ends = [(like.beta_start, like.beta_end), (betas[0], betas[betas.len() - 1])];
    for schedule in ScheduleKind::ALL {
        for max_beta in [like.max_beta, MAX_BETA, DiffusionConfig::default().max_beta] {
            for (beta_start, beta_end) in ends {
                let timesteps = betas.len();
                let ours =
                    DiffusionConfig { schedule, timesteps, max_beta, beta_start, beta_end, ..like.clone() };
                // Without zero-SNR rescaling, which diffusers applies to trained betas too.
                let plain = DiffusionConfig { zero_terminal_snr: false, ..ours.clone() };
                let Ok(made) = plain.schedule_options().build() else { continue };
                match differs(&made) {
                    None => return Ok(ours),
                    Some(t) if t >= nearest.0 => {
                        let (theirs, ours) = (betas[t], made.beta(t));
                        nearest =
                            (t, format!("entry {t} is {theirs}, where the schedule {schedule} has {ours}"));
                    }
                    Some(_) => {}
                }
            }
        }
    }
    Err(nearest.1)
}

/// diffusers' scheduler for `ddim`.
pub(crate) const DDIM: &str = "DDIMScheduler";
/// diffusers' scheduler for `ddpm`.
const DDPM: &str = "DDPMScheduler";

/// Timestep spacings by their diffusers names.
const SPACINGS: [(&str, Spacing); 3] =
    [("leading", Spacing::Uniform), ("linspace", Spacing::Linspace), ("trailing", Spacing::Trailing)];

/// Prediction types by their diffusers names.
const PREDICTIONS: [(&str, Prediction); 3] =
    [("epsilon", Prediction::Eps), ("sample", Prediction::X0), ("v_prediction", Prediction::V)];

/// The `scheduler/scheduler_config.json` for these settings. Schedules not supported by all diffusers schedulers are
/// written as betas.
pub(crate) fn scheduler_json(config: &Config) -> Result<Value> {
    let (d, s) = (&config.diffusion, &config.sampling);
    let (schedule, known) = match d.schedule {
        ScheduleKind::Linear => ("linear", true),
        ScheduleKind::ScaledLinear | ScheduleKind::Quadratic => ("scaled_linear", true),
        ScheduleKind::Cosine => ("squaredcos_cap_v2", d.max_beta == MAX_BETA),
        // DDPMScheduler has SigmoidBeta, but DDIMScheduler does not.
        ScheduleKind::Sigmoid | ScheduleKind::SigmoidBeta => ("linear", false),
    };
    let betas = if known {
        Value::Null
    } else {
        let plain = ScheduleOptions { zero_terminal_snr: false, ..d.schedule_options() }.build()?;
        (0..plain.timesteps()).map(|t| plain.beta(t)).collect()
    };
    let class = scheduler_class(config);
    // The effective spacing: the sampler's default if none is set.
    let spacing = s.options()?.spacing();
    let spacing =
        SPACINGS.iter().find(|named| class == DDIM && named.1 == spacing || Some(named.1) == s.spacing);
    let mut json = json!({
        "_class_name": class,
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
        "sample_max_value": if s.threshold == Threshold::Dynamic { DYNAMIC_MAX } else { 1.0 },
        "steps_offset": 0,
        "thresholding": s.threshold == Threshold::Dynamic,
        "timestep_spacing": spacing.map_or("leading", |named| named.0),
        "trained_betas": betas,
        "variance_type": match s.variance {
            // diffusers requires it for a network that learns the variance.
            _ if d.learned_variance => "learned_range",
            Some(Variance::Learned) => "learned_range",
            Some(Variance::Small) | None => "fixed_small",
            Some(Variance::Large) => "fixed_large",
        },
    });
    if let Some(keys) = json.as_object_mut().filter(|_| class == DDIM) {
        keys.remove("variance_type");
        keys.insert("set_alpha_to_one".to_owned(), true.into());
    }
    Ok(json)
}

/// The scheduler class that samples most like these settings.
pub(crate) fn scheduler_class(config: &Config) -> &'static str {
    // DDIMScheduler cannot take the output of a network that learns the variance.
    if config.sampling.sampler == "ddim" && !config.diffusion.learned_variance { DDIM } else { DDPM }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_and_sampling_settings_round_trip() {
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
                config.sampling.spacing = Some(Spacing::Uniform);
                config.sampling.use_clipped_model_output = false;
                let json = scheduler_json(&config).unwrap();
                let mut back = Config::default();
                assert_eq!(scheduler(Path::new("s.json"), &json, &mut back).unwrap(), Vec::<String>::new());
                // Compare values, as a schedule can have two names.
                let of = |c: &Config| c.schedule().unwrap();
                assert_eq!(of(&back), of(&config), "{schedule}");
                assert_eq!(back.sampling, config.sampling);
                assert_eq!(back.diffusion.prediction, prediction);
                assert_eq!(scheduler_json(&back).unwrap(), json);
            }
        }
    }

    #[test]
    fn sampler_and_spacing_round_trip() {
        for spacing in [Spacing::Uniform, Spacing::Linspace, Spacing::Trailing] {
            for sampler in ["ddpm", "ddim"] {
                let mut config = Config::default();
                config.sampling.sampler = sampler.to_owned();
                config.sampling.spacing = Some(spacing);
                let json = scheduler_json(&config).unwrap();
                let mut back = Config::default();
                scheduler(Path::new("s.json"), &json, &mut back).unwrap();
                assert_eq!(
                    (back.sampling.sampler, back.sampling.spacing),
                    (sampler.to_owned(), Some(spacing))
                );
            }
        }
        // Unset, it is the sampler's default, or diffusers' default for full-length sampling.
        let mut config = Config::default();
        assert_eq!(scheduler_json(&config).unwrap()["timestep_spacing"], "leading");
        config.sampling.sampler = "ddim".to_owned();
        let json = scheduler_json(&config).unwrap();
        assert_eq!(
            (&json["_class_name"], &json["timestep_spacing"]),
            (&json!("DDIMScheduler"), &json!("trailing"))
        );
        assert!(json.get("variance_type").is_none());
        // DDIMScheduler cannot take the output of such a network.
        config.diffusion.learned_variance = true;
        assert_eq!(scheduler_class(&config), DDPM);
    }

    #[test]
    fn unsupported_scheduler_settings_are_rejected_by_name() {
        for (json, parts) in [
            (
                json!({"_class_name": "PNDMScheduler"}),
                ["PNDMScheduler", "supported schedulers are DDPMScheduler and DDIMScheduler"],
            ),
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
            (
                json!({"trained_betas": [0.1, 0.9, 0.3]}),
                ["trained_betas", "entry 1 is 0.9, where the schedule"],
            ),
            (json!({"num_train_timesteps": "many"}), ["num_train_timesteps: \"many\"", "integer"]),
        ] {
            let error =
                scheduler(Path::new("s.json"), &json, &mut Config::default()).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        // A maximum of 1 means clipping.
        let mut config = Config::default();
        scheduler(Path::new("s.json"), &json!({"thresholding": true, "clip_sample": false}), &mut config)
            .unwrap();
        assert_eq!(config.sampling.threshold, Threshold::Clip);
        let note =
            scheduler(Path::new("s.json"), &json!({"steps_offset": 1}), &mut Config::default()).unwrap();
        assert!(note[0].contains("steps_offset 1"), "{note:?}");
    }
}
