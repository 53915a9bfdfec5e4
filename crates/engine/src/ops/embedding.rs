//! Embedding lookup: the rows of a table selected by class labels.

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;

/// `y[i] = table[label[i]]`; operands `table [k, c], label [n]` (integers below k); output `[n, c]`. Any other label
/// gives zeros.
#[derive(Clone, Debug)]
pub struct Embedding;

/// The gradient of [`Embedding`] with respect to the table; operands `dy, label`.
#[derive(Clone, Debug)]
pub struct EmbeddingGrad {
    /// Rows of the table.
    pub rows: usize,
}

/// The row of a label.
fn row(label: f32) -> Option<usize> {
    (label >= 0.0 && label.fract() == 0.0).then_some(label as usize)
}

impl Operation for Embedding {
    fn name(&self) -> &'static str {
        "lookup"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [table, label] = operands(inputs)?;
        match (table.shape.dims(), label.shape.dims()) {
            (&[_, c], &[n]) => Ok(vec![TensorType { shape: [n, c].into(), dtype: table.dtype }]),
            _ => Err("expects a table [k, c] and labels [n]".to_owned()),
        }
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let rows = b.graph.shape(b.input(0)).dims()[0];
        Ok(Some(vec![Some(b.graph.add(&b.name(), EmbeddingGrad { rows }, &[b.dy, b.input(1)])?), None]))
    }

    fn cpu_kernel(&self, _: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let c = inputs[0].shape.channels();
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            for (y, &label) in args.outputs[0].chunks_exact_mut(c).zip(args.inputs[1]) {
                match row(label).and_then(|i| args.inputs[0].chunks_exact(c).nth(i)) {
                    Some(row) => y.copy_from_slice(row),
                    None => y.fill(0.0),
                }
            }
        })
    }
}

impl Operation for EmbeddingGrad {
    fn name(&self) -> &'static str {
        "lookup_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, _] = operands(inputs)?;
        Ok(vec![TensorType { shape: [self.rows, dy.shape.channels()].into(), dtype: dy.dtype }])
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, c) = (ctx.isa(), inputs[0].shape.channels());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let dtable = &mut *args.outputs[0];
            dtable.fill(0.0);
            for (dy, &label) in args.inputs[0].chunks_exact(c).zip(args.inputs[1]) {
                if let Some(row) = row(label).and_then(|i| dtable.chunks_exact_mut(c).nth(i)) {
                    ddpm_kernels::elementwise::add_assign(isa, dy, row);
                }
            }
        })
    }
}
