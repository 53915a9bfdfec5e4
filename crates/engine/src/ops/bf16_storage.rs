//! Tensors stored in bf16, which plans with bf16 matmul operands keep for the backward pass (see [`bf16_storage`](crate::bf16_storage)).

use super::{Operation, operands};
use crate::cpu::{CHUNK, CpuContext, Kernel, KernelArgs};
use crate::shape::{DType, TensorType};
use ddpm_kernels::{Isa, elementwise};
use rayon::prelude::*;
use std::ops::Range;

/// `y = x` rounded to bf16, two elements in the memory of one f32. It has no gradient: it only occurs in plans, where later nodes
/// read `y` instead of `x`.
#[derive(Clone, Debug)]
pub struct Cast;

impl Operation for Cast {
    fn name(&self) -> &'static str {
        "to_bf16"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        Ok(vec![TensorType { dtype: DType::Bf16, ..x }])
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, len) = (ctx.isa(), inputs[0].shape.len());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let y = &mut bytemuck::cast_slice_mut::<f32, u16>(args.outputs[0])[..len];
            (y.par_chunks_mut(CHUNK), args.inputs[0].par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(y, x)| elementwise::round_to_bf16(isa, x, y));
        })
    }
}

/// An operand in f32 or bf16.
#[derive(Clone, Copy)]
pub(super) enum MaybeBf16<'a> {
    /// Full precision.
    F32(&'a [f32]),
    /// Rounded to bf16.
    Bf16(&'a [u16]),
}

impl<'a> MaybeBf16<'a> {
    /// The operand of type `ty` stored in `words`.
    pub(super) fn new(ty: TensorType, words: &'a [f32]) -> Self {
        match ty.dtype {
            DType::F32 => Self::F32(words),
            DType::Bf16 => Self::Bf16(&bytemuck::cast_slice(words)[..ty.shape.len()]),
        }
    }

    /// The elements in `range`; those in bf16 are widened into the start of `memory`.
    pub(super) fn widened<'b>(self, isa: Isa, range: Range<usize>, memory: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Self::F32(x) => &x[range],
            Self::Bf16(x) => {
                let memory = &mut memory[..range.len()];
                elementwise::widen_from_bf16(isa, &x[range], memory);
                memory
            }
        }
    }

    /// Length of the memory that widening `len` elements of an operand of this type takes.
    pub(super) fn scratch_len(ty: TensorType, len: usize) -> usize {
        if ty.dtype == DType::Bf16 { len } else { 0 }
    }
}
