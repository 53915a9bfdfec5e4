//! Samplers with their batches in device memory, against the host's arithmetic with the same network on the same device.
//!
//! Both perform the same operations in f64 with the same rounding, so results differ only where the device's logarithm, sine or
//! exponential differs in the last bit of f64 and that changes a rounding to f32: rarely, by 6e-8 of a value. After several steps
//! the difference stays below 1e-6 of a batch's largest value.

use ddpm::denoiser::{ConditionalDenoiser, Denoiser};
use ddpm::edit::{Inversion, RePaint};
use ddpm::guidance::{Guidance, Guided};
use ddpm::model::Model;
use ddpm::nets::{Builder, ConvLayer, Inputs, Network};
use ddpm::process::Prediction;
use ddpm::sampler::{
    Levels, NoiseKey, SAMPLERS, SampleStep, SamplerOptions, Spacing, Threshold, Variance, find,
};
use ddpm::schedule::Schedule;
use ddpm_engine::ops::{RandomNormal, SinusoidalEmbedding};
use ddpm_engine::{
    BufferId, BufferSpec, ComputeOptions, Device, Executor, Graph, PlanBuffers, PlanOptions, RngKey, Tensor,
};
use ddpm_rng::Purpose;

const TOLERANCE: f32 = 1e-6;
/// Images whose size is not a multiple of four.
const SHAPE: [usize; 4] = [3, 5, 5, 1];
const SEEDS: NoiseKey = NoiseKey { seed: 0x1234_5678_9abc, first: 7 };
const STEPS: usize = 5;

/// A network of two convolutions, conditioned on the timestep and optionally on classes.
struct Tiny {
    learned_variance: bool,
    classes: Option<usize>,
}

const PLAIN: Tiny = Tiny { learned_variance: false, classes: None };

impl Network for Tiny {
    fn name(&self) -> &'static str {
        "tiny"
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

    fn classes(&self) -> Option<usize> {
        self.classes
    }

    fn build(&self, b: &mut Builder, Inputs { x, t, label }: Inputs) -> ddpm::Result<Tensor> {
        let t = b.time_embedding(t, SinusoidalEmbedding { dim: 8, shift: 0.0, cosines_first: false })?;
        let t = b.add_class(t, label, self.classes)?;
        let x = b.conv("in", x, ConvLayer::new(8, 3))?;
        let x = b.add_per_channel("time", x, t)?;
        let x = b.silu("time", x)?;
        b.conv("out", x, ConvLayer::new(self.out_channels(), 3))
    }
}

fn schedule() -> Schedule {
    Schedule::linear(100, 1e-3, 0.1).expect("a schedule")
}

fn model(device: &dyn Device, net: &Tiny, prediction: Prediction) -> Model {
    let mut model =
        Model::on(device, net, SHAPE, ComputeOptions::default()).expect("a model").predicting(prediction);
    model.init_weights(3).expect("weights");
    model
}

/// The same network, accessed through host memory.
struct ViaHost<'a>(&'a mut dyn Denoiser);

impl Denoiser for ViaHost<'_> {
    fn batch(&self) -> usize {
        self.0.batch()
    }

    fn image_len(&self) -> usize {
        self.0.image_len()
    }

    fn prediction(&self) -> Prediction {
        self.0.prediction()
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> ddpm::diffusion::Result<()> {
        self.0.predict(x_t, t, output)
    }

    fn variance(&self) -> Option<&[f32]> {
        self.0.variance()
    }
}

/// The images of every step, and the result.
type Seen = Vec<Vec<f32>>;

