//! Training steps on an executor against the CPU's: two updates of a small U-Net with everything that training uses.

use super::table::{Build, Make, make_inputs, on_cpu};
use ddpm_engine::ops::*;
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::{AdamStep, Executor, Graph, PlanOptions, Region, RngKey, StepOutcome, Tensor, clip_scale};
use ddpm_rng::Purpose;
use std::sync::Arc;
use std::time::Duration;

/// A graph with its input, result, loss and gradients.
struct Network {
    graph: Graph,
    x0: Tensor,
    y: Tensor,
    loss: Tensor,
    gradients: Vec<Tensor>,
}

fn network() -> Network {
    const N: usize = 3;
    const C: usize = 16;
    let mut b = Build::default();
    let x0 = b.input([N, 8, 8, 3]);
    let t = b.add(RandomTimestep { n: N, steps: 50 }, &[]);
    let eps = b.add(RandomNormal { shape: b.graph.shape(x0), purpose: Purpose::Noise }, &[]);
    let table = |f: fn(f32) -> f32| (0..50).map(|t| f(1.0 - t as f32 / 50.0)).collect::<Arc<[f32]>>();
    let op =
        QSample { sqrt_alpha_bar: table(f32::sqrt), sqrt_one_minus_alpha_bar: table(|a| (1.0 - a).sqrt()) };
    let xt = b.add(op, &[x0, eps, t]);
    let e = b.add(SinusoidalEmbedding { dim: 16, shift: 0.0, cosines_first: false }, &[t]);
    let (w, bias) = (b.p([1, 1, 16, C]), b.p([C]));
    let e = b.add(Conv2d::linear(), &[e, w, bias]);
    let e = b.add(Activate(Activation::Silu), &[e]);
    let x = b.conv(xt, (3, 3), C, 1, 1);
    let x = b.add(AddPerChannel, &[x, e]);
    let h = b.norm(x, 4, true);
    let h = b.add(Dropout { p: 0.1, site: 1 }, &[h]);
    let h = b.conv(h, (3, 3), C, 1, 1);
    let x = b.add(Add, &[h, x]);
    let qkv = b.conv(x, (1, 1), 3 * C, 1, 0);
    let o = b.add(Attention { heads: 4, dropout: Some(Dropout { p: 0.1, site: 2 }) }, &[qkv]);
    let o = b.conv(o, (1, 1), C, 1, 0);
    let x = b.add(Add, &[x, o]);
    let down = b.conv(x, (3, 3), C, 2, 1);
    let (w, bias) = (b.p([4, 4, C, C]), b.p([C]));
    let up = Conv2dTranspose::new(2, (1, 1), (8, 8));
    let up = b.add(up, &[down, w, bias]);
    let x = b.add(Concat, &[up, x]);
    let x = b.norm(x, 4, true);
    let y = b.conv(x, (3, 3), 3, 1, 1);
    let loss = b.add(Loss::Mse, &[y, eps]);
    let mut graph = ddpm_engine::passes::fuse::fuse(b.graph, &[y, loss]).expect("fuses");
    let gradients = backward(&mut graph, loss).expect("gradients");
    ddpm_engine::passes::recompute::recompute(&mut graph);
    Network { graph, x0, y, loss, gradients }
}

impl Network {
    fn options(&self) -> PlanOptions {
        PlanOptions {
            gradients: Some(self.gradients.clone()),
            ema: true,
            outputs: vec![self.y, self.loss],
            ..PlanOptions::default()
        }
    }

    fn write_inputs(&self, exec: &mut dyn Executor) {
        for (t, x) in make_inputs(&self.graph) {
            exec.write(t, &x).expect("its length");
        }
    }

    fn loss(&self, exec: &dyn Executor) -> f32 {
        let mut value = [f32::NAN];
        exec.read(self.loss, &mut value).expect("one number");
        value[0]
    }

    /// All state that training modifies.
    fn state(&self, exec: &dyn Executor, regions: &[Region]) -> Seen {
        let mut seen = Vec::new();
        for &region in regions {
            for (i, &p) in self.graph.parameters().iter().enumerate() {
                let mut x = vec![f32::NAN; self.graph.shape(p).len()];
                exec.read_parameter(region, i, &mut x).expect("its length");
                seen.push((format!("{region:?} of {}", self.graph.info(p).name), x));
            }
        }
        seen
    }
}

/// Named values.
type Seen = Vec<(String, Vec<f32>)>;

const OPTIMIZER: [Region; 4] = [Region::Weights, Region::ExpAvg, Region::ExpAvgSq, Region::Ema];

fn adam(step: u64, grad_scale: f64) -> AdamStep {
    AdamStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-4,
        weight_decay: 0.5,
        decoupled: step == 1,
        step,
        ema_decay: 0.9,
        grad_scale,
    }
}

