//! Averages of the weights that are kept beside the executor's own: with other decays, and power-function averages.

use super::checkpoint::{self, NamedTensor};
use super::config::TrainConfig;
use super::{ema, posthoc};
use crate::error::{Error, Result};
use crate::nets::ParameterSpec;
use ddpm_engine::{Executor, Region};
use rayon::prelude::*;

/// Numbers of a task.
const CHUNK: usize = 1 << 14;

/// How an average follows.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// As `train.ema` says, with this decay.
    Decay(f64),
    /// As a power function of this exponent.
    Power(f64),
}

/// One average of all parameters, in the engine's layouts.
struct Average {
    /// Its name in checkpoints, as `ema-0.999`.
    name: String,
    kind: Kind,
    parameters: Vec<Vec<f32>>,
}

/// The averages that the settings ask for besides `train.ema_decay`'s.
pub(super) struct Averages {
    all: Vec<Average>,
    weights: Vec<f32>,
}

impl Averages {
    /// Without numbers yet: [`start`](Self::start) gives them some.
    ///
    /// # Errors
    /// [`Error::Config`] for a width that no power function has.
    pub fn new(train: &TrainConfig) -> Result<Self> {
        let of = |name: String, kind| Average { name, kind, parameters: Vec::new() };
        let decays =
            train.ema_decays.iter().map(|&d| Ok(of(format!("{}{d}", checkpoint::DECAY), Kind::Decay(d))));
        let powers = train.power_ema.iter().map(|&width| {
            Ok(of(format!("{}{width}", checkpoint::POWER), Kind::Power(posthoc::gamma(width)?)))
        });
        Ok(Self { all: decays.chain(powers).collect::<Result<_>>()?, weights: Vec::new() })
    }

    /// Makes all of them the weights as they are.
    pub fn start(&mut self, exec: &dyn Executor, specs: &[ParameterSpec]) -> Result<()> {
        for average in &mut self.all {
            average.parameters.clear();
            for (i, spec) in specs.iter().enumerate() {
                let mut weights = vec![0.0; spec.numbers()];
                exec.read_parameter(Region::Weights, i, &mut weights)?;
                average.parameters.push(weights);
            }
        }
        Ok(())
    }

    /// Follows the weights behind step `step`, counted from 0, of so many images.
    pub fn follow(
        &mut self,
        exec: &dyn Executor,
        specs: &[ParameterSpec],
        train: &TrainConfig,
        step: u64,
        images: usize,
    ) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        for (i, spec) in specs.iter().enumerate() {
            self.weights.resize(spec.numbers(), 0.0);
            exec.read_parameter(Region::Weights, i, &mut self.weights)?;
            for average in &mut self.all {
                let keeps = match average.kind {
                    Kind::Decay(decay) => ema::decay_of(train, decay, step, images),
                    Kind::Power(gamma) => posthoc::decay(gamma, step + 1),
                };
                let blend = |(a, w): (&mut f32, &f32)| {
                    *a = (keeps * f64::from(*a) + (1.0 - keeps) * f64::from(*w)) as f32;
                };
                average.parameters[i]
                    .par_chunks_mut(CHUNK)
                    .zip(self.weights.par_chunks(CHUNK))
                    .for_each(|(a, w)| a.iter_mut().zip(w).for_each(blend));
            }
        }
        Ok(())
    }

    /// All as tensors with PyTorch's names and layouts, with `states` behind them.
    pub fn tensors(
        &self,
        specs: &[ParameterSpec],
        states: &[NamedTensor],
    ) -> Vec<(String, Vec<NamedTensor>)> {
        let of = |average: &Average| {
            let tensor = |(spec, data): (&ParameterSpec, &Vec<f32>)| NamedTensor {
                name: spec.name.clone(),
                shape: spec.shape.clone(),
                data: spec.to_torch(data),
            };
            let tensors = specs.iter().zip(&average.parameters).map(tensor).chain(states.iter().cloned());
            (average.name.clone(), tensors.collect())
        };
        self.all.iter().map(of).collect()
    }

    /// Takes up those that a checkpoint of step `step` has; other decays begin with its weights, which must be the executor's
    /// by now.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for tensors that are not this network's; [`Error::Config`] for a power-function average that the
    /// checkpoint has not: its profile is over all steps from the first, whose weights are gone.
    pub fn restore(
        &mut self,
        exec: &dyn Executor,
        specs: &[ParameterSpec],
        step: u64,
        from: &[(String, Vec<NamedTensor>)],
        origin: &std::path::Path,
    ) -> Result<()> {
        self.start(exec, specs)?;
        for average in &mut self.all {
            let Some((name, tensors)) = from.iter().find(|(name, _)| *name == average.name) else {
                if step > 0 && Self::is_power(&average.name) {
                    let reason = format!(
                        "{} is not kept in {}, and would be an average over all steps from the first, {step} of which are over; \
                         leave it out here, or begin a new run with the weights of this one (--init)",
                        &average.name[checkpoint::POWER.len()..],
                        origin.display()
                    );
                    return Err(Error::Config { key: "train.power_ema".to_owned(), reason });
                }
                continue;
            };
            for (spec, data) in specs.iter().zip(&mut average.parameters) {
                let found = tensors.iter().find(|t| t.name == spec.name && t.shape == spec.shape);
                let Some(tensor) = found else {
                    let reason = format!("{name} has no {} of the shape {:?}", spec.name, spec.shape);
                    return Err(Error::Checkpoint { path: origin.to_owned(), reason });
                };
                *data = spec.from_torch(&tensor.data);
            }
        }
        Ok(())
    }

    /// Whether a name is of a power-function average.
    pub fn is_power(name: &str) -> bool {
        name.starts_with(checkpoint::POWER)
    }
}
