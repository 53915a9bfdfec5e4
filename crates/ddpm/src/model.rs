//! A network ready to run: for sampling ([`Model`]) and for training ([`TrainingGraph`]).

use crate::bound;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::hardware::{DeviceChoice, Hardware};
use crate::nets::{Builder, Inputs, Mode, Network, ParameterSpec, StateSpec};
use crate::objective::Objective;
use crate::process::Prediction;
use crate::sampler::Resident;
use crate::sampler::vectors::{LABELS, VECTORS};
use crate::schedule::{Level, Schedule};
use crate::train::checkpoint::{NamedTensor, check_fits};
use ddpm_engine::ops::{
    Add, AddPerChannel, Affine, DrawTimestep, QSample, RandomNormal, Slice, VariationalBound, WeightedLoss,
};
use ddpm_engine::rng::Purpose;
use ddpm_engine::{
    BufferSpec, ComputeOptions, CpuDevice, Device, Draws, Executor, Graph, PlanOptions, PlanVectors, Region,
    Shape, Tensor, Vector, Vectors,
};
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;

/// Parameters that are brought to the engine's layout at once.
const PARALLEL_CHUNK: usize = 16;

/// Refuses images that a network cannot take, and says which size it would.
pub fn check_size(net: &dyn Network, height: usize, width: usize) -> Result<()> {
    let factor = net.size_factor();
    if height.is_multiple_of(factor) && width.is_multiple_of(factor) && height > 0 && width > 0 {
        return Ok(());
    }
    let reason = format!(
        "the {} network halves images down to 1/{factor} of their size, and {height}x{width} cannot be divided by {factor}: \
         resize or pad them to {} (--size)",
        net.name(),
        fitting_sizes(height, width, factor)
    );
    Err(Error::Config { key: "data.size".to_owned(), reason })
}

/// The sizes next to one that can be divided by `factor`, the nearest first: "32x32 or 36x36".
pub(crate) fn fitting_sizes(height: usize, width: usize, factor: usize) -> String {
    let below = [height, width].map(|s| (s / factor).max(1) * factor);
    let above = [height, width].map(|s| s.div_ceil(factor).max(1) * factor);
    let far = |to: [usize; 2]| to[0].abs_diff(height) + to[1].abs_diff(width);
    let (first, second) = if far(below) <= far(above) { (below, above) } else { (above, below) };
    match first == second {
        true => format!("{}x{}", first[0], first[1]),
        false => format!("{}x{} or {}x{}", first[0], first[1], second[0], second[1]),
    }
}

