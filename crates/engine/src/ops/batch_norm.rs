//! Batch normalisation (Ioffe and Szegedy 2015), with the running statistics that replace the batch's in inference.

use super::{Backward, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};

/// Training: `y = (x - mean) / sqrt(variance + eps) gamma + beta` with the statistics of the batch; operands
/// `x [.., c], gamma [c], beta [c]`. Outputs `y` and, `[c]` each, the mean, `1 / sqrt(variance + eps)` and the unbiased
/// variance, which the running variance averages.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f32,
}

/// The gradient of [`BatchNorm`]; operands `dy, x, gamma, mean, rstd`; outputs `dx, dgamma, dbeta`.
#[derive(Clone, Debug)]
pub struct BatchNormGrad;

/// Inference: the same with given statistics; operands `x, gamma, beta, mean, variance`. It has no gradient.
#[derive(Clone, Debug)]
pub struct BatchNormInference {
    /// Added to the variance.
    pub eps: f32,
}

/// `running = (1 - momentum) running + momentum value`, in place: the first operand is a state of the graph.
#[derive(Clone, Debug)]
pub struct RunningAverage {
    /// The weight of the new value.
    pub momentum: f32,
}

fn check(x: TensorType, per_channel: &[TensorType]) -> Result<(), String> {
    let c = x.shape.channels();
    if per_channel.iter().any(|t| t.shape != Shape::new(&[c])) {
        return Err(format!("all operands except x must be [{c}]"));
    }
    Ok(())
}

impl Operation for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta] = operands(inputs)?;
        check(x, &[gamma, beta])?;
        if x.shape.len() == x.shape.channels() {
            return Err("a batch with one value per channel has no variance".to_owned());
        }
        Ok(vec![x, gamma, gamma, gamma])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.dy, b.input(0), b.input(1), b.output(1), b.output(2)];
        let grads = b.graph.add_all(&b.name(), BatchNormGrad, &operands)?;
        Ok(Some(grads.into_iter().map(Some).collect()))
    }

    fn recomputable(&self) -> bool {
        true
    }
}

impl Operation for BatchNormGrad {
    fn name(&self) -> &'static str {
        "batch_norm_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, x, gamma, mean, rstd] = operands(inputs)?;
        super::same(dy, x)?;
        check(x, &[gamma, mean, rstd])?;
        Ok(vec![x, gamma, gamma])
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}

impl Operation for BatchNormInference {
    fn name(&self) -> &'static str {
        "batch_norm_fixed"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta, mean, variance] = operands(inputs)?;
        check(x, &[gamma, beta, mean, variance])?;
        Ok(vec![x])
    }
}

impl Operation for RunningAverage {
    fn name(&self) -> &'static str {
        "running_average"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [running, value] = operands(inputs)?;
        super::same(running, value)?;
        Ok(vec![running])
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}
