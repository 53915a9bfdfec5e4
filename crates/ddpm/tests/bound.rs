//! The variational bound on numbers from a normal, whose best denoiser is known: every term has a closed form, and with the
//! exact variance the bound is the entropy.

use ddpm::Result;
use ddpm::bound::{Bound, Estimate, Measure, Options};
use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::sampler::{Threshold, Variance};
use ddpm::schedule::Schedule;
use ddpm_engine::rng::{Purpose, Stream};
use std::f64::consts::LN_2;

const TIMESTEPS: usize = 40;
const BETAS: (f64, f64) = (1e-3, 0.2);
/// Mean and deviation of the numbers: they stay within black and white.
const MEAN: f64 = 0.1;
const DEVIATION: f64 = 0.2;
const IMAGES: usize = 64;
const NUMBERS: usize = 256;
/// Standard errors that a mean may be off by.
const ERRORS: f64 = 5.0;

/// A chain's numbers at a timestep, as the paper's formulas say, from the betas alone.
struct At {
    alpha_bar: f64,
    beta: f64,
    beta_tilde: f64,
    /// What the posterior's mean multiplies `x_0` by.
    of_x_0: f64,
    /// The variance of `x_0` given `x_t`.
    left: f64,
}

fn at(t: usize) -> At {
    let beta = |t: usize| BETAS.0 + (BETAS.1 - BETAS.0) * t as f64 / (TIMESTEPS - 1) as f64;
    let bar = |t: usize| (0..t).map(|s| 1.0 - beta(s)).product::<f64>();
    let (before, alpha_bar, beta) = (bar(t), bar(t + 1), beta(t));
    let s = DEVIATION * DEVIATION;
    At {
        alpha_bar,
        beta,
        beta_tilde: (1.0 - before) / (1.0 - alpha_bar) * beta,
        of_x_0: before.sqrt() * beta / (1.0 - alpha_bar),
        left: s * (1.0 - alpha_bar) / (alpha_bar * s + 1.0 - alpha_bar),
    }
}

impl At {
    /// The variance of `x_{t-1}` given `x_t`.
    fn exact(&self) -> f64 {
        self.beta_tilde + self.of_x_0 * self.of_x_0 * self.left
    }
}

/// The smaller and the larger variance that a step may have; the first one's smaller one is the second's.
fn bounds(t: usize) -> (f64, f64) {
    (at(t.max(1)).beta_tilde, at(t).beta)
}

/// Knows the normal.
struct Normal {
    prediction: Prediction,
    /// Whether it tells the exact variance.
    tells: bool,
    variance: Vec<f32>,
}

impl Normal {
    fn new(prediction: Prediction, tells: bool) -> Self {
        Self { prediction, tells, variance: vec![0.0; IMAGES * NUMBERS] }
    }
}

impl Denoiser for Normal {
    fn batch(&self) -> usize {
        IMAGES
    }

    fn image_len(&self) -> usize {
        NUMBERS
    }

    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> Result<()> {
        let now = at(t as usize);
        let (a, s) = (now.alpha_bar.sqrt(), (1.0 - now.alpha_bar).sqrt());
        for (output, &x) in output.iter_mut().zip(x_t) {
            let x = f64::from(x);
            let gain = a * DEVIATION * DEVIATION / (now.alpha_bar * DEVIATION * DEVIATION + s * s);
            let x_0 = MEAN + gain * (x - a * MEAN);
            let eps = (x - a * x_0) / s;
            *output = match self.prediction {
                Prediction::Eps => eps,
                Prediction::X0 => x_0,
                Prediction::V => a * eps - s * x_0,
            } as f32;
        }
        let (low, high) = bounds(t as usize);
        let exact = if t == 0.0 { now.left } else { now.exact() };
        self.variance.fill((2.0 * (exact / low).ln() / (high / low).ln() - 1.0) as f32);
        Ok(())
    }

    fn variance(&self) -> Option<&[f32]> {
        self.tells.then_some(&self.variance)
    }
}

fn images(seed: u64) -> Vec<f32> {
    let mut x = vec![0.0; IMAGES * NUMBERS];
    Stream::new(seed, Purpose::Test, 0, 0).fill_normal(&mut x);
    x.into_iter().map(|z| (MEAN + DEVIATION * f64::from(z)) as f32).collect()
}

