//! The sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5).

use super::{Operation, operands};
use crate::shape::TensorType;

/// `y = sin(t f_0), .., cos(t f_0), ..` with `f_i = 10000^(-i / (half - shift))` and `half = dim / 2`;
/// operand `t [n]`, output `[n, dim]`.
#[derive(Clone, Debug)]
pub struct SinusoidalEmbedding {
    /// Size of the embedding; even.
    pub dim: usize,
    /// Subtracted from `half` in the exponent: 0, or 1 so that the last frequency is 1/10000.
    pub shift: f64,
    /// Whether the cosines precede the sines.
    pub cosines_first: bool,
}

impl Operation for SinusoidalEmbedding {
    fn name(&self) -> &'static str {
        "sinusoidal_embedding"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [t] = operands(inputs)?;
        let &[n] = t.shape.dims() else { return Err("expects timesteps [n]".to_owned()) };
        if self.dim == 0 || !self.dim.is_multiple_of(2) {
            return Err(format!("the embedding size must be even and positive, not {}", self.dim));
        }
        if self.dim as f64 / 2.0 <= self.shift {
            return Err(format!("the embedding size must be greater than {}", 2.0 * self.shift));
        }
        Ok(vec![TensorType::f32([n, self.dim])])
    }
}
