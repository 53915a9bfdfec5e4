//! The random numbers of a training step, and the forward process.

use super::{Operation, operands, same};
use crate::error::Result;
use crate::shape::{Shape, TensorType};
use ddpm_rng::Purpose;
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
}

impl Operation for RandomTimestep {
    fn name(&self) -> &'static str {
        "draw_timestep"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [] = operands(inputs)?;
        Ok(vec![TensorType::f32([self.n])])
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
}