/// All parameters and states as tensors with PyTorch's names, shapes and layouts; the parameters from `region`.
pub(crate) fn read_tensors(
    exec: &dyn Executor,
    parameters: &[ParameterSpec],
    states: &[(StateSpec, Tensor)],
    region: Region,
) -> Result<Vec<NamedTensor>> {
    let mut tensors = Vec::with_capacity(parameters.len() + states.len());
    for (i, spec) in parameters.iter().enumerate() {
        let mut data = vec![0.0; spec.numbers()];
        exec.read_parameter(region, i, &mut data)?;
        let data = spec.to_torch(&data);
        tensors.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    for (spec, t) in states {
        let mut data = vec![0.0; spec.numbers()];
        exec.read(*t, &mut data)?;
        tensors.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    Ok(tensors)
}

/// Writes such tensors, in any order, into `regions`; `origin` names them in errors.
pub(crate) fn load_tensors(
    exec: &mut dyn Executor,
    parameters: &[ParameterSpec],
    states: &[(StateSpec, Tensor)],
    regions: &[Region],
    tensors: &[NamedTensor],
    origin: &Path,
) -> Result<()> {
    let of_parameters = parameters.iter().map(|p| (p.name.clone(), p.shape.clone()));
    let of_states = states.iter().map(|(s, _)| (s.name.clone(), s.shape.clone()));
    check_fits(&of_parameters.chain(of_states).collect::<Vec<_>>(), tensors, origin)?;
    let by_name: HashMap<&str, &NamedTensor> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    // A few side by side; all at once would take as much memory again.
    for (chunk, specs) in parameters.chunks(PARALLEL_CHUNK).enumerate() {
        let data = specs.par_iter().map(|spec| spec.from_torch(&by_name[spec.name.as_str()].data));
        for (i, data) in data.collect::<Vec<_>>().iter().enumerate() {
            for &region in regions {
                exec.write_parameter(region, chunk * PARALLEL_CHUNK + i, data)?;
            }
        }
    }
    for (spec, t) in states {
        exec.write(*t, &by_name[spec.name.as_str()].data)?;
    }
    Ok(())
}

/// What networks run on. The only place that chooses.
///
/// # Errors
/// [`ddpm_engine::Error::Device`] where a GPU is asked for and this program was not built for them, or none can be used.
pub(crate) fn device(hardware: Hardware) -> Result<Box<dyn Device>> {
    let cpu = || Box::new(CpuDevice { threads: hardware.threads });
    #[cfg(feature = "cuda")]
    {
        use ddpm_engine_cuda::{CudaDevice, library::Libraries, translate::Choices};
        let libraries = if hardware.deterministic { Libraries::Never } else { Libraries::Timed };
        let choices = Choices { tf32: hardware.tf32, libraries, ..Choices::default() };
        let gpu = |index| CudaDevice { index, choices };
        match hardware.device {
            DeviceChoice::Cpu => Ok(cpu()),
            DeviceChoice::Auto if gpu(0).check().is_err() => Ok(cpu()),
            DeviceChoice::Auto => Ok(Box::new(gpu(0))),
            DeviceChoice::Cuda(index) => {
                gpu(index).check()?;
                Ok(Box::new(gpu(index)))
            }
        }
    }
    #[cfg(not(feature = "cuda"))]
    match hardware.device {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(cpu()),
        DeviceChoice::Cuda(_) => {
            let reason = "this program was built without NVIDIA GPUs: build it with --features cuda, or use --device cpu";
            let device = hardware.device.to_string();
            Err(ddpm_engine::Error::Device { device, reason: reason.to_owned() }.into())
        }
    }
}

/// The label of an image whose class is not told: no row of the embedding, which gives zeros.
pub(crate) const NO_CLASS: f32 = -1.0;

/// Normal numbers of a size, drawn by the graph.
fn drawn(graph: &mut Graph, name: &str, shape: Shape, purpose: Purpose, size: f64) -> Result<Tensor> {
    let z = graph.add(name, RandomNormal { shape, purpose }, &[])?;
    Ok(graph.add(name, Affine { scale: size as f32, shift: 0.0 }, &[z])?)
}

/// What a network said of the images, and of the variance where it learns that.
fn halves(graph: &mut Graph, net: &dyn Network, output: Tensor) -> Result<(Tensor, Option<Tensor>)> {
    if !net.learned_variance() {
        return Ok((output, None));
    }
    let len = net.channels();
    let prediction = graph.add("prediction", Slice { from: 0, len }, &[output])?;
    Ok((prediction, Some(graph.add("variance", Slice { from: len, len }, &[output])?)))
}

/// Where a training step's noise and timesteps come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoiseSource {
    /// Drawn by the graph from the seed and the step.
    Drawn,
    /// Written from outside, for tests against other programs.
    Given,
}

/// The graph of one training step: algorithm 1 of Ho et al. 2020, without the optimizer's step.
pub struct TrainingGraph {
    /// Forward and backward pass.
    pub graph: Graph,
    /// The network's parameters, in the graph's order.
    pub parameters: Vec<ParameterSpec>,
    /// Their gradients.
    pub gradients: Vec<Tensor>,
    /// What the network keeps from step to step besides, each with its tensor.
    pub states: Vec<(StateSpec, Tensor)>,
    /// The images, `[n, h, w, c]`.
    pub x_0: Tensor,
    /// The images' classes, `[n]`, where the network takes them.
    pub label: Option<Tensor>,
    /// The timesteps, `[n]`.
    pub t: Tensor,
    /// The noise, of the images' shape.
    pub eps: Tensor,
    /// The predicted noise, or what the objective has for it.
    pub prediction: Tensor,
    /// What the network said of the variance, where it learns that.
    pub variance: Option<Tensor>,
    /// The loss, `[1]`.
    pub loss: Tensor,
}

impl TrainingGraph {
    /// `L_simple = || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2` (eq. 14) with its
    /// backward pass. The square is taken as the mean over all numbers of a batch of images `[n, h, w, c]`, so that
    /// the loss does not grow with the images; a prediction of zero has loss 1.
    ///
    /// # Errors
    /// [`Error::Config`] for images that the network cannot halve as often as it does.
    pub fn new(
        net: &dyn Network,
        schedule: &Schedule,
        shape: [usize; 4],
        draws: NoiseSource,
    ) -> Result<Self> {
        Self::with_objective(net, schedule, shape, draws, Objective::default())
    }

    /// As [`new`](Self::new), with another objective: another target, another loss in the place of the square, a weight for
    /// each timestep, other noise; also a mean over all numbers. Where the network learns the variance, T times the mean of the
    /// variational bound's terms is added, weighted, from which only the variance learns.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_objective(
        net: &dyn Network,
        schedule: &Schedule,
        shape: [usize; 4],
        draws: NoiseSource,
        objective: Objective,
    ) -> Result<Self> {
        check_size(net, shape[1], shape[2])?;
        let mut b = Builder::new(Mode::Training);
        let x_0 = b.graph.input("x_0", shape);
        let (t, eps) = match draws {
            NoiseSource::Given => (b.graph.input("t", [shape[0]]), b.graph.input("eps", shape)),
            NoiseSource::Drawn => {
                let steps = schedule.timesteps() as u32;
                let t = b.graph.add("t", DrawTimestep { n: shape[0], steps }, &[])?;
                let eps = RandomNormal { shape: shape.into(), purpose: Purpose::Noise };
                (t, b.graph.add("eps", eps, &[])?)
            }
        };
        // a x_0 + b eps, a and b by the timestep.
        let mix = |a: &dyn Fn(Level) -> f64, b: &dyn Fn(Level) -> f64| {
            let table = |f: &dyn Fn(Level) -> f64| {
                (0..schedule.timesteps()).map(|t| f(schedule.level(t as f64)) as f32).collect()
            };
            QSample { sqrt_alpha_bar: table(a), sqrt_one_minus_alpha_bar: table(b) }
        };
        let (mut noise, mut added) = (eps, eps);
        if objective.offset_noise > 0.0 {
            let of_channels = [shape[0], shape[3]].into();
            let purpose = Purpose::OffsetNoise;
            let offset = drawn(&mut b.graph, "offset_noise", of_channels, purpose, objective.offset_noise)?;
            noise = b.graph.add("offset_noise", AddPerChannel, &[eps, offset])?;
            added = noise;
        }
        if objective.input_perturbation > 0.0 {
            let size = objective.input_perturbation;
            let purpose = Purpose::InputPerturbation;
            let more = drawn(&mut b.graph, "input_perturbation", shape.into(), purpose, size)?;
            added = b.graph.add("input_perturbation", Add, &[noise, more])?;
        }
        let x_t = b.graph.add("x_t", mix(&|l| l.alpha, &|l| l.sigma), &[x_0, added, t])?;
        let target = match objective.prediction {
            Prediction::Eps => noise,
            Prediction::X0 => x_0,
            Prediction::V => b.graph.add("v", mix(&|l| -l.sigma, &|l| l.alpha), &[x_0, noise, t])?,
        };
        let label = net.classes().map(|_| b.graph.input("label", [shape[0]]));
        let output = net.build(&mut b, Inputs { x: x_t, t, label })?;
        let (prediction, variance) = halves(&mut b.graph, net, output)?;
        let mut loss = match objective.weights(schedule) {
            None => b.graph.add("loss", objective.loss, &[prediction, target])?,
            Some(weight) => {
                let op = WeightedLoss { loss: objective.loss, weight: weight.into() };
                b.graph.add("loss", op, &[prediction, target, t])?
            }
        };
        if let Some(v) = variance {
            let steps = bound::steps(schedule, objective.prediction).into();
            let op = VariationalBound { steps, scale: objective.vlb_weight * schedule.timesteps() as f64 };
            let vlb = b.graph.add("vlb", op, &[prediction, v, x_0, x_t, t])?;
            loss = b.graph.add("hybrid", Add, &[loss, vlb])?;
        }
        let built = b.finish(output);
        let keep: Vec<Tensor> = [prediction, loss].into_iter().chain(variance).collect();
        let mut graph = ddpm_engine::fuse::fuse(built.graph, &keep)?;
        let gradients = ddpm_engine::autodiff::backward(&mut graph, loss)?;
        ddpm_engine::recompute::recompute(&mut graph);
        let states = built.states.into_iter().zip(graph.states().to_vec()).collect();
        Ok(Self {
            graph,
            parameters: built.parameters,
            gradients,
            states,
            x_0,
            label,
            t,
            eps,
            prediction,
            variance,
            loss,
        })
    }

    /// What the plan must keep and train.
    pub fn options(&self, ema: bool) -> PlanOptions {
        let keep = [self.prediction, self.loss].into_iter().chain(self.variance).collect();
        PlanOptions { gradients: Some(self.gradients.clone()), ema, keep, ..PlanOptions::default() }
    }
}

