//! Group normalisation (Wu and He 2018), with an optional fused SiLU.

use super::bf16_storage::MaybeBf16;
use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::norm::{Affine, NormShape, Saved, group_norm, group_norm_backward};
use rayon::prelude::*;

/// `y = act(x_hat * gamma + beta)`; operands `x [n, h, w, c], gamma [c], beta [c]`; outputs `y` and the statistics
/// `[n, 2 * groups]` (means, then reciprocal standard deviations) for the backward pass.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// Number of groups, a divisor of the number of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// The gradient of [`GroupNorm`]; operands `x, dy, gamma, beta, statistics`; outputs `dx, dgamma, dbeta`.
#[derive(Clone, Debug)]
pub struct GroupNormGrad(pub GroupNorm);

impl GroupNorm {
    fn shape(&self, x: Shape) -> NormShape {
        let (pixels, channels) = pixels(x);
        NormShape { pixels, channels, groups: self.groups, eps: self.eps, silu: self.silu }
    }
}

/// Pixels per image, and channels.
fn pixels(x: Shape) -> (usize, usize) {
    (x.len() / x.dims()[0] / x.channels(), x.channels())
}

impl Operation for GroupNorm {
    fn name(&self) -> &'static str {
        if self.silu { "group_norm_silu" } else { "group_norm" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta] = operands(inputs)?;
        let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("expects [n, h, w, c]".to_owned()) };
        if self.groups == 0 || c % self.groups != 0 {
            return Err(format!("{c} channels cannot be divided into {} groups", self.groups));
        }
        if gamma.shape != Shape::new(&[c]) || beta.shape != gamma.shape {
            return Err(format!("gamma and beta must be [{c}]"));
        }
        Ok(vec![TensorType::f32(x.shape), TensorType::f32([n, 2 * self.groups])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.input(0), b.dy, b.input(1), b.input(2), b.output(1)];
        let grads = b.graph.add_all(&b.name(), GroupNormGrad(self.clone()), &operands)?;
        Ok(Some(grads.into_iter().map(Some).collect()))
    }

    fn recomputable(&self) -> bool {
        true
    }

    fn accepts_bf16(&self, operand: usize) -> bool {
        operand == 0
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, ty, shape, groups) = (ctx.isa(), inputs[0], self.shape(inputs[0].shape), self.groups);
        let image = shape.pixels * shape.channels;
        let widened_len = MaybeBf16::scratch_len(ty, image);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let affine = Affine { gamma: args.inputs[1], beta: args.inputs[2] };
            let scratch = args.scratch;
            let x = MaybeBf16::new(ty, args.inputs[0]);
            let [y, stats] = args.outputs else { unreachable!("two outputs") };
            (y.par_chunks_mut(image), stats.par_chunks_mut(2 * groups)).into_par_iter().enumerate().for_each(
                |(i, (y, stats))| {
                    scratch.with(|memory| {
                        let (widened, memory) = memory.split_at_mut(widened_len);
                        let x = x.widened(isa, i * image..(i + 1) * image, widened);
                        group_norm(isa, shape, x, affine, y, stats, memory);
                    });
                },
            );
        })
        .per_thread(widened_len + shape.scratch_len())
    }
}

impl Operation for GroupNormGrad {
    fn name(&self) -> &'static str {
        if self.0.silu { "group_norm_silu_grad" } else { "group_norm_grad" }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, dy, gamma, beta, _] = operands(inputs)?;
        super::same(TensorType::f32(x.shape), dy)?;
        Ok(vec![dy, gamma, beta])
    }

    fn accepts_bf16(&self, operand: usize) -> bool {
        operand == 0
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, ty, shape, groups) = (ctx.isa(), inputs[0], self.0.shape(inputs[0].shape), self.0.groups);
        let (image, c, n) = (shape.pixels * shape.channels, shape.channels, inputs[0].shape.dims()[0]);
        let widened_len = MaybeBf16::scratch_len(ty, image);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [x, dy, gamma, beta, stats] = args.inputs else { unreachable!("five operands") };
            let affine = Affine { gamma, beta };
            let x = MaybeBf16::new(ty, x);
            let [dx, dgamma, dbeta] = args.outputs else { unreachable!("three outputs") };
            let (scratch, partials) = (args.scratch, &mut args.shared[..n * 2 * c]);
            (dy.par_chunks(image), dx.par_chunks_mut(image))
                .into_par_iter()
                .zip((stats.par_chunks(2 * groups), partials.par_chunks_mut(2 * c)))
                .enumerate()
                .for_each(|(i, ((dy, dx), (stats, partial)))| {
                    let (dgamma, dbeta) = partial.split_at_mut(c);
                    scratch.with(|memory| {
                        let (widened, memory) = memory.split_at_mut(widened_len);
                        let x = x.widened(isa, i * image..(i + 1) * image, widened);
                        let saved = Saved { x, affine, stats, dy };
                        group_norm_backward(isa, shape, saved, dx, dgamma, dbeta, memory);
                    });
                });
            dgamma.fill(0.0);
            dbeta.fill(0.0);
            for partial in partials.chunks(2 * c) {
                let (partial_gamma, partial_beta) = partial.split_at(c);
                ddpm_kernels::elementwise::add_assign(isa, partial_gamma, dgamma);
                ddpm_kernels::elementwise::add_assign(isa, partial_beta, dbeta);
            }
        })
        .shared(n * 2 * c)
        .per_thread(widened_len + shape.scratch_len())
    }
}
