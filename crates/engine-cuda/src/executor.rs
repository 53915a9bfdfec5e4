//! The executor: a plan laid out in one piece of GPU memory, and its kernel calls.
//!
//! The memory has the control block, the plan's constants, and the plan's arena with the places that the plan gives, as
//! on the CPU. All calls are made once, when the executor is; a run writes the control block and starts them, as one
//! graph where the GPU has graphs. So does a training run, in whose graph the gradients' norm, the look whether it and the
//! loss are finite, and the optimizer's step are too.

use crate::control;
use crate::gpu::{Arg, Gpu, Launch};
use crate::translate::{Choices, Constants, Place, translate};
use crate::vectors;
use ddpm_engine::graph::{Graph, Kind};
use ddpm_engine::plan::Workspace;
use ddpm_engine::{
    AdamStep, Draws, Error, Executor, Footprint, NodeTime, Plan, PlanOptions, PlanVectors, Region, Result,
    Tensor, TrainingRun,
};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Numbers whose squares are one part of the gradients' norm.
const PART: usize = 1 << 14;
/// Threads of a block, and most blocks, of the optimizer's kernels.
const THREADS: u32 = 256;
const MOST_BLOCKS: u32 = 4096;

/// A plan with its kernel calls, before a GPU is looked at.
struct Laid {
    plan: Plan,
    constants: Constants,
    /// The calls of each node.
    nodes: Vec<Vec<Launch<usize>>>,
    /// The loss of a plan whose weights are updated by its training runs.
    loss: Option<Tensor>,
    /// Where the arena begins, and where the parts of the gradients' norm do.
    arena: usize,
    parts: usize,
    vectors: vectors::Laid,
    bytes: usize,
}

