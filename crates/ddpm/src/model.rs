//! A network ready to run: for sampling ([`Model`]) and for training ([`TrainingGraph`]).

mod denoiser;

use crate::checkpoint::{NamedTensor, check_fits};
use crate::error::{Error, Result};
use crate::hardware::{DeviceChoice, Hardware};
use crate::nets::{Builder, Inputs, Mode, Network, ParameterSpec, StateSpec};
use crate::objective::Objective;
use crate::process::Prediction;
use crate::sampler::buffers::NUM_BUFFERS;
use crate::schedule::{Level, Schedule};
use ddpm_diffusion::vlb;
use ddpm_engine::ops::{
    Add, AddPerChannel, Affine, QSample, RandomNormal, RandomTimestep, Slice, VariationalBound, WeightedLoss,
};
use ddpm_engine::{BufferSpec, ComputeOptions, Device, Executor, Graph, PlanOptions, Region, Shape, Tensor};
use ddpm_engine_cpu::CpuDevice;
use ddpm_rng::Purpose;
use rayon::prelude::*;
use std::collections::HashMap;
use std::path::Path;

/// Number of parameters converted to the engine's layout in parallel.
const PARALLEL_CHUNK: usize = 16;

/// Refuses image sizes that a network does not support, and suggests sizes that it does.
pub fn check_size(net: &dyn Network, height: usize, width: usize) -> Result<()> {
    let factor = net.size_factor();
    if height.is_multiple_of(factor) && width.is_multiple_of(factor) && height > 0 && width > 0 {
        return Ok(());
    }
    let reason = format!(
        "the {} network downsamples images to 1/{factor} of their size, but {height}x{width} is not divisible by {factor}: \
         resize or pad them to {} (--size)",
        net.name(),
        crate::nets::fitting_sizes(height, width, factor)
    );
    Err(Error::Config { key: "data.size".to_owned(), reason })
}

/// All parameters and states as tensors with PyTorch's names, shapes and layouts; the parameters from `region`.
pub(crate) fn read_tensors(
    exec: &dyn Executor,
    parameters: &[ParameterSpec],
    states: &[(StateSpec, Tensor)],
    region: Region,
) -> Result<Vec<NamedTensor>> {
    let mut tensors = Vec::with_capacity(parameters.len() + states.len());
    // Memory for all parameters in the engine's layout, one after the other: fresh memory costs more than the copies.
    let mut engine = vec![0.0; parameters.iter().map(ParameterSpec::num_elements).max().unwrap_or(0)];
    for (i, spec) in parameters.iter().enumerate() {
        let engine = &mut engine[..spec.num_elements()];
        exec.read_parameter(region, i, engine)?;
        let data = spec.to_torch(engine);
        tensors.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    for (spec, t) in states {
        let mut data = vec![0.0; spec.num_elements()];
        exec.read(*t, &mut data)?;
        tensors.push(NamedTensor { name: spec.name.clone(), shape: spec.shape.clone(), data });
    }
    Ok(tensors)
}

/// Writes tensors in that format, in any order, to `regions`; `origin` names them in errors.
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
    // A few in parallel; all at once would double the memory.
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

/// The device that networks run on; the only place that chooses it.
///
/// # Errors
/// [`ddpm_engine::Error::Device`] for a GPU if this program was built without GPU support or the GPU cannot
/// be used.
pub(crate) fn device(hardware: Hardware) -> Result<Box<dyn Device>> {
    let cpu = || Box::new(CpuDevice { threads: hardware.threads });
    #[cfg(feature = "cuda")]
    {
        use ddpm_engine_cuda::{CudaDevice, library::Libraries, lower::CudaOptions};
        let libraries = if hardware.deterministic { Libraries::Never } else { Libraries::Timed };
        let options = CudaOptions { tf32: hardware.tf32, libraries, ..CudaOptions::default() };
        let gpu = |index| CudaDevice { index, options };
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
            let reason = "this program was built without NVIDIA GPU support: build it with --features cuda, or use --device cpu";
            let device = hardware.device.to_string();
            Err(ddpm_engine::Error::Device { device, reason: reason.to_owned() }.into())
        }
    }
}

/// The label of an unconditional image: it selects no row of the embedding, which gives zeros.
pub(crate) const NO_CLASS: f32 = -1.0;

