//! The random numbers of a training step, and the forward process.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::{QSample, RandomNormal, RandomTimestep};
use ddpm_kernels::elementwise;
use ddpm_rng::{Purpose, Stream, below};
use rayon::prelude::*;

impl Lowering<'_> {
    pub(super) fn random_normal(&self, op: &RandomNormal) -> Kernel {
        let (purpose, image) = (op.purpose, op.shape.len() / op.shape.dims()[0]);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let rng = args.rng;
            args.outputs[0].par_chunks_mut(image).enumerate().for_each(|(i, out)| {
                let index = rng.first_index + i as u32;
                Stream::new(rng.seed, purpose, rng.step, index).fill_normal(out);
            });
        })
    }

    pub(super) fn random_timestep(&self, op: &RandomTimestep) -> Kernel {
        let steps = op.steps;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let rng = args.rng;
            for (i, t) in args.outputs[0].iter_mut().enumerate() {
                let index = rng.first_index + i as u32;
                let word = Stream::new(rng.seed, Purpose::Timestep, rng.step, index).word(0);
                *t = below(word, steps) as f32;
            }
        })
    }

    pub(super) fn q_sample(&self, op: &QSample) -> Kernel {
        let (isa, shape, tables) = (self.isa, self.inputs[0].shape, op.clone());
        let image = shape.len() / shape.dims()[0];
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [x0, eps, t] = args.inputs else { unreachable!("three operands") };
            let last = tables.sqrt_alpha_bar.len() - 1;
            (args.outputs[0].par_chunks_mut(image), x0.par_chunks(image), eps.par_chunks(image))
                .into_par_iter()
                .zip(t.par_iter())
                .for_each(|((y, x0, eps), &t)| {
                    let t = (t as usize).min(last);
                    let (a, b) = (tables.sqrt_alpha_bar[t], tables.sqrt_one_minus_alpha_bar[t]);
                    elementwise::combine(isa, a, x0, b, eps, y);
                });
        })
    }
}