/// Compares an executor with the CPU's; a second training must match the first bit by bit.
fn compare(
    network: &Network,
    options: &PlanOptions,
    make: Make<'_>,
    steps: &dyn Fn(&mut dyn Executor) -> Seen,
) {
    let want = steps(&mut *on_cpu(&network.graph, options));
    let got = steps(&mut *make(network.graph.clone(), options));
    let again = steps(&mut *make(network.graph.clone(), options));
    assert!(got == again, "training is not reproducible");
    assert_eq!(got.len(), want.len());
    for ((what, got), (_, want)) in got.iter().zip(&want) {
        let scale = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= 2e-4 * scale, "{what}: {g}, not {w} (largest {scale})");
        }
    }
}

/// Two updates of two micro-batches each, controlled by the host.
pub fn host_controlled(make: Make<'_>) {
    let network = network();
    let options = PlanOptions { accumulate: true, ..network.options() };
    compare(&network, &options, make, &|exec| {
        let mut seen = Vec::new();
        network.write_inputs(exec);
        for step in 1..=2u64 {
            for micro in 0..2u32 {
                exec.run(RngKey { seed: 7, step: 2 * step as u32 + micro, first_index: 0 }).expect("a run");
                exec.accumulate(micro == 0).expect("a sum");
                seen.push((format!("loss of step {step}"), vec![network.loss(exec)]));
            }
            let norm = exec.gradient_norm().expect("a norm");
            seen.push((format!("norm of step {step}"), vec![norm as f32]));
            exec.update(&adam(step, 0.5 / norm)).expect("an update");
        }
        seen.extend(network.state(exec, &OPTIMIZER));
        seen.extend(network.state(exec, &[Region::GradientSum]));
        seen
    });
}

/// Three training runs; in the second the loss is NaN, and the weights stay. With and without profiling, with the same bits.
pub fn fused_steps(make: Make<'_>) {
    let network = network();
    let options = PlanOptions { fuse_optimizer: Some(network.loss), ..network.options() };
    let steps = |exec: &mut dyn Executor, profiling: bool| {
        assert!(exec.fuses_optimizer());
        let mut seen = Vec::new();
        network.write_inputs(exec);
        exec.set_profiling(profiling);
        let mut image = vec![0.0; network.graph.shape(network.x0).len()];
        exec.read(network.x0, &mut image).expect("its length");
        for (step, broken) in [(1, false), (2, true), (2, false)] {
            let mut x0 = image.clone();
            if broken {
                x0[17] = f32::NAN;
            }
            exec.write(network.x0, &x0).expect("its length");
            let before = network.state(exec, &OPTIMIZER);
            let key = RngKey { seed: 7, step: step as u32, first_index: 0 };
            let run = exec.train(key, &adam(step, 0.5)).expect("a run");
            let loss = network.loss(exec);
            match run {
                StepOutcome::Applied { loss: reported, gradient_norm } => {
                    assert!(!broken && reported == loss, "the loss is {loss}, not {reported}");
                    seen.push((format!("loss and norm of step {step}"), vec![loss, gradient_norm as f32]));
                }
                StepOutcome::NonFinite { updated } => {
                    assert!(broken && updated == 0 && loss.is_nan());
                    assert!(network.state(exec, &OPTIMIZER) == before, "weights were moved");
                }
            }
        }
        seen.extend(network.state(exec, &OPTIMIZER));
        seen
    };
    compare(&network, &options, make, &|exec| steps(exec, false));
    let graph = || network.graph.clone();
    let plain = steps(&mut *make(graph(), &options), false);
    let mut exec = make(graph(), &options);
    assert!(plain == steps(&mut *exec, true), "profiling changes results");
    assert!(exec.update_time() > Duration::ZERO);
    // A skipped update does not affect the host's own updates afterwards.
    let before = network.state(&*exec, &OPTIMIZER);
    exec.write(network.x0, &vec![f32::NAN; network.graph.shape(network.x0).len()]).expect("its length");
    assert!(matches!(
        exec.train(RngKey::default(), &adam(3, 1.0)),
        Ok(StepOutcome::NonFinite { updated: 0 })
    ));
    assert!(network.state(&*exec, &OPTIMIZER) == before);
    network.write_inputs(&mut *exec);
    exec.run(RngKey::default()).expect("a run");
    exec.update(&adam(3, 1.0)).expect("an update");
    assert!(network.state(&*exec, &OPTIMIZER) != before);

    // The host gets the same result step by step.
    let mut exec = make(graph(), &options);
    network.write_inputs(&mut *exec);
    exec.run(RngKey { seed: 7, step: 1, first_index: 0 }).expect("a run");
    let first = vec![network.loss(&*exec), exec.gradient_norm().expect("a norm") as f32];
    assert_eq!(first, plain[0].1);
    exec.update(&adam(1, 0.5)).expect("an update");
    let mut other = make(graph(), &options);
    network.write_inputs(&mut *other);
    other.train(RngKey { seed: 7, step: 1, first_index: 0 }, &adam(1, 0.5)).expect("a run");
    assert!(network.state(&*exec, &OPTIMIZER) == network.state(&*other, &OPTIMIZER));

    let unplanned = make(graph(), &network.options()).train(RngKey::default(), &adam(1, 1.0));
    assert!(unplanned.expect_err("not planned").to_string().contains("fused optimizer step"));
}

