//! The variational bound on normal data, whose optimal denoiser is known: every term has a closed form, and
//! with the exact variance the bound equals the entropy.

use ddpm::denoiser::Denoiser;
use ddpm::process::Prediction;
use ddpm::sampler::{Threshold, Variance};
use ddpm::schedule::Schedule;
use ddpm::vlb::{Estimate, Vlb, VlbEstimator, VlbOptions};
use ddpm_rng::{Purpose, Stream};
use std::f64::consts::LN_2;

const TIMESTEPS: usize = 40;
const BETAS: (f64, f64) = (1e-3, 0.2);
/// Mean and standard deviation of the data, which stays between black and white.
const MEAN: f64 = 0.1;
const DEVIATION: f64 = 0.2;
const IMAGES: usize = 64;
const LEN: usize = 256;
/// Allowed deviation of a mean, in standard errors.
const ERRORS: f64 = 5.0;

/// The chain's coefficients at a timestep, by the paper's formulas from the betas alone.
struct At {
    alpha_bar: f64,
    beta: f64,
    beta_tilde: f64,
    /// The coefficient of `x_0` in the posterior's mean.
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

/// The small and the large variance of a step; the first step's small one is the second's.
fn bounds(t: usize) -> (f64, f64) {
    (at(t.max(1)).beta_tilde, at(t).beta)
}

/// The optimal denoiser of the normal data.
struct Normal {
    prediction: Prediction,
    /// Whether it has the exact variance as its learned one.
    has_variance: bool,
    variance: Vec<f32>,
}

impl Normal {
    fn new(prediction: Prediction, has_variance: bool) -> Self {
        Self { prediction, has_variance, variance: vec![0.0; IMAGES * LEN] }
    }
}

impl Denoiser for Normal {
    fn batch(&self) -> usize {
        IMAGES
    }

    fn image_len(&self) -> usize {
        LEN
    }

    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn predict(&mut self, x_t: &[f32], t: f64, output: &mut [f32]) -> ddpm::diffusion::Result<()> {
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
        self.has_variance.then_some(&self.variance)
    }
}

fn images(seed: u64) -> Vec<f32> {
    let mut x = vec![0.0; IMAGES * LEN];
    Stream::new(seed, Purpose::Test, 0, 0).fill_normal(&mut x);
    x.into_iter().map(|z| (MEAN + DEVIATION * f64::from(z)) as f32).collect()
}

fn estimate(prediction: Prediction, has_variance: bool, options: VlbOptions) -> Vlb {
    let schedule = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).expect("a schedule");
    let options = VlbOptions { threshold: Threshold::None, ..options };
    let mut estimator = VlbEstimator::new(&schedule, prediction, options).expect("valid options");
    let mut denoiser = Normal::new(prediction, has_variance);
    estimator.add(&mut denoiser, &images(options.seed), &mut || Ok(())).expect("a measurement");
    estimator.finish()
}

/// The integral of f over a normal of this variance (trapezoidal rule, exact for these to rounding).
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
    // KL divergence of normals with variances q and p.
    let kl = |difference: f64, q: f64, p: f64| 0.5 * ((p / q).ln() + (q + difference * difference) / p - 1.0);
    moments(&|e| kl(now.of_x_0 * e, now.beta_tilde, variance))
}

fn prior() -> f64 {
    let a = at(TIMESTEPS - 1).alpha_bar;
    let square = MEAN * MEAN + DEVIATION * DEVIATION;
    0.5 * (-(1.0 - a).ln() + 1.0 - a + a * square - 1.0) / LN_2
}

#[track_caller]
fn near(what: &str, got: Estimate, want: f64, slack: f64) {
    let error = got.standard_error.expect("a standard error");
    assert!((got.mean - want).abs() < ERRORS * error + slack, "{what}: {got:?}, not {want}");
}

