//! Lowering of operations to kernel launches: which kernels, with which arguments, and how much scratch memory.

mod attention;
mod bf16;
mod conv;
mod library;
mod norm;
mod simple;

pub use bf16::accepts_bf16;

use crate::launch::{Arg, Launch, WeightRepack};
use crate::library::{Alternative, Libraries};
use bytemuck::Pod;
use ddpm_engine::graph::{Graph, Node, TensorKind};
use ddpm_engine::ops::Op;
use ddpm_engine::passes::bf16_storage::Operand;
use ddpm_engine::{ComputeOptions, DType, Error, Result, Shape, Tensor};

/// Settings of the CUDA executor beyond those of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Whether operands of f32 matrix products may be rounded to tf32 (10-bit mantissa) for tensor cores.
    pub tf32: bool,
    /// Blocks that fill a GPU: products with fewer tiles split k. The same for every GPU, so that results are too.
    pub blocks: usize,
    /// With bf16 matmul operands, tensors of at least this many elements are stored in bf16.
    pub min_bf16_elems: usize,
    /// Streams on which nodes run concurrently where they do not fill the GPU.
    pub streams: usize,
    /// Number of nodes by which lifetimes are extended for that purpose ([`PlanOptions::liveness_slack`](ddpm_engine::PlanOptions::liveness_slack)).
    pub liveness_slack: usize,
    /// Most attention scores (in elements) held in memory at once, for heads that are too wide for registers.
    pub max_scores: usize,
    /// Whether cuDNN and cuBLASLt are used where available.
    pub libraries: Libraries,
    /// Bytes of library workspace per stream; algorithms that need more are not considered.
    pub workspace: usize,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            tf32: false,
            blocks: 264,
            min_bf16_elems: 4096,
            streams: 3,
            liveness_slack: 8,
            max_scores: 1 << 25,
            libraries: Libraries::Never,
            workspace: 32 << 20,
        }
    }
}

/// A memory reference before the plan is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemRef {
    /// An operand of the node.
    Input(usize),
    /// A result of the node.
    Output(usize),
    /// The node's scratch memory, from this 4-byte word on.
    Scratch(usize),
    /// The same, as a bf16 tensor.
    Bf16Scratch(usize),
    /// Memory that the node keeps from run to run, from this 4-byte word on.
    Cached {
        /// Offset in words.
        at: usize,
        /// Whether the elements are bf16.
        bf16: bool,
    },
    /// The plan's constants, from this byte on.
    Constant(usize),
    /// The control block.
    Control,
    /// The library workspace.
    Workspace,
}

/// A node's launches and memory needs (in 4-byte words).
#[derive(Clone, Debug, Default)]
pub struct LoweredNode {
    /// The launches, in order.
    pub launches: Vec<Launch<MemRef>>,
    /// Weights to repack before the first run, and again whenever weights change.
    pub repacks: Vec<WeightRepack<MemRef>>,
    /// Scratch memory.
    pub scratch: usize,
    /// Memory that is kept from run to run.
    pub cached: usize,
    /// Alternatives that use libraries, in the same memory, if libraries are enabled.
    pub alternatives: Vec<Alternative<MemRef>>,
}

/// Constant tables that kernels read.
#[derive(Clone, Debug, Default)]
pub struct Constants {
    bytes: Vec<u8>,
}

impl Constants {
    fn push<T: Pod>(&mut self, table: &[T]) -> Arg<MemRef> {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytemuck::cast_slice(table));
        Arg::At(MemRef::Constant(at))
    }

    /// Reserves a zeroed table of this many bytes and returns its offset.
    pub(crate) fn reserve(&mut self, bytes: usize) -> usize {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at + bytes, 0);
        at
    }

    /// Fills a reserved table.
    pub(crate) fn set(&mut self, at: usize, table: &[u8]) {
        self.bytes[at..at + table.len()].copy_from_slice(table);
    }

    /// All tables, concatenated.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Threads per block of elementwise kernels.
const THREADS: usize = 256;
/// Maximum blocks of such a kernel, which uses a grid-stride loop.
const MAX_BLOCKS: usize = 4096;
/// Maximum elements per tensor: the last iteration of a grid-stride loop overshoots by up to one grid.
pub(crate) const MAX_ELEMS: usize = i32::MAX as usize - 8 * THREADS * MAX_BLOCKS;
/// Fewest rows or pixels per partial sum, and most partial sums.
const MIN_RUN: usize = 64;
const MAX_RUNS: usize = 256;

/// A node being lowered.
struct Lowering<'a> {
    inputs: Vec<Shape>,
    outputs: Vec<Shape>,
    /// Which operands are bf16.
    bf16: Vec<bool>,
    /// Whether the first result is bf16.
    bf16_result: bool,
    parameters: Vec<bool>,
    compute: ComputeOptions,
    options: CudaOptions,
    constants: &'a mut Constants,
    lowered: LoweredNode,
}

