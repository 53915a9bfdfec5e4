//! Concatenation and slicing of channels.

use super::{Backward, Fill, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;

/// `y[.., ca + cb] = a[.., ca], b[.., cb]`.
#[derive(Clone, Debug)]
pub struct Concat;

/// `y = x[.., from .. from + len]`.
#[derive(Clone, Debug)]
pub struct Slice {
    /// First channel.
    pub from: usize,
    /// Number of channels.
    pub len: usize,
}

impl Operation for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b] = operands(inputs)?;
        if a.shape.with_channels(1) != b.shape.with_channels(1) || a.dtype != b.dtype {
            return Err("its operands may differ only in the number of channels".to_owned());
        }
        let channels = a.shape.channels() + b.shape.channels();
        Ok(vec![TensorType { shape: a.shape.with_channels(channels), dtype: a.dtype }])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let mut from = 0;
        let mut grads = Vec::new();
        for i in 0..2 {
            let len = b.graph.shape(b.input(i)).channels();
            let grad = if b.needs_grad(i) {
                Some(b.graph.add(&b.name(), Slice { from, len }, &[b.dy])?)
            } else {
                None
            };
            grads.push(grad);
            from += len;
        }
        Ok(Some(grads))
    }

    fn recomputable(&self) -> bool {
        true
    }
}

impl Operation for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        if self.from + self.len > x.shape.channels() || self.len == 0 {
            return Err(format!(
                "channels {}..{} are out of range: the operand has {}",
                self.from,
                self.from + self.len,
                x.shape.channels()
            ));
        }
        Ok(vec![TensorType { shape: x.shape.with_channels(self.len), dtype: x.dtype }])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        // Pads with zeros to the channels of x.
        let (name, ty) = (b.name(), b.graph.ty(b.input(0)));
        let remaining = ty.shape.channels() - self.from - self.len;
        let zeros = |b: &mut Backward<'_>, len: usize| {
            let ty = TensorType { shape: ty.shape.with_channels(len), ..ty };
            b.graph.add(&name, Fill { ty, value: 0.0 }, &[])
        };
        let mut dx = b.dy;
        if self.from > 0 {
            let before = zeros(b, self.from)?;
            dx = b.graph.add(&b.name(), Concat, &[before, dx])?;
        }
        if remaining > 0 {
            let after = zeros(b, remaining)?;
            dx = b.graph.add(&b.name(), Concat, &[dx, after])?;
        }
        Ok(Some(vec![Some(dx)]))
    }
}
