//! Sums over pixels and rows: the gradients of what was broadcast.

use super::{Operation, operands};
use crate::cpu::{Cpu, Kernel, Run};
use crate::shape::TensorType;
use ddpm_kernels::elementwise;
use rayon::prelude::*;

/// `[n, h, w, c]` to `[n, c]`.
#[derive(Clone, Debug)]
pub struct ReduceSpatial;

/// `[.., c]` to `[c]`.
#[derive(Clone, Debug)]
pub struct SumRows;

/// Rows that are summed before the next level of sums: fixed, so that the order is.
const ROWS: usize = 512;

impl Operation for ReduceSpatial {
    fn name(&self) -> &'static str {
        "sum_pixels"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("takes [n, h, w, c]".to_owned()) };
        Ok(vec![TensorType { shape: [n, c].into(), dtype: x.dtype }])
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, shape) = (cpu.isa(), inputs[0].shape);
        let image = shape.len() / shape.dims()[0];
        Kernel::new(move |run: &mut Run<'_>| {
            (run.inputs[0].par_chunks(image), run.outputs[0].par_chunks_mut(shape.channels()))
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, shape) = (cpu.isa(), inputs[0].shape);
        let c = shape.channels();
        let shared = (shape.len() / c).div_ceil(ROWS) * c;
        Kernel::new(move |run: &mut Run<'_>| {
            let parts = &mut run.shared[..shared];
            (run.inputs[0].par_chunks(ROWS * c), parts.par_chunks_mut(c))
                .into_par_iter()
                .for_each(|(x, part)| elementwise::sum_rows(isa, x, part));
            elementwise::sum_rows(isa, parts, run.outputs[0]);
        })
        .shared(shared)
    }
}