impl Laid {
    fn new(graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Self> {
        let mut constants = Constants::default();
        let mut works = Vec::with_capacity(graph.nodes().len());
        for node in graph.nodes() {
            works.push(translate(&graph, node, options.arithmetic, choices, &mut constants)?);
        }
        let workspaces: Vec<Workspace> =
            works.iter().map(|w| Workspace { scratch: w.scratch, kept: 0 }).collect();
        // Weights are updated together, behind the nodes.
        let loss = options.update_in_runs.filter(|_| options.gradients.is_some());
        assert!(loss.is_none() || !options.accumulate, "sums of gradients are not updated within runs");
        let keep = options.keep.iter().copied().chain(loss).collect();
        let options = PlanOptions { update_in_runs: None, keep, ..options.clone() };
        let plan = Plan::new(graph, &options, &workspaces);
        let arena = (control::BYTES + constants.bytes().len()).next_multiple_of(256);
        let parts = (arena + plan.arena_len() * 4).next_multiple_of(256);
        let gradients = plan.region(Region::Gradients).len();
        let vectors = vectors::Laid::new(options.vectors, parts + gradients.div_ceil(PART) * 8 + 256)?;
        let bytes = vectors.end();
        if gradients > i32::MAX as usize {
            let reason = "more than 2^31 weights".to_owned();
            return Err(Error::Device { device: "cuda".to_owned(), reason });
        }
        let number = |at: usize| arena + at * 4;
        let nodes = works.iter().enumerate().map(|(i, work)| {
            let node = &plan.graph().nodes()[i];
            let place = |p: Place| match p {
                Place::Input(k) => number(plan.place(node.inputs[k]).start),
                Place::Output(k) => number(plan.place(node.outputs[k]).start),
                Place::Scratch(at) => number(plan.scratch(i).start + at),
                Place::Constant(at) => control::BYTES + at,
                Place::Control => 0,
            };
            work.launches.iter().map(|l| l.placed(place)).collect()
        });
        let nodes = nodes.collect();
        Ok(Self { plan, constants, nodes, loss, arena, parts, vectors, bytes })
    }

    fn byte(&self, number: usize) -> usize {
        self.arena + number * 4
    }

    /// The calls for the squared norm of these gradients.
    fn norm(&self, gradients: &Range<usize>) -> [Launch<usize>; 2] {
        let (n, count) = (gradients.len(), gradients.len().div_ceil(PART));
        let (x, parts) = (Arg::At(self.byte(gradients.start)), Arg::At(self.parts));
        [
            call("square_parts", count, vec![x, parts, int(n), int(PART)]),
            call("squared_norm", 1, vec![parts, int(count), Arg::At(0)]),
        ]
    }

    /// The call for the optimizer's step along these gradients.
    fn adam(&self, gradients: &Range<usize>) -> Launch<usize> {
        let (n, region) = (gradients.len(), |r| self.plan.region(r));
        let ema = region(Region::Ema);
        let places = [
            gradients.clone(),
            region(Region::Weights),
            region(Region::ExpAvg),
            region(Region::ExpAvgSq),
            ema.clone(),
        ];
        let mut args: Vec<Arg<usize>> = places.iter().map(|r| Arg::At(self.byte(r.start))).collect();
        args.extend([int(n), int(usize::from(!ema.is_empty())), Arg::At(0)]);
        call("adam", blocks(n), args)
    }

    /// The calls behind the nodes of a training run: none in a plan without.
    fn updates(&self) -> Vec<Launch<usize>> {
        let gradients = self.plan.region(Region::Gradients);
        let Some(loss) = self.loss.filter(|_| !gradients.is_empty()) else { return Vec::new() };
        let loss = Arg::At(self.byte(self.plan.place(loss).start));
        let mut calls = self.norm(&gradients).to_vec();
        calls.push(call("hold", 1, vec![loss, Arg::At(0)]));
        calls.push(self.adam(&gradients));
        calls
    }

    fn footprint(&self) -> Footprint {
        Footprint {
            arena_bytes: self.bytes,
            scratch_bytes: 0,
            multiply_adds: self.plan.graph().multiply_adds(),
        }
    }
}

/// Memory and arithmetic of a plan on a GPU; needs none.
///
/// # Errors
/// As [`GpuExecutor::new`], but for what the GPU itself says.
pub fn footprint(graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Footprint> {
    Ok(Laid::new(graph, options, choices)?.footprint())
}

/// Runs a plan on a GPU.
pub struct GpuExecutor<G> {
    gpu: G,
    laid: Laid,
    /// The calls behind the nodes of a training run.
    updates: Vec<Launch<usize>>,
    /// The graphs of a run and of a training run.
    graph: Option<usize>,
    training: Option<usize>,
    /// What the control block has, where that is known: a sampler's runs draw nothing, and are not told so again.
    told: Option<Draws>,
    profiling: bool,
    times: Vec<(u64, Duration)>,
    /// Training runs that were profiled, and the time of their updates.
    update_times: (u32, Duration),
}

impl<G: Gpu> GpuExecutor<G> {
    /// Plans `graph`, takes the memory and makes the kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an operation without a kernel, by name; [`Error::Resources`] without enough memory;
    /// [`Error::Device`] for what else the GPU says.
    pub fn new(mut gpu: G, graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Self> {
        let laid = Laid::new(graph, options, choices)?;
        let all: Vec<Launch<usize>> = laid.nodes.iter().flatten().cloned().collect();
        let mut kernels: Vec<&'static str> = all.iter().map(|l| l.kernel).collect();
        if options.gradients.is_some() {
            kernels.extend(["copy", "add", "square_parts", "squared_norm", "hold", "adam"]);
        }
        if laid.vectors.any() {
            kernels.extend(vectors::KERNELS);
        }
        kernels.sort_unstable();
        kernels.dedup();
        gpu.reserve(laid.bytes)?;
        gpu.prepare(&kernels)?;
        gpu.write(control::BYTES, laid.constants.bytes())?;
        let graph = gpu.record(&all)?;
        let updates = laid.updates();
        let training = match updates.is_empty() {
            true => None,
            false => gpu.record(&[&all[..], &updates].concat())?,
        };
        let times = vec![(0, Duration::ZERO); laid.nodes.len()];
        let update_times = (0, Duration::ZERO);
        let (told, profiling) = (None, false);
        Ok(Self { gpu, laid, updates, graph, training, told, profiling, times, update_times })
    }

    /// The kernel calls of each node, in the plan's order.
    pub fn launches(&self) -> &[Vec<Launch<usize>>] {
        &self.laid.nodes
    }

    fn byte(&self, number: usize) -> usize {
        self.laid.byte(number)
    }

    pub(crate) fn gpu(&self) -> &G {
        &self.gpu
    }

    pub(crate) fn vectors_laid(&self) -> vectors::Laid {
        self.laid.vectors
    }

    /// Where a tensor lies in the GPU's memory.
    pub(crate) fn tensor_bytes(&self, t: Tensor) -> Range<usize> {
        let place = self.laid.plan.place(t);
        self.byte(place.start)..self.byte(place.end)
    }

    fn checked(&self, t: Tensor, given: usize) -> Result<Range<usize>> {
        let info = self.laid.plan.graph().info(t);
        let place = self.laid.plan.place(t);
        if place.len() == given {
            return Ok(place);
        }
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: place.len(), given })
    }

    fn checked_parameter(&self, region: Region, i: usize, given: usize) -> Result<Range<usize>> {
        let plan = &self.laid.plan;
        let place = plan.parameter(region, i).ok_or_else(|| {
            Error::Resources(format!(
                "the plan holds no {region:?} of parameter {i}: it was not made for training"
            ))
        })?;
        if place.len() == given {
            return Ok(place);
        }
        let info = plan.graph().info(plan.graph().parameters()[i]);
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: place.len(), given })
    }

    /// The gradients that an update follows.
    fn update_gradients(&self) -> Result<Range<usize>> {
        let [sum, last, weights] =
            [Region::GradientSum, Region::Gradients, Region::Weights].map(|r| self.laid.plan.region(r));
        if last.is_empty() && !weights.is_empty() {
            return Err(Error::Resources("the plan was not made for training".to_owned()));
        }
        Ok(if sum.is_empty() { last } else { sum })
    }

    /// Starts all nodes one by one, and takes their times if that is asked for.
    fn run_nodes(&mut self) -> Result<()> {
        for (node, (runs, time)) in self.laid.nodes.iter().zip(&mut self.times) {
            let start = Instant::now();
            node.iter().try_for_each(|launch| self.gpu.launch(launch))?;
            if self.profiling {
                self.gpu.finish()?;
                *runs += 1;
                *time += start.elapsed();
            }
        }
        Ok(())
    }
}

