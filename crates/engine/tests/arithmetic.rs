//! The ways to compute a convolution (`ComputeOptions`), as the executor runs them: against the plain way, and whatever the
//! threads.
#![allow(missing_docs, reason = "nothing here is for others")]

use ddpm_engine::ops::{Conv2d, Loss, Padding};
use ddpm_engine::{
    ComputeOptions, CpuExecutor, Draws, Executor, Graph, Isa, MatmulDtype, PlanOptions, Region,
};
use ddpm_kernels::conv::ConvShape;
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};

/// Kernel, stride, padding, output channels.
type Layer = (usize, usize, usize, usize);

/// The output of two convolutions in a row, and the gradients of input, weights and biases under a squared error.
fn run(
    shape: [usize; 4],
    layers: [Layer; 2],
    arithmetic: ComputeOptions,
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
    let gradients = ddpm_engine::autodiff::backward(&mut g, loss).expect("all have gradients");
    let parameters = g.parameters().to_vec();
    let options =
        PlanOptions { gradients: Some(gradients), keep: vec![y, loss], arithmetic, ..PlanOptions::default() };
    let mut exec = CpuExecutor::with_isa(g.clone(), &options, threads, isa).expect("a small plan");
    let mut state = 1u32;
    let mut numbers = |len: usize, scale: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        (0..len).map(|_| next()).collect()
    };
    for (i, &p) in parameters.iter().enumerate() {
        let scale = if i % 2 == 1 { 0.1 } else { 1.0 };
        exec.write_parameter(Region::Weights, i, &numbers(g.shape(p).len(), scale)).expect("its length");
    }
    exec.write(target, &numbers(g.shape(target).len(), 1.0)).expect("its length");
    exec.run(Draws::default()).expect("a run");
    let mut out = vec![vec![0.0; g.shape(y).len()]];
    exec.read(y, &mut out[0]).expect("kept");
    for (i, &p) in parameters.iter().enumerate() {
        let mut gradient = vec![0.0; g.shape(p).len()];
        exec.read_parameter(Region::Gradients, i, &mut gradient).expect("its length");
        out.push(gradient);
    }
    out
}

/// The largest difference of each tensor, in units of its root mean square.
fn differences(a: &[Vec<f32>], b: &[Vec<f32>]) -> Vec<f64> {
    let one = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let typical = (a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
        a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / typical
    };
    a.iter().zip(b).map(one).collect()
}

const PLAIN: ComputeOptions = ComputeOptions { winograd: false, factors: MatmulDtype::F32 };
const WINOGRAD: ComputeOptions = ComputeOptions { winograd: true, ..PLAIN };
const BF16: ComputeOptions = ComputeOptions { factors: MatmulDtype::Bf16, ..PLAIN };

/// 3x3 convolutions, and 4x4 ones of stride 2: with one block of tiles and with several, with weights in one group and in
/// several.
const TILED: [([usize; 4], [Layer; 2]); 6] = [
    ([3, 12, 10, 32], [(3, 1, 1, 48), (3, 1, 1, 40)]),
    ([3, 96, 96, 16], [(3, 1, 1, 32), (3, 1, 1, 16)]),
    ([8, 8, 8, 512], [(3, 1, 1, 512), (3, 1, 1, 32)]),
    ([8, 16, 16, 256], [(3, 1, 1, 256), (3, 1, 1, 32)]),
    ([4, 48, 32, 32], [(4, 2, 1, 48), (4, 2, 1, 32)]),
    ([8, 16, 16, 128], [(4, 2, 1, 160), (3, 1, 1, 32)]),
];

/// Other convolutions, with odd numbers of channels and pixels.
const OTHERS: [([usize; 4], [Layer; 2]); 3] = [
    ([3, 12, 10, 32], [(4, 2, 1, 48), (1, 1, 0, 40)]),
    ([1, 7, 9, 17], [(3, 2, 1, 33), (3, 1, 1, 5)]),
    ([2, 16, 16, 64], [(1, 1, 0, 96), (4, 2, 1, 64)]),
];

#[test]
fn winograd_agrees_with_the_plain_way() {
    for isa in Isa::all().into_iter().filter(|isa| isa.name() != "portable") {
        for (shape, layers) in TILED {
            let plain = run(shape, layers, PLAIN, 2, isa);
            let winograd = run(shape, layers, WINOGRAD, 2, isa);
            let worst = differences(&plain, &winograd);
            assert!(worst.iter().all(|d| *d < 4e-5), "{isa}: {shape:?}: {worst:?}");
            // Gradients go through the tiles with rounded factors, the forward pass does not.
            let both = run(shape, layers, ComputeOptions { winograd: true, ..BF16 }, 2, isa);
            let worst = differences(&plain, &both);
            assert!(worst.iter().all(|d| *d < 0.2), "{isa}: {shape:?}, bf16: {worst:?}");
            assert!(worst[0] < 4e-5 || isa.has_bf16(), "{isa}: {shape:?}, bf16: {worst:?}");
            all_passes_take_this_way(isa, shape, layers[0]);
        }
    }
}

