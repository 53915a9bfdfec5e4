//! Training steps: algorithm 1 of Ho et al. 2020 on a data set, without files.

mod plan;

pub use plan::{TrainPlan, outline};

use super::averages::Averages;
use super::checkpoint::{Checkpoint, Manifest, NamedTensor};
use super::config::{Config, DataFacts, OptimizerKind, Size};
use super::ema;
use super::rate::LearningRate;
use crate::data::loader::Loader;
use crate::data::{Dataset, ImageShape};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::{NO_CLASS, NoiseSource, TrainingGraph, check_size, device, load_tensors, read_tensors};
use crate::nets::{self, Network, StateSpec};
use crate::objective::Objective;
use crate::schedule::Schedule;
use ddpm_engine::rng::{Purpose, Stream};
use ddpm_engine::{AdamStep, Draws, Executor, PlanOptions, Region, StepOutcome, Tensor, clip_scale};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What a step tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the step's images, before the step.
    pub loss: f32,
    /// The learning rate.
    pub learning_rate: f64,
    /// L2 norm of all gradients together, before clipping.
    pub grad_norm: f64,
}

/// What is not finite, if not the loss.
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
    /// Steps made.
    step: u64,
    weights_given: bool,
    /// The micro-batch whose images were read ahead into the graph.
    ahead: Option<u32>,
    /// Whether a step ended in the middle of its updates: some weights are a step ahead of the others.
    torn: bool,
    stop: Arc<AtomicBool>,
}

/// The labels of a micro-batch for the network, some of them dropped (Ho, Salimans 2022, algorithm 1).
fn labels(labels: &[u32], dropout: f64, seed: u64, number: u32) -> Vec<f32> {
    let dropped = |i: usize| {
        let draw = Stream::new(seed, Purpose::LabelDropout, number, i as u32).uniforms().next();
        draw.is_some_and(|u| u < dropout)
    };
    labels.iter().enumerate().map(|(i, &l)| if dropped(i) { NO_CLASS } else { l as f32 }).collect()
}

/// The graph of a training before any memory is taken for it.
struct Prepared {
    config: Config,
    graph: TrainingGraph,
    options: PlanOptions,
}

impl Prepared {
    /// Completes the settings from the data and builds the graph.
    fn new(config: &Config, data: &dyn Dataset) -> Result<Self> {
        config.validate()?;
        let shape = data.shape();
        // Before the settings are completed, so that the error can name the sizes that would fit.
        let net: Box<dyn Network> = nets::from_config(config, shape.channels);
        check_size(&*net, shape.height, shape.width)?;
        if let Some(classes) = net.classes()
            && classes != data.classes().len()
        {
            let reason = match data.classes().len() {
                0 => format!("is {classes}, but the images have no classes; leave it unset (none)"),
                n => format!("is {classes}, but the images have {n} classes; give {n}"),
            };
            let key = format!("{}.num_class_embeds", config.network_section());
            return Err(Error::Config { key, reason });
        }
        Self::of(config, shape, data.len())
    }

    /// The same of `count` images of that shape, whatever their classes are.
    fn of(config: &Config, shape: ImageShape, count: usize) -> Result<Self> {
        let size = Size { height: shape.height, width: shape.width };
        let net: Box<dyn Network> = nets::from_config(config, shape.channels);
        let config = config.resolve(&DataFacts { count, size, channels: shape.channels })?;
        config.validate()?;
        let schedule = Schedule::from_config(&config.diffusion)?;
        let batch = [config.train.batch_size, shape.height, shape.width, shape.channels];
        let objective = Objective::from_config(&config);
        let graph = TrainingGraph::with_objective(&*net, &schedule, batch, NoiseSource::Drawn, objective)
            .map_err(|e| without_variance(e, batch))?;
        let accumulate = config.train.accumulate > 1;
        let arithmetic = config.train.arithmetic();
        // Nobody needs all gradients at once, but who adds them up.
        let fuse_optimizer = (!accumulate).then_some(graph.loss);
        let (ema, clip_norm) = (config.train.ema_decay > 0.0, config.train.clip_norm);
        let late_updates = true;
        let options = PlanOptions {
            accumulate,
            fuse_optimizer,
            late_updates,
            clip_norm,
            arithmetic,
            ..graph.options(ema)
        };
        Ok(Self { config, graph, options })
    }
}

