//! Multi-head self-attention over the pixels of an image, tiled.

use super::{Dropout, Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{CpuContext, Kernel, KernelArgs};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::attention::{Attention as Tiles, Saved};
use rayon::prelude::*;

/// `o = softmax(q k^T / sqrt(d)) v` for each head; operand `qkv [n, h, w, 3c]` (queries, keys, values of all heads);
/// outputs `o [n, h, w, c]` and the log-sum-exp of the scores `[n, h * w, heads]` for the backward pass.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Number of heads, a divisor of c.
    pub heads: usize,
    /// Dropout of the attention weights.
    pub dropout: Option<Dropout>,
}

/// The gradient of [`Attention`]; operands `qkv, o, lse, do`; output `dqkv`.
#[derive(Clone, Debug)]
pub struct AttentionGrad(pub Attention);

/// Batches of at least this many images use one backward task per image, which needs no memory for partial sums.
const IMAGE_TASKS_MIN: usize = 16;
/// Tokens per task of the reduction of partial sums.
const ROWS: usize = 256;

/// (images, tokens, channels)
fn sizes(qkv: Shape) -> (usize, usize, usize) {
    let (n, c) = (qkv.dims()[0], qkv.channels());
    (n, qkv.len() / n / c, c / 3)
}

impl Operation for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [qkv] = operands(inputs)?;
        let Some([n, h, w, c]) = qkv.shape.nhwc() else { return Err("expects [n, h, w, 3c]".to_owned()) };
        self.dropout.map_or(Ok(()), |d| d.check())?;
        if self.heads == 0 || c % (3 * self.heads) != 0 {
            return Err(format!(
                "{c} channels cannot be split into queries, keys and values of {} heads",
                self.heads
            ));
        }
        let o = TensorType { shape: qkv.shape.with_channels(c / 3), dtype: qkv.dtype };
        Ok(vec![o, TensorType::f32([n, h * w, self.heads])])
    }

    fn backward(&self, b: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        let operands = [b.input(0), b.output(0), b.output(1), b.dy];
        Ok(Some(vec![Some(b.graph.add(&b.name(), AttentionGrad(self.clone()), &operands)?)]))
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let (n, tokens, c) = sizes(inputs[0].shape);
        (2 * n * tokens * tokens * c) as u64
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (n, tokens, c) = sizes(inputs[0].shape);
        let (heads, dropout) = (self.heads, self.dropout);
        let tiles = Tiles::new(ctx.isa(), ctx.compute().matmul_dtype, tokens, c, heads);
        // A task is a block of consecutive queries of one image.
        let queries = tiles.task_queries(n);
        let blocks = tokens.div_ceil(queries);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let (qkv, scratch) = (args.inputs[0], args.scratch);
            let [o, lse] = args.outputs else { unreachable!("two outputs") };
            let images = (qkv.par_chunks(tokens * 3 * c), o.par_chunks_mut(tokens * c));
            let masks = dropout.map(|d| d.masks(args.rng));
            let images = images.into_par_iter().zip(lse.par_chunks_mut(tokens * heads));
            images.enumerate().for_each(|(image, ((qkv, o), lse))| {
                let masks = masks.map(|m| m.image(image as u32));
                let parts = (o.par_chunks_mut(queries * c), lse.par_chunks_mut(queries * heads));
                parts.into_par_iter().enumerate().with_max_len(blocks).for_each(|(i, (o, lse))| {
                    scratch.with(|memory| tiles.forward(qkv, i * queries, masks, o, lse, memory));
                });
            });
        })
        .per_thread(tiles.scratch_len())
    }
}

impl Operation for AttentionGrad {
    fn name(&self) -> &'static str {
        "attention_grad"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [qkv, o, _, d_o] = operands(inputs)?;
        super::same(o, d_o)?;
        Ok(vec![qkv])
    }

    fn multiply_adds(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        let (n, tokens, c) = sizes(inputs[0].shape);
        (5 * n * tokens * tokens * c) as u64
    }

    fn cpu_kernel(&self, ctx: &CpuContext, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (n, tokens, c) = sizes(inputs[0].shape);
        let (heads, dropout) = (self.0.heads, self.0.dropout);
        let tiles = Tiles::new(ctx.isa(), ctx.compute().matmul_dtype, tokens, c, heads);
        let per_thread = tiles.backward_scratch_len();
        // Small batches are split into heads and ranges of keys; each computes a partial dqkv, and these are added in order.
        let ranges = tiles.key_ranges(n);
        let partial = tiles.partial_len(ranges);
        let shared = if n < IMAGE_TASKS_MIN { n * heads * ranges * partial } else { 0 };
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([qkv, o, lse, d_o], scratch) = (args.inputs, args.scratch) else {
                unreachable!("four operands")
            };
            let masks = dropout.map(|d| d.masks(args.rng));
            let saved = |image: usize| Saved {
                qkv: &qkv[image * tokens * 3 * c..][..tokens * 3 * c],
                o: &o[image * tokens * c..][..tokens * c],
                lse: &lse[image * tokens * heads..][..tokens * heads],
                d_o: &d_o[image * tokens * c..][..tokens * c],
                dropout: masks.map(|m| m.image(image as u32)),
            };
            let images = args.outputs[0].par_chunks_mut(tokens * 3 * c).enumerate();
            if shared == 0 {
                images.for_each(|(image, dqkv)| {
                    scratch.with(|memory| tiles.backward(&saved(image), dqkv, memory));
                });
                return;
            }
            let partials = &mut args.shared[..shared];
            let tasks = heads * ranges;
            partials.par_chunks_mut(partial).enumerate().for_each(|(i, out)| {
                let saved = saved(i / tasks);
                scratch.with(|memory| tiles.backward_range(&saved, i % tasks, ranges, out, memory));
            });
            images.zip(partials.par_chunks(tasks * partial)).for_each(|((_, dqkv), partials)| {
                let rows = dqkv.par_chunks_mut(ROWS * 3 * c).enumerate();
                rows.for_each(|(i, dqkv)| tiles.add_ranges(partials, ranges, i * ROWS, dqkv));
            });
        })
        .shared(shared)
        .per_thread(per_thread)
    }
}
