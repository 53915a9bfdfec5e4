//! `scheduler/scheduler_config.json` of `DDPMScheduler` and `DDIMScheduler`, as our settings and back.

use std::path::Path;

use serde_json::{Value, json};

use super::{Reader, VERSION};
use crate::Result;
use crate::process::Prediction;
use crate::sampler::{Options, Spacing, Threshold, Variance};
use crate::schedule::Schedule;
use crate::train::config::{Config, DiffusionConfig, ScheduleKind, limits};

/// The largest variance of a step in diffusers' cosine schedule.
const MAX_BETA: f64 = 0.999;
/// Relative difference of variances, which diffusers keeps in f32, that counts as none.
const SAME_BETA: f64 = 1e-6;
/// The part of an image's elements that dynamic thresholding leaves in their range, there and here.
const DYNAMIC_RATIO: f64 = 0.995;
/// The most that diffusers divides an image by, where ours knows no most: past every image of a network that has not gone
/// wrong, and a float.
const DYNAMIC_MOST: f64 = 1e30;

/// Puts what the `scheduler_config.json` at `path` says into `config`; gives what has no meaning here.
///
/// # Errors
/// [`Error::ConfigFile`] for anything that our schedules and samplers have not, by its key and value, with the choices.
pub(crate) fn scheduler(path: &Path, json: &Value, config: &mut Config) -> Result<Vec<String>> {
    let (r, mut notes) = (Reader::new(path, json)?, Vec::new());
    let classes = [json!(DDPM), json!(DDIM)];
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
            Ok(found) => *diffusion = found,
            Err(nearest) => {
                let choices = format!("{nearest}; give null, or the variances of a schedule that is known");
                return r.refuse("trained_betas", betas, &choices);
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
        return r.refuse("clip_sample_range", range, "give 1.0, where images end");
    }
    r.get("clip_sample_range");
    // An argument of DDIMScheduler.step that no file holds; pipelines leave it at its default.
    config.sampling.use_clipped_model_output = false;
    config.sampling.threshold = match (dynamic, clip) {
        (true, _) if most >= DYNAMIC_MOST => Threshold::Dynamic,
        (true, _) | (_, true) => Threshold::Clip,
        _ => Threshold::None,
    };
    let spacing = r.choice("timestep_spacing", Spacing::Uniform, &SPACINGS)?;
    let offset = r.whole("steps_offset", 0)?;
    let to_one = r.flag("set_alpha_to_one", true)?;
    if offset != 0 || !to_one {
        notes.push(format!(
            "steps_offset {offset}, set_alpha_to_one {to_one} move the timesteps that fewer steps visit, which samplers here have not: \
             images of fewer steps are a little different"
        ));
    }
    let ddim = r.get("_class_name").is_some_and(|class| class == DDIM);
    config.sampling.sampler = if ddim { "ddim" } else { "ddpm" }.to_owned();
    config.sampling.spacing = Some(spacing);
    config.sampling.steps = None;
    r.finish()?;
    Ok(notes)
}

/// The settings whose schedule has these variances; the error says where the nearest schedule has another.
fn with_betas(like: &DiffusionConfig, betas: &[f64]) -> Result<DiffusionConfig, String> {
    if betas.is_empty() || betas.len() > limits::TIMESTEPS {
        return Err(format!("there are {}, and schedules have 1 to {}", betas.len(), limits::TIMESTEPS));
    }
    let differs = |schedule: &Schedule| {
        // What is no number differs.
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
                // Without the stretching, which diffusers applies to these too.
                let plain = DiffusionConfig { zero_terminal_snr: false, ..ours.clone() };
                let Ok(made) = Schedule::from_config(&plain) else { continue };
                match differs(&made) {
                    None => return Ok(ours),
                    Some(t) if t >= nearest.0 => {
                        let (theirs, ours) = (betas[t], made.beta(t));
                        nearest = (
                            t,
                            format!("its entry {t} is {theirs}, where the schedule {schedule} has {ours}"),
                        );
                    }
                    Some(_) => {}
                }
            }
        }
    }
    Err(nearest.1)
}

/// Its class of schedulers of `ddim`.
pub(crate) const DDIM: &str = "DDIMScheduler";
/// Its class of schedulers of `ddpm`.
const DDPM: &str = "DDPMScheduler";

/// Spacings by diffusers' names.
const SPACINGS: [(&str, Spacing); 3] =
    [("leading", Spacing::Uniform), ("linspace", Spacing::Linspace), ("trailing", Spacing::Trailing)];

/// What networks predict, by diffusers' names.
const PREDICTIONS: [(&str, Prediction); 3] =
    [("epsilon", Prediction::Eps), ("sample", Prediction::X0), ("v_prediction", Prediction::V)];

/// `scheduler/scheduler_config.json` of these settings. Schedules that not all of diffusers has are given by their variances.
pub(crate) fn scheduler_json(config: &Config) -> Result<Value> {
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
    let class = scheduler_class(config);
    // How these settings sample: a spacing that is not set is the sampler's own.
    let spacing = Options::of_run(s)?.spacing();
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
        "sample_max_value": if s.threshold == Threshold::Dynamic { DYNAMIC_MOST } else { 1.0 },
        "steps_offset": 0,
        "thresholding": s.threshold == Threshold::Dynamic,
        "timestep_spacing": spacing.map_or("leading", |named| named.0),
        "trained_betas": betas,
        "variance_type": match s.variance {
            // Any other cannot take that network's output there.
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

/// The class of the scheduler that samples as these settings do, or nearest to it.
pub(crate) fn scheduler_class(config: &Config) -> &'static str {
    // The other cannot take the output of a network that learns the variance.
    if config.sampling.sampler == "ddim" && !config.diffusion.learned_variance { DDIM } else { DDPM }
}
#[cfg(test)]
mod tests {
    use super::*;

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
                config.sampling.spacing = Some(Spacing::Uniform);
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
    fn the_sampler_and_its_spacing_go_there_and_back() {
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
        // Unset, it is the sampler's own; without fewer steps the one of diffusers.
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
            (
                json!({"trained_betas": [0.1, 0.9, 0.3]}),
                ["trained_betas", "its entry 1 is 0.9, where the schedule"],
            ),
            (json!({"num_train_timesteps": "many"}), ["num_train_timesteps: \"many\"", "whole number"]),
        ] {
            let error =
                scheduler(Path::new("s.json"), &json, &mut Config::default()).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        // Divided by no more than 1, images are clipped.
        let mut config = Config::default();
        scheduler(Path::new("s.json"), &json!({"thresholding": true, "clip_sample": false}), &mut config)
            .unwrap();
        assert_eq!(config.sampling.threshold, Threshold::Clip);
        let note =
            scheduler(Path::new("s.json"), &json!({"steps_offset": 1}), &mut Config::default()).unwrap();
        assert!(note[0].contains("steps_offset 1"), "{note:?}");
    }
}
