//! Training steps: algorithm 1 of Ho et al. 2020 on a data set, without files.

use super::checkpoint::{Checkpoint, Manifest, NamedTensor, check_fits};
use super::config::{Config, DataFacts, OptimizerKind, Size};
use crate::data::Dataset;
use crate::data::loader::Loader;
use crate::error::{Error, Result};
use crate::model::{StepDraws, TrainingGraph, check_size, device};
use crate::nets::{self, Network};
use crate::schedule::Schedule;
use ddpm_engine::{AdamStep, Draws, Executor, Region};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What training will take, told before it starts.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// Numbers in the network's parameters.
    pub parameters: usize,
    /// Bytes of the arena: weights, gradients, optimizer, average, activations.
    pub arena_bytes: u64,
    /// Bytes of the threads' scratch memory.
    pub scratch_bytes: u64,
    /// Bytes of the data set in memory and of the batches read ahead.
    pub data_bytes: u64,
    /// Bytes of one checkpoint on disk.
    pub checkpoint_bytes: u64,
    /// Floating-point operations of one step.
    pub flops: u64,
    /// Steps still to make.
    pub steps: u64,
    /// Time of one step, measured.
    pub step_time: Duration,
    /// What the steps run on.
    pub device: String,
}

/// A network, its optimizer and its data.
pub struct Trainer {
    config: Config,
    data: Arc<dyn Dataset>,
    loader: Loader,
    graph: TrainingGraph,
    exec: Box<dyn Executor>,
    /// Steps made.
    step: u64,
    weights_given: bool,
}

impl Trainer {
    /// Prepares to train from the start: settings are completed from the data, and the weights are drawn.
    pub fn new(config: &Config, data: Box<dyn Dataset>) -> Result<Self> {
        let shape = data.shape();
        let size = Size { height: shape.height, width: shape.width };
        // Before the settings are completed, so that the error can name the sizes that would fit.
        let net: Box<dyn Network> = nets::from_config(&config.network, shape.channels);
        check_size(&*net, shape.height, shape.width)?;
        let config = config.resolve(&DataFacts { count: data.len(), size, channels: shape.channels })?;
        config.validate()?;
        let schedule = Schedule::from_config(&config.diffusion)?;
        let batch = [config.train.batch_size, shape.height, shape.width, shape.channels];
        let graph = TrainingGraph::new(&*net, &schedule, batch, StepDraws::Drawn)?;
        let options = graph.options(config.train.ema_decay > 0.0);
        let mut exec = device(config.train.threads).executor(graph.graph.clone(), &options)?;
        for (i, spec) in graph.parameters.iter().enumerate() {
            let weights = spec.init(config.train.seed, i);
            exec.write_parameter(Region::Weights, i, &weights)?;
            if config.train.ema_decay > 0.0 {
                exec.write_parameter(Region::Ema, i, &weights)?;
            }
        }
        let data: Arc<dyn Dataset> = Arc::from(data);
        let loader = Loader::new(data.clone(), config.train.seed, config.train.batch_size);
        Ok(Self { config, data, loader, graph, exec, step: 0, weights_given: false })
    }

    /// The complete settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The data set.
    pub fn data(&self) -> &dyn Dataset {
        &*self.data
    }

    /// Bytes of the data set in memory and of the batches read ahead.
    pub fn data_memory(&self) -> u64 {
        self.data.summary().memory_bytes + self.loader.memory()
    }

    /// Steps made so far.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Steps to make in all.
    pub fn steps(&self) -> u64 {
        self.config.train.steps.unwrap_or(0)
    }

    /// Numbers in the network's parameters.
    pub fn tensor_numbers(&self) -> u64 {
        self.graph.graph.parameter_count() as u64
    }

