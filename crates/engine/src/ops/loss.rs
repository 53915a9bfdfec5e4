//! Losses: one number from a prediction and its target.

use super::{Operation, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{CHUNK, Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use ddpm_kernels::loss;
/// The mean over all numbers of a loss of `prediction - target`; operands `prediction, target`, result `[1]`.
pub use ddpm_kernels::loss::Loss;
use rayon::prelude::*;

/// The gradient of a [`Loss`] by the prediction; operands `prediction, target, dloss [1]`.
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
        // Every loss is symmetric: with the operands exchanged the gradient is the other one's.
        let mut shares = Vec::new();
        for (a, other) in [(0, 1), (1, 0)] {
            let operands = [b.input(a), b.input(other), b.dy];
            let share =
                if b.wants(a) { Some(b.graph.add(&b.name(), LossGrad(*self), &operands)?) } else { None };
            shares.push(share);
        }
        Ok(Some(shares))
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, loss, n) = (cpu.isa(), *self, inputs[0].shape.len());
        let parts = n.div_ceil(CHUNK);
        // Each f64 partial sum is kept as two f32, high and low: the arena holds f32.
        Kernel::new(move |run: &mut Run<'_>| {
            let sums = &mut run.shared[..2 * parts];
            (run.inputs[0].par_chunks(CHUNK), run.inputs[1].par_chunks(CHUNK), sums.par_chunks_mut(2))
                .into_par_iter()
                .for_each(|(a, b, sum)| {
                    let total = loss::sum(isa, loss, a, b);
                    sum[0] = total as f32;
                    sum[1] = (total - f64::from(sum[0])) as f32;
                });
            let total: f64 = sums.chunks(2).map(|s| f64::from(s[0]) + f64::from(s[1])).sum();
            run.outputs[0][0] = (total / n as f64) as f32;
        })
        .shared(2 * parts)
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, loss, n) = (cpu.isa(), self.0, inputs[0].shape.len());
        Kernel::new(move |run: &mut Run<'_>| {
            let factor = (1.0 / n as f64 * f64::from(run.inputs[2][0])) as f32;
            (
                run.inputs[0].par_chunks(CHUNK),
                run.inputs[1].par_chunks(CHUNK),
                run.outputs[0].par_chunks_mut(CHUNK),
            )
                .into_par_iter()
                .for_each(|(a, b, y)| loss::slope(isa, loss, factor, a, b, y));
        })
    }
}
