//! Lays a plan out in a single GPU memory allocation and lowers it to kernel launches; needs no GPU.
//!
//! The allocation contains, in order: the control block, constants, the plan's arena at the offsets that the plan assigns, partial
//! sums of the gradient norm, snapshots of states, library workspaces, and sampler buffers.

use crate::autotune::{Candidate, Candidates};
use crate::buffer_layout::BufferLayout;
use crate::control;
use crate::launch::{Arg, Launch, WeightRepack};
use crate::library::LibraryOp;
use crate::lower::{Constants, CudaOptions, LoweredNode, MAX_ELEMS, MemRef, accepts_bf16, lower};
use crate::streams::{Access, StreamSlot, assign_streams};
use ddpm_engine::graph::{Graph, Node};
use ddpm_engine::passes::bf16_storage::store_in_bf16;
use ddpm_engine::plan::Workspace;
use ddpm_engine::{DType, Error, Footprint, MatmulDtype, Plan, PlanOptions, Region, Result, Tensor};
use std::mem;
use std::ops::Range;

/// Elements per partial sum of the squared gradient norm.
const PARTIAL_ELEMS: usize = 1 << 14;
/// Largest share of additional memory spent on letting nodes run concurrently.
const MAX_EXTRA_MEMORY: f64 = 0.15;
/// Threads per block and maximum blocks of the optimizer's kernels.
const THREADS: u32 = 256;
const MAX_BLOCKS: u32 = 4096;

/// A plan with its memory layout and kernel launches.
pub(crate) struct MemoryLayout {
    pub(crate) plan: Plan,
    pub(crate) constants: Constants,
    /// The candidate implementations of each node.
    pub(crate) nodes: Vec<Candidates<usize>>,
    /// Offset of the table of weight repacks within the constants.
    pub(crate) repacks: usize,
    /// The loss, if training runs include the weight update.
    pub(crate) loss: Option<Tensor>,
    /// Byte offsets of the arena and of the gradient norm's partial sums.
    pub(crate) arena: usize,
    pub(crate) parts: usize,
    /// Block counter of the norm kernel.
    pub(crate) counter: usize,
    /// Byte offset of the clipping threshold (f64); byte offset and length of the state table.
    pub(crate) clip_norm: usize,
    pub(crate) states: (usize, usize),
    pub(crate) buffers: BufferLayout,
    pub(crate) bytes: usize,
}

/// `StateTable` in `sums.cu`: two offsets, then a 32-bit length.
type StateTable = [u64; 3];

/// `WeightTable` in `conv_bf16.cu`: two offsets, then six 32-bit integers.
type WeightTable = [u64; 5];

/// The weights to repack.
#[derive(Default)]
struct WeightTables {
    all: Vec<WeightTable>,
    blocks: usize,
}

impl WeightTables {
    fn push(&mut self, repacks: &WeightRepack<usize>) {
        let two = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        self.all.push([
            repacks.from as u64,
            repacks.to as u64,
            two(repacks.taps, repacks.c),
            two(repacks.n, repacks.transposed.into()),
            two(self.blocks, 0),
        ]);
        self.blocks += repacks.n.div_ceil(32) * repacks.c.div_ceil(32) * repacks.taps;
    }

    /// The launch that repacks all of them, with the table at this byte.
    fn launch(&self, table: usize) -> Option<Launch<usize>> {
        let args = vec![Arg::At(0), Arg::At(table), int(self.all.len())];
        (!self.all.is_empty())
            .then(|| Launch { block: [32, 8, 1], ..call("repack_weights", self.blocks, args) })
    }
}

