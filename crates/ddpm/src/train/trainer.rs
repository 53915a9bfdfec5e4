//! Training steps: algorithm 1 of Ho et al. 2020 on a data set. Does not touch run folders.

mod plan;
mod prepare;

pub use plan::{TrainPlan, outline};
use prepare::Prepared;
pub use prepare::memory;

use super::averages::Averages;
use super::ema;
use crate::checkpoint::{Checkpoint, Manifest, NamedTensor};
use crate::config::{Config, OptimizerKind};
use crate::data::Dataset;
use crate::data::loader::Loader;
use crate::error::{Error, Result};
use crate::lr_schedule::LearningRate;
use crate::model::{NO_CLASS, TrainingGraph, load_tensors, read_tensors};
use crate::nets::StateSpec;
use crate::pipeline::Pipeline;
use ddpm_engine::{AdamStep, Executor, Region, RngKey, StepOutcome, Tensor, clip_scale};
use ddpm_rng::{Purpose, Stream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the step's images, before the update.
    pub loss: f32,
    /// The learning rate.
    pub learning_rate: f64,
    /// L2 norm of all gradients together, before clipping.
    pub grad_norm: f64,
}

/// Name of the gradient norm in errors about values that are not finite.
const GRADIENTS: &str = "the norm of the gradients";

/// A network, its optimizer and its data.
pub struct Trainer {
    config: Config,
    data: Arc<dyn Dataset>,
    loader: Loader,
    graph: TrainingGraph,
    exec: Box<dyn Executor>,
    rate: LearningRate,
    averages: Averages,
    /// Steps completed.
    step: u64,
    weights_given: bool,
    /// The micro-batch whose images were already copied into the graph.
    prefetched: Option<u32>,
    /// Whether a step failed in the middle of its updates, so that some weights are a step ahead of the others.
    partially_updated: bool,
    stop: Arc<AtomicBool>,
}

/// The class labels of a micro-batch, with label dropout (Ho and Salimans 2022, algorithm 1).
fn labels(labels: &[u32], dropout: f64, seed: u64, number: u32) -> Vec<f32> {
    let dropped = |i: usize| {
        let uniform = Stream::new(seed, Purpose::LabelDropout, number, i as u32).uniforms().next();
        uniform.is_some_and(|u| u < dropout)
    };
    labels.iter().enumerate().map(|(i, &l)| if dropped(i) { NO_CLASS } else { l as f32 }).collect()
}

impl Trainer {
    /// Prepares training from scratch: completes the settings with properties of the data and initializes the weights.
    pub fn new(config: &Config, data: Box<dyn Dataset>) -> Result<Self> {
        let Prepared { config, graph, options } = Prepared::new(config, &*data)?;
        let mut exec = config.compute.hardware().open()?.executor(graph.graph.clone(), &options)?;
        for (i, spec) in graph.parameters.iter().enumerate() {
            let weights = spec.init(config.train.seed, i);
            exec.write_parameter(Region::Weights, i, &weights)?;
            if config.ema.decay > 0.0 {
                exec.write_parameter(Region::Ema, i, &weights)?;
            }
        }
        for (spec, t) in &graph.states {
            exec.write(*t, &vec![spec.value; spec.num_elements()])?;
        }
        let rate = LearningRate::new(&config);
        let mut averages = Averages::new(&config.ema)?;
        averages.start(&*exec, &graph.parameters)?;
        let data: Arc<dyn Dataset> = Arc::from(data);
        let loader = Loader::new(data.clone(), config.train.seed, config.train.batch_size);
        let (step, weights_given, prefetched, partially_updated) = (0, false, None, false);
        let stop = Arc::default();
        Ok(Self {
            config,
            data,
            loader,
            graph,
            exec,
            rate,
            averages,
            step,
            weights_given,
            prefetched,
            partially_updated,
            stop,
        })
    }

