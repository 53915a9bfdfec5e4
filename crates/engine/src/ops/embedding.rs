//! The sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5).

use super::{Operation, operands};
use crate::cpu::{Cpu, Kernel, Run};
use crate::shape::TensorType;

/// `y[i] = sin(t f_i), .., cos(t f_i), ..` with `f_i = 10000^(-i / (half - shift))`, `half = dim / 2` and i from 0;
/// operand `t [n]`, result `[n, dim]`.
#[derive(Clone, Debug)]
pub struct SinusoidalEmbedding {
    /// Numbers for each timestep; even.
    pub dim: usize,
    /// Taken from the number of frequencies before it divides: 0, or 1 so that the last frequency is 1/10000.
    pub shift: f64,
    /// Whether the cosines stand before the sines.
    pub cosines_first: bool,
}

impl Operation for SinusoidalEmbedding {
    fn name(&self) -> &'static str {
        "sinusoidal_embedding"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [t] = operands(inputs)?;
        let &[n] = t.shape.dims() else { return Err("takes timesteps [n]".to_owned()) };
        if self.dim == 0 || !self.dim.is_multiple_of(2) {
            return Err(format!("the embedding must have an even number of entries, not {}", self.dim));
        }
        if self.dim as f64 / 2.0 <= self.shift {
            return Err(format!("the embedding must have more than {} entries", 2.0 * self.shift));
        }
        Ok(vec![TensorType::f32([n, self.dim])])
    }

    fn cpu(&self, _: &Cpu, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let (dim, cosines_first) = (self.dim, self.cosines_first);
        let half = dim / 2;
        let divisor = half as f64 - self.shift;
        let frequencies: Vec<f64> = (0..half).map(|i| libm::pow(1e4, -(i as f64) / divisor)).collect();
        Kernel::new(move |run: &mut Run<'_>| {
            for (y, &t) in run.outputs[0].chunks_exact_mut(dim).zip(run.inputs[0]) {
                let (first, second) = y.split_at_mut(half);
                let (sines, cosines) = if cosines_first { (second, first) } else { (first, second) };
                for ((s, c), f) in sines.iter_mut().zip(cosines).zip(&frequencies) {
                    let (sin, cos) = libm::sincos(f64::from(t) * f);
                    (*s, *c) = (sin as f32, cos as f32);
                }
            }
        })
    }
}
