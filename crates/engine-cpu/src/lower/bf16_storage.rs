//! Tensors in bf16: rounding, and operands that may be in either data type.

use super::Lowering;
use crate::kernel::{CHUNK, Kernel, KernelArgs};
use ddpm_engine::{DType, TensorType};
use ddpm_kernels::{Isa, elementwise};
use rayon::prelude::*;
use std::ops::Range;

impl Lowering<'_> {
    pub(super) fn cast(&self) -> Kernel {
        let (isa, len) = (self.isa, self.inputs[0].shape.len());
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
