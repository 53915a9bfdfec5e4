//! Taking the noise from a picture, which is what the network has learnt; and how much there is.

use super::refused;
use crate::data::PictureShape;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::process::Prediction;
use crate::sampler::drawing::{Drawing, X, X_0, blend};
use crate::sampler::{Options, SampleStep, Sampler, Seeds, Spacing, Threshold};
use crate::schedule::{Level, Schedule};
use ddpm_engine::rng::Purpose;
use std::f64::consts::SQRT_2;

/// The median of the size of a standard normal number.
const MEDIAN: f64 = 0.674_489_750_196_082;

/// Black and white.
const ENDS: [f64; 2] = [-1.0, 1.0];

/// Takes normal noise of a known deviation from pictures `y = x_0 + s n`: `alpha y` is a noisy picture at the level with
/// `sigma / alpha = s` (Ho et al. 2020, eq. 4).
///
/// Deviations are parts of the range from black to white: 0.1 is 25.5 of 255, and s = 0.2 of numbers in [-1, 1].
pub struct Denoise {
    /// The noise of `y`.
    noise: f64,
    level: Level,
    way: Way,
}

enum Way {
    Expected(Threshold),
    Sampled(Box<dyn Sampler>),
}

impl Denoise {
    /// One prediction: the mean of the pictures that it may have been, `E[x_0 | y]`, which has the least expected square of
    /// the error.
    ///
    /// # Errors
    /// [`Error::Config`] for a deviation below 0, or beyond the schedule's.
    pub fn expected(schedule: &Schedule, sigma: f64, threshold: Threshold) -> Result<Self> {
        let noise = noise(schedule, sigma)?;
        Ok(Self { noise, level: schedule.level_of_ratio(noise), way: Way::Expected(threshold) })
    }

    /// Many steps: one of the pictures that it may have been. The sampler begins at the first of its levels with as much noise,
    /// and what the picture lacks there is added.
    ///
    /// # Errors
    /// As [`expected`](Self::expected) and [`Options::build`].
    pub fn sampled(
        options: Options,
        schedule: &Schedule,
        prediction: Prediction,
        sigma: f64,
    ) -> Result<Self> {
        // All but the gaps between sigmas, which are those of a part of the schedule.
        let spacing = options.spacing.filter(|&spacing| spacing != Spacing::Sigma);
        Options { spacing, ..options }.build(schedule, prediction)?;
        let noise = noise(schedule, sigma)?;
        for n in 1..=schedule.timesteps_with_signal() {
            if schedule.level((n - 1) as f64).ratio() < noise {
                continue;
            }
            let steps = options.steps.or(options.sampler.steps).map(|steps| steps.min(n));
            let (options, part) = (Options { steps, ..options }, schedule.first(n));
            let level = options.levels(&part, prediction)?.at(0);
            if level.ratio() >= noise {
                return Ok(Self { noise, level, way: Way::Sampled(options.build(&part, prediction)?) });
            }
        }
        let reason = format!(
            "this spacing of {}'s begins with less noise than {sigma} of the picture's range; take another spacing",
            options.sampler.name
        );
        Err(refused("spacing", reason))
    }

    /// The level that the picture is brought to.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Takes the noise from a batch of noisy pictures.
    ///
    /// ```text
    /// x = alpha (y + sqrt(sigma^2 / alpha^2 - s^2) z)
    /// ```
    /// and one prediction of `x_0` from there, or the sampler's steps; z counts only where there is a sampler.
    ///
    /// # Panics
    /// If `y` is no batch of the denoiser.
    pub fn apply(
        &self,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        y: &[f32],
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        if self.noise == 0.0 {
            return Ok(y.to_vec());
        }
        let mut x = y.to_vec();
        blend(&mut x, self.level.alpha, []);
        match &self.way {
            Way::Expected(threshold) => {
                let mut d = Drawing::new(Some(&x), denoiser, seeds, *threshold, 1, on_step)?;
                d.denoise(self.level)?;
                d.copy(X, X_0)?;
                d.step(self.level)?;
                d.finish()
            }
            Way::Sampled(sampler) => {
                let lacking = (self.level.ratio().powi(2) - self.noise * self.noise).max(0.0).sqrt();
                let mut z = vec![0.0; x.len()];
                seeds.fill(Purpose::SampleStart, 0, denoiser.picture_len(), &mut z);
                blend(&mut x, 1.0, [(self.level.alpha * lacking, &z)]);
                sampler.sample_from(Some(&x), denoiser, seeds, on_step)
            }
        }
    }
}

