//! The executor: a plan laid out in one piece of GPU memory, and its kernel calls.
//!
//! The memory has the control block, the plan's constants, and the plan's arena with the places that the plan gives, as
//! on the CPU. All calls are made once, when the executor is; a run writes the control block and starts them, as one
//! graph where the GPU has graphs. What nodes keep of weights is made before a run if weights have changed, and in each training run. So does a training run, in whose graph the gradients' norm, the look whether it and the
//! loss are finite, and the optimizer's step are too.

use crate::choice::{Way, Ways};
use crate::control;
use crate::gpu::{Arg, Gpu, Launch, Step};
use crate::library::{Algorithm, Call, Library, Product};
use crate::schedule::{Access, Turn, schedule};
use crate::translate::{Choices, Constants, Place, Rows, Work, takes_bf16, translate};
use crate::vectors;
use ddpm_engine::graph::{Graph, Kind, Node};
use ddpm_engine::keep::store_in_bf16;
use ddpm_engine::plan::Workspace;
use ddpm_engine::{
    AdamStep, DType, Draws, Error, Executor, Factors, Footprint, NodeTime, Plan, PlanOptions, PlanVectors,
    Region, Result, Tensor, TrainingRun,
};
use std::mem;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Numbers whose squares are one part of the gradients' norm.
const PART: usize = 1 << 14;
/// Most memory, as a share of the least, that is given to letting nodes run side by side.
const MOST_SLACK: f64 = 0.15;
/// Threads of a block, and most blocks, of the optimizer's kernels.
const THREADS: u32 = 256;
const MOST_BLOCKS: u32 = 4096;

/// A plan with its kernel calls, before a GPU is looked at.
struct Laid {
    plan: Plan,
    constants: Constants,
    /// The ways to make each node.
    nodes: Vec<Ways<usize>>,
    /// Where the table of weights is of which rows are kept.
    rows: usize,
    /// The loss of a plan whose weights are updated by its training runs.
    loss: Option<Tensor>,
    /// Where the arena begins, and where the parts of the gradients' norm do.
    arena: usize,
    parts: usize,
    /// A counter of its blocks.
    counter: usize,
    /// Where the longest norm is, an f64, and where the table of states is, and how many there are.
    clip_norm: usize,
    states: (usize, usize),
    vectors: vectors::Laid,
    bytes: usize,
}

/// `StateTable` in `sums.cu`: two places, and a number of 32 bits.
type StateTable = [u64; 3];

/// `WeightTable` in `conv_half.cu`: two places, and six numbers of 32 bits.
type WeightTable = [u64; 5];

/// All weights of which rows are kept.
#[derive(Default)]
struct WeightTables {
    all: Vec<WeightTable>,
    blocks: usize,
}

impl WeightTables {
    fn push(&mut self, rows: &Rows<usize>) {
        let two = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        self.all.push([
            rows.from as u64,
            rows.to as u64,
            two(rows.taps, rows.c),
            two(rows.n, rows.transposed.into()),
            two(self.blocks, 0),
        ]);
        self.blocks += rows.n.div_ceil(32) * rows.c.div_ceil(32) * rows.taps;
    }

    /// The call that makes them all, with the table at this byte.
    fn launch(&self, table: usize) -> Option<Launch<usize>> {
        let args = vec![Arg::At(0), Arg::At(table), int(self.all.len())];
        (!self.all.is_empty()).then(|| Launch { block: [32, 8, 1], ..call("weight_rows", self.blocks, args) })
    }
}

