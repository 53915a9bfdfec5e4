//! Losses: a scalar from a prediction and its target.

use super::{Operation, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{CHUNK, CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use ddpm_kernels::loss;
/// The mean over all elements of a loss of `prediction - target`; operands `prediction, target`, output `[1]`.
pub use ddpm_kernels::loss::Loss;
use rayon::prelude::*;

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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, loss, n) = (ctx.isa(), *self, inputs[0].shape.len());
        let parts = n.div_ceil(CHUNK);
        // Each f64 partial sum is stored as two f32, high and low, as the arena holds f32.
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let sums = &mut args.shared[..2 * parts];
            (args.inputs[0].par_chunks(CHUNK), args.inputs[1].par_chunks(CHUNK), sums.par_chunks_mut(2))
                .into_par_iter()
                .for_each(|(a, b, sum)| {
                    let total = loss::sum(isa, loss, a, b);
                    sum[0] = total as f32;
                    sum[1] = (total - f64::from(sum[0])) as f32;
                });
            let total: f64 = sums.chunks(2).map(|s| f64::from(s[0]) + f64::from(s[1])).sum();
            args.outputs[0][0] = (total / n as f64) as f32;
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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, loss, n) = (ctx.isa(), self.0, inputs[0].shape.len());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let factor = (1.0 / n as f64 * f64::from(args.inputs[2][0])) as f32;
            (
                args.inputs[0].par_chunks(CHUNK),
                args.inputs[1].par_chunks(CHUNK),
                args.outputs[0].par_chunks_mut(CHUNK),
            )
                .into_par_iter()
                .for_each(|(a, b, y)| loss::grad(isa, loss, factor, a, b, y));
        })
    }
}
