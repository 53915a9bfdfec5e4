//! Measurement of training steps, forward passes and denoising steps.

use super::clock::{Clock, peak_resident, reset_peak_resident};
use ddpm::config::Config;
use ddpm::data::ImageShape;
use ddpm::denoiser::Denoiser;
use ddpm::model::Model;
use ddpm::process::Prediction;
use ddpm::roofline::Roofline;
use ddpm::sampler::{NoiseKey, SamplerOptions};
use ddpm::schedule::Schedule;
use ddpm::train::Trainer;
use ddpm_engine::{AdamStep, Executor, NodeTime};
use ddpm_engine_cpu::{Isa, bf16_fma_throughput, fma_throughput};
use serde::Serialize;
use std::time::Instant;

/// The last node of the forward pass.
const LOSS: &str = "loss";

/// Measurements of one kind of step.
#[derive(Serialize)]
pub struct Part {
    /// "train", "forward", "sample", or "sample-one" (a batch of one image).
    pub part: &'static str,
    /// Images per step.
    pub images: usize,
    /// Median time of a step.
    pub seconds: f64,
    /// Minimum time of a step.
    pub least: f64,
    /// Maximum time of a step.
    pub most: f64,
    /// Number of counted steps.
    pub runs: usize,
    /// Denoising steps per image; 1 unless sampling.
    pub steps: usize,
    /// Images per second.
    pub images_per_second: f64,
    /// Floating-point operations per step, in 1e9.
    pub gflop: f64,
    /// Floating-point operations per second, in 1e9.
    pub gflops: f64,
    /// Bytes of the plan's arena, which holds all tensors and weights.
    pub arena_bytes: usize,
    /// Bytes of the threads' scratch memory.
    pub scratch_bytes: usize,
    /// Peak resident memory of the process in bytes, where available.
    pub resident_bytes: Option<u64>,
    /// The parts of a training step.
    pub shares: Vec<Share>,
    /// The time of every node.
    #[serde(skip)]
    pub nodes: Vec<NodeTime>,
    /// Human-readable description of the device.
    #[serde(skip)]
    pub device: String,
    /// Number of network parameters.
    #[serde(skip)]
    pub parameters: usize,
}

/// A part of a step.
#[derive(Serialize)]
pub struct Share {
    /// "forward", "backward", "update" or "rest".
    pub name: &'static str,
    /// Time per step.
    pub seconds: f64,
    /// Floating-point operations per step, in 1e9.
    pub gflop: f64,
}

impl Part {
    /// From ascending step times, each step running the executor's plan `passes` times.
    fn new(
        part: &'static str,
        [images, steps, passes]: [usize; 3],
        times: &[f64],
        exec: &mut dyn Executor,
    ) -> Self {
        exec.set_profiling(false);
        let (footprint, middle) = (exec.footprint(), (times.len() - 1) / 2);
        let median = (times[middle] + times[times.len() / 2]) / 2.0;
        let gflop = 2e-9 * footprint.multiply_adds as f64 * passes as f64;
        Self {
            part,
            images,
            seconds: median,
            least: times[0],
            most: times[times.len() - 1],
            runs: times.len(),
            steps,
            images_per_second: images as f64 / (median * steps as f64),
            gflop,
            gflops: gflop / median,
            arena_bytes: footprint.arena_bytes,
            scratch_bytes: footprint.scratch_bytes,
            resident_bytes: peak_resident(),
            shares: Vec::new(),
            nodes: exec.profile(),
            device: exec.describe(),
            parameters: exec.plan().graph().parameter_count(),
        }
    }
}

/// Extra steps for timing nodes, where that would [slow](Executor::profiling_slows) the timed steps.
const PROFILED_STEPS: usize = 3;

/// Measures training steps.
pub fn train(trainer: &mut Trainer, mut clock: Clock) -> anyhow::Result<Part> {
    let aside = trainer.executor().profiling_slows();
    while clock.next()? {
        let start = Instant::now();
        trainer.step()?;
        if clock.record(start.elapsed())? {
            trainer.executor().set_profiling(!aside);
        }
    }
    if aside {
        trainer.executor().set_profiling(true);
        for _ in 0..PROFILED_STEPS {
            trainer.step()?;
        }
    }
    let (images, passes) = (trainer.config().images_per_step(), trainer.config().train.accumulate);
    let times = clock.finish();
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    let mut part = Part::new("train", [images, 1, passes], &times, trainer.executor());
    let after_loss = part.nodes.iter().position(|n| n.name == LOSS).map_or(part.nodes.len(), |i| i + 1);
    let (forward, backward) = part.nodes.split_at(after_loss);
    let of = |name, nodes: &[NodeTime]| Share {
        name,
        seconds: passes as f64 * nodes.iter().map(node_seconds).sum::<f64>(),
        gflop: passes as f64 * nodes.iter().map(|n| 2e-9 * n.multiply_adds as f64).sum::<f64>(),
    };
    let update = Share { name: "update", seconds: update(trainer.executor())?, gflop: 0.0 };
    part.shares = vec![of("forward", forward), of("backward", backward), update];
    // Nodes profiled in extra steps ran slower than in the timed ones, so the rest is unknown.
    if !aside {
        let known: f64 = part.shares.iter().map(|s| s.seconds).sum();
        part.shares.push(Share { name: "rest", seconds: (mean - known).max(0.0), gflop: 0.0 });
    }
    Ok(part)
}

/// Mean time of a node in one run of the plan.
pub fn node_seconds(node: &NodeTime) -> f64 {
    node.time.as_secs_f64() / node.runs.max(1) as f64
}

