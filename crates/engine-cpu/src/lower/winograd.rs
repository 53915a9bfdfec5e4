//! Winograd convolutions: their phases in sequence, each parallel over the threads.

use super::Lowering;
use crate::kernel::{Kernel, KernelArgs};
use ddpm_kernels::conv::winograd::{GradOperands, RunValues, Winograd, WinogradGrad};
use ddpm_kernels::conv::{Epilogue, Operands};
use rayon::prelude::*;
use std::ops::Range;

/// The convolution, if Winograd is allowed and expected to be faster.
pub(super) fn chosen(lowering: &Lowering<'_>, conv: Option<Winograd>) -> Option<Winograd> {
    let conv = conv.filter(|_| lowering.compute.winograd)?;
    let conv = if lowering.fixed_weights { conv.with_fixed_weights() } else { conv };
    conv.is_faster(lowering.compute.matmul_dtype).then_some(conv)
}

/// Forward pass or data gradient; operands `x, w`, and those of the epilogue at the indices `addends`.
pub(super) fn conv_kernel(conv: Winograd, addends: [Option<usize>; 3]) -> Kernel {
    if conv.uses_per_thread_blocks() {
        return per_thread_blocks_kernel(conv, addends);
    }
    if conv.uses_per_thread_panels() {
        return per_thread_panels_kernel(conv, addends);
    }
    let [packed_len, values_len, products_len] = conv.shared_len();
    let cached = conv.keeps_weights();
    let kernel = Kernel::new(move |args: &mut KernelArgs<'_>| {
        let (packed, rest) = if cached {
            (&mut *args.cached, &mut *args.shared)
        } else {
            args.shared.split_at_mut(packed_len)
        };
        let (values, rest) = rest.split_at_mut(values_len);
        let products = &mut rest[..products_len];
        let (x, w) = (args.inputs[0], args.inputs[1]);
        let [bias, per_image_bias, residual] = addends.map(|i| i.map(|i| args.inputs[i]));
        let epilogue = Epilogue { bias, per_image_bias, residual };
        let one_block = conv.blocks().count() == 1;
        for (panels, first_of_part) in conv.groups() {
            let start = if cached { panels.start * conv.panel_len() } else { 0 };
            let packed = &mut packed[start..][..panels.len() * conv.panel_len()];
            if !cached || args.new_weights {
                packed.par_chunks_exact_mut(conv.panel_len()).enumerate().for_each(|(panel, to)| {
                    conv.pack_panel(panels.start + panel, w, to);
                });
            }
            let (packed, mut rest) = (&*packed, &mut *args.outputs[0]);
            for rows in conv.blocks() {
                let values = &mut values[..conv.value_groups(rows.len()) * conv.values_len()];
                if first_of_part || !one_block {
                    values.par_chunks_exact_mut(conv.values_len()).enumerate().for_each(|(group, to)| {
                        conv.values(rows.start, group, panels.start, x, to);
                    });
                }
                let len = conv.products_len(rows.len(), panels.len());
                let (values, products) = (&*values, &mut products[..conv.points() * len]);
                products.par_chunks_exact_mut(len).enumerate().for_each(|(point, to)| {
                    conv.multiply(point, panels.len(), values, packed, to);
                });
                let (block, tail) = rest.split_at_mut(rows.clone().map(|row| conv.row_len(row)).sum());
                let products = &*products;
                by_rows(block, rows.clone(), &|row| conv.row_len(row), &|row, out| {
                    conv.outputs(rows.start, row, panels.clone(), products, epilogue, out);
                });
                rest = tail;
            }
        }
    });
    if cached {
        kernel.cached(packed_len).shared(values_len + products_len)
    } else {
        kernel.shared(packed_len + values_len + products_len)
    }
}

