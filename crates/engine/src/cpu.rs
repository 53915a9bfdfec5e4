//! The CPU executor.
//!
//! Work is split by sizes alone, every task writes its own part, and partial sums are added in order: the result does
//! not depend on the number of threads. After the plan is made, nothing is allocated but the few
//! partial sums of the gradients' norm.

use crate::error::{Error, Result};
use crate::executor::{AdamStep, Device, Draws, Executor, Footprint, NodeTime, StepOutcome};
use crate::graph::{Graph, Kind, Tensor};
use crate::keep::keep_in_bf16;
use crate::plan::{ComputeOptions, MatmulDtype, Plan, PlanOptions, Region, Workspace};
pub use crate::scratch::Scratch;
use crate::scratch::{Aligned, threads_of};
use crate::shape::{DType, TensorType};
use ddpm_kernels::{Isa, elementwise};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// Numbers of a task of the operations that go number by number.
pub(crate) const CHUNK: usize = 1 << 15;
/// Most tensors that one node reads and makes.
const MOST_OPERANDS: usize = 8;
const MOST_RESULTS: usize = 4;

/// What kernels are prepared for.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    isa: Isa,
    arithmetic: ComputeOptions,
    fixed_weights: bool,
}

impl Cpu {
    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How results may be computed.
    pub fn arithmetic(&self) -> ComputeOptions {
        self.arithmetic
    }

    /// Whether the node's weights (its second operand) are parameters of a plan without training, so that what is made
    /// of them may be [kept](Run::kept).
    pub fn fixed_weights(&self) -> bool {
        self.fixed_weights
    }
}

/// The operands of a kernel call.
pub struct Run<'a> {
    /// The node's operands; one that shares memory with a result is empty.
    pub inputs: &'a [&'a [f32]],
    /// The node's results.
    pub outputs: &'a mut [&'a mut [f32]],
    /// Scratch memory that all threads see.
    pub shared: &'a mut [f32],
    /// Memory that nobody else writes to from run to run.
    pub kept: &'a mut [f32],
    /// Whether weights were written since the last run: what is kept must be made anew.
    pub new_weights: bool,
    /// Scratch memory of each thread.
    pub scratch: &'a Scratch,
    /// What random draws depend on.
    pub draws: Draws,
}

/// An operation's arithmetic, prepared for its shapes.
pub struct Kernel {
    run: Box<dyn Fn(&mut Run<'_>) + Send + Sync>,
    workspace: Workspace,
    per_thread: usize,
}

impl Kernel {
    /// A kernel without scratch memory.
    pub fn new(run: impl Fn(&mut Run<'_>) + Send + Sync + 'static) -> Self {
        Self { run: Box::new(run), workspace: Workspace::default(), per_thread: 0 }
    }

    /// Asks for scratch memory that all threads see.
    pub fn shared(mut self, shared: usize) -> Self {
        self.workspace.scratch = shared;
        self
    }

    /// Asks for memory that stays from run to run.
    pub fn kept(mut self, kept: usize) -> Self {
        self.workspace.kept = kept;
        self
    }

    /// Asks for scratch memory of each thread.
    pub fn per_thread(self, per_thread: usize) -> Self {
        Self { per_thread, ..self }
    }
}

/// The CPU's cores.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuDevice {
    /// Number of threads; 0 takes as many as there are cores.
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

/// Runs a plan on the CPU's cores.
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
    /// Training runs that were profiled, and the time of their updates.
    updates: (u32, Duration),
    /// The squares of each gradient, added up.
    squares: Vec<f64>,
    /// The states that were kept.
    states: Vec<Vec<f32>>,
}

impl CpuExecutor {
    /// Plans `graph` and takes the memory. The instruction set is the fastest, or the one that the environment forces;
    /// `threads` 0 takes as many as there are cores.
    pub fn new(graph: Graph, options: &PlanOptions, threads: usize) -> Result<Self> {
        Self::with_isa(graph, options, threads, Isa::from_env()?)
    }

