//! Elementwise operations, and broadcasts over pixels.

use super::Lowering;
use super::bf16_storage::MaybeBf16;
use crate::kernel::{CHUNK, Kernel, KernelArgs};
use ddpm_engine::TensorType;
use ddpm_engine::ops::{Activation, Affine, Fill};
use ddpm_kernels::activation::{activate, activate_backward};
use ddpm_kernels::{Isa, elementwise};
use rayon::prelude::*;

impl Lowering<'_> {
    pub(super) fn add(&self) -> Kernel {
        let isa = self.isa;
        by_chunks(move |y, b| elementwise::add_assign(isa, b, y))
    }

    pub(super) fn add_per_channel(&self) -> Kernel {
        let isa = self.isa;
        by_image(self.inputs, move |y, r| elementwise::add_rows(isa, r, y))
    }

    pub(super) fn activate(&self, act: Activation) -> Kernel {
        let isa = self.isa;
        by_pieces(isa, self.inputs[0], 0, move |y, x| activate(isa, act, x, y))
    }

    pub(super) fn activate_grad(&self, act: Activation) -> Kernel {
        let isa = self.isa;
        by_pieces(isa, self.inputs[1], 1, move |y, x| activate_backward(isa, act, x, y))
    }

    pub(super) fn affine(&self, op: &Affine) -> Kernel {
        let (isa, scale, shift) = (self.isa, op.scale, op.shift);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            args.outputs[0].par_chunks_mut(CHUNK).for_each(|y| elementwise::affine(isa, scale, shift, y));
        })
    }

    pub(super) fn multiply(&self) -> Kernel {
        let isa = self.isa;
        by_chunks(move |y, x| elementwise::mul_assign(isa, x, y))
    }

    pub(super) fn modulate(&self) -> Kernel {
        let isa = self.isa;
        by_image(self.inputs, move |y, r| elementwise::scale_rows(isa, r, y))
    }

    pub(super) fn fill(&self, op: &Fill) -> Kernel {
        let value = op.value;
        Kernel::new(move |args: &mut KernelArgs<'_>| args.outputs[0].fill(value))
    }
}

/// Calls `f(y, x)` for chunks of the output, which holds the first operand, and of the second operand.
fn by_chunks(f: impl Fn(&mut [f32], &[f32]) + Send + Sync + 'static) -> Kernel {
    Kernel::new(move |args: &mut KernelArgs<'_>| {
        (args.outputs[0].par_chunks_mut(CHUNK), args.inputs[1].par_chunks(CHUNK))
            .into_par_iter()
            .for_each(|(y, x)| f(y, x));
    })
}

/// Calls `f(y, x)` for pieces of the output and of operand `i`, whose type `ty` may be bf16.
fn by_pieces(
    isa: Isa,
    ty: TensorType,
    i: usize,
    f: impl Fn(&mut [f32], &[f32]) + Send + Sync + 'static,
) -> Kernel {
    /// Elements that fit in the L1 cache when widened.
    const PIECE: usize = 1 << 12;
    Kernel::new(move |args: &mut KernelArgs<'_>| {
        let (x, scratch) = (MaybeBf16::new(ty, args.inputs[i]), args.scratch);
        args.outputs[0].par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, y)| {
            let start = chunk * CHUNK;
            scratch.with(|memory| match x {
                MaybeBf16::F32(x) => f(y, &x[start..][..y.len()]),
                MaybeBf16::Bf16(_) => y.chunks_mut(PIECE).enumerate().for_each(|(piece, y)| {
                    let start = start + piece * PIECE;
                    f(y, x.widened(isa, start..start + y.len(), memory));
                }),
            });
        });
    })
    .per_thread(MaybeBf16::scratch_len(ty, PIECE))
}

/// Calls `f(y, r)` for each image of the output, which holds the first operand, and its row of the second operand.
fn by_image(inputs: &[TensorType], f: impl Fn(&mut [f32], &[f32]) + Send + Sync + 'static) -> Kernel {
    let (n, c) = (inputs[0].shape.dims()[0], inputs[0].shape.channels());
    let image = inputs[0].shape.len() / n;
    Kernel::new(move |args: &mut KernelArgs<'_>| {
        (args.outputs[0].par_chunks_mut(image), args.inputs[1].par_chunks(c))
            .into_par_iter()
            .for_each(|(y, r)| f(y, r));
    })
}
