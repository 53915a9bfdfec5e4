//! The sinusoidal embedding of the timestep.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::SinusoidalEmbedding;

impl Lowering<'_> {
    pub(super) fn sinusoidal_embedding(&self, op: &SinusoidalEmbedding) -> Kernel {
        let (dim, cosines_first) = (op.dim, op.cosines_first);
        let half = dim / 2;
        let divisor = half as f64 - op.shift;
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
