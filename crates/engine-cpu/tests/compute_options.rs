//! `ComputeOptions` of convolutions on the CPU executor: agreement with plain f32, for any number of threads.
#![allow(missing_docs, reason = "tests")]

use ddpm_engine::ops::{Conv2d, Loss, Padding};
use ddpm_engine::{ComputeOptions, Executor, Graph, MatmulDtype, PlanOptions, Region, RngKey};
use ddpm_engine_cpu::{CpuExecutor, Isa};
use ddpm_kernels::conv::ConvShape;
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};

/// Kernel, stride, padding, output channels.
type Layer = (usize, usize, usize, usize);

/// The output of two stacked convolutions, and the gradients of input, weights and biases under a squared error.
fn run(
    shape: [usize; 4],
    layers: [Layer; 2],
    compute: ComputeOptions,
    threads: usize,
    isa: Isa,
) -> Vec<Vec<f32>> {
    let mut g = Graph::new();
    let x = g.parameter("x", shape);
    let mut y = x;
    for (kernel, stride, pad, cout) in layers {
        let cin = g.shape(y).channels();
        let weight = g.parameter("weight", [kernel, kernel, cin, cout]);
        let bias = g.parameter("bias", [cout]);
        let conv = Conv2d { pad: Padding::even(pad), ..Conv2d::new(stride, pad) };
        y = g.add("conv", conv, &[y, weight, bias]).expect("the shapes fit");
    }
    let target = g.input("target", g.shape(y));
    let loss = g.add("loss", Loss::Mse, &[y, target]).expect("the shapes fit");
    let gradients =
        ddpm_engine::passes::autodiff::backward(&mut g, loss).expect("all operations have gradients");
    let parameters = g.parameters().to_vec();
    let options =
        PlanOptions { gradients: Some(gradients), outputs: vec![y, loss], compute, ..PlanOptions::default() };
    let mut exec = CpuExecutor::with_isa(g.clone(), &options, threads, isa).expect("a small plan");
    let mut state = 1u32;
    let mut random_values = |len: usize, scale: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        (0..len).map(|_| next()).collect()
    };
    for (i, &p) in parameters.iter().enumerate() {
        let scale = if i % 2 == 1 { 0.1 } else { 1.0 };
        exec.write_parameter(Region::Weights, i, &random_values(g.shape(p).len(), scale))
            .expect("its length");
    }
    exec.write(target, &random_values(g.shape(target).len(), 1.0)).expect("its length");
    exec.run(RngKey::default()).expect("a run");
    let mut out = vec![vec![0.0; g.shape(y).len()]];
    exec.read(y, &mut out[0]).expect("an output");
    for (i, &p) in parameters.iter().enumerate() {
        let mut gradient = vec![0.0; g.shape(p).len()];
        exec.read_parameter(Region::Gradients, i, &mut gradient).expect("its length");
        out.push(gradient);
    }
    out
}

/// The largest difference of each tensor, relative to its root mean square.
fn differences(a: &[Vec<f32>], b: &[Vec<f32>]) -> Vec<f64> {
    let one = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let rms = (a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
        a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / rms
    };
    a.iter().zip(b).map(one).collect()
}

const PLAIN: ComputeOptions = ComputeOptions { winograd: false, matmul_dtype: MatmulDtype::F32 };
const WINOGRAD: ComputeOptions = ComputeOptions { winograd: true, ..PLAIN };
const BF16: ComputeOptions = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..PLAIN };

/// Convolutions for Winograd, 3x3 and 4x4 with stride 2: one and several blocks of tiles, one and several groups of weights.
const TILED: [([usize; 4], [Layer; 2]); 6] = [
    ([3, 12, 10, 32], [(3, 1, 1, 48), (3, 1, 1, 40)]),
    ([3, 96, 96, 16], [(3, 1, 1, 32), (3, 1, 1, 16)]),
    ([8, 8, 8, 512], [(3, 1, 1, 512), (3, 1, 1, 32)]),
    ([8, 16, 16, 256], [(3, 1, 1, 256), (3, 1, 1, 32)]),
    ([4, 48, 32, 32], [(4, 2, 1, 48), (4, 2, 1, 32)]),
    ([8, 16, 16, 128], [(4, 2, 1, 160), (3, 1, 1, 32)]),
];

/// Other convolutions, some with odd numbers of channels and pixels.
const OTHERS: [([usize; 4], [Layer; 2]); 3] = [
    ([3, 12, 10, 32], [(4, 2, 1, 48), (1, 1, 0, 40)]),
    ([1, 7, 9, 17], [(3, 2, 1, 33), (3, 1, 1, 5)]),
    ([2, 16, 16, 64], [(1, 1, 0, 96), (4, 2, 1, 64)]),
];

#[test]
fn winograd_agrees_with_plain_f32() {
    for isa in Isa::all().into_iter().filter(|isa| isa.name() != "portable") {
        for (shape, layers) in TILED {
            let plain = run(shape, layers, PLAIN, 2, isa);
            let winograd = run(shape, layers, WINOGRAD, 2, isa);
            let worst = differences(&plain, &winograd);
            assert!(worst.iter().all(|d| *d < 4e-5), "{isa}: {shape:?}: {worst:?}");
            // Winograd gradients use rounded operands, the forward pass does not.
            let winograd_bf16 = run(shape, layers, ComputeOptions { winograd: true, ..BF16 }, 2, isa);
            let worst = differences(&plain, &winograd_bf16);
            assert!(worst.iter().all(|d| *d < 0.2), "{isa}: {shape:?}, bf16: {worst:?}");
            assert!(worst[0] < 4e-5 || isa.has_bf16(), "{isa}: {shape:?}, bf16: {worst:?}");
            assert_all_passes_use_winograd(isa, shape, layers[0]);
        }
    }
}

