//! The random draws of a training step and the forward process.

use super::{Operation, operands, same};
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::rng::{Purpose, Stream, below};
use crate::shape::{Shape, TensorType};
use ddpm_kernels::elementwise;
use rayon::prelude::*;
use std::sync::Arc;

/// Standard normal numbers, a function of the run's seed and step and of the image's index; no operands.
#[derive(Clone, Debug)]
pub struct RandomNormal {
    /// The result's shape; the first size counts images.
    pub shape: Shape,
    /// What the numbers are for.
    pub purpose: Purpose,
}

/// Uniform timesteps `0 .. steps`, one an image, as a tensor `[n]`; no operands.
#[derive(Clone, Debug)]
pub struct DrawTimestep {
    /// Images.
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

    fn cpu(&self, _: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let (purpose, image) = (self.purpose, self.shape.len() / self.shape.dims()[0]);
        Kernel::new(move |run: &mut Run<'_>| {
            let draws = run.draws;
            run.outputs[0].par_chunks_mut(image).enumerate().for_each(|(i, out)| {
                let index = draws.first_index + i as u32;
                Stream::new(draws.seed, purpose, draws.step, index).fill_normal(out);
            });
        })
    }
}

impl Operation for DrawTimestep {
    fn name(&self) -> &'static str {
        "draw_timestep"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [] = operands(inputs)?;
        Ok(vec![TensorType::f32([self.n])])
    }

    fn cpu(&self, _: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let steps = self.steps;
        Kernel::new(move |run: &mut Run<'_>| {
            let draws = run.draws;
            for (i, t) in run.outputs[0].iter_mut().enumerate() {
                let index = draws.first_index + i as u32;
                let word = Stream::new(draws.seed, Purpose::Timestep, draws.step, index).word(0);
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
            return Err("takes one timestep an image".to_owned());
        }
        Ok(vec![x0])
    }

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, shape, tables) = (cpu.isa(), inputs[0].shape, self.clone());
        let image = shape.len() / shape.dims()[0];
        Kernel::new(move |run: &mut Run<'_>| {
            let [x0, eps, t] = run.inputs else { unreachable!("three operands") };
            let last = tables.sqrt_alpha_bar.len() - 1;
            (run.outputs[0].par_chunks_mut(image), x0.par_chunks(image), eps.par_chunks(image))
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
