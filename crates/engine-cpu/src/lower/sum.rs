//! Sums over pixels and rows.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_kernels::elementwise;
use rayon::prelude::*;

/// Rows per partial sum; constant, so that the order of summation is fixed.
const ROWS: usize = 512;

impl Lowering<'_> {
    pub(super) fn reduce_spatial(&self) -> Kernel {
        let (isa, shape) = (self.isa, self.inputs[0].shape);
        let image = shape.len() / shape.dims()[0];
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            (args.inputs[0].par_chunks(image), args.outputs[0].par_chunks_mut(shape.channels()))
                .into_par_iter()
                .for_each(|(x, y)| elementwise::sum_rows(isa, x, y));
        })
    }

    pub(super) fn sum_rows(&self) -> Kernel {
        let (isa, shape) = (self.isa, self.inputs[0].shape);
        let c = shape.channels();
        let shared = (shape.len() / c).div_ceil(ROWS) * c;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let parts = &mut args.shared[..shared];
            (args.inputs[0].par_chunks(ROWS * c), parts.par_chunks_mut(c))
                .into_par_iter()
                .for_each(|(x, part)| elementwise::sum_rows(isa, x, part));
            elementwise::sum_rows(isa, parts, args.outputs[0]);
        })
        .shared(shared)
    }
}