impl MemoryLayout {
    pub(crate) fn new(mut graph: Graph, options: &PlanOptions, cuda_options: CudaOptions) -> Result<Self> {
        let mut constants = Constants::default();
        let mut lowered = lower_all(&mut graph, options, cuda_options, &mut constants)?;
        // The optimizer kernels run after all nodes instead of being fused into them.
        let loss = options.fuse_optimizer.filter(|_| options.gradients.is_some());
        assert!(
            loss.is_none() || !options.accumulate,
            "accumulated gradients cannot be applied within a run"
        );
        let outputs = options.outputs.iter().copied().chain(loss).collect();
        let options = PlanOptions { fuse_optimizer: None, outputs, ..options.clone() };
        let plan = plan_with_overlap(graph, &options, &lowered, cuda_options);

        let tables = Tables::reserve(&mut constants, &lowered, plan.graph().states().len());
        constants.set(tables.clip_norm, bytemuck::bytes_of(&options.clip_norm));
        let arena = (control::BYTES + constants.bytes().len()).next_multiple_of(256);
        let parts = (arena + plan.arena_len() * 4).next_multiple_of(256);
        let gradients = plan.region(Region::Gradients).len();
        let snapshots = (parts + gradients.div_ceil(PARTIAL_ELEMS) * 8).next_multiple_of(256);
        let (states, end) = state_table(&plan, arena, snapshots);
        constants.set(tables.states, bytemuck::cast_slice(&states));
        let workspace = (end + 256).next_multiple_of(256);
        let with_libraries = lowered.iter().any(|node| !node.alternatives.is_empty());
        let workspaces =
            if with_libraries { cuda_options.workspace * cuda_options.streams.max(1) } else { 0 };
        let buffers = BufferLayout::new(options.sampler_buffers, workspace + workspaces)?;
        if gradients > MAX_ELEMS {
            let reason = format!(
                "the network has more than {MAX_ELEMS} weights, the most the optimizer kernel can index"
            );
            return Err(Error::Device { device: "cuda".to_owned(), reason });
        }

        let addresses = Addresses { plan: &plan, arena, workspace };
        let candidates = |(i, node): (usize, &mut LoweredNode)| {
            let LoweredNode { launches, repacks, alternatives, .. } = mem::take(node);
            Candidates { launches, repacks, alternatives }.map_addrs(|p| addresses.resolve(i, p))
        };
        let nodes = lowered.iter_mut().enumerate().map(candidates).collect();
        Ok(Self {
            constants,
            nodes,
            repacks: tables.repacks,
            loss,
            arena,
            parts,
            counter: control::BYTES + tables.counter,
            clip_norm: control::BYTES + tables.clip_norm,
            states: (control::BYTES + tables.states, states.len()),
            buffers,
            bytes: buffers.end(),
            plan,
        })
    }

    pub(crate) fn byte(&self, word: usize) -> usize {
        self.arena + word * 4
    }

    /// Stream slots of the weight repack, of all nodes, and of `updates` optimizer launches after them.
    pub(crate) fn stream_slots(&self, updates: usize, streams: usize) -> Vec<StreamSlot> {
        let plan = &self.plan;
        let all = || Access { reads: Vec::new(), writes: std::iter::once(0..usize::MAX).collect() };
        let of_node = |(i, node): (usize, &Node)| {
            let places = |t: &[Tensor]| t.iter().map(|&t| plan.range(t)).collect::<Vec<_>>();
            let (reads, mut writes) = (places(&node.inputs), places(&node.outputs));
            writes.extend(Some(plan.scratch(i)).filter(|scratch| !scratch.is_empty()));
            Access { reads, writes }
        };
        let mut list = vec![all()];
        list.extend(plan.graph().nodes().iter().enumerate().map(of_node));
        list.extend((0..updates).map(|_| all()));
        assign_streams(&list, streams)
    }

    /// Fills the repack table for the chosen candidates and returns the launch that processes it.
    pub(crate) fn prepare(&mut self, chosen: &[Option<Candidate>]) -> Option<Launch<usize>> {
        let mut weight_tables = WeightTables::default();
        for (candidates, &candidate) in self.nodes.iter().zip(chosen) {
            candidates.repacks(candidate).iter().for_each(|repacks| weight_tables.push(repacks));
        }
        self.constants.set(self.repacks, bytemuck::cast_slice(&weight_tables.all));
        weight_tables.launch(control::BYTES + self.repacks)
    }

