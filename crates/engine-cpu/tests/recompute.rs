//! Recomputation for the backward pass: the same bits in less memory.
#![allow(missing_docs, reason = "tests")]

use ddpm_engine::ops::{
    Activate, Activation, Add, AddPerChannel, Affine, BatchNorm, Concat, Conv2d, Dropout, GroupNorm, Loss,
};
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::passes::recompute::recompute;
use ddpm_engine::{Executor, Graph, PlanOptions, Region, RngKey, Tensor};
use ddpm_engine_cpu::CpuExecutor;

const N: usize = 2;
const C: usize = 16;
/// Large enough that activations dominate gradients and scratch memory.
const SIDE: usize = 32;

/// Convolutions with all recomputable operations between them, a skip connection and a per-channel addition; with `join`, also a
/// concatenation with a tensor that is kept anyway.
fn network(g: &mut Graph, join: bool) -> Tensor {
    let conv = |g: &mut Graph, x: Tensor| {
        let cin = g.shape(x).channels();
        let (w, b) = (g.parameter("w", [3, 3, cin, C]), g.parameter("b", [C]));
        g.add("conv", Conv2d::new(1, 1), &[x, w, b]).expect("the shapes fit")
    };
    let scale = |g: &mut Graph| [g.parameter("gamma", [C]), g.parameter("beta", [C])];
    let x = g.input("x", [N, SIDE, SIDE, C]);
    let first = conv(g, x);
    let [gamma, beta] = scale(g);
    let norm = GroupNorm { groups: 4, eps: 1e-5, silu: true };
    let y = g.add("norm", norm, &[first, gamma, beta]).expect("the shapes fit");
    let y = conv(g, y);
    let y = g.add("relu", Activate(Activation::Relu), &[y]).expect("the shapes fit");
    let [gamma, beta] = scale(g);
    let y = g.add("batch_norm", BatchNorm { eps: 1e-5 }, &[y, gamma, beta]).expect("the shapes fit");
    let embedding = g.parameter("embedding", [N, C]);
    let y = g.add("add_per_channel", AddPerChannel, &[y, embedding]).expect("the shapes fit");
    let y = conv(g, y);
    let y = if join {
        let y = g.add("join", Concat, &[y, first]).expect("the shapes fit");
        conv(g, y)
    } else {
        y
    };
    let y = g.add("gelu", Activate(Activation::Gelu), &[y]).expect("the shapes fit");
    let y = g.add("dropout", Dropout { p: 0.25, site: 3 }, &[y]).expect("the shapes fit");
    let y = conv(g, y);
    let y = g.add("skip", Add, &[y, first]).expect("the shapes fit");
    let target = g.input("target", [N, SIDE, SIDE, C]);
    g.add("loss", Loss::Mse, &[y, target]).expect("the shapes fit")
}

/// The bits of all gradients, and the length of the arena.
fn run(join: bool, recomputed: bool) -> (Vec<u32>, usize) {
    let mut g = Graph::new();
    let loss = network(&mut g, join);
    let gradients = backward(&mut g, loss).expect("all operations have gradients");
    if recomputed {
        recompute(&mut g);
    }
    let options = PlanOptions { gradients: Some(gradients), outputs: vec![loss], ..PlanOptions::default() };
    let mut exec = CpuExecutor::new(g.clone(), &options, 2).expect("a small plan");
    let ramp = |i: usize, len: usize| -> Vec<f32> {
        (0..len).map(|j| ((j * 31 + i * 17) % 97) as f32 / 97.0 - 0.5).collect()
    };
    for (i, &p) in g.parameters().iter().enumerate() {
        exec.write_parameter(Region::Weights, i, &ramp(i, g.shape(p).len())).expect("its length");
    }
    let rng = RngKey { seed: 1, step: 2, first_index: 0 };
    let inputs: Vec<Tensor> = g.nodes().iter().flat_map(|n| n.inputs.clone()).collect();
    for &t in inputs.iter().filter(|&&t| g.info(t).kind == ddpm_engine::graph::TensorKind::Input) {
        exec.write(t, &ramp(7, g.shape(t).len())).expect("its length");
    }
    exec.run(rng).expect("a run");
    let mut bits = Vec::new();
    for (i, &p) in g.parameters().iter().enumerate() {
        let mut gradient = vec![0.0; g.shape(p).len()];
        exec.read_parameter(Region::Gradients, i, &mut gradient).expect("its length");
        assert!(gradient.iter().any(|&v| v != 0.0), "a zero gradient would hide differences");
        bits.extend(gradient.iter().map(|v| v.to_bits()));
    }
    (bits, exec.plan().arena_len())
}

#[test]
fn gradients_have_the_same_bits_and_the_arena_is_smaller() {
    let image = N * SIDE * SIDE * C;
    for join in [false, true] {
        let ((kept, kept_len), (recomputed, recomputed_len)) = (run(join, false), run(join, true));
        assert_eq!(kept, recomputed);
        // Of nine large tensors between the convolutions, five need not be kept. The concatenation is twice as large, which
        // fragments the arena.
        let saved = if join { 2 * image } else { 3 * image };
        assert!(
            recomputed_len + saved <= kept_len,
            "{recomputed_len} elements, {kept_len} without recomputation"
        );
    }
}

#[test]
fn a_concat_is_recomputed_if_one_operand_is_kept_anyway() {
    for kept in [false, true] {
        let mut g = Graph::new();
        let shape = [N, SIDE, SIDE, C];
        let halves = ["a", "b"].map(|name| {
            let p = g.parameter(name, shape);
            let double = Affine { scale: 2.0, shift: 0.0 };
            g.add("half", double, &[p]).expect("the shapes fit")
        });
        let mut y = g.add("join", Concat, &halves).expect("the shapes fit");
        let w = g.parameter("w", [1, 1, 2 * C, C]);
        y = g.add("conv", Conv2d { stride: (1, 1), ..Conv2d::default() }, &[y, w]).expect("the shapes fit");
        if kept {
            let other = g.add("gelu", Activate(Activation::Gelu), &[halves[1]]).expect("the shapes fit");
            y = g.add("sum", Add, &[y, other]).expect("the shapes fit");
        }
        let target = g.input("target", shape);
        let loss = g.add("loss", Loss::Mse, &[y, target]).expect("the shapes fit");
        backward(&mut g, loss).expect("all operations have gradients");
        recompute(&mut g);
        assert_eq!(g.nodes().iter().any(|n| n.name == "join.again"), kept);
    }
}
