//! Losses weighted by timestep.

use super::{Backward, Loss, Operation, operands, same};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use std::sync::Arc;

/// The mean over all elements of `weight[t] loss(prediction - target)`, with t the timestep of the element's image; operands
/// `prediction, target, t [n]`, output `[1]`. Only the prediction has a gradient.
#[derive(Clone, Debug)]
pub struct WeightedLoss {
    /// The unweighted loss.
    pub loss: Loss,
    /// The weight of each timestep.
    pub weight: Arc<[f32]>,
}

/// The gradient of a [`WeightedLoss`] with respect to the prediction; operands `prediction, target, t, dloss [1]`.
#[derive(Clone, Debug)]
pub struct WeightedLossGrad(pub WeightedLoss);

impl WeightedLoss {
    /// The weight of timestep `t`, clamped to the table.
    pub fn weight_at(&self, t: f32) -> f64 {
        f64::from(self.weight[(t as usize).min(self.weight.len() - 1)])
    }

    fn check(&self, a: TensorType, b: TensorType, t: TensorType) -> Result<(), String> {
        same(a, b)?;
        if t.shape.dims() == &a.shape.dims()[..1] && !self.weight.is_empty() {
            Ok(())
        } else {
            Err("expects one timestep per image, and a weight for each timestep".to_owned())
        }
    }
}

impl Operation for WeightedLoss {
    fn name(&self) -> &'static str {
        "weighted_loss"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b, t] = operands(inputs)?;
        self.check(a, b, t)?;
        Ok(vec![TensorType::f32([1])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        if b.needs_grad(1) {
            return Ok(None);
        }
        let operands = [b.input(0), b.input(1), b.input(2), b.dy];
        let grad = b.graph.add(&b.name(), WeightedLossGrad(self.clone()), &operands)?;
        Ok(Some(vec![Some(grad), None, None]))
    }
}

impl Operation for WeightedLossGrad {
    fn name(&self) -> &'static str {
        "weighted_loss_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b, t, _] = operands(inputs)?;
        self.0.check(a, b, t)?;
        Ok(vec![a])
    }
}