/// A call of a kernel in one row of blocks.
fn call(kernel: &'static str, blocks: usize, args: Vec<Arg<usize>>) -> Launch<usize> {
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).max(1);
    Launch { kernel, grid: [blocks, 1, 1], block: [THREADS, 1, 1], args }
}

/// Blocks whose threads go over `count` numbers.
fn blocks(count: usize) -> usize {
    count.div_ceil(THREADS as usize).min(MOST_BLOCKS as usize)
}

/// A size as an argument; sizes were checked when the plan was laid out.
fn int(v: usize) -> Arg<usize> {
    Arg::Int(i32::try_from(v).unwrap_or(i32::MAX))
}

impl<G: Gpu> Executor for GpuExecutor<G> {
    fn describe(&self) -> String {
        self.gpu.describe()
    }

    fn plan(&self) -> &Plan {
        &self.laid.plan
    }

    fn footprint(&self) -> Footprint {
        self.laid.footprint()
    }

    fn write(&mut self, t: Tensor, data: &[f32]) -> Result<()> {
        let (place, data) = (self.checked(t, data.len())?, bytemuck::cast_slice(data));
        match self.laid.plan.graph().info(t).kind {
            Kind::Input => self.gpu.upload(self.byte(place.start), data),
            _ => self.gpu.write(self.byte(place.start), data),
        }
    }

    fn read(&self, t: Tensor, out: &mut [f32]) -> Result<()> {
        let place = self.checked(t, out.len())?;
        self.gpu.read(self.byte(place.start), bytemuck::cast_slice_mut(out))
    }

    fn write_parameter(&mut self, region: Region, i: usize, data: &[f32]) -> Result<()> {
        let place = self.checked_parameter(region, i, data.len())?;
        self.gpu.write(self.byte(place.start), bytemuck::cast_slice(data))
    }

