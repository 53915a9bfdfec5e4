//! Dropout (Srivastava et al. 2014), scaled to preserve the mean.

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::executor::RngKey;
use crate::graph::Tensor;
use crate::rng::Purpose;
use crate::shape::TensorType;
use ddpm_kernels::random::{self, Dropout as Masks};
use rayon::prelude::*;

/// Elements per task, a multiple of the blocks of the mask.
const TASK: usize = 1 << 12;

/// `y = x` times 0 with probability p, else `1 / (1 - p)`. Its gradient is the same operation with the same mask, which is regenerated
/// rather than kept: it is a function of the run's seed and step, of `site` and of the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in [0, 1).
    pub p: f64,
    /// Index of the dropout in its network; dropouts of one network have different indices, and so different masks.
    pub site: u32,
}

impl Dropout {
    /// The masks of a run; [`Masks::image`] selects one image.
    pub(crate) fn masks(&self, rng: RngKey) -> Masks {
        let purpose = Purpose::Dropout as u32 | self.site << 8;
        let key = [rng.seed as u32, (rng.seed >> 32) as u32];
        Masks::new(self.p, [rng.first_index, rng.step, purpose], key)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if !(0.0..1.0).contains(&self.p) {
            return Err(format!(
                "dropout probability {} is out of range; use 0 up to, but not including, 1",
                self.p
            ));
        }
        Ok(())
    }
}

impl Operation for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x] = operands(inputs)?;
        self.check()?;
        Ok(vec![x])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(Some(vec![Some(b.graph.add(&b.name(), *self, &[b.dy])?)]))
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn recomputable(&self) -> bool {
        true
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, op, x) = (ctx.isa(), *self, inputs[0].shape);
        let image = x.len() / x.dims()[0];
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let masks = op.masks(args.rng);
            args.outputs[0].par_chunks_mut(image).enumerate().for_each(|(i, y)| {
                let masks = masks.image(i as u32);
                y.par_chunks_mut(TASK).enumerate().for_each(|(task, y)| {
                    random::dropout(isa, masks, task * TASK, y);
                });
            });
        })
    }
}
