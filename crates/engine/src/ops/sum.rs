//! Sums over pixels and rows: the gradients of broadcasts.

use super::{Operation, operands};
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::shape::TensorType;
use ddpm_kernels::elementwise;
use rayon::prelude::*;

/// Sum over the pixels of each image, `[n, h, w, c]` to `[n, c]`.
#[derive(Clone, Debug)]
pub struct ReduceSpatial;

/// Sum over all rows, `[.., c]` to `[c]`.
#[derive(Clone, Debug)]
pub struct SumRows;

/// Rows per partial sum; constant, so that the order of summation is fixed.
const ROWS: usize = 512;

impl Operation for ReduceSpatial {
    fn name(&self) -> &'static str {
        "sum_pixels"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("expects [n, h, w, c]".to_owned()) };
        Ok(vec![TensorType { shape: [n, c].into(), dtype: x.dtype }])
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, shape) = (ctx.isa(), inputs[0].shape);
        let image = shape.len() / shape.dims()[0];
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            (args.inputs[0].par_chunks(image), args.outputs[0].par_chunks_mut(shape.channels()))
                .into_par_iter()
                .for_each(|(x, y)| elementwise::sum_rows(isa, x, y));
        })
    }
}

impl Operation for SumRows {
    fn name(&self) -> &'static str {
        "sum_rows"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        Ok(vec![TensorType { shape: [x.shape.channels()].into(), dtype: x.dtype }])
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, shape) = (ctx.isa(), inputs[0].shape);
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