fn input(i: usize) -> Arg<MemRef> {
    Arg::At(MemRef::Input(i))
}

fn output(i: usize) -> Arg<MemRef> {
    Arg::At(MemRef::Output(i))
}

const CONTROL: Arg<MemRef> = Arg::At(MemRef::Control);

fn int(v: usize) -> Arg<MemRef> {
    Arg::Int(i32::try_from(v).expect("sizes were checked"))
}

impl Lowering<'_> {
    fn launch<const N: usize>(
        &mut self,
        kernel: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        args: [Arg<MemRef>; N],
    ) {
        self.launch_all(kernel, grid, block, args.to_vec());
    }

    fn launch_all(
        &mut self,
        kernel: &'static str,
        grid: [usize; 3],
        block: [usize; 3],
        args: Vec<Arg<MemRef>>,
    ) {
        let narrow = |v: [usize; 3]| v.map(|v| u32::try_from(v).expect("sizes were checked"));
        let launch = Launch { kernel, grid: narrow(grid), block: narrow(block), args };
        self.lowered.launches.push(launch);
    }

    /// Launches a grid-stride loop over `count` items.
    fn each<const N: usize>(&mut self, kernel: &'static str, count: usize, args: [Arg<MemRef>; N]) {
        let blocks = count.div_ceil(THREADS).clamp(1, MAX_BLOCKS);
        self.launch(kernel, [blocks, 1, 1], [THREADS, 1, 1], args);
    }

    /// Allocates scratch memory for this many elements, starting at a cache line.
    fn scratch(&mut self, elems: usize) -> Arg<MemRef> {
        let at = self.lowered.scratch;
        self.lowered.scratch = (at + elems).next_multiple_of(16);
        Arg::At(MemRef::Scratch(at))
    }

    /// The same for bf16 elements.
    fn bf16_scratch(&mut self, elems: usize) -> Arg<MemRef> {
        let at = self.lowered.scratch;
        self.lowered.scratch = (at + elems.div_ceil(2)).next_multiple_of(16);
        Arg::At(MemRef::Bf16Scratch(at))
    }

    /// Size of an operand's elements in bytes.
    fn bytes(&self, operand: usize) -> usize {
        if self.bf16[operand] { 2 } else { 4 }
    }

    /// An operand in bf16: itself, or a converted copy of this many elements.
    fn in_bf16(&mut self, operand: usize, elems: usize) -> Arg<MemRef> {
        if self.bf16[operand] {
            return input(operand);
        }
        let copy = self.bf16_scratch(elems);
        self.each("copy", elems.div_ceil(8), [input(operand), copy, int(elems)]);
        copy
    }

    /// Allocates memory for this many bf16 elements that is kept from run to run.
    fn cached_bf16(&mut self, elems: usize) -> MemRef {
        let at = self.lowered.cached;
        self.lowered.cached = (at + elems.div_ceil(2)).next_multiple_of(16);
        MemRef::Cached { at, bf16: true }
    }

    /// Block counters, which are 0 between launches.
    fn counters(&mut self, count: usize) -> Arg<MemRef> {
        self.constants.push(&vec![0u32; count])
    }

    /// `out[image] = ` sum over the rows of `x [images, rows, c]`.
    fn column_sums(&mut self, x: Arg<MemRef>, out: Arg<MemRef>, images: usize, rows: usize, c: usize) {
        let (run, runs) = runs(rows);
        let parts = self.scratch(images * runs * c);
        let counters = self.counters(images * column_blocks(c));
        let args = [x, out, parts, counters, int(rows), int(c), int(run)];
        self.launch("column_sums", [column_blocks(c), runs, images], [32, 8, 1], args);
    }

    /// Sums `parts [count, c]` over the first axis, in order.
    fn add_parts(&mut self, parts: Arg<MemRef>, out: Arg<MemRef>, count: usize, c: usize) {
        self.launch("add_parts", [c.div_ceil(32), 1, 1], [32, 16, 1], [parts, out, int(count), int(c)]);
    }

    /// The same for `parts [count, 2, c]`, with two results.
    fn add_pairs(&mut self, parts: Arg<MemRef>, out: [Arg<MemRef>; 2], count: usize, c: usize) {
        let args = [parts, out[0], out[1], int(count), int(c)];
        self.launch("add_pairs", [c.div_ceil(32), 1, 1], [32, 16, 1], args);
    }
}

/// Blocks that cover all channels of a sum over rows, with four channels per thread where possible.
fn column_blocks(c: usize) -> usize {
    c.div_ceil(if c.is_multiple_of(4) { 128 } else { 32 })
}

/// Rows per partial sum, and the number of partial sums.
fn runs(rows: usize) -> (usize, usize) {
    let run = MIN_RUN.max(rows.div_ceil(MAX_RUNS));
    (run, rows.div_ceil(run).max(1))
}

fn unsupported(node: &Node, reason: String) -> Error {
    let (node, operation) = (node.name.clone(), node.op.operation().name());
    Error::Unsupported { node, operation, executor: "CUDA", reason }
}

