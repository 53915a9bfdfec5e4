//! The list of samplers by name, and what each can be told.

use super::{
    Ddim, Ddpm, DpmSolver2M, DpmSolver2S, Euler, Heun, Levels, Pndm, Sampler, Spacing, Threshold, UniPc,
    Variance,
};
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::schedule::Schedule;
use crate::train::config::{SamplingConfig, suggest};

/// A sampler, as the list has it.
#[derive(Debug)]
pub struct Listed {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is for, in a line.
    pub about: &'static str,
    /// Steps where none are asked for; `None`: all of the schedule's.
    pub steps: Option<usize>,
    /// The power of the steps' length that its error falls with; `None` where noise is drawn anew.
    pub order: Option<u32>,
    /// The spacings that it can take, the one that it takes unasked first.
    pub spacings: &'static [Spacing],
    /// What eta is unasked, where it has one.
    pub eta: Option<f64>,
    /// Whether its noise has a choice of variances.
    pub variances: bool,
    /// Whether it can take the noise from the clipped image, or as it was predicted ([`Ddim::use_clipped_model_output`]).
    pub clipped_output: bool,
    /// Whether it can begin where nothing is left of the image ([`Schedule::zero_terminal_snr`]); else one timestep before.
    pub handles_zero_snr: bool,
    /// The sampler; with eta 0 and the first variance where it has none.
    make: fn(Parts) -> Box<dyn Sampler>,
}

/// What a sampler is made of.
struct Parts {
    levels: Levels,
    eta: f64,
    variance: Option<Variance>,
    threshold: Threshold,
    use_clipped_model_output: bool,
}

impl Listed {
    /// An entry without choices.
    const fn new(name: &'static str, about: &'static str, make: fn(Parts) -> Box<dyn Sampler>) -> Self {
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
            make,
        }
    }
}

/// All spacings, with the best for what it is named after in front.
const LINSPACE_FIRST: [Spacing; 7] = Spacing::ALL;
const TRAILING_FIRST: [Spacing; 7] = {
    use Spacing::{Exponential, Karras, Linspace, Quadratic, Sigma, Trailing, Uniform};
    [Trailing, Uniform, Linspace, Quadratic, Karras, Exponential, Sigma]
};
const KARRAS_FIRST: [Spacing; 7] = {
    use Spacing::{Exponential, Karras, Linspace, Quadratic, Sigma, Trailing, Uniform};
    [Karras, Exponential, Sigma, Linspace, Uniform, Trailing, Quadratic]
};
/// As the papers have it, and nearer to the data in 10 steps (docs/sampling.md).
const EXPONENTIAL_FIRST: [Spacing; 7] = {
    use Spacing::{Exponential, Karras, Linspace, Quadratic, Sigma, Trailing, Uniform};
    [Exponential, Karras, Sigma, Linspace, Uniform, Trailing, Quadratic]
};

