//! Dropout, and its masks.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::RngKey;
use ddpm_engine::ops::Dropout;
use ddpm_kernels::random::{self, Dropout as Masks};
use ddpm_rng::Purpose;
use rayon::prelude::*;

/// Elements per task, a multiple of the blocks of the mask.
const TASK: usize = 1 << 12;

impl Lowering<'_> {
    pub(super) fn dropout(&self, op: &Dropout) -> Kernel {
        let (isa, op, x) = (self.isa, *op, self.inputs[0].shape);
        let image = x.len() / x.dims()[0];
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let masks = masks(&op, args.rng);
            args.outputs[0].par_chunks_mut(image).enumerate().for_each(|(i, y)| {
                let masks = masks.image(i as u32);
                y.par_chunks_mut(TASK).enumerate().for_each(|(task, y)| {
                    random::dropout(isa, masks, task * TASK, y);
                });
            });
        })
    }
}

/// The masks of a run; [`Masks::image`] selects one image.
pub(super) fn masks(op: &Dropout, rng: RngKey) -> Masks {
    let purpose = Purpose::Dropout as u32 | op.site << 8;
    let key = [rng.seed as u32, (rng.seed >> 32) as u32];
    Masks::new(op.p, [rng.first_index, rng.step, purpose], key)
}
