//! Averages of the weights in addition to the executor's own: EMAs with other decays, and power-function averages.

use super::ema;
use crate::checkpoint::{self, NamedTensor};
use crate::config::EmaConfig;
use crate::error::{Error, Result};
use crate::nets::ParameterSpec;
use crate::power_ema;
use ddpm_engine::{Executor, Region};
use rayon::prelude::*;

/// Elements per task.
const CHUNK: usize = 1 << 14;

/// How an average is updated.
#[derive(Clone, Copy, Debug)]
enum AverageKind {
    /// By `ema.schedule`, with this decay.
    Decay(f64),
    /// As a power-function average with this exponent.
    Power(f64),
}

/// One average of all parameters, in the engine's layouts.
struct Average {
    /// Its name in checkpoints, e.g. `ema-0.999`.
    name: String,
    kind: AverageKind,
    parameters: Vec<Vec<f32>>,
}

/// The averages configured in addition to that of `ema.decay`.
pub(super) struct Averages {
    all: Vec<Average>,
    weights: Vec<f32>,
}

impl Averages {
    /// Averages without values; [`start`](Self::start) initializes them.
    ///
    /// # Errors
    /// [`Error::Config`] for a width that no power function can have.
    pub fn new(settings: &EmaConfig) -> Result<Self> {
        let of = |name: String, kind| Average { name, kind, parameters: Vec::new() };
        let decays = settings
            .extra_decays
            .iter()
            .map(|&d| Ok(of(format!("{}{d}", checkpoint::DECAY), AverageKind::Decay(d))));
        let powers = settings.power_widths.iter().map(|&width| {
            Ok(of(format!("{}{width}", checkpoint::POWER), AverageKind::Power(power_ema::gamma(width)?)))
        });
        Ok(Self { all: decays.chain(powers).collect::<Result<_>>()?, weights: Vec::new() })
    }

    /// Sets all of them to the current weights.
    pub fn start(&mut self, exec: &dyn Executor, specs: &[ParameterSpec]) -> Result<()> {
        for average in &mut self.all {
            average.parameters.clear();
            for (i, spec) in specs.iter().enumerate() {
                let mut weights = vec![0.0; spec.num_elements()];
                exec.read_parameter(Region::Weights, i, &mut weights)?;
                average.parameters.push(weights);
            }
        }
        Ok(())
    }

    /// Updates the averages after step `step`, counted from 0, of `images` images.
    pub fn update(
        &mut self,
        exec: &dyn Executor,
        specs: &[ParameterSpec],
        settings: &EmaConfig,
        step: u64,
        images: usize,
    ) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        for (i, spec) in specs.iter().enumerate() {
            self.weights.resize(spec.num_elements(), 0.0);
            exec.read_parameter(Region::Weights, i, &mut self.weights)?;
            for average in &mut self.all {
                let decay = match average.kind {
                    AverageKind::Decay(max) => ema::decay_of(settings, max, step, images),
                    AverageKind::Power(gamma) => power_ema::decay(gamma, step + 1),
                };
                let blend = |(a, w): (&mut f32, &f32)| {
                    *a = (decay * f64::from(*a) + (1.0 - decay) * f64::from(*w)) as f32;
                };
                average.parameters[i]
                    .par_chunks_mut(CHUNK)
                    .zip(self.weights.par_chunks(CHUNK))
                    .for_each(|(a, w)| a.iter_mut().zip(w).for_each(blend));
            }
        }
        Ok(())
    }

    /// All averages as tensors with PyTorch's names and layouts, followed by `states`.
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

    /// Restores the averages that a checkpoint of step `step` has; other EMAs start from its weights, which the executor
    /// must already have.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for tensors that do not belong to this network; [`Error::Config`] for a power-function average
    /// that the checkpoint lacks: its profile covers all steps from the first, whose weights are gone.
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
                        "{} is not kept in {}, and cannot be added after {step} steps, because it averages over all steps from \
                         the first; remove it, or start a new run with the weights of this one (--init)",
                        &average.name[checkpoint::POWER.len()..],
                        origin.display()
                    );
                    return Err(Error::Config { key: "ema.power_widths".to_owned(), reason });
                }
                continue;
            };
            for (spec, data) in specs.iter().zip(&mut average.parameters) {
                let found = tensors.iter().find(|t| t.name == spec.name && t.shape == spec.shape);
                let Some(tensor) = found else {
                    let reason = format!("{name} has no {} of shape {:?}", spec.name, spec.shape);
                    return Err(Error::Checkpoint { path: origin.to_owned(), reason });
                };
                *data = spec.from_torch(&tensor.data);
            }
        }
        Ok(())
    }

    /// Whether a name is that of a power-function average.
    pub fn is_power(name: &str) -> bool {
        name.starts_with(checkpoint::POWER)
    }
}
