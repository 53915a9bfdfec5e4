//! The passes of a convolution, their tasks one after the other, as the engine runs them side by side. Weights are packed
//! anew each time, as in training.

use super::{isa, numbers};
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{ConvShape, Epilogue, ImplicitGemm, MatmulDtype, WeightGrad};
use divan::Bencher;
use divan::counter::ItemsCount;

/// What is benched so is 3x3 with stride 1, or 4x4 with stride 2.
const WAY: &str = "a way through Winograd's tiles";

fn flops(shape: ConvShape) -> ItemsCount {
    ItemsCount::new(2 * shape.multiply_adds())
}

/// Numbers of the input and of the output.
fn lens(shape: ConvShape) -> [usize; 2] {
    let ConvShape { n, input, output, cin, cout, .. } = shape;
    [n * input.0 * input.1 * cin, n * output.0 * output.1 * cout]
}

pub fn forward(bencher: Bencher<'_, '_>, shape: ConvShape, factors: MatmulDtype) {
    gather(bencher, shape, lens(shape)[0], &ImplicitGemm::forward(isa(), factors, shape));
}

pub fn data_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: MatmulDtype) {
    gather(bencher, shape, lens(shape)[1], &ImplicitGemm::data_grad(isa(), factors, shape));
}

fn gather(bencher: Bencher<'_, '_>, shape: ConvShape, input: usize, of: &ImplicitGemm) {
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

pub fn weight_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: MatmulDtype) {
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

pub fn winograd_forward(bencher: Bencher<'_, '_>, shape: ConvShape, factors: MatmulDtype) {
    let of = Winograd::forward(isa(), factors, shape).expect(WAY);
    winograd(bencher, shape, lens(shape)[0], &of);
}

pub fn winograd_data_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: MatmulDtype) {
    let of = Winograd::data_grad(isa(), factors, shape).expect(WAY);
    winograd(bencher, shape, lens(shape)[1], &of);
}

fn winograd(bencher: Bencher<'_, '_>, shape: ConvShape, input: usize, of: &Winograd) {
    let (x, w) = (numbers(input), numbers(shape.weights()));
    let (mut out, mut memory) = (vec![0.0; of.output_len()], vec![0.0; of.shared_len().iter().sum()]);
    bencher.counter(flops(shape)).bench_local(|| of.run(&x, &w, Epilogue::default(), &mut out, &mut memory));
}

pub fn winograd_weight_gradient(bencher: Bencher<'_, '_>, shape: ConvShape, factors: MatmulDtype) {
    let of = WinogradGrad::new(isa(), factors, shape).expect(WAY);
    let [x, dy] = lens(shape).map(numbers);
    let (mut dw, mut db) = (vec![0.0; shape.weights()], vec![0.0; shape.cout]);
    let mut memory = vec![0.0; of.shared_len().iter().sum()];
    bencher.counter(flops(shape)).bench_local(|| of.run(&x, &dy, &mut dw, &mut db, &mut memory));
}
