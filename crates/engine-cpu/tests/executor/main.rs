//! The plan and the CPU executor: same bits for every number of threads and every layout of the arena, in-place and
//! fused operations that preserve results, and errors that name their cause.

mod errors;
#[path = "../f64_eval/mod.rs"]
mod f64_eval;
mod graphs;
mod training;

use ddpm_engine::graph::TensorKind;
use ddpm_engine::ops::*;
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::passes::fuse::fuse;
use ddpm_engine::passes::recompute::recompute;
use ddpm_engine::{
    AdamStep, Executor, Graph, PlanOptions, Region, Result, RngKey, Shape, StepOutcome, Tensor,
};
use ddpm_engine_cpu::{CpuExecutor, Isa};
use ddpm_kernels::reference::{self, Trained};
use ddpm_rng::{Purpose, Stream, below};
use f64_eval::{Values, evaluate};
use std::sync::Arc;

const REGIONS: [Region; 5] =
    [Region::Weights, Region::Gradients, Region::ExpAvg, Region::ExpAvgSq, Region::Ema];

fn normal(seed: u64, index: usize, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Stream::new(seed, Purpose::Test, 0, index as u32).fill_normal(&mut x);
    x
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

fn adam_step(step: u64) -> AdamStep {
    AdamStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        decoupled: true,
        step,
        ema_decay: 0.99,
        grad_scale: 0.5,
    }
}

fn computed(graph: &Graph) -> Vec<Tensor> {
    let all = graph.nodes().iter().flat_map(|n| n.outputs.clone());
    all.filter(|&t| graph.info(t).kind == TensorKind::Computed).collect()
}

/// A training step of a small U-Net, large enough for several tasks of every kernel: more than 32768 elements in a
/// tensor and in the weights, more than 256 pixels of a weight gradient, more than 128 queries of an attention.
struct Network {
    graph: Graph,
    x0: Tensor,
    loss: Tensor,
    gradients: Vec<Tensor>,
    forward: Graph,
}

fn network() -> Result<Network> {
    const N: usize = 5;
    const C: usize = 32;
    let mut g = Graph::new();
    let mut parameters = 0;
    let mut p = |g: &mut Graph, shape: &[usize]| {
        parameters += 1;
        g.parameter(&format!("p{parameters}"), Shape::new(shape))
    };
    let x0 = g.input("x0", [N, 16, 16, 3]);
    let t = g.add("t", RandomTimestep { n: N, steps: 50 }, &[])?;
    let eps = g.add("eps", RandomNormal { shape: g.shape(x0), purpose: Purpose::Noise }, &[])?;
    let table = |f: fn(f32) -> f32| (0..50).map(|t| f(1.0 - t as f32 / 50.0)).collect::<Arc<[f32]>>();
    let q =
        QSample { sqrt_alpha_bar: table(f32::sqrt), sqrt_one_minus_alpha_bar: table(|a| (1.0 - a).sqrt()) };
    let xt = g.add("xt", q, &[x0, eps, t])?;

    let e = g.add("embedding", SinusoidalEmbedding { dim: 16, shift: 0.0, cosines_first: false }, &[t])?;
    let (w, b) = (p(&mut g, &[1, 1, 16, C]), p(&mut g, &[C]));
    let e = g.add("time.0", Conv2d::linear(), &[e, w, b])?;
    let e = g.add("time.1", Activate(Activation::Silu), &[e])?;

    let (w, b) = (p(&mut g, &[3, 3, 3, C]), p(&mut g, &[C]));
    let x = g.add("in", Conv2d::new(1, 1), &[xt, w, b])?;
    let x = g.add("in.time", AddPerChannel, &[x, e])?;
    let (gamma, beta) = (p(&mut g, &[C]), p(&mut g, &[C]));
    let h = g.add("block.norm", GroupNorm { groups: 8, eps: 1e-5, silu: false }, &[x, gamma, beta])?;
    let h = g.add("block.silu", Activate(Activation::Silu), &[h])?;
    let (w, b) = (p(&mut g, &[3, 3, C, C]), p(&mut g, &[C]));
    let h = g.add("block.conv", Conv2d::new(1, 1), &[h, w, b])?;
    let x = g.add("block.add", Add, &[h, x])?;

    let (w, b) = (p(&mut g, &[1, 1, C, 3 * C]), p(&mut g, &[3 * C]));
    let qkv = g.add("attention.qkv", Conv2d::new(1, 0), &[x, w, b])?;
    let o = g.add("attention", Attention { heads: 4, dropout: None }, &[qkv])?;
    let (w, b) = (p(&mut g, &[1, 1, C, C]), p(&mut g, &[C]));
    let o = g.add("attention.out", Conv2d::new(1, 0), &[o, w, b])?;
    let x = g.add("attention.add", Add, &[x, o])?;

    let (w, b) = (p(&mut g, &[3, 3, C, C + 8]), p(&mut g, &[C + 8]));
    let down = g.add("down", Conv2d::new(2, 1), &[x, w, b])?;
    let (w, b) = (p(&mut g, &[4, 4, C, C + 8]), p(&mut g, &[C]));
    let up = Conv2dTranspose {
        stride: (2, 2),
        pad: (1, 1).into(),
        size: (16, 16),
        like: None,
        gradient: false,
        bias: true,
    };
    let up = g.add("up", up, &[down, w, b])?;
    let x = g.add("concat", Concat, &[up, x])?;
    let (gamma, beta) = (p(&mut g, &[2 * C]), p(&mut g, &[2 * C]));
    let x = g.add("out.norm", GroupNorm { groups: 4, eps: 1e-5, silu: false }, &[x, gamma, beta])?;
    let x = g.add("out.silu", Activate(Activation::Silu), &[x])?;
    let (w, b) = (p(&mut g, &[3, 3, 2 * C, 3]), p(&mut g, &[3]));
    let y = g.add("out.conv", Conv2d::new(1, 1), &[x, w, b])?;
    let loss = g.add("loss", Loss::Mse, &[y, eps])?;
    assert!(g.parameter_count() > 32768);
    let forward = g.clone();
    let gradients = backward(&mut g, loss)?;
    Ok(Network { graph: g, x0, loss, gradients, forward })
}