/// A network with weights that predicts noise, `eps_theta`, or the like: the forward pass alone.
pub struct Model {
    exec: Box<dyn Executor>,
    parameters: Vec<ParameterSpec>,
    states: Vec<(StateSpec, Tensor)>,
    x: Tensor,
    label: Option<Tensor>,
    t: Tensor,
    prediction: Tensor,
    variance: Option<(Tensor, Vec<f32>)>,
    shape: [usize; 4],
    timesteps: Vec<f32>,
    predicts: Prediction,
}

impl Model {
    /// A network for batches `[n, h, w, c]`; its weights are zero until they are set. A number of threads as `hardware` is
    /// the CPU with so many, 0 all of its cores.
    pub fn new(net: &dyn Network, shape: [usize; 4], hardware: impl Into<Hardware>) -> Result<Self> {
        Self::with_arithmetic(net, shape, hardware, ComputeOptions::default())
    }

    /// As [`new`](Self::new), computing in another way.
    pub fn with_arithmetic(
        net: &dyn Network,
        shape: [usize; 4],
        hardware: impl Into<Hardware>,
        arithmetic: ComputeOptions,
    ) -> Result<Self> {
        Self::on(&*device(hardware.into())?, net, shape, arithmetic)
    }

    /// As [`with_arithmetic`](Self::with_arithmetic), on a device that is given.
    pub fn on(
        device: &dyn Device,
        net: &dyn Network,
        shape: [usize; 4],
        arithmetic: ComputeOptions,
    ) -> Result<Self> {
        check_size(net, shape[1], shape[2])?;
        let mut b = Builder::new(Mode::Sampling);
        let x = b.graph.input("x_t", shape);
        let t = b.graph.input("t", [shape[0]]);
        let label = net.classes().map(|_| b.graph.input("label", [shape[0]]));
        let output = net.build(&mut b, Inputs { x, t, label })?;
        let (prediction, variance) = halves(&mut b.graph, net, output)?;
        let built = b.finish(output);
        let keep: Vec<Tensor> = [prediction].into_iter().chain(variance).collect();
        let graph = ddpm_engine::fuse::fuse(built.graph, &keep)?;
        let vectors = Some(BufferSpec { count: VECTORS, shape: shape.into() });
        let options = PlanOptions { keep, arithmetic, vectors, ..PlanOptions::default() };
        let states = built.states.into_iter().zip(graph.states().to_vec()).collect();
        let exec = device.executor(graph, &options)?;
        Ok(Self {
            exec,
            parameters: built.parameters,
            states,
            x,
            label,
            t,
            prediction,
            variance: variance.map(|v| (v, vec![0.0; shape.iter().product()])),
            shape,
            timesteps: vec![0.0; shape[0]],
            predicts: Prediction::Eps,
        })
    }

