//! The variational bound and its gradient: a task is an image.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::VariationalBound;
use ddpm_kernels::bound;
use rayon::prelude::*;
use std::f64::consts::LN_2;

impl Lowering<'_> {
    pub(super) fn variational_bound(&self, op: &VariationalBound) -> Kernel {
        let (op, shape) = (op.clone(), self.inputs[0].shape);
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

    pub(super) fn variational_bound_grad(&self, op: &VariationalBound) -> Kernel {
        let (op, shape) = (op.clone(), self.inputs[0].shape);
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
