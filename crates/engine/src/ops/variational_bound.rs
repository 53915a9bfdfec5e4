//! The variational bound as a loss of a learned variance.

use super::{Operation, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use ddpm_kernels::bound;
/// The arithmetic of a number.
pub use ddpm_kernels::bound::{BoundStep, kl, log_likelihood};
use rayon::prelude::*;
use std::f64::consts::LN_2;
use std::sync::Arc;

/// `scale` times the mean over all numbers of the bound's term at their image's timestep, in bits; operands `output, v, x_0,
/// x_t, t [n]`, result `[1]` (Nichol, Dhariwal 2021, section 3.1: `L_vlb`).
///
/// Only v, the variance, has a gradient: the output learns from another loss (the paper's stop-gradient on the mean).
#[derive(Clone, Debug)]
pub struct VariationalBound {
    /// What each timestep's term needs; not empty.
    pub steps: Arc<[BoundStep]>,
    /// What the mean is multiplied by.
    pub scale: f64,
}

/// The gradient of a [`VariationalBound`] by v; operands `output, v, x_0, x_t, t, dloss [1]`.
#[derive(Clone, Debug)]
pub struct VariationalBoundGrad(pub VariationalBound);

impl VariationalBound {
    /// The step of an image; a timestep beyond the table takes the last.
    fn step(&self, t: f32) -> &BoundStep {
        &self.steps[(t as usize).min(self.steps.len() - 1)]
    }

    fn check(&self, [output, v, x_0, x_t, t]: [TensorType; 5]) -> Result<(), String> {
        [v, x_0, x_t].into_iter().try_for_each(|other| same(output, other))?;
        match t.shape.dims() == &output.shape.dims()[..1] && !self.steps.is_empty() {
            true => Ok(()),
            false => Err("takes one timestep an image, and what each timestep needs".to_owned()),
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
        let mut shares = vec![None; 5];
        if b.wants(1) {
            let operands: Vec<Tensor> = (0..5).map(|i| b.input(i)).chain([b.dy]).collect();
            shares[1] = Some(b.graph.add(&b.name(), VariationalBoundGrad(self.clone()), &operands)?);
        }
        Ok(Some(shares))
    }

    fn cpu(&self, _: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (op, shape) = (self.clone(), inputs[0].shape);
        let (n, images) = (shape.len(), shape.dims()[0]);
        let image = n / images;
        // Each f64 sum of an image is kept as two f32, high and low: the arena holds f32.
        Kernel::new(move |run: &mut Run<'_>| {
            let [output, v, x_0, x_t, t] = run.inputs else { unreachable!("five operands") };
            let sums = &mut run.shared[..2 * images];
            (
                output.par_chunks(image),
                v.par_chunks(image),
                x_0.par_chunks(image),
                x_t.par_chunks(image),
                t.par_iter(),
                sums.par_chunks_mut(2),
            )
                .into_par_iter()
                .for_each(|(output, v, x_0, x_t, &t, sum)| {
                    let total = bound::sum(op.step(t), output, v, x_0, x_t);
                    sum[0] = total as f32;
                    sum[1] = (total - f64::from(sum[0])) as f32;
                });
            let total: f64 = sums.chunks(2).map(|s| f64::from(s[0]) + f64::from(s[1])).sum();
            run.outputs[0][0] = (op.scale * total / (n as f64 * LN_2)) as f32;
        })
        .shared(2 * images)
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

    fn cpu(&self, _: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (op, shape) = (self.0.clone(), inputs[0].shape);
        let (n, image) = (shape.len(), shape.len() / shape.dims()[0]);
        Kernel::new(move |run: &mut Run<'_>| {
            let [output, v, x_0, x_t, t, dloss] = run.inputs else { unreachable!("six operands") };
            let factor = op.scale * f64::from(dloss[0]) / (n as f64 * LN_2);
            (
                output.par_chunks(image),
                v.par_chunks(image),
                x_0.par_chunks(image),
                x_t.par_chunks(image),
                t.par_iter(),
                run.outputs[0].par_chunks_mut(image),
            )
                .into_par_iter()
                .for_each(|(output, v, x_0, x_t, &t, dv)| {
                    bound::slope(op.step(t), factor, output, v, x_0, x_t, dv);
                });
        })
    }
}
