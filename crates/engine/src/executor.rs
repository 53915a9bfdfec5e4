//! The traits that every device and executor of plans implements.

use crate::error::{Error, Result};
use crate::graph::{Graph, Tensor};
use crate::plan::{Plan, PlanOptions, Region};
use crate::plan_buffers::PlanBuffers;
use crate::rng_key::RngKey;
pub use ddpm_kernels::elementwise::AdamStep;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Memory and multiply-adds of a plan on an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Bytes of per-thread scratch memory.
    pub scratch_bytes: usize,
    /// Multiply-adds of a run.
    pub multiply_adds: u64,
}

/// The outcome of a [training run](Executor::train).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepOutcome {
    /// Every weight was updated.
    Applied {
        /// The loss.
        loss: f32,
        /// The L2 norm of the gradients before clipping.
        gradient_norm: f64,
    },
    /// The loss, or the squared norm of a gradient, was not finite: no further weight was updated.
    NonFinite {
        /// Parameters that had already been updated.
        updated: usize,
    },
}

/// The factor that clips gradients with L2 norm `norm` to `max_norm` (0: no clipping), including the small constant of
/// PyTorch's `clip_grad_norm_` (Pascanu, Mikolov, Bengio 2013, algorithm 1).
pub fn clip_scale(max_norm: f64, norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Time of one node over the profiled runs.
#[derive(Clone, Debug)]
pub struct NodeTime {
    /// The node's name.
    pub name: String,
    /// The operation's name.
    pub operation: &'static str,
    /// Number of runs.
    pub runs: u64,
    /// Total time of all runs.
    pub time: Duration,
    /// Multiply-adds of one run.
    pub multiply_adds: u64,
    /// Bytes of its inputs and outputs.
    pub bytes: u64,
}

impl NodeTime {
    /// The times of a graph's nodes, given (runs, total time) of each.
    pub fn of_nodes(graph: &Graph, times: &[(u64, Duration)]) -> Vec<Self> {
        let nodes = graph.nodes().iter().zip(times);
        nodes
            .map(|(node, &(runs, time))| Self {
                name: node.name.clone(),
                operation: node.op.operation().name(),
                runs,
                time,
                multiply_adds: graph.node_multiply_adds(node),
                bytes: node
                    .inputs
                    .iter()
                    .chain(&node.outputs)
                    .map(|&t| (graph.shape(t).len() * graph.ty(t).dtype.bytes()) as u64)
                    .sum(),
            })
            .collect()
    }
}

/// A device that can run plans.
pub trait Device {
    /// Plans a graph and allocates its memory.
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>>;

    /// Whether it has its own memory, separate from the host's, as GPUs do.
    fn has_own_memory(&self) -> bool {
        false
    }

    /// Memory and multiply-adds of a plan, without allocating it.
    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint>;
}

/// Runs a plan repeatedly.
pub trait Executor: Send {
    /// Human-readable description of the device, such as "2 threads, avx512".
    fn describe(&self) -> String;

    /// The plan.
    fn plan(&self) -> &Plan;

    /// Memory and multiply-adds.
    fn footprint(&self) -> Footprint;

    /// Writes a whole tensor.
    fn write(&mut self, t: Tensor, data: &[f32]) -> Result<()>;

    /// Reads a whole tensor.
    fn read(&self, t: Tensor, out: &mut [f32]) -> Result<()>;

    /// Writes parameter `i` of a region.
    fn write_parameter(&mut self, region: Region, i: usize, data: &[f32]) -> Result<()>;

    /// Reads parameter `i` of a region.
    fn read_parameter(&self, region: Region, i: usize, out: &mut [f32]) -> Result<()>;

    /// Runs all nodes once, without updating weights.
    fn run(&mut self, rng: RngKey) -> Result<()>;

    /// Whether [`train`](Self::train) may be called: the plan [fuses the optimizer](PlanOptions::fuse_optimizer) into its runs, or the
    /// executor updates all weights after the last node, where it can clip gradients too.
    fn fuses_optimizer(&self) -> bool {
        self.plan().updates().is_some()
    }

    /// Runs all nodes once and updates the weights: bit for bit what [`run`](Self::run), [`gradient_norm`](Self::gradient_norm) and
    /// [`update`](Self::update) do together; gradients whose norm exceeds the plan's [`clip_norm`](PlanOptions::clip_norm) are scaled by
    /// [`clip_scale`]. Requires [`fuses_optimizer`](Self::fuses_optimizer); plans with a fused optimizer need not support `gradient_norm` and `update`.
    fn train(&mut self, rng: RngKey, step: &AdamStep) -> Result<StepOutcome> {
        let _ = (rng, step);
        Err(Error::Resources("the plan was built without a fused optimizer".to_owned()))
    }

    /// Starts an asynchronous training run and returns true. Until [`end_training`](Self::end_training), only inputs may be written,
    /// for the next run; the weights are updated once it returns. Returns false if the executor has no asynchronous runs: nothing was
    /// started, and [`train`](Self::train) is to be used.
    fn begin_training(&mut self, rng: RngKey, step: &AdamStep) -> Result<bool> {
        let _ = (rng, step);
        Ok(false)
    }

    /// Waits for the training run that [`begin_training`](Self::begin_training) started.
    fn end_training(&mut self) -> Result<StepOutcome> {
        Err(Error::Resources("end_training was called without begin_training".to_owned()))
    }

    /// Sets a flag that makes [`run`](Self::run) and [`train`](Self::train) end early with [`Error::Interrupted`]. Weights, their
    /// averages and the optimizer's state are then unchanged; [states](crate::graph::TensorKind::State) may have changed. A training run
    /// that has begun to update weights is completed. Executors with short runs may ignore the flag.
    fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        let _ = stop;
    }

    /// Takes a snapshot of the [states](crate::graph::TensorKind::State).
    fn snapshot_states(&mut self) -> Result<()>;

    /// Restores the states of the last snapshot.
    fn restore_states(&mut self) -> Result<()>;

    /// Adds the gradients of the last run to the accumulated sum, or, with `start`, starts a new sum with them. Only for plans
    /// that [accumulate](PlanOptions::accumulate).
    fn accumulate(&mut self, start: bool) -> Result<()>;

    /// The L2 norm of the gradients of the last run, or of the accumulated sum where the plan accumulates.
    fn gradient_norm(&self) -> Result<f64>;

    /// Updates the weights with the gradients of the last run, or with the accumulated sum where the plan accumulates, then the
    /// weights' moving average.
    fn update(&mut self, step: &AdamStep) -> Result<()>;

    /// The [sampler buffers](PlanOptions::sampler_buffers), if the plan has them and the executor computes on them itself, as those
    /// whose tensors are not in host memory do.
    fn sampler_buffers(&mut self) -> Option<&mut dyn PlanBuffers> {
        None
    }

    /// Starts or stops timing each node; starting discards earlier times.
    fn set_profiling(&mut self, on: bool);

    /// Whether profiling makes runs slower: if so, runs whose total time is measured should not be profiled.
    fn profiling_slows(&self) -> bool {
        false
    }

    /// Times since profiling started, in the plan's order.
    fn profile(&self) -> Vec<NodeTime>;

    /// Mean time of the updates in a profiled [training run](Self::train), including the gradient norm.
    fn update_time(&self) -> Duration {
        Duration::ZERO
    }
}
