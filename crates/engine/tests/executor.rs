//! The plan and the CPU executor: same bits for every number of threads and every layout of the arena, in-place
//! operations and joined operations that change nothing, errors that name what is wrong.

mod f64_eval;

use ddpm_engine::autodiff::backward;
use ddpm_engine::fuse::fuse;
use ddpm_engine::graph::Kind;
use ddpm_engine::ops::*;
use ddpm_engine::recompute::recompute;
use ddpm_engine::rng::{Purpose, Stream, below};
use ddpm_engine::{
    AdamStep, CpuExecutor, Draws, Error, Executor, Graph, Isa, PlanOptions, Region, Result, Shape,
    StepOutcome, Tensor,
};
use ddpm_kernels::reference::{self, Trained};
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
    all.filter(|&t| graph.info(t).kind == Kind::Computed).collect()
}

/// A training step of a small U-Net, large enough for several tasks of every kernel: more than 32768 numbers in a
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
    let t = g.add("t", DrawTimestep { n: N, steps: 50 }, &[])?;
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
    fn executor(&self, threads: usize, isa: Isa, keep: Vec<Tensor>) -> Result<CpuExecutor> {
        let options = PlanOptions {
            gradients: Some(self.gradients.clone()),
            ema: true,
            keep,
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

    /// Weights that keep the size of what goes through them.
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
            executor.run(Draws { seed: 7, step, first_index: 10 })?;
            executor.update(&adam_step(u64::from(step)))?;
            let mut loss = [f32::NAN];
            executor.read(self.loss, &mut loss)?;
            assert!(loss[0].is_finite());
            seen.push(bits(&loss));
            for region in REGIONS {
                for (i, &p) in self.graph.parameters().iter().enumerate() {
                    let mut numbers = vec![f32::NAN; self.graph.shape(p).len()];
                    executor.read_parameter(region, i, &mut numbers)?;
                    assert!(numbers.iter().all(|v| v.is_finite()), "{region:?} of parameter {i}");
                    seen.push(bits(&numbers));
                }
            }
        }
        Ok(seen)
    }
}

#[test]
fn training_gives_the_same_bits_on_any_number_of_threads() -> Result<()> {
    let network = network()?;
    for isa in Isa::all() {
        let run = |threads| network.train(&mut network.executor(threads, isa, vec![network.loss])?, 2);
        let one = run(1)?;
        assert_ne!(one[0], one[one.len() / 2], "{isa}: training changes nothing");
        for threads in [2, 3] {
            assert!(run(threads)? == one, "{isa}: {threads} threads differ from 1");
        }
    }
    Ok(())
}

#[test]
fn the_arena_can_be_reused_and_stale_numbers_in_it_change_nothing() -> Result<()> {
    let network = network()?;
    let isa = Isa::best();
    let mut tight = network.executor(2, isa, vec![network.loss])?;
    let mut loose = network.executor(2, isa, computed(&network.graph))?;
    let (small, large) = (tight.footprint().arena_bytes, loose.footprint().arena_bytes);
    // Scratch memory is in both.
    let all: usize = computed(&network.graph).iter().map(|&t| 4 * network.graph.shape(t).len()).sum();
    assert!(2 * (large - small) > all, "{small} bytes of {large}, {all} of tensors: nothing is reused");
    let expected = network.train(&mut loose, 2)?;
    assert!(network.train(&mut tight, 2)? == expected, "reuse changes results");

    let mut poisoned = network.executor(2, isa, vec![network.loss])?;
    for t in computed(&network.graph) {
        poisoned.write(t, &vec![f32::NAN; network.graph.shape(t).len()])?;
    }
    assert!(network.train(&mut poisoned, 2)? == expected, "a step reads what no step has written");
    Ok(())
}

