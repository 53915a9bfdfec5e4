//! The executor: a plan that is laid out (`layout.rs`), on a GPU.
//!
//! All calls are made once, when the executor is; a run writes the control block and starts them, as one graph where the GPU has
//! graphs. What nodes keep of weights is made before a run if weights have changed. A training run is a graph too: what nodes keep of weights,
//! the nodes, the gradients' norm, the look whether it and the loss are finite, and the optimizer's step.

use crate::choice::{Way, Ways};
use crate::control;
use crate::gpu::{Arg, Gpu, Launch, Step};
use crate::layout::{Laid, blocks, call, int};
pub use crate::layout::{footprint, products};
use crate::library::{Algorithm, Call, Library, Product};
use crate::translate::Choices;
use crate::vectors;
use ddpm_engine::graph::{Graph, Kind};
use ddpm_engine::{
    AdamStep, DType, Draws, Error, Executor, Footprint, NodeTime, Plan, PlanOptions, PlanVectors, Region,
    Result, StepOutcome, Tensor,
};
use std::ops::Range;
use std::time::{Duration, Instant};

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

    fn train(&mut self, draws: Draws, step: &AdamStep) -> Result<StepOutcome> {
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

    fn end_training(&mut self) -> Result<StepOutcome> {
        let mut outcome = [0; 16];
        self.gpu.read(control::HELD, &mut outcome)?;
        Ok(control::outcome(outcome))
    }

    fn snapshot_states(&mut self) -> Result<()> {
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