/// What to do where batch normalization is left with one value per channel, instead of the node where it is.
fn without_variance(error: Error, [n, height, width, _]: [usize; 4]) -> Error {
    match error {
        Error::Engine(ddpm_engine::Error::Shape { operation: "batch_norm", .. }) if n == 1 => {
            let reason = format!(
                "is 1, and of one {height}x{width} image the deepest layers have a single value per channel, which has no \
                 variance for batch normalization: train with 2 images per step or more (--batch-size 2), or with larger \
                 images (--size {}x{})",
                2 * height,
                2 * width
            );
            Error::Config { key: "train.batch_size".to_owned(), reason }
        }
        other => other,
    }
}

/// Bytes that training with these settings on this data takes, without taking them: of the network with its optimizer,
/// and of the images.
///
/// # Errors
/// As [`Trainer::new`].
pub fn memory(config: &Config, data: Box<dyn Dataset>) -> Result<(u64, u64)> {
    let Prepared { config, graph, options } = Prepared::new(config, &*data)?;
    let parameters = graph.graph.parameter_count();
    let network = device(config.train.hardware())?.footprint(graph.graph, &options)?;
    let data: Arc<dyn Dataset> = Arc::from(data);
    let images = data.summary().memory_bytes;
    let ahead = Loader::new(data, config.train.seed, config.train.batch_size).memory();
    let averages = (config.train.ema_decays.len() + config.train.power_ema.len()) * parameters * 4;
    Ok(((network.arena_bytes + network.scratch_bytes + averages) as u64, images + ahead))
}

impl Trainer {
    /// Prepares to train from the start: settings are completed from the data, and the weights are drawn.
    pub fn new(config: &Config, data: Box<dyn Dataset>) -> Result<Self> {
        let Prepared { config, graph, options } = Prepared::new(config, &*data)?;
        let mut exec = device(config.train.hardware())?.executor(graph.graph.clone(), &options)?;
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
        let rate = LearningRate::new(&config.train);
        let mut averages = Averages::new(&config.train)?;
        averages.start(&*exec, &graph.parameters)?;
        let data: Arc<dyn Dataset> = Arc::from(data);
        let loader = Loader::new(data.clone(), config.train.seed, config.train.batch_size);
        let (step, weights_given, ahead, torn, stop) = (0, false, None, false, Arc::default());
        Ok(Self { config, data, loader, graph, exec, rate, averages, step, weights_given, ahead, torn, stop })
    }