/// The deviation of numbers in [-1, 1], where the schedule has as much.
fn noise(schedule: &Schedule, sigma: f64) -> Result<f64> {
    let most = schedule.level((schedule.timesteps_with_signal() - 1) as f64).ratio();
    if !(sigma >= 0.0 && 2.0 * sigma <= most) {
        let reason = format!(
            "{sigma} is out of range; give the noise's standard deviation as a part of the range from black to white, as 0.1 \
             or 25/255, up to {:.3} for this run's schedule",
            (most / 2.0 * 1e3).floor() / 1e3
        );
        return Err(Error::Config { key: "sigma".to_owned(), reason });
    }
    Ok(2.0 * sigma)
}

/// The standard deviation of the noise in a picture, in [-1, 1], as a part of the range from black to white: 0 where none is
/// found. Alpha is not looked at.
///
/// That of independent normal noise in all pixels, from the median of the finest diagonal wavelet coefficients (Haar's), in
/// which pictures have little besides noise (Donoho, Johnstone, "Ideal Spatial Adaptation by Wavelet Shrinkage", 1994,
/// section 4.2): `median |d| / 0.6745` over blocks of four pixels `a b / c d` with `d = (a - b - c + d) / 2`.
///
/// Noise upon black and white is cut off there, and a half of it is missing. Where a quarter of all numbers are black, or white,
/// those beside one that is are looked at instead: as many of them are off it by noise as are cut off, and the middle one of
/// these is off by 0.6745 of the deviation. Edges are further off, and where there is no noise there are too few.
pub fn estimate_sigma(picture: &[f32], shape: PictureShape) -> f64 {
    let PictureShape { height, width, channels } = shape;
    let colours = if channels >= 3 { 3 } else { 1 };
    let at = |y: usize, x: usize, c: usize| f64::from(picture[(y * width + x) * channels + c]);
    let all =
        || (0..height).flat_map(move |y| (0..width).flat_map(move |x| (0..colours).map(move |c| (y, x, c))));
    let many =
        |end: f64| 4 * all().filter(|&(y, x, c)| at(y, x, c) == end).count() >= height * width * colours;
    let deviation = if let Some(end) = ENDS.into_iter().find(|&end| many(end)) {
        let mut off = Vec::new();
        for (y, x, c) in all().filter(|&(y, x, c)| at(y, x, c) == end) {
            off.extend((x + 1 < width).then(|| (at(y, x + 1, c) - end).abs()));
            off.extend((y + 1 < height).then(|| (at(y + 1, x, c) - end).abs()));
        }
        let cut_off = off.iter().filter(|&&d| d == 0.0).count() as f64;
        let least = off.iter().copied().filter(|&d| d > 0.0).fold(f64::INFINITY, f64::min);
        // The part of the noise that is cut off: a half, and with the steps of 8 bits what is less than half a step off.
        let (mut part, mut deviation) = (0.5, 0.0);
        for _ in 0..4 {
            deviation = nth(&mut off, (0.75 * cut_off / part) as usize) / MEDIAN;
            part = 0.5 * libm::erfc(-0.5 * least / deviation / SQRT_2);
        }
        deviation
    } else {
        let corners = all().filter(|(y, x, _)| y % 2 == 0 && x % 2 == 0 && y + 1 < height && x + 1 < width);
        let blocks =
            corners.map(|(y, x, c)| [at(y, x, c), at(y, x + 1, c), at(y + 1, x, c), at(y + 1, x + 1, c)]);
        let whole = blocks.filter(|block| block.iter().all(|v| !ENDS.contains(v)));
        let mut details: Vec<f64> = whole.map(|[a, b, c, d]| 0.5 * (a - b - c + d).abs()).collect();
        let middle = details.len() / 2;
        nth(&mut details, middle) / MEDIAN
    };
    // A half, because the range is 2.
    0.5 * deviation
}