/// Normal noise with standard deviation `size`, sampled by the graph.
fn random_normal(graph: &mut Graph, name: &str, shape: Shape, purpose: Purpose, size: f64) -> Result<Tensor> {
    let z = graph.add(name, RandomNormal { shape, purpose }, &[])?;
    Ok(graph.add(name, Affine { scale: size as f32, shift: 0.0 }, &[z])?)
}

/// Splits the network's output into the prediction and, if learned, the variance.
fn split_variance(graph: &mut Graph, net: &dyn Network, output: Tensor) -> Result<(Tensor, Option<Tensor>)> {
    if !net.learned_variance() {
        return Ok((output, None));
    }
    let len = net.channels();
    let prediction = graph.add("prediction", Slice { from: 0, len }, &[output])?;
    Ok((prediction, Some(graph.add("variance", Slice { from: len, len }, &[output])?)))
}

/// The source of a training step's noise and timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoiseSource {
    /// Sampled by the graph from the seed and step.
    Random,
    /// Inputs of the graph, for tests against other implementations.
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
    /// State that the network keeps between steps, with its tensors.
    pub states: Vec<(StateSpec, Tensor)>,
    /// The images, `[n, h, w, c]`.
    pub x_0: Tensor,
    /// The images' classes, `[n]`, if the network takes them.
    pub label: Option<Tensor>,
    /// The timesteps, `[n]`.
    pub t: Tensor,
    /// The noise, with the images' shape.
    pub eps: Tensor,
    /// The predicted noise, image or v, depending on the objective.
    pub prediction: Tensor,
    /// The learned variance, if the network has it.
    pub variance: Option<Tensor>,
    /// The loss, `[1]`.
    pub loss: Tensor,
}

impl TrainingGraph {
    /// `L_simple = || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2` (eq. 14)
    /// with its backward pass. The square is averaged over all elements of a batch of images `[n, h, w, c]`,
    /// so that the loss does not depend on the image size; a prediction of zero has loss 1.
    ///
    /// # Errors
    /// [`Error::Config`] for an image size that the network does not support.
    pub fn new(
        net: &dyn Network,
        schedule: &Schedule,
        shape: [usize; 4],
        draws: NoiseSource,
    ) -> Result<Self> {
        Self::with_objective(net, schedule, shape, draws, Objective::default())
    }

    /// Like [`new`](Self::new), with another objective: target, loss function, timestep weights and noise;
    /// also averaged over all elements. If the network learns the variance, T times the mean of the
    /// variational bound's terms is added, weighted; its gradient reaches only the variance.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
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
            NoiseSource::Random => {
                let steps = schedule.timesteps() as u32;
                let t = b.graph.add("t", RandomTimestep { n: shape[0], steps }, &[])?;
                let eps = RandomNormal { shape: shape.into(), purpose: Purpose::Noise };
                (t, b.graph.add("eps", eps, &[])?)
            }
        };
        // a x_0 + b eps, with a and b depending on the timestep.
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
            let offset =
                random_normal(&mut b.graph, "offset_noise", of_channels, purpose, objective.offset_noise)?;
            noise = b.graph.add("offset_noise", AddPerChannel, &[eps, offset])?;
            added = noise;
        }
        if objective.input_perturbation > 0.0 {
            let size = objective.input_perturbation;
            let purpose = Purpose::InputPerturbation;
            let perturbation =
                random_normal(&mut b.graph, "input_perturbation", shape.into(), purpose, size)?;
            added = b.graph.add("input_perturbation", Add, &[noise, perturbation])?;
        }
        let x_t = b.graph.add("x_t", mix(&|l| l.alpha, &|l| l.sigma), &[x_0, added, t])?;
        let target = match objective.prediction {
            Prediction::Eps => noise,
            Prediction::X0 => x_0,
            Prediction::V => b.graph.add("v", mix(&|l| -l.sigma, &|l| l.alpha), &[x_0, noise, t])?,
        };
        let label = net.classes().map(|_| b.graph.input("label", [shape[0]]));
        let output = net.build(&mut b, Inputs { x: x_t, t, label })?;
        let (prediction, variance) = split_variance(&mut b.graph, net, output)?;
        let mut loss = match objective.weights(schedule) {
            None => b.graph.add("loss", objective.loss, &[prediction, target])?,
            Some(weight) => {
                let op = WeightedLoss { loss: objective.loss, weight: weight.into() };
                b.graph.add("loss", op, &[prediction, target, t])?
            }
        };
        if let Some(v) = variance {
            let steps = vlb::steps(schedule, objective.prediction).into();
            let op = VariationalBound { steps, scale: objective.vlb_weight * schedule.timesteps() as f64 };
            let vlb = b.graph.add("vlb", op, &[prediction, v, x_0, x_t, t])?;
            loss = b.graph.add("hybrid", Add, &[loss, vlb])?;
        }
        let built = b.finish(output);
        let outputs: Vec<Tensor> = [prediction, loss].into_iter().chain(variance).collect();
        let mut graph = ddpm_engine::passes::fuse::fuse(built.graph, &outputs)?;
        let gradients = ddpm_engine::passes::autodiff::backward(&mut graph, loss)?;
        ddpm_engine::passes::recompute::recompute(&mut graph);
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

    /// Plan options for training.
    pub fn options(&self, ema: bool) -> PlanOptions {
        let outputs = [self.prediction, self.loss].into_iter().chain(self.variance).collect();
        PlanOptions { gradients: Some(self.gradients.clone()), ema, outputs, ..PlanOptions::default() }
    }
}

