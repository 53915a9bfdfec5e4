//! Rows of a table by number: the embedding of classes.

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;

/// `y[i] = table[label[i]]`; operands `table [k, c], label [n]` (whole numbers below k); result `[n, c]`. A label that is
/// none gives zeros.
#[derive(Clone, Debug)]
pub struct Embedding;

/// The gradient of [`Embedding`] by the table; operands `dy, label`.
#[derive(Clone, Debug)]
pub struct LookupGrad {
    /// Rows of the table.
    pub rows: usize,
}

/// The row that a label names.
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
            _ => Err("takes a table [k, c] and labels [n]".to_owned()),
        }
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let rows = b.graph.shape(b.input(0)).dims()[0];
        Ok(Some(vec![Some(b.graph.add(&b.name(), LookupGrad { rows }, &[b.dy, b.input(1)])?), None]))
    }

    fn cpu(&self, _: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let c = inputs[0].shape.channels();
        Kernel::new(move |run: &mut Run<'_>| {
            for (y, &label) in run.outputs[0].chunks_exact_mut(c).zip(run.inputs[1]) {
                match row(label).and_then(|i| run.inputs[0].chunks_exact(c).nth(i)) {
                    Some(row) => y.copy_from_slice(row),
                    None => y.fill(0.0),
                }
            }
        })
    }
}

impl Operation for LookupGrad {
    fn name(&self) -> &'static str {
        "lookup_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, _] = operands(inputs)?;
        Ok(vec![TensorType { shape: [self.rows, dy.shape.channels()].into(), dtype: dy.dtype }])
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, c) = (cpu.isa(), inputs[0].shape.channels());
        Kernel::new(move |run: &mut Run<'_>| {
            let dtable = &mut *run.outputs[0];
            dtable.fill(0.0);
            for (dy, &label) in run.inputs[0].chunks_exact(c).zip(run.inputs[1]) {
                if let Some(row) = row(label).and_then(|i| dtable.chunks_exact_mut(c).nth(i)) {
                    ddpm_kernels::elementwise::add_assign(isa, dy, row);
                }
            }
        })
    }
}
