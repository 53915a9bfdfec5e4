//! Losses: a scalar from a prediction and its target.

use super::{Backward, Operation, operands, same};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
/// The mean over all elements of a loss of `prediction - target`; operands `prediction, target`, output `[1]`.
pub use ddpm_kernels::loss::Loss;

/// The gradient of a [`Loss`] with respect to the prediction; operands `prediction, target, dloss [1]`.
#[derive(Clone, Debug)]
pub struct LossGrad(pub Loss);

impl Operation for Loss {
    fn name(&self) -> &'static str {
        match self {
            Self::Mse => "mse",
            Self::L1 => "l1",
            Self::Huber { .. } => "huber",
        }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b] = operands(inputs)?;
        same(a, b)?;
        Ok(vec![TensorType::f32([1])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        // Losses are symmetric: swapping the operands gives the gradient of the target.
        let mut grads = Vec::new();
        for (a, other) in [(0, 1), (1, 0)] {
            let operands = [b.input(a), b.input(other), b.dy];
            let grad = if b.needs_grad(a) {
                Some(b.graph.add(&b.name(), LossGrad(*self), &operands)?)
            } else {
                None
            };
            grads.push(grad);
        }
        Ok(Some(grads))
    }
}

impl Operation for LossGrad {
    fn name(&self) -> &'static str {
        "loss_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b, _] = operands(inputs)?;
        same(a, b)?;
        Ok(vec![a])
    }
}