    /// Launch that computes the squared norm of these gradients.
    pub(crate) fn norm(&self, gradients: &Range<usize>) -> Launch<usize> {
        let (n, count) = (gradients.len(), gradients.len().div_ceil(PARTIAL_ELEMS));
        let [x, parts, counter] = [self.byte(gradients.start), self.parts, self.counter].map(Arg::At);
        call("squared_norm", count, vec![x, parts, counter, int(n), int(PARTIAL_ELEMS), Arg::At(0)])
    }

    /// Launch of the optimizer step for these gradients.
    pub(crate) fn adam(&self, gradients: &Range<usize>) -> Launch<usize> {
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

    /// The launches after the nodes of a training run; empty if the plan does not include the update.
    pub(crate) fn updates(&self) -> Vec<Launch<usize>> {
        let gradients = self.plan.region(Region::Gradients);
        let Some(loss) = self.loss.filter(|_| !gradients.is_empty()) else { return Vec::new() };
        let loss = Arg::At(self.byte(self.plan.range(loss).start));
        let mut calls = vec![self.norm(&gradients)];
        calls.push(call("check_and_clip", 1, vec![loss, Arg::At(self.clip_norm), Arg::At(0)]));
        calls.push(self.adam(&gradients));
        calls
    }

    /// Launch that saves (or, if `back`, restores) the states.
    pub(crate) fn move_states(&self, back: bool) -> Option<Launch<usize>> {
        let (table, count) = self.states;
        let args = vec![Arg::At(0), Arg::At(table), int(back.into())];
        (count > 0).then(|| call("snapshot_states", count, args))
    }

    pub(crate) fn footprint(&self) -> Footprint {
        Footprint {
            arena_bytes: self.bytes,
            scratch_bytes: 0,
            multiply_adds: self.plan.graph().multiply_adds(),
        }
    }
}

/// Lowers all nodes, after changing tensors to bf16 where matmul operands are.
fn lower_all(
    graph: &mut Graph,
    options: &PlanOptions,
    cuda_options: CudaOptions,
    constants: &mut Constants,
) -> Result<Vec<LoweredNode>> {
    if options.compute.matmul_dtype == MatmulDtype::Bf16 {
        let read: Vec<Tensor> =
            options.outputs.iter().chain(options.gradients.iter().flatten()).copied().collect();
        store_in_bf16(graph, &read, cuda_options.min_bf16_elems, accepts_bf16);
    }
    let graph = &*graph;
    graph.nodes().iter().map(|node| lower(graph, node, options.compute, cuda_options, constants)).collect()
}

/// Offsets, within the constants, of the tables that the executor's own kernels read.
struct Tables {
    /// The weights to repack.
    repacks: usize,
    /// Block counter of the norm kernel.
    counter: usize,
    /// The clipping threshold, an f64.
    clip_norm: usize,
    /// Where the states and their snapshots lie.
    states: usize,
}

impl Tables {
    fn reserve(constants: &mut Constants, lowered: &[LoweredNode], states: usize) -> Self {
        // Sized for the candidate with the most repacks.
        let repacks_of = |w: &LoweredNode| {
            w.alternatives.iter().map(|a| a.repacks.len()).fold(w.repacks.len(), usize::max)
        };
        let repacks: usize = lowered.iter().map(repacks_of).sum();
        Self {
            repacks: constants.reserve(repacks * size_of::<WeightTable>()),
            counter: constants.reserve(4),
            clip_norm: constants.reserve(8),
            states: constants.reserve(states * size_of::<StateTable>()),
        }
    }
}

/// The table of states, whose snapshots follow one another from byte `snapshots` on; and the end of the last.
fn state_table(plan: &Plan, arena: usize, snapshots: usize) -> (Vec<StateTable>, usize) {
    let mut end = snapshots;
    let entries = plan.graph().states().iter().map(|&t| {
        let (snapshot, range) = (end, plan.range(t));
        end += range.len() * 4;
        [(arena + range.start * 4) as u64, snapshot as u64, range.len() as u64]
    });
    (entries.collect(), end)
}

/// Byte offsets of a node's memory in the allocation.
struct Addresses<'a> {
    plan: &'a Plan,
    arena: usize,
    /// The library workspace.
    workspace: usize,
}

