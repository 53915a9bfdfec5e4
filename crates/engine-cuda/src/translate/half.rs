//! Which tensors may be of bf16: those that kernels read and write through `In` and `Out` (`common.cu`).

use super::attention;
use ddpm_engine::graph::{Graph, Node};
use ddpm_engine::keep::Operand::{self, Input, Output};
use ddpm_engine::ops::Op;

/// Whether a node's kernels take an operand, or write a result, in bf16, where factors are of bf16. Statistics, losses and what is
/// drawn stay as they are.
pub fn takes_bf16(graph: &Graph, node: &Node, which: Operand) -> bool {
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
            // Weights and bias are parameters.
            Input(i) => i == 0 || i > 1 + usize::from(op.bias),
            Output(_) => true,
        },
        Op::Conv2dTranspose(_) => matches!(which, Input(0) | Output(0)),
        Op::Conv2dWeightGrad(_) => matches!(which, Input(0 | 1)),
        _ => false,
    }
}
