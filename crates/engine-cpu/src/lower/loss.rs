//! Losses, and their gradients.

use super::Lowering;
use crate::kernel::{CHUNK, Kernel, KernelArgs};
use ddpm_engine::ops::Loss;
use ddpm_kernels::loss;
use rayon::prelude::*;

impl Lowering<'_> {
    pub(super) fn loss(&self, loss: Loss) -> Kernel {
        let (isa, loss, n) = (self.isa, loss, self.inputs[0].shape.len());
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

    pub(super) fn loss_grad(&self, loss: Loss) -> Kernel {
        let (isa, loss, n) = (self.isa, loss, self.inputs[0].shape.len());
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
