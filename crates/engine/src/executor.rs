//! What every executor of a plan can do. The CPU's is [`CpuExecutor`](crate::cpu::CpuExecutor).

use crate::error::{Error, Result};
use crate::graph::{Graph, Tensor};
use crate::plan::{Plan, PlanOptions, Region};
use crate::vectors::PlanVectors;
pub use ddpm_kernels::elementwise::AdamStep;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// What the random draws of a run depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draws {
    /// The seed.
    pub seed: u64,
    /// The training or sampling step; where gradients are accumulated, the run of the graph, counted through all steps.
    pub step: u32,
    /// Index of the batch's first image.
    pub first_index: u32,
}

/// Memory and arithmetic of a plan on an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Bytes of the threads' own scratch memory.
    pub scratch_bytes: usize,
    /// Multiply-adds of a run.
    pub multiply_adds: u64,
}

/// What came of a [training run](Executor::train).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepOutcome {
    /// Every weight was updated.
    Whole {
        /// The loss.
        loss: f32,
        /// The L2 norm of the gradients, before they were shortened.
        gradient_norm: f64,
    },
    /// No weight was moved from where the loss, or the squares of a gradient, were seen not to be finite.
    Stopped {
        /// Parameters that had been updated before.
        updated: usize,
    },
}

/// What gradients of that norm are multiplied by so that it is at most `max_norm` (0: any): as PyTorch's
/// `clip_grad_norm_`, small constant and all (Pascanu, Mikolov, Bengio 2013, algorithm 1).
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
    /// Runs.
    pub runs: u64,
    /// Time of all runs.
    pub time: Duration,
    /// Multiply-adds of one run.
    pub multiply_adds: u64,
    /// Bytes of its operands and results.
    pub bytes: u64,
}

impl NodeTime {
    /// Those of a graph's nodes, from how often each ran and how long in all.
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

/// Something that plans can run on.
pub trait Device {
    /// Plans a graph and takes the memory.
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>>;

    /// Whether it has memory apart from the host's, as GPUs have.
    fn has_own_memory(&self) -> bool {
        false
    }

    /// Memory and arithmetic of a plan, without taking the memory.
    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint>;
}

/// Runs a plan many times.
pub trait Executor: Send {
    /// What it runs on, for a person: "2 threads, avx512".
    fn describe(&self) -> String;

    /// The plan.
    fn plan(&self) -> &Plan;

    /// Memory and arithmetic.
    fn footprint(&self) -> Footprint;

    /// Writes a whole tensor.
    fn write(&mut self, t: Tensor, data: &[f32]) -> Result<()>;

    /// Reads a whole tensor.
    fn read(&self, t: Tensor, out: &mut [f32]) -> Result<()>;

    /// Writes parameter `i` of a region.
    fn write_parameter(&mut self, region: Region, i: usize, data: &[f32]) -> Result<()>;

    /// Reads parameter `i` of a region.
    fn read_parameter(&self, region: Region, i: usize, out: &mut [f32]) -> Result<()>;

    /// Runs all nodes once. Moves no weights.
    fn run(&mut self, draws: Draws) -> Result<()>;

    /// Whether [`train`](Self::train) may be called: the plan was made to [update in runs](PlanOptions::update_in_runs), or the
    /// executor to update behind them, which may shorten gradients as well.
    fn trains(&self) -> bool {
        self.plan().updates().is_some()
    }

    /// Runs all nodes once and moves the weights, as [`run`](Self::run), [`gradient_norm`](Self::gradient_norm) and
    /// [`update`](Self::update) together do, to the bit; gradients longer than the plan's
    /// [`clip_norm`](PlanOptions::clip_norm) are shortened by [`clip_scale`]. Only where it [may](Self::trains) be; plans that update in runs are not
    /// for the other two.
    fn train(&mut self, draws: Draws, step: &AdamStep) -> Result<StepOutcome> {
        let _ = (draws, step);
        Err(Error::Resources("the plan was not made to update weights within its runs".to_owned()))
    }

    /// Starts a training run that goes on by itself, and says so. Inputs may be written meanwhile, for the next run; weights have
    /// moved, and everything else may be called, once [`end_training`](Self::end_training) was. Where it says no, nothing was
    /// started: [`train`](Self::train) does all at once.
    fn begin_training(&mut self, draws: Draws, step: &AdamStep) -> Result<bool> {
        let _ = (draws, step);
        Ok(false)
    }

    /// Waits for the training run that was begun.
    fn end_training(&mut self) -> Result<StepOutcome> {
        Err(Error::Resources("no training run was begun".to_owned()))
    }

    /// A flag that asks [`run`](Self::run) and [`train`](Self::train) to end early, with [`Error::Interrupted`]: weights, their
    /// averages and the optimizer's state are as before then; [states](crate::graph::Kind::State) may have moved. A training run
    /// that has begun to update weights is made whole. Executors whose runs are short need not look at it.
    fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        let _ = stop;
    }

    /// Remembers the [states](crate::graph::Kind::State) of now.
    fn snapshot_states(&mut self) -> Result<()>;

    /// Brings back the states that were kept last.
    fn restore_states(&mut self) -> Result<()>;

    /// Adds the gradients of the last run to the sum of those before, or starts a new sum with them. Only for plans
    /// that [accumulate](PlanOptions::accumulate).
    fn accumulate(&mut self, start: bool) -> Result<()>;

    /// The L2 norm of the gradients of the last run, or of their sum where the plan accumulates.
    fn gradient_norm(&self) -> Result<f64>;

    /// Moves the weights along the gradients of the last run, or along their sum where the plan accumulates, and their
    /// average after them.
    fn update(&mut self, step: &AdamStep) -> Result<()>;

    /// The [vectors](PlanOptions::vectors) beside the plan, where they were asked for and it computes with them by itself: where
    /// tensors are not in the host's memory.
    fn vectors(&mut self) -> Option<&mut dyn PlanVectors> {
        None
    }

    /// Starts or stops taking the time of each node; starting forgets earlier times.
    fn set_profiling(&mut self, on: bool);

    /// Whether runs take longer while the time of each node is taken: then those whose whole time counts should not be profiled.
    fn profiling_slows(&self) -> bool {
        false
    }

    /// Times since profiling was started, in the plan's order.
    fn profile(&self) -> Vec<NodeTime>;

    /// Mean time of the updates in a profiled [training run](Self::train), with the norm of the gradients.
    fn update_time(&self) -> Duration {
        Duration::ZERO
    }
}
