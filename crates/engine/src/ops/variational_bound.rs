//! The variational bound as the loss of a learned variance.

use super::{Backward, Operation, operands, same};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
/// Per-element functions.
pub use ddpm_kernels::bound::{BoundStep, kl, log_likelihood};
use std::sync::Arc;

/// `scale` times the mean over all elements of the bound's term at their image's timestep, in bits; operands `output, v, x_0,
/// x_t, t [n]`, output `[1]` (Nichol, Dhariwal 2021, section 3.1: `L_vlb`).
///
/// Only v, the variance, has a gradient: `output` is trained by another loss (the paper's stop-gradient on the mean).
#[derive(Clone, Debug)]
pub struct VariationalBound {
    /// Coefficients of the term of each timestep; not empty.
    pub steps: Arc<[BoundStep]>,
    /// Scale of the mean.
    pub scale: f64,
}

/// The gradient of a [`VariationalBound`] with respect to v; operands `output, v, x_0, x_t, t, dloss [1]`.
#[derive(Clone, Debug)]
pub struct VariationalBoundGrad(pub VariationalBound);

impl VariationalBound {
    /// The coefficients of timestep `t`, clamped to the table.
    pub fn step(&self, t: f32) -> &BoundStep {
        &self.steps[(t as usize).min(self.steps.len() - 1)]
    }

    fn check(&self, [output, v, x_0, x_t, t]: [TensorType; 5]) -> Result<(), String> {
        [v, x_0, x_t].into_iter().try_for_each(|other| same(output, other))?;
        if t.shape.dims() == &output.shape.dims()[..1] && !self.steps.is_empty() {
            Ok(())
        } else {
            Err("expects one timestep per image, and the coefficients of each timestep".to_owned())
        }
    }
}

impl Operation for VariationalBound {
    fn name(&self) -> &'static str {
        "variational_bound"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        self.check(operands(inputs)?)?;
        Ok(vec![TensorType::f32([1])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let mut grads = vec![None; 5];
        if b.needs_grad(1) {
            let operands: Vec<Tensor> = (0..5).map(|i| b.input(i)).chain([b.dy]).collect();
            grads[1] = Some(b.graph.add(&b.name(), VariationalBoundGrad(self.clone()), &operands)?);
        }
        Ok(Some(grads))
    }
}

impl Operation for VariationalBoundGrad {
    fn name(&self) -> &'static str {
        "variational_bound_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [output, v, x_0, x_t, t, _] = operands(inputs)?;
        self.0.check([output, v, x_0, x_t, t])?;
        Ok(vec![v])
    }
}