impl Network {
    fn executor(&self, threads: usize, isa: Isa, outputs: Vec<Tensor>) -> Result<CpuExecutor> {
        let options = PlanOptions {
            gradients: Some(self.gradients.clone()),
            ema: true,
            outputs,
            ..PlanOptions::default()
        };
        let mut executor = CpuExecutor::with_isa(self.graph.clone(), &options, threads, isa)?;
        let x0 = normal(1, 999, self.graph.shape(self.x0).len());
        executor.write(self.x0, &x0)?;
        for (i, weights) in self.weights().iter().enumerate() {
            executor.write_parameter(Region::Weights, i, weights)?;
            executor.write_parameter(Region::Ema, i, weights)?;
        }
        Ok(executor)
    }

    /// Weights that preserve the scale of activations.
    fn weights(&self) -> Vec<Vec<f32>> {
        let sizes = self.graph.parameters().iter().map(|&p| self.graph.shape(p));
        let scaled = sizes.enumerate().map(|(i, shape)| {
            let fan_in: usize = shape.dims().iter().rev().skip(1).product();
            normal(2, i, shape.len()).iter().map(|v| v / (fan_in as f32).sqrt()).collect()
        });
        scaled.collect()
    }

    /// Loss and all regions after each of `steps` training steps, as bits.
    fn train(&self, executor: &mut CpuExecutor, steps: u32) -> Result<Vec<Vec<u32>>> {
        let mut seen = Vec::new();
        for step in 1..=steps {
            executor.run(RngKey { seed: 7, step, first_index: 10 })?;
            executor.update(&adam_step(u64::from(step)))?;
            let mut loss = [f32::NAN];
            executor.read(self.loss, &mut loss)?;
            assert!(loss[0].is_finite());
            seen.push(bits(&loss));
            for region in REGIONS {
                for (i, &p) in self.graph.parameters().iter().enumerate() {
                    let mut values = vec![f32::NAN; self.graph.shape(p).len()];
                    executor.read_parameter(region, i, &mut values)?;
                    assert!(values.iter().all(|v| v.is_finite()), "{region:?} of parameter {i}");
                    seen.push(bits(&values));
                }
            }
        }
        Ok(seen)
    }
}

