//! Runs a laid-out plan (`layout.rs`) on a GPU.
//!
//! All calls are built once, at creation; a run writes the control block and launches them, as one graph where the GPU supports
//! graphs. Weights are repacked before a run if they have changed. A training run is a graph too: weight repacking, the nodes,
//! the gradient norm, the check that norm and loss are finite, and the optimizer step.

mod sampler_buffers;

use crate::autotune::{Candidate, Candidates};
use crate::buffer_layout::BufferLayout;
use crate::control;
use crate::gpu::{Gpu, Step};
use crate::launch::{Arg, Launch};
use crate::layout::{MemoryLayout, blocks, call, int};
pub use crate::layout::{footprint, library_ops};
use crate::library::{Algorithm, Call, Library, LibraryOp};
use crate::lower::CudaOptions;
use ddpm_engine::graph::{Graph, TensorKind};
use ddpm_engine::{
    AdamStep, DType, Error, Executor, Footprint, NodeTime, Plan, PlanBuffers, PlanOptions, Region, Result,
    RngKey, StepOutcome, Tensor,
};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Runs a plan on a GPU.
pub struct GpuExecutor<G> {
    gpu: G,
    layout: MemoryLayout,
    /// The calls of each node.
    nodes: Vec<Vec<Call<usize>>>,
    /// The launch that repacks weights.
    repack: Option<Launch<usize>>,
    /// The launches after the nodes of a training run.
    updates: Vec<Launch<usize>>,
    /// Graphs of the weight repack, of a run, and of a training run.
    preparation: Option<usize>,
    graph: Option<usize>,
    training: Option<usize>,
    /// Whether weights have changed since they were repacked.
    stale: bool,
    /// The key in the control block, if known: sampler runs reuse one key, which need not be uploaded again.
    uploaded_rng: Option<RngKey>,
    profiling: bool,
    times: Vec<(u64, Duration)>,
    /// Number of profiled training runs, and the total time of their updates.
    update_times: (u32, Duration),
}

impl<G: Gpu> GpuExecutor<G> {
    /// Plans `graph`, allocates memory and compiles the kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names an operation without a kernel; [`Error::Resources`] if memory is insufficient;
    /// [`Error::Device`] for other GPU errors.
    pub fn new(mut gpu: G, graph: Graph, options: &PlanOptions, cuda_options: CudaOptions) -> Result<Self> {
        let mut layout = MemoryLayout::new(graph, options, cuda_options)?;
        let mut kernels: Vec<&'static str> = layout.nodes.iter().flat_map(Candidates::kernels).collect();
        if options.gradients.is_some() {
            kernels.extend(["copy", "add", "squared_norm", "check_and_clip", "adam"]);
        }
        kernels.extend(layout.move_states(false).map(|launch| launch.kernel));
        if layout.buffers.any() {
            kernels.extend(sampler_buffers::KERNELS);
        }
        kernels.sort_unstable();
        kernels.dedup();
        gpu.reserve(layout.bytes)?;
        gpu.prepare(&kernels)?;
        // Constants first: autotuned kernels read them.
        gpu.write(control::BYTES, layout.constants.bytes())?;
        let chosen: Vec<Option<Candidate>> = layout
            .nodes
            .iter()
            .map(|candidates| candidates.choose(&mut gpu, cuda_options.libraries))
            .collect::<Result<_>>()?;
        let repack = layout.prepare(&chosen);
        gpu.write(control::BYTES, layout.constants.bytes())?;
        let updates = layout.updates();
        let slots = layout.stream_slots(updates.len(), cuda_options.streams);
        let nodes: Vec<Vec<Call<usize>>> = layout
            .nodes
            .iter()
            .zip(chosen)
            .zip(&slots[1..])
            .map(|((candidates, candidate), slot)| {
                let mut calls = candidates.calls(candidate);
                // Streams must not share a workspace.
                calls.iter_mut().for_each(|call| call.shift_workspace(slot.stream * cuda_options.workspace));
                calls
            })
            .collect();
        let of_launch = |launch: &Launch<usize>| vec![Call::from(launch.clone())];
        let mut all: Vec<Vec<Call<usize>>> = vec![repack.iter().flat_map(of_launch).collect()];
        all.extend(nodes.iter().cloned());
        all.extend(updates.iter().map(of_launch));
        let steps: Vec<Step<'_>> =
            all.iter().zip(&slots).map(|(calls, slot)| Step { calls, slot: slot.clone() }).collect();
        let training = if updates.is_empty() { None } else { gpu.record(&steps)? };
        let preparation = if repack.is_none() { None } else { gpu.record(&steps[..1])? };
        let mut run = steps[1..=nodes.len()].to_vec();
        for Step { slot, .. } in &mut run {
            slot.waits.retain(|&i| i > 0);
            slot.waits.iter_mut().for_each(|i| *i -= 1);
        }
        let graph = gpu.record(&run)?;
        let times = vec![(0, Duration::ZERO); layout.nodes.len()];
        let update_times = (0, Duration::ZERO);
        let (uploaded_rng, profiling, stale) = (None, false, true);
        Ok(Self {
            gpu,
            layout,
            nodes,
            repack,
            updates,
            preparation,
            graph,
            training,
            stale,
            uploaded_rng,
            profiling,
            times,
            update_times,
        })
    }