/// Checks that kernels accept the data types, and can index tensors of these sizes.
fn check(graph: &Graph, node: &Node, bf16_inputs: &[bool], bf16_outputs: &[bool]) -> Result<()> {
    let any_unsupported = |bf16: &[bool], operand: fn(usize) -> Operand| {
        let mut stored = bf16.iter().enumerate().filter(|(_, bf16)| **bf16);
        stored.any(|(i, _)| !accepts_bf16(graph, node, operand(i)))
    };
    if any_unsupported(bf16_inputs, Operand::Input) || any_unsupported(bf16_outputs, Operand::Output) {
        return Err(Error::DType { node: node.name.clone(), executor: "CUDA", dtype: DType::Bf16 });
    }
    for &t in node.inputs.iter().chain(&node.outputs) {
        let (shape, max) = (graph.shape(t), MAX_ELEMS);
        if shape.len() > max {
            return Err(unsupported(
                node,
                format!(
                    "{shape} has more than {max} elements, the most its kernels can index: use a smaller batch"
                ),
            ));
        }
        if shape.dims().len() == 4 && shape.dims()[0] > 65_535 {
            return Err(unsupported(
                node,
                format!("{shape} has more than 65,535 images: use a smaller batch"),
            ));
        }
    }
    Ok(())
}

/// Lowers a node to kernel launches.
///
/// # Errors
/// [`Error::Unsupported`] for operations without a kernel, or sizes beyond what the kernel can index.
pub fn lower(
    graph: &Graph,
    node: &Node,
    compute: ComputeOptions,
    options: CudaOptions,
    constants: &mut Constants,
) -> Result<LoweredNode> {
    let unsupported = |reason: String| unsupported(node, reason);
    let is_bf16 = |t: &[Tensor]| t.iter().map(|&t| graph.ty(t).dtype == DType::Bf16).collect::<Vec<_>>();
    let (bf16_inputs, bf16_outputs) = (is_bf16(&node.inputs), is_bf16(&node.outputs));
    check(graph, node, &bf16_inputs, &bf16_outputs)?;
    let shapes = |t: &[Tensor]| t.iter().map(|&t| graph.shape(t)).collect::<Vec<_>>();
    let mut t = Lowering {
        inputs: shapes(&node.inputs),
        outputs: shapes(&node.outputs),
        bf16_result: bf16_outputs.first() == Some(&true),
        bf16: bf16_inputs,
        parameters: node
            .inputs
            .iter()
            .map(|&t| matches!(graph.info(t).kind, TensorKind::Parameter(_)))
            .collect(),
        compute,
        options,
        constants,
        lowered: LoweredNode::default(),
    };
    match &node.op {
        Op::Activate(op) => t.activate(op.0),
        Op::ActivateGrad(op) => t.activate_grad(op.0),
        Op::Add(_) => t.pairwise("add"),
        Op::Multiply(_) => t.pairwise("multiply"),
        Op::AddPerChannel(_) => t.per_image("add_per_channel"),
        Op::Modulate(_) => t.per_image("modulate"),
        Op::Affine(op) => t.affine(op),
        Op::Fill(op) => t.fill(op),
        Op::Concat(_) => t.concat(),
        Op::Slice(op) => t.slice(op),
        Op::Dropout(op) => t.dropout(op),
        Op::RunningAverage(op) => t.running_average(op),
        Op::RandomNormal(op) => t.random_normal(op),
        Op::RandomTimestep(op) => t.random_timestep(op),
        Op::QSample(op) => t.q_sample(op),
        Op::SinusoidalEmbedding(op) => t.sinusoidal_embedding(op),
        Op::Embedding(_) => t.embedding(),
        Op::EmbeddingGrad(op) => t.embedding_grad(op),
        Op::Resample(op) => t.resample(op),
        Op::MaxPool(_) => t.max_pool(),
        Op::MaxPoolGrad(_) => t.max_pool_grad(),
        Op::ReduceSpatial(_) => t.reduce_spatial(),
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
        Op::BatchNormInference(op) => t.batch_norm_inference(op.eps),
        Op::Attention(op) => t.attention(op).map_err(unsupported)?,
        Op::AttentionGrad(op) => t.attention_grad(&op.0).map_err(unsupported)?,
        Op::Conv2d(op) => t.conv(op),
        Op::Conv2dTranspose(op) => t.conv_transpose(op),
        Op::Conv2dWeightGrad(op) => t.conv_weight_grad(op),
        // Inserted only by the CPU executor.
        Op::Cast(_) => return Err(unsupported("it occurs only in CPU plans".to_owned())),
        Op::VariationalBound(op) => t.bound(op),
        Op::VariationalBoundGrad(op) => t.bound_grad(&op.0),
    }
    if t.lowered.scratch > i32::MAX as usize {
        return Err(unsupported("its kernels need too much scratch memory: use a smaller batch".to_owned()));
    }
    Ok(t.lowered)
}