/// A small random graph of in-place and other operations on tensors of one shape.
fn random_graph(seed: u32) -> Result<(Graph, Tensor)> {
    let mut words = Stream::new(5, Purpose::Test, 1, seed).words();
    let mut draw = |n: usize| below(words.next().expect("endless"), n as u32) as usize;
    let shape = [2, 2, 1, 3];
    let mut g = Graph::new();
    let mut tensors = vec![g.input("x", shape), g.parameter("p", shape), g.parameter("q", shape)];
    let rows = [g.input("r", [2, 3]), g.parameter("s", [2, 3])];
    let w = g.parameter("w", [1, 1, 3, 3]);
    let (gamma, beta) = (g.parameter("gamma", [3]), g.parameter("beta", [3]));
    for i in 0..4 + draw(10) {
        // Biased to recent tensors, for chains of in-place operations.
        let recent = |draw: &mut dyn FnMut(usize) -> usize| {
            let back = draw(3.min(tensors.len())).min(draw(tensors.len()));
            tensors[tensors.len() - 1 - back]
        };
        let (a, b) = (recent(&mut draw), recent(&mut draw));
        let name = format!("node{i}");
        let conv = Conv2d { bias: false, ..Conv2d::linear() };
        let t = match draw(6) {
            0 | 1 => g.add(&name, Add, &[a, b])?,
            2 => g.add(&name, AddPerChannel, &[a, rows[draw(2)]])?,
            3 => g.add(&name, Activate(Activation::Silu), &[a])?,
            4 => g.add(&name, GroupNorm { groups: 1, eps: 1e-2, silu: false }, &[a, gamma, beta])?,
            _ => g.add(&name, conv, &[a, w])?,
        };
        tensors.push(t);
    }
    let last = *tensors.last().expect("not empty");
    let loss = g.add("loss", Loss::Mse, &[last, tensors[0]])?;
    Ok((g, loss))
}

/// Runs a graph and returns the values of `read`, then all gradients, if there are any.
fn run(
    graph: &Graph,
    gradients: Option<&[Tensor]>,
    outputs: &[Tensor],
    read: &[Tensor],
) -> Result<Vec<Vec<f32>>> {
    let options = PlanOptions {
        gradients: gradients.map(<[_]>::to_vec),
        outputs: outputs.to_vec(),
        ..PlanOptions::default()
    };
    let mut executor = CpuExecutor::with_isa(graph.clone(), &options, 1, Isa::best())?;
    let poison = |t: Tensor| vec![f32::NAN; graph.shape(t).len()];
    for t in computed(graph) {
        executor.write(t, &poison(t))?;
    }
    for (t, x) in given(graph) {
        executor.write(t, &x)?;
    }
    executor.run(RngKey::default())?;
    let mut all = Vec::new();
    for &t in read {
        all.push(poison(t));
        executor.read(t, all.last_mut().expect("just pushed"))?;
    }
    for (i, &p) in graph.parameters().iter().enumerate().filter(|_| gradients.is_some()) {
        all.push(poison(p));
        executor.read_parameter(Region::Gradients, i, all.last_mut().expect("just pushed"))?;
    }
    // No kernel may write to an input or a weight.
    for (t, x) in given(graph) {
        let mut after = poison(t);
        executor.read(t, &mut after)?;
        assert_eq!(after, x, "{} was overwritten", graph.info(t).name);
    }
    Ok(all)
}

/// Random inputs and parameters.
fn given(graph: &Graph) -> Vec<(Tensor, Vec<f32>)> {
    let computed = computed(graph);
    let all = graph.nodes().iter().flat_map(|n| n.inputs.clone()).chain(graph.parameters().iter().copied());
    let mut given: Vec<Tensor> = all.filter(|t| !computed.contains(t)).collect();
    given.sort();
    given.dedup();
    given.into_iter().enumerate().map(|(i, t)| (t, normal(3, i, graph.shape(t).len()))).collect()
}

fn in_f64(graph: &Graph) -> Values {
    let mut values: Values =
        given(graph).into_iter().map(|(t, x)| (t, x.into_iter().map(f64::from).collect())).collect();
    evaluate(graph, &mut values);
    values
}

fn assert_close(got: &[f32], want: &[f64], what: &str) {
    let scale = want.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((f64::from(*got) - want).abs() <= 1e-4 * scale, "{what}: {got}, not {want}");
    }
}