type SampleFn<'a> = &'a dyn Fn(
    &mut dyn Denoiser,
    &mut dyn FnMut(SampleStep<'_>) -> ddpm::diffusion::Result<()>,
) -> ddpm::diffusion::Result<Vec<f32>>;

fn seen(denoiser: &mut dyn Denoiser, sample: SampleFn<'_>) -> Seen {
    let mut all = Vec::new();
    let end = sample(denoiser, &mut |step| {
        all.extend([step.x.to_vec(), step.x_0.to_vec()]);
        Ok(())
    });
    all.push(end.expect("images"));
    all
}

/// Compares the two implementations.
fn compare(what: &str, denoiser: &mut dyn Denoiser, sample: SampleFn<'_>) {
    assert!(denoiser.as_device_denoiser().is_some(), "{what}: the network does not offer device buffers");
    let (got, want) = (seen(denoiser, sample), seen(&mut ViaHost(denoiser), sample));
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(largest.is_finite() && largest > 0.0, "{what}: batch {i} is degenerate");
        let worst = got.iter().zip(want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
        assert!(
            worst <= TOLERANCE * largest && !got.iter().any(|g| g.is_nan()),
            "{what}: batch {i} off by {worst:e}"
        );
    }
}

fn compare_options(what: &str, denoiser: &mut dyn Denoiser, options: SamplerOptions) {
    let sampler = options.build(&schedule(), denoiser.prediction()).expect("a sampler");
    compare(what, denoiser, &|denoiser, on_step| sampler.sample(denoiser, SEEDS, on_step));
}

/// Every registered sampler; thresholds and predictions alternate.
pub fn every_sampler(device: &dyn Device) {
    let mut models = Prediction::ALL.map(|prediction| model(device, &PLAIN, prediction));
    let thresholds = [Threshold::Clip, Threshold::Dynamic, Threshold::None];
    for (i, sampler) in SAMPLERS.iter().enumerate() {
        for j in 0..if sampler.name == "ddim" { 3 } else { 1 } {
            let threshold = thresholds[(i + j) % 3];
            let eta = sampler.eta.map(|_| 0.7);
            let options = SamplerOptions {
                sampler,
                steps: Some(STEPS),
                threshold: Some(threshold),
                eta,
                ..SamplerOptions::default()
            };
            let model = &mut models[(i + i / 3 + j) % 3];
            let what = format!("{} with {} and {}", sampler.name, threshold.name(), model.prediction());
            compare_options(&what, model, options);
        }
    }
}

/// From zero terminal SNR, where a v output is the negative image.
pub fn from_zero_snr(device: &dyn Device) {
    let schedule = schedule().zero_terminal_snr().expect("a schedule");
    for prediction in [Prediction::X0, Prediction::V] {
        let mut model = model(device, &PLAIN, prediction);
        for sampler in SAMPLERS.iter().filter(|sampler| sampler.handles_zero_snr) {
            let (steps, spacing) = (Some(2), Some(Spacing::Trailing));
            let options = SamplerOptions {
                sampler,
                steps,
                spacing,
                threshold: Some(Threshold::None),
                ..SamplerOptions::default()
            };
            let built = options.build(&schedule, prediction).expect("a sampler");
            let what = format!("{} from no signal with {prediction}", sampler.name);
            compare(&what, &mut model, &|denoiser, on_step| built.sample(denoiser, SEEDS, on_step));
        }
    }
}

/// Guidance within an interval, without and with a class per image, and a learned variance.
pub fn classes_and_variance(device: &dyn Device) {
    let mut model = model(device, &Tiny { learned_variance: true, classes: Some(3) }, Prediction::Eps);
    let schedule = schedule();
    let all = (0.0, f64::INFINITY);
    for (scale, interval) in [(0.0, all), (1.0, all), (3.0, all), (3.0, (0.2, 1.0))] {
        let labels = vec![Some(2), None, Some(0)];
        let mut guided = Guided::new(&mut model, &schedule, labels, Guidance { scale, interval });
        let options = SamplerOptions { steps: Some(STEPS), ..SamplerOptions::default() };
        compare_options(&format!("guidance {scale} in {interval:?}"), &mut guided, options);
    }
    for variance in [Variance::Small, Variance::Large, Variance::Learned] {
        let options =
            SamplerOptions { steps: Some(STEPS), variance: Some(variance), ..SamplerOptions::default() };
        model.set_labels(&[None; 3]).expect("labels");
        compare_options(variance.name(), &mut model, options);
    }
}

/// Procedures that start from images and modify batches on the host.
pub fn editing(device: &dyn Device) {
    let mut model = model(device, &PLAIN, Prediction::V);
    let image: Vec<f32> = (0..25).map(|i| (i as f32 * 0.7).sin()).collect();
    let levels = Levels::new(&schedule(), Prediction::V, Some(4), Spacing::Linspace).expect("levels");
    let (variance, threshold) = (None, Threshold::Clip);
    let repaint = RePaint { levels: levels.clone(), jump: 1, resamplings: 2, variance, threshold };
    let unknown: Vec<bool> = (0..25).map(|i| i % 3 == 0).collect();
    compare("filling", &mut model, &|denoiser, on_step| {
        repaint.fill(denoiser, SEEDS, &image, &unknown, on_step)
    });
    let inversion = Inversion { levels, iterations: 2, tolerance: 0.0 };
    let batch = image.repeat(3);
    compare("inversion", &mut model, &|denoiser, on_step| inversion.invert(denoiser, &batch, on_step));
    let options =
        SamplerOptions { sampler: find("ddim").expect("there"), steps: Some(2), ..SamplerOptions::default() };
    let ddim = options.build(&schedule(), Prediction::V).expect("a sampler");
    compare("going on", &mut model, &|denoiser, on_step| {
        ddim.sample_from(Some(&batch), denoiser, SEEDS, on_step)
    });
}

/// Samples without observing any step; `on_step` is still called after each.
pub fn unobserved(device: &dyn Device, on_step: &mut dyn FnMut()) -> Vec<f32> {
    let schedule = schedule();
    let mut model = model(device, &Tiny { learned_variance: true, classes: Some(3) }, Prediction::Eps);
    let guidance = Guidance { scale: 2.0, ..Guidance::default() };
    let mut guided = Guided::new(&mut model, &schedule, vec![Some(1); 3], guidance);
    let threshold = Some(Threshold::Dynamic);
    let options = SamplerOptions { steps: Some(STEPS), threshold, ..SamplerOptions::default() };
    let sampler = options.build(&schedule, Prediction::Eps).expect("a sampler");
    let on_step = &mut |_: SampleStep<'_>| {
        on_step();
        Ok(())
    };
    sampler.sample(&mut guided, SEEDS, on_step).expect("images")
}