/// The time of a weight update including the gradient norm: from the profiled steps if fused, else the median of a few extra updates
/// with learning rate zero, which change nothing.
fn update(exec: &mut dyn Executor) -> anyhow::Result<f64> {
    if exec.fuses_optimizer() {
        return Ok(exec.update_time().as_secs_f64());
    }
    let still = AdamStep {
        lr: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        decoupled: false,
        step: 1,
        ema_decay: 0.9,
        grad_scale: 1.0,
    };
    let mut times = [0.0; 5];
    for time in &mut times {
        let start = Instant::now();
        exec.gradient_norm()?;
        exec.update(&still)?;
        *time = start.elapsed().as_secs_f64();
    }
    times.sort_by(f64::total_cmp);
    Ok(times[2])
}

/// The network for sampling in batches of `images`, with the initial weights of training.
pub fn model(config: &Config, shape: ImageShape, images: usize) -> anyhow::Result<Model> {
    reset_peak_resident();
    let net = config.build_network(shape.channels);
    let shape = [images, shape.height, shape.width, shape.channels];
    let mut model =
        Model::with_compute_options(&*net, shape, config.compute.hardware(), config.compute.options())?;
    model.init_weights(config.train.seed)?;
    Ok(model)
}

/// Measures forward passes.
pub fn forward(model: &mut Model, mut clock: Clock) -> anyhow::Result<Part> {
    let [images, ..] = model.shape();
    let mut x = vec![0.0; images * model.image_len()];
    NoiseKey { seed: 0, first: 0 }.fill(ddpm_rng::Purpose::Test, 0, model.image_len(), &mut x);
    let mut eps = x.clone();
    let aside = model.executor().profiling_slows();
    while clock.next()? {
        let start = Instant::now();
        model.predict(&x, 10.0, &mut eps)?;
        if clock.record(start.elapsed())? {
            model.executor().set_profiling(!aside);
        }
    }
    if aside {
        profile_passes(model, &x)?;
    }
    Ok(Part::new("forward", [images, 1, 1], &clock.finish(), model.executor()))
}

/// Runs forward passes with profiling.
fn profile_passes(model: &mut Model, x: &[f32]) -> anyhow::Result<()> {
    let mut eps = x.to_vec();
    model.executor().set_profiling(true);
    for _ in 0..PROFILED_STEPS {
        model.predict(x, 10.0, &mut eps)?;
    }
    Ok(())
}

/// Measures denoising steps; an image takes `steps` of them.
pub fn sample(
    name: &'static str,
    model: &mut Model,
    schedule: &Schedule,
    steps: usize,
    mut clock: Clock,
) -> anyhow::Result<Part> {
    let [images, ..] = model.shape();
    let sampler = SamplerOptions::default().build(schedule, Prediction::Eps)?;
    let mut go_on = clock.next()?;
    let aside = model.executor().profiling_slows();
    model.executor().set_profiling(!aside);
    // New batches are sampled until the clock stops.
    while go_on {
        let mut failed = None;
        let mut start = Instant::now();
        let end = sampler.sample(model, NoiseKey { seed: 0, first: 0 }, &mut |_| {
            match clock.record(start.elapsed()).and_then(|_| clock.next()) {
                Ok(more) => go_on = more,
                Err(error) => failed = Some(error),
            }
            start = Instant::now();
            if go_on && failed.is_none() { Ok(()) } else { Err(ddpm::diffusion::Error::Interrupted) }
        });
        match (failed, end) {
            (Some(error), _) => return Err(error),
            (None, Err(ddpm::diffusion::Error::Interrupted)) | (None, Ok(_)) => {}
            (None, Err(error)) => return Err(error.into()),
        }
    }
    if aside {
        profile_passes(model, &vec![0.0; images * model.image_len()])?;
    }
    Ok(Part::new(name, [images, steps, 1], &clock.finish(), model.executor()))
}

/// Peak rates of the device: of the CPU in registers, of a GPU in large matmuls at the run's precision.
#[derive(Clone, Copy)]
pub struct Peak {
    /// Floating-point operations per second; f32 multiply-adds on a CPU.
    pub flops: f64,
    /// The same with bf16 operands, if the CPU has such an instruction.
    pub bf16: Option<f64>,
    /// Memory bandwidth of a GPU in bytes per second.
    pub bytes: Option<f64>,
}

impl Peak {
    /// Measures the device and instruction set that kernels will use.
    pub fn measure(config: &Config, threads: usize) -> anyhow::Result<Self> {
        if let Some(rates) = Roofline::measure(config.compute.hardware(), config.compute.options())? {
            return Ok(Self { flops: rates.flops, bf16: None, bytes: Some(rates.bytes) });
        }
        let isa = Isa::from_env()?;
        let rounds = 10_000_000 / isa.lanes().max(2) as u64;
        let f32 = best_rate(threads, &|| fma_throughput(isa, rounds));
        let bf16 = bf16_fma_throughput(isa, 1)
            .map(|_| best_rate(threads, &|| bf16_fma_throughput(isa, rounds).unwrap_or(0)));
        Ok(Self { flops: f32, bf16, bytes: None })
    }
}

/// Operations per second of all threads: the best of several short runs, since other load only lowers it. `work` returns its number of
/// operations.
fn best_rate(threads: usize, work: &(impl Fn() -> u64 + Sync)) -> f64 {
    let once = |_| {
        let start = Instant::now();
        let done: u64 = std::thread::scope(|s| {
            let all: Vec<_> = (0..threads).map(|_| s.spawn(work)).collect();
            all.into_iter().map(|t| t.join().unwrap_or(0)).sum()
        });
        done as f64 / start.elapsed().as_secs_f64()
    };
    (0..8).map(once).fold(0.0, f64::max)
}