    /// As [`CpuExecutor::new`], with a given instruction set.
    pub fn with_isa(graph: Graph, options: &PlanOptions, threads: usize, isa: Isa) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads_of(threads)?)
            .thread_name(|i| format!("ddpm-{i}"))
            .build()
            .map_err(|e| Error::Resources(format!("the threads cannot be started: {e}")))?;
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
        let place = self.plan.place(t);
        if info.ty.dtype != DType::F32 {
            return Err(Error::DType { node: info.name.clone(), executor: "CPU", dtype: info.ty.dtype });
        }
        if place.len() == given {
            return Ok(place);
        }
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: place.len(), given })
    }

    fn checked_parameter(&self, region: Region, i: usize, given: usize) -> Result<Range<usize>> {
        let place = self.plan.parameter(region, i).ok_or_else(|| {
            Error::Resources(format!(
                "the plan holds no {region:?} of parameter {i}: it was not made for training"
            ))
        })?;
        if place.len() == given {
            return Ok(place);
        }
        let info = self.plan.graph().info(self.plan.graph().parameters()[i]);
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: place.len(), given })
    }

    /// The region that an update follows.
    fn update_gradients(&self) -> Result<Region> {
        let there = |region| !self.plan.region(region).is_empty();
        if self.plan.updates().is_some() {
            return Err(Error::Resources("the plan was made to update weights within its runs".to_owned()));
        }
        if !there(Region::Gradients) && there(Region::Weights) {
            return Err(Error::Resources("the plan was not made for training".to_owned()));
        }
        Ok(if there(Region::GradientSum) { Region::GradientSum } else { Region::Gradients })
    }

    /// Runs all nodes, and the updates if a step is given. Without one it ends early only where it is asked to stop.
    fn run_nodes(&mut self, draws: Draws, step: Option<&AdamStep>) -> Result<StepOutcome> {
        let Self { plan, isa, kernels, arena, scratch, pool, profiling, times, new_weights, .. } = self;
        let (updates, squares) = (&mut self.updates, &mut self.squares);
        let arena = arena.as_mut_slice();
        let mut updated = 0;
        scratch.begin();
        let whole = pool.install(|| {
            for (i, kernel) in kernels.iter().enumerate() {
                let start = profiling.then(Instant::now);
                run_node(plan, i, kernel, arena, scratch, *new_weights, draws);
                if scratch.stopped() {
                    return Err(Error::Interrupted);
                }
                if let Some(start) = start {
                    times[i].0 += 1;
                    times[i].1 += start.elapsed();
                }
                let (Some(all), Some(step)) = (plan.updates(), step) else { continue };
                let start = profiling.then(Instant::now);
                let behind = &all.behind[i];
                let loss = &arena[plan.place(all.loss)];
                if !behind.is_empty() && updated == 0 && !loss.iter().all(|x| x.is_finite()) {
                    return Ok(false);
                }
                // Of all gradients before the first update: a step whose updates are all made here is made whole or not at all.
                for &p in behind {
                    squares[p] = squared_norm(*isa, &arena[plan.place(all.gradients[p])]);
                }
                if behind.iter().any(|&p| !squares[p].is_finite()) {
                    return Ok(false);
                }
                for &p in behind {
                    let part = |region| plan.parameter(region, p).unwrap_or_default();
                    adam(*isa, step, arena, plan.place(all.gradients[p]), part);
                    updated += 1;
                    // With some weights a step ahead there is no way back.
                    scratch.hold_on();
                }
                updates.1 += start.map_or(Duration::ZERO, |start| start.elapsed());
            }
            Ok(true)
        })?;
        updates.0 += u32::from(*profiling && step.is_some());
        *new_weights = false;
        let loss = plan.updates().map_or(f32::NAN, |all| arena[plan.place(all.loss)][0]);
        Ok(match whole {
            true => StepOutcome::Whole { loss, gradient_norm: squares.iter().sum::<f64>().sqrt() },
            false => StepOutcome::Stopped { updated },
        })
    }
}

/// The squares of a gradient, added up in an order that depends on its length alone.
fn squared_norm(isa: Isa, gradient: &[f32]) -> f64 {
    // Added in order, which a parallel sum is not.
    let parts: Vec<f64> = gradient.par_chunks(CHUNK).map(|g| elementwise::squared_norm(isa, g)).collect();
    parts.iter().sum()
}

/// Adam's step along `gradients` on the same parts of all regions, whose places `part` tells.
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