    /// The plan's library operations, in order, with their algorithms.
    pub fn library_ops(&self) -> impl Iterator<Item = &(LibraryOp<usize>, Algorithm)> {
        self.nodes.iter().flatten().filter_map(|call| match call {
            Call::Launch(_) => None,
            Call::Library(both) => Some(&**both),
        })
    }

    fn byte(&self, word: usize) -> usize {
        self.layout.byte(word)
    }

    pub(crate) fn gpu(&self) -> &G {
        &self.gpu
    }

    pub(crate) fn buffer_layout(&self) -> BufferLayout {
        self.layout.buffers
    }

    /// Byte range of a tensor in GPU memory.
    pub(crate) fn tensor_bytes(&self, t: Tensor) -> Range<usize> {
        let range = self.layout.plan.range(t);
        self.byte(range.start)..self.byte(range.end)
    }

    fn checked(&self, t: Tensor, given: usize) -> Result<Range<usize>> {
        let info = self.layout.plan.graph().info(t);
        let range = self.layout.plan.range(t);
        if info.ty.dtype != DType::F32 {
            return Err(Error::DType { node: info.name.clone(), executor: "CUDA", dtype: info.ty.dtype });
        }
        if range.len() == given {
            return Ok(range);
        }
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: range.len(), given })
    }

    fn checked_parameter(&self, region: Region, i: usize, given: usize) -> Result<Range<usize>> {
        let plan = &self.layout.plan;
        let range = plan.parameter(region, i).ok_or_else(|| {
            Error::Resources(format!(
                "the plan was built without {region:?} of parameter {i}: it is not a training plan"
            ))
        })?;
        if range.len() == given {
            return Ok(range);
        }
        let info = plan.graph().info(plan.graph().parameters()[i]);
        Err(Error::Length { tensor: info.name.clone(), shape: info.ty.shape, expected: range.len(), given })
    }

    /// The gradients that an update applies.
    fn update_gradients(&self) -> Result<Range<usize>> {
        let [sum, last, weights] =
            [Region::GradientSum, Region::Gradients, Region::Weights].map(|r| self.layout.plan.region(r));
        if last.is_empty() && !weights.is_empty() {
            return Err(Error::Resources(
                "the plan was built without gradients: it is not a training plan".to_owned(),
            ));
        }
        Ok(if sum.is_empty() { last } else { sum })
    }

    /// Repacks weights if they have changed.
    fn prepare(&mut self) -> Result<()> {
        if self.stale {
            match self.preparation {
                Some(graph) => self.gpu.replay(graph)?,
                None => self.repack.iter().try_for_each(|launch| self.gpu.launch(launch))?,
            }
            self.stale = false;
        }
        Ok(())
    }

    /// Runs all nodes one by one, timing them if profiling is on.
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
        let count = |library| self.library_ops().filter(|(op, _)| op.library == library).count();
        match [Library::Cudnn, Library::CublasLt].map(count) {
            [0, 0] => self.gpu.describe(),
            [convolutions, matrices] => {
                format!(
                    "{}, {convolutions} convolutions by cuDNN, {matrices} matrix products by cuBLASLt",
                    self.gpu.describe()
                )
            }
        }
    }

    fn plan(&self) -> &Plan {
        &self.layout.plan
    }

    fn footprint(&self) -> Footprint {
        self.layout.footprint()
    }

    fn write(&mut self, t: Tensor, data: &[f32]) -> Result<()> {
        let (range, data) = (self.checked(t, data.len())?, bytemuck::cast_slice(data));
        let kind = self.layout.plan.graph().info(t).kind;
        self.stale |= matches!(kind, TensorKind::Parameter(_));
        match kind {
            TensorKind::Input => self.gpu.upload(self.byte(range.start), data),
            _ => self.gpu.write(self.byte(range.start), data),
        }
    }

    fn read(&self, t: Tensor, out: &mut [f32]) -> Result<()> {
        let range = self.checked(t, out.len())?;
        self.gpu.read(self.byte(range.start), bytemuck::cast_slice_mut(out))
    }

    fn write_parameter(&mut self, region: Region, i: usize, data: &[f32]) -> Result<()> {
        let range = self.checked_parameter(region, i, data.len())?;
        self.stale |= region == Region::Weights;
        self.gpu.write(self.byte(range.start), bytemuck::cast_slice(data))
    }

    fn read_parameter(&self, region: Region, i: usize, out: &mut [f32]) -> Result<()> {
        let range = self.checked_parameter(region, i, out.len())?;
        self.gpu.read(self.byte(range.start), bytemuck::cast_slice_mut(out))
    }

    fn run(&mut self, key: RngKey) -> Result<()> {
        if self.uploaded_rng != Some(key) {
            self.uploaded_rng = None;
            self.gpu.write(0, bytemuck::bytes_of(&control::rng_key(key)))?;
            self.uploaded_rng = Some(key);
        }
        self.prepare()?;
        if let (Some(graph), false) = (self.graph, self.profiling) {
            return self.gpu.replay(graph);
        }
        self.run_nodes()
    }

    fn fuses_optimizer(&self) -> bool {
        !self.updates.is_empty()
    }

    fn train(&mut self, key: RngKey, step: &AdamStep) -> Result<StepOutcome> {
        self.begin_training(key, step)?;
        self.end_training()
    }

    fn begin_training(&mut self, key: RngKey, step: &AdamStep) -> Result<bool> {
        if !self.fuses_optimizer() {
            return Err(Error::Resources("the plan was built without a fused optimizer step".to_owned()));
        }
        self.uploaded_rng = None;
        self.gpu.write(0, bytemuck::bytes_of(&control::training(key, step)))?;
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
        self.gpu.read(control::OUTCOME, &mut outcome)?;
        Ok(control::outcome(outcome))
    }

    fn snapshot_states(&mut self) -> Result<()> {
        self.layout.move_states(false).map_or(Ok(()), |launch| self.gpu.launch(&launch))
    }

    fn restore_states(&mut self) -> Result<()> {
        self.layout.move_states(true).map_or(Ok(()), |launch| self.gpu.launch(&launch))
    }

    fn accumulate(&mut self, start: bool) -> Result<()> {
        let [sum, last] = [Region::GradientSum, Region::Gradients].map(|r| self.layout.plan.region(r));
        if sum.is_empty() && !self.layout.plan.region(Region::Weights).is_empty() {
            return Err(Error::Resources("the plan was built without gradient accumulation".to_owned()));
        }
        let n = last.len();
        let [sum, last] = [sum.start, last.start].map(|at| Arg::At(self.byte(at)));
        let blocks = blocks(n.div_ceil(8));
        self.gpu.launch(&if start {
            call("copy", blocks, vec![last, sum, int(n)])
        } else {
            call("add", blocks, vec![sum, last, sum, int(n)])
        })
    }

    fn gradient_norm(&self) -> Result<f64> {
        let gradients = self.update_gradients()?;
        if gradients.is_empty() {
            return Ok(0.0);
        }
        self.gpu.launch(&self.layout.norm(&gradients))?;
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
        self.gpu.launch(&self.layout.adam(&gradients))
    }

    fn sampler_buffers(&mut self) -> Option<&mut dyn PlanBuffers> {
        if self.layout.buffers.any() { Some(self) } else { None }
    }

    fn set_profiling(&mut self, on: bool) {
        self.profiling = on;
        if on {
            self.times.fill((0, Duration::ZERO));
            self.update_times = (0, Duration::ZERO);
        }
    }

    fn profiling_slows(&self) -> bool {
        // Each node is waited for.
        true
    }

    fn profile(&self) -> Vec<NodeTime> {
        NodeTime::of_nodes(self.layout.plan.graph(), &self.times)
    }

    fn update_time(&self) -> Duration {
        self.update_times.1 / self.update_times.0.max(1)
    }
}