/// Buffers beside a trivial plan.
fn buffers(device: &dyn Device, images: usize, len: usize) -> Box<dyn Executor> {
    let mut graph = Graph::new();
    let op = RandomNormal { shape: [1].into(), purpose: Purpose::Test };
    let outputs = vec![graph.add("z", op, &[]).expect("a tensor")];
    let of = BufferSpec { count: 3, shape: [images, len].into() };
    let options = PlanOptions { outputs, sampler_buffers: Some(of), ..PlanOptions::default() };
    let exec = device.executor(graph.clone(), &options).expect("an executor");
    let footprint = device.footprint(graph.clone(), &options).expect("a footprint");
    let without = PlanOptions { sampler_buffers: None, ..options };
    let without = device.footprint(graph, &without).expect("a footprint");
    assert_eq!(footprint, exec.footprint());
    assert!(footprint.arena_bytes >= without.arena_bytes + 3 * images * len * 4, "buffers are counted");
    exec
}

/// Thresholds, bit by bit against sorting, with ties, zeros, infinities and NaN.
pub fn thresholds(device: &dyn Device) {
    for len in [1, 7, 1000] {
        let hostile = |i: usize| match i % 97 {
            3 => f32::NAN,
            10 => f32::INFINITY,
            11 => -0.0,
            _ => 0.5,
        };
        let images = [
            (0..len).map(|i| ((i * 37 % len) as f32 - 3.0) / 5.0).collect::<Vec<_>>(),
            (0..len).map(|i| 2.5 * (i as f32).sin()).collect(),
            (0..len).map(hostile).collect(),
            vec![-3.0; len],
        ];
        let mut exec = buffers(device, images.len(), len);
        let buffers = exec.sampler_buffers().expect("buffers were requested");
        for quantile in [None, Some(0.995), Some(0.5), Some(0.0), Some(1.0)] {
            buffers.write(BufferId(1), &images.concat()).expect("written");
            buffers.threshold(BufferId(1), quantile).expect("launched");
            let mut got = vec![0.0; images.len() * len];
            buffers.read(BufferId(1), &mut got).expect("read");
            for (i, (image, got)) in images.iter().zip(got.chunks(len)).enumerate() {
                let mut magnitudes: Vec<f32> = image.iter().map(|x| x.abs()).collect();
                magnitudes.sort_by(f32::total_cmp);
                let limit = quantile.map_or(1.0, |quantile| {
                    let at = quantile * (len - 1) as f64;
                    let (low, high) = (magnitudes[at.floor() as usize], magnitudes[at.ceil() as usize]);
                    (low + (high - low) * at.fract() as f32).max(1.0)
                });
                for (&x, &got) in image.iter().zip(got) {
                    let want = x.clamp(-limit, limit) / limit;
                    let same = want.to_bits() == got.to_bits() || (want.is_nan() && got.is_nan());
                    assert!(same, "image {i} of {len}, {quantile:?}: {x} became {got}, not {want}");
                }
            }
        }
    }
}

