//! Concatenation and slicing of channels.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::Slice;
use rayon::prelude::*;

/// Rows per task.
const ROWS: usize = 1024;

impl Lowering<'_> {
    pub(super) fn concat(&self) -> Kernel {
        let (ca, cb) = (self.inputs[0].shape.channels(), self.inputs[1].shape.channels());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            (
                args.outputs[0].par_chunks_mut(ROWS * (ca + cb)),
                args.inputs[0].par_chunks(ROWS * ca),
                args.inputs[1].par_chunks(ROWS * cb),
            )
                .into_par_iter()
                .for_each(|(y, a, b)| {
                    let rows = a.chunks_exact(ca).zip(b.chunks_exact(cb));
                    for (y, (a, b)) in y.chunks_exact_mut(ca + cb).zip(rows) {
                        y[..ca].copy_from_slice(a);
                        y[ca..].copy_from_slice(b);
                    }
                });
        })
    }

    pub(super) fn slice(&self, op: &Slice) -> Kernel {
        let (c, from, len) = (self.inputs[0].shape.channels(), op.from, op.len);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            (args.outputs[0].par_chunks_mut(ROWS * len), args.inputs[0].par_chunks(ROWS * c))
                .into_par_iter()
                .for_each(|(y, x)| {
                    for (y, x) in y.chunks_exact_mut(len).zip(x.chunks_exact(c)) {
                        y.copy_from_slice(&x[from..from + len]);
                    }
                });
        })
    }
}
