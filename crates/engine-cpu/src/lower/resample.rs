//! Resizing: linear resampling and 2x2 max pooling.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::Resample;
use ddpm_kernels::pool::{max_pool_row, max_pool_row_backward};
use ddpm_kernels::resample::resample_row;
use rayon::prelude::*;

impl Lowering<'_> {
    pub(super) fn resample(&self, op: &Resample) -> Kernel {
        let (isa, op, x) = (self.isa, op.clone(), self.inputs[0].shape);
        let (c, image) = (x.channels(), x.len() / x.dims()[0]);
        let (outputs, row) = (op.rows.outputs(), op.columns.outputs() * c);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let x = args.inputs[0];
            args.outputs[0].par_chunks_mut(row).enumerate().for_each(|(i, y)| {
                let x = &x[i / outputs * image..][..image];
                resample_row(isa, &op.rows, &op.columns, c, x, i % outputs, y);
            });
        })
    }

    pub(super) fn max_pool(&self) -> Kernel {
        let (isa, [_, h, w, c]) = (self.isa, self.inputs[0].shape.nhwc().expect("checked"));
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let x = args.inputs[0];
            args.outputs[0].par_chunks_mut(w / 2 * c).enumerate().for_each(|(i, y)| {
                let top = (i / (h / 2) * h + i % (h / 2) * 2) * w * c;
                let (top, bottom) = x[top..][..2 * w * c].split_at(w * c);
                max_pool_row(isa, c, top, bottom, y);
            });
        })
    }

    pub(super) fn max_pool_grad(&self) -> Kernel {
        let (isa, [_, h, w, c]) = (self.isa, self.inputs[1].shape.nhwc().expect("checked"));
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [dy, x] = args.inputs else { unreachable!("two operands") };
            let images = (args.outputs[0].par_chunks_mut(h * w * c), x.par_chunks(h * w * c));
            images.into_par_iter().zip(dy.par_chunks(h / 2 * (w / 2) * c)).for_each(|((dx, x), dy)| {
                let rows = dx.chunks_mut(2 * w * c).zip(x.chunks(2 * w * c));
                for (i, (dx, x)) in rows.enumerate() {
                    if dx.len() < 2 * w * c {
                        dx.fill(0.0); // an odd last row
                        continue;
                    }
                    let (dx, x, dy) =
                        (dx.split_at_mut(w * c), x.split_at(w * c), &dy[i * (w / 2) * c..][..w / 2 * c]);
                    max_pool_row_backward(isa, c, x.0, x.1, dy, dx.0, dx.1);
                }
            });
        })
    }
}
