//! Layer normalisation over the channels of each pixel (Ba, Kiros, Hinton 2016).

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::elementwise::add_assign;
use ddpm_kernels::layer_norm::{Saved, layer_norm, layer_norm_backward};
use rayon::prelude::*;

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

/// Rows per task; constant, so that the order of summation is fixed.
const ROWS: usize = 256;

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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, eps, c) = (ctx.isa(), self.eps, inputs[0].shape.channels());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([x, gamma, beta], [y, stats]) = (args.inputs, &mut *args.outputs) else {
                unreachable!("three operands, two outputs")
            };
            (x.par_chunks(ROWS * c), y.par_chunks_mut(ROWS * c), stats.par_chunks_mut(2 * ROWS))
                .into_par_iter()
                .for_each(|(x, y, stats)| layer_norm(isa, eps, gamma, beta, x, y, stats));
        })
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

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, c) = (ctx.isa(), inputs[0].shape.channels());
        let partials_len = (inputs[0].shape.len() / c).div_ceil(ROWS) * 2 * c;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([dy, x, gamma, stats], [dx, dgamma, dbeta]) = (args.inputs, &mut *args.outputs) else {
                unreachable!("four operands, three outputs")
            };
            let partials = &mut args.shared[..partials_len];
            (dy.par_chunks(ROWS * c), x.par_chunks(ROWS * c), dx.par_chunks_mut(ROWS * c))
                .into_par_iter()
                .zip((stats.par_chunks(2 * ROWS), partials.par_chunks_mut(2 * c)))
                .for_each(|((dy, x, dx), (stats, partial))| {
                    let (dgamma, dbeta) = partial.split_at_mut(c);
                    layer_norm_backward(isa, Saved { gamma, x, stats, dy }, dx, dgamma, dbeta);
                });
            dgamma.fill(0.0);
            dbeta.fill(0.0);
            for partial in partials.chunks(2 * c) {
                let (partial_gamma, partial_beta) = partial.split_at(c);
                add_assign(isa, partial_gamma, dgamma);
                add_assign(isa, partial_beta, dbeta);
            }
        })
        .shared(partials_len)
    }
}
