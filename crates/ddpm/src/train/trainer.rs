//! Training steps: algorithm 1 of Ho et al. 2020 on a data set, without files.

use super::checkpoint::{Checkpoint, Manifest, NamedTensor};
use super::config::{Config, DataFacts, OptimizerKind, Size};
use crate::data::{self, DataOptions, Dataset, Order, digits::Digits};
use crate::error::{Error, Result};
use crate::model::{StepDraws, TrainingGraph, check_size, device, load_tensors, read_tensors};
use crate::nets::{self, Network, StateSpec};
use crate::schedule::Schedule;
use ddpm_engine::{AdamStep, Draws, Executor, Region, Tensor};
use std::path::Path;
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
    /// Bytes of the data set in memory.
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
    data: Box<dyn Dataset>,
    order: Order,
    graph: TrainingGraph,
    exec: Box<dyn Executor>,
    batch: Vec<f32>,
    /// Steps made.
    step: u64,
    weights_given: bool,
}

/// Opens the data set that the settings name.
pub fn open_data(config: &Config) -> Result<Box<dyn Dataset>> {
    let d = &config.data;
    let (size, channels) = (config.picture_size(), config.picture_channels());
    if d.path == "digits" {
        if channels.is_some_and(|c| c != 1) {
            let reason = "the built-in digits are grey: 1, or leave it out".to_owned();
            return Err(Error::Config { key: "data.channels".to_owned(), reason });
        }
        let size = size.unwrap_or(Size { height: 28, width: 28 });
        if size.height != size.width {
            let reason = format!("the built-in digits are square, not {size}");
            return Err(Error::Config { key: "data.size".to_owned(), reason });
        }
        return Ok(Box::new(Digits::new(config.train.seed, size.height, d.digits_count)?));
    }
    let size = size.map(|s| (s.height, s.width));
    data::open(Path::new(&d.path), &DataOptions { size, channels, on_bad_file: d.on_bad_file })
}

impl Trainer {
    /// Prepares to train from the start: settings are completed from the data, and the weights are drawn.
    pub fn new(config: &Config, data: Box<dyn Dataset>) -> Result<Self> {
        let shape = data.shape();
        let size = Size { height: shape.height, width: shape.width };
        // Before the settings are completed, so that the error can name the sizes that would fit.
        let net: Box<dyn Network> = nets::from_config(config, shape.channels);
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
        for (spec, t) in &graph.states {
            exec.write(*t, &vec![spec.value; spec.numbers()])?;
        }
        let order = Order::new(config.train.seed, data.len());
        let numbers = batch.iter().product();
        Ok(Self {
            config,
            data,
            order,
            graph,
            exec,
            batch: vec![0.0; numbers],
            step: 0,
            weights_given: false,
        })
    }

    /// The complete settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The data set.
    pub fn data(&self) -> &dyn Dataset {
        &*self.data
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
        let states = read_tensors(&*self.exec, &[], &self.graph.states, Region::Weights)?;
        self.gradients(u32::MAX)?;
        let start = Instant::now();
        self.gradients(u32::MAX)?;
        let step_time = start.elapsed();
        for ((_, t), before) in self.graph.states.iter().zip(&states) {
            self.exec.write(*t, &before.data)?;
        }
        Ok(TrainPlan {
            parameters,
            arena_bytes: footprint.arena_bytes as u64,
            scratch_bytes: footprint.scratch_bytes as u64,
            data_bytes: self.data.summary().memory_bytes,
            checkpoint_bytes: (copies * parameters * 4) as u64,
            flops: 2 * footprint.multiply_adds,
            steps: self.steps().saturating_sub(self.step),
            step_time,
            device: self.exec.describe(),
        })
    }

    fn gradients(&mut self, step: u32) -> Result<f32> {
        self.exec.run(Draws { seed: self.config.train.seed, step, first_index: 0 })?;
        let mut loss = [0.0];
        self.exec.read(self.graph.loss, &mut loss)?;
        Ok(loss[0])
    }

    /// Makes one step; the batch's loss before it. A loss that is not finite is an error, and no weight has changed.
    pub fn step(&mut self) -> Result<f32> {
        let indices = self.order.batch(self.step, self.config.train.batch_size);
        for (index, picture) in indices.into_iter().zip(self.batch.chunks_mut(self.data.shape().values())) {
            self.data.read(index, picture)?;
        }
        self.exec.write(self.graph.x_0, &self.batch)?;
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

    /// A region's parameters with PyTorch's names and layouts; weights and their average with the network's states.
    pub fn tensors(&self, region: Region) -> Result<Vec<NamedTensor>> {
        read_tensors(&*self.exec, &self.graph.parameters, self.states_of(region), region)
    }

    fn set_tensors(&mut self, region: Region, tensors: &[NamedTensor], origin: &Path) -> Result<()> {
        let states = self.states_of(region).to_vec();
        load_tensors(&mut *self.exec, &self.graph.parameters, &states, &[region], tensors, origin)
    }

    /// The states that belong to a region's tensors: the optimizer has none, and the average shares the weights'.
    fn states_of(&self, region: Region) -> &[(StateSpec, Tensor)] {
        match region {
            Region::Weights | Region::Ema => &self.graph.states,
            _ => &[],
        }
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