    fn read_parameter(&self, region: Region, i: usize, out: &mut [f32]) -> Result<()> {
        let place = self.checked_parameter(region, i, out.len())?;
        self.gpu.read(self.byte(place.start), bytemuck::cast_slice_mut(out))
    }

    fn run(&mut self, draws: Draws) -> Result<()> {
        if self.told != Some(draws) {
            self.told = None;
            self.gpu.write(0, bytemuck::bytes_of(&control::draws(draws)))?;
            self.told = Some(draws);
        }
        if let (Some(graph), false) = (self.graph, self.profiling) {
            return self.gpu.replay(graph);
        }
        self.run_nodes()
    }

    fn trains(&self) -> bool {
        !self.updates.is_empty()
    }

    fn train(&mut self, draws: Draws, step: &AdamStep) -> Result<TrainingRun> {
        if !self.trains() {
            return Err(Error::Resources(
                "the plan was not made to update weights within its runs".to_owned(),
            ));
        }
        self.told = None;
        self.gpu.write(0, bytemuck::bytes_of(&control::training(draws, step)))?;
        if let (Some(graph), false) = (self.training, self.profiling) {
            self.gpu.replay(graph)?;
        } else {
            self.run_nodes()?;
            let start = Instant::now();
            self.updates.iter().try_for_each(|launch| self.gpu.launch(launch))?;
            if self.profiling {
                self.gpu.finish()?;
                self.update_times.0 += 1;
                self.update_times.1 += start.elapsed();
            }
        }
        let mut outcome = [0; 16];
        self.gpu.read(control::HELD, &mut outcome)?;
        Ok(match control::outcome(outcome) {
            (true, _) => TrainingRun::Stopped { updated: 0 },
            (false, square) => TrainingRun::Whole { gradient_norm: square.sqrt() },
        })
    }

    fn accumulate(&mut self, start: bool) -> Result<()> {
        let [sum, last] = [Region::GradientSum, Region::Gradients].map(|r| self.laid.plan.region(r));
        if sum.is_empty() && !self.laid.plan.region(Region::Weights).is_empty() {
            return Err(Error::Resources("the plan was not made to add gradients up".to_owned()));
        }
        let n = last.len();
        let [sum, last] = [sum.start, last.start].map(|at| Arg::At(self.byte(at)));
        let blocks = blocks(n.div_ceil(4));
        self.gpu.launch(&match start {
            true => call("copy", blocks, vec![last, sum, int(n)]),
            false => call("add", blocks, vec![sum, last, sum, int(n)]),
        })
    }

    fn gradient_norm(&self) -> Result<f64> {
        let gradients = self.update_gradients()?;
        if gradients.is_empty() {
            return Ok(0.0);
        }
        self.laid.norm(&gradients).iter().try_for_each(|launch| self.gpu.launch(launch))?;
        let mut square = 0.0f64;
        self.gpu.read(control::SQUARED_NORM, bytemuck::bytes_of_mut(&mut square))?;
        Ok(square.sqrt())
    }

    fn update(&mut self, step: &AdamStep) -> Result<()> {
        let gradients = self.update_gradients()?;
        if gradients.is_empty() {
            return Ok(());
        }
        self.gpu.write(control::ADAM, bytemuck::bytes_of(&control::adam(step)))?;
        self.gpu.launch(&self.laid.adam(&gradients))
    }

    fn vectors(&mut self) -> Option<&mut dyn PlanVectors> {
        if self.laid.vectors.any() { Some(self) } else { None }
    }

    fn set_profiling(&mut self, on: bool) {
        self.profiling = on;
        if on {
            self.times.fill((0, Duration::ZERO));
            self.update_times = (0, Duration::ZERO);
        }
    }

    fn profiling_slows(&self) -> bool {
        // Nodes are waited for one by one.
        true
    }

    fn profile(&self) -> Vec<NodeTime> {
        NodeTime::of_nodes(self.laid.plan.graph(), &self.times)
    }

    fn update_time(&self) -> Duration {
        self.update_times.1 / self.update_times.0.max(1)
    }
}