#[test]
fn running_twice_gives_the_same_bits_and_draws_matter() -> Result<()> {
    let network = network()?;
    for isa in Isa::all() {
        let mut executor = network.executor(2, isa, vec![network.loss])?;
        let mut run = |step| -> Result<Vec<u32>> {
            executor.run(Draws { seed: 7, step, first_index: 0 })?;
            let mut seen = vec![f32::NAN];
            executor.read(network.loss, &mut seen)?;
            for (i, &p) in network.graph.parameters().iter().enumerate() {
                let mut gradient = vec![f32::NAN; network.graph.shape(p).len()];
                executor.read_parameter(Region::Gradients, i, &mut gradient)?;
                seen.extend(gradient);
            }
            Ok(bits(&seen))
        };
        let (first, other, again) = (run(1)?, run(2)?, run(1)?);
        assert!(first == again, "{isa}: two runs differ");
        assert!(first != other, "{isa}: the draws of a step are those of another");
    }
    Ok(())
}

#[test]
fn every_tensor_of_the_network_agrees_with_f64() -> Result<()> {
    let network = network()?;
    let kept = computed(&network.forward);
    for isa in Isa::all() {
        let mut executor = network.executor(2, isa, kept.clone())?;
        executor.run(Draws { seed: 7, step: 3, first_index: 0 })?;
        let read = |t: Tensor| -> Result<Vec<f64>> {
            let mut x = vec![f32::NAN; network.graph.shape(t).len()];
            executor.read(t, &mut x)?;
            Ok(x.into_iter().map(f64::from).collect())
        };
        let mut values = Values::new();
        let drawn = network
            .forward
            .nodes()
            .iter()
            .filter(|n| matches!(n.op, Op::RandomNormal(_) | Op::DrawTimestep(_)));
        let drawn = drawn.map(|n| n.outputs[0]);
        for t in drawn.chain([network.x0]).chain(network.forward.parameters().iter().copied()) {
            values.insert(t, read(t)?);
        }
        evaluate(&network.forward, &mut values);
        for node in network.forward.nodes() {
            for &t in &node.outputs {
                let (got, want) = (read(t)?, &values[&t]);
                let scale = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                let error = got.iter().zip(want).fold(0.0f64, |m, (g, w)| m.max((g - w).abs()));
                assert!(error <= 1e-5 * scale, "{} on {isa}: {error:.1e} of {scale}", node.name);
            }
        }
    }
    Ok(())
}

