//! Losses weighted by timestep.

use super::{Loss, Operation, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use ddpm_kernels::loss;
use rayon::prelude::*;
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
    fn weight_at(&self, t: f32) -> f64 {
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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, op, shape) = (ctx.isa(), self.clone(), inputs[0].shape);
        let (n, images) = (shape.len(), shape.dims()[0]);
        // Each image's f64 sum is stored as two f32, high and low, as the arena holds f32.
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [a, b, t] = args.inputs else { unreachable!("three operands") };
            let sums = &mut args.shared[..2 * images];
            (a.par_chunks(n / images), b.par_chunks(n / images), t.par_iter(), sums.par_chunks_mut(2))
                .into_par_iter()
                .for_each(|(a, b, &t, sum)| {
                    let total = op.weight_at(t) * loss::sum(isa, op.loss, a, b);
                    sum[0] = total as f32;
                    sum[1] = (total - f64::from(sum[0])) as f32;
                });
            let total: f64 = sums.chunks(2).map(|s| f64::from(s[0]) + f64::from(s[1])).sum();
            args.outputs[0][0] = (total / n as f64) as f32;
        })
        .shared(2 * images)
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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, op, shape) = (ctx.isa(), self.0.clone(), inputs[0].shape);
        let (n, image) = (shape.len(), shape.len() / shape.dims()[0]);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [a, b, t, dloss] = args.inputs else { unreachable!("four operands") };
            let factor = f64::from(dloss[0]) / n as f64;
            (a.par_chunks(image), b.par_chunks(image), t.par_iter(), args.outputs[0].par_chunks_mut(image))
                .into_par_iter()
                .for_each(|(a, b, &t, y)| {
                    loss::grad(isa, op.loss, (op.weight_at(t) * factor) as f32, a, b, y);
                });
        })
    }
}
