//! Operations number by number.

use super::{Operation, SumPixels, operands, same};
use crate::autodiff::Backward;
use crate::cpu::{CHUNK, Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::elementwise;
use rayon::prelude::*;

/// `y = a + b`, two tensors of one shape.
#[derive(Clone, Debug)]
pub struct Add;

/// `y = x + r` for every pixel; operands `x [n, h, w, c], r [n, c]`.
#[derive(Clone, Debug)]
pub struct AddPicture;

/// `y = x sigmoid(x)` (Elfwing et al. 2018).
#[derive(Clone, Debug)]
pub struct Silu;

/// The gradient of [`Silu`]; operands `dy, x`.
#[derive(Clone, Debug)]
pub struct SiluGrad;

/// A tensor of one number everywhere; no operands.
#[derive(Clone, Debug)]
pub struct Fill {
    /// The tensor's type.
    pub ty: TensorType,
    /// The number.
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

    fn cpu(&self, cpu: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let isa = cpu.isa();
        Kernel::new(move |run: &mut Run<'_>| {
            (run.outputs[0].par_chunks_mut(CHUNK), run.inputs[1].par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(y, b)| elementwise::add_assign(isa, b, y));
        })
    }
}

impl Operation for AddPicture {
    fn name(&self) -> &'static str {
        "add_picture"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, r] = operands(inputs)?;
        let Some([n, _, _, c]) = x.shape.nhwc() else { return Err("takes [n, h, w, c]".to_owned()) };
        if r.shape != Shape::new(&[n, c]) {
            return Err(format!("its second operand must be [{n}, {c}]"));
        }
        Ok(vec![x])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let dr = if b.wants(1) { Some(b.graph.add(&b.name(), SumPixels, &[b.dy])?) } else { None };
        Ok(Some(vec![Some(b.dy), dr]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, n, c) = (cpu.isa(), inputs[0].shape.dims()[0], inputs[0].shape.channels());
        let picture = inputs[0].shape.len() / n;
        Kernel::new(move |run: &mut Run<'_>| {
            (run.outputs[0].par_chunks_mut(picture), run.inputs[1].par_chunks(c))
                .into_par_iter()
                .for_each(|(y, r)| elementwise::add_rows(isa, r, y));
        })
    }
}

impl Operation for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        Ok(vec![x])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.graph.add(&b.name(), SiluGrad, &[b.dy, b.input(0)])?)]))
    }

    fn cpu(&self, cpu: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let isa = cpu.isa();
        Kernel::new(move |run: &mut Run<'_>| {
            (run.outputs[0].par_chunks_mut(CHUNK), run.inputs[0].par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(y, x)| elementwise::silu(isa, x, y));
        })
    }
}

impl Operation for SiluGrad {
    fn name(&self) -> &'static str {
        "silu_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, x] = operands(inputs)?;
        same(dy, x)?;
        Ok(vec![dy])
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn cpu(&self, cpu: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let isa = cpu.isa();
        Kernel::new(move |run: &mut Run<'_>| {
            (run.outputs[0].par_chunks_mut(CHUNK), run.inputs[1].par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(g, x)| elementwise::silu_backward(isa, x, g));
        })
    }
}

impl Operation for Fill {
    fn name(&self) -> &'static str {
        "fill"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [] = operands(inputs)?;
        Ok(vec![self.ty])
    }

    fn cpu(&self, _: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let value = self.value;
        Kernel::new(move |run: &mut Run<'_>| run.outputs[0].fill(value))
    }
}
