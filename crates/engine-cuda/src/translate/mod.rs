//! From operations to kernel calls: which kernels, with which arguments, and how much scratch memory.

mod attention;
mod conv;
mod half;
mod library;
mod norm;
mod simple;

pub use half::takes_bf16;

use crate::gpu::{Arg, Launch};
use crate::library::{Alternative, Libraries};
use bytemuck::Pod;
use ddpm_engine::graph::{Graph, Kind, Node};
use ddpm_engine::keep::Operand;
use ddpm_engine::ops::Op;
use ddpm_engine::{ComputeOptions, DType, Error, Result, Shape, Tensor};

/// How the executor computes, beyond what the plan says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Whether the factors of f32 products may be rounded to tf32 (10 bits behind the point), which tensor cores take.
    pub tf32: bool,
    /// Blocks that fill a GPU: products with fewer tiles are split. The same for every GPU, so that results are.
    pub blocks: usize,
    /// Where factors are of bf16, tensors of so many numbers or more are stored in bf16.
    pub least_bf16: usize,
    /// Streams, on which nodes run side by side where they do not fill the GPU.
    pub streams: usize,
    /// For how many nodes memory is held longer for that ([`PlanOptions::liveness_slack`](ddpm_engine::PlanOptions::slack)).
    pub liveness_slack: usize,
    /// Most numbers of attention's scores that are in memory at once, where heads are too wide for registers.
    pub scores: usize,
    /// Whether cuDNN and cuBLASLt make products where they are there.
    pub libraries: Libraries,
    /// Bytes of their workspace, for each stream: algorithms that need more are not looked at.
    pub workspace: usize,
}

impl Default for Choices {
    fn default() -> Self {
        Self {
            tf32: false,
            blocks: 264,
            least_bf16: 4096,
            streams: 3,
            liveness_slack: 8,
            scores: 1 << 25,
            libraries: Libraries::Never,
            workspace: 32 << 20,
        }
    }
}

/// Where something is, before the plan is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The node's operand.
    Input(usize),
    /// The node's result.
    Output(usize),
    /// The node's scratch memory, from this number (4 bytes each) on.
    Scratch(usize),
    /// The same as a tensor of bf16.
    HalfScratch(usize),
    /// What the node keeps from run to run, from this number on; `half`: numbers of bf16.
    Kept {
        /// From where.
        at: usize,
        /// In which format.
        half: bool,
    },
    /// The plan's constants, from this byte on.
    Constant(usize),
    /// The control block.
    Control,
    /// The libraries' workspace.
    Workspace,
}

/// A node's kernel calls, and the memory that they need (numbers of 4 bytes).
#[derive(Clone, Debug, Default)]
pub struct Work {
    /// The calls, in order.
    pub launches: Vec<Launch<Place>>,
    /// Weights of which rows are kept: made before the first run, and again when weights have changed.
    pub rows: Vec<Rows<Place>>,
    /// Scratch memory.
    pub scratch: usize,
    /// Memory that is kept from run to run.
    pub kept: usize,
    /// Other ways to make the node, in the same memory, where libraries are wanted.
    pub alternatives: Vec<Alternative<Place>>,
}

/// Weights `[taps, c, n]`, or `[taps, n, c]` where they are `transposed`, that are kept as rows `[n, taps, c]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rows<Place> {
    /// The weights.
    pub from: Place,
    /// What is kept.
    pub to: Place,
    /// Taps.
    pub taps: usize,
    /// Numbers of a tap in a row.
    pub c: usize,
    /// Rows.
    pub n: usize,
    /// Whether `n` stands before `c` in the weights.
    pub transposed: bool,
}

impl<P: Copy> Rows<P> {
    /// The same with every place replaced.
    pub fn placed<Q>(&self, place: impl Fn(P) -> Q) -> Rows<Q> {
        let Self { from, to, taps, c, n, transposed } = *self;
        Rows { from: place(from), to: place(to), taps, c, n, transposed }
    }
}