/// The variant in which each thread computes whole blocks, from inputs to outputs.
fn per_thread_blocks_kernel(conv: Winograd, addends: [Option<usize>; 3]) -> Kernel {
    let [packed_len, values_len, products_len] = conv.shared_len();
    let cached = conv.keeps_weights();
    let blocks: Vec<Range<usize>> = conv.blocks().collect();
    let kernel = Kernel::new(move |args: &mut KernelArgs<'_>| {
        let packed = if cached { &mut *args.cached } else { &mut args.shared[..packed_len] };
        let (x, w, scratch) = (args.inputs[0], args.inputs[1], args.scratch);
        let [bias, per_image_bias, residual] = addends.map(|i| i.map(|i| args.inputs[i]));
        let epilogue = Epilogue { bias, per_image_bias, residual };
        for (panels, _) in conv.groups() {
            let start = if cached { panels.start * conv.panel_len() } else { 0 };
            let packed = &mut packed[start..][..panels.len() * conv.panel_len()];
            if !cached || args.new_weights {
                packed.par_chunks_exact_mut(conv.panel_len()).enumerate().for_each(|(panel, to)| {
                    conv.pack_panel(panels.start + panel, w, to);
                });
            }
            let operands = Operands { input: x, packed, epilogue };
            let len = |block: usize| blocks[block].clone().map(|row| conv.row_len(row)).sum();
            by_rows(args.outputs[0], 0..blocks.len(), &len, &|block, out| {
                scratch.with(|memory| {
                    let rows = blocks[block].clone();
                    conv.compute_block(rows, panels.clone(), operands, out, memory);
                });
            });
        }
    });
    let kernel = if cached { kernel.cached(packed_len) } else { kernel.shared(packed_len) };
    kernel.per_thread(values_len + products_len)
}

/// The variant in which each thread computes whole panels, from weights to products.
fn per_thread_panels_kernel(conv: Winograd, addends: [Option<usize>; 3]) -> Kernel {
    let [packed_len, values_len, products_len] = conv.shared_len();
    let rows = conv.blocks().next().expect("there is one block");
    let panel_len = conv.points() * conv.products_len(rows.len(), 1);
    // Each group of panels has its own quantisation steps.
    let steps_len = conv.groups().count() * conv.steps_len();
    let cached = conv.has_fixed_weights();
    let kernel = Kernel::new(move |args: &mut KernelArgs<'_>| {
        let (values, rest) = args.shared.split_at_mut(values_len);
        let (products, rest) = rest.split_at_mut(products_len);
        let steps = if cached { &mut *args.cached } else { &mut rest[..steps_len] };
        let (x, w, scratch) = (args.inputs[0], args.inputs[1], args.scratch);
        let [bias, per_image_bias, residual] = addends.map(|i| i.map(|i| args.inputs[i]));
        let epilogue = Epilogue { bias, per_image_bias, residual };
        for (group, (panels, first_of_part)) in conv.groups().enumerate() {
            if first_of_part {
                values.par_chunks_exact_mut(conv.values_len()).enumerate().for_each(|(group, to)| {
                    conv.values(0, group, panels.start, x, to);
                });
            }
            let (values, products) = (&*values, &mut products[..panels.len() * panel_len]);
            let per_task = panels.len().div_ceil(rayon::current_num_threads());
            let task_panels =
                |i: usize| panels.start + i * per_task..panels.end.min(panels.start + (i + 1) * per_task);
            let steps = &mut steps[group * conv.steps_len()..][..conv.steps_len()];
            if !cached || args.new_weights {
                let steps = steps.par_chunks_mut(per_task).enumerate();
                steps.for_each(|(i, steps)| conv.steps(task_panels(i), w, steps));
            }
            let steps = &*steps;
            products.par_chunks_mut(per_task * panel_len).enumerate().for_each(|(i, to)| {
                let steps = if steps.is_empty() { steps } else { &steps[i * per_task..] };
                scratch.with(|memory| {
                    conv.compute_panels(task_panels(i), values, w, steps, to, &mut memory[..packed_len]);
                });
            });
            let products = &*products;
            by_rows(args.outputs[0], rows.clone(), &|row| conv.row_len(row), &|row, out| {
                for (panel, products) in panels.clone().zip(products.chunks_exact(panel_len)) {
                    conv.outputs(0, row, panel..panel + 1, products, epilogue, out);
                }
            });
        }
    })
    .per_thread(packed_len);
    if cached {
        kernel.cached(steps_len).shared(values_len + products_len)
    } else {
        kernel.shared(values_len + products_len + steps_len)
    }
}

/// Calls `f` in parallel for every row with its part of `out`; `len` is the length of a row's part.
fn by_rows(
    out: &mut [f32],
    rows: Range<usize>,
    len: &(impl Fn(usize) -> usize + Sync),
    f: &(impl Fn(usize, &mut [f32]) + Sync),
) {
    if rows.len() == 1 {
        return f(rows.start, out);
    }
    let middle = rows.start + rows.len() / 2;
    let (before, after) = out.split_at_mut((rows.start..middle).map(len).sum());
    rayon::join(|| by_rows(before, rows.start..middle, len, f), || by_rows(after, middle..rows.end, len, f));
}

