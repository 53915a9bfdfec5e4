//! Lowering of operations to CPU kernels, specialized for the shapes of their operands: one file per family, as in the engine's `ops`.

mod attention;
mod batch_norm;
mod bf16_storage;
mod concat;
mod conv;
mod diffusion;
mod dropout;
mod embedding;
mod layer_norm;
mod loss;
mod norm;
mod pointwise;
mod resample;
mod sinusoidal_embedding;
mod sum;
mod variational_bound;
mod weighted_loss;
mod winograd;

use crate::kernel::Kernel;
use ddpm_engine::graph::{Graph, Node, TensorKind};
use ddpm_engine::ops::Op;
use ddpm_engine::{ComputeOptions, DType, Error, PlanOptions, Result, Tensor, TensorType};
use ddpm_kernels::Isa;

/// A node being lowered: what its kernel is specialized for, besides the operation.
struct Lowering<'a> {
    isa: Isa,
    /// The approximations that are allowed.
    compute: ComputeOptions,
    /// Whether the node's weights (its second operand) are parameters of an inference plan, so that data derived from them may
    /// be [cached](crate::kernel::KernelArgs::cached).
    fixed_weights: bool,
    /// Types of the operands.
    inputs: &'a [TensorType],
}

/// Whether a node's kernel accepts an operand in bf16; its outputs are f32 either way.
pub fn accepts_bf16(node: &Node, operand: usize) -> bool {
    match &node.op {
        Op::Activate(_) => true,
        Op::ActivateGrad(_) => operand == 1,
        Op::GroupNorm(_) | Op::GroupNormGrad(_) => operand == 0,
        _ => false,
    }
}

/// Lowers a node of `graph` to its kernel.
///
/// # Errors
/// [`Error::DType`] for an operand in bf16 that the kernel does not accept.
pub(crate) fn lower(graph: &Graph, node: &Node, isa: Isa, options: &PlanOptions) -> Result<Kernel> {
    let inputs: Vec<TensorType> = node.inputs.iter().map(|&t| graph.ty(t)).collect();
    let in_place = node.op.operation().in_place();
    debug_assert!(in_place.is_none_or(|i| !accepts_bf16(node, i)), "{}", node.name);
    let unsupported = |i: usize, ty: &TensorType| ty.dtype != DType::F32 && !accepts_bf16(node, i);
    if let Some((_, ty)) = inputs.iter().enumerate().find(|&(i, ty)| unsupported(i, ty)) {
        return Err(Error::DType { node: node.name.clone(), executor: "CPU", dtype: ty.dtype });
    }
    let parameter = |t: &Tensor| matches!(graph.info(*t).kind, TensorKind::Parameter(_));
    let fixed_weights = options.gradients.is_none() && node.inputs.get(1).is_some_and(parameter);
    let compute = options.compute;
    let t = Lowering { isa, compute, fixed_weights, inputs: &inputs };
    Ok(match &node.op {
        Op::Activate(op) => t.activate(op.0),
        Op::ActivateGrad(op) => t.activate_grad(op.0),
        Op::Add(_) => t.add(),
        Op::Multiply(_) => t.multiply(),
        Op::AddPerChannel(_) => t.add_per_channel(),
        Op::Modulate(_) => t.modulate(),
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
        Op::EmbeddingGrad(_) => t.embedding_grad(),
        Op::Resample(op) => t.resample(op),
        Op::MaxPool(_) => t.max_pool(),
        Op::MaxPoolGrad(_) => t.max_pool_grad(),
        Op::ReduceSpatial(_) => t.reduce_spatial(),
        Op::SumRows(_) => t.sum_rows(),
        Op::Loss(op) => t.loss(*op),
        Op::LossGrad(op) => t.loss_grad(op.0),
        Op::WeightedLoss(op) => t.weighted_loss(op),
        Op::WeightedLossGrad(op) => t.weighted_loss_grad(&op.0),
        Op::GroupNorm(op) => t.group_norm(op),
        Op::GroupNormGrad(op) => t.group_norm_grad(&op.0),
        Op::LayerNorm(op) => t.layer_norm(op),
        Op::LayerNormGrad(_) => t.layer_norm_grad(),
        Op::BatchNorm(op) => t.batch_norm(op),
        Op::BatchNormGrad(_) => t.batch_norm_grad(),
        Op::BatchNormInference(op) => t.batch_norm_inference(op),
        Op::Attention(op) => t.attention(op),
        Op::AttentionGrad(op) => t.attention_grad(&op.0),
        Op::Conv2d(op) => t.conv(op),
        Op::Conv2dTranspose(op) => t.conv_transpose(op),
        Op::Conv2dWeightGrad(op) => t.conv_weight_grad(op),
        Op::Cast(_) => t.cast(),
        Op::VariationalBound(op) => t.variational_bound(op),
        Op::VariationalBoundGrad(op) => t.variational_bound_grad(&op.0),
    })
}
