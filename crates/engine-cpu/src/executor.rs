//! The CPU executor.
//!
//! Work is split by sizes alone, every task writes its own part, and partial sums are added in order, so results do
//! not depend on the number of threads. Runs allocate nothing except the few partial sums of the gradient norm.

use crate::kernel::{CHUNK, Kernel, KernelArgs};
use crate::lower::{accepts_bf16, lower};
use crate::scratch::{Aligned, Scratch, check_threads};
use ddpm_engine::graph::TensorKind;
use ddpm_engine::passes::bf16_storage::keep_in_bf16;
use ddpm_engine::plan::Workspace;
use ddpm_engine::{
    AdamStep, DType, Device, Error, Executor, Footprint, Graph, MatmulDtype, NodeTime, Plan, PlanOptions,
    Region, Result, RngKey, StepOutcome, Tensor,
};
use ddpm_kernels::{Isa, elementwise};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Maximum number of inputs and outputs of a node.
const MAX_INPUTS: usize = 8;
const MAX_OUTPUTS: usize = 4;

/// The CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuDevice {
    /// Number of threads; 0 means one per core.
    pub threads: usize,
}

impl Device for CpuDevice {
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>> {
        Ok(Box::new(CpuExecutor::new(graph, options, self.threads)?))
    }

    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint> {
        footprint(graph, options, self.threads)
    }
}

/// Runs a plan on the CPU.
pub struct CpuExecutor {
    plan: Plan,
    isa: Isa,
    kernels: Vec<Kernel>,
    arena: Aligned,
    scratch: Scratch,
    scratch_len: usize,
    pool: rayon::ThreadPool,
    new_weights: bool,
    profiling: bool,
    times: Vec<(u64, Duration)>,
    /// Number of profiled training runs, and the total time of their updates.
    updates: (u32, Duration),
    /// The squared norm of each gradient.
    squares: Vec<f64>,
    /// The snapshot of the states.
    states: Vec<Vec<f32>>,
}

impl CpuExecutor {
    /// Plans `graph` and allocates its memory. The instruction set is the fastest available, or the one that the environment
    /// forces; `threads` 0 means one per core.
    pub fn new(graph: Graph, options: &PlanOptions, threads: usize) -> Result<Self> {
        Self::with_isa(graph, options, threads, isa_from_env()?)
    }

