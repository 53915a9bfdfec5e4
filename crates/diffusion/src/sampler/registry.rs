//! The registry of samplers by name, with the options that each supports.

use super::{Levels, Sampler, Spacing, Threshold, Variance};
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::schedule::Schedule;

/// A registered sampler.
#[derive(Debug)]
pub struct SamplerInfo {
    /// The name on the command line.
    pub name: &'static str,
    /// A one-line description.
    pub about: &'static str,
    /// Default number of steps; `None`: all of the schedule's.
    pub steps: Option<usize>,
    /// The order of convergence; `None` for stochastic samplers.
    pub order: Option<u32>,
    /// The supported spacings, the default first.
    pub spacings: &'static [Spacing],
    /// The default eta, if the sampler has one.
    pub eta: Option<f64>,
    /// Whether the variance of its noise can be chosen.
    pub variances: bool,
    /// Whether it supports [`Ddim::use_clipped_model_output`](super::Ddim::use_clipped_model_output).
    pub clipped_output: bool,
    /// Whether it can start at a level without signal ([`Schedule::zero_terminal_snr`]); otherwise it starts
    /// one timestep earlier.
    pub handles_zero_snr: bool,
    /// Builds the sampler; options that it lacks are ignored.
    pub(super) build_fn: fn(BuildArgs) -> Box<dyn Sampler>,
}

/// Arguments for building a sampler.
pub(super) struct BuildArgs {
    pub levels: Levels,
    pub eta: f64,
    pub variance: Option<Variance>,
    pub threshold: Threshold,
    pub use_clipped_model_output: bool,
}

impl SamplerInfo {
    /// An entry without optional settings.
    pub(super) const fn new(
        name: &'static str,
        about: &'static str,
        build_fn: fn(BuildArgs) -> Box<dyn Sampler>,
    ) -> Self {
        let (spacings, steps) = (&LINSPACE_FIRST, None);
        Self {
            name,
            about,
            steps,
            order: None,
            spacings,
            eta: None,
            variances: false,
            clipped_output: false,
            handles_zero_snr: false,
            build_fn,
        }
    }
}

/// All spacings, the named one first.
pub(super) const LINSPACE_FIRST: [Spacing; 7] = Spacing::ALL;
pub(super) const TRAILING_FIRST: [Spacing; 7] = {
    use Spacing::{Exponential, Karras, Linspace, Quadratic, Sigma, Trailing, Uniform};
    [Trailing, Uniform, Linspace, Quadratic, Karras, Exponential, Sigma]
};
pub(super) const KARRAS_FIRST: [Spacing; 7] = {
    use Spacing::{Exponential, Karras, Linspace, Quadratic, Sigma, Trailing, Uniform};
    [Karras, Exponential, Sigma, Linspace, Uniform, Trailing, Quadratic]
};
/// The papers' choice, and closer to the data in 10 steps (docs/sampling.md).
pub(super) const EXPONENTIAL_FIRST: [Spacing; 7] = {
    use Spacing::{Exponential, Karras, Linspace, Quadratic, Sigma, Trailing, Uniform};
    [Exponential, Karras, Sigma, Linspace, Uniform, Trailing, Quadratic]
};

/// Every sampler; the first is the default. Each is described in its own file.
pub static SAMPLERS: &[SamplerInfo] = &[
    super::ddpm::DDPM,
    super::ddim::DDIM,
    super::dpm_solver::DPM_2M,
    super::dpm_solver::DPM_2S,
    super::dpm_solver::DPM_2M_SDE,
    super::unipc::UNIPC,
    super::heun::HEUN,
    super::euler::EULER,
    super::euler::EULER_ANCESTRAL,
    super::pndm::PNDM,
    super::pndm::PLMS,
];

