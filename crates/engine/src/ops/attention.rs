//! Multi-head self-attention over the pixels of an image, tiled.

use super::{Backward, Dropout, Operation, operands};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};

/// `o = softmax(q k^T / sqrt(d)) v` for each head; operand `qkv [n, h, w, 3c]` (queries, keys, values of all heads);
/// outputs `o [n, h, w, c]` and the log-sum-exp of the scores `[n, h * w, heads]` for the backward pass.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Number of heads, a divisor of c.
    pub heads: usize,
    /// Dropout of the attention weights.
    pub dropout: Option<Dropout>,
}

/// The gradient of [`Attention`]; operands `qkv, o, lse, do`; output `dqkv`.
#[derive(Clone, Debug)]
pub struct AttentionGrad(pub Attention);

impl Attention {
    /// Images, tokens per image and channels of the output, given the shape of `qkv`.
    pub fn sizes(qkv: Shape) -> (usize, usize, usize) {
        let (n, c) = (qkv.dims()[0], qkv.channels());
        (n, qkv.len() / n / c, c / 3)
    }
}

impl Operation for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [qkv] = operands(inputs)?;
        let Some([n, h, w, c]) = qkv.shape.nhwc() else { return Err("expects [n, h, w, 3c]".to_owned()) };
        self.dropout.map_or(Ok(()), |d| d.check())?;
        if self.heads == 0 || c % (3 * self.heads) != 0 {
            return Err(format!(
                "{c} channels cannot be split into queries, keys and values of {} heads",
                self.heads
            ));
        }
        let o = TensorType { shape: qkv.shape.with_channels(c / 3), dtype: qkv.dtype };
        Ok(vec![o, TensorType::f32([n, h * w, self.heads])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.input(0), b.output(0), b.output(1), b.dy];
        Ok(Some(vec![Some(b.graph.add(&b.name(), AttentionGrad(self.clone()), &operands)?)]))
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let (n, tokens, c) = Attention::sizes(inputs[0].shape);
        (2 * n * tokens * tokens * c) as u64
    }
}

impl Operation for AttentionGrad {
    fn name(&self) -> &'static str {
        "attention_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [qkv, o, _, d_o] = operands(inputs)?;
        super::same(o, d_o)?;
        Ok(vec![qkv])
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let (n, tokens, c) = Attention::sizes(inputs[0].shape);
        (5 * n * tokens * tokens * c) as u64
    }
}
