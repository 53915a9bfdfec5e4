//! Layer normalisation: tasks of rows.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::LayerNorm;
use ddpm_kernels::elementwise::add_assign;
use ddpm_kernels::layer_norm::{Saved, layer_norm, layer_norm_backward};
use rayon::prelude::*;

/// Rows per task; constant, so that the order of summation is fixed.
const ROWS: usize = 256;

impl Lowering<'_> {
    pub(super) fn layer_norm(&self, op: &LayerNorm) -> Kernel {
        let (isa, eps, c) = (self.isa, op.eps, self.inputs[0].shape.channels());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([x, gamma, beta], [y, stats]) = (args.inputs, &mut *args.outputs) else {
                unreachable!("three operands, two outputs")
            };
            (x.par_chunks(ROWS * c), y.par_chunks_mut(ROWS * c), stats.par_chunks_mut(2 * ROWS))
                .into_par_iter()
                .for_each(|(x, y, stats)| layer_norm(isa, eps, gamma, beta, x, y, stats));
        })
    }

    pub(super) fn layer_norm_grad(&self) -> Kernel {
        let (isa, c) = (self.isa, self.inputs[0].shape.channels());
        let partials_len = (self.inputs[0].shape.len() / c).div_ceil(ROWS) * 2 * c;
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
