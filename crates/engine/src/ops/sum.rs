//! Sums over pixels and rows: the gradients of broadcasts.

use super::{Operation, operands};
use crate::shape::TensorType;

/// Sum over the pixels of each image, `[n, h, w, c]` to `[n, c]`.
#[derive(Clone, Debug)]
pub struct ReduceSpatial;

/// Sum over all rows, `[.., c]` to `[c]`.
#[derive(Clone, Debug)]
pub struct SumRows;

impl Operation for ReduceSpatial {
    fn name(&self) -> &'static str {
        "sum_pixels"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("expects [n, h, w, c]".to_owned()) };
        Ok(vec![TensorType { shape: [n, c].into(), dtype: x.dtype }])
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
}
