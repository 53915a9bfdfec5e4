//! Batch normalisation: sums over chunks of rows, added in order.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::{BatchNorm, BatchNormInference, RunningAverage};
use ddpm_kernels::Isa;
use ddpm_kernels::batch_norm::{column_dots, column_squares, column_sums, gradient, normalise};
use rayon::prelude::*;

/// Rows per task of a sum; constant, so that the order of summation is fixed.
const ROWS: usize = 512;

impl Lowering<'_> {
    pub(super) fn batch_norm(&self, op: &BatchNorm) -> Kernel {
        let (isa, eps, c) = (self.isa, f64::from(op.eps), self.inputs[0].shape.channels());
        let rows = self.inputs[0].shape.len() / c;
        let sums = rows.div_ceil(ROWS) * c;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([x, gamma, beta], [y, mean, rstd, unbiased]) = (args.inputs, &mut *args.outputs) else {
                unreachable!("three operands, four outputs")
            };
            let (sums, scale) = args.shared[..sums + c].split_at_mut(sums);
            sum_in_chunks(
                c,
                sums,
                |chunk, out| column_sums(isa, chunk_of(x, c, chunk), out),
                |ch, sum| mean[ch] = (sum / rows as f64) as f32,
            );
            sum_in_chunks(
                c,
                sums,
                |chunk, out| column_squares(isa, chunk_of(x, c, chunk), mean, out),
                |ch, sum| {
                    let r = 1.0 / (sum / rows as f64 + eps).sqrt();
                    rstd[ch] = r as f32;
                    unbiased[ch] = (sum / (rows - 1) as f64) as f32;
                    scale[ch] = (r * f64::from(gamma[ch])) as f32;
                },
            );
            normalise_all(isa, mean, scale, beta, x, y);
        })
        .shared(sums + c)
    }

    pub(super) fn batch_norm_grad(&self) -> Kernel {
        let (isa, c) = (self.isa, self.inputs[0].shape.channels());
        let rows = self.inputs[0].shape.len() / c;
        let sums = rows.div_ceil(ROWS) * c;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([_, x, gamma, mean, rstd], [dx, dgamma, dbeta]) = (args.inputs, &mut *args.outputs) else {
                unreachable!("five operands, three outputs")
            };
            let (sums, coefficients) = args.shared[..sums + 3 * c].split_at_mut(sums);
            let (scale, coefficients) = coefficients.split_at_mut(c);
            let (slope, offset) = coefficients.split_at_mut(c);
            // dx holds dy.
            sum_in_chunks(
                c,
                sums,
                |chunk, out| column_sums(isa, chunk_of(dx, c, chunk), out),
                |ch, sum| {
                    dbeta[ch] = sum as f32;
                    let gain = f64::from(gamma[ch]) * f64::from(rstd[ch]);
                    scale[ch] = gain as f32;
                    offset[ch] = (-gain * sum / rows as f64) as f32;
                },
            );
            sum_in_chunks(
                c,
                sums,
                |chunk, out| column_dots(isa, chunk_of(dx, c, chunk), chunk_of(x, c, chunk), mean, out),
                |ch, sum| {
                    let r = f64::from(rstd[ch]);
                    dgamma[ch] = (sum * r) as f32;
                    slope[ch] = (-f64::from(gamma[ch]) * r * r * r * sum / rows as f64) as f32;
                },
            );
            let (scale, slope, offset) = (&*scale, &*slope, &*offset);
            (x.par_chunks(ROWS * c), dx.par_chunks_mut(ROWS * c))
                .into_par_iter()
                .for_each(|(x, g)| gradient(isa, mean, scale, slope, offset, x, g));
        })
        .shared(sums + 3 * c)
    }

    pub(super) fn batch_norm_inference(&self, op: &BatchNormInference) -> Kernel {
        let (isa, eps, c) = (self.isa, f64::from(op.eps), self.inputs[0].shape.channels());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let [x, gamma, beta, mean, variance] = args.inputs else { unreachable!("five operands") };
            let scale = &mut args.shared[..c];
            for (ch, scale) in scale.iter_mut().enumerate() {
                *scale = (f64::from(gamma[ch]) / (f64::from(variance[ch]) + eps).sqrt()) as f32;
            }
            normalise_all(isa, mean, scale, beta, x, args.outputs[0]);
        })
        .shared(c)
    }

    pub(super) fn running_average(&self, op: &RunningAverage) -> Kernel {
        let momentum = op.momentum;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            for (running, value) in args.outputs[0].iter_mut().zip(args.inputs[1]) {
                *running = (1.0 - momentum) * *running + momentum * value;
            }
        })
    }
}

/// Computes `sum` of each chunk of rows into `shared`, then adds the chunks in order, in f64: `out(channel, total)`.
fn sum_in_chunks(
    c: usize,
    shared: &mut [f32],
    sum: impl Fn(usize, &mut [f32]) + Sync,
    mut out: impl FnMut(usize, f64),
) {
    shared.par_chunks_mut(c).enumerate().for_each(|(chunk, sums)| sum(chunk, sums));
    for ch in 0..c {
        out(ch, shared.iter().skip(ch).step_by(c).map(|&v| f64::from(v)).sum());
    }
}

fn chunk_of(x: &[f32], c: usize, chunk: usize) -> &[f32] {
    &x[chunk * ROWS * c..x.len().min((chunk + 1) * ROWS * c)]
}

/// `y = (x - mean) scale + shift`, in parallel.
fn normalise_all(isa: Isa, mean: &[f32], scale: &[f32], shift: &[f32], x: &[f32], y: &mut [f32]) {
    let task = ROWS * mean.len();
    (x.par_chunks(task), y.par_chunks_mut(task))
        .into_par_iter()
        .for_each(|(x, y)| normalise(isa, mean, scale, shift, x, y));
}