/// Weight gradient; operands `x, dy`, outputs `dw` and optionally `db`.
pub(super) fn grad_kernel(grad: WinogradGrad, cin: usize, cout: usize) -> Kernel {
    let [v_all, y_all, b_all, sums_all, by_row_all] = grad.shared_len();
    let (own, values_all) = (grad.groups() > 1, v_all + y_all + b_all);
    let shared = sums_all + by_row_all + if own { 0 } else { values_all };
    let per_thread = if own { values_all } else { 0 };
    let taps = grad.taps();
    Kernel::new(move |args: &mut KernelArgs<'_>| {
        let (sums, rest) = args.shared.split_at_mut(sums_all);
        let (by_row, values) = rest.split_at_mut(by_row_all);
        let operands = GradOperands { input: args.inputs[0], dy: args.inputs[1] };
        let scratch = args.scratch;
        let (dw, db) = args.outputs.split_first_mut().expect("a weight gradient has an output");
        for (part, rows) in (0..grad.parts()).flat_map(|part| grad.ranges().map(move |rows| (part, rows))) {
            if own {
                sums.par_chunks_exact_mut(grad.group_len()).enumerate().for_each(|(group, sums)| {
                    scratch.with(|memory| grad.accumulate_group(part, group, operands, sums, memory));
                });
            } else {
                sum_by_phases(&grad, part, &rows, operands, sums, &mut values[..values_all]);
            }
            let (sums, count) = (&*sums, rows.end.min(cin) - rows.start);
            let by_row = &mut by_row[..count * taps * cout];
            by_row
                .par_chunks_exact_mut(taps * cout)
                .enumerate()
                .for_each(|(row, to)| grad.reduce(row, sums, to));
            let by_row = &*by_row;
            dw.par_chunks_exact_mut(cin * cout).enumerate().for_each(|(k, dw)| {
                let Some(tap) = (0..taps).find(|&tap| grad.place(part, tap) == k) else { return };
                let dw = dw[rows.start * cout..].chunks_exact_mut(cout);
                for (to, from) in dw.zip(by_row.chunks_exact(taps * cout)) {
                    to.copy_from_slice(&from[tap * cout..][..cout]);
                }
            });
        }
        if let Some(db) = db.first_mut() {
            grad.reduce_bias(sums, db);
        }
    })
    .shared(shared)
    .per_thread(per_thread)
}

/// The sums of the only group for a range of rows, each phase of a block parallel over all threads. The first range computes the values.
fn sum_by_phases(
    grad: &WinogradGrad,
    part: usize,
    rows: &Range<usize>,
    operands: GradOperands<'_>,
    sums: &mut [f32],
    values: &mut [f32],
) {
    let [v_all, y_all, ..] = grad.shared_len();
    let ([v_len, y_len, b_len], (sums_len, points)) = (grad.run_len(), grad.sums_len());
    let (v, rest) = values.split_at_mut(v_all);
    let (y, b) = rest.split_at_mut(y_all);
    let (sums, db) = sums.split_at_mut(points * sums_len);
    let first = rows.start == 0;
    if first {
        db.fill(0.0);
    }
    for (i, runs) in grad.blocks(0).enumerate() {
        let n = runs.len();
        let (v, y, b) = (&mut v[..n * v_len], &mut y[..n * y_len], &mut b[..n * b_len]);
        if first {
            (v.par_chunks_exact_mut(v_len), y.par_chunks_exact_mut(y_len), b.par_chunks_exact_mut(b_len))
                .into_par_iter()
                .enumerate()
                .for_each(|(j, (v, y, b))| {
                    grad.values(part, runs.start + j, operands, RunValues { v, y, bias: b })
                });
            for partial in b.chunks_exact(b_len) {
                db.iter_mut().zip(partial).for_each(|(sum, v)| *sum += v);
            }
        }
        let (v, y) = (&*v, &*y);
        sums.par_chunks_exact_mut(sums_len).enumerate().for_each(|(point, sums)| {
            grad.multiply(point, rows.clone(), v, y, sums, i > 0);
        });
    }
}
