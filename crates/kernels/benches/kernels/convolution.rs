//! The passes of a convolution, with the tasks that the engine runs in parallel one after the other. Weights
//! are repacked each time, as in training.

use super::{isa, random};
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{ConvShape, Epilogue, ImplicitGemm, MatmulDtype, Operands, WeightGrad};
use divan::Bencher;
use divan::counter::ItemsCount;

/// Winograd is benchmarked for 3x3 with stride 1 and 4x4 with stride 2.
const SUPPORTED: &str = "supported by Winograd";

fn flops(shape: ConvShape) -> ItemsCount {
    ItemsCount::new(2 * shape.multiply_adds())
}

/// Lengths of the input and of the output.
fn lens(shape: ConvShape) -> [usize; 2] {
    let ConvShape { n, input, output, cin, cout, .. } = shape;
    [n * input.0 * input.1 * cin, n * output.0 * output.1 * cout]
}

pub fn forward(bencher: Bencher<'_, '_>, shape: ConvShape, dtype: MatmulDtype) {
    gather(bencher, shape, lens(shape)[0], &ImplicitGemm::forward(isa(), dtype, shape));
}

pub fn data_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, dtype: MatmulDtype) {
    gather(bencher, shape, lens(shape)[1], &ImplicitGemm::data_grad(isa(), dtype, shape));
}

fn gather(bencher: Bencher<'_, '_>, shape: ConvShape, input: usize, conv: &ImplicitGemm) {
    let (x, w) = (random(input), random(shape.weights()));
    let (mut packed, mut scratch) = (vec![0.0; conv.packed_len()], vec![0.0; conv.scratch_len()]);
    let mut out = vec![0.0; conv.output_len()];
    let task = conv.task_pixels();
    bencher.counter(flops(shape)).bench_local(|| {
        conv.pack(&w, &mut packed);
        for (i, out) in out.chunks_mut(task * conv.output_channels()).enumerate() {
            let operands = Operands { input: &x, packed: &packed, epilogue: Epilogue::default() };
            conv.run(operands, i * task, out, &mut scratch);
        }
    });
}

pub fn weight_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, dtype: MatmulDtype) {
    let conv = WeightGrad::new(isa(), dtype, shape);
    let [x, dy] = lens(shape).map(random);
    let (mut partials, mut scratch) =
        (vec![0.0; conv.tasks() * conv.partial_len()], vec![0.0; conv.scratch_len()]);
    let (mut dw, mut db) = (vec![0.0; shape.weights()], vec![0.0; shape.cout]);
    bencher.counter(flops(shape)).bench_local(|| {
        for (task, partial) in partials.chunks_mut(conv.partial_len()).enumerate() {
            conv.run(task, &x, &dy, partial, &mut scratch);
        }
        conv.reduce(&partials, &mut dw, Some(&mut db));
    });
}

pub fn winograd_forward(bencher: Bencher<'_, '_>, shape: ConvShape, dtype: MatmulDtype) {
    let conv = Winograd::forward(isa(), dtype, shape).expect(SUPPORTED);
    winograd(bencher, shape, lens(shape)[0], &conv);
}

pub fn winograd_data_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, dtype: MatmulDtype) {
    let conv = Winograd::data_grad(isa(), dtype, shape).expect(SUPPORTED);
    winograd(bencher, shape, lens(shape)[1], &conv);
}

fn winograd(bencher: Bencher<'_, '_>, shape: ConvShape, input: usize, conv: &Winograd) {
    let (x, w) = (random(input), random(shape.weights()));
    let (mut out, mut memory) = (vec![0.0; conv.output_len()], vec![0.0; conv.shared_len().iter().sum()]);
    bencher
        .counter(flops(shape))
        .bench_local(|| conv.run(&x, &w, Epilogue::default(), &mut out, &mut memory));
}

pub fn winograd_weight_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, dtype: MatmulDtype) {
    let conv = WinogradGrad::new(isa(), dtype, shape).expect(SUPPORTED);
    let [x, dy] = lens(shape).map(random);
    let (mut dw, mut db) = (vec![0.0; shape.weights()], vec![0.0; shape.cout]);
    let mut memory = vec![0.0; conv.shared_len().iter().sum()];
    bencher.counter(flops(shape)).bench_local(|| conv.run(&x, &dy, &mut dw, &mut db, &mut memory));
}
