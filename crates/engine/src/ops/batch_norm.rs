//! Batch normalisation (Ioffe and Szegedy 2015), with the running statistics that replace the batch's in inference.

use super::{Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::Isa;
use ddpm_kernels::batch_norm::{column_dots, column_squares, column_sums, gradient, normalise};
use rayon::prelude::*;

/// Training: `y = (x - mean) / sqrt(variance + eps) gamma + beta` with the statistics of the batch; operands
/// `x [.., c], gamma [c], beta [c]`. Outputs `y` and, `[c]` each, the mean, `1 / sqrt(variance + eps)` and the unbiased
/// variance, which the running variance averages.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f32,
}

/// The gradient of [`BatchNorm`]; operands `dy, x, gamma, mean, rstd`; outputs `dx, dgamma, dbeta`.
#[derive(Clone, Debug)]
pub struct BatchNormGrad;

/// Inference: the same with given statistics; operands `x, gamma, beta, mean, variance`. It has no gradient.
#[derive(Clone, Debug)]
pub struct BatchNormInference {
    /// Added to the variance.
    pub eps: f32,
}

/// `running = (1 - momentum) running + momentum value`, in place: the first operand is a state of the graph.
#[derive(Clone, Debug)]
pub struct RunningAverage {
    /// The weight of the new value.
    pub momentum: f32,
}

/// Rows per task of a sum; constant, so that the order of summation is fixed.
const ROWS: usize = 512;

fn check(x: TensorType, per_channel: &[TensorType]) -> Result<(), String> {
    let c = x.shape.channels();
    if per_channel.iter().any(|t| t.shape != Shape::new(&[c])) {
        return Err(format!("all operands except x must be [{c}]"));
    }
    Ok(())
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

impl Operation for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta] = operands(inputs)?;
        check(x, &[gamma, beta])?;
        if x.shape.len() == x.shape.channels() {
            return Err("a batch with one value per channel has no variance".to_owned());
        }
        Ok(vec![x, gamma, gamma, gamma])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.dy, b.input(0), b.input(1), b.output(1), b.output(2)];
        let grads = b.graph.add_all(&b.name(), BatchNormGrad, &operands)?;
        Ok(Some(grads.into_iter().map(Some).collect()))
    }

    fn recomputable(&self) -> bool {
        true
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, eps, c) = (ctx.isa(), f64::from(self.eps), inputs[0].shape.channels());
        let rows = inputs[0].shape.len() / c;
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
}

impl Operation for BatchNormGrad {
    fn name(&self) -> &'static str {
        "batch_norm_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [dy, x, gamma, mean, rstd] = operands(inputs)?;
        super::same(dy, x)?;
        check(x, &[gamma, mean, rstd])?;
        Ok(vec![x, gamma, gamma])
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, c) = (ctx.isa(), inputs[0].shape.channels());
        let rows = inputs[0].shape.len() / c;
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
}

impl Operation for BatchNormInference {
    fn name(&self) -> &'static str {
        "batch_norm_fixed"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [x, gamma, beta, mean, variance] = operands(inputs)?;
        check(x, &[gamma, beta, mean, variance])?;
        Ok(vec![x])
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (isa, eps, c) = (ctx.isa(), f64::from(self.eps), inputs[0].shape.channels());
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
}

impl Operation for RunningAverage {
    fn name(&self) -> &'static str {
        "running_average"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [running, value] = operands(inputs)?;
        super::same(running, value)?;
        Ok(vec![running])
    }

    fn in_place(&self) -> Option<usize> {
        Some(0)
    }

    fn cpu_kernel(&self, _: &CpuContext, _: &[TensorType], _: &[TensorType]) -> Kernel {
        let momentum = self.momentum;
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            for (running, value) in args.outputs[0].iter_mut().zip(args.inputs[1]) {
                *running = (1.0 - momentum) * *running + momentum * value;
            }
        })
    }
}