/// Tables that kernels read.
#[derive(Clone, Debug, Default)]
pub struct Constants {
    bytes: Vec<u8>,
}

impl Constants {
    fn push<T: Pod>(&mut self, table: &[T]) -> Arg<Place> {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytemuck::cast_slice(table));
        Arg::At(Place::Constant(at))
    }

    /// Room for a table of so many bytes, all zeros; where it is.
    pub(crate) fn room(&mut self, bytes: usize) -> usize {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at + bytes, 0);
        at
    }

    /// Fills such room.
    pub(crate) fn set(&mut self, at: usize, table: &[u8]) {
        self.bytes[at..at + table.len()].copy_from_slice(table);
    }

    /// The tables, one behind the other.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Threads of a block of kernels that go number by number.
const THREADS: usize = 256;
/// Most blocks of such a kernel: the threads go round.
const MOST_BLOCKS: usize = 4096;
/// Most numbers of a tensor: kernels count on by as many as a grid has at a time.
pub(crate) const MOST_NUMBERS: usize = i32::MAX as usize - 8 * THREADS * MOST_BLOCKS;
/// Fewest rows or pixels whose sums are one part, and most parts of a sum.
const RUN: usize = 64;
const MOST_RUNS: usize = 256;

/// A node under translation.
struct Translation<'a> {
    inputs: Vec<Shape>,
    outputs: Vec<Shape>,
    /// Which operands are of bf16, and which are parameters.
    half: Vec<bool>,
    /// Whether the first result is of bf16.
    half_result: bool,
    parameters: Vec<bool>,
    arithmetic: ComputeOptions,
    choices: Choices,
    constants: &'a mut Constants,
    work: Work,
}

fn input(i: usize) -> Arg<Place> {
    Arg::At(Place::Input(i))
}

fn output(i: usize) -> Arg<Place> {
    Arg::At(Place::Output(i))
}

const CONTROL: Arg<Place> = Arg::At(Place::Control);

fn int(v: usize) -> Arg<Place> {
    Arg::Int(i32::try_from(v).expect("sizes were checked"))
}