impl Laid {
    fn new(mut graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Self> {
        let mut constants = Constants::default();
        if options.arithmetic.factors == Factors::Bf16 {
            let read: Vec<Tensor> =
                options.keep.iter().chain(options.gradients.iter().flatten()).copied().collect();
            store_in_bf16(&mut graph, &read, choices.least_bf16, takes_bf16);
        }
        let mut works = Vec::with_capacity(graph.nodes().len());
        for node in graph.nodes() {
            works.push(translate(&graph, node, options.arithmetic, choices, &mut constants)?);
        }
        let workspaces: Vec<Workspace> =
            works.iter().map(|w| Workspace { scratch: w.scratch, kept: w.kept }).collect();
        // Weights are updated together, behind the nodes.
        let loss = options.update_in_runs.filter(|_| options.gradients.is_some());
        assert!(loss.is_none() || !options.accumulate, "sums of gradients are not updated within runs");
        let keep = options.keep.iter().copied().chain(loss).collect();
        let options = PlanOptions { update_in_runs: None, keep, ..options.clone() };
        let plan = planned(graph, &options, &workspaces, choices);
        // Of whatever way is taken.
        let rows_of = |w: &Work| w.alternatives.iter().map(|a| a.rows.len()).fold(w.rows.len(), usize::max);
        let rows: usize = works.iter().map(rows_of).sum();
        let (table, counter) = (constants.room(rows * size_of::<WeightTable>()), constants.room(4));
        let (clip_norm, states) = (constants.room(8), plan.graph().states().to_vec());
        constants.set(clip_norm, bytemuck::bytes_of(&options.clip_norm));
        let table_of_states = constants.room(states.len() * size_of::<StateTable>());
        let arena = (control::BYTES + constants.bytes().len()).next_multiple_of(256);
        let parts = (arena + plan.arena_len() * 4).next_multiple_of(256);
        let gradients = plan.region(Region::Gradients).len();
        let mut bytes = (parts + gradients.div_ceil(PART) * 8).next_multiple_of(256);
        let all_states = states.iter().map(|&t| {
            let kept = bytes;
            bytes += plan.place(t).len() * 4;
            [(arena + plan.place(t).start * 4) as u64, kept as u64, plan.place(t).len() as u64]
        });
        let all_states: Vec<StateTable> = all_states.collect();
        constants.set(table_of_states, bytemuck::cast_slice(&all_states));
        bytes = (bytes + 256).next_multiple_of(256);
        let workspace = bytes;
        if works.iter().any(|work| !work.alternatives.is_empty()) {
            bytes += choices.workspace * choices.streams;
        }
        let vectors = vectors::Laid::new(options.vectors, bytes)?;
        let bytes = vectors.end();
        if gradients > i32::MAX as usize {
            let reason = "more than 2^31 weights".to_owned();
            return Err(Error::Device { device: "cuda".to_owned(), reason });
        }
        let number = |at: usize| arena + at * 4;
        // The kernels read the format off the lowest bit (`In` and `Out` in common.cu).
        let tensor = |t: Tensor| {
            let half = plan.graph().ty(t).dtype == DType::Bf16;
            number(plan.place(t).start) + usize::from(half)
        };
        let place_of = |i: usize, p: Place| {
            let node = &plan.graph().nodes()[i];
            match p {
                Place::Input(k) => tensor(node.inputs[k]),
                Place::Output(k) => tensor(node.outputs[k]),
                Place::Scratch(at) => number(plan.scratch(i).start + at),
                Place::HalfScratch(at) => number(plan.scratch(i).start + at) + 1,
                Place::Kept { at, half } => number(plan.kept(i).start + at) + usize::from(half),
                Place::Constant(at) => control::BYTES + at,
                Place::Control => 0,
                Place::Workspace => workspace,
            }
        };
        let ways = |(i, work): (usize, &mut Work)| {
            let Work { launches, rows, alternatives, .. } = mem::take(work);
            Ways { launches, rows, alternatives }.placed(|p| place_of(i, p))
        };
        let (nodes, rows) = (works.iter_mut().enumerate().map(ways).collect(), table);
        let [counter, clip_norm, table_of_states] =
            [counter, clip_norm, table_of_states].map(|at| control::BYTES + at);
        let states = (table_of_states, states.len());
        Ok(Self {
            plan,
            constants,
            nodes,
            rows,
            loss,
            arena,
            parts,
            counter,
            clip_norm,
            states,
            vectors,
            bytes,
        })
    }

    fn byte(&self, number: usize) -> usize {
        self.arena + number * 4
    }

    /// The turns of a preparation, of all nodes, and of so many updates behind them.
    fn turns(&self, updates: usize, streams: usize) -> Vec<Turn> {
        let plan = &self.plan;
        let all = || Access { reads: Vec::new(), writes: std::iter::once(0..usize::MAX).collect() };
        let of_node = |(i, node): (usize, &Node)| {
            let places = |t: &[Tensor]| t.iter().map(|&t| plan.place(t)).collect::<Vec<_>>();
            let (reads, mut writes) = (places(&node.inputs), places(&node.outputs));
            writes.extend(Some(plan.scratch(i)).filter(|scratch| !scratch.is_empty()));
            Access { reads, writes }
        };
        let mut list = vec![all()];
        list.extend(plan.graph().nodes().iter().enumerate().map(of_node));
        list.extend((0..updates).map(|_| all()));
        schedule(&list, streams)
    }

    /// Fills the table of weights of which rows are kept, for the ways that are taken, and gives the call that makes them.
    fn prepare(&mut self, taken: &[Option<Way>]) -> Option<Launch<usize>> {
        let mut of_weights = WeightTables::default();
        for (ways, &way) in self.nodes.iter().zip(taken) {
            ways.rows(way).iter().for_each(|rows| of_weights.push(rows));
        }
        self.constants.set(self.rows, bytemuck::cast_slice(&of_weights.all));
        of_weights.launch(control::BYTES + self.rows)
    }

    /// The call for the squared norm of these gradients.
    fn norm(&self, gradients: &Range<usize>) -> Launch<usize> {
        let (n, count) = (gradients.len(), gradients.len().div_ceil(PART));
        let [x, parts, counter] = [self.byte(gradients.start), self.parts, self.counter].map(Arg::At);
        call("squared_norm", count, vec![x, parts, counter, int(n), int(PART), Arg::At(0)])
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
        let mut calls = vec![self.norm(&gradients)];
        calls.push(call("hold", 1, vec![loss, Arg::At(self.clip_norm), Arg::At(0)]));
        calls.push(self.adam(&gradients));
        calls
    }

    /// The call that keeps the states, or brings them back.
    fn move_states(&self, back: bool) -> Option<Launch<usize>> {
        let (table, count) = self.states;
        let args = vec![Arg::At(0), Arg::At(table), int(back.into())];
        (count > 0).then(|| call("keep_states", count, args))
    }

    fn footprint(&self) -> Footprint {
        Footprint {
            arena_bytes: self.bytes,
            scratch_bytes: 0,
            multiply_adds: self.plan.graph().multiply_adds(),
        }
    }
}

/// A plan that lets nodes run side by side, but for too much memory.
fn planned(graph: Graph, options: &PlanOptions, workspaces: &[Workspace], choices: Choices) -> Plan {
    let with = |slack, graph| Plan::new(graph, &PlanOptions { slack, ..options.clone() }, workspaces);
    let tight = with(0, graph);
    let most = tight.arena_len() as f64 * (1.0 + MOST_SLACK);
    let loose =
        [choices.slack, choices.slack / 2].into_iter().filter(|&slack| slack > 0 && choices.streams > 1);
    let mut plans = loose.map(|slack| with(slack, tight.graph().clone()));
    plans.find(|plan| plan.arena_len() as f64 <= most).unwrap_or(tight)
}

/// Memory and arithmetic of a plan on a GPU; needs none.
///
/// # Errors
/// As [`GpuExecutor::new`], but for what the GPU itself says.
pub fn footprint(graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Footprint> {
    Ok(Laid::new(graph, options, choices)?.footprint())
}

/// The products that libraries are asked for in a plan; needs no GPU.
///
/// # Errors
/// As [`footprint`].
pub fn products(graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Vec<Product<usize>>> {
    let laid = Laid::new(graph, options, choices)?;
    Ok(laid.nodes.iter().flat_map(|ways| &ways.alternatives).map(|a| a.product).collect())
}

/// Runs a plan on a GPU.
pub struct GpuExecutor<G> {
    gpu: G,
    laid: Laid,
    /// The calls of each node.
    nodes: Vec<Vec<Call<usize>>>,
    /// The call that makes what nodes keep of weights.
    rows: Option<Launch<usize>>,
    /// The calls behind the nodes of a training run.
    updates: Vec<Launch<usize>>,
    /// The graphs of what makes what nodes keep of weights, of a run, and of a training run.
    preparation: Option<usize>,
    graph: Option<usize>,
    training: Option<usize>,
    /// Whether weights have changed since the preparation.
    stale: bool,
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
        let mut laid = Laid::new(graph, options, choices)?;
        let mut kernels: Vec<&'static str> = laid.nodes.iter().flat_map(Ways::kernels).collect();
        if options.gradients.is_some() {
            kernels.extend(["copy", "add", "squared_norm", "hold", "adam"]);
        }
        kernels.extend(laid.move_states(false).map(|launch| launch.kernel));
        if laid.vectors.any() {
            kernels.extend(vectors::KERNELS);
        }
        kernels.sort_unstable();
        kernels.dedup();
        gpu.reserve(laid.bytes)?;
        gpu.prepare(&kernels)?;
        // Tables first: kernels are timed with them.
        gpu.write(control::BYTES, laid.constants.bytes())?;
        let taken: Vec<Option<Way>> =
            laid.nodes.iter().map(|ways| ways.choose(&mut gpu, choices.libraries)).collect::<Result<_>>()?;
        let rows = laid.prepare(&taken);
        gpu.write(control::BYTES, laid.constants.bytes())?;
        let updates = laid.updates();
        let turns = laid.turns(updates.len(), choices.streams);
        let nodes: Vec<Vec<Call<usize>>> = laid
            .nodes
            .iter()
            .zip(taken)
            .zip(&turns[1..])
            .map(|((ways, way), turn)| {
                let mut calls = ways.calls(way);
                // Streams do not share what libraries write to.
                calls.iter_mut().for_each(|call| call.shift_workspace(turn.stream * choices.workspace));
                calls
            })
            .collect();
        let of_launch = |launch: &Launch<usize>| vec![Call::from(launch.clone())];
        let mut all: Vec<Vec<Call<usize>>> = vec![rows.iter().flat_map(of_launch).collect()];
        all.extend(nodes.iter().cloned());
        all.extend(updates.iter().map(of_launch));
        let steps: Vec<Step<'_>> =
            all.iter().zip(&turns).map(|(calls, turn)| Step { calls, turn: turn.clone() }).collect();
        let training = if updates.is_empty() { None } else { gpu.record(&steps)? };
        let preparation = if rows.is_none() { None } else { gpu.record(&steps[..1])? };
        let mut run = steps[1..=nodes.len()].to_vec();
        for Step { turn, .. } in &mut run {
            turn.waits.retain(|&i| i > 0);
            turn.waits.iter_mut().for_each(|i| *i -= 1);
        }
        let graph = gpu.record(&run)?;
        let times = vec![(0, Duration::ZERO); laid.nodes.len()];
        let update_times = (0, Duration::ZERO);
        let (told, profiling, stale) = (None, false, true);
        Ok(Self {
            gpu,
            laid,
            nodes,
            rows,
            updates,
            preparation,
            graph,
            training,
            stale,
            told,
            profiling,
            times,
            update_times,
        })
    }

    /// The products that libraries make, in the plan's order, and how.
    pub fn products(&self) -> impl Iterator<Item = &(Product<usize>, Algorithm)> {
        self.nodes.iter().flatten().filter_map(|call| match call {
            Call::Launch(_) => None,
            Call::Product(both) => Some(&**both),
        })
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
        if info.ty.dtype != DType::F32 {
            return Err(Error::DType { node: info.name.clone(), executor: "CUDA", dtype: info.ty.dtype });
        }
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

    /// Makes what nodes keep of weights, if it is not there.
    fn prepare(&mut self) -> Result<()> {
        if self.stale {
            match self.preparation {
                Some(graph) => self.gpu.replay(graph)?,
                None => self.rows.iter().try_for_each(|launch| self.gpu.launch(launch))?,
            }
            self.stale = false;
        }
        Ok(())
    }

    /// Starts all nodes one by one, and takes their times if that is asked for.
    fn run_nodes(&mut self) -> Result<()> {
        for (node, (runs, time)) in self.nodes.iter().zip(&mut self.times) {
            let start = Instant::now();
            node.iter().try_for_each(|call| self.gpu.call(call))?;
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
        let count = |library| self.products().filter(|(product, _)| product.library == library).count();
        match [Library::Cudnn, Library::CublasLt].map(count) {
            [0, 0] => self.gpu.describe(),
            [convolutions, matrices] => {
                format!("{}, {convolutions} products by cuDNN, {matrices} by cuBLASLt", self.gpu.describe())
            }
        }
    }

    fn plan(&self) -> &Plan {
        &self.laid.plan
    }

    fn footprint(&self) -> Footprint {
        self.laid.footprint()
    }

    fn write(&mut self, t: Tensor, data: &[f32]) -> Result<()> {
        let (place, data) = (self.checked(t, data.len())?, bytemuck::cast_slice(data));
        let kind = self.laid.plan.graph().info(t).kind;
        self.stale |= matches!(kind, Kind::Parameter(_));
        match kind {
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
        self.stale |= region == Region::Weights;
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
        self.prepare()?;
        if let (Some(graph), false) = (self.graph, self.profiling) {
            return self.gpu.replay(graph);
        }
        self.run_nodes()
    }

    fn trains(&self) -> bool {
        !self.updates.is_empty()
    }

    fn train(&mut self, draws: Draws, step: &AdamStep) -> Result<TrainingRun> {
        self.begin_training(draws, step)?;
        self.end_training()
    }

    fn begin_training(&mut self, draws: Draws, step: &AdamStep) -> Result<bool> {
        if !self.trains() {
            return Err(Error::Resources(
                "the plan was not made to update weights within its runs".to_owned(),
            ));
        }
        self.told = None;
        self.gpu.write(0, bytemuck::bytes_of(&control::training(draws, step)))?;
        self.stale = true;
        if let (Some(graph), false) = (self.training, self.profiling) {
            self.gpu.replay(graph)?;
        } else {
            self.prepare()?;
            self.stale = true;
            self.run_nodes()?;
            let start = Instant::now();
            self.updates.iter().try_for_each(|launch| self.gpu.launch(launch))?;
            if self.profiling {
                self.gpu.finish()?;
                self.update_times.0 += 1;
                self.update_times.1 += start.elapsed();
            }
        }
        Ok(true)
    }

    fn end_training(&mut self) -> Result<TrainingRun> {
        let mut outcome = [0; 16];
        self.gpu.read(control::HELD, &mut outcome)?;
        Ok(control::outcome(outcome))
    }

    fn keep_states(&mut self) -> Result<()> {
        self.laid.move_states(false).map_or(Ok(()), |launch| self.gpu.launch(&launch))
    }

    fn restore_states(&mut self) -> Result<()> {
        self.laid.move_states(true).map_or(Ok(()), |launch| self.gpu.launch(&launch))
    }

    fn accumulate(&mut self, start: bool) -> Result<()> {
        let [sum, last] = [Region::GradientSum, Region::Gradients].map(|r| self.laid.plan.region(r));
        if sum.is_empty() && !self.laid.plan.region(Region::Weights).is_empty() {
            return Err(Error::Resources("the plan was not made to add gradients up".to_owned()));
        }
        let n = last.len();
        let [sum, last] = [sum.start, last.start].map(|at| Arg::At(self.byte(at)));
        let blocks = blocks(n.div_ceil(8));
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
        self.gpu.launch(&self.laid.norm(&gradients))?;
        let mut square = 0.0f64;
        self.gpu.read(control::SQUARED_NORM, bytemuck::bytes_of_mut(&mut square))?;
        Ok(square.sqrt())
    }

    fn update(&mut self, step: &AdamStep) -> Result<()> {
        let gradients = self.update_gradients()?;
        if gradients.is_empty() {
            return Ok(());
        }
        self.stale = true;
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