/// Every sampler; the first is taken unasked.
#[rustfmt::skip]
pub static SAMPLERS: &[Listed] = &[
    Listed { variances: true, handles_zero_snr: true, ..Listed::new("ddpm",
        "ancestral sampling in all steps, as in the paper (Ho et al. 2020)", |p| Box::new(
            Ddpm { levels: p.levels, variance: p.variance, threshold: p.threshold })) },
    Listed { steps: Some(50), order: Some(1), spacings: &TRAILING_FIRST, eta: Some(0.0), handles_zero_snr: true, clipped_output: true,
        ..Listed::new("ddim",
        "the same image from the same noise in any number of steps; eta adds noise (Song et al. 2021)", |p| Box::new(
            Ddim { levels: p.levels, eta: p.eta, threshold: p.threshold, use_clipped_model_output: p.use_clipped_model_output })) },
    Listed { steps: Some(20), order: Some(2), spacings: &EXPONENTIAL_FIRST, handles_zero_snr: true, ..Listed::new("dpm++2m",
        "DPM-Solver++(2M), good in 10 to 20 steps (Lu et al. 2022)", |p| Box::new(
            DpmSolver2M { levels: p.levels, stochastic: false, threshold: p.threshold })) },
    Listed { steps: Some(20), order: Some(2), spacings: &KARRAS_FIRST, ..Listed::new("dpm++2s",
        "DPM-Solver++(2S), steadier with strong guidance (Lu et al. 2022)", |p| Box::new(
            DpmSolver2S { levels: p.levels, threshold: p.threshold })) },
    Listed { steps: Some(30), spacings: &EXPONENTIAL_FIRST, handles_zero_snr: true, ..Listed::new("dpm++2m-sde",
        "SDE-DPM-Solver++(2M), with fresh noise, better in 30 steps and more (Lu et al. 2022)", |p| Box::new(
            DpmSolver2M { levels: p.levels, stochastic: true, threshold: p.threshold })) },
    Listed { steps: Some(10), order: Some(3), spacings: &EXPONENTIAL_FIRST, ..Listed::new("unipc",
        "UniPC-2, good in 5 to 15 steps (Zhao et al. 2023)", |p| Box::new(
            UniPc { levels: p.levels, p: 2, threshold: p.threshold })) },
    Listed { steps: Some(20), order: Some(2), spacings: &KARRAS_FIRST, ..Listed::new("heun",
        "Heun's method, two predictions a step (Karras et al. 2022)", |p| Box::new(
            Heun { levels: p.levels, threshold: p.threshold })) },
    Listed { steps: Some(50), order: Some(1), spacings: &KARRAS_FIRST, ..Listed::new("euler",
        "Euler's method: DDIM on Karras et al.'s time axis (2022)", |p| Box::new(
            Euler { levels: p.levels, eta: 0.0, threshold: p.threshold })) },
    Listed { steps: Some(50), eta: Some(1.0), spacings: &KARRAS_FIRST, ..Listed::new("euler-ancestral",
        "Euler's method with fresh noise, eta of it (k-diffusion)", |p| Box::new(
            Euler { levels: p.levels, eta: p.eta, threshold: p.threshold })) },
    Listed { steps: Some(50), order: Some(2), spacings: &[Spacing::Uniform], ..Listed::new("pndm",
        "pseudo numerical methods, nine predictions more than steps (Liu et al. 2022)", |p| Box::new(
            Pndm { levels: p.levels, warm_up: true, threshold: p.threshold })) },
    Listed { steps: Some(50), order: Some(2), spacings: &[Spacing::Uniform], ..Listed::new("plms",
        "the same without Runge and Kutta's first steps (latent diffusion)", |p| Box::new(
            Pndm { levels: p.levels, warm_up: false, threshold: p.threshold })) },
];

/// How images are sampled. What is `None` is the sampler's own choice.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which sampler.
    pub sampler: &'static Listed,
    /// Number of steps.
    pub steps: Option<usize>,
    /// Which noise levels they visit.
    pub spacing: Option<Spacing>,
    /// Share of noise that is drawn anew.
    pub eta: Option<f64>,
    /// Variance of the noise that is drawn anew.
    pub variance: Option<Variance>,
    /// What is done about expected images outside [-1, 1]; [`Threshold::Clip`] where nothing is said.
    pub threshold: Option<Threshold>,
    /// Whether `ddim` takes the noise from what the threshold has made of the image
    /// ([`Ddim::use_clipped_model_output`]); true where nothing is said.
    pub use_clipped_model_output: Option<bool>,
}

impl Default for Options {
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

/// The sampler of that name.
///
/// # Errors
/// [`Error::Config`] with all names for one that is not there.
pub fn find(name: &str) -> Result<&'static Listed> {
    SAMPLERS.iter().find(|s| s.name == name).ok_or_else(|| {
        let names = || SAMPLERS.iter().map(|s| s.name);
        let near = suggest::nearest(name, names()).map_or(String::new(), |n| format!("did you mean {n}? "));
        let all = names().collect::<Vec<_>>().join(", ");
        refused("sampler", format!("there is no sampler {name:?}; {near}the samplers are {all}"))
    })
}

