//! Tensors in bf16: what a plan with such factors keeps for its backward pass ([`keep_in_bf16`](crate::keep)).

use super::{Operation, operands};
use crate::cpu::{CHUNK, Cpu, Kernel, Run};
use crate::shape::{DType, TensorType};
use ddpm_kernels::{Isa, bf16};
use rayon::prelude::*;
use std::ops::Range;

/// `y = x`, every number rounded to bf16, two in the memory of one. No gradient goes through it: it stands in a plan only, where
/// later nodes read `y` for `x`.
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, len) = (cpu.isa(), inputs[0].shape.len());
        Kernel::new(move |run: &mut Run<'_>| {
            let y = &mut bytemuck::cast_slice_mut::<f32, u16>(run.outputs[0])[..len];
            (y.par_chunks_mut(CHUNK), run.inputs[0].par_chunks(CHUNK))
                .into_par_iter()
                .for_each(|(y, x)| bf16::round_all(isa, x, y));
        })
    }
}

/// An operand that may have been kept in bf16.
#[derive(Clone, Copy)]
pub(super) enum Kept<'a> {
    /// As it was made.
    F32(&'a [f32]),
    /// Rounded.
    Bf16(&'a [u16]),
}

impl<'a> Kept<'a> {
    /// The operand of this type whose memory is `words`.
    pub(super) fn new(ty: TensorType, words: &'a [f32]) -> Self {
        match ty.dtype {
            DType::F32 => Self::F32(words),
            DType::Bf16 => Self::Bf16(&bytemuck::cast_slice(words)[..ty.shape.len()]),
        }
    }

    /// Some of its numbers; those that are kept in bf16 are widened into the first numbers of `memory`.
    pub(super) fn numbers<'b>(self, isa: Isa, range: Range<usize>, memory: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Self::F32(x) => &x[range],
            Self::Bf16(x) => {
                let memory = &mut memory[..range.len()];
                bf16::widen_all(isa, &x[range], memory);
                memory
            }
        }
    }

    /// Numbers of memory that `len` of an operand of this type need to be widened.
    pub(super) fn memory(ty: TensorType, len: usize) -> usize {
        if ty.dtype == DType::Bf16 { len } else { 0 }
    }
}
