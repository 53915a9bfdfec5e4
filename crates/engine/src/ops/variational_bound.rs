//! The variational bound as the loss of a learned variance.

use super::{Operation, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;
use ddpm_kernels::bound;
/// Per-element functions.
pub use ddpm_kernels::bound::{BoundStep, kl, log_likelihood};
use rayon::prelude::*;
use std::f64::consts::LN_2;
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
    fn step(&self, t: f32) -> &BoundStep {
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

    fn cpu_kernel(&self, _: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (op, shape) = (self.clone(), inputs[0].shape);
        let (n, images) = (shape.len(), shape.dims()[0]);
        let image = n / images;
        // Each image's f64 sum is stored as two f32, high and low, as the arena holds f32.
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [output, v, x_0, x_t, t] = args.inputs else { unreachable!("five operands") };
            let sums = &mut args.shared[..2 * images];
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
            args.outputs[0][0] = (op.scale * total / (n as f64 * LN_2)) as f32;
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

    fn cpu_kernel(&self, _: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (op, shape) = (self.0.clone(), inputs[0].shape);
        let (n, image) = (shape.len(), shape.len() / shape.dims()[0]);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [output, v, x_0, x_t, t, dloss] = args.inputs else { unreachable!("six operands") };
            let factor = op.scale * f64::from(dloss[0]) / (n as f64 * LN_2);
            (
                output.par_chunks(image),
                v.par_chunks(image),
                x_0.par_chunks(image),
                x_t.par_chunks(image),
                t.par_iter(),
                args.outputs[0].par_chunks_mut(image),
            )
                .into_par_iter()
                .for_each(|(output, v, x_0, x_t, &t, dv)| {
                    bound::grad(op.step(t), factor, output, v, x_0, x_t, dv);
                });
        })
    }
}