    /// Like [`CpuExecutor::new`], with a given instruction set.
    pub fn with_isa(graph: Graph, options: &PlanOptions, threads: usize, isa: Isa) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(check_threads(threads)?)
            .thread_name(|i| format!("ddpm-{i}"))
            .build()
            .map_err(|e| Error::Resources(format!("cannot start threads: {e}")))?;
        let (plan, kernels) = prepare(graph, options, isa)?;
        let scratch_len = kernels.iter().map(|k| k.per_thread).max().unwrap_or(0);
        let scratch = Scratch::new(pool.current_num_threads(), scratch_len)?;
        let arena = Aligned::new(plan.arena_len())?;
        let times = vec![(0, Duration::ZERO); kernels.len()];
        let squares = vec![0.0; plan.graph().parameters().len()];
        let new_weights = true;
        Ok(Self {
            plan,
            isa,
            kernels,
            arena,
            scratch,
            scratch_len,
            pool,
            new_weights,
            profiling: false,
            times,
            updates: (0, Duration::ZERO),
            squares,
            states: Vec::new(),
        })
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn checked(&self, t: Tensor, given: usize) -> Result<Range<usize>> {
        let info = self.plan.graph().info(t);
        let range = self.plan.range(t);
        if info.ty.dtype != DType::F32 {
            return Err(Error::DType { node: info.name.clone(), executor: "CPU", dtype: info.ty.dtype });
        }
        if range.len() == given {
            return Ok(range);
        }
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: range.len(), given })
    }

    fn checked_parameter(&self, region: Region, i: usize, given: usize) -> Result<Range<usize>> {
        let range = self.plan.parameter(region, i).ok_or_else(|| {
            Error::Resources(format!(
                "the plan has no {region:?} for parameter {i}: it was not built for training with it"
            ))
        })?;
        if range.len() == given {
            return Ok(range);
        }
        let info = self.plan.graph().info(self.plan.graph().parameters()[i]);
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: range.len(), given })
    }

    /// The region of gradients that an update uses.
    fn update_gradients(&self) -> Result<Region> {
        let exists = |region| !self.plan.region(region).is_empty();
        if self.plan.updates().is_some() {
            return Err(Error::Resources("the plan has a fused optimizer: call train instead".to_owned()));
        }
        if !exists(Region::Gradients) && exists(Region::Weights) {
            return Err(Error::Resources(
                "the plan was built for inference: it has no gradients for training".to_owned(),
            ));
        }
        Ok(if exists(Region::GradientSum) { Region::GradientSum } else { Region::Gradients })
    }

    /// Runs all nodes, and the updates if `step` is given. Without it, a run ends early only on a stop request.
    fn run_nodes(&mut self, rng: RngKey, step: Option<&AdamStep>) -> Result<StepOutcome> {
        let Self { plan, isa, kernels, arena, scratch, pool, profiling, times, new_weights, .. } = self;
        let (updates, squares) = (&mut self.updates, &mut self.squares);
        let arena = arena.as_mut_slice();
        let mut updated = 0;
        scratch.begin();
        let applied = pool.install(|| {
            for (i, kernel) in kernels.iter().enumerate() {
                let start = profiling.then(Instant::now);
                run_node(plan, i, kernel, arena, scratch, *new_weights, rng);
                if scratch.stopped() {
                    return Err(Error::Interrupted);
                }
                if let Some(start) = start {
                    times[i].0 += 1;
                    times[i].1 += start.elapsed();
                }
                let (Some(all), Some(step)) = (plan.updates(), step) else { continue };
                let start = profiling.then(Instant::now);
                let after_node = &all.after_node[i];
                let loss = &arena[plan.range(all.loss)];
                if !after_node.is_empty() && updated == 0 && !loss.iter().all(|x| x.is_finite()) {
                    return Ok(false);
                }
                // All norms come before the first update: a step with deferred updates is applied entirely or not at all.
                for &p in after_node {
                    squares[p] = squared_norm(*isa, &arena[plan.range(all.gradients[p])]);
                }
                if after_node.iter().any(|&p| !squares[p].is_finite()) {
                    return Ok(false);
                }
                for &p in after_node {
                    let part = |region| plan.parameter(region, p).unwrap_or_default();
                    adam(*isa, step, arena, plan.range(all.gradients[p]), part);
                    updated += 1;
                    // A partial update cannot be undone.
                    scratch.forbid_stop();
                }
                updates.1 += start.map_or(Duration::ZERO, |start| start.elapsed());
            }
            Ok(true)
        })?;
        updates.0 += u32::from(*profiling && step.is_some());
        *new_weights = false;
        let loss = plan.updates().map_or(f32::NAN, |all| arena[plan.range(all.loss)][0]);
        Ok(if applied {
            StepOutcome::Applied { loss, gradient_norm: squares.iter().sum::<f64>().sqrt() }
        } else {
            StepOutcome::NonFinite { updated }
        })
    }
}

/// The squared norm of a gradient, summed in an order that depends on its length alone.
fn squared_norm(isa: Isa, gradient: &[f32]) -> f64 {
    // A parallel sum would not add in a fixed order.
    let parts: Vec<f64> = gradient.par_chunks(CHUNK).map(|g| elementwise::squared_norm(isa, g)).collect();
    parts.iter().sum()
}

/// One Adam step with `gradients` on the ranges that `part` gives for each region.
fn adam(
    isa: Isa,
    step: &AdamStep,
    arena: &mut [f32],
    gradients: Range<usize>,
    part: impl Fn(Region) -> Range<usize>,
) {
    let [weights, exp_avg, exp_avg_sq, ema] =
        [Region::Weights, Region::ExpAvg, Region::ExpAvgSq, Region::Ema].map(part);
    let [gradients, weights, exp_avg, exp_avg_sq, ema] = arena
        .get_disjoint_mut([gradients, weights, exp_avg, exp_avg_sq, ema])
        .expect("regions do not overlap");
    let chunks = (
        gradients.par_chunks(CHUNK),
        weights.par_chunks_mut(CHUNK),
        exp_avg.par_chunks_mut(CHUNK),
        exp_avg_sq.par_chunks_mut(CHUNK),
    );
    if ema.is_empty() {
        chunks.into_par_iter().for_each(|(g, w, m, v)| elementwise::adam(isa, step, g, w, m, v, &mut []));
    } else {
        (chunks.into_par_iter(), ema.par_chunks_mut(CHUNK))
            .into_par_iter()
            .for_each(|((g, w, m, v), e)| elementwise::adam(isa, step, g, w, m, v, e));
    }
}