/// That forward pass, data gradient and weight gradient of a layer go through Winograd's tiles.
fn all_passes_take_this_way(isa: Isa, [n, h, w, cin]: [usize; 4], (kernel, stride, pad, cout): Layer) {
    let output = (h / stride, w / stride);
    let (kernel, stride, pad) = ((kernel, kernel), (stride, stride), (pad, pad));
    let shape = ConvShape { n, input: (h, w), output, cin, cout, kernel, stride, pad };
    let f32 = MatmulDtype::F32;
    assert!(Winograd::forward(isa, f32, shape).is_some_and(|w| w.is_faster(f32)), "{isa}: {shape:?} forward");
    assert!(Winograd::data_grad(isa, f32, shape).is_some_and(|w| w.is_faster(f32)), "{isa}: {shape:?} data");
    assert!(WinogradGrad::new(isa, f32, shape).is_some_and(|w| w.is_faster(f32)), "{isa}: {shape:?} weights");
}

#[test]
fn bf16_agrees_with_the_plain_way_to_its_precision() {
    for isa in Isa::all() {
        for (shape, layers) in OTHERS {
            let (plain, bf16) = (run(shape, layers, PLAIN, 2, isa), run(shape, layers, BF16, 2, isa));
            let worst = differences(&plain, &bf16);
            // Two factors with errors of up to 2^-9 each, twice in a row; the largest of some thousands.
            assert!(worst.iter().all(|d| *d < 4e-2), "{isa}: {shape:?}: {worst:?}");
            assert!(worst[0] > 1e-4, "{isa}: {shape:?} was not computed in bf16: {worst:?}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let winograd = TILED.map(|case| (case, WINOGRAD));
    let bf16 = OTHERS.map(|case| (case, BF16));
    let both = TILED.map(|case| (case, ComputeOptions { winograd: true, ..BF16 }));
    for ((shape, layers), arithmetic) in winograd.into_iter().chain(bf16).chain(both) {
        let bits = |threads: usize| {
            let all = run(shape, layers, arithmetic, threads, Isa::best()).concat();
            all.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let one = bits(1);
        assert!(one == bits(2) && one == bits(3), "{shape:?}, {arithmetic:?}");
    }
}

#[test]
fn kept_weights_are_made_anew_when_they_change() {
    for (shape, layers) in TILED.into_iter().chain(OTHERS) {
        for arithmetic in [PLAIN, WINOGRAD, BF16] {
            let mut g = Graph::new();
            let x = g.input("x", shape);
            let mut y = x;
            for (kernel, stride, pad, cout) in layers {
                let weight = g.parameter("weight", [kernel, kernel, g.shape(y).channels(), cout]);
                let bias = g.parameter("bias", [cout]);
                y = g.add("conv", Conv2d::new(stride, pad), &[y, weight, bias]).expect("the shapes fit");
            }
            let options = PlanOptions { keep: vec![y], arithmetic, ..PlanOptions::default() };
            let new = || CpuExecutor::with_isa(g.clone(), &options, 2, Isa::best()).expect("a small plan");
            let ramp = |len: usize, scale: f32| -> Vec<f32> {
                (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * scale).collect()
            };
            let draw = |exec: &mut CpuExecutor, scale: Option<f32>| {
                exec.write(x, &ramp(g.shape(x).len(), 0.02)).expect("its length");
                for (i, &p) in g.parameters().iter().enumerate() {
                    if let Some(scale) = scale {
                        let data = ramp(g.shape(p).len(), scale);
                        exec.write_parameter(Region::Weights, i, &data).expect("its length");
                    }
                }
                exec.run(Draws::default()).expect("a run");
                let mut out = vec![0.0; g.shape(y).len()];
                exec.read(y, &mut out).expect("kept");
                out
            };
            let mut exec = new();
            let first = draw(&mut exec, Some(0.01));
            assert_eq!(draw(&mut exec, None), first, "a second run differs: {shape:?}, {arithmetic:?}");
            let second = draw(&mut exec, Some(0.02));
            assert_ne!(second, first);
            assert_eq!(
                second,
                draw(&mut new(), Some(0.02)),
                "old weights are left: {shape:?}, {arithmetic:?}"
            );
        }
    }
}

#[test]
fn an_image_does_not_depend_on_the_size_of_its_batch() {
    // The way to compute is chosen for a batch of some size, whatever its size.
    for arithmetic in [WINOGRAD, ComputeOptions { winograd: true, ..BF16 }] {
        for size in [3, 4, 6, 8, 16] {
            let draw = |n: usize| {
                let mut g = Graph::new();
                let x = g.input("x", [n, size, size, 64]);
                let (w, b) = (g.parameter("w", [3, 3, 64, 64]), g.parameter("b", [64]));
                let y = g.add("conv", Conv2d::new(1, 1), &[x, w, b]).expect("the shapes fit");
                let options = PlanOptions { keep: vec![y], arithmetic, ..PlanOptions::default() };
                let mut exec = CpuExecutor::new(g.clone(), &options, 2).expect("a small plan");
                let ramp = |len: usize| -> Vec<f32> {
                    (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect()
                };
                for i in 0..2 {
                    let len = g.shape([w, b][i]).len();
                    exec.write_parameter(Region::Weights, i, &ramp(len)).expect("its length");
                }
                exec.write(x, &ramp(g.shape(x).len())).expect("its length");
                exec.run(Draws::default()).expect("a run");
                let mut out = vec![0.0; g.shape(y).len()];
                exec.read(y, &mut out).expect("kept");
                out.truncate(size * size * 64);
                out
            };
            assert_eq!(draw(1), draw(64), "{size} pixels, {arithmetic:?}");
        }
    }
}
