//! Group normalisation (Wu and He 2018), with an optional fused SiLU.

use super::{Backward, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};

/// `y = act(x_hat * gamma + beta)`; operands `x [n, h, w, c], gamma [c], beta [c]`; outputs `y` and the statistics
/// `[n, 2 * groups]` (means, then reciprocal standard deviations) for the backward pass.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Number of groups, a divisor of the number of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// The gradient of [`GroupNorm`]; operands `x, dy, gamma, beta, statistics`; outputs `dx, dgamma, dbeta`.
#[derive(Clone, Debug)]
pub struct GroupNormGrad(pub GroupNorm);

impl Operation for GroupNorm {
    fn name(&self) -> &'static str {
        if self.silu { "group_norm_silu" } else { "group_norm" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta] = operands(inputs)?;
        let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("expects [n, h, w, c]".to_owned()) };
        if self.groups == 0 || c % self.groups != 0 {
            return Err(format!("{c} channels cannot be divided into {} groups", self.groups));
        }
        if gamma.shape != Shape::new(&[c]) || beta.shape != gamma.shape {
            return Err(format!("gamma and beta must be [{c}]"));
        }
        Ok(vec![TensorType::f32(x.shape), TensorType::f32([n, 2 * self.groups])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.input(0), b.dy, b.input(1), b.input(2), b.output(1)];
        let grads = b.graph.add_all(&b.name(), GroupNormGrad(self.clone()), &operands)?;
        Ok(Some(grads.into_iter().map(Some).collect()))
    }

    fn recomputable(&self) -> bool {
        true
    }
}

impl Operation for GroupNormGrad {
    fn name(&self) -> &'static str {
        if self.0.silu { "group_norm_silu_grad" } else { "group_norm_grad" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, dy, gamma, beta, _] = operands(inputs)?;
        super::same(TensorType::f32(x.shape), dy)?;
        Ok(vec![dy, gamma, beta])
    }
}