impl Addresses<'_> {
    fn word(&self, at: usize) -> usize {
        self.arena + at * 4
    }

    /// Kernels read the format from the lowest address bit (`In` and `Out` in common.cu).
    fn tensor(&self, t: Tensor) -> usize {
        let bf16 = self.plan.graph().ty(t).dtype == DType::Bf16;
        self.word(self.plan.range(t).start) + usize::from(bf16)
    }

    /// The address behind a reference of node `i`.
    fn resolve(&self, i: usize, p: MemRef) -> usize {
        let node = &self.plan.graph().nodes()[i];
        match p {
            MemRef::Input(k) => self.tensor(node.inputs[k]),
            MemRef::Output(k) => self.tensor(node.outputs[k]),
            MemRef::Scratch(at) => self.word(self.plan.scratch(i).start + at),
            MemRef::Bf16Scratch(at) => self.word(self.plan.scratch(i).start + at) + 1,
            MemRef::Cached { at, bf16 } => self.word(self.plan.cached(i).start + at) + usize::from(bf16),
            MemRef::Constant(at) => control::BYTES + at,
            MemRef::Control => 0,
            MemRef::Workspace => self.workspace,
        }
    }
}

/// A plan that lets nodes run concurrently, unless that takes too much memory.
fn plan_with_overlap(
    graph: Graph,
    options: &PlanOptions,
    lowered: &[LoweredNode],
    cuda_options: CudaOptions,
) -> Plan {
    let workspaces: Vec<Workspace> =
        lowered.iter().map(|w| Workspace { scratch: w.scratch, cached: w.cached }).collect();
    let with = |liveness_slack, graph| {
        Plan::new(graph, &PlanOptions { liveness_slack, ..options.clone() }, &workspaces)
    };
    let tight = with(0, graph);
    let max_len = tight.arena_len() as f64 * (1.0 + MAX_EXTRA_MEMORY);
    let relaxed = [cuda_options.liveness_slack, cuda_options.liveness_slack / 2]
        .into_iter()
        .filter(|&liveness_slack| liveness_slack > 0 && cuda_options.streams > 1);
    let mut plans = relaxed.map(|liveness_slack| with(liveness_slack, tight.graph().clone()));
    plans.find(|plan| plan.arena_len() as f64 <= max_len).unwrap_or(tight)
}

/// Memory and multiply-adds of a plan; needs no GPU.
///
/// # Errors
/// As [`GpuExecutor::new`](crate::GpuExecutor::new), except errors of the GPU itself.
pub fn footprint(graph: Graph, options: &PlanOptions, cuda_options: CudaOptions) -> Result<Footprint> {
    Ok(MemoryLayout::new(graph, options, cuda_options)?.footprint())
}

/// The operations of a plan that libraries could perform; needs no GPU.
///
/// # Errors
/// As [`footprint`].
pub fn library_ops(
    graph: Graph,
    options: &PlanOptions,
    cuda_options: CudaOptions,
) -> Result<Vec<LibraryOp<usize>>> {
    let layout = MemoryLayout::new(graph, options, cuda_options)?;
    Ok(layout.nodes.iter().flat_map(|candidates| &candidates.alternatives).map(|a| a.op).collect())
}

/// A launch with a one-dimensional grid.
pub(crate) fn call(kernel: &'static str, blocks: usize, args: Vec<Arg<usize>>) -> Launch<usize> {
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).max(1);
    Launch { kernel, grid: [blocks, 1, 1], block: [THREADS, 1, 1], args }
}

/// Blocks for a grid-stride loop over `count` items.
pub(crate) fn blocks(count: usize) -> usize {
    count.div_ceil(THREADS as usize).min(MAX_BLOCKS as usize)
}

/// A size as an argument; sizes were checked during layout.
pub(crate) fn int(v: usize) -> Arg<usize> {
    Arg::Int(i32::try_from(v).unwrap_or(i32::MAX))
}
