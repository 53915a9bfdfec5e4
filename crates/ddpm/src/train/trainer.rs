//! Training steps: algorithm 1 of Ho et al. 2020 on a data set, without files.

use super::averages::Averages;
use super::checkpoint::{Checkpoint, Manifest, NamedTensor};
use super::config::{Config, DataFacts, OptimizerKind, Size};
use super::ema;
use super::rate::LearningRate;
use crate::data::Dataset;
use crate::data::loader::Loader;
use crate::error::{Error, Result};
use crate::model::{NO_CLASS, StepDraws, TrainingGraph, check_size, device, load_tensors, read_tensors};
use crate::nets::{self, Network, StateSpec};
use crate::objective::Objective;
use crate::schedule::Schedule;
use ddpm_engine::rng::{Purpose, Stream};
use ddpm_engine::{AdamStep, Draws, Executor, PlanOptions, Region, Tensor, TrainingRun, clip_scale};
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

/// What a step tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the step's pictures, before the step.
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
    /// The micro-batch whose pictures were read ahead into the graph.
    ahead: Option<u32>,
    /// Whether a step ended in the middle of its updates: some weights are a step ahead of the others.
    torn: bool,
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
        let size = Size { height: shape.height, width: shape.width };
        // Before the settings are completed, so that the error can name the sizes that would fit.
        let net: Box<dyn Network> = nets::from_config(config, shape.channels);
        check_size(&*net, shape.height, shape.width)?;
        if let Some(classes) = net.classes()
            && classes != data.classes().len()
        {
            let reason = match data.classes().len() {
                0 => format!("is {classes}, but the pictures have no classes; leave it unset (none)"),
                n => format!("is {classes}, but the pictures have {n} classes; give {n}"),
            };
            let key = format!("{}.num_class_embeds", config.network_section());
            return Err(Error::Config { key, reason });
        }
        let config = config.resolve(&DataFacts { count: data.len(), size, channels: shape.channels })?;
        config.validate()?;
        let schedule = Schedule::from_config(&config.diffusion)?;
        let batch = [config.train.batch_size, shape.height, shape.width, shape.channels];
        let objective = Objective::from_config(&config);
        let graph = TrainingGraph::with_objective(&*net, &schedule, batch, StepDraws::Drawn, objective)?;
        let accumulate = config.train.accumulate > 1;
        let arithmetic = config.train.arithmetic();
        // Nobody needs all gradients at once, but who adds them up.
        let update_in_runs = (!accumulate).then_some(graph.loss);
        let (ema, clip_norm) = (config.train.ema_decay > 0.0, config.train.clip_norm);
        let options = PlanOptions { accumulate, update_in_runs, clip_norm, arithmetic, ..graph.options(ema) };
        Ok(Self { config, graph, options })
    }
}