fn measure(prediction: Prediction, tells: bool, options: Options) -> Bound {
    let schedule = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).expect("a schedule");
    let options = Options { threshold: Threshold::None, ..options };
    let mut measure = Measure::new(&schedule, prediction, options).expect("options that are fine");
    let mut denoiser = Normal::new(prediction, tells);
    measure.add(&mut denoiser, &images(options.seed), &mut || Ok(())).expect("a measurement");
    measure.finish()
}

/// The integral of f over a normal of this variance (trapezoids, which are exact for these).
fn expected(variance: f64, f: impl Fn(f64) -> f64) -> f64 {
    const HALF: i32 = 400;
    let z = |i: i32| f64::from(i) * 8.0 / f64::from(HALF);
    let weight = |i: i32| (-0.5 * z(i) * z(i)).exp();
    let total: f64 = (-HALF..=HALF).map(weight).sum();
    (-HALF..=HALF).map(|i| weight(i) * f(z(i) * variance.sqrt())).sum::<f64>() / total
}

/// The expected term of timestep t with a variance, in bits, and its standard deviation.
fn term(t: usize, variance: f64) -> (f64, f64) {
    let now = at(t);
    let moments = |f: &dyn Fn(f64) -> f64| {
        let mean = expected(now.left, f);
        (mean / LN_2, expected(now.left, |e| (f(e) - mean).powi(2)).sqrt() / LN_2)
    };
    if t == 0 {
        let below = |x: f64| 0.5 * libm::erfc(-x / (2.0 * variance).sqrt());
        return moments(&|e| -(below(1.0 / 255.0 - e.abs()) - below(-1.0 / 255.0 - e.abs())).max(1e-12).ln());
    }
    // Of normals with variances q and p.
    let kl = |difference: f64, q: f64, p: f64| 0.5 * ((p / q).ln() + (q + difference * difference) / p - 1.0);
    moments(&|e| kl(now.of_x_0 * e, now.beta_tilde, variance))
}

fn prior() -> f64 {
    let a = at(TIMESTEPS - 1).alpha_bar;
    let square = MEAN * MEAN + DEVIATION * DEVIATION;
    0.5 * (-(1.0 - a).ln() + 1.0 - a + a * square - 1.0) / LN_2
}

#[track_caller]
fn near(what: &str, got: Estimate, want: f64, liveness_slack: f64) {
    let error = got.standard_error.expect("a standard error");
    assert!((got.mean - want).abs() < ERRORS * error + liveness_slack, "{what}: {got:?}, not {want}");
}

#[test]
fn every_term_and_its_standard_error_have_their_closed_forms() {
    for prediction in Prediction::ALL {
        for (variance, tells) in [
            (Some(Variance::Small), false),
            (Some(Variance::Large), true),
            (Some(Variance::Learned), true),
            (None, false),
            (None, true),
        ] {
            let bound = measure(prediction, tells, Options { variance, seed: 3, ..Options::default() });
            assert_eq!((bound.timesteps, bound.terms.len(), bound.images), (TIMESTEPS, TIMESTEPS, IMAGES));
            let mut sum = 0.0;
            for (t, got) in bound.terms.iter().enumerate() {
                let variance = match (variance, tells) {
                    (Some(Variance::Learned), _) | (None, true) if t == 0 => at(0).left,
                    (Some(Variance::Learned), _) | (None, true) => at(t).exact(),
                    (Some(Variance::Large), _) if t > 0 => at(t).beta,
                    _ => bounds(t).0,
                };
                let (want, deviation) = term(t, variance);
                let what = format!("{prediction}, {variance:?}, t = {t}");
                near(&what, got.bits, want, 1e-6);
                // 64 images tell their own deviation to a tenth.
                let error = deviation / ((IMAGES * NUMBERS) as f64).sqrt();
                let ratio = got.bits.standard_error.unwrap() / error;
                assert!((0.6..1.5).contains(&ratio), "{what}: standard error {ratio} times");
                let left = at(t).left;
                assert!((got.x_0_error / left - 1.0).abs() < 0.06, "{what}: {} of {left}", got.x_0_error);
                let left = left * at(t).alpha_bar / (1.0 - at(t).alpha_bar);
                assert!((got.eps_error / left - 1.0).abs() < 0.06, "{what}: {} of {left}", got.eps_error);
                sum += want;
            }
            near("prior", bound.prior, prior(), 0.0);
            near("total", bound.total, sum + prior(), 1e-5);
            let parts = bound.prior.mean + bound.steps.mean + bound.decoder.mean;
            assert!((bound.total.mean - parts).abs() < 1e-12);
        }
    }
}

