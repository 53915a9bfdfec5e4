//! The random numbers of a training step, and the forward process.

use super::{Operation, operands, same};
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::rng::{Purpose, Stream, below};
use crate::shape::{Shape, TensorType};
use ddpm_kernels::elementwise;
use rayon::prelude::*;
use std::sync::Arc;

/// Standard normal values, a function of the run's [`RngKey`](crate::RngKey) and the image's index; no operands.
#[derive(Clone, Debug)]
pub struct RandomNormal {
    /// The output's shape; the first dimension is the batch.
    pub shape: Shape,
    /// What the values are for.
    pub purpose: Purpose,
}

/// Uniform timesteps `0 .. steps`, one per image, as a tensor `[n]`; no operands.
#[derive(Clone, Debug)]
pub struct RandomTimestep {
    /// Batch size.
    pub n: usize,
    /// Number of timesteps, T.
    pub steps: u32,
}

/// The forward process, `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (Ho et al. 2020, eq. 4);
/// operands `x_0, eps, t [n]`.
#[derive(Clone, Debug)]
pub struct QSample {
    /// `sqrt(alpha_bar_t)` for each t.
    pub sqrt_alpha_bar: Arc<[f32]>,
    /// `sqrt(1 - alpha_bar_t)` for each t.
    pub sqrt_one_minus_alpha_bar: Arc<[f32]>,
}

impl Operation for RandomNormal {
    fn name(&self) -> &'static str {
        "draw_normal"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [] = operands(inputs)?;
        Ok(vec![TensorType::f32(self.shape)])
    }

    fn cpu_kernel(&self, _: &CpuContext, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let (purpose, image) = (self.purpose, self.shape.len() / self.shape.dims()[0]);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let rng = args.rng;
            args.outputs[0].par_chunks_mut(image).enumerate().for_each(|(i, out)| {
                let index = rng.first_index + i as u32;
                Stream::new(rng.seed, purpose, rng.step, index).fill_normal(out);
            });
        })
    }
}

impl Operation for RandomTimestep {
    fn name(&self) -> &'static str {
        "draw_timestep"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [] = operands(inputs)?;
        Ok(vec![TensorType::f32([self.n])])
    }

    fn cpu_kernel(&self, _: &CpuContext, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let steps = self.steps;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let rng = args.rng;
            for (i, t) in args.outputs[0].iter_mut().enumerate() {
                let index = rng.first_index + i as u32;
                let word = Stream::new(rng.seed, Purpose::Timestep, rng.step, index).word(0);
                *t = below(word, steps) as f32;
            }
        })
    }
}

impl Operation for QSample {
    fn name(&self) -> &'static str {
        "q_sample"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x0, eps, t] = operands(inputs)?;
        same(x0, eps)?;
        if t.shape.dims() != &x0.shape.dims()[..1] {
            return Err("expects one timestep per image".to_owned());
        }
        Ok(vec![x0])
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, shape, tables) = (ctx.isa(), inputs[0].shape, self.clone());
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
