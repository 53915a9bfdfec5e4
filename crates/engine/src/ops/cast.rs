//! Tensors stored in bf16, which plans with bf16 matmul operands keep for the backward pass (see [`bf16_storage`](crate::passes::bf16_storage)).

use super::{Operation, operands};
use crate::shape::{DType, TensorType};

/// `y = x` rounded to bf16, two elements in the memory of one f32. It has no gradient: it only occurs in plans, where later nodes
/// read `y` instead of `x`.
#[derive(Clone, Debug)]
pub struct Cast;

impl Operation for Cast {
    fn name(&self) -> &'static str {
        "to_bf16"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        Ok(vec![TensorType { dtype: DType::Bf16, ..x }])
    }
}
