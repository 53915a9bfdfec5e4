//! Which tensors may be stored in bf16: those that kernels access through `In` and `Out` (`common.cu`).

use super::attention;
use ddpm_engine::graph::{Graph, Node};
use ddpm_engine::ops::Op;
use ddpm_engine::passes::bf16_storage::Operand::{self, Input, Output};

/// Whether a node's kernels accept an operand, or produce a result, in bf16, given bf16 matmul operands. Statistics, losses and
/// random samples stay in f32.
pub fn accepts_bf16(graph: &Graph, node: &Node, which: Operand) -> bool {
    match &node.op {
        Op::Activate(_)
        | Op::ActivateGrad(_)
        | Op::Add(_)
        | Op::Multiply(_)
        | Op::AddPerChannel(_)
        | Op::Modulate(_)
        | Op::Affine(_)
        | Op::Concat(_)
        | Op::Slice(_)
        | Op::Dropout(_)
        | Op::Resample(_)
        | Op::MaxPool(_)
        | Op::MaxPoolGrad(_)
        | Op::ReduceSpatial(_)
        | Op::SumRows(_) => true,
        Op::GroupNorm(_) | Op::LayerNorm(_) | Op::BatchNorm(_) | Op::BatchNormInference(_) => {
            matches!(which, Input(0) | Output(0))
        }
        Op::GroupNormGrad(_) | Op::LayerNormGrad(_) | Op::BatchNormGrad(_) => {
            matches!(which, Input(0 | 1) | Output(0))
        }
        Op::Attention(op) => {
            attention::on_tensor_cores(graph, node, op) && matches!(which, Input(0) | Output(0))
        }
        Op::AttentionGrad(op) => {
            attention::on_tensor_cores(graph, node, &op.0) && matches!(which, Input(0 | 1 | 3) | Output(0))
        }
        Op::Conv2d(op) => match which {
            // Weights and bias are parameters, which stay in f32.
            Input(i) => i == 0 || i > 1 + usize::from(op.bias),
            Output(_) => true,
        },
        Op::Conv2dTranspose(_) => matches!(which, Input(0) | Output(0)),
        Op::Conv2dWeightGrad(_) => matches!(which, Input(0 | 1)),
        _ => false,
    }
}
