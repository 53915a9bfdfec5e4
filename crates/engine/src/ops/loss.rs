//! Losses: one number from a prediction and its target.

use super::{Operation, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{CHUNK, Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use ddpm_kernels::elementwise;
use rayon::prelude::*;

/// The mean of `(prediction - target)^2` over all numbers; result `[1]`.
#[derive(Clone, Debug)]
pub struct Mse;

/// The gradient of [`Mse`] by the prediction; operands `prediction, target, dloss [1]`.
#[derive(Clone, Debug)]
pub struct MseGrad;

impl Operation for Mse {
    fn name(&self) -> &'static str {
        "mse"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b] = operands(inputs)?;
        same(a, b)?;
        Ok(vec![TensorType::f32([1])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let mut shares = Vec::new();
        for (a, other) in [(0, 1), (1, 0)] {
            let operands = [b.input(a), b.input(other), b.dy];
            let share = if b.wants(a) { Some(b.graph.add(&b.name(), MseGrad, &operands)?) } else { None };
            shares.push(share);
        }
        Ok(Some(shares))
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, n) = (cpu.isa(), inputs[0].shape.len());
        let parts = n.div_ceil(CHUNK);
        // Each f64 partial sum is kept as two f32, high and low: the arena holds f32.
        Kernel::new(move |run: &mut Run<'_>| {
            let sums = &mut run.shared[..2 * parts];
            (run.inputs[0].par_chunks(CHUNK), run.inputs[1].par_chunks(CHUNK), sums.par_chunks_mut(2))
                .into_par_iter()
                .for_each(|(a, b, sum)| {
                    let total = elementwise::squared_distance(isa, a, b);
                    sum[0] = total as f32;
                    sum[1] = (total - f64::from(sum[0])) as f32;
                });
            let total: f64 = sums.chunks(2).map(|s| f64::from(s[0]) + f64::from(s[1])).sum();
            run.outputs[0][0] = (total / n as f64) as f32;
        })
        .shared(2 * parts)
    }
}

impl Operation for MseGrad {
    fn name(&self) -> &'static str {
        "mse_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b, _] = operands(inputs)?;
        same(a, b)?;
        Ok(vec![a])
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, n) = (cpu.isa(), inputs[0].shape.len());
        Kernel::new(move |run: &mut Run<'_>| {
            let factor = (2.0 / n as f64 * f64::from(run.inputs[2][0])) as f32;
            (
                run.inputs[0].par_chunks(CHUNK),
                run.inputs[1].par_chunks(CHUNK),
                run.outputs[0].par_chunks_mut(CHUNK),
            )
                .into_par_iter()
                .for_each(|(a, b, y)| elementwise::scaled_difference(isa, factor, a, b, y));
        })
    }
}
