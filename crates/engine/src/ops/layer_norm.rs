//! Layer normalisation over the channels of each pixel (Ba, Kiros, Hinton 2016).

use super::{Backward, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};

/// `y = x_hat gamma + beta`; operands `x [.., c], gamma [c], beta [c]`; outputs `y` and each row's mean and reciprocal
/// standard deviation, `[rows, 2]`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

/// The gradient of [`LayerNorm`]; operands `dy, x, gamma, statistics`; outputs `dx, dgamma, dbeta`.
#[derive(Clone, Debug)]
pub struct LayerNormGrad;

impl Operation for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta] = operands(inputs)?;
        let c = x.shape.channels();
        if gamma.shape != Shape::new(&[c]) || beta.shape != gamma.shape {
            return Err(format!("gamma and beta must be [{c}]"));
        }
        Ok(vec![x, TensorType::f32([x.shape.len() / c, 2])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.dy, b.input(0), b.input(1), b.output(1)];
        let grads = b.graph.add_all(&b.name(), LayerNormGrad, &operands)?;
        Ok(Some(grads.into_iter().map(Some).collect()))
    }

    fn recomputable(&self) -> bool {
        true
    }
}

impl Operation for LayerNormGrad {
    fn name(&self) -> &'static str {
        "layer_norm_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, x, gamma, _] = operands(inputs)?;
        super::same(dy, x)?;
        Ok(vec![x, gamma, gamma])
    }
}