    /// A flag that ends a [step](Self::step) in the middle, with [`Error::Interrupted`]: nothing has changed then, and the step can
    /// be made again. Where the executor cannot give up a step whose updates have begun, it is made whole.
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.exec.set_stop(stop.clone());
        self.loader.set_stop(stop.clone());
        self.stop = stop;
    }

    /// The complete settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The data set.
    pub fn data(&self) -> &dyn Dataset {
        &*self.data
    }

    /// The names of the classes that the network learns, by their numbers; none where it takes no classes.
    pub fn class_names(&self) -> &[String] {
        if self.graph.label.is_some() { self.data.classes() } else { &[] }
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

    /// The learning rate of the next step.
    pub fn learning_rate(&self) -> f64 {
        self.rate.at(self.step)
    }

    /// What rounds the results: the CPU's instruction set, or the GPU.
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

    /// Numbers in the network's parameters.
    pub fn num_parameters(&self) -> u64 {
        self.graph.graph.parameter_count() as u64
    }

    /// The executor, for timing reports.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.exec
    }

    fn has_ema(&self) -> bool {
        self.config.train.ema_decay > 0.0
    }

    /// Reads the images of a micro-batch, counted from the start of the run, into the graph.
    fn load(&mut self, number: u64) -> Result<()> {
        let batch = self.loader.batch(number)?;
        self.exec.write(self.graph.x_0, &batch.images)?;
        if let Some(label) = self.graph.label {
            let t = &self.config.train;
            self.exec.write(label, &labels(&batch.labels, t.label_dropout, t.seed, number as u32))?;
        }
        Ok(())
    }

    /// The draws of a micro-batch.
    fn draws(&self, number: u32) -> Draws {
        Draws { seed: self.config.train.seed, step: number, first_index: 0 }
    }

    /// The loss of the last run.
    fn loss(&self) -> Result<f32> {
        let mut loss = [0.0];
        self.exec.read(self.graph.loss, &mut loss)?;
        match loss[0].is_finite() {
            true => Ok(loss[0]),
            false => Err(self.not_finite("the loss")),
        }
    }

    fn not_finite(&self, what: &str) -> Error {
        let advice =
            "Train with a lower learning rate, and look for broken images in the data (ddpm data check)";
        Error::NotFinite { step: self.step + 1, what: what.to_owned(), advice: advice.to_owned() }
    }

    /// The number of a step's micro-batch `k`, counted from the start of the run; `None` beyond what can be counted to.
    fn number(&self, step: u64, k: u64) -> Option<u32> {
        let first = step.checked_mul(self.config.train.accumulate as u64)?;
        u32::try_from(first.checked_add(k)?).ok()
    }

    /// Reads the images of the step's micro-batch `k` into the graph, if they are not there; the number of the micro-batch.
    fn begin(&mut self, k: u64) -> Result<u32> {
        // Images and draws are those of this number: no two micro-batches share them.
        let number = self.number(self.step, k).ok_or_else(|| Error::Config {
            key: "train.steps".to_owned(),
            reason: format!("a run has at most {} micro-batches", u32::MAX),
        })?;
        if self.ahead.take() != Some(number) {
            self.load(u64::from(number))?;
        }
        Ok(number)
    }

    /// Reads the images of the next step, while this one goes on. If they cannot be read, the next step will say so.
    fn read_ahead(&mut self) {
        let next = self.number(self.step + 1, 0).filter(|_| self.step + 1 < self.steps());
        self.ahead = next.filter(|&number| self.load(u64::from(number)).is_ok());
    }

    /// The gradients of all micro-batches of the step, in the executor; the mean loss.
    fn all_gradients(&mut self) -> Result<f32> {
        let micro_batches = self.config.train.accumulate as u64;
        let mut total = 0.0;
        for k in 0..micro_batches {
            let number = self.begin(k)?;
            self.exec.run(self.draws(number))?;
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

    /// What the network keeps from run to run besides its weights.
    fn states(&self) -> Result<Vec<NamedTensor>> {
        read_tensors(&*self.exec, &[], &self.graph.states, Region::Weights)
    }

    /// Makes the gradients and moves the weights along them; loss and gradient norm of the step.
    fn learn(&mut self, learning_rate: f64) -> Result<(f32, f64)> {
        if self.exec.trains() {
            let adam = self.adam(learning_rate, 1.0);
            let number = self.begin(0)?;
            let draws = self.draws(number);
            let trained = match self.exec.begin_training(draws, &adam)? {
                true => {
                    self.read_ahead();
                    self.exec.end_training()?
                }
                false => self.exec.train(draws, &adam)?,
            };
            self.torn = matches!(trained, StepOutcome::Stopped { updated: 1.. });
            return match trained {
                StepOutcome::Whole { loss, gradient_norm } => Ok((loss, gradient_norm)),
                StepOutcome::Stopped { .. } => {
                    self.loss()?;
                    Err(self.not_finite(GRADIENTS))
                }
            };
        }
        let loss = self.all_gradients()?;
        let grad_norm = self.exec.gradient_norm()? / self.config.train.accumulate as f64;
        if !grad_norm.is_finite() {
            return Err(self.not_finite(GRADIENTS));
        }
        let mean = 1.0 / self.config.train.accumulate as f64;
        let scale = mean * clip_scale(self.config.train.clip_norm, grad_norm);
        self.exec.update(&self.adam(learning_rate, scale))?;
        Ok((loss, grad_norm))
    }

    /// The optimizer's numbers for the step, with gradients multiplied by `grad_scale`.
    fn adam(&self, learning_rate: f64, grad_scale: f64) -> AdamStep {
        let t = &self.config.train;
        AdamStep {
            lr: learning_rate,
            beta1: t.beta1,
            beta2: t.beta2,
            eps: t.adam_eps,
            weight_decay: t.weight_decay,
            decoupled: t.optimizer == OptimizerKind::AdamW,
            step: self.step + 1,
            ema_decay: ema::decay(t, self.step, self.config.images_per_step()),
            grad_scale,
        }
    }

    /// Refuses to go on from weights of which some are a step ahead.
    fn whole(&self) -> Result<()> {
        if self.torn { Err(self.not_finite(GRADIENTS)) } else { Ok(()) }
    }

    /// Makes one step. Images that cannot be read, a loss or a gradient that is not finite, and a [stop](Self::set_stop) are
    /// errors, and nothing has changed; but where weights are updated in the run
    /// ([`PlanOptions::fuse_optimizer`]) and a gradient is not finite behind some that were, there are no steps and no
    /// checkpoints any more, only the same error, until a checkpoint is [restored](Self::restore).
    pub fn step(&mut self) -> Result<StepReport> {
        self.whole()?;
        self.exec.snapshot_states()?;
        let learning_rate = self.rate.at(self.step);
        let (loss, grad_norm) = match self.learn(learning_rate) {
            Ok(both) => both,
            Err(error) => {
                // A device that is lost fails here again: what failed first is told.
                let _ = self.exec.restore_states();
                return Err(error);
            }
        };
        let images = self.config.images_per_step();
        self.averages.follow(&*self.exec, &self.graph.parameters, &self.config.train, self.step, images)?;
        self.rate.observe(f64::from(loss), self.ends_epoch(self.step));
        self.step += 1;
        Ok(StepReport { loss, learning_rate, grad_norm })
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
        self.averages.start(&*self.exec, &self.graph.parameters)?;
        self.weights_given = true;
        Ok(())
    }

    /// Whether it started from given weights.
    pub fn weights_given(&self) -> bool {
        self.weights_given
    }

    /// The averages besides the first, by name.
    fn averages(&self) -> Result<Vec<(String, Vec<NamedTensor>)>> {
        Ok(self.averages.tensors(&self.graph.parameters, &self.states()?))
    }

    /// The power-function averages, by name.
    pub(super) fn power_averages(&self) -> Result<Vec<(String, Vec<NamedTensor>)>> {
        Ok(self.averages()?.into_iter().filter(|(name, _)| Averages::is_power(name)).collect())
    }

    /// Everything that the rest of the training depends on. Refuses weights that are not finite, and those of a
    /// [step](Self::step) that ended in the middle of its updates.
    pub fn checkpoint(&self, loss: Option<f64>) -> Result<Checkpoint> {
        self.whole()?;
        // The tensors, and the largest file of them.
        let bytes = usize::try_from(self.plan().checkpoint_bytes).unwrap_or(usize::MAX);
        memory::available(bytes.saturating_mul(3) / 2)
            .map_err(|reason| memory::refused("a checkpoint", &reason))?;
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

    /// Takes up where a checkpoint was made; `origin` names it in errors.
    pub fn restore(&mut self, checkpoint: &Checkpoint, origin: &Path) -> Result<()> {
        self.ahead = None;
        self.set_tensors(Region::Weights, &checkpoint.weights, origin)?;
        // Weights from elsewhere have no optimizer's state: it begins as for a new training, at zero.
        if checkpoint.manifest.step > 0 || !checkpoint.exp_avg.is_empty() {
            self.set_tensors(Region::ExpAvg, &checkpoint.exp_avg, origin)?;
            self.set_tensors(Region::ExpAvgSq, &checkpoint.exp_avg_sq, origin)?;
        } else {
            for (i, spec) in self.graph.parameters.iter().enumerate() {
                let zeros = vec![0.0; spec.numbers()];
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
        (self.step, self.torn) = (step, false);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