/// Sampling options; `None` means the sampler's default.
#[derive(Clone, Copy, Debug)]
pub struct SamplerOptions {
    /// The sampler.
    pub sampler: &'static SamplerInfo,
    /// Number of steps.
    pub steps: Option<usize>,
    /// How the noise levels are spaced.
    pub spacing: Option<Spacing>,
    /// Fraction of the noise that is resampled.
    pub eta: Option<f64>,
    /// Variance of the resampled noise.
    pub variance: Option<Variance>,
    /// Treatment of predicted images outside [-1, 1]; [`Threshold::Clip`] by default.
    pub threshold: Option<Threshold>,
    /// Whether `ddim` recomputes eps from the thresholded image ([`Ddim::use_clipped_model_output`](super::Ddim::use_clipped_model_output)); true by
    /// default.
    pub use_clipped_model_output: Option<bool>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            sampler: &SAMPLERS[0],
            steps: None,
            spacing: None,
            eta: None,
            variance: None,
            threshold: None,
            use_clipped_model_output: None,
        }
    }
}

/// The sampler with this name.
///
/// # Errors
/// [`Error::Option`] for an unknown name, listing all samplers.
pub fn find(name: &str) -> Result<&'static SamplerInfo> {
    SAMPLERS.iter().find(|s| s.name == name).ok_or_else(|| {
        let names = || SAMPLERS.iter().map(|s| s.name);
        let near = ddpm_text::nearest(name, names()).map_or(String::new(), |n| format!("did you mean {n}? "));
        let all = names().collect::<Vec<_>>().join(", ");
        invalid("sampler", format!("there is no sampler {name:?}; {near}the samplers are {all}"))
    })
}

impl SamplerOptions {
    /// The spacing of the noise levels.
    pub fn spacing(&self) -> Spacing {
        self.spacing.unwrap_or(self.sampler.spacings[0])
    }

    /// The noise levels that the sampler visits, for a schedule and a prediction type.
    ///
    /// # Errors
    /// [`Error::Option`] for a spacing that the sampler does not support, listing those that it does, and
    /// those of [`Levels::new`].
    pub fn levels(&self, schedule: &Schedule, prediction: Prediction) -> Result<Levels> {
        let SamplerInfo { name, spacings, .. } = self.sampler;
        let spacing = self.spacing();
        if !spacings.contains(&spacing) {
            let can: Vec<_> = spacings.iter().map(|s| s.name()).collect();
            let reason = format!("{name} does not support {spacing}; give {}", can.join(" or "));
            return Err(invalid("spacing", reason));
        }
        // The sampler's default is capped at what the schedule has.
        let default = self.sampler.steps.map(|n| n.min(schedule.timesteps_with_signal()));
        let visited = if self.sampler.handles_zero_snr { prediction } else { Prediction::Eps };
        Levels::new(schedule, visited, self.steps.or(default), spacing)
    }

    /// These options for the first `n` timesteps of a schedule, with a proportional number of steps: for
    /// sampling from partially noised images.
    #[must_use]
    pub fn truncated(self, n: usize, schedule: &Schedule) -> Self {
        // Keep 0 steps at 0, so that it is still an error.
        let part = |steps: usize| (steps * n).div_ceil(schedule.timesteps()).clamp(steps.min(1), n.max(1));
        Self { steps: self.steps.or(self.sampler.steps).map(part), ..self }
    }