/// Asserts that forward pass, data gradient and weight gradient of a layer use Winograd.
fn assert_all_passes_use_winograd(isa: Isa, [n, h, w, cin]: [usize; 4], (kernel, stride, pad, cout): Layer) {
    let output = (h / stride, w / stride);
    let (kernel, stride, pad) = ((kernel, kernel), (stride, stride), (pad, pad));
    let shape = ConvShape { n, input: (h, w), output, cin, cout, kernel, stride, pad };
    let f32 = MatmulDtype::F32;
    assert!(Winograd::forward(isa, f32, shape).is_some_and(|w| w.is_faster(f32)), "{isa}: {shape:?} forward");
    assert!(Winograd::data_grad(isa, f32, shape).is_some_and(|w| w.is_faster(f32)), "{isa}: {shape:?} data");
    assert!(WinogradGrad::new(isa, f32, shape).is_some_and(|w| w.is_faster(f32)), "{isa}: {shape:?} weights");
}

#[test]
fn bf16_agrees_with_plain_f32_to_its_precision() {
    for isa in Isa::all() {
        for (shape, layers) in OTHERS {
            let (plain, bf16) = (run(shape, layers, PLAIN, 2, isa), run(shape, layers, BF16, 2, isa));
            let worst = differences(&plain, &bf16);
            // The maximum over thousands of elements; two layers of products whose operands have errors up to 2^-9 each.
            assert!(worst.iter().all(|d| *d < 4e-2), "{isa}: {shape:?}: {worst:?}");
            assert!(worst[0] > 1e-4, "{isa}: {shape:?} was not computed in bf16: {worst:?}");
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let winograd = TILED.map(|case| (case, WINOGRAD));
    let bf16 = OTHERS.map(|case| (case, BF16));
    let winograd_bf16 = TILED.map(|case| (case, ComputeOptions { winograd: true, ..BF16 }));
    for ((shape, layers), compute) in winograd.into_iter().chain(bf16).chain(winograd_bf16) {
        let bits = |threads: usize| {
            let all = run(shape, layers, compute, threads, Isa::best()).concat();
            all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let one = bits(1);
        assert!(one == bits(2) && one == bits(3), "{shape:?}, {compute:?}");
    }
}

#[test]
fn cached_weights_are_recomputed_when_weights_change() {
    for (shape, layers) in TILED.into_iter().chain(OTHERS) {
        for compute in [PLAIN, WINOGRAD, BF16] {
            let mut g = Graph::new();
            let x = g.input("x", shape);
            let mut y = x;
            for (kernel, stride, pad, cout) in layers {
                let weight = g.parameter("weight", [kernel, kernel, g.shape(y).channels(), cout]);
                let bias = g.parameter("bias", [cout]);
                y = g.add("conv", Conv2d::new(stride, pad), &[y, weight, bias]).expect("the shapes fit");
            }
            let options = PlanOptions { outputs: vec![y], compute, ..PlanOptions::default() };
            let new = || CpuExecutor::with_isa(g.clone(), &options, 2, Isa::best()).expect("a small plan");
            let ramp = |len: usize, scale: f32| -> Vec<f32> {
                (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * scale).collect()
            };
            let run_once = |exec: &mut CpuExecutor, scale: Option<f32>| {
                exec.write(x, &ramp(g.shape(x).len(), 0.02)).expect("its length");
                for (i, &p) in g.parameters().iter().enumerate() {
                    if let Some(scale) = scale {
                        let data = ramp(g.shape(p).len(), scale);
                        exec.write_parameter(Region::Weights, i, &data).expect("its length");
                    }
                }
                exec.run(RngKey::default()).expect("a run");
                let mut out = vec![0.0; g.shape(y).len()];
                exec.read(y, &mut out).expect("an output");
                out
            };
            let mut exec = new();
            let first = run_once(&mut exec, Some(0.01));
            assert_eq!(run_once(&mut exec, None), first, "a second run differs: {shape:?}, {compute:?}");
            let second = run_once(&mut exec, Some(0.02));
            assert_ne!(second, first);
            assert_eq!(
                second,
                run_once(&mut new(), Some(0.02)),
                "stale weights were used: {shape:?}, {compute:?}"
            );
        }
    }
}

#[test]
fn results_do_not_depend_on_the_batch_size() {
    // The algorithm is chosen for a nominal batch size.
    for compute in [WINOGRAD, ComputeOptions { winograd: true, ..BF16 }] {
        for size in [3, 4, 6, 8, 16] {
            let run_once = |n: usize| {
                let mut g = Graph::new();
                let x = g.input("x", [n, size, size, 64]);
                let (w, b) = (g.parameter("w", [3, 3, 64, 64]), g.parameter("b", [64]));
                let y = g.add("conv", Conv2d::new(1, 1), &[x, w, b]).expect("the shapes fit");
                let options = PlanOptions { outputs: vec![y], compute, ..PlanOptions::default() };
                let mut exec = CpuExecutor::new(g.clone(), &options, 2).expect("a small plan");
                let ramp = |len: usize| -> Vec<f32> {
                    (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect()
                };
                for i in 0..2 {
                    let len = g.shape([w, b][i]).len();
                    exec.write_parameter(Region::Weights, i, &ramp(len)).expect("its length");
                }
                exec.write(x, &ramp(g.shape(x).len())).expect("its length");
                exec.run(RngKey::default()).expect("a run");
                let mut out = vec![0.0; g.shape(y).len()];
                exec.read(y, &mut out).expect("an output");
                out.truncate(size * size * 64);
                out
            };
            assert_eq!(run_once(1), run_once(64), "{size} pixels, {compute:?}");
        }
    }
}
