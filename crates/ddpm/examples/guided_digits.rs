//! Measures whether guidance samples the requested digit: a small classifier is trained on the built-in digits and
//! applied to
//! 500 samples of a class-conditional run.
//!
//! ```sh
//! cargo run --release -p ddpm --bin ddpm -- train --name digits --set attention.num_class_embeds=10
//! cargo run --release -p ddpm --example guided_digits -- runs/digits/checkpoints/step-0001200
//! ```

use ddpm::data::digits::Digits;
use ddpm::data::{AugmentKey, Dataset};
use ddpm::guidance::Guidance;
use ddpm::nets::{Builder, ConvLayer, Mode};
use ddpm::pipeline::{Pipeline, SampleRequest};
use ddpm::sampler::{self, SamplerOptions};
use ddpm::{Error, Result};
use ddpm_engine::ops::{Activation, Loss};
use ddpm_engine::passes::autodiff;
use ddpm_engine::{AdamStep, Device, Executor, PlanOptions, Region, RngKey, Tensor};
use ddpm_engine_cpu::CpuDevice;
use std::path::PathBuf;

const BATCH: usize = 100;
const STEPS: u64 = 1500;
const SAMPLES: usize = 500;

/// A digit classifier of three convolutions.
struct Classifier {
    exec: Box<dyn Executor>,
    image: Tensor,
    class: Tensor,
    logits: Tensor,
}

impl Classifier {
    fn new(side: usize) -> Result<Self> {
        let mut b = Builder::new(Mode::Training);
        let image = b.graph.input("image", [BATCH, side, side, 1]);
        let class = b.graph.input("class", [BATCH, 1, 1, 10]);
        let h = b.conv("conv1", image, ConvLayer::new(16, 3).strided(2, 1))?;
        let h = b.activate("conv1", h, Activation::Relu)?;
        let h = b.conv("conv2", h, ConvLayer::new(32, 3).strided(2, 1))?;
        let h = b.activate("conv2", h, Activation::Relu)?;
        let left = side.div_ceil(2).div_ceil(2);
        let logits = b.conv("conv3", h, ConvLayer::new(10, left).strided(1, 0))?;
        let loss = b.graph.add("loss", Loss::Mse, &[logits, class])?;
        let built = b.finish(logits);
        let mut graph = built.graph;
        let gradients = autodiff::backward(&mut graph, loss)?;
        let options =
            PlanOptions { gradients: Some(gradients), outputs: vec![logits], ..PlanOptions::default() };
        let mut exec = CpuDevice { threads: 0 }.executor(graph, &options)?;
        for (i, spec) in built.parameters.iter().enumerate() {
            exec.write_parameter(Region::Weights, i, &spec.init(1, i))?;
        }
        Ok(Self { exec, image, class, logits })
    }

    /// One training step on the digits from index `first`.
    fn train_step(&mut self, digits: &Digits, first: usize, step: u64) -> Result<()> {
        let (images, labels) = batch(digits, first)?;
        let mut one_hot = vec![0.0; BATCH * 10];
        labels.iter().enumerate().for_each(|(i, &l)| one_hot[i * 10 + l] = 1.0);
        self.exec.write(self.image, &images)?;
        self.exec.write(self.class, &one_hot)?;
        self.exec.run(RngKey::default())?;
        let lr = 2e-3 * (1.0 - step as f64 / STEPS as f64);
        let (beta1, beta2, eps, weight_decay, decoupled) = (0.9, 0.999, 1e-8, 0.0, false);
        let (ema_decay, grad_scale, step) = (0.0, 1.0, step + 1);
        let adam = AdamStep { lr, beta1, beta2, eps, weight_decay, decoupled, step, ema_decay, grad_scale };
        Ok(self.exec.update(&adam)?)
    }

    /// Predicts the digits in a batch.
    fn classify(&mut self, images: &[f32]) -> Result<Vec<usize>> {
        self.exec.write(self.image, images)?;
        self.exec.run(RngKey::default())?;
        let mut logits = vec![0.0f32; BATCH * 10];
        self.exec.read(self.logits, &mut logits)?;
        let argmax = |scores: &[f32]| (0..10).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0);
        Ok(logits.chunks(10).map(argmax).collect())
    }
}

fn batch(digits: &Digits, first: usize) -> Result<(Vec<f32>, Vec<usize>)> {
    let len = digits.shape().num_elements();
    let (mut images, mut labels) = (vec![0.0; BATCH * len], Vec::new());
    for (i, out) in images.chunks_mut(len).enumerate() {
        let index = (first + i) % digits.len();
        digits.read(index, AugmentKey::default(), out)?;
        labels.push(digits.label(index).unwrap_or(0) as usize);
    }
    Ok((images, labels))
}

fn main() -> Result<()> {
    let usage = |reason: &str| Error::Config { key: "arguments".to_owned(), reason: reason.to_owned() };
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let checkpoint = arguments.next().ok_or_else(|| usage("CHECKPOINT [SAMPLER] [STEPS]"))?;
    let name = arguments.next().map_or(Some("dpm++2m".to_owned()), |n| n.to_str().map(str::to_owned));
    let sampler = sampler::find(&name.unwrap_or_default())?;
    let steps = arguments.next().and_then(|n| n.to_str()?.parse().ok());
    let pipeline = Pipeline::open(&checkpoint)?;
    if pipeline.classes() != Some(10) || pipeline.shape().channels != 1 {
        return Err(usage("the run must be trained on the built-in digits with their classes"));
    }

    // Digits with other seeds than the run's training data.
    let side = pipeline.shape().height;
    let (digits, others) = (Digits::new(1001, side, 10_000)?, Digits::new(1002, side, 2_000)?);
    let mut classifier = Classifier::new(side)?;
    for step in 0..STEPS {
        classifier.train_step(&digits, step as usize * BATCH, step)?;
    }
    let mut correct = 0;
    for first in (0..others.len()).step_by(BATCH) {
        let (images, labels) = batch(&others, first)?;
        correct += classifier.classify(&images)?.iter().zip(&labels).filter(|(a, b)| a == b).count();
    }
    println!(
        "the classifier is right for {:.1} % of {} new digits",
        100.0 * correct as f64 / others.len() as f64,
        others.len()
    );

    for scale in [0.0, 1.0, 2.0, 3.0, 5.0] {
        let guidance = Guidance { scale, ..Guidance::default() };
        let sampling = SamplerOptions { sampler, steps, ..SamplerOptions::default() };
        let request =
            SampleRequest { count: SAMPLES, seed: 5, guidance, sampling, ..SampleRequest::default() };
        let samples = pipeline.sample(request)?;
        let mut correct = 0;
        for (k, images) in samples.chunks(BATCH).enumerate() {
            let values: Vec<f32> =
                images.iter().flat_map(|p| p.data.iter().map(|v| f32::from(*v) / 127.5 - 1.0)).collect();
            let predicted = classifier.classify(&values)?;
            correct +=
                predicted.iter().enumerate().filter(|&(i, &class)| class == (k * BATCH + i) % 10).count();
        }
        println!("guidance {scale}: {:.1} % of {SAMPLES} samples", 100.0 * correct as f64 / SAMPLES as f64);
    }
    Ok(())
}
