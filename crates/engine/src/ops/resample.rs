//! Resizing: linear resampling and 2x2 max pooling.

use super::{Backward, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
pub use ddpm_kernels::resample::Taps;
use std::sync::Arc;

/// Separable resampling: every output row and column is a weighted sum of a few input ones; operand `x [n, h, w, c]`. Its gradient is
/// the same operation with transposed weights.
#[derive(Clone, Debug)]
pub struct Resample {
    /// Weights of the rows.
    pub rows: Arc<Taps>,
    /// Weights of the columns.
    pub columns: Arc<Taps>,
}

/// 2x2 max pooling, `[n, h, w, c]` to `[n, h / 2, w / 2, c]`; an odd last row or column is ignored.
#[derive(Clone, Debug)]
pub struct MaxPool;

/// The gradient of [`MaxPool`], routed to the first maximum of each block; operands `dy, x`.
#[derive(Clone, Debug)]
pub struct MaxPoolGrad;

impl Resample {
    /// The same weights for rows and columns of images of height `h` and width `w`.
    pub fn both(taps: impl Fn(usize) -> Taps, h: usize, w: usize) -> Self {
        Self { rows: Arc::new(taps(h)), columns: Arc::new(taps(w)) }
    }
}

fn image(x: TensorType) -> Result<[usize; 4], String> {
    x.shape.nhwc().ok_or_else(|| "expects [n, h, w, c]".to_owned())
}

impl Operation for Resample {
    fn name(&self) -> &'static str {
        "resample"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        let [n, h, w, c] = image(x)?;
        if (h, w) != (self.rows.inputs(), self.columns.inputs()) {
            return Err(format!(
                "its weights are for {}x{} pixels",
                self.rows.inputs(),
                self.columns.inputs()
            ));
        }
        let shape = Shape::new(&[n, self.rows.outputs(), self.columns.outputs(), c]);
        Ok(vec![TensorType { shape, dtype: x.dtype }])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let back =
            Self { rows: Arc::new(self.rows.transposed()), columns: Arc::new(self.columns.transposed()) };
        Ok(Some(vec![Some(b.graph.add(&b.name(), back, &[b.dy])?)]))
    }
}

impl Operation for MaxPool {
    fn name(&self) -> &'static str {
        "max_pool"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        let [n, h, w, c] = image(x)?;
        if h < 2 || w < 2 {
            return Err(format!("an image of {h}x{w} is too small for 2x2 pooling"));
        }
        Ok(vec![TensorType { shape: [n, h / 2, w / 2, c].into(), dtype: x.dtype }])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.graph.add(&b.name(), MaxPoolGrad, &[b.dy, b.input(0)])?)]))
    }
}

impl Operation for MaxPoolGrad {
    fn name(&self) -> &'static str {
        "max_pool_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, x] = operands(inputs)?;
        if MaxPool.infer(&[x])?[0] != dy {
            return Err("the shape of dy is not that of the pooled x".to_owned());
        }
        Ok(vec![x])
    }
}