#[test]
fn every_term_and_its_standard_error_have_their_closed_forms() {
    for prediction in Prediction::ALL {
        for (variance, has_variance) in [
            (Some(Variance::Small), false),
            (Some(Variance::Large), true),
            (Some(Variance::Learned), true),
            (None, false),
            (None, true),
        ] {
            let bound =
                estimate(prediction, has_variance, VlbOptions { variance, seed: 3, ..VlbOptions::default() });
            assert_eq!((bound.timesteps, bound.terms.len(), bound.images), (TIMESTEPS, TIMESTEPS, IMAGES));
            let mut sum = 0.0;
            for (t, got) in bound.terms.iter().enumerate() {
                let variance = match (variance, has_variance) {
                    (Some(Variance::Learned), _) | (None, true) if t == 0 => at(0).left,
                    (Some(Variance::Learned), _) | (None, true) => at(t).exact(),
                    (Some(Variance::Large), _) if t > 0 => at(t).beta,
                    _ => bounds(t).0,
                };
                let (want, deviation) = term(t, variance);
                let what = format!("{prediction}, {variance:?}, t = {t}");
                near(&what, got.bits, want, 1e-6);
                // The standard deviation estimated from 64 images is off by about a tenth.
                let error = deviation / ((IMAGES * LEN) as f64).sqrt();
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
            let strata = bound.prior.mean + bound.steps.mean + bound.decoder.mean;
            assert!((bound.total.mean - strata).abs() < 1e-12);
        }
    }
}

#[test]
fn with_the_exact_variance_the_bound_is_the_entropy() {
    let bound = estimate(Prediction::V, true, VlbOptions::default());
    let levels = (255.0 / 2.0f64).log2();
    let entropy = 0.5 * (std::f64::consts::TAU * std::f64::consts::E * DEVIATION * DEVIATION).log2() + levels;
    // KL divergence of x_T from the prior.
    let (a, s) = (at(TIMESTEPS - 1).alpha_bar, DEVIATION * DEVIATION);
    let variance = a * s + 1.0 - a;
    let prior_kl = 0.5 * (variance + a * MEAN * MEAN - 1.0 - variance.ln()) / LN_2;
    near("total", bound.total, entropy + prior_kl, 1e-3);
    assert!(bound.total.standard_error.unwrap() < 0.02, "{:?}", bound.total);
    // Fixed variances give a looser bound.
    for variance in [Variance::Small, Variance::Large] {
        let loose =
            estimate(Prediction::V, true, VlbOptions { variance: Some(variance), ..VlbOptions::default() });
        assert!(loose.total.mean > bound.total.mean + 0.05, "{variance:?}: {:?}", loose.total);
    }
}

#[test]
fn a_subset_of_the_terms_estimates_the_total_without_bias() {
    let want: f64 = (0..TIMESTEPS).map(|t| term(t, bounds(t).0).0).sum::<f64>() + prior();
    let schedule = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).unwrap();
    let mut errors = Vec::new();
    for terms in [6, 18, TIMESTEPS - 2] {
        let options = VlbOptions { terms: Some(terms), threshold: Threshold::None, ..VlbOptions::default() };
        let mut estimator = VlbEstimator::new(&schedule, Prediction::Eps, options).unwrap();
        assert_eq!(estimator.num_evals(), terms + 1);
        let mut denoiser = Normal::new(Prediction::Eps, false);
        for i in 0..40 {
            // The last batches are smaller.
            let n = if i < 30 { 8 } else { 3 };
            estimator.add(&mut denoiser, &images(i)[..n * LEN], &mut || Ok(())).unwrap();
        }
        let bound = estimator.finish();
        assert_eq!((bound.images, bound.terms_measured), (270, terms));
        near(&format!("{terms} terms"), bound.total, want, 0.0);
        let error = bound.total.standard_error.unwrap();
        errors.push(error);
    }
    assert!(errors[0] > errors[2] && errors[0] < 0.2 * want, "{errors:?}");
}

#[test]
fn invalid_options_are_refused() {
    let schedule = Schedule::linear(10, 1e-3, 0.2).unwrap();
    for terms in [0, 10, usize::MAX] {
        let options = VlbOptions { terms: Some(terms), ..VlbOptions::default() };
        let error =
            VlbEstimator::new(&schedule, Prediction::Eps, options).err().expect("refused").to_string();
        assert!(error.contains("give 1 to 9"), "{error}");
    }
    let options = VlbOptions { variance: Some(Variance::Learned), ..VlbOptions::default() };
    let schedule = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).unwrap();
    let mut estimator = VlbEstimator::new(&schedule, Prediction::Eps, options).unwrap();
    let mut denoiser = Normal::new(Prediction::Eps, false);
    let error = estimator.add(&mut denoiser, &images(0), &mut || Ok(())).unwrap_err().to_string();
    assert!(error.contains("no learned variance") && error.contains("small or large"), "{error}");
}

#[test]
fn chains_without_signal_end_where_sampling_starts() {
    let zero = Schedule::linear(TIMESTEPS, BETAS.0, BETAS.1).unwrap().zero_terminal_snr().unwrap();
    let chain = |prediction| VlbEstimator::new(&zero, prediction, VlbOptions::default()).unwrap().num_evals();
    assert_eq!([Prediction::Eps, Prediction::X0, Prediction::V].map(chain), [39, 40, 40]);
    let one = Schedule::linear(1, 0.5, 0.6).unwrap();
    let mut estimator = VlbEstimator::new(&one, Prediction::V, VlbOptions::default()).unwrap();
    estimator.add(&mut Normal::new(Prediction::V, false), &images(0), &mut || Ok(())).unwrap();
    let bound = estimator.finish();
    assert!(bound.total.mean.is_finite() && bound.steps.mean == 0.0 && bound.terms.len() == 1);
}