    /// A flag that aborts a [step](Self::step) with [`Error::Interrupted`]; nothing has changed then, and the step can be
    /// repeated. If the executor cannot abort a step whose updates have begun, the step completes.
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.exec.set_stop(stop.clone());
        self.loader.set_stop(stop.clone());
        self.stop = stop;
    }

    /// The completed settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The data set.
    pub fn data(&self) -> &dyn Dataset {
        &*self.data
    }

    /// The names of the network's classes, by index; empty if it is unconditional.
    pub fn class_names(&self) -> &[String] {
        if self.graph.label.is_some() { self.data.classes() } else { &[] }
    }

    /// Bytes of the data set in memory and of the batches read ahead.
    pub fn data_memory(&self) -> u64 {
        self.data.summary().memory_bytes + self.loader.memory()
    }

    /// Steps completed so far.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Total number of steps.
    pub fn steps(&self) -> u64 {
        self.config.train.steps.unwrap_or(0)
    }

    /// The learning rate of the next step.
    pub fn learning_rate(&self) -> f64 {
        self.rate.at(self.step)
    }

    /// What determines the rounding of results: the CPU's instruction set, or the GPU.
    pub fn computed_by(&self) -> String {
        let device = self.exec.describe();
        match device.split_once(", ") {
            // "2 threads, avx2"
            Some((threads, isa)) if threads.ends_with(" thread") || threads.ends_with(" threads") => {
                isa.to_owned()
            }
            _ => device.split(',').next().unwrap_or_default().to_owned(),
        }
    }

    /// Number of parameters of the network.
    pub fn num_parameters(&self) -> u64 {
        self.graph.graph.parameter_count() as u64
    }

    /// The network as it is now, to sample from: with the averaged weights, or the raw ones without an average.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn pipeline(&self) -> Result<Pipeline> {
        let region = if self.has_ema() { Region::Ema } else { Region::Weights };
        let (weights, hardware) = (self.tensors(region)?, self.config.compute.hardware());
        let pipeline = Pipeline::new(&self.config, weights, Path::new("the network in training"), hardware)?;
        Ok(pipeline.with_class_names(self.data.classes().to_vec()))
    }

    /// The executor, for timing reports.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.exec
    }

    fn has_ema(&self) -> bool {
        self.config.ema.decay > 0.0
    }

    /// Copies the images and labels of a micro-batch, counted from the start of the run, into the graph.
    fn copy_batch(&mut self, number: u64) -> Result<()> {
        let batch = self.loader.batch(number)?;
        self.exec.write(self.graph.x_0, &batch.images)?;
        if let Some(label) = self.graph.label {
            let t = &self.config.train;
            self.exec.write(label, &labels(&batch.labels, t.label_dropout, t.seed, number as u32))?;
        }
        Ok(())
    }

    /// The random number key of a micro-batch.
    fn rng_key(&self, number: u32) -> RngKey {
        RngKey { seed: self.config.train.seed, step: number, first_index: 0 }
    }

    /// The loss of the last execution.
    fn loss(&self) -> Result<f32> {
        let mut loss = [0.0];
        self.exec.read(self.graph.loss, &mut loss)?;
        if loss[0].is_finite() { Ok(loss[0]) } else { Err(self.not_finite("the loss")) }
    }

    fn not_finite(&self, what: &str) -> Error {
        let advice =
            "Train with a lower learning rate, and check the data for broken images (ddpm data check)";
        Error::NotFinite { step: self.step + 1, what: what.to_owned(), advice: advice.to_owned() }
    }

    /// The number of a step's micro-batch `k`, counted from the start of the run; `None` on overflow.
    fn micro_batch_number(&self, step: u64, k: u64) -> Option<u32> {
        let first = step.checked_mul(self.config.train.accumulate as u64)?;
        u32::try_from(first.checked_add(k)?).ok()
    }

    /// Copies the images of the step's micro-batch `k` into the graph, unless prefetched; returns the micro-batch's number.
    fn load_micro_batch(&mut self, k: u64) -> Result<u32> {
        // The number determines images and random numbers: no two micro-batches share them.
        let number = self.micro_batch_number(self.step, k).ok_or_else(|| Error::Config {
            key: "train.steps".to_owned(),
            reason: format!("a run has at most {} micro-batches", u32::MAX),
        })?;
        if self.prefetched.take() != Some(number) {
            self.copy_batch(u64::from(number))?;
        }
        Ok(number)
    }

    /// Copies the images of the next step while this one is running. The next step reports any error.
    fn prefetch(&mut self) {
        let next = self.micro_batch_number(self.step + 1, 0).filter(|_| self.step + 1 < self.steps());
        self.prefetched = next.filter(|&number| self.copy_batch(u64::from(number)).is_ok());
    }

    /// Accumulates the gradients of the step's micro-batches in the executor; returns the mean loss.
    fn accumulate_gradients(&mut self) -> Result<f32> {
        let micro_batches = self.config.train.accumulate as u64;
        let mut total = 0.0;
        for k in 0..micro_batches {
            let number = self.load_micro_batch(k)?;
            self.exec.run(self.rng_key(number))?;
            let loss = self.loss()?;
            if micro_batches > 1 {
                self.exec.accumulate(k == 0)?;
            }
            total += f64::from(loss);
        }
        Ok((total / micro_batches as f64) as f32)
    }

    /// Whether step `step` (from 0) reads the last image of an epoch.
    fn ends_epoch(&self, step: u64) -> bool {
        let epochs = |steps: u64| {
            u128::from(steps) * self.config.images_per_step() as u128 / self.data.len().max(1) as u128
        };
        epochs(step + 1) > epochs(step)
    }

    /// The network's states besides its weights, such as running statistics.
    fn states(&self) -> Result<Vec<NamedTensor>> {
        read_tensors(&*self.exec, &[], &self.graph.states, Region::Weights)
    }

    /// Computes gradients and updates the weights; returns the loss and the gradient norm.
    fn optimizer_step(&mut self, learning_rate: f64) -> Result<(f32, f64)> {
        if self.exec.fuses_optimizer() {
            let adam = self.adam(learning_rate, 1.0);
            let number = self.load_micro_batch(0)?;
            let key = self.rng_key(number);
            let trained = if self.exec.begin_training(key, &adam)? {
                self.prefetch();
                self.exec.end_training()?
            } else {
                self.exec.train(key, &adam)?
            };
            self.partially_updated = matches!(trained, StepOutcome::NonFinite { updated: 1.. });
            return match trained {
                StepOutcome::Applied { loss, gradient_norm } => Ok((loss, gradient_norm)),
                StepOutcome::NonFinite { .. } => {
                    self.loss()?;
                    Err(self.not_finite(GRADIENTS))
                }
            };
        }
        let loss = self.accumulate_gradients()?;
        let grad_norm = self.exec.gradient_norm()? / self.config.train.accumulate as f64;
        if !grad_norm.is_finite() {
            return Err(self.not_finite(GRADIENTS));
        }
        let mean = 1.0 / self.config.train.accumulate as f64;
        let scale = mean * clip_scale(self.config.optimizer.clip_norm, grad_norm);
        self.exec.update(&self.adam(learning_rate, scale))?;
        Ok((loss, grad_norm))
    }

    /// The optimizer's parameters for the step, with gradients multiplied by `grad_scale`.
    fn adam(&self, learning_rate: f64, grad_scale: f64) -> AdamStep {
        let optimizer = &self.config.optimizer;
        AdamStep {
            lr: learning_rate,
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            decoupled: optimizer.name == OptimizerKind::AdamW,
            step: self.step + 1,
            ema_decay: ema::decay(&self.config.ema, self.step, self.config.images_per_step()),
            grad_scale,
        }
    }

    /// Fails if some weights are a step ahead of the others.
    fn check_consistent(&self) -> Result<()> {
        if self.partially_updated { Err(self.not_finite(GRADIENTS)) } else { Ok(()) }
    }

    /// Takes one step. Unreadable images, a loss or gradient that is not finite, and a [stop](Self::set_stop) are errors
    /// that leave everything unchanged. The exception: if weights are updated during the backward pass
    /// ([`fuse_optimizer`](ddpm_engine::PlanOptions::fuse_optimizer)) and a gradient is not finite after some were
    /// updated, every further step and checkpoint fails with the same error until a checkpoint is
    /// [restored](Self::restore).
    pub fn step(&mut self) -> Result<StepReport> {
        self.check_consistent()?;
        self.exec.snapshot_states()?;
        let learning_rate = self.rate.at(self.step);
        let (loss, grad_norm) = match self.optimizer_step(learning_rate) {
            Ok(both) => both,
            Err(error) => {
                // A lost device fails again here; report the first error.
                let _ = self.exec.restore_states();
                return Err(error);
            }
        };
        let images = self.config.images_per_step();
        self.averages.update(&*self.exec, &self.graph.parameters, &self.config.ema, self.step, images)?;
        self.rate.observe(f64::from(loss), self.ends_epoch(self.step));
        self.step += 1;
        Ok(StepReport { loss, learning_rate, grad_norm })
    }

    /// A region's parameters with PyTorch's names and layouts; weights and their average include the network's states.
    pub fn tensors(&self, region: Region) -> Result<Vec<NamedTensor>> {
        read_tensors(&*self.exec, &self.graph.parameters, self.states_of(region), region)
    }

    fn set_tensors(&mut self, region: Region, tensors: &[NamedTensor], origin: &Path) -> Result<()> {
        let states = self.states_of(region).to_vec();
        load_tensors(&mut *self.exec, &self.graph.parameters, &states, &[region], tensors, origin)
    }

    /// The states that belong to a region's tensors: the optimizer has none, and the average shares those of the weights.
    fn states_of(&self, region: Region) -> &[(StateSpec, Tensor)] {
        match region {
            Region::Weights | Region::Ema => &self.graph.states,
            _ => &[],
        }
    }

    /// Starts from given weights instead of random ones; `origin` names them in errors.
    pub fn set_weights(&mut self, weights: &[NamedTensor], origin: &Path) -> Result<()> {
        self.set_tensors(Region::Weights, weights, origin)?;
        if self.has_ema() {
            self.set_tensors(Region::Ema, weights, origin)?;
        }
        self.averages.start(&*self.exec, &self.graph.parameters)?;
        self.weights_given = true;
        Ok(())
    }

    /// Whether training started from given weights.
    pub fn weights_given(&self) -> bool {
        self.weights_given
    }

    /// The additional averages, by name.
    fn averages(&self) -> Result<Vec<(String, Vec<NamedTensor>)>> {
        Ok(self.averages.tensors(&self.graph.parameters, &self.states()?))
    }

    /// The power-function averages, by name.
    pub(super) fn power_averages(&self) -> Result<Vec<(String, Vec<NamedTensor>)>> {
        Ok(self.averages()?.into_iter().filter(|(name, _)| Averages::is_power(name)).collect())
    }

    /// Everything that the rest of the training depends on. Fails if weights are not finite, or if a
    /// [step](Self::step) failed in the middle of its updates.
    pub fn checkpoint(&self, loss: Option<f64>) -> Result<Checkpoint> {
        self.check_consistent()?;
        let bytes = usize::try_from(self.plan().checkpoint_bytes).unwrap_or(usize::MAX);
        ddpm_data::memory::check_available(bytes)
            .map_err(|reason| ddpm_data::memory::out_of_memory("a checkpoint", &reason))?;
        let weights = self.tensors(Region::Weights)?;
        if let Some(broken) = weights.iter().find(|t| t.data.iter().any(|v| !v.is_finite())) {
            return Err(self.not_finite(&format!("a value of {}", broken.name)));
        }
        let mut manifest = Manifest::new(self.step, &self.config, self.num_parameters(), loss);
        manifest.data = Some(self.data.summary().fingerprint.clone());
        manifest.images = Some(self.data.len() as u64);
        manifest.computed_by = Some(self.computed_by());
        manifest.classes = self.class_names().to_vec();
        manifest.plateau = self.rate.plateau();
        Ok(Checkpoint {
            manifest,
            weights,
            ema: if self.has_ema() { self.tensors(Region::Ema)? } else { Vec::new() },
            averages: self.averages()?,
            exp_avg: self.tensors(Region::ExpAvg)?,
            exp_avg_sq: self.tensors(Region::ExpAvgSq)?,
        })
    }

    /// Restores the state of a checkpoint; `origin` names it in errors.
    pub fn restore(&mut self, checkpoint: &Checkpoint, origin: &Path) -> Result<()> {
        self.prefetched = None;
        self.set_tensors(Region::Weights, &checkpoint.weights, origin)?;
        // Imported weights have no optimizer state: it starts at zero, as in a new training.
        if checkpoint.manifest.step > 0 || !checkpoint.exp_avg.is_empty() {
            self.set_tensors(Region::ExpAvg, &checkpoint.exp_avg, origin)?;
            self.set_tensors(Region::ExpAvgSq, &checkpoint.exp_avg_sq, origin)?;
        } else {
            for (i, spec) in self.graph.parameters.iter().enumerate() {
                let zeros = vec![0.0; spec.num_elements()];
                self.exec.write_parameter(Region::ExpAvg, i, &zeros)?;
                self.exec.write_parameter(Region::ExpAvgSq, i, &zeros)?;
            }
        }
        if self.has_ema() {
            let ema = if checkpoint.ema.is_empty() { &checkpoint.weights } else { &checkpoint.ema };
            self.set_tensors(Region::Ema, ema, origin)?;
        }
        let (step, averages) = (checkpoint.manifest.step, &checkpoint.averages);
        self.averages.restore(&*self.exec, &self.graph.parameters, step, averages, origin)?;
        let damaged = |reason| Error::Checkpoint { path: origin.to_owned(), reason };
        self.rate.restore(checkpoint.manifest.plateau).map_err(damaged)?;
        (self.step, self.partially_updated) = (step, false);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
