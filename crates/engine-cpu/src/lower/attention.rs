//! Multi-head self-attention: tasks of images, heads, and ranges of queries or keys.

use super::Lowering;
use super::dropout::masks;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::Attention;
use ddpm_kernels::attention::{Attention as Tiles, Saved};
use rayon::prelude::*;

/// Batches of at least this many images use one backward task per image, which needs no memory for partial sums.
const IMAGE_TASKS_MIN: usize = 16;
/// Tokens per task of the reduction of partial sums.
const ROWS: usize = 256;

impl Lowering<'_> {
    pub(super) fn attention(&self, op: &Attention) -> Kernel {
        let (n, tokens, c) = Attention::sizes(self.inputs[0].shape);
        let (heads, dropout) = (op.heads, op.dropout);
        let tiles = Tiles::new(self.isa, self.compute.matmul_dtype, tokens, c, heads);
        // A task is a block of consecutive queries of one image.
        let queries = tiles.task_queries(n);
        let blocks = tokens.div_ceil(queries);
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let (qkv, scratch) = (args.inputs[0], args.scratch);
            let [o, lse] = args.outputs else { unreachable!("two outputs") };
            let images = (qkv.par_chunks(tokens * 3 * c), o.par_chunks_mut(tokens * c));
            let masks = dropout.map(|d| masks(&d, args.rng));
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

    pub(super) fn attention_grad(&self, op: &Attention) -> Kernel {
        let (n, tokens, c) = Attention::sizes(self.inputs[0].shape);
        let (heads, dropout) = (op.heads, op.dropout);
        let tiles = Tiles::new(self.isa, self.compute.matmul_dtype, tokens, c, heads);
        let per_thread = tiles.backward_scratch_len();
        // Small batches are split into heads and ranges of keys; each computes a partial dqkv, and these are added in order.
        let ranges = tiles.key_ranges(n);
        let partial = tiles.partial_len(ranges);
        let shared = if n < IMAGE_TASKS_MIN { n * heads * ranges * partial } else { 0 };
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let ([qkv, o, lse, d_o], scratch) = (args.inputs, args.scratch) else {
                unreachable!("four operands")
            };
            let masks = dropout.map(|d| masks(&d, args.rng));
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