    /// The same for a network that was trained to predict something else than noise.
    #[must_use]
    pub fn predicting(self, prediction: Prediction) -> Self {
        Self { predicts: prediction, ..self }
    }

    /// The network's parameters, in their order.
    pub fn parameters(&self) -> &[ParameterSpec] {
        &self.parameters
    }

    /// Sets parameter `i`, in the engine's layout.
    pub fn set_parameter(&mut self, i: usize, data: &[f32]) -> Result<()> {
        Ok(self.exec.write_parameter(Region::Weights, i, data)?)
    }

    /// Sets all parameters and states from tensors with PyTorch's names and layouts; `origin` names them in errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for tensors that are not this network's.
    pub fn set_weights(&mut self, weights: &[NamedTensor], origin: &Path) -> Result<()> {
        load_tensors(&mut *self.exec, &self.parameters, &self.states, &[Region::Weights], weights, origin)
    }

    /// Sets all parameters and states to what a training with this seed begins with.
    pub fn init_weights(&mut self, seed: u64) -> Result<()> {
        for (i, spec) in self.parameters.iter().enumerate() {
            self.exec.write_parameter(Region::Weights, i, &spec.init(seed, i))?;
        }
        for (spec, t) in &self.states {
            self.exec.write(*t, &vec![spec.value; spec.numbers()])?;
        }
        Ok(())
    }