/// Memory and arithmetic of a plan, without taking the memory.
pub fn footprint(graph: Graph, options: &PlanOptions, threads: usize) -> Result<Footprint> {
    let (plan, kernels) = prepare(graph, options, Isa::from_env()?)?;
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

fn prepare(mut graph: Graph, options: &PlanOptions, isa: Isa) -> Result<(Plan, Vec<Kernel>)> {
    if options.gradients.is_some() && options.arithmetic.factors == MatmulDtype::Bf16 {
        keep_in_bf16(&mut graph, &options.keep);
    }
    let mut kernels = Vec::with_capacity(graph.nodes().len());
    for node in graph.nodes() {
        let types = |t: &[Tensor]| t.iter().map(|&t| graph.ty(t)).collect::<Vec<_>>();
        let (inputs, outputs) = (types(&node.inputs), types(&node.outputs));
        assert!(inputs.len() <= MOST_OPERANDS && outputs.len() <= MOST_RESULTS, "{}", node.name);
        let operation = node.op.operation();
        debug_assert!(operation.in_place().is_none_or(|i| !operation.takes_bf16(i)), "{}", node.name);
        let other = |i: usize, ty: &TensorType| ty.dtype != DType::F32 && !operation.takes_bf16(i);
        if let Some((_, ty)) = inputs.iter().enumerate().find(|&(i, ty)| other(i, ty)) {
            return Err(Error::DType { node: node.name.clone(), executor: "CPU", dtype: ty.dtype });
        }
        let parameter = |t: &Tensor| matches!(graph.info(*t).kind, Kind::Parameter(_));
        let fixed_weights = options.gradients.is_none() && node.inputs.get(1).is_some_and(parameter);
        let cpu = Cpu { isa, arithmetic: options.arithmetic, fixed_weights };
        kernels.push(operation.cpu(&cpu, &inputs, &outputs));
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
        let place = self.checked(t, data.len())?;
        self.new_weights |= matches!(self.plan.graph().info(t).kind, Kind::Parameter(_));
        self.arena.as_mut_slice()[place].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, t: Tensor, out: &mut [f32]) -> Result<()> {
        let place = self.checked(t, out.len())?;
        out.copy_from_slice(&self.arena.as_slice()[place]);
        Ok(())
    }

    fn write_parameter(&mut self, region: Region, i: usize, data: &[f32]) -> Result<()> {
        let place = self.checked_parameter(region, i, data.len())?;
        self.new_weights |= region == Region::Weights;
        self.arena.as_mut_slice()[place].copy_from_slice(data);
        Ok(())
    }

    fn read_parameter(&self, region: Region, i: usize, out: &mut [f32]) -> Result<()> {
        let place = self.checked_parameter(region, i, out.len())?;
        out.copy_from_slice(&self.arena.as_slice()[place]);
        Ok(())
    }

    fn run(&mut self, draws: Draws) -> Result<()> {
        self.run_nodes(draws, None).map(drop)
    }

    fn train(&mut self, draws: Draws, step: &AdamStep) -> Result<StepOutcome> {
        if self.plan.updates().is_none() {
            return Err(Error::Resources(
                "the plan was not made to update weights within its runs".to_owned(),
            ));
        }
        self.run_nodes(draws, Some(step))
    }

    fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.scratch.set_stop(stop);
    }

    fn snapshot_states(&mut self) -> Result<()> {
        let (plan, arena) = (&self.plan, self.arena.as_slice());
        self.states = plan.graph().states().iter().map(|&t| arena[plan.place(t)].to_vec()).collect();
        Ok(())
    }

    fn restore_states(&mut self) -> Result<()> {
        for (&t, state) in self.plan.graph().states().iter().zip(&self.states) {
            self.arena.as_mut_slice()[self.plan.place(t)].copy_from_slice(state);
        }
        Ok(())
    }

    fn accumulate(&mut self, start: bool) -> Result<()> {
        let (sum, last) = (self.plan.region(Region::GradientSum), self.plan.region(Region::Gradients));
        if sum.is_empty() && !self.plan.region(Region::Weights).is_empty() {
            return Err(Error::Resources("the plan was not made to add gradients up".to_owned()));
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
            |i| self.plan.parameter(region, i).map_or(0.0, |place| squared_norm(self.isa, &arena[place]));
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

/// Borrows a node's operands, results and scratch memory from the arena and calls its kernel.
fn run_node(
    plan: &Plan,
    i: usize,
    kernel: &Kernel,
    arena: &mut [f32],
    scratch: &Scratch,
    new_weights: bool,
    draws: Draws,
) {
    let node = &plan.graph().nodes()[i];
    if let Some(operand) = node.op.operation().in_place() {
        let (from, to) = (plan.place(node.inputs[operand]), plan.place(node.outputs[0]));
        if from != to {
            arena.copy_within(from, to.start);
        }
    }
    // Results, then the different operands, then the two workspaces; empty ranges fill up and overlap with nothing.
    const MOST: usize = MOST_RESULTS + MOST_OPERANDS + 2;
    let mut ranges: [Range<usize>; MOST] = std::array::from_fn(|_| 0..0);
    let results = node.outputs.len();
    for (range, &t) in ranges.iter_mut().zip(&node.outputs) {
        *range = plan.place(t);
    }
    let mut used = results;
    let mut operand_at = [MOST; MOST_OPERANDS]; // MOST: shares a result's memory
    for (at, &t) in operand_at.iter_mut().zip(&node.inputs) {
        let place = plan.place(t);
        *at = match ranges[..used].iter().position(|r| *r == place) {
            Some(same) if same < results => MOST,
            Some(same) => same,
            None => {
                ranges[used] = place;
                used += 1;
                used - 1
            }
        };
    }
    ranges[MOST - 2] = plan.scratch(i);
    ranges[MOST - 1] = plan.kept(i);
    let mut slices = arena.get_disjoint_mut(ranges).expect("the plan gives every operand its own place");
    let (slices, workspaces) = slices.split_at_mut(MOST - 2);
    let [shared, kept] = workspaces else { unreachable!("there are two workspaces") };
    let (outputs, operands) = slices.split_at_mut(results);
    let empty: &[f32] = &[];
    let inputs: [&[f32]; MOST_OPERANDS] =
        operand_at.map(|at| if at == MOST { empty } else { &*operands[at - results] });
    let inputs = &inputs[..node.inputs.len()];
    let mut run = Run { inputs, outputs, shared, kept, new_weights, scratch, draws };
    (kernel.run)(&mut run);
}