impl Options {
    /// These, with a run's settings where nothing is said and the sampler has a choice.
    pub fn with_defaults(self, run: &SamplingConfig) -> Self {
        let variance = self.variance.or(if self.sampler.variances { run.variance } else { None });
        let of_run = self.sampler.clipped_output.then_some(run.use_clipped_model_output);
        let use_clipped_model_output = self.use_clipped_model_output.or(of_run);
        let threshold = self.threshold.or(Some(run.threshold));
        // Levels that do for one sampler need not do for another.
        let its_own = self.sampler.name == run.sampler;
        let steps = self.steps.or(run.steps.filter(|_| its_own));
        let spacing = self.spacing.or(run.spacing.filter(|_| its_own));
        Self { variance, threshold, use_clipped_model_output, steps, spacing, ..self }
    }

    /// How a run's images are sampled where nothing else is asked for.
    ///
    /// # Errors
    /// [`Error::Config`] for a sampler that is not there.
    pub fn of_run(run: &SamplingConfig) -> Result<Self> {
        Ok(Self { sampler: find(&run.sampler)?, ..Self::default() }.with_defaults(run))
    }

    /// How the noise levels are chosen.
    pub fn spacing(&self) -> Spacing {
        self.spacing.unwrap_or(self.sampler.spacings[0])
    }

    /// The noise levels that the sampler visits, of a schedule and with a network that predicts that.
    ///
    /// # Errors
    /// [`Error::Config`] for a spacing that the sampler cannot take, with those that it can, and as [`Levels::new`].
    pub fn levels(&self, schedule: &Schedule, prediction: Prediction) -> Result<Levels> {
        let Listed { name, spacings, .. } = self.sampler;
        let spacing = self.spacing();
        if !spacings.contains(&spacing) {
            let can: Vec<_> = spacings.iter().map(|s| s.name()).collect();
            let reason = format!("{name} cannot take {spacing}; give {}", can.join(" or "));
            return Err(refused("spacing", reason));
        }
        // A choice of its own that is more than there is, is all there is.
        let own = self.sampler.steps.map(|n| n.min(schedule.timesteps_with_signal()));
        let visited = if self.sampler.handles_zero_snr { prediction } else { Prediction::Eps };
        Levels::new(schedule, visited, self.steps.or(own), spacing)
    }

    /// These for the first `n` timesteps of a schedule alone, with as large a part of the steps: what samplers need that go
    /// on from images with less noise than all.
    #[must_use]
    pub fn truncated(self, n: usize, schedule: &Schedule) -> Self {
        // No steps are refused, also of a part.
        let part = |steps: usize| (steps * n).div_ceil(schedule.timesteps()).clamp(steps.min(1), n.max(1));
        Self { steps: self.steps.or(self.sampler.steps).map(part), ..self }
    }

    /// The sampler, for a schedule and a network that predicts that.
    ///
    /// # Errors
    /// [`Error::Config`] for what the sampler does not have, and as [`levels`](Self::levels).
    pub fn build(&self, schedule: &Schedule, prediction: Prediction) -> Result<Box<dyn Sampler>> {
        let Listed { name, .. } = self.sampler;
        let levels = self.levels(schedule, prediction)?;
        let with = |has: fn(&Listed) -> bool| {
            let names = SAMPLERS.iter().filter(|s| has(s)).map(|s| s.name);
            names.collect::<Vec<_>>().join(", ")
        };
        if let Some(eta) = self.eta {
            if self.sampler.eta.is_none() {
                let can = with(|s| s.eta.is_some());
                return Err(refused("eta", format!("{name} has no eta; leave it out, or take one of {can}")));
            }
            if !(0.0..=1.0).contains(&eta) {
                return Err(refused("eta", format!("{eta} is out of range; give 0 (no noise) to 1")));
            }
        }
        if self.variance.is_some() && !self.sampler.variances {
            let can = with(|s| s.variances);
            let reason = format!("{name} has no choice of variances; leave it out, or take {can}");
            return Err(refused("variance", reason));
        }
        if self.use_clipped_model_output.is_some() && !self.sampler.clipped_output {
            let can = with(|s| s.clipped_output);
            let reason = format!("{name} has no use_clipped_model_output; leave it out, or take {can}");
            return Err(refused("use_clipped_model_output", reason));
        }
        let eta = self.eta.or(self.sampler.eta).unwrap_or(0.0);
        Ok((self.sampler.make)(Parts {
            levels,
            eta,
            variance: self.variance,
            threshold: self.threshold.unwrap_or_default(),
            use_clipped_model_output: self.use_clipped_model_output.unwrap_or(true),
        }))
    }
}