    /// The executor, for timing reports.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.exec
    }

    fn has_ema(&self) -> bool {
        self.config.train.ema_decay > 0.0
    }

    /// What training will take. Measures the time of a step, which changes nothing.
    pub fn plan(&mut self) -> Result<TrainPlan> {
        let footprint = self.exec.footprint();
        let parameters = self.graph.graph.parameter_count();
        let copies = if self.has_ema() { 4 } else { 3 };
        self.gradients(u32::MAX)?;
        let start = Instant::now();
        self.gradients(u32::MAX)?;
        Ok(TrainPlan {
            parameters,
            arena_bytes: footprint.arena_bytes as u64,
            scratch_bytes: footprint.scratch_bytes as u64,
            data_bytes: self.data_memory(),
            checkpoint_bytes: (copies * parameters * 4) as u64,
            flops: 2 * footprint.multiply_adds,
            steps: self.steps().saturating_sub(self.step),
            step_time: start.elapsed(),
            device: self.exec.describe(),
        })
    }

    fn gradients(&mut self, step: u32) -> Result<f32> {
        self.exec.run(Draws { seed: self.config.train.seed, step, first_index: 0 })?;
        let mut loss = [0.0];
        self.exec.read(self.graph.loss, &mut loss)?;
        Ok(loss[0])
    }

    /// Makes one step; the batch's loss before it. A loss that is not finite is an error, and nothing has changed.
    pub fn step(&mut self) -> Result<f32> {
        let batch = self.loader.batch(self.step)?;
        self.exec.write(self.graph.x_0, &batch.pictures)?;
        let draw_step = u32::try_from(self.step).map_err(|_| Error::Config {
            key: "train.steps".to_owned(),
            reason: format!("a run has at most {} steps", u32::MAX),
        })?;
        let loss = self.gradients(draw_step)?;
        if !loss.is_finite() {
            return Err(Error::NotFinite { step: self.step, what: "the loss".to_owned() });
        }
        let t = &self.config.train;
        // The average follows closely at first, so that early samples are not those of the first weights.
        let warm = (1.0 + self.step as f64) / (10.0 + self.step as f64);
        self.exec.update(&AdamStep {
            lr: t.lr,
            beta1: t.beta1,
            beta2: t.beta2,
            eps: t.adam_eps,
            weight_decay: t.weight_decay,
            decoupled: t.optimizer == OptimizerKind::AdamW,
            step: self.step + 1,
            ema_decay: t.ema_decay.min(warm),
            grad_scale: 1.0,
        })?;
        self.step += 1;
        Ok(loss)
    }

    /// A region's parameters with PyTorch's names and layouts.
    pub fn tensors(&self, region: Region) -> Result<Vec<NamedTensor>> {
        let parameters = self.graph.parameters.iter().enumerate();
        parameters
            .map(|(i, spec)| {
                let mut data = vec![0.0; spec.numbers()];
                self.exec.read_parameter(region, i, &mut data)?;
                let data = spec.to_torch(&data);
                Ok(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data })
            })
            .collect()
    }

    fn set_tensors(&mut self, region: Region, tensors: &[NamedTensor], origin: &Path) -> Result<()> {
        let expected: Vec<_> =
            self.graph.parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        check_fits(&expected, tensors, origin)?;
        for (i, spec) in self.graph.parameters.iter().enumerate() {
            let tensor = tensors.iter().find(|t| t.name == spec.name).expect("the names were checked");
            self.exec.write_parameter(region, i, &spec.from_torch(&tensor.data))?;
        }
        Ok(())
    }

    /// Starts from given weights instead of drawn ones; `origin` names them in errors.
    pub fn set_weights(&mut self, weights: &[NamedTensor], origin: &Path) -> Result<()> {
        self.set_tensors(Region::Weights, weights, origin)?;
        if self.has_ema() {
            self.set_tensors(Region::Ema, weights, origin)?;
        }
        self.weights_given = true;
        Ok(())
    }

    /// Whether it started from given weights.
    pub fn weights_given(&self) -> bool {
        self.weights_given
    }

    /// Everything that the rest of the training depends on. Refuses weights that are not finite.
    pub fn checkpoint(&self, loss: Option<f64>) -> Result<Checkpoint> {
        let weights = self.tensors(Region::Weights)?;
        if let Some(broken) = weights.iter().find(|t| t.data.iter().any(|v| !v.is_finite())) {
            return Err(Error::NotFinite { step: self.step, what: format!("a number in {}", broken.name) });
        }
        let mut manifest = Manifest::new(self.step, &self.config, self.tensor_numbers(), loss);
        manifest.data = Some(self.data.summary().fingerprint.clone());
        Ok(Checkpoint {
            manifest,
            weights,
            ema: if self.has_ema() { self.tensors(Region::Ema)? } else { Vec::new() },
            exp_avg: self.tensors(Region::ExpAvg)?,
            exp_avg_sq: self.tensors(Region::ExpAvgSq)?,
        })
    }

    /// Takes up where a checkpoint was made; `origin` names it in errors.
    pub fn restore(&mut self, checkpoint: &Checkpoint, origin: &Path) -> Result<()> {
        self.set_tensors(Region::Weights, &checkpoint.weights, origin)?;
        self.set_tensors(Region::ExpAvg, &checkpoint.exp_avg, origin)?;
        self.set_tensors(Region::ExpAvgSq, &checkpoint.exp_avg_sq, origin)?;
        if self.has_ema() {
            let ema = if checkpoint.ema.is_empty() { &checkpoint.weights } else { &checkpoint.ema };
            self.set_tensors(Region::Ema, ema, origin)?;
        }
        self.step = checkpoint.manifest.step;
        Ok(())
    }
}
