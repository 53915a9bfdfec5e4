//! Layer normalisation over the channels of each pixel (Ba, Kiros, Hinton 2016).

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::elementwise::add_assign;
use ddpm_kernels::layer_norm::{layer_norm, layer_norm_backward};
use rayon::prelude::*;

/// `y = x_hat gamma + beta`; operands `x [.., c], gamma [c], beta [c]`; results `y` and each row's mean and reciprocal
/// standard deviation, `[rows, 2]`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

/// The gradient of [`LayerNorm`]; operands `dy, x, gamma, statistics`; results `dx, dgamma, dbeta`.
#[derive(Clone, Debug)]
pub struct LayerNormGrad;

/// Rows of a task: fixed, so that the order of the sums is.
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
        let made = b.graph.add_all(&b.name(), LayerNormGrad, &operands)?;
        Ok(Some(made.into_iter().map(Some).collect()))
    }

    fn recomputable(&self) -> bool {
        true
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, eps, c) = (cpu.isa(), self.eps, inputs[0].shape.channels());
        Kernel::new(move |run: &mut Run<'_>| {
            let ([x, gamma, beta], [y, stats]) = (run.inputs, &mut *run.outputs) else {
                unreachable!("three operands, two results")
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, c) = (cpu.isa(), inputs[0].shape.channels());
        let shares = (inputs[0].shape.len() / c).div_ceil(ROWS) * 2 * c;
        Kernel::new(move |run: &mut Run<'_>| {
            let ([dy, x, gamma, stats], [dx, dgamma, dbeta]) = (run.inputs, &mut *run.outputs) else {
                unreachable!("four operands, three results")
            };
            let shares = &mut run.shared[..shares];
            (dy.par_chunks(ROWS * c), x.par_chunks(ROWS * c), dx.par_chunks_mut(ROWS * c))
                .into_par_iter()
                .zip((stats.par_chunks(2 * ROWS), shares.par_chunks_mut(2 * c)))
                .for_each(|((dy, x, dx), (stats, share))| {
                    let (dgamma, dbeta) = share.split_at_mut(c);
                    layer_norm_backward(isa, gamma, x, dy, stats, dx, dgamma, dbeta);
                });
            dgamma.fill(0.0);
            dbeta.fill(0.0);
            for share in shares.chunks(2 * c) {
                let (of_gamma, of_beta) = share.split_at(c);
                add_assign(isa, of_gamma, dgamma);
                add_assign(isa, of_beta, dbeta);
            }
        })
        .shared(shares)
    }
}