impl Translation<'_> {
    fn launch<const N: usize>(
        &mut self,
        kernel: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        args: [Arg<Place>; N],
    ) {
        self.launch_all(kernel, grid, block, args.to_vec());
    }

    fn launch_all(
        &mut self,
        kernel: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        args: Vec<Arg<Place>>,
    ) {
        let narrow = |v: [usize; 3]| v.map(|v| u32::try_from(v).expect("sizes were checked"));
        let launch = Launch { kernel, grid: narrow(grid), block: narrow(block), args };
        self.work.launches.push(launch);
    }

    /// A kernel whose threads go over `count` items.
    fn each<const N: usize>(&mut self, kernel: &'static str, count: usize, args: [Arg<Place>; N]) {
        let blocks = count.div_ceil(THREADS).clamp(1, MOST_BLOCKS);
        self.launch(kernel, [blocks, 1, 1], [THREADS, 1, 1], args);
    }

    /// Scratch memory for so many numbers, beginning at a cache line.
    fn scratch(&mut self, numbers: usize) -> Arg<Place> {
        let at = self.work.scratch;
        self.work.scratch = (at + numbers).next_multiple_of(16);
        Arg::At(Place::Scratch(at))
    }

    /// The same for numbers of bf16.
    fn half_scratch(&mut self, numbers: usize) -> Arg<Place> {
        let at = self.work.scratch;
        self.work.scratch = (at + numbers.div_ceil(2)).next_multiple_of(16);
        Arg::At(Place::HalfScratch(at))
    }

    /// Bytes of an operand's numbers.
    fn bytes(&self, operand: usize) -> usize {
        if self.half[operand] { 2 } else { 4 }
    }

    /// An operand in bf16: itself, or a copy of this many numbers.
    fn in_bf16(&mut self, operand: usize, numbers: usize) -> Arg<Place> {
        if self.half[operand] {
            return input(operand);
        }
        let copy = self.half_scratch(numbers);
        self.each("copy", numbers.div_ceil(8), [input(operand), copy, int(numbers)]);
        copy
    }

    /// Memory for so many numbers of bf16 that is kept from run to run.
    fn kept_bf16(&mut self, numbers: usize) -> Place {
        let at = self.work.kept;
        self.work.kept = (at + numbers.div_ceil(2)).next_multiple_of(16);
        Place::Kept { at, half: true }
    }

    /// Counters of blocks, which are 0 between launches.
    fn counters(&mut self, count: usize) -> Arg<Place> {
        self.constants.push(&vec![0u32; count])
    }

    /// `out[image] = ` sum over the rows of `x [images, rows, c]`.
    fn column_sums(&mut self, x: Arg<Place>, out: Arg<Place>, images: usize, rows: usize, c: usize) {
        let (run, runs) = runs(rows);
        let parts = self.scratch(images * runs * c);
        let counters = self.counters(images * column_blocks(c));
        let args = [x, out, parts, counters, int(rows), int(c), int(run)];
        self.launch("column_sums", [column_blocks(c), runs, images], [32, 8, 1], args);
    }

    /// Adds parts up in order: `parts [count, c]`.
    fn add_parts(&mut self, parts: Arg<Place>, out: Arg<Place>, count: usize, c: usize) {
        self.launch("add_parts", [c.div_ceil(32), 1, 1], [32, 16, 1], [parts, out, int(count), int(c)]);
    }

    /// The same of `parts [count, 2, c]` to two places.
    fn add_pairs(&mut self, parts: Arg<Place>, out: [Arg<Place>; 2], count: usize, c: usize) {
        let args = [parts, out[0], out[1], int(count), int(c)];
        self.launch("add_pairs", [c.div_ceil(32), 1, 1], [32, 16, 1], args);
    }
}

/// Blocks whose threads have all channels of sums over rows: four each where they can.
fn column_blocks(c: usize) -> usize {
    c.div_ceil(if c.is_multiple_of(4) { 128 } else { 32 })
}

/// How many rows one part of a sum has, and how many parts there are.
fn runs(rows: usize) -> (usize, usize) {
    let run = RUN.max(rows.div_ceil(MOST_RUNS));
    (run, rows.div_ceil(run).max(1))
}

