//! Elementwise operations, and broadcasts over pixels.

use super::{Backward, Operation, ReduceSpatial, operands, same};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
pub use ddpm_kernels::activation::Activation;

/// `y = a + b`, tensors of the same shape.
#[derive(Clone, Debug)]
pub struct Add;

/// `y = x + r` for every pixel; operands `x [n, h, w, c], r [n, c]`.
#[derive(Clone, Debug)]
pub struct AddPerChannel;

/// `y = act(x)`.
#[derive(Clone, Debug)]
pub struct Activate(pub Activation);

/// The gradient of [`Activate`]; operands `dy, x`.
#[derive(Clone, Debug)]
pub struct ActivateGrad(pub Activation);

/// `y = scale x + shift`.
#[derive(Clone, Debug)]
pub struct Affine {
    /// The factor.
    pub scale: f32,
    /// The summand.
    pub shift: f32,
}

/// `y = a b`, elementwise, tensors of the same shape.
#[derive(Clone, Debug)]
pub struct Multiply;

/// `y = x (1 + r)` for every pixel; operands `x [n, h, w, c], r [n, c]`.
#[derive(Clone, Debug)]
pub struct Modulate;

/// A constant tensor; no operands.
#[derive(Clone, Debug)]
pub struct Fill {
    /// The output's type.
    pub ty: TensorType,
    /// The value of all elements.
    pub value: f32,
}

impl Operation for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b] = operands(inputs)?;
        same(a, b)?;
        Ok(vec![a])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.dy), Some(b.dy)]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}

impl Operation for AddPerChannel {
    fn name(&self) -> &'static str {
        "add_per_channel"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        infer_per_image(inputs)
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let dr = if b.needs_grad(1) { Some(b.graph.add(&b.name(), ReduceSpatial, &[b.dy])?) } else { None };
        Ok(Some(vec![Some(b.dy), dr]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn recomputable(&self) -> bool {
        true
    }
}

impl Operation for Activate {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        Ok(vec![TensorType::f32(x.shape)])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.graph.add(&b.name(), ActivateGrad(self.0), &[b.dy, b.input(0)])?)]))
    }

    fn recomputable(&self) -> bool {
        true
    }
}

impl Operation for ActivateGrad {
    fn name(&self) -> &'static str {
        match self.0 {
            Activation::Silu => "silu_grad",
            Activation::Relu => "relu_grad",
            Activation::Gelu => "gelu_grad",
            Activation::Mish => "mish_grad",
        }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, x] = operands(inputs)?;
        same(dy, TensorType::f32(x.shape))?;
        Ok(vec![dy])
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}

impl Operation for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        Ok(vec![x])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.graph.add(&b.name(), Affine { scale: self.scale, shift: 0.0 }, &[b.dy])?)]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}

impl Operation for Multiply {
    fn name(&self) -> &'static str {
        "multiply"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [a, b] = operands(inputs)?;
        same(a, b)?;
        Ok(vec![a])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let mut grad = |i: usize| -> Result<Option<Tensor>> {
            let product = [b.dy, b.input(1 - i)];
            if b.needs_grad(i) { b.graph.add(&b.name(), Multiply, &product).map(Some) } else { Ok(None) }
        };
        Ok(Some(vec![grad(0)?, grad(1)?]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }
}

impl Operation for Modulate {
    fn name(&self) -> &'static str {
        "modulate"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        infer_per_image(inputs)
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let dx =
            if b.needs_grad(0) { Some(b.graph.add(&b.name(), Modulate, &[b.dy, b.input(1)])?) } else { None };
        let mut dr = None;
        if b.needs_grad(1) {
            let product = b.graph.add(&b.name(), Multiply, &[b.dy, b.input(0)])?;
            dr = Some(b.graph.add(&b.name(), ReduceSpatial, &[product])?);
        }
        Ok(Some(vec![dx, dr]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn recomputable(&self) -> bool {
        true
    }
}

/// The output type of operands `x [n, h, w, c], r [n, c]`.
fn infer_per_image(inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
    let [x, r] = operands(inputs)?;
    let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("expects [n, h, w, c]".to_owned()) };
    if r.shape != Shape::new(&[n, c]) {
        return Err(format!("its second operand must be [{n}, {c}]"));
    }
    Ok(vec![x])
}

impl Operation for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [] = operands(inputs)?;
        Ok(vec![self.ty])
    }
}
