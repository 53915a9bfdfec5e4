//! Multi-head self-attention over the pixels of an image, in tiles.

use super::{Dropout, Operation, operands};
use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel, Run};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::{Shape, TensorType};
use ddpm_kernels::attention::{Attention as Tiles, Saved};
use rayon::prelude::*;

/// `o = softmax(q k^T / sqrt(d)) v` for each head; operand `qkv [n, h, w, 3c]` (queries, keys, values of all heads);
/// results `o [n, h, w, c]` and the softmax denominators' logarithms `[n, h * w, heads]` for the backward pass.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Number of heads; it divides c.
    pub heads: usize,
    /// Dropout of the softmax's results.
    pub dropout: Option<Dropout>,
}

/// The gradient of [`Attention`]; operands `qkv, o, logarithms, do`; result `dqkv`.
#[derive(Clone, Debug)]
pub struct AttentionGrad(pub Attention);

/// From so many images on, the backward pass of each is one task, and needs no memory for parts.
const MANY_IMAGES: usize = 16;
/// Tokens of a task that adds parts.
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
        let Some([n, h, w, c]) = qkv.shape.nhwc() else { return Err("takes [n, h, w, 3c]".to_owned()) };
        self.dropout.map_or(Ok(()), |d| d.check())?;
        if self.heads == 0 || c % (3 * self.heads) != 0 {
            return Err(format!("{c} channels are not queries, keys and values of {} heads", self.heads));
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (n, tokens, c) = sizes(inputs[0].shape);
        let (heads, dropout) = (self.heads, self.dropout);
        let tiles = Tiles::new(cpu.isa(), cpu.arithmetic().factors, tokens, c, heads);
        // A task is an image's run of queries; every image begins a new one.
        let queries = tiles.task_queries(n);
        let blocks = tokens.div_ceil(queries);
        Kernel::new(move |run: &mut Run<'_>| {
            let (qkv, scratch) = (run.inputs[0], run.scratch);
            let [o, lse] = run.outputs else { unreachable!("two results") };
            let images = (qkv.par_chunks(tokens * 3 * c), o.par_chunks_mut(tokens * c));
            let masks = dropout.map(|d| d.masks(run.draws));
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

    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], _: &[TensorType]) -> Kernel {
        let (n, tokens, c) = sizes(inputs[0].shape);
        let (heads, dropout) = (self.0.heads, self.0.dropout);
        let tiles = Tiles::new(cpu.isa(), cpu.arithmetic().factors, tokens, c, heads);
        let per_thread = tiles.backward_scratch_len();
        // Few images are split into heads and ranges of keys; each makes a part of dqkv, and these are added in order.
        let ranges = tiles.key_ranges(n);
        let partial = tiles.partial_len(ranges);
        let shared = if n < MANY_IMAGES { n * heads * ranges * partial } else { 0 };
        Kernel::new(move |run: &mut Run<'_>| {
            let ([qkv, o, lse, d_o], scratch) = (run.inputs, run.scratch) else {
                unreachable!("four operands")
            };
            let masks = dropout.map(|d| d.masks(run.draws));
            let saved = |image: usize| Saved {
                qkv: &qkv[image * tokens * 3 * c..][..tokens * 3 * c],
                o: &o[image * tokens * c..][..tokens * c],
                lse: &lse[image * tokens * heads..][..tokens * heads],
                d_o: &d_o[image * tokens * c..][..tokens * c],
                dropout: masks.map(|m| m.image(image as u32)),
            };
            let images = run.outputs[0].par_chunks_mut(tokens * 3 * c).enumerate();
            if shared == 0 {
                images.for_each(|(image, dqkv)| {
                    scratch.with(|memory| tiles.backward(&saved(image), dqkv, memory));
                });
                return;
            }
            let partials = &mut run.shared[..shared];
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