/// Bytes that training with these settings on this data takes, without taking them: of the network with its optimizer,
/// and of the pictures.
///
/// # Errors
/// As [`Trainer::new`].
pub fn memory(config: &Config, data: Box<dyn Dataset>) -> Result<(u64, u64)> {
    let Prepared { config, graph, options } = Prepared::new(config, &*data)?;
    let parameters = graph.graph.parameter_count();
    let network = device(config.train.hardware())?.footprint(graph.graph, &options)?;
    let data: Arc<dyn Dataset> = Arc::from(data);
    let pictures = data.summary().memory_bytes;
    let ahead = Loader::new(data, config.train.seed, config.train.batch_size).memory();
    let averages = (config.train.ema_decays.len() + config.train.power_ema.len()) * parameters * 4;
    Ok(((network.arena_bytes + network.scratch_bytes + averages) as u64, pictures + ahead))
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
        let (step, weights_given, ahead, torn) = (0, false, None, false);
        Ok(Self { config, data, loader, graph, exec, rate, averages, step, weights_given, ahead, torn })
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
        match device.split_once(" threads, ") {
            Some((_, isa)) => isa.to_owned(),
            None => device.split(',').next().unwrap_or_default().to_owned(),
        }
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
        let copies = if self.has_ema() { 4 } else { 3 } + self.averages.len();
        let averages = self.averages.len() * parameters * 4;
        self.exec.keep_states()?;
        let draws = self.draws(u32::MAX);
        // A run may go on when its call is back: a number that is read waits for it.
        let mut loss = [0.0];
        self.exec.run(draws)?;
        self.exec.read(self.graph.loss, &mut loss)?;
        let start = Instant::now();
        self.exec.run(draws)?;
        self.exec.read(self.graph.loss, &mut loss)?;
        let accumulate = self.config.train.accumulate;
        let step_time = start.elapsed().saturating_mul(u32::try_from(accumulate).unwrap_or(u32::MAX));
        self.exec.restore_states()?;
        Ok(TrainPlan {
            parameters,
            arena_bytes: (footprint.arena_bytes + averages) as u64,
            scratch_bytes: footprint.scratch_bytes as u64,
            data_bytes: self.data_memory(),
            checkpoint_bytes: (copies * parameters * 4) as u64,
            flops: 2 * footprint.multiply_adds * accumulate as u64,
            steps: self.steps().saturating_sub(self.step),
            step_time,
            device: self.exec.describe(),
        })
    }

    /// Reads the pictures of a micro-batch, counted from the start of the run, into the graph.
    fn load(&mut self, number: u64) -> Result<()> {
        let batch = self.loader.batch(number)?;
        self.exec.write(self.graph.x_0, &batch.pictures)?;
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
        Error::NotFinite { step: self.step, what: what.to_owned() }
    }

    /// The number of a step's micro-batch `k`, counted from the start of the run; `None` beyond what can be counted to.
    fn number(&self, step: u64, k: u64) -> Option<u32> {
        let first = step.checked_mul(self.config.train.accumulate as u64)?;
        u32::try_from(first.checked_add(k)?).ok()
    }

    /// Reads the pictures of the step's micro-batch `k` into the graph, if they are not there; the number of the micro-batch.
    fn begin(&mut self, k: u64) -> Result<u32> {
        // Pictures and draws are those of this number: no two micro-batches share them.
        let number = self.number(self.step, k).ok_or_else(|| Error::Config {
            key: "train.steps".to_owned(),
            reason: format!("a run has at most {} micro-batches", u32::MAX),
        })?;
        if self.ahead.take() != Some(number) {
            self.load(u64::from(number))?;
        }
        Ok(number)
    }

    /// Reads the pictures of the next step, while this one goes on. If they cannot be read, the next step will say so.
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

    /// Whether step `step` (from 0) reads the last picture of an epoch.
    fn ends_epoch(&self, step: u64) -> bool {
        let epochs = |steps: u64| {
            u128::from(steps) * self.config.pictures_per_step() as u128 / self.data.len().max(1) as u128
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
            self.torn = matches!(trained, TrainingRun::Stopped { updated: 1.. });
            return match trained {
                TrainingRun::Whole { loss, gradient_norm } => Ok((loss, gradient_norm)),
                TrainingRun::Stopped { .. } => {
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
            ema_decay: ema::decay(t, self.step, self.config.pictures_per_step()),
            grad_scale,
        }
    }

    /// Refuses to go on from weights of which some are a step ahead.
    fn whole(&self) -> Result<()> {
        if self.torn { Err(self.not_finite(GRADIENTS)) } else { Ok(()) }
    }

    /// Makes one step. Pictures that cannot be read, and a loss or a gradient that is not finite, are errors, and
    /// nothing has changed; but where weights are updated in the run
    /// ([`PlanOptions::update_in_runs`]) and a gradient is not finite behind some that were, there are no steps and no
    /// checkpoints any more, only the same error, until a checkpoint is [restored](Self::restore).
    pub fn step(&mut self) -> Result<StepReport> {
        self.whole()?;
        self.exec.keep_states()?;
        let learning_rate = self.rate.at(self.step);
        let (loss, grad_norm) = match self.learn(learning_rate) {
            Ok(both) => both,
            Err(error) => {
                // A device that is lost fails here again: what failed first is told.
                let _ = self.exec.restore_states();
                return Err(error);
            }
        };
        let pictures = self.config.pictures_per_step();
        self.averages.follow(&*self.exec, &self.graph.parameters, &self.config.train, self.step, pictures)?;
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
        let weights = self.tensors(Region::Weights)?;
        if let Some(broken) = weights.iter().find(|t| t.data.iter().any(|v| !v.is_finite())) {
            return Err(Error::NotFinite { step: self.step, what: format!("a number in {}", broken.name) });
        }
        let mut manifest = Manifest::new(self.step, &self.config, self.tensor_numbers(), loss);
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
mod tests {
    use super::*;
    use crate::data::digits::Digits;

    fn trainer(settings: &[(&str, &str)]) -> Trainer {
        let tiny = [
            ("attention.down_channels", "8, 16"),
            ("attention.mid_channels", "16, 8"),
            ("attention.down_sample", "true"),
            ("attention.num_heads", "2"),
            ("train.batch_size", "4"),
        ];
        let pairs: Vec<_> = tiny.iter().chain(settings).map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let config = Config::load(Some("digits"), None, &pairs).unwrap();
        Trainer::new(&config, Box::new(Digits::new(0, 16, 10).unwrap())).unwrap()
    }

    #[test]
    fn gradients_are_shortened_to_the_norm_and_never_lengthened() {
        assert_eq!((clip_scale(0.0, 1e9), clip_scale(1.0, 0.5), clip_scale(1.0, 0.0)), (1.0, 1.0, 1.0));
        assert_eq!(clip_scale(1.0, 4.0), 1.0 / 4.000001);
    }

    #[test]
    fn labels_are_dropped_at_random_and_not_in_vain() {
        let all: Vec<u32> = (0..10_000).map(|i| i % 10).collect();
        let kept = |dropout, number| labels(&all, dropout, 1, number);
        assert!(kept(0.0, 0).iter().zip(&all).all(|(l, &label)| *l == label as f32));
        assert!(kept(1.0, 0).iter().all(|l| *l == NO_CLASS));
        let some = kept(0.1, 3);
        let dropped = some.iter().filter(|l| **l == NO_CLASS).count();
        // Four standard deviations of 10,000 draws.
        assert!(dropped.abs_diff(1000) < 120, "{dropped}");
        assert!(some == kept(0.1, 3) && some != kept(0.1, 4));
    }

    #[test]
    fn an_epoch_ends_with_the_step_that_reads_its_last_picture() {
        let ends = |accumulate: &str| {
            let trainer = trainer(&[("train.accumulate", accumulate)]);
            (0..6).map(|step| trainer.ends_epoch(step)).collect::<Vec<_>>()
        };
        // Ten pictures; 4, 8 or 12 a step.
        assert_eq!(ends("1"), [false, false, true, false, true, false]);
        assert_eq!(ends("2"), [false, true, true, true, true, false]);
        assert_eq!(ends("3"), [true; 6]);
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        // L1 grows no faster than the prediction: the loss is finite, squares of gradients are not.
        let mut trainer = trainer(&[("train.loss", "l1"), ("train.clip_norm", "1")]);
        let mut weights = trainer.tensors(Region::Weights).unwrap();
        let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
        last.data.iter_mut().for_each(|w| *w *= 1e25);
        trainer.set_weights(&weights, Path::new("large")).unwrap();
        let error = trainer.step().unwrap_err();
        assert!(
            matches!(&error, Error::NotFinite { step: 0, what } if what.contains("gradients")),
            "{error}"
        );
        assert_eq!((trainer.steps_done(), trainer.tensors(Region::Weights).unwrap()), (0, weights));
        assert!(trainer.tensors(Region::ExpAvg).unwrap().iter().all(|t| t.data.iter().all(|v| *v == 0.0)));
    }

    #[test]
    fn a_step_that_ends_in_the_middle_of_its_updates_is_the_last() {
        // As above, but each weight is updated when its gradient is there: those of the last layer are finite.
        let mut trainer = trainer(&[("train.loss", "l1")]);
        assert!(trainer.exec.plan().updates().is_some());
        trainer.step().unwrap();
        let good = trainer.checkpoint(None).unwrap();
        let mut weights = good.weights.clone();
        let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
        last.data.iter_mut().for_each(|w| *w *= 1e25);
        trainer.set_weights(&weights, Path::new("large")).unwrap();
        trainer.checkpoint(None).unwrap();
        let torn = |error: Error| match &error {
            Error::NotFinite { step: 1, what } if what.contains("gradients") => {
                assert!(error.to_string().contains("last good checkpoint is intact"), "{error}");
            }
            other => panic!("{other}"),
        };
        torn(trainer.step().unwrap_err());
        let now = trainer.tensors(Region::Weights).unwrap();
        assert!(now != weights && now.iter().zip(&weights).any(|(a, b)| a == b), "not in the middle");
        // No state of which a part is a step ahead is saved, or gone on from.
        torn(trainer.checkpoint(None).unwrap_err());
        torn(trainer.step().unwrap_err());
        assert_eq!(trainer.steps_done(), 1);

        trainer.restore(&good, Path::new("good")).unwrap();
        let mut other = self::trainer(&[("train.loss", "l1")]);
        other.step().unwrap();
        assert_eq!(trainer.step().unwrap(), other.step().unwrap());
        let (a, b) = (trainer.checkpoint(None).unwrap(), other.checkpoint(None).unwrap());
        assert!(a.weights == b.weights && a.exp_avg_sq == b.exp_avg_sq && a.ema == b.ema);
    }

    #[test]
    fn a_loss_that_is_not_finite_changes_nothing() {
        let mut trainer = trainer(&[]);
        let mut weights = trainer.tensors(Region::Weights).unwrap();
        let last = weights.iter_mut().find(|t| t.name == "conv_out.weight").unwrap();
        last.data.iter_mut().for_each(|w| *w *= 1e38);
        trainer.set_weights(&weights, Path::new("large")).unwrap();
        let error = trainer.step().unwrap_err();
        assert!(matches!(&error, Error::NotFinite { step: 0, what } if what == "the loss"), "{error}");
        assert_eq!(trainer.tensors(Region::Weights).unwrap(), weights);
        let checkpoint = trainer.checkpoint(None).unwrap();
        assert!(checkpoint.exp_avg.iter().all(|t| t.data.iter().all(|v| *v == 0.0)));
    }

    #[test]
    fn averages_over_all_steps_are_not_begun_in_the_middle() {
        let mut plain = trainer(&[]);
        let with = |added: &str| trainer(&[("train.power_ema", added), ("train.ema_decays", "0.5")]);
        let first = plain.checkpoint(None).unwrap();
        with("0.05").restore(&first, Path::new("first")).unwrap();
        plain.step().unwrap();
        let later = plain.checkpoint(None).unwrap();
        let error = with("0.05").restore(&later, Path::new("later")).unwrap_err().to_string();
        for part in ["train.power_ema: 0.05 is not kept in later", "1 of which are over", "--init"] {
            assert!(error.contains(part), "{error}");
        }
        // Decays forget their beginning.
        with("").restore(&later, Path::new("later")).unwrap();
    }

    #[test]
    fn every_average_follows_the_weights_by_its_own_decay() {
        let settings = [
            ("train.ema", "fixed"),
            ("train.ema_decay", "0.5"),
            ("train.ema_decays", "0.5, 0.9"),
            ("train.power_ema", "0.05, 0.2"),
        ];
        let mut trainer = trainer(&settings);
        let flat = |tensors: &[NamedTensor]| -> Vec<f64> {
            tensors.iter().flat_map(|t| &t.data).map(|x| f64::from(*x)).collect()
        };
        let mut weights = vec![flat(&trainer.tensors(Region::Weights).unwrap())];
        for _ in 0..4 {
            trainer.step().unwrap();
            weights.push(flat(&trainer.tensors(Region::Weights).unwrap()));
        }
        let checkpoint = trainer.checkpoint(None).unwrap();
        let names: Vec<&str> = checkpoint.averages.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["ema-0.5", "ema-0.9", "power-0.05", "power-0.2"]);
        let want = |keeps: &dyn Fn(i32) -> f64| {
            let mut average = weights[0].clone();
            for (t, weights) in (1..).zip(&weights[1..]) {
                average.iter_mut().zip(weights).for_each(|(a, w)| *a = keeps(t) * *a + (1.0 - keeps(t)) * w);
            }
            average
        };
        // gamma of a relative width, from the root of its cubic (Karras et al. 2024, appendix C).
        let power = |width: f64| {
            let cubic = |g: f64| ((g + 7.0) * g + 16.0 - width.powi(-2)) * g + 12.0 - width.powi(-2);
            let (mut low, mut high) = (0.0, 100.0);
            for _ in 0..100 {
                let middle = 0.5 * (low + high);
                if cubic(middle) < 0.0 { low = middle } else { high = middle }
            }
            low
        };
        let of_power = |width: f64, t: i32| (1.0 - 1.0 / f64::from(t)).powf(power(width) + 1.0);
        let wanted =
            [want(&|_| 0.5), want(&|_| 0.9), want(&|t| of_power(0.05, t)), want(&|t| of_power(0.2, t))];
        for ((name, got), want) in checkpoint.averages.iter().zip(&wanted) {
            let far = flat(got).iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            // Four roundings of numbers up to about 1.
            assert!(far < 5e-7, "{name}: {far}");
        }
        let far =
            flat(&checkpoint.ema).iter().zip(&wanted[0]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far < 5e-7, "the executor's: {far}");
    }
}
