//! Dropout (Srivastava et al. 2014), scaled so that the mean stays the same.

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::executor::Draws;
use crate::graph::Tensor;
use crate::rng::Purpose;
use crate::shape::TensorType;
use ddpm_kernels::random::{self, Dropout as Masks};
use rayon::prelude::*;

/// Numbers of a task, whole blocks of the mask.
const TASK: usize = 1 << 12;

/// `y = x` times 0 with probability p, else `1 / (1 - p)`. Its gradient is the same with the same mask, which is drawn
/// again rather than kept: it is a function of the run's seed and step, of the place in the network and of the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping a number, from 0 up to, not including, 1.
    pub p: f64,
    /// Number of the place in the network: no two dropouts of a network have one mask.
    pub site: u32,
}

impl Dropout {
    /// The masks of a run; [`Masks::image`] has those of its images.
    pub(crate) fn masks(&self, draws: Draws) -> Masks {
        let purpose = Purpose::Dropout as u32 | self.site << 8;
        let key = [draws.seed as u32, (draws.seed >> 32) as u32];
        Masks::new(self.p, [draws.first_index, draws.step, purpose], key)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if !(0.0..1.0).contains(&self.p) {
            return Err(format!("cannot drop with probability {}; give 0 up to, not including, 1", self.p));
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, op, x) = (cpu.isa(), *self, inputs[0].shape);
        let image = x.len() / x.dims()[0];
        Kernel::new(move |run: &mut Run<'_>| {
            let masks = op.masks(run.draws);
            run.outputs[0].par_chunks_mut(image).enumerate().for_each(|(i, y)| {
                let masks = masks.image(i as u32);
                y.par_chunks_mut(TASK).enumerate().for_each(|(task, y)| {
                    random::dropout(isa, masks, task * TASK, y);
                });
            });
        })
    }
}