/// The n-th of the numbers by size, from 0; 0 where there are fewer.
fn nth(numbers: &mut [f64], n: usize) -> f64 {
    if n < numbers.len() { *numbers.select_nth_unstable_by(n, f64::total_cmp).1 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::support::{Gaussian, schedule};
    use super::*;
    use crate::data::digits::Digits;
    use crate::data::{Dataset, Draw};
    use crate::sampler::SAMPLERS;
    use ddpm_engine::rng::Stream;

    fn normal(n: usize, index: u32) -> Vec<f32> {
        let mut z = vec![0.0; n];
        Stream::new(6, Purpose::Test, 0, index).fill_normal(&mut z);
        z
    }

    /// As a PNG has it.
    fn eight_bits(x: f64) -> f32 {
        (((x + 1.0) / 2.0 * 255.0).round().clamp(0.0, 255.0) / 255.0 * 2.0 - 1.0) as f32
    }

    #[test]
    fn the_noise_of_a_picture_is_estimated() {
        // Grey waves and an edge, off the ends.
        let shape = PictureShape { height: 64, width: 64, channels: 3 };
        let clean = |i: usize| {
            let (y, x) = ((i / 192) as f64, (i / 3 % 64) as f64);
            0.3 * (x / 9.0).sin() * (y / 7.0).cos() + if x > 40.0 { 0.2 } else { -0.2 }
        };
        for sigma in [0.02, 0.05, 0.1] {
            let z = normal(shape.values(), 0);
            let noisy = |i: usize| eight_bits(clean(i) + 2.0 * sigma * f64::from(z[i]));
            let picture: Vec<f32> = (0..shape.values()).map(noisy).collect();
            let found = estimate_sigma(&picture, shape);
            println!("{sigma}: {found:.4}");
            // The median of 3072 has a standard error of 2.1 %; four of these, and what the waves add.
            assert!((found / sigma - 1.0).abs() < 0.1, "{found} for {sigma}");
        }
        let picture: Vec<f32> = (0..shape.values()).map(|i| clean(i) as f32).collect();
        assert!(estimate_sigma(&picture, shape) < 0.002);
    }

    #[test]
    fn noise_that_is_cut_off_at_black_is_estimated_too() {
        const N: usize = 40;
        let digits = Digits::new(1, 28, N).unwrap();
        let shape = digits.shape();
        let mut picture = vec![0.0; shape.values()];
        for sigma in [0.05, 0.1, 0.2] {
            let (mut sum, mut squares) = (0.0, 0.0);
            for i in 0..N {
                digits.read(i, Draw::default(), &mut picture).unwrap();
                assert_eq!(estimate_sigma(&picture, shape), 0.0, "a clean digit has none");
                let z = normal(picture.len(), 1 + i as u32);
                let noisy = |(x, z): (&f32, &f32)| eight_bits(f64::from(*x) + 2.0 * sigma * f64::from(*z));
                let noisy: Vec<f32> = picture.iter().zip(&z).map(noisy).collect();
                let off = estimate_sigma(&noisy, shape) / sigma - 1.0;
                (sum, squares) = (sum + off, squares + off * off);
            }
            let (mean, typical) = (sum / N as f64, (squares / N as f64).sqrt());
            println!("cut off, {sigma}: off by {mean:+.3} in the mean, {typical:.3} typically");
            // Of about 400 numbers beside black half are cut off, give or take 5 %, which moves the estimate by 17 %; edges
            // add a little.
            assert!(mean.abs() < 0.08 && typical < 0.2, "{sigma}: {mean}, {typical}");
        }
    }

    #[test]
    fn one_prediction_is_the_posteriors_mean() {
        let y = normal(2 * 50, 9);
        for prediction in Prediction::ALL {
            for sigma in [0.01, 0.1, 1.0] {
                let mut gaussian = Gaussian::correlated(50, prediction);
                let denoise = Denoise::expected(&schedule(), sigma, Threshold::None).unwrap();
                let seeds = Seeds { seed: 0, first: 0 };
                let mut seen = 0;
                let mut on_step = |step: SampleStep<'_>| {
                    seen += step.done;
                    Ok(())
                };
                let x_0 = denoise.apply(&mut gaussian, seeds, &y, &mut on_step).unwrap();
                assert_eq!(seen, 1);
                for (y, x_0) in y.chunks(2).zip(x_0.chunks(2)) {
                    let mean = gaussian.expected([0, 1].map(|i| f64::from(y[i])), 1.0, 2.0 * sigma);
                    for i in 0..2 {
                        // f32's roundings, over the schedule's least noise, 0.01.
                        assert!((f64::from(x_0[i]) - mean[i]).abs() < 1e-4, "{prediction} {sigma}");
                    }
                }
            }
        }
    }

    #[test]
    fn steps_draw_from_the_posterior_whatever_the_sampler_and_spacing() {
        // The mean of many draws from one noisy picture: that of its posterior with the noise of the sampler's first level, for
        // it is linear here. Flows draw nothing anew and have another.
        const N: usize = 2000;
        let (sigma, y) = (0.15, [0.9f32, 0.2]);
        for sampler in SAMPLERS {
            for &spacing in sampler.spacings {
                let options = Options {
                    sampler,
                    steps: Some(60),
                    spacing: Some(spacing),
                    threshold: Some(Threshold::None),
                    eta: sampler.eta.map(|_| 1.0),
                    ..Options::default()
                };
                let denoise = Denoise::sampled(options, &schedule(), Prediction::Eps, sigma).unwrap();
                let ratio = denoise.level().ratio();
                assert!((0.3..0.6).contains(&ratio), "{} {spacing}: {ratio}", sampler.name);
                if sampler.order.is_some() && sampler.name != "ddim" {
                    continue;
                }
                let mut gaussian = Gaussian::correlated(N, Prediction::Eps);
                let seeds = Seeds { seed: 4, first: 0 };
                let x_0 = denoise.apply(&mut gaussian, seeds, &y.repeat(N), &mut |_| Ok(())).unwrap();
                let mean = gaussian.expected(y.map(f64::from), 1.0, ratio);
                for i in 0..2 {
                    let m = x_0.iter().skip(i).step_by(2).map(|&x| f64::from(x)).sum::<f64>() / N as f64;
                    // The posterior's deviation is at most 0.24: four standard errors are 0.021; and 60 steps.
                    assert!((m - mean[i]).abs() < 0.03, "{} {spacing}: {m} for {}", sampler.name, mean[i]);
                }
            }
        }
    }

    #[test]
    fn no_noise_changes_nothing_and_too_much_is_refused() {
        let y = [0.25, -0.5];
        for denoise in [
            Denoise::expected(&schedule(), 0.0, Threshold::Clip).unwrap(),
            Denoise::sampled(Options::default(), &schedule(), Prediction::V, 0.0).unwrap(),
        ] {
            let mut gaussian = Gaussian::correlated(1, Prediction::V);
            let seeds = Seeds { seed: 4, first: 0 };
            assert_eq!(denoise.apply(&mut gaussian, seeds, &y, &mut |_| Ok(())).unwrap(), y);
        }
        for bad in [-0.1, f64::NAN, 1e3] {
            let error = Denoise::expected(&schedule(), bad, Threshold::Clip).err().unwrap().to_string();
            assert!(error.contains("sigma: ") && error.contains("up to 78."), "{error}");
        }
        let quadratic = Options { spacing: Some(Spacing::Quadratic), steps: Some(50), ..Options::default() };
        let error = Denoise::sampled(quadratic, &schedule(), Prediction::Eps, 70.0).err().unwrap();
        assert!(error.to_string().contains("take another spacing"), "{error}");
    }
}
