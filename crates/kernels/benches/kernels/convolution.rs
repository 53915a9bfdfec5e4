//! The passes of a convolution, their tasks one after the other, as the engine runs them side by side. Weights are packed
//! anew each time, as in training.

use super::{isa, numbers};
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{ConvShape, Epilogue, Factors, Gather, WeightGrad};
use divan::Bencher;
use divan::counter::ItemsCount;

fn flops(shape: ConvShape) -> ItemsCount {
    ItemsCount::new(2 * shape.multiply_adds())
}

/// Numbers of the input and of the output.
fn lens(shape: ConvShape) -> [usize; 2] {
    let ConvShape { n, input, output, cin, cout, .. } = shape;
    [n * input.0 * input.1 * cin, n * output.0 * output.1 * cout]
}

pub fn forward(bencher: Bencher<'_, '_>, shape: ConvShape, factors: Factors) {
    gather(bencher, shape, lens(shape)[0], &Gather::forward(isa(), factors, shape));
}

pub fn data_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: Factors) {
    gather(bencher, shape, lens(shape)[1], &Gather::data_grad(isa(), factors, shape));
}

fn gather(bencher: Bencher<'_, '_>, shape: ConvShape, input: usize, of: &Gather) {
    let (x, w) = (numbers(input), numbers(shape.weights()));
    let (mut packed, mut scratch) = (vec![0.0; of.packed_len()], vec![0.0; of.scratch_len()]);
    let mut out = vec![0.0; of.output_len()];
    let task = of.task_pixels();
    bencher.counter(flops(shape)).bench_local(|| {
        of.pack(&w, &mut packed);
        for (i, out) in out.chunks_mut(task * of.output_channels()).enumerate() {
            of.run(&x, &packed, Epilogue::default(), i * task, out, &mut scratch);
        }
    });
}

pub fn weight_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: Factors) {
    let of = WeightGrad::new(isa(), factors, shape);
    let [x, dy] = lens(shape).map(numbers);
    let (mut partials, mut scratch) = (vec![0.0; of.tasks() * of.partial_len()], vec![0.0; of.scratch_len()]);
    let (mut dw, mut db) = (vec![0.0; shape.weights()], vec![0.0; shape.cout]);
    bencher.counter(flops(shape)).bench_local(|| {
        for (task, partial) in partials.chunks_mut(of.partial_len()).enumerate() {
            of.run(task, &x, &dy, partial, &mut scratch);
        }
        of.reduce(&partials, &mut dw, Some(&mut db));
    });
}

pub fn winograd_forward(bencher: Bencher<'_, '_>, shape: ConvShape, factors: Factors) {
    let of = Winograd::forward(isa(), factors, shape).expect("3x3, stride 1");
    winograd(bencher, shape, lens(shape)[0], &of);
}

pub fn winograd_data_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: Factors) {
    let of = Winograd::data_grad(isa(), factors, shape).expect("3x3, stride 1");
    winograd(bencher, shape, lens(shape)[1], &of);
}

fn winograd(bencher: Bencher<'_, '_>, shape: ConvShape, input: usize, of: &Winograd) {
    let (x, w) = (numbers(input), numbers(shape.weights()));
    let [mut packed, mut values, mut products] = of.shared_len().map(|len| vec![0.0; len]);
    let mut out = vec![0.0; of.output_len()];
    let one_block = of.blocks().count() == 1;
    bencher.counter(flops(shape)).bench_local(|| {
        for (i, panels) in of.groups().enumerate() {
            for (panel, to) in panels.clone().zip(packed.chunks_exact_mut(of.panel_len())) {
                of.pack_panel(panel, &w, to);
            }
            let packed = &packed[..panels.len() * of.panel_len()];
            let mut rest = &mut out[..];
            for rows in of.blocks() {
                let values = &mut values[..of.value_groups(rows.len()) * of.values_len()];
                if i == 0 || !one_block {
                    for (group, to) in values.chunks_exact_mut(of.values_len()).enumerate() {
                        of.values(rows.start, group, &x, to);
                    }
                }
                let len = of.products_len(rows.len(), panels.len());
                let products = &mut products[..of.points() * len];
                for (point, to) in products.chunks_exact_mut(len).enumerate() {
                    of.multiply(point, panels.len(), values, packed, to);
                }
                for row in rows.clone() {
                    let (part, tail) = rest.split_at_mut(of.row_len(row));
                    of.outputs(rows.start, row, panels.clone(), products, Epilogue::default(), part);
                    rest = tail;
                }
            }
        }
    });
}

pub fn winograd_weight_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: Factors) {
    let of = WinogradGrad::new(isa(), factors, shape).expect("3x3, stride 1");
    let [x, dy] = lens(shape).map(numbers);
    let [mut v, mut y, mut b, mut sums, _] = of.shared_len().map(|len| vec![0.0; len]);
    let [v_len, y_len, b_len] = of.run_len();
    let (sums_len, points) = of.sums_len();
    let (mut dw, mut by_row) = (vec![0.0; shape.weights()], vec![0.0; 9 * shape.cout]);
    bencher.counter(flops(shape)).bench_local(|| {
        for (i, runs) in of.blocks().enumerate() {
            let n = runs.len();
            let (v, y, b) = (&mut v[..n * v_len], &mut y[..n * y_len], &mut b[..n * b_len]);
            let parts =
                v.chunks_exact_mut(v_len).zip(y.chunks_exact_mut(y_len)).zip(b.chunks_exact_mut(b_len));
            for (run, ((v, y), b)) in runs.zip(parts) {
                of.values(run, &x, &dy, v, y, b);
            }
            for (point, sums) in sums.chunks_exact_mut(sums_len).take(points).enumerate() {
                of.multiply(point, v, y, sums, i > 0);
            }
        }
        for ci in 0..shape.cin {
            of.reduce(ci, &sums, &mut by_row);
            for (k, row) in by_row.chunks_exact(shape.cout).enumerate() {
                dw[(k * shape.cin + ci) * shape.cout..][..shape.cout].copy_from_slice(row);
            }
        }
    });
}