    /// Sets the class of each image of the batch; `None` for an image whose class the network is not told.
    ///
    /// # Errors
    /// [`Error::Config`] for a network that takes no classes.
    pub fn set_labels(&mut self, labels: &[Option<u32>]) -> Result<()> {
        let t = self.label()?;
        Ok(self.exec.write(t, &label_numbers(labels))?)
    }

    /// Keeps classes beside the network in a device's memory, for [`select_labels`](Self::tell_labels).
    pub(crate) fn keep_labels(&mut self, labels: &[Option<u32>]) -> Result<()> {
        Ok(self.plan_vectors()?.write(LABELS, &label_numbers(labels))?)
    }

    /// Sets the class of each image to what was kept, or to none, without the host.
    pub(crate) fn select_labels(&mut self, told: bool) -> Result<()> {
        let t = self.label()?;
        let vectors = self.plan_vectors()?;
        let set = if told { vectors.give(t, LABELS) } else { vectors.fill(t, NO_CLASS) };
        Ok(set?)
    }

    /// The vectors beside the network, which only some devices have.
    pub(crate) fn plan_vectors(&mut self) -> Result<&mut dyn PlanVectors> {
        let missing = || ddpm_engine::Error::Resources("the device keeps no batches for samplers".to_owned());
        Ok(self.exec.vectors().ok_or_else(missing)?)
    }

    fn label(&self) -> Result<Tensor> {
        let reason = || "the network takes no classes".to_owned();
        self.label.ok_or_else(|| Error::Config { key: "class".to_owned(), reason: reason() })
    }

    /// `[n, h, w, c]` of a batch.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The executor, for timing.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.exec
    }
}

impl Denoiser for Model {
    fn batch(&self) -> usize {
        self.shape[0]
    }

    fn image_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    fn prediction(&self) -> Prediction {
        self.predicts
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        self.timesteps.fill(t as f32);
        self.exec.write(self.x, x_t)?;
        self.exec.write(self.t, &self.timesteps)?;
        self.exec.run(Draws::default())?;
        if let Some((v, numbers)) = &mut self.variance {
            self.exec.read(*v, numbers)?;
        }
        Ok(self.exec.read(self.prediction, output)?)
    }

    fn variance(&self) -> Option<&[f32]> {
        self.variance.as_ref().map(|(_, numbers)| numbers.as_slice())
    }

    fn resident(&mut self) -> Option<&mut dyn Resident> {
        if self.exec.vectors().is_some() { Some(self) } else { None }
    }
}

impl Resident for Model {
    fn vectors(&mut self) -> Result<&mut dyn Vectors> {
        Ok(self.plan_vectors()?)
    }

    fn predict_vector(&mut self, x_t: Vector, t: f64, output: Vector) -> Result<()> {
        let (of_x, of_t, prediction) = (self.x, self.t, self.prediction);
        let vectors = self.plan_vectors()?;
        vectors.give(of_x, x_t)?;
        vectors.fill(of_t, t as f32)?;
        self.exec.run(Draws::default())?;
        Ok(self.plan_vectors()?.take(output, prediction)?)
    }

    fn bring_variance(&mut self, to: Vector) -> Result<bool> {
        let Some((variance, _)) = self.variance else { return Ok(false) };
        self.plan_vectors()?.take(to, variance)?;
        Ok(true)
    }
}

fn label_numbers(labels: &[Option<u32>]) -> Vec<f32> {
    labels.iter().map(|l| l.map_or(NO_CLASS, |l| l as f32)).collect()
}