/// Normal samples for both purposes, linear combinations of all lengths, and partial writes.
pub fn arithmetic(device: &dyn Device) {
    let mut exec = buffers(device, 3, 25);
    let all = exec.sampler_buffers().expect("buffers were requested");
    let read = |all: &mut dyn PlanBuffers, v| {
        let mut values = vec![0.0; 75];
        all.read(v, &mut values).expect("read");
        values
    };
    for (purpose, step) in [(Purpose::SampleStart, 0), (Purpose::SampleNoise, 41)] {
        let key = RngKey { seed: SEEDS.seed, step, first_index: SEEDS.first };
        all.normal(BufferId(0), key, purpose).expect("launched");
        let mut want = vec![0.0; 75];
        SEEDS.fill(purpose, step, 25, &mut want);
        for (got, want) in read(all, BufferId(0)).into_iter().zip(want) {
            assert!((got - want).abs() <= 1.2e-7 * want.abs(), "{got} is not {want}");
        }
    }
    let (a, b) = (read(all, BufferId(0)), [0.1f32, -7.0, 3.3]);
    all.copy(BufferId(1), BufferId(0)).expect("launched");
    all.write(BufferId(1), &b).expect("written");
    assert_eq!(read(all, BufferId(1))[..4], [b[0], b[1], b[2], a[3]]);
    let term = |c: f64, x: f32| c * f64::from(x);
    all.linear_combination(BufferId(2), &[(0.3, BufferId(0)), (1.7, BufferId(1))], 0.77).expect("launched");
    let mixed = read(all, BufferId(2));
    for i in 0..3 {
        assert_eq!(mixed[i], ((term(0.3, a[i]) + term(1.7, b[i])) / 0.77) as f32, "to the bit");
    }
    let (c, v) = ([0.9, -0.4, 0.2, 1.1], [BufferId(2), BufferId(0), BufferId(1), BufferId(1)]);
    all.linear_combination(BufferId(2), &[0, 1, 2, 3].map(|i| (c[i], v[i])), 1.0).expect("launched");
    for (i, got) in read(all, BufferId(2))[..3].iter().enumerate() {
        let sum = term(c[0], mixed[i]) + term(c[1], a[i]) + term(c[2], b[i]) + term(c[3], b[i]);
        assert_eq!(*got, sum as f32, "to the bit");
    }
    all.linear_combination(BufferId(2), &[], 1.0).expect("launched");
    assert_eq!(read(all, BufferId(2)), [0.0; 75]);
}
