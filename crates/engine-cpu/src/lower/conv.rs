//! Convolutions, their transposes and their weight gradients as implicit matrix products, or with Winograd's algorithm where it is faster.

use super::{Lowering, winograd};
use crate::kernel::{Kernel, KernelArgs};
use ddpm_engine::ops::{Conv2d, Conv2dTranspose, Conv2dWeightGrad};
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{Epilogue, ImplicitGemm, MatmulDtype, Operands, WeightGrad};
use rayon::prelude::*;

impl Lowering<'_> {
    pub(super) fn conv(&self, op: &Conv2d) -> Kernel {
        let shape = op.conv_shape(self.inputs);
        match winograd::chosen(self, Winograd::forward(self.isa, self.compute.matmul_dtype, shape)) {
            Some(conv) => winograd::conv_kernel(conv, op.addends()),
            None => implicit_gemm_kernel(
                self,
                ImplicitGemm::forward(self.isa, self.compute.matmul_dtype, shape),
                op.addends(),
            ),
        }
    }

    pub(super) fn conv_transpose(&self, op: &Conv2dTranspose) -> Kernel {
        let (shape, addends) = (op.conv_shape(self.inputs), [op.bias.then_some(2), None, None]);
        let matmul_dtype = self.compute.matmul_dtype;
        let winograd_dtype = if op.gradient { matmul_dtype } else { MatmulDtype::F32 };
        match winograd::chosen(self, Winograd::data_grad(self.isa, winograd_dtype, shape)) {
            Some(conv) => winograd::conv_kernel(conv, addends),
            None => {
                implicit_gemm_kernel(self, ImplicitGemm::data_grad(self.isa, matmul_dtype, shape), addends)
            }
        }
    }

    pub(super) fn conv_weight_grad(&self, op: &Conv2dWeightGrad) -> Kernel {
        let shape = op.conv_shape(self.inputs);
        if let Some(grad) = WinogradGrad::new(self.isa, self.compute.matmul_dtype, shape)
            .filter(|w| self.compute.winograd && w.is_faster(self.compute.matmul_dtype))
        {
            return winograd::grad_kernel(grad, shape.cin, shape.cout);
        }
        let grad = WeightGrad::new(self.isa, self.compute.matmul_dtype, shape);
        let (shared, per_thread) = (grad.tasks() * grad.partial_len(), grad.scratch_len());
        Kernel::new(move |args: &mut KernelArgs<'_>| {
            let partials = &mut args.shared[..grad.tasks() * grad.partial_len()];
            let (x, dy, scratch) = (args.inputs[0], args.inputs[1], args.scratch);
            partials.par_chunks_mut(grad.partial_len()).enumerate().for_each(|(task, partial)| {
                scratch.with(|memory| grad.run(task, x, dy, partial, memory));
            });
            let partials = &*partials;
            let (dw, db) = args.outputs.split_first_mut().expect("a weight gradient has an output");
            dw.par_chunks_mut(grad.partial_len()).enumerate().for_each(|(range, out)| {
                grad.reduce_range(partials, range, 0, out);
            });
            if let Some(db) = db.first_mut() {
                grad.reduce_bias(partials, db);
            }
        })
        .shared(shared)
        .per_thread(per_thread)
    }
}

/// Packs the weights, then computes blocks of output pixels in parallel.
fn implicit_gemm_kernel(lowering: &Lowering<'_>, gemm: ImplicitGemm, addends: [Option<usize>; 3]) -> Kernel {
    let (packed_len, per_thread, cached) = (gemm.packed_len(), gemm.scratch_len(), lowering.fixed_weights);
    let by_columns = gemm.task_panels();
    let columns_len = by_columns.map_or(0, |_| gemm.output_len());
    let kernel = Kernel::new(move |args: &mut KernelArgs<'_>| {
        let (columns, rest) = args.shared.split_at_mut(columns_len);
        let packed = if cached { &mut *args.cached } else { &mut rest[..packed_len] };
        if !cached || args.new_weights {
            pack(&gemm, args.inputs[1], packed);
        }
        let operand = |i: Option<usize>| i.map(|i| args.inputs[i]);
        let epilogue = Epilogue {
            bias: operand(addends[0]),
            per_image_bias: operand(addends[1]),
            residual: operand(addends[2]),
        };
        let operands = Operands { input: args.inputs[0], packed, epilogue };
        let (task, scratch) = (gemm.task_pixels(), args.scratch);
        let channels = gemm.output_channels();
        if let Some(panels) = by_columns {
            let pixels = gemm.output_len() / channels;
            let width = gemm.columns_of(panels);
            columns.par_chunks_mut(pixels * width).enumerate().for_each(|(i, out)| {
                let panels = i * panels..gemm.panel_count().min((i + 1) * panels);
                scratch.with(|memory| gemm.run_panels(operands, panels, out, memory));
            });
            return join_columns(columns, width, args.outputs[0], channels);
        }
        args.outputs[0].par_chunks_mut(task * channels).enumerate().for_each(|(i, out)| {
            scratch.with(|memory| gemm.run(operands, i * task, out, memory));
        });
    });
    let kernel = if cached {
        kernel.cached(packed_len).shared(columns_len)
    } else {
        kernel.shared(packed_len + columns_len)
    };
    kernel.per_thread(per_thread)
}

/// Joins parts of `width` columns (the last may be narrower), each with all pixels, to `[pixels][channels]`.
fn join_columns(parts: &[f32], width: usize, out: &mut [f32], channels: usize) {
    let pixels = out.len() / channels;
    for (pixel, out) in out.chunks_exact_mut(channels).enumerate() {
        for (out, part) in out.chunks_mut(width).zip(parts.chunks(pixels * width)) {
            out.copy_from_slice(&part[pixel * out.len()..][..out.len()]);
        }
    }
}

/// Packs all weights, the panels in parallel.
fn pack(gemm: &ImplicitGemm, weights: &[f32], packed: &mut [f32]) {
    let mut rest = packed;
    for phase in 0..gemm.phase_count() {
        let (part, tail) = rest.split_at_mut(gemm.panel_len(phase) * gemm.panel_count());
        part.par_chunks_mut(gemm.panel_len(phase).max(1)).enumerate().for_each(|(panel, out)| {
            gemm.pack_panel(phase, panel, weights, out);
        });
        rest = tail;
    }
}