/// Gradients clipped by the device, and ones within the limit, bit by bit as on the host.
pub fn clipped(make: Make<'_>) {
    let network = network();
    for (clip_norm, shortens) in [(0.05, true), (1e6, false)] {
        let options = PlanOptions { fuse_optimizer: Some(network.loss), clip_norm, ..network.options() };
        let (mut device, mut host) =
            (make(network.graph.clone(), &options), on_cpu(&network.graph, &options));
        assert!(device.fuses_optimizer() && !host.fuses_optimizer());
        let mut by_hand = make(network.graph.clone(), &options);
        for exec in [&mut *device, &mut *host, &mut *by_hand] {
            network.write_inputs(exec);
        }
        for step in 1..=2u64 {
            let key = RngKey { seed: 7, step: step as u32, first_index: 0 };
            let run = device.train(key, &adam(step, 1.0)).expect("a run");
            let mut norms = Vec::new();
            for exec in [&mut *host, &mut *by_hand] {
                exec.run(key).expect("a run");
                let norm = exec.gradient_norm().expect("a norm");
                let scale = clip_scale(clip_norm, norm);
                assert_eq!(scale < 1.0, shortens, "{norm}");
                exec.update(&adam(step, scale)).expect("an update");
                norms.push(norm);
            }
            let loss = network.loss(&*by_hand);
            assert_eq!(run, StepOutcome::Applied { loss, gradient_norm: norms[1] });
            assert!((norms[0] - norms[1]).abs() <= 1e-4 * norms[0]);
        }
        let (got, want) = (network.state(&*device, &OPTIMIZER), network.state(&*by_hand, &OPTIMIZER));
        assert!(got == want, "the device clips differently from the host");
    }
}

/// Restored states equal their snapshot, whatever ran in between.
pub fn states_are_restored(make: Make<'_>) {
    let mut b = Build::default();
    let x = b.input([2, 3, 3, 5]);
    let value = b.add(SumRows, &[x]);
    let states: Vec<Tensor> = ["a", "b"].map(|name| b.graph.state(name, [5])).to_vec();
    for &state in &states {
        b.add(RunningAverage { momentum: 0.5 }, &[state, value]);
    }
    let mut exec = make(b.graph.clone(), &PlanOptions::default());
    let read = |exec: &dyn Executor| {
        states
            .iter()
            .map(|&t| {
                let mut v = [0.0; 5];
                exec.read(t, &mut v).expect("five");
                v
            })
            .collect::<Vec<_>>()
    };
    exec.write(x, &[1.0; 90]).expect("its length");
    for (i, &state) in states.iter().enumerate() {
        exec.write(state, &[i as f32; 5]).expect("five");
    }
    exec.run(RngKey::default()).expect("a run");
    exec.snapshot_states().expect("saved");
    let before = read(&*exec);
    exec.run(RngKey::default()).expect("a run");
    assert_ne!(read(&*exec), before);
    exec.restore_states().expect("restored");
    assert_eq!(read(&*exec), before);
}

/// Weights stay if the loss is infinite and the gradient is not, and vice versa.
pub fn skipped_updates(make: Make<'_>) {
    for (loss, scale, weight, target, infinite_loss) in
        [(Loss::Mse, 1.0, 0.5, 1e20, true), (Loss::L1, 1e30, 1e-38, 0.0, false)]
    {
        let mut b = Build::default();
        let p = b.p([1, 4, 4, 2]);
        let double = Affine { scale, shift: 0.0 };
        let y = b.add(double.clone(), &[p]);
        let y = b.add(double, &[y]);
        let goal = b.input([1, 4, 4, 2]);
        let loss = b.add(loss, &[y, goal]);
        let mut graph = b.graph;
        let gradients = Some(backward(&mut graph, loss).expect("gradients"));
        // The loss is not listed as an output, but must be readable.
        let options = PlanOptions { gradients, fuse_optimizer: Some(loss), ..PlanOptions::default() };
        for mut exec in [on_cpu(&graph, &options), make(graph.clone(), &options)] {
            let weights = vec![weight; 32];
            exec.write_parameter(Region::Weights, 0, &weights).expect("its length");
            exec.write(goal, &[target; 32]).expect("its length");
            let run = exec.train(RngKey::default(), &adam(1, 1.0)).expect("a run");
            assert_eq!(run, StepOutcome::NonFinite { updated: 0 }, "{}", exec.describe());
            let (mut value, mut after) = ([0.0], vec![0.0; 32]);
            exec.read(loss, &mut value).expect("one number");
            assert_eq!(!value[0].is_finite(), infinite_loss, "{}", exec.describe());
            exec.read_parameter(Region::Weights, 0, &mut after).expect("its length");
            assert_eq!(after, weights);
        }
    }
}
