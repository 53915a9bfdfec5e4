//! A plan laid out in one piece of GPU memory, with its kernel calls, before a GPU is looked at.
//!
//! The memory has the control block, the plan's constants, the plan's arena with the places that the plan gives, as on the CPU, what
//! sums and states need behind the nodes, workspaces of libraries, and the vectors of samplers.

use crate::choice::{Way, Ways};
use crate::control;
use crate::gpu::{Arg, Launch};
use crate::library::Product;
use crate::schedule::{Access, Turn, schedule};
use crate::translate::{Choices, Constants, MOST_NUMBERS, Place, Rows, Work, takes_bf16, translate};
use crate::vectors;
use ddpm_engine::graph::{Graph, Node};
use ddpm_engine::keep::store_in_bf16;
use ddpm_engine::plan::Workspace;
use ddpm_engine::{DType, Error, Footprint, MatmulDtype, Plan, PlanOptions, Region, Result, Tensor};
use std::mem;
use std::ops::Range;

/// Numbers whose squares are one part of the gradients' norm.
const PART: usize = 1 << 14;
/// Most memory, as a share of the least, that is given to letting nodes run side by side.
const MOST_SLACK: f64 = 0.15;
/// Threads of a block, and most blocks, of the optimizer's kernels.
const THREADS: u32 = 256;
const MOST_BLOCKS: u32 = 4096;

/// A plan with its kernel calls, before a GPU is looked at.
pub(crate) struct Laid {
    pub(crate) plan: Plan,
    pub(crate) constants: Constants,
    /// The ways to make each node.
    pub(crate) nodes: Vec<Ways<usize>>,
    /// Where the table of weights is of which rows are kept.
    pub(crate) rows: usize,
    /// The loss of a plan whose weights are updated by its training runs.
    pub(crate) loss: Option<Tensor>,
    /// Where the arena begins, and where the parts of the gradients' norm do.
    pub(crate) arena: usize,
    pub(crate) parts: usize,
    /// A counter of its blocks.
    pub(crate) counter: usize,
    /// Where the longest norm is, an f64, and where the table of states is, and how many there are.
    pub(crate) clip_norm: usize,
    pub(crate) states: (usize, usize),
    pub(crate) vectors: vectors::Laid,
    pub(crate) bytes: usize,
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
    pub(crate) fn new(mut graph: Graph, options: &PlanOptions, choices: Choices) -> Result<Self> {
        let mut constants = Constants::default();
        if options.arithmetic.factors == MatmulDtype::Bf16 {
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
        let loss = options.fuse_optimizer.filter(|_| options.gradients.is_some());
        assert!(loss.is_none() || !options.accumulate, "sums of gradients are not updated within runs");
        let keep = options.keep.iter().copied().chain(loss).collect();
        let options = PlanOptions { fuse_optimizer: None, keep, ..options.clone() };
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
            bytes += choices.workspace * choices.streams.max(1);
        }
        let vectors = vectors::Laid::new(options.vectors, bytes)?;
        let bytes = vectors.end();
        if gradients > MOST_NUMBERS {
            let reason = format!("more than {MOST_NUMBERS} weights");
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

    pub(crate) fn byte(&self, number: usize) -> usize {
        self.arena + number * 4
    }

    /// The turns of a preparation, of all nodes, and of so many updates behind them.
    pub(crate) fn turns(&self, updates: usize, streams: usize) -> Vec<Turn> {
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
    pub(crate) fn prepare(&mut self, taken: &[Option<Way>]) -> Option<Launch<usize>> {
        let mut of_weights = WeightTables::default();
        for (ways, &way) in self.nodes.iter().zip(taken) {
            ways.rows(way).iter().for_each(|rows| of_weights.push(rows));
        }
        self.constants.set(self.rows, bytemuck::cast_slice(&of_weights.all));
        of_weights.launch(control::BYTES + self.rows)
    }

    /// The call for the squared norm of these gradients.
    pub(crate) fn norm(&self, gradients: &Range<usize>) -> Launch<usize> {
        let (n, count) = (gradients.len(), gradients.len().div_ceil(PART));
        let [x, parts, counter] = [self.byte(gradients.start), self.parts, self.counter].map(Arg::At);
        call("squared_norm", count, vec![x, parts, counter, int(n), int(PART), Arg::At(0)])
    }

    /// The call for the optimizer's step along these gradients.
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

    /// The calls behind the nodes of a training run: none in a plan without.
    pub(crate) fn updates(&self) -> Vec<Launch<usize>> {
        let gradients = self.plan.region(Region::Gradients);
        let Some(loss) = self.loss.filter(|_| !gradients.is_empty()) else { return Vec::new() };
        let loss = Arg::At(self.byte(self.plan.place(loss).start));
        let mut calls = vec![self.norm(&gradients)];
        calls.push(call("hold", 1, vec![loss, Arg::At(self.clip_norm), Arg::At(0)]));
        calls.push(self.adam(&gradients));
        calls
    }

    /// The call that keeps the states, or brings them back.
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

/// A plan that lets nodes run side by side, but for too much memory.
fn planned(graph: Graph, options: &PlanOptions, workspaces: &[Workspace], choices: Choices) -> Plan {
    let with = |liveness_slack, graph| {
        Plan::new(graph, &PlanOptions { liveness_slack, ..options.clone() }, workspaces)
    };
    let tight = with(0, graph);
    let most = tight.arena_len() as f64 * (1.0 + MOST_SLACK);
    let loose = [choices.liveness_slack, choices.liveness_slack / 2]
        .into_iter()
        .filter(|&liveness_slack| liveness_slack > 0 && choices.streams > 1);
    let mut plans = loose.map(|liveness_slack| with(liveness_slack, tight.graph().clone()));
    plans.find(|plan| plan.arena_len() as f64 <= most).unwrap_or(tight)
}

/// Memory and arithmetic of a plan on a GPU; needs none.
///
/// # Errors
/// As [`GpuExecutor::new`](crate::GpuExecutor::new), but for what the GPU itself says.
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

/// A call of a kernel in one row of blocks.
pub(crate) fn call(kernel: &'static str, blocks: usize, args: Vec<Arg<usize>>) -> Launch<usize> {
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).max(1);
    Launch { kernel, grid: [blocks, 1, 1], block: [THREADS, 1, 1], args }
}

/// Blocks whose threads go over `count` numbers.
pub(crate) fn blocks(count: usize) -> usize {
    count.div_ceil(THREADS as usize).min(MOST_BLOCKS as usize)
}

/// A size as an argument; sizes were checked when the plan was laid out.
pub(crate) fn int(v: usize) -> Arg<usize> {
    Arg::Int(i32::try_from(v).unwrap_or(i32::MAX))
}
