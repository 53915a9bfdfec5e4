//! Group normalisation: a task is an image.

use super::Lowering;
use super::bf16_storage::MaybeBf16;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::Shape;
use ddpm_engine::ops::GroupNorm;
use ddpm_kernels::norm::{Affine, NormShape, Saved, group_norm, group_norm_backward};
use rayon::prelude::*;

/// The sizes of the normalisation of each image of `x`.
fn norm_shape(op: &GroupNorm, x: Shape) -> NormShape {
    let (pixels, channels) = (x.len() / x.dims()[0] / x.channels(), x.channels());
    NormShape { pixels, channels, groups: op.groups, eps: op.eps, silu: op.silu }
}

impl Lowering<'_> {
    pub(super) fn group_norm(&self, op: &GroupNorm) -> Kernel {
        let (isa, ty, shape, groups) =
            (self.isa, self.inputs[0], norm_shape(op, self.inputs[0].shape), op.groups);
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

    pub(super) fn group_norm_grad(&self, op: &GroupNorm) -> Kernel {
        let (isa, ty, shape, groups) =
            (self.isa, self.inputs[0], norm_shape(op, self.inputs[0].shape), op.groups);
        let (image, c, n) = (shape.pixels * shape.channels, shape.channels, self.inputs[0].shape.dims()[0]);
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