#[test]
fn an_update_moves_every_region_as_the_optimizer_says() -> Result<()> {
    let mut g = Graph::new();
    // Not a multiple of a cache line: there are gaps between the parameters.
    let (x, p, q) = (g.input("x", [3, 5]), g.parameter("p", [3, 5]), g.parameter("q", [3, 5]));
    let y = g.add("y", Add, &[p, x])?;
    let y = g.add("z", Add, &[y, q])?;
    let loss = g.add("loss", Loss::Mse, &[y, x])?;
    let gradients = backward(&mut g, loss)?;
    for ema in [true, false] {
        let options = PlanOptions { gradients: Some(gradients.clone()), ema, ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(g.clone(), &options, 2, Isa::best())?;
        executor.write(x, &normal(4, 0, 15))?;
        let regions = if ema { &REGIONS[..] } else { &REGIONS[..4] };
        for (r, &region) in regions.iter().enumerate() {
            for i in 0..2 {
                let start: Vec<f32> = normal(4, 1 + 2 * r + i, 15).iter().map(|v| v.abs()).collect();
                executor.write_parameter(region, i, &start)?;
            }
        }
        executor.run(Draws::default())?;
        let read = |executor: &CpuExecutor, region, i| -> Result<Vec<f32>> {
            let mut numbers = vec![f32::NAN; 15];
            executor.read_parameter(region, i, &mut numbers)?;
            Ok(numbers)
        };
        let all = |executor: &CpuExecutor| -> Result<Vec<Vec<Vec<f32>>>> {
            let of = |&region| (0..2).map(|i| read(executor, region, i)).collect::<Result<Vec<_>>>();
            regions.iter().map(of).collect()
        };
        let before = all(&executor)?;
        executor.update(&adam_step(3))?;
        let after = all(&executor)?;
        for (i, at) in (0..2).flat_map(|i| (0..15).map(move |at| (i, at))) {
            let old = |r: usize| before.get(r).map_or(0.0, |region| f64::from(region[i][at]));
            let state = Trained { weight: old(0), exp_avg: old(2), exp_avg_sq: old(3), ema: old(4) };
            let new = reference::adam(&adam_step(3), old(1), state);
            let want = [new.weight, old(1), new.exp_avg, new.exp_avg_sq, new.ema];
            for (r, region) in regions.iter().enumerate() {
                let got = f64::from(after[r][i][at]);
                let error = (got - want[r]).abs();
                assert!(error <= 1e-6 * want[r].abs(), "{region:?} of {i}[{at}]: {got}, not {}", want[r]);
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_several_runs_are_added_up_measured_and_followed() -> Result<()> {
    let network = network()?;
    let parameters = network.graph.parameters();
    let mut norms = Vec::new();
    for threads in [1, 2, 5] {
        let gradients = Some(network.gradients.clone());
        let options = PlanOptions { gradients, accumulate: true, ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(network.graph.clone(), &options, threads, Isa::best())?;
        executor.write(network.x0, &normal(1, 999, network.graph.shape(network.x0).len()))?;
        for (i, weights) in network.weights().iter().enumerate() {
            executor.write_parameter(Region::Weights, i, weights)?;
        }
        let read = |executor: &CpuExecutor, region| -> Result<Vec<Vec<f32>>> {
            let one = |(i, &p): (usize, &Tensor)| {
                let mut numbers = vec![f32::NAN; network.graph.shape(p).len()];
                executor.read_parameter(region, i, &mut numbers).map(|()| numbers)
            };
            parameters.iter().enumerate().map(one).collect()
        };
        let mut want: Vec<Vec<f32>> = parameters.iter().map(|_| Vec::new()).collect();
        // The first run is forgotten: the second starts a new sum.
        for step in 0..4 {
            executor.run(Draws { seed: 7, step, first_index: 0 })?;
            executor.accumulate(step <= 1)?;
            let last = read(&executor, Region::Gradients)?;
            for (sum, last) in want.iter_mut().zip(last) {
                match step {
                    0 | 1 => *sum = last,
                    _ => sum.iter_mut().zip(last).for_each(|(sum, g)| *sum += g),
                }
            }
        }
        assert_eq!(read(&executor, Region::GradientSum)?, want, "{threads} threads");
        let norm = executor.gradient_norm()?;
        let exact = want.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!((norm / exact - 1.0).abs() <= 1e-6, "{norm}, not {exact}");
        norms.push(norm.to_bits());

        executor.update(&AdamStep { grad_scale: 0.25, ..adam_step(1) })?;
        for (sum, exp_avg) in want.iter().zip(read(&executor, Region::ExpAvg)?) {
            for (sum, got) in sum.iter().zip(exp_avg) {
                // The first moment starts at zero: (1 - beta1) of the scaled sum.
                let want = 0.1 * 0.25 * f64::from(*sum);
                assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs(), "{got}, not {want}");
            }
        }
    }
    assert!(norms.iter().all(|n| *n == norms[0]), "the norm depends on the number of threads");

    // Without a sum the norm is the last run's, and there is nothing to add to.
    let mut executor = network.executor(2, Isa::best(), vec![network.loss])?;
    assert_eq!(executor.gradient_norm()?, 0.0);
    executor.run(Draws { seed: 7, step: 1, first_index: 0 })?;
    assert!(executor.gradient_norm()? > 0.0);
    let error = executor.accumulate(true).expect_err("no sum").to_string();
    assert!(error.contains("add gradients up"), "{error}");
    Ok(())
}

/// A small graph of in-place and other operations on tensors of one shape, each reading any that are there.
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
        // Rather what came last: chains of in-place operations.
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
    let last = *tensors.last().expect("there are some");
    let loss = g.add("loss", Loss::Mse, &[last, tensors[0]])?;
    Ok((g, loss))
}

/// Runs a graph; the numbers of `read` and of all gradients, if there are any.
fn run(
    graph: &Graph,
    gradients: Option<&[Tensor]>,
    keep: &[Tensor],
    read: &[Tensor],
) -> Result<Vec<Vec<f32>>> {
    let options = PlanOptions {
        gradients: gradients.map(<[_]>::to_vec),
        keep: keep.to_vec(),
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
    executor.run(Draws::default())?;
    let mut all = Vec::new();
    for &t in read {
        all.push(poison(t));
        executor.read(t, all.last_mut().expect("just pushed"))?;
    }
    for (i, &p) in graph.parameters().iter().enumerate().filter(|_| gradients.is_some()) {
        all.push(poison(p));
        executor.read_parameter(Region::Gradients, i, all.last_mut().expect("just pushed"))?;
    }
    // Nothing may write to an input or a weight.
    for (t, x) in given(graph) {
        let mut after = poison(t);
        executor.read(t, &mut after)?;
        assert_eq!(after, x, "{} was overwritten", graph.info(t).name);
    }
    Ok(all)
}

/// Made-up inputs and parameters.
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

#[test]
fn in_place_operations_keep_what_is_read_later() -> Result<()> {
    let mut g = Graph::new();
    let (x, y) = (g.input("x", [2, 5]), g.input("y", [2, 5]));
    let a = g.add("a", Activate(Activation::Silu), &[x])?;
    let b = g.add("b", Add, &[a, y])?; // a is read again by d: not in place
    let c = g.add("c", Add, &[b, y])?; // the last to read b: in place
    let d = g.add("d", Add, &[a, c])?;
    let e = g.add("e", Add, &[x, d])?; // an input is never overwritten
    let f = g.add("f", Add, &[e, e])?;
    let want = in_f64(&g);
    for keep in [vec![f], vec![b, f], vec![a, c, f], vec![a, b, c, d, e, f]] {
        for (t, got) in keep.iter().zip(run(&g, None, &keep, &keep)?) {
            assert_close(&got, &want[t], &g.info(*t).name);
        }
    }
    let options = PlanOptions { keep: vec![f], ..PlanOptions::default() };
    let executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
    let plan = executor.plan();
    assert_eq!(plan.place(b), plan.place(c), "the last reader works in place");
    assert_ne!(plan.place(a), plan.place(b));
    Ok(())
}

#[test]
fn random_graphs_agree_with_f64_whatever_is_kept() -> Result<()> {
    let mut shared = 0;
    for seed in 0..300 {
        let (mut g, loss) = random_graph(seed)?;
        let forward = g.clone();
        let want = in_f64(&forward);
        let all = computed(&forward);
        for (t, got) in all.iter().zip(run(&forward, None, &all, &all)?) {
            assert_close(&got, &want[t], &format!("seed {seed}, {}", g.info(*t).name));
        }
        let gradients = backward(&mut g, loss)?;
        let tight = run(&g, Some(&gradients), &[loss], &[loss])?;
        let loose = run(&g, Some(&gradients), &computed(&g), &[loss])?;
        assert_eq!(tight, loose, "seed {seed}");
        assert_close(&tight[0], &want[&loss], &format!("seed {seed}, loss"));
        let options = PlanOptions { gradients: Some(gradients), keep: vec![loss], ..PlanOptions::default() };
        let executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
        let plan = executor.plan();
        let in_place = |n: &&ddpm_engine::graph::Node| {
            n.op.operation().in_place().is_some_and(|i| plan.place(n.inputs[i]) == plan.place(n.outputs[0]))
        };
        shared += plan.graph().nodes().iter().filter(in_place).count();
    }
    assert!(shared > 300, "the graphs hardly work in place: {shared}");
    Ok(())
}

/// What training leaves: all regions but the gradients', then the loss and the gradients' norm of each step, as bits.
fn trained(
    graph: &Graph,
    options: PlanOptions,
    loss: Tensor,
    given: &[(Tensor, Vec<f32>)],
    threads: usize,
) -> Result<Vec<Vec<u64>>> {
    let options = PlanOptions { ema: true, ..options };
    let mut executor = CpuExecutor::with_isa(graph.clone(), &options, threads, Isa::best())?;
    for t in computed(graph) {
        executor.write(t, &vec![f32::NAN; graph.shape(t).len()])?;
    }
    for (t, x) in given {
        executor.write(*t, x)?;
    }
    let mut seen = Vec::new();
    for step in 1..=3u32 {
        let (draws, adam) = (Draws { seed: 7, step, first_index: 0 }, adam_step(u64::from(step)));
        let norm = if executor.plan().updates().is_some() {
            // A run alone moves nothing.
            executor.run(draws)?;
            match executor.train(draws, &adam)? {
                StepOutcome::Whole { gradient_norm, .. } => gradient_norm,
                stopped => panic!("{stopped:?} in step {step}"),
            }
        } else {
            executor.run(draws)?;
            let norm = executor.gradient_norm()?;
            executor.update(&adam)?;
            norm
        };
        let mut last = [f32::NAN];
        executor.read(loss, &mut last)?;
        seen.push(vec![u64::from(last[0].to_bits()), norm.to_bits()]);
    }
    for region in REGIONS.into_iter().filter(|&r| r != Region::Gradients) {
        for (i, &p) in graph.parameters().iter().enumerate() {
            let mut numbers = vec![f32::NAN; graph.shape(p).len()];
            executor.read_parameter(region, i, &mut numbers)?;
            seen.push(numbers.iter().map(|v| u64::from(v.to_bits())).collect());
        }
    }
    Ok(seen)
}

#[test]
fn updates_in_runs_give_the_same_bits() -> Result<()> {
    let network = network()?;
    let mut numbers: Vec<_> = network.graph.parameters().iter().copied().zip(network.weights()).collect();
    numbers.push((network.x0, normal(1, 999, network.graph.shape(network.x0).len())));
    let mut again = network.graph.clone();
    recompute(&mut again);
    let (gradients, keep) = (Some(network.gradients.clone()), vec![network.loss]);
    let behind = PlanOptions { gradients, keep, ..PlanOptions::default() };
    let within = PlanOptions { fuse_optimizer: Some(network.loss), ..behind.clone() };
    let late = PlanOptions { late_updates: true, ..within.clone() };
    for graph in [&network.graph, &again] {
        let run =
            |options: &PlanOptions, threads| trained(graph, options.clone(), network.loss, &numbers, threads);
        let want = run(&behind, 1)?;
        for threads in [1, 2, 5] {
            assert!(run(&within, threads)? == want, "{threads} threads");
            assert!(run(&late, threads)? == want, "{threads} threads, late");
        }
        let bytes = |options| CpuExecutor::new(graph.clone(), options, 1).map(|e| e.footprint().arena_bytes);
        assert!(bytes(&within)? < bytes(&behind)?);
        assert!(bytes(&late)? <= bytes(&within)? * 21 / 20);
    }

    // Gradients that go on to other nodes, weights that many nodes read, updates in all orders.
    let mut last_readers = 0;
    for seed in 0..300 {
        let (mut graph, loss) = random_graph(seed)?;
        let gradients = Some(backward(&mut graph, loss)?);
        let behind = PlanOptions { gradients, keep: vec![loss], ..PlanOptions::default() };
        let within = PlanOptions { fuse_optimizer: Some(loss), ..behind.clone() };
        let start = given(&graph);
        let run = |options| trained(&graph, options, loss, &start, 1);
        let want = run(behind)?;
        assert!(run(within.clone())? == want, "seed {seed}");
        assert!(run(PlanOptions { late_updates: true, ..within.clone() })? == want, "seed {seed}, late");
        let executor = CpuExecutor::with_isa(graph.clone(), &within, 1, Isa::best())?;
        let updates = executor.plan().updates().expect("asked for");
        for (i, node) in
            updates.behind.iter().zip(graph.nodes()).flat_map(|(all, n)| all.iter().map(move |i| (*i, n)))
        {
            last_readers += usize::from(!node.outputs.contains(&updates.gradients[i]));
        }
    }
    assert!(last_readers > 50, "hardly a weight is read behind its gradient: {last_readers}");
    Ok(())
}

#[test]
fn nothing_is_updated_from_the_first_number_on_that_is_not_finite() -> Result<()> {
    // The gradients are made from q's to p's.
    let mut g = Graph::new();
    let [x, y] = ["x", "y"].map(|name| g.input(name, [4, 2]));
    let [p, q] = ["p", "q"].map(|name| g.parameter(name, [1, 1, 2, 2]));
    let linear = Conv2d { bias: false, ..Conv2d::linear() };
    let h = g.add("h", linear.clone(), &[x, p])?;
    let z = g.add("z", linear, &[h, q])?;
    let loss = g.add("loss", Loss::L1, &[z, y])?;
    let gradients = Some(backward(&mut g, loss)?);
    let options =
        PlanOptions { gradients, fuse_optimizer: Some(loss), keep: vec![loss], ..PlanOptions::default() };
    // (x, p, q), and how many are updated.
    let cases = [
        ([1.0, 1.0, 1.0], None),
        ([1.0, 1.0, f32::NAN], Some(0)),
        ([1.0, 1.0, f32::MAX], Some(0)),
        // Squares of q's gradient pass the largest number; so do those of p's; a gradient of p does.
        ([1e25, 1.0, 1.0], Some(0)),
        ([1.0, 1e-30, 1e25], Some(1)),
        ([1e5, 1e-30, 1e35], Some(1)),
    ];
    for ([at_x, at_p, at_q], want) in cases {
        let mut executor = CpuExecutor::new(g.clone(), &options, 2)?;
        for (t, value) in [(x, at_x), (y, 0.5), (p, at_p), (q, at_q)] {
            executor.write(t, &vec![value; g.shape(t).len()])?;
        }
        let got = executor.train(Draws::default(), &adam_step(1))?;
        let moved = [0, 1].map(|i| {
            let (mut weights, mut moments) = ([0.0; 4], [0.0; 4]);
            executor.read_parameter(Region::Weights, i, &mut weights).expect("weights");
            executor.read_parameter(Region::ExpAvg, i, &mut moments).expect("moments");
            let moved = moments.iter().all(|m| *m != 0.0);
            assert!(moved || weights.iter().all(|w| w.to_bits() == [at_p, at_q][i].to_bits()), "{got:?}");
            moved
        });
        match want {
            None => {
                assert!(
                    matches!(got, StepOutcome::Whole { gradient_norm, .. } if gradient_norm > 0.0),
                    "{got:?}"
                )
            }
            Some(updated) => {
                assert_eq!(got, StepOutcome::Stopped { updated }, "x {at_x}, p {at_p}, q {at_q}")
            }
        }
        assert_eq!(moved, [want.is_none(), want != Some(0)]);
    }

    // There are no gradients behind the run.
    let mut executor = CpuExecutor::new(g.clone(), &options, 1)?;
    let errors = [
        executor.update(&adam_step(1)).expect_err("no gradients"),
        executor.gradient_norm().expect_err("no gradients"),
        executor.accumulate(true).expect_err("no gradients"),
        executor.read_parameter(Region::Gradients, 0, &mut [0.0; 4]).expect_err("no gradients"),
    ];
    for (error, part) in
        errors.iter().zip(["within its runs", "within its runs", "add gradients up", "Gradients"])
    {
        assert!(error.to_string().contains(part), "{error}");
    }
    let mut executor = CpuExecutor::new(g, &PlanOptions { fuse_optimizer: None, ..options }, 1)?;
    let error = executor.train(Draws::default(), &adam_step(1)).expect_err("updated behind").to_string();
    assert!(error.contains("within its runs"), "{error}");
    Ok(())
}

#[test]
fn joined_operations_compute_the_same() -> Result<()> {
    let mut joined = 0;
    for seed in 0..300 {
        let (g, loss) = random_graph(seed)?;
        let want = in_f64(&g);
        let kept = computed(&g)[seed as usize % 3];
        let mut fused = fuse(g.clone(), &[loss, kept])?;
        let got = in_f64(&fused);
        for t in computed(&fused) {
            assert_eq!(got[&t], want[&t], "seed {seed}, {}", g.info(t).name);
        }
        assert!(got.contains_key(&loss) && got.contains_key(&kept), "seed {seed}: a kept tensor is gone");
        joined += g.nodes().len() - fused.nodes().len();

        let gradients = backward(&mut fused, loss)?;
        let mut plain = g;
        let plain_gradients = backward(&mut plain, loss)?;
        let got = run(&fused, Some(&gradients), &[loss], &[loss])?;
        let want = run(&plain, Some(&plain_gradients), &[loss], &[loss])?;
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let want: Vec<f64> = want.iter().map(|&v| f64::from(v)).collect();
            assert_close(got, &want, &format!("seed {seed}, result {i}"));
        }
    }
    assert!(joined > 50, "the graphs have hardly anything to join: {joined}");
    Ok(())
}

#[test]
fn a_joined_network_has_the_same_loss_and_fewer_nodes() -> Result<()> {
    let network = network()?;
    let fused = fuse(network.forward.clone(), &[network.loss])?;
    let names: Vec<&str> = fused.nodes().iter().map(|n| n.op.operation().name()).collect();
    let gone = ["add", "add_per_channel", "group_norm"];
    assert!(names.iter().all(|n| !gone.contains(n)), "{names:?}");
    let run = |graph: &Graph| -> Result<f32> {
        let options = PlanOptions { keep: vec![network.loss], ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(graph.clone(), &options, 2, Isa::best())?;
        executor.write(network.x0, &normal(1, 999, graph.shape(network.x0).len()))?;
        for (i, weights) in network.weights().iter().enumerate() {
            executor.write_parameter(Region::Weights, i, weights)?;
        }
        executor.run(Draws { seed: 1, step: 2, first_index: 3 })?;
        let mut loss = [f32::NAN];
        executor.read(network.loss, &mut loss)?;
        Ok(loss[0])
    };
    let (plain, joined) = (run(&network.forward)?, run(&fused)?);
    assert!((plain - joined).abs() <= 1e-5 * plain.abs(), "{plain} {joined}");
    Ok(())
}

#[test]
fn shape_errors_name_the_node_the_operation_and_the_shapes() {
    type Bad =
        (&'static str, fn(&mut Graph, &mut dyn FnMut(&mut Graph, &[usize]) -> Tensor) -> Result<Tensor>);
    let bad: [Bad; 16] = [
        ("[2, 3] [3, 2]", |g, t| {
            let x = [t(g, &[2, 3]), t(g, &[3, 2])];
            g.add("the.node", Add, &x)
        }),
        ("[2, 3]", |g, t| {
            let x = [t(g, &[2, 3])];
            g.add("the.node", Add, &x)
        }),
        ("[2, 1, 1, 3] [1, 3]", |g, t| {
            let x = [t(g, &[2, 1, 1, 3]), t(g, &[1, 3])];
            g.add("the.node", AddPerChannel, &x)
        }),
        ("[6, 3] [2, 3]", |g, t| {
            let x = [t(g, &[6, 3]), t(g, &[2, 3])];
            g.add("the.node", AddPerChannel, &x)
        }),
        ("[2, 3] [3, 3]", |g, t| {
            let x = [t(g, &[2, 3]), t(g, &[3, 3])];
            g.add("the.node", Concat, &x)
        }),
        ("[2, 3]", |g, t| {
            let x = [t(g, &[2, 3])];
            g.add("the.node", Slice { from: 1, len: 3 }, &x)
        }),
        ("[1, 4, 4, 3] [3, 3, 4, 5] [5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 3]), t(g, &[3, 3, 4, 5]), t(g, &[5])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 2, 2, 3] [5, 5, 3, 5] [5]", |g, t| {
            let x = [t(g, &[1, 2, 2, 3]), t(g, &[5, 5, 3, 5]), t(g, &[5])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 4, 4, 3] [3, 3, 3, 5] [4]", |g, t| {
            let x = [t(g, &[1, 4, 4, 3]), t(g, &[3, 3, 3, 5]), t(g, &[4])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 4, 4, 3] [3, 3, 3, 5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 3]), t(g, &[3, 3, 3, 5])];
            g.add("the.node", Conv2d::new(0, 1), &x)
        }),
        ("[4, 3] [3, 3, 3, 5] [5]", |g, t| {
            let x = [t(g, &[4, 3]), t(g, &[3, 3, 3, 5]), t(g, &[5])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 4, 4, 5] [4, 4, 3, 5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 5]), t(g, &[4, 4, 3, 5])];
            let op = Conv2dTranspose {
                stride: (2, 2),
                pad: (1, 1).into(),
                size: (9, 12),
                like: None,
                gradient: false,
                bias: false,
            };
            g.add("the.node", op, &x)
        }),
        ("[1, 4, 4, 6] [6] [6]", |g, t| {
            let x = [t(g, &[1, 4, 4, 6]), t(g, &[6]), t(g, &[6])];
            g.add("the.node", GroupNorm { groups: 4, eps: 1e-5, silu: true }, &x)
        }),
        ("[1, 4, 4, 6] [6] [5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 6]), t(g, &[6]), t(g, &[5])];
            g.add("the.node", GroupNorm { groups: 2, eps: 1e-5, silu: true }, &x)
        }),
        ("[1, 4, 4, 15]", |g, t| {
            let x = [t(g, &[1, 4, 4, 15])];
            g.add("the.node", Attention { heads: 2, dropout: None }, &x)
        }),
        ("[2, 3] [2, 4]", |g, t| {
            let x = [t(g, &[2, 3]), t(g, &[2, 4])];
            g.add("the.node", Loss::Mse, &x)
        }),
    ];
    for (shapes, add) in bad {
        let mut g = Graph::new();
        let mut tensor = |g: &mut Graph, dims: &[usize]| g.input("x", Shape::new(dims));
        let error = add(&mut g, &mut tensor).expect_err("the shapes do not fit");
        let Error::Shape { node, operation, reason, .. } = &error else { panic!("{error}") };
        assert_eq!(node, "the.node");
        let text = error.to_string();
        let shapes = shapes.replace("] [", "], [");
        assert!(text.contains(*operation) && text.contains(&shapes) && !reason.is_empty(), "{text}");
        assert!(g.nodes().is_empty(), "{text}: the node was added");
    }
}

#[test]
fn data_of_the_wrong_length_and_missing_regions_are_refused_by_name() -> Result<()> {
    let mut g = Graph::new();
    let (x, p) = (g.input("image", [2, 3]), g.parameter("the.weight", [2, 3]));
    let y = g.add("y", Add, &[x, p])?;
    let options = PlanOptions { keep: vec![y], ..PlanOptions::default() };
    let mut executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
    let error = executor.write(x, &[0.0; 5]).expect_err("too short").to_string();
    assert!(error.contains("image") && error.contains('5') && error.contains('6'), "{error}");
    let error = executor.read(y, &mut [0.0; 7]).expect_err("too long").to_string();
    assert!(error.contains('y') && error.contains('7'), "{error}");
    let error = executor.write_parameter(Region::Weights, 0, &[0.0; 1]).expect_err("too short").to_string();
    assert!(error.contains("the.weight"), "{error}");
    let error = executor.read_parameter(Region::Ema, 0, &mut [0.0; 6]).expect_err("no training").to_string();
    assert!(error.contains("Ema") && error.contains("training"), "{error}");
    let error = executor.update(&adam_step(1)).expect_err("no training").to_string();
    assert!(error.contains("training"), "{error}");
    let error = executor.gradient_norm().expect_err("no training").to_string();
    assert!(error.contains("training"), "{error}");
    assert!(executor.read_parameter(Region::Weights, 1, &mut [0.0; 6]).is_err(), "there is one parameter");
    Ok(())
}
