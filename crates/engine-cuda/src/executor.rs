//! The executor: a plan laid out in one piece of GPU memory, and its kernel calls.
//!
//! The memory has the control block, the plan's constants, and the plan's arena with the places that the plan gives, as
//! on the CPU. All calls are made once, when the executor is; a run writes the control block and starts them, as one
//! graph where the GPU has graphs.

use crate::control;
use crate::gpu::{Arg, Gpu, Launch};
use crate::translate::{Choices, Constants, Place, translate};
use ddpm_engine::graph::Graph;
use ddpm_engine::plan::Workspace;
use ddpm_engine::{
    AdamStep, Draws, Error, Executor, Footprint, NodeTime, Plan, PlanOptions, Region, Result, Tensor,
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
    /// Where the arena begins, and where the parts of the gradients' norm do.
    arena: usize,
    parts: usize,
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
        // Weights are updated together, behind the run.
        let options = PlanOptions { update_in_runs: None, ..options.clone() };
        let plan = Plan::new(graph, &options, &workspaces);
        let arena = (control::BYTES + constants.bytes().len()).next_multiple_of(256);
        let parts = (arena + plan.arena_len() * 4).next_multiple_of(256);
        let gradients = plan.region(Region::Gradients).len();
        let bytes = parts + gradients.div_ceil(PART) * 8 + 256;
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
        Ok(Self { plan, constants, nodes, arena, parts, bytes })
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
    graph: Option<usize>,
    profiling: bool,
    times: Vec<(u64, Duration)>,
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
            kernels.extend(["copy", "add", "square_parts", "squared_norm", "adam"]);
        }
        kernels.sort_unstable();
        kernels.dedup();
        gpu.reserve(laid.bytes)?;
        gpu.prepare(&kernels)?;
        gpu.write(control::BYTES, laid.constants.bytes())?;
        let graph = gpu.record(&all)?;
        let times = vec![(0, Duration::ZERO); laid.nodes.len()];
        Ok(Self { gpu, laid, graph, profiling: false, times })
    }

    /// The kernel calls of each node, in the plan's order.
    pub fn launches(&self) -> &[Vec<Launch<usize>>] {
        &self.laid.nodes
    }

    fn byte(&self, number: usize) -> usize {
        self.laid.arena + number * 4
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

    fn launch(&self, kernel: &'static str, blocks: usize, args: Vec<Arg<usize>>) -> Result<()> {
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).max(1);
        self.gpu.launch(&Launch { kernel, grid: [blocks, 1, 1], block: [THREADS, 1, 1], args })
    }

    fn blocks(&self, count: usize) -> usize {
        count.div_ceil(THREADS as usize).min(MOST_BLOCKS as usize)
    }
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
        let place = self.checked(t, data.len())?;
        self.gpu.write(self.byte(place.start), bytemuck::cast_slice(data))
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
        self.gpu.write(0, bytemuck::bytes_of(&control::draws(draws)))?;
        if let (Some(graph), false) = (self.graph, self.profiling) {
            return self.gpu.replay(graph);
        }
        for (node, (runs, time)) in self.laid.nodes.iter().zip(&mut self.times) {
            let start = Instant::now();
            for launch in node {
                self.gpu.launch(launch)?;
            }
            if self.profiling {
                self.gpu.finish()?;
                *runs += 1;
                *time += start.elapsed();
            }
        }
        Ok(())
    }

    fn accumulate(&mut self, start: bool) -> Result<()> {
        let [sum, last] = [Region::GradientSum, Region::Gradients].map(|r| self.laid.plan.region(r));
        if sum.is_empty() && !self.laid.plan.region(Region::Weights).is_empty() {
            return Err(Error::Resources("the plan was not made to add gradients up".to_owned()));
        }
        let n = last.len();
        let [sum, last] = [sum.start, last.start].map(|at| Arg::At(self.byte(at)));
        let blocks = self.blocks(n.div_ceil(4));
        match start {
            true => self.launch("copy", blocks, vec![last, sum, int(n)]),
            false => self.launch("add", blocks, vec![sum, last, sum, int(n)]),
        }
    }

    fn gradient_norm(&self) -> Result<f64> {
        let gradients = self.update_gradients()?;
        let (n, count) = (gradients.len(), gradients.len().div_ceil(PART));
        if n == 0 {
            return Ok(0.0);
        }
        let (x, parts) = (Arg::At(self.byte(gradients.start)), Arg::At(self.laid.parts));
        self.launch("square_parts", count, vec![x, parts, int(n), int(PART)])?;
        self.launch("squared_norm", 1, vec![parts, int(count), Arg::At(0)])?;
        let mut square = 0.0f64;
        self.gpu.read(control::SQUARED_NORM, bytemuck::bytes_of_mut(&mut square))?;
        Ok(square.sqrt())
    }

    fn update(&mut self, step: &AdamStep) -> Result<()> {
        let gradients = self.update_gradients()?;
        let n = gradients.len();
        if n == 0 {
            return Ok(());
        }
        self.gpu.write(control::ADAM, bytemuck::bytes_of(&control::adam(step)))?;
        let region = |r| self.laid.plan.region(r);
        let ema = region(Region::Ema);
        let places = [
            gradients,
            region(Region::Weights),
            region(Region::ExpAvg),
            region(Region::ExpAvgSq),
            ema.clone(),
        ];
        let mut args: Vec<Arg<usize>> = places.iter().map(|r| Arg::At(self.byte(r.start))).collect();
        args.extend([int(n), int(usize::from(!ema.is_empty())), Arg::At(0)]);
        self.launch("adam", self.blocks(n), args)
    }

    fn set_profiling(&mut self, on: bool) {
        self.profiling = on;
        if on {
            self.times.fill((0, Duration::ZERO));
        }
    }

    fn profile(&self) -> Vec<NodeTime> {
        NodeTime::of_nodes(self.laid.plan.graph(), &self.times)
    }
}