#[test]
fn with_the_exact_variance_the_bound_is_the_entropy() {
    let bound = measure(Prediction::V, true, Options::default());
    let levels = (255.0 / 2.0f64).log2();
    let entropy = 0.5 * (std::f64::consts::TAU * std::f64::consts::E * DEVIATION * DEVIATION).log2() + levels;
    // What the prior does not know of x_T.
    let (a, s) = (at(TIMESTEPS - 1).alpha_bar, DEVIATION * DEVIATION);
    let variance = a * s + 1.0 - a;
    let more = 0.5 * (variance + a * MEAN * MEAN - 1.0 - variance.ln()) / LN_2;
    near("total", bound.total, entropy + more, 1e-3);
    assert!(bound.total.standard_error.unwrap() < 0.02, "{:?}", bound.total);
    // Fixed variances tell less.
    for variance in [Variance::Small, Variance::Large] {
        let loose = measure(Prediction::V, true, Options { variance: Some(variance), ..Options::default() });
        assert!(loose.total.mean > bound.total.mean + 0.05, "{variance:?}: {:?}", loose.total);
    }
}

#[test]
fn a_part_of_the_terms_estimates_the_sum_of_all_without_bias() {
    let want: f64 = (0..TIMESTEPS).map(|t| term(t, bounds(t).0).0).sum::<f64>() + prior();
    let schedule = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).unwrap();
    let mut errors = Vec::new();
    for terms in [6, 18, TIMESTEPS - 2] {
        let options = Options { terms: Some(terms), threshold: Threshold::None, ..Options::default() };
        let mut measure = Measure::new(&schedule, Prediction::Eps, options).unwrap();
        assert_eq!(measure.asked(), terms + 1);
        let mut denoiser = Normal::new(Prediction::Eps, false);
        for i in 0..40 {
            // The last batches are smaller.
            let n = if i < 30 { 8 } else { 3 };
            measure.add(&mut denoiser, &images(i)[..n * NUMBERS], &mut || Ok(())).unwrap();
        }
        let bound = measure.finish();
        assert_eq!((bound.images, bound.terms_measured), (270, terms));
        near(&format!("{terms} terms"), bound.total, want, 0.0);
        let error = bound.total.standard_error.unwrap();
        errors.push(error);
    }
    assert!(errors[0] > errors[2] && errors[0] < 0.2 * want, "{errors:?}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let schedule = Schedule::linear(10, 1e-3, 0.2).unwrap();
    for terms in [0, 10, usize::MAX] {
        let options = Options { terms: Some(terms), ..Options::default() };
        let error = Measure::new(&schedule, Prediction::Eps, options).err().expect("refused").to_string();
        assert!(error.contains("give 1 to 9"), "{error}");
    }
    let options = Options { variance: Some(Variance::Learned), ..Options::default() };
    let schedule = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).unwrap();
    let mut measure = Measure::new(&schedule, Prediction::Eps, options).unwrap();
    let mut denoiser = Normal::new(Prediction::Eps, false);
    let error = measure.add(&mut denoiser, &images(0), &mut || Ok(())).unwrap_err().to_string();
    assert!(error.contains("no variance") && error.contains("small or large"), "{error}");
}

#[test]
fn chains_that_leave_nothing_of_the_image_end_where_sampling_begins() {
    let zero = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).unwrap().zero_terminal_snr().unwrap();
    let chain = |prediction| Measure::new(&zero, prediction, Options::default()).unwrap().asked();
    assert_eq!([Prediction::Eps, Prediction::X0, Prediction::V].map(chain), [39, 40, 40]);
    let one = Schedule::linear(1, 0.5, 0.6).unwrap();
    let mut measure = Measure::new(&one, Prediction::V, Options::default()).unwrap();
    measure.add(&mut Normal::new(Prediction::V, false), &images(0), &mut || Ok(())).unwrap();
    let bound = measure.finish();
    assert!(bound.total.mean.is_finite() && bound.steps.mean == 0.0 && bound.terms.len() == 1);
}