    /// Builds the sampler for a schedule and a prediction type.
    ///
    /// # Errors
    /// [`Error::Option`] for options that the sampler lacks, and those of [`levels`](Self::levels).
    pub fn build(&self, schedule: &Schedule, prediction: Prediction) -> Result<Box<dyn Sampler>> {
        let SamplerInfo { name, .. } = self.sampler;
        let levels = self.levels(schedule, prediction)?;
        let with = |has: fn(&SamplerInfo) -> bool| {
            let names = SAMPLERS.iter().filter(|s| has(s)).map(|s| s.name);
            names.collect::<Vec<_>>().join(", ")
        };
        if let Some(eta) = self.eta {
            if self.sampler.eta.is_none() {
                let can = with(|s| s.eta.is_some());
                return Err(invalid("eta", format!("{name} has no eta; leave it out, or use one of {can}")));
            }
            if !(0.0..=1.0).contains(&eta) {
                return Err(invalid("eta", format!("{eta} is out of range; give 0 (no noise) to 1")));
            }
        }
        if self.variance.is_some() && !self.sampler.variances {
            let can = with(|s| s.variances);
            let reason = format!("{name} has no variance setting; leave it out, or use {can}");
            return Err(invalid("variance", reason));
        }
        if self.use_clipped_model_output.is_some() && !self.sampler.clipped_output {
            let can = with(|s| s.clipped_output);
            let reason = format!("{name} has no use_clipped_model_output; leave it out, or use {can}");
            return Err(invalid("use_clipped_model_output", reason));
        }
        let eta = self.eta.or(self.sampler.eta).unwrap_or(0.0);
        Ok((self.sampler.build_fn)(BuildArgs {
            levels,
            eta,
            variance: self.variance,
            threshold: self.threshold.unwrap_or_default(),
            use_clipped_model_output: self.use_clipped_model_output.unwrap_or(true),
        }))
    }
}

fn invalid(key: &str, reason: String) -> Error {
    Error::option(key, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_fit_on_a_line_of_help() {
        for sampler in SAMPLERS {
            // In the command line's list, 18 columns hold the name.
            let width = sampler.about.chars().count();
            assert!(width <= 71 && sampler.name.len() <= 16, "{}: {width}", sampler.name);
        }
    }

    #[test]
    fn unsupported_options_are_refused_with_alternatives() {
        let schedule = Schedule::linear(100, 1e-4, 0.02).unwrap();
        let refused = |options: SamplerOptions, part: &str| {
            let error = options.build(&schedule, Prediction::Eps).err().expect("refused").to_string();
            assert!(error.contains(part), "{error}");
        };
        let of = |name: &str| SamplerOptions { sampler: find(name).unwrap(), ..SamplerOptions::default() };
        refused(
            SamplerOptions { eta: Some(0.5), ..of("ddpm") },
            "eta: ddpm has no eta; leave it out, or use one of ddim",
        );
        refused(SamplerOptions { eta: Some(1.5), ..of("ddim") }, "eta: 1.5 is out of range; give 0");
        refused(SamplerOptions { eta: Some(f64::NAN), ..of("ddim") }, "out of range");
        refused(
            SamplerOptions { spacing: Some(Spacing::Karras), ..of("pndm") },
            "pndm does not support karras; give uniform",
        );
        refused(SamplerOptions { variance: Some(Variance::Large), ..of("ddim") }, "or use ddpm");
        refused(
            SamplerOptions { use_clipped_model_output: Some(true), ..of("heun") },
            "heun has no use_clipped_model_output; leave it out, or use ddim",
        );
        for sampler in SAMPLERS {
            let of = |steps| SamplerOptions { sampler, steps, ..SamplerOptions::default() };
            refused(of(Some(0)), "0 steps: the schedule allows 1 to");
            refused(of(Some(10_000_000)), "10000000 steps: the schedule allows 1 to");
            // Sigma spacing needs more steps (spacing.rs).
            for &spacing in sampler.spacings.iter().filter(|&&spacing| spacing != Spacing::Sigma) {
                for prediction in Prediction::ALL {
                    let options = SamplerOptions { spacing: Some(spacing), ..of(None) };
                    assert!(options.build(&schedule, prediction).is_ok(), "{}, {spacing}", sampler.name);
                }
            }
            let tiny = Schedule::linear(1, 1e-4, 0.02).unwrap();
            assert!(of(None).build(&tiny, Prediction::Eps).is_ok(), "{}", sampler.name);
        }
        let error = find("dddim").unwrap_err().to_string();
        assert!(
            error.contains("did you mean ddim?") && error.contains("the samplers are ddpm, ddim"),
            "{error}"
        );
    }
}
