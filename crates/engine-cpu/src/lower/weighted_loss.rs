//! Losses weighted by timestep, and their gradients.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::WeightedLoss;
use ddpm_kernels::loss;
use rayon::prelude::*;

impl Lowering<'_> {
    pub(super) fn weighted_loss(&self, op: &WeightedLoss) -> Kernel {
        let (isa, op, shape) = (self.isa, op.clone(), self.inputs[0].shape);
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

    pub(super) fn weighted_loss_grad(&self, op: &WeightedLoss) -> Kernel {
        let (isa, op, shape) = (self.isa, op.clone(), self.inputs[0].shape);
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
