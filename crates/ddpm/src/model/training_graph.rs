//! The graph of a training step.

use crate::error::Result;
use crate::nets::{Builder, Inputs, Mode, Network, ParameterSpec, StateSpec, check_size};
use crate::objective::Objective;
use crate::process::Prediction;
use crate::schedule::{Level, Schedule};
use ddpm_diffusion::vlb;
use ddpm_engine::ops::{
    Add, AddPerChannel, Affine, QSample, RandomNormal, RandomTimestep, Slice, VariationalBound, WeightedLoss,
};
use ddpm_engine::{Graph, PlanOptions, Shape, Tensor};
use ddpm_rng::Purpose;

/// The label of an unconditional image: it selects no row of the embedding, which gives zeros.
pub(crate) const NO_CLASS: f32 = -1.0;

/// Normal noise with standard deviation `size`, sampled by the graph.
fn random_normal(graph: &mut Graph, name: &str, shape: Shape, purpose: Purpose, size: f64) -> Result<Tensor> {
    let z = graph.add(name, RandomNormal { shape, purpose }, &[])?;
    Ok(graph.add(name, Affine { scale: size as f32, shift: 0.0 }, &[z])?)
}

/// The noise that the network shall predict, and the one added to the image: both `eps`, changed by offset noise and input
/// perturbation.
fn noises(
    graph: &mut Graph,
    objective: &Objective,
    shape: [usize; 4],
    eps: Tensor,
) -> Result<(Tensor, Tensor)> {
    let (mut noise, mut added) = (eps, eps);
    if objective.offset_noise > 0.0 {
        let of_channels = [shape[0], shape[3]].into();
        let offset =
            random_normal(graph, "offset_noise", of_channels, Purpose::OffsetNoise, objective.offset_noise)?;
        noise = graph.add("offset_noise", AddPerChannel, &[eps, offset])?;
        added = noise;
    }
    if objective.input_perturbation > 0.0 {
        let (size, purpose) = (objective.input_perturbation, Purpose::InputPerturbation);
        let perturbation = random_normal(graph, "input_perturbation", shape.into(), purpose, size)?;
        added = graph.add("input_perturbation", Add, &[noise, perturbation])?;
    }
    Ok((noise, added))
}

/// Splits the network's output into the prediction and, if learned, the variance.
pub(super) fn split_variance(
    graph: &mut Graph,
    net: &dyn Network,
    output: Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
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
    /// [`Error::Config`](crate::Error::Config) for an image size that the network does not support.
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
        let (noise, added) = noises(&mut b.graph, &objective, shape, eps)?;
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