/// The fastest instruction set available, or the one that the environment forces.
fn isa_from_env() -> Result<Isa> {
    Isa::from_env().map_err(|e| Error::Resources(e.to_string()))
}

/// Memory and multiply-adds of a plan, without allocating it.
fn footprint(graph: Graph, options: &PlanOptions, threads: usize) -> Result<Footprint> {
    let (plan, kernels) = prepare(graph, options, isa_from_env()?)?;
    let threads = if threads == 0 { rayon::current_num_threads() } else { threads };
    Ok(footprint_of(&plan, &kernels, threads))
}

fn footprint_of(plan: &Plan, kernels: &[Kernel], threads: usize) -> Footprint {
    Footprint {
        arena_bytes: plan.arena_len() * DType::F32.bytes(),
        scratch_bytes: threads * kernels.iter().map(|k| k.per_thread).max().unwrap_or(0) * DType::F32.bytes(),
        multiply_adds: plan.graph().multiply_adds(),
    }
}

/// The plan of a graph, and the kernel of each node.
fn prepare(mut graph: Graph, options: &PlanOptions, isa: Isa) -> Result<(Plan, Vec<Kernel>)> {
    if options.gradients.is_some() && options.compute.matmul_dtype == MatmulDtype::Bf16 {
        keep_in_bf16(&mut graph, &options.outputs, accepts_bf16);
    }
    let mut kernels = Vec::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        let fits = node.inputs.len() <= MAX_INPUTS && node.outputs.len() <= MAX_OUTPUTS;
        assert!(fits, "{}", node.name);
        kernels.push(lower(&graph, node, isa, options)?);
    }
    let workspaces: Vec<Workspace> = kernels.iter().map(|k| k.workspace).collect();
    Ok((Plan::new(graph, options, &workspaces), kernels))
}

impl Executor for CpuExecutor {
    fn describe(&self) -> String {
        let s = if self.threads() == 1 { "" } else { "s" };
        format!("{} thread{s}, {}", self.threads(), self.isa())
    }

    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn footprint(&self) -> Footprint {
        let scratch_bytes = self.threads() * self.scratch_len * DType::F32.bytes();
        Footprint { scratch_bytes, ..footprint_of(&self.plan, &self.kernels, self.threads()) }
    }

    fn write(&mut self, t: Tensor, data: &[f32]) -> Result<()> {
        let range = self.checked(t, data.len())?;
        self.new_weights |= matches!(self.plan.graph().info(t).kind, TensorKind::Parameter(_));
        self.arena.as_mut_slice()[range].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, t: Tensor, out: &mut [f32]) -> Result<()> {
        let range = self.checked(t, out.len())?;
        out.copy_from_slice(&self.arena.as_slice()[range]);
        Ok(())
    }

    fn write_parameter(&mut self, region: Region, i: usize, data: &[f32]) -> Result<()> {
        let range = self.checked_parameter(region, i, data.len())?;
        self.new_weights |= region == Region::Weights;
        self.arena.as_mut_slice()[range].copy_from_slice(data);
        Ok(())
    }

    fn read_parameter(&self, region: Region, i: usize, out: &mut [f32]) -> Result<()> {
        let range = self.checked_parameter(region, i, out.len())?;
        out.copy_from_slice(&self.arena.as_slice()[range]);
        Ok(())
    }

    fn run(&mut self, rng: RngKey) -> Result<()> {
        self.run_nodes(rng, None).map(drop)
    }

    fn train(&mut self, rng: RngKey, step: &AdamStep) -> Result<StepOutcome> {
        if self.plan.updates().is_none() {
            return Err(Error::Resources(
                "the plan was built without a fused optimizer: call run and update instead".to_owned(),
            ));
        }
        self.run_nodes(rng, Some(step))
    }

    fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.scratch.set_stop(stop);
    }

    fn snapshot_states(&mut self) -> Result<()> {
        let (plan, arena) = (&self.plan, self.arena.as_slice());
        self.states = plan.graph().states().iter().map(|&t| arena[plan.range(t)].to_vec()).collect();
        Ok(())
    }

    fn restore_states(&mut self) -> Result<()> {
        for (&t, state) in self.plan.graph().states().iter().zip(&self.states) {
            self.arena.as_mut_slice()[self.plan.range(t)].copy_from_slice(state);
        }
        Ok(())
    }

    fn accumulate(&mut self, start: bool) -> Result<()> {
        let (sum, last) = (self.plan.region(Region::GradientSum), self.plan.region(Region::Gradients));
        if sum.is_empty() && !self.plan.region(Region::Weights).is_empty() {
            return Err(Error::Resources("the plan was built without gradient accumulation".to_owned()));
        }
        let isa = self.isa;
        let [sum, last] =
            self.arena.as_mut_slice().get_disjoint_mut([sum, last]).expect("regions do not overlap");
        self.pool.install(|| {
            (sum.par_chunks_mut(CHUNK), last.par_chunks(CHUNK)).into_par_iter().for_each(|(sum, last)| {
                if start { sum.copy_from_slice(last) } else { elementwise::add_assign(isa, last, sum) }
            });
        });
        Ok(())
    }

    fn gradient_norm(&self) -> Result<f64> {
        let (region, arena) = (self.update_gradients()?, self.arena.as_slice());
        let of =
            |i| self.plan.parameter(region, i).map_or(0.0, |range| squared_norm(self.isa, &arena[range]));
        let parameters = 0..self.plan.graph().parameters().len();
        Ok(self.pool.install(|| parameters.map(of).sum::<f64>()).sqrt())
    }

    fn update(&mut self, step: &AdamStep) -> Result<()> {
        let region = self.update_gradients()?;
        let Self { plan, isa, arena, pool, .. } = self;
        let gradients = plan.region(region);
        pool.install(|| adam(*isa, step, arena.as_mut_slice(), gradients, |region| plan.region(region)));
        Ok(())
    }

    fn set_profiling(&mut self, on: bool) {
        self.profiling = on;
        if on {
            self.times.fill((0, Duration::ZERO));
            self.updates = (0, Duration::ZERO);
        }
    }

    fn profile(&self) -> Vec<NodeTime> {
        NodeTime::of_nodes(self.plan.graph(), &self.times)
    }

    fn update_time(&self) -> Duration {
        self.updates.1 / self.updates.0.max(1)
    }
}

/// Borrows a node's inputs, outputs and scratch memory from the arena and calls its kernel.
fn run_node(
    plan: &Plan,
    i: usize,
    kernel: &Kernel,
    arena: &mut [f32],
    scratch: &Scratch,
    new_weights: bool,
    rng: RngKey,
) {
    let node = &plan.graph().nodes()[i];
    if let Some(operand) = node.op.operation().in_place() {
        let (from, to) = (plan.range(node.inputs[operand]), plan.range(node.outputs[0]));
        if from != to {
            arena.copy_within(from, to.start);
        }
    }
    // Outputs, then the distinct inputs, then the two workspaces. The rest stay empty, which overlap nothing.
    const MAX_RANGES: usize = MAX_OUTPUTS + MAX_INPUTS + 2;
    let mut ranges: [Range<usize>; MAX_RANGES] = std::array::from_fn(|_| 0..0);
    let outputs_len = node.outputs.len();
    for (range, &t) in ranges.iter_mut().zip(&node.outputs) {
        *range = plan.range(t);
    }
    let mut used = outputs_len;
    let mut input_at = [MAX_RANGES; MAX_INPUTS]; // MAX_RANGES: shares an output's memory
    for (at, &t) in input_at.iter_mut().zip(&node.inputs) {
        let range = plan.range(t);
        *at = match ranges[..used].iter().position(|r| *r == range) {
            Some(same) if same < outputs_len => MAX_RANGES,
            Some(same) => same,
            None => {
                ranges[used] = range;
                used += 1;
                used - 1
            }
        };
    }
    ranges[MAX_RANGES - 2] = plan.scratch(i);
    ranges[MAX_RANGES - 1] = plan.cached(i);
    let mut slices = arena.get_disjoint_mut(ranges).expect("the plan gives every operand its own memory");
    let (slices, workspaces) = slices.split_at_mut(MAX_RANGES - 2);
    let [shared, cached] = workspaces else { unreachable!("there are two workspaces") };
    let (outputs, operands) = slices.split_at_mut(outputs_len);
    let empty: &[f32] = &[];
    let inputs: [&[f32]; MAX_INPUTS] =
        input_at.map(|at| if at == MAX_RANGES { empty } else { &*operands[at - outputs_len] });
    let inputs = &inputs[..node.inputs.len()];
    let mut args = KernelArgs { inputs, outputs, shared, cached, new_weights, scratch, rng };
    (kernel.run)(&mut args);
}