/// The kernel calls of a node.
///
/// # Errors
/// [`Error::Unsupported`] for what has no kernel, or sizes beyond what its kernel counts to.
pub fn translate(
    graph: &Graph,
    node: &Node,
    arithmetic: ComputeOptions,
    choices: Choices,
    constants: &mut Constants,
) -> Result<Work> {
    let unsupported = |reason: String| Error::Unsupported {
        node: node.name.clone(),
        operation: node.op.operation().name(),
        executor: "CUDA",
        reason,
    };
    let half = |t: &[Tensor]| t.iter().map(|&t| graph.ty(t).dtype == DType::Bf16).collect::<Vec<_>>();
    let (half_inputs, half_outputs) = (half(&node.inputs), half(&node.outputs));
    let of_bf16 = |half: &[bool], operand: fn(usize) -> Operand| {
        let mut numbers = half.iter().enumerate().filter(|(_, half)| **half);
        numbers.any(|(i, _)| !takes_bf16(graph, node, operand(i)))
    };
    if of_bf16(&half_inputs, Operand::Input) || of_bf16(&half_outputs, Operand::Output) {
        return Err(Error::DType { node: node.name.clone(), executor: "CUDA", dtype: DType::Bf16 });
    }
    for &t in node.inputs.iter().chain(&node.outputs) {
        let (shape, most) = (graph.shape(t), MOST_NUMBERS);
        if shape.len() > most {
            return Err(unsupported(format!(
                "{shape} has more than {most} numbers, to which its kernels count: take a smaller batch"
            )));
        }
        if shape.dims().len() > 1 && shape.dims().len() == 4 && shape.dims()[0] > 65_535 {
            return Err(unsupported(format!("{shape} has more than 65,535 images: take a smaller batch")));
        }
    }
    let shapes = |t: &[Tensor]| t.iter().map(|&t| graph.shape(t)).collect::<Vec<_>>();
    let mut t = Translation {
        inputs: shapes(&node.inputs),
        outputs: shapes(&node.outputs),
        half_result: half_outputs.first() == Some(&true),
        half: half_inputs,
        parameters: node.inputs.iter().map(|&t| matches!(graph.info(t).kind, Kind::Parameter(_))).collect(),
        arithmetic,
        choices,
        constants,
        work: Work::default(),
    };
    match &node.op {
        Op::Activate(op) => t.activate(op.0),
        Op::ActivateGrad(op) => t.activate_grad(op.0),
        Op::Add(_) => t.pairwise("add"),
        Op::Multiply(_) => t.pairwise("multiply"),
        Op::AddPerChannel(_) => t.by_image("add_per_channel"),
        Op::Modulate(_) => t.by_image("modulate"),
        Op::Affine(op) => t.affine(op),
        Op::Fill(op) => t.fill(op),
        Op::Concat(_) => t.concat(),
        Op::Slice(op) => t.slice(op),
        Op::Dropout(op) => t.dropout(op),
        Op::RunningAverage(op) => t.running_average(op),
        Op::RandomNormal(op) => t.draw_normal(op),
        Op::DrawTimestep(op) => t.draw_timestep(op),
        Op::QSample(op) => t.q_sample(op),
        Op::SinusoidalEmbedding(op) => t.embedding(op),
        Op::Embedding(_) => t.lookup(),
        Op::LookupGrad(op) => t.lookup_grad(op),
        Op::Resample(op) => t.resample(op),
        Op::MaxPool(_) => t.max_pool(),
        Op::MaxPoolGrad(_) => t.max_pool_grad(),
        Op::ReduceSpatial(_) => t.sum_pixels(),
        Op::SumRows(_) => t.sum_rows(),
        Op::Loss(op) => t.loss(*op, None),
        Op::LossGrad(op) => t.loss_grad(op.0, None),
        Op::WeightedLoss(op) => t.loss(op.loss, Some(&op.weight)),
        Op::WeightedLossGrad(op) => t.loss_grad(op.0.loss, Some(&op.0.weight)),
        Op::GroupNorm(op) => t.group_norm(op),
        Op::GroupNormGrad(op) => t.group_norm_grad(&op.0),
        Op::LayerNorm(op) => t.layer_norm(op.eps),
        Op::LayerNormGrad(_) => t.layer_norm_grad(),
        Op::BatchNorm(op) => t.batch_norm(op.eps),
        Op::BatchNormGrad(_) => t.batch_norm_grad(),
        Op::BatchNormInference(op) => t.batch_norm_fixed(op.eps),
        Op::Attention(op) => t.attention(op).map_err(unsupported)?,
        Op::AttentionGrad(op) => t.attention_grad(&op.0).map_err(unsupported)?,
        Op::Conv2d(op) => t.conv(op),
        Op::Conv2dTranspose(op) => t.conv_transpose(op),
        Op::Conv2dWeightGrad(op) => t.conv_weight_grad(op),
        // Only the CPU's plans have it.
        Op::Cast(_) => return Err(unsupported("it stands in the CPU's plans alone".to_owned())),
        Op::VariationalBound(op) => t.bound(op),
        Op::VariationalBoundGrad(op) => t.bound_grad(&op.0),
    }
    if t.work.scratch > i32::MAX as usize {
        return Err(unsupported("its kernels need too much scratch memory: take a smaller batch".to_owned()));
    }
    Ok(t.work)
}
