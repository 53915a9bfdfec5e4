//! Embedding lookup: the rows of a table selected by class labels.

use super::{Backward, Operation, operands};
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
}

impl Operation for EmbeddingGrad {
    fn name(&self) -> &'static str {
        "lookup_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, _] = operands(inputs)?;
        Ok(vec![TensorType { shape: [self.rows, dy.shape.channels()].into(), dtype: dy.dtype }])
    }
}
