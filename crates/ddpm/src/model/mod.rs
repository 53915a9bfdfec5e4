//! A network ready to run: for sampling ([`Model`]) and for training ([`TrainingGraph`]).

mod denoiser;
mod tensors;
mod training_graph;

pub(crate) use tensors::{load_tensors, read_tensors};
pub(crate) use training_graph::NO_CLASS;
pub use training_graph::{NoiseSource, TrainingGraph};

use crate::checkpoint::NamedTensor;
use crate::error::Result;
use crate::hardware::Hardware;
use crate::nets::{Builder, Inputs, Mode, Network, ParameterSpec, StateSpec, check_size};
use crate::process::Prediction;
use crate::sampler::buffers::NUM_BUFFERS;
use ddpm_engine::{BufferSpec, ComputeOptions, Device, Executor, PlanOptions, Region, Tensor};
use std::path::Path;
use training_graph::split_variance;

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
        Self::on(&*hardware.into().open()?, net, shape, compute)
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
    /// [`Error::Checkpoint`](crate::Error::Checkpoint) for tensors that do not match the network.
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