fn refused(key: &str, reason: String) -> Error {
    Error::Config { key: key.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_settings_count_where_nothing_else_is_said() {
        let run = SamplingConfig {
            variance: Some(Variance::Large),
            threshold: Threshold::None,
            use_clipped_model_output: false,
            ..SamplingConfig::default()
        };
        let unsaid = Options::default().with_defaults(&run);
        assert_eq!((unsaid.variance, unsaid.threshold), (run.variance, Some(run.threshold)));
        let (variance, threshold) = (Some(Variance::Small), Some(Threshold::Clip));
        let said = Options { variance, threshold, ..Options::default() }.with_defaults(&run);
        assert_eq!((said.variance, said.threshold), (variance, threshold));
        // What a sampler has not is not told to it.
        let ddim = Options { sampler: find("ddim").unwrap(), ..Options::default() };
        assert_eq!(ddim.with_defaults(&run).variance, None);
        assert_eq!(ddim.with_defaults(&run).use_clipped_model_output, Some(false));
        assert_eq!(unsaid.use_clipped_model_output, None);
        let asked = Options { use_clipped_model_output: Some(true), ..ddim };
        assert_eq!(asked.with_defaults(&run).use_clipped_model_output, Some(true));
        // The run's steps and spacing are those of its own sampler.
        let run = SamplingConfig {
            sampler: "ddim".to_owned(),
            steps: Some(7),
            spacing: Some(Spacing::Uniform),
            ..SamplingConfig::default()
        };
        let own = Options::of_run(&run).unwrap();
        assert_eq!((own.sampler.name, own.steps, own.spacing()), ("ddim", Some(7), Spacing::Uniform));
        assert_eq!(Options { steps: Some(3), ..ddim }.with_defaults(&run).steps, Some(3));
        let other = Options { sampler: find("heun").unwrap(), ..Options::default() }.with_defaults(&run);
        assert_eq!((other.steps, other.spacing), (None, None));
    }

    #[test]
    fn what_a_sampler_does_not_have_is_refused_with_what_there_is() {
        let schedule = Schedule::linear(100, 1e-4, 0.02).unwrap();
        let refused = |options: Options, part: &str| {
            let error = options.build(&schedule, Prediction::Eps).err().expect("refused").to_string();
            assert!(error.contains(part), "{error}");
        };
        let of = |name: &str| Options { sampler: find(name).unwrap(), ..Options::default() };
        refused(
            Options { eta: Some(0.5), ..of("ddpm") },
            "eta: ddpm has no eta; leave it out, or take one of ddim",
        );
        refused(Options { eta: Some(1.5), ..of("ddim") }, "eta: 1.5 is out of range; give 0");
        refused(Options { eta: Some(f64::NAN), ..of("ddim") }, "out of range");
        refused(
            Options { spacing: Some(Spacing::Karras), ..of("pndm") },
            "pndm cannot take karras; give uniform",
        );
        refused(Options { variance: Some(Variance::Large), ..of("ddim") }, "or take ddpm");
        refused(
            Options { use_clipped_model_output: Some(true), ..of("heun") },
            "heun has no use_clipped_model_output; leave it out, or take ddim",
        );
        for sampler in SAMPLERS {
            let of = |steps| Options { sampler, steps, ..Options::default() };
            refused(of(Some(0)), "0 steps: the schedule allows 1 to");
            refused(of(Some(10_000_000)), "10000000 steps: the schedule allows 1 to");
            // Sigmas need more steps (spacing.rs).
            for &spacing in sampler.spacings.iter().filter(|&&spacing| spacing != Spacing::Sigma) {
                for prediction in Prediction::ALL {
                    let options = Options { spacing: Some(spacing), ..of(None) };
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
