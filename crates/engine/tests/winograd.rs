//! Convolutions through Winograd's tiles, as the executor runs them: against the plain way, and whatever the threads.
#![allow(missing_docs, reason = "nothing here is for others")]

use ddpm_engine::ops::{Conv2d, Padding};
use ddpm_engine::{Arithmetic, CpuExecutor, Draws, Executor, Graph, Isa, PlanOptions, Region};

/// Outputs, and gradients of weights, bias and input, of `y = conv(conv(x)) + residual` under an MSE loss.
fn run(shape: [usize; 4], channels: [usize; 2], winograd: bool, threads: usize, isa: Isa) -> Vec<Vec<f32>> {
    let [n, h, w, c] = shape;
    let mut g = Graph::new();
    let x = g.parameter("x", shape);
    let mut y = x;
    let mut cin = c;
    for (i, cout) in channels.into_iter().enumerate() {
        let weight = g.parameter(&format!("w{i}"), [3, 3, cin, cout]);
        let bias = g.parameter(&format!("b{i}"), [cout]);
        let conv = Conv2d { pad: Padding::even(1), ..Conv2d::new(1, 1) };
        y = g.add("conv", conv, &[y, weight, bias]).expect("the shapes fit");
        cin = cout;
    }
    let target = g.input("target", [n, h, w, cin]);
    let loss = g.add("loss", ddpm_engine::ops::Loss::Mse, &[y, target]).expect("the shapes fit");
    let gradients = ddpm_engine::autodiff::backward(&mut g, loss).expect("all have gradients");
    let parameters = g.parameters().to_vec();
    let keep = vec![y, loss];
    let arithmetic = Arithmetic { winograd };
    let options = PlanOptions { gradients: Some(gradients), keep, arithmetic, ..PlanOptions::default() };
    let mut exec = CpuExecutor::with_isa(g.clone(), &options, threads, isa).expect("a small plan");
    let mut state = 1u32;
    let mut numbers = |len: usize| -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    };
    for (i, &p) in parameters.iter().enumerate() {
        let scale = if g.shape(p).len() > 2000 && i > 0 { 0.1 } else { 1.0 };
        let data: Vec<f32> = numbers(g.shape(p).len()).iter().map(|v| v * scale).collect();
        exec.write_parameter(Region::Weights, i, &data).expect("of the right length");
    }
    exec.write(target, &numbers(g.shape(target).len())).expect("of the right length");
    exec.run(Draws::default()).expect("a run");
    let mut out = vec![vec![0.0; g.shape(y).len()]];
    exec.read(y, &mut out[0]).expect("kept");
    for (i, &p) in parameters.iter().enumerate() {
        let mut gradient = vec![0.0; g.shape(p).len()];
        exec.read_parameter(Region::Gradients, i, &mut gradient).expect("of the right length");
        out.push(gradient);
    }
    out
}

/// Shapes with one block and with several, and weights in one group and in several.
const CASES: [([usize; 4], [usize; 2]); 3] =
    [([3, 12, 10, 32], [48, 40]), ([2, 96, 96, 16], [32, 16]), ([8, 8, 8, 512], [512, 32])];

#[test]
fn winograd_agrees_with_the_plain_way() {
    for isa in Isa::all().into_iter().take(2) {
        for (shape, channels) in CASES {
            let plain = run(shape, channels, false, 2, isa);
            let winograd = run(shape, channels, true, 2, isa);
            assert_ne!(plain, winograd, "{isa}: {shape:?} did not go through Winograd's tiles");
            for (i, (a, b)) in plain.iter().zip(&winograd).enumerate() {
                let typical = (a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
                let worst = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
                assert!(worst < 4e-5 * typical, "{isa}: {shape:?}, tensor {i}: {worst:e} of {typical:e}");
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for (shape, channels) in CASES {
        let one = run(shape, channels, true, 1, Isa::best());
        for threads in [2, 3] {
            let bits = |x: &[Vec<f32>]| x.concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&one), bits(&run(shape, channels, true, threads, Isa::best())), "{shape:?}");
        }
    }
}
