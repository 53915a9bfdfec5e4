//! The sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5).

use super::{Operation, operands};
use crate::cpu::{CpuContext, Kernel, KernelArgs};
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

    fn cpu_kernel(&self, _: &CpuContext, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let (dim, cosines_first) = (self.dim, self.cosines_first);
        let half = dim / 2;
        let divisor = half as f64 - self.shift;
        let frequencies: Vec<f64> = (0..half).map(|i| libm::pow(1e4, -(i as f64) / divisor)).collect();
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            for (y, &t) in args.outputs[0].chunks_exact_mut(dim).zip(args.inputs[0]) {
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