/// A network with weights for inference: predicts the noise `eps_theta`, or another prediction type.
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
    /// A network for batches `[n, h, w, c]`; its weights are zero until set. A number as `hardware` means the
    /// CPU with that many threads, 0 for all cores.
    pub fn new(net: &dyn Network, shape: [usize; 4], hardware: impl Into<Hardware>) -> Result<Self> {
        Self::with_compute_options(net, shape, hardware, ComputeOptions::default())
    }

    /// Like [`new`](Self::new), with other compute options.
    pub fn with_compute_options(
        net: &dyn Network,
        shape: [usize; 4],
        hardware: impl Into<Hardware>,
        compute: ComputeOptions,
    ) -> Result<Self> {
        Self::on(&*device(hardware.into())?, net, shape, compute)
    }

    /// Like [`with_compute_options`](Self::with_compute_options), on a given device.
    pub fn on(
        device: &dyn Device,
        net: &dyn Network,
        shape: [usize; 4],
        compute: ComputeOptions,
    ) -> Result<Self> {
        check_size(net, shape[1], shape[2])?;
        let mut b = Builder::new(Mode::Sampling);
        let x = b.graph.input("x_t", shape);
        let t = b.graph.input("t", [shape[0]]);
        let label = net.classes().map(|_| b.graph.input("label", [shape[0]]));
        let output = net.build(&mut b, Inputs { x, t, label })?;
        let (prediction, variance) = split_variance(&mut b.graph, net, output)?;
        let built = b.finish(output);
        let outputs: Vec<Tensor> = [prediction].into_iter().chain(variance).collect();
        let graph = ddpm_engine::passes::fuse::fuse(built.graph, &outputs)?;
        let sampler_buffers = Some(BufferSpec { count: NUM_BUFFERS, shape: shape.into() });
        let options = PlanOptions { outputs, compute, sampler_buffers, ..PlanOptions::default() };
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

    /// Sets the network's prediction type, noise by default.
    #[must_use]
    pub fn predicting(self, prediction: Prediction) -> Self {
        Self { predicts: prediction, ..self }
    }

    /// The network's parameters, in graph order.
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
    /// [`Error::Checkpoint`] for tensors that do not match the network.
    pub fn set_weights(&mut self, weights: &[NamedTensor], origin: &Path) -> Result<()> {
        load_tensors(&mut *self.exec, &self.parameters, &self.states, &[Region::Weights], weights, origin)
    }

    /// Sets all parameters and states to the initial values of training with this seed.
    pub fn init_weights(&mut self, seed: u64) -> Result<()> {
        for (i, spec) in self.parameters.iter().enumerate() {
            self.exec.write_parameter(Region::Weights, i, &spec.init(seed, i))?;
        }
        for (spec, t) in &self.states {
            self.exec.write(*t, &vec![spec.value; spec.num_elements()])?;
        }
        Ok(())
    }

    /// The shape of a batch, `[n, h, w, c]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The executor, for timing.
    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.exec
    }
}
