//! The loss of every objective compared with its closed form, for an identity network.

use ddpm::Result;
use ddpm::model::{NoiseSource, TrainingGraph};
use ddpm::nets::{Builder, ConvLayer, Inputs, Network};
use ddpm::objective::{Objective, Weighting};
use ddpm::process::Prediction;
use ddpm::schedule::Schedule;
use ddpm_engine::ops::Loss;
use ddpm_engine::{Device, Region, RngKey, Tensor};
use ddpm_engine_cpu::CpuDevice;
use ddpm_rng::{Purpose, Stream};

/// Relative error of an f32 loss, with weights up to 1e3: a few rounding errors.
const TOLERANCE: f64 = 1e-5;
const SHAPE: [usize; 4] = [3, 4, 2, 2];
const SEED: u64 = 5;

/// Predicts the noisy image, and as its variance minus half of it.
struct Identity {
    learned_variance: bool,
}

impl Network for Identity {
    fn name(&self) -> &'static str {
        "identity"
    }

    fn channels(&self) -> usize {
        SHAPE[3]
    }

    fn learned_variance(&self) -> bool {
        self.learned_variance
    }

    fn size_factor(&self) -> usize {
        1
    }

    fn build(&self, b: &mut Builder, Inputs { x, .. }: Inputs) -> Result<Tensor> {
        b.conv("identity", x, ConvLayer::new(self.out_channels(), 1))
    }
}

const TIMESTEPS: usize = 10;

fn schedule() -> Schedule {
    Schedule::linear(TIMESTEPS, 1e-2, 0.4).expect("a schedule")
}

/// One element's term of the variational bound in bits (Ho et al. 2020, eq. 5 and 13; Nichol, Dhariwal 2021,
/// eq. 15).
fn bound(t: usize, x_0: f64, mean: f64, v: f64) -> f64 {
    let s = schedule();
    let tilde = |t: usize| (1.0 - s.alpha_bar_prev(t)) / (1.0 - s.alpha_bar(t)) * s.beta(t);
    let low = tilde(t.max(1));
    let variance = (low.ln() * (1.0 - v) / 2.0 + s.beta(t).ln() * (1.0 + v) / 2.0).exp();
    let nats = if t == 0 {
        let below = |x: f64| 0.5 * libm::erfc((mean - x) / (2.0 * variance).sqrt());
        let from = if x_0 < -0.999 { 0.0 } else { below(x_0 - 1.0 / 255.0) };
        let to = if x_0 > 0.999 { 1.0 } else { below(x_0 + 1.0 / 255.0) };
        -(to - from).max(1e-12).ln()
    } else {
        let difference = s.alpha_bar_prev(t).sqrt() * s.beta(t) / (1.0 - s.alpha_bar(t)) * (x_0 - mean);
        0.5 * ((variance / low).ln() + (low + difference * difference) / variance - 1.0)
    };
    nats / std::f64::consts::LN_2
}

fn normal(purpose: Purpose, step: u32, image: usize, len: usize) -> Vec<f64> {
    let mut z = vec![0.0; len];
    Stream::new(SEED, purpose, step, image as u32).fill_normal(&mut z);
    z.into_iter().map(f64::from).collect()
}

/// The loss that the graph computes in step 4 of seed 5, and its closed form.
fn losses(objective: Objective, learned_variance: bool) -> (f64, f64) {
    let net = Identity { learned_variance };
    let graph = TrainingGraph::with_objective(&net, &schedule(), SHAPE, NoiseSource::Random, objective);
    let graph = graph.expect("a graph");
    let mut options = graph.options(false);
    options.outputs.push(graph.t);
    let mut exec = CpuDevice { threads: 1 }.executor(graph.graph.clone(), &options).expect("an executor");
    let weights: &[f32] =
        if learned_variance { &[1.0, 0.0, -0.5, 0.0, 0.0, 1.0, 0.0, -0.5] } else { &[1.0, 0.0, 0.0, 1.0] };
    exec.write_parameter(Region::Weights, 0, weights).expect("weights");
    exec.write_parameter(Region::Weights, 1, &vec![0.0; net.out_channels()]).expect("a bias");
    let (images, channels) = (SHAPE[0], SHAPE[3]);
    let len = SHAPE.iter().product::<usize>() / images;
    let x_0: Vec<f32> = (0..images * len).map(|i| ((i * 7 % 13) as f32 - 6.0) / 6.0).collect();
    exec.write(graph.x_0, &x_0).expect("images");
    exec.run(RngKey { seed: SEED, step: 4, first_index: 0 }).expect("a step");
    let (mut loss, mut t) = ([0.0], vec![0.0; images]);
    exec.read(graph.loss, &mut loss).expect("kept");
    exec.read(graph.t, &mut t).expect("kept");

    let mut want = 0.0;
    for i in 0..images {
        let level = schedule().level(f64::from(t[i]));
        let eps = normal(Purpose::Noise, 4, i, len);
        let offset = normal(Purpose::OffsetNoise, 4, i, channels);
        let perturbation = normal(Purpose::InputPerturbation, 4, i, len);
        for j in 0..len {
            let x_0 = f64::from(x_0[i * len + j]);
            let noise = eps[j] + objective.offset_noise * offset[j % channels];
            let x_t =
                level.alpha * x_0 + level.sigma * (noise + objective.input_perturbation * perturbation[j]);
            let d = x_t - objective.prediction.target(level, x_0, noise);
            let loss = if objective.loss == Loss::L1 { d.abs() } else { d * d };
            want += objective.weight(level) * loss / (images * len) as f64;
            if learned_variance {
                let mean = objective.prediction.x_0(level, x_t, x_t);
                let term = bound(t[i] as usize, x_0, mean, -0.5 * x_t);
                want += objective.vlb_weight * TIMESTEPS as f64 * term / (images * len) as f64;
            }
        }
    }
    (f64::from(loss[0]), want)
}

#[test]
fn every_objective_matches_its_closed_form() {
    let weightings = [Weighting::Plain, Weighting::MinSnr, Weighting::P2, Weighting::SnrTruncated];
    let mut seen = Vec::new();
    for prediction in Prediction::ALL {
        for weighting in weightings {
            for loss in [Loss::Mse, Loss::L1] {
                for (offset_noise, input_perturbation) in [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)] {
                    let objective = Objective {
                        prediction,
                        loss,
                        weighting,
                        offset_noise,
                        input_perturbation,
                        ..Objective::default()
                    };
                    let (got, want) = losses(objective, false);
                    assert!((got / want - 1.0).abs() < TOLERANCE, "{objective:?}: {got}, not {want}");
                    seen.push(got);
                }
            }
        }
    }
    seen.sort_unstable_by(f64::total_cmp);
    assert!(seen.windows(2).all(|w| w[0] != w[1]), "every setting has an effect");
}

#[test]
fn the_hybrid_loss_adds_the_bound() {
    for prediction in Prediction::ALL {
        for (weighting, vlb_weight) in
            [(Weighting::Plain, 0.001), (Weighting::MinSnr, 0.5), (Weighting::Plain, 0.0)]
        {
            let objective = Objective { prediction, weighting, vlb_weight, ..Objective::default() };
            let (got, want) = losses(objective, true);
            assert!((got / want - 1.0).abs() < TOLERANCE, "{objective:?}: {got}, not {want}");
            let (simple, _) = losses(objective, false);
            assert_eq!(got == simple, vlb_weight == 0.0, "{objective:?}: {got}, {simple}");
        }
    }
}
