//! Distance of every sampler's samples from the data against the number of steps: a table and a plot.
//!
//! ```sh
//! cargo run --release -p ddpm --example sampler_table -- runs/run-001/checkpoints/step-0001200 2000 table.png
//! cargo run --release -p ddpm --example sampler_table -- CHECKPOINT 500 table.png ddpm unipc:exponential:none   # only these
//! cargo run --release -p ddpm --example sampler_table -- CHECKPOINT 500 table.png ddim:trailing:clip:true ddim:trailing:clip:false
//! ```
//!
//! A sampler name may be followed by a spacing, a threshold and whether to use the clipped model output. The distance
//! is the Fréchet distance between normal distributions fitted to features (Heusel et al. 2017). The features come
//! from a fixed two-layer network with random weights: they do not measure image quality, but they are the same for
//! all samplers and need no download. Distances are comparable only for equal numbers of images (the second
//! argument).

use ddpm::config::open_data;
use ddpm::data::{AugmentKey, Dataset, ImageShape};
use ddpm::pipeline::{BATCH, Pipeline, SampleRequest};
use ddpm::plot;
use ddpm::sampler::{SAMPLERS, SamplerInfo, SamplerOptions, Spacing, Threshold, find};
use ddpm::{Error, Result};
use ddpm_rng::{Purpose, Stream};
use nalgebra::{DMatrix, DVector};
use std::path::PathBuf;

/// Numbers of steps. The first sampler of the list, and any sampler given with all its settings, also run the full schedule.
const STEPS: [usize; 4] = [5, 10, 20, 50];
/// Channels of the two layers; each channel of the second gives one feature per quadrant of the image.
const CHANNELS: [usize; 2] = [16, 24];

/// A 3x3 convolution with stride 2 and random weights, followed by ReLU.
fn layer(x: &[f32], shape: ImageShape, out: usize, index: u32) -> (Vec<f32>, ImageShape) {
    let ImageShape { height, width, channels } = shape;
    let mut weights = vec![0.0; 9 * channels * out];
    Stream::new(1, Purpose::Test, 0, index).fill_normal(&mut weights);
    let scale = (2.0 / (9 * channels) as f32).sqrt();
    let made = ImageShape { height: height.div_ceil(2), width: width.div_ceil(2), channels: out };
    let mut y = Vec::with_capacity(made.num_elements());
    for (row, column) in (0..made.height).flat_map(|r| (0..made.width).map(move |c| (r, c))) {
        for kernel in weights.chunks(9 * channels) {
            let mut sum = 0.0;
            for (tap, kernel) in kernel.chunks(channels).enumerate() {
                let (r, c) = (2 * row + tap / 3, 2 * column + tap % 3);
                if (1..=height).contains(&r) && (1..=width).contains(&c) {
                    let pixel = &x[((r - 1) * width + c - 1) * channels..][..channels];
                    sum += kernel.iter().zip(pixel).map(|(k, x)| k * x).sum::<f32>();
                }
            }
            y.push((scale * sum).max(0.0));
        }
    }
    (y, made)
}

/// The features of an image.
fn features(image: &[f32], shape: ImageShape) -> Vec<f64> {
    let (h, inner) = layer(image, shape, CHANNELS[0], 0);
    let (h, inner) = layer(&h, inner, CHANNELS[1], 1);
    let mut sums = vec![0.0; 4 * CHANNELS[1]];
    for (i, pixel) in h.chunks(CHANNELS[1]).enumerate() {
        let (row, column) = (i / inner.width, i % inner.width);
        let quarter = 2 * usize::from(2 * row >= inner.height) + usize::from(2 * column >= inner.width);
        for (sum, v) in sums[quarter * CHANNELS[1]..].iter_mut().zip(pixel) {
            *sum += f64::from(*v) / (inner.height * inner.width) as f64;
        }
    }
    sums
}

/// Mean and covariance.
fn moments(all: &[Vec<f64>]) -> (DVector<f64>, DMatrix<f64>) {
    let all = DMatrix::from_fn(all.len(), all[0].len(), |i, j| all[i][j]);
    let mean = all.row_mean();
    let centred = DMatrix::from_fn(all.nrows(), all.ncols(), |i, j| all[(i, j)] - mean[j]);
    let covariance = centred.tr_mul(&centred) / (all.nrows() as f64 - 1.0);
    (mean.transpose(), covariance)
}

/// `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`.
fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    let ((m1, c1), (m2, c2)) = (moments(a), moments(b));
    // Clamps eigenvalues that are negative due to rounding.
    let root = |l: f64| l.max(0.0).sqrt();
    let mut eigen = c1.clone().symmetric_eigen();
    eigen.eigenvalues.apply(|l| *l = root(*l));
    let c1_root = eigen.recompose();
    let inner = (&c1_root * &c2 * &c1_root).symmetric_eigenvalues();
    (m1 - m2).norm_squared() + c1.trace() + c2.trace() - 2.0 * inner.iter().map(|&l| root(l)).sum::<f64>()
}

fn features_of_data(data: &dyn Dataset, from: usize, count: usize) -> Result<Vec<Vec<f64>>> {
    let mut image = vec![0.0; data.shape().num_elements()];
    let each = (from..from + count).map(|i| {
        data.read(i % data.len(), AugmentKey::default(), &mut image)?;
        Ok(features(&image, data.shape()))
    });
    each.collect()
}

/// A sampler with its settings.
struct Setup {
    sampler: &'static SamplerInfo,
    spacing: Spacing,
    threshold: Threshold,
    use_clipped_model_output: Option<bool>,
}

impl Setup {
    /// With the sampler's default settings.
    fn default_of(sampler: &'static SamplerInfo) -> Self {
        let (spacing, threshold) = (sampler.spacings[0], Threshold::default());
        Self { sampler, spacing, threshold, use_clipped_model_output: None }
    }

    /// `SAMPLER`, `SAMPLER:SPACING`, `SAMPLER:SPACING:THRESHOLD` or `SAMPLER:SPACING:THRESHOLD:true|false`.
    fn parse(name: &str) -> Result<Self> {
        let mut parts = name.split(':');
        let mut setup = Self::default_of(find(parts.next().unwrap_or_default())?);
        if let Some(spacing) = parts.next() {
            setup.spacing = spacing.parse()?;
        }
        if let Some(name) = parts.next() {
            let all = [Threshold::None, Threshold::Clip, Threshold::Dynamic];
            setup.threshold = all.into_iter().find(|t| t.name() == name).ok_or_else(|| Error::Config {
                key: "threshold".to_owned(),
                reason: format!(
                    "unknown threshold {name:?}; give one of {}",
                    all.map(Threshold::name).join(", ")
                ),
            })?;
        }
        if let Some(used) = parts.next() {
            let used = used.parse().map_err(|_| Error::Config {
                key: "use_clipped_model_output".to_owned(),
                reason: format!("{used:?} is neither true nor false"),
            });
            setup.use_clipped_model_output = Some(used?);
        }
        Ok(setup)
    }

    /// Its threshold column in the table.
    fn threshold_name(&self) -> String {
        let used = self.use_clipped_model_output.map_or(String::new(), |used| format!(", {used}"));
        format!("{}{used}", self.threshold.name())
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = |reason: &str| Error::Config { key: "arguments".to_owned(), reason: reason.to_owned() };
    let checkpoint = arguments.next().ok_or_else(|| usage("CHECKPOINT [IMAGES] [PLOT.png] [SAMPLERS]"))?;
    let count = arguments.next().map_or(Some(1000), |n| n.to_str()?.parse().ok());
    let count: usize = count.filter(|&n| n > 1).ok_or_else(|| usage("IMAGES must be a number above 1"))?;
    let plot = arguments.next().unwrap_or_else(|| "samplers.png".into());
    let mut samplers: Vec<Setup> =
        arguments.map(|name| Setup::parse(name.to_str().unwrap_or_default())).collect::<Result<_>>()?;
    if samplers.is_empty() {
        samplers = SAMPLERS.iter().map(Setup::default_of).collect();
    }

    let pipeline = Pipeline::open(&checkpoint)?;
    let data = open_data(pipeline.config())?;
    let truth = features_of_data(&*data, 0, count)?;
    let other = features_of_data(&*data, count, count)?;
    println!(
        "{} images each; distance between disjoint parts of the data: {:.5}\n",
        count,
        distance(&truth, &other)
    );
    println!("| sampler | spacing | threshold | steps | distance |\n| --- | --- | --- | --- | --- |");

    let mut lines = Vec::new();
    for setup in samplers {
        let Setup { sampler, spacing, threshold, use_clipped_model_output } = setup;
        let all = pipeline.config().diffusion.timesteps;
        let mut points = Vec::new();
        let full_schedule = sampler.name == SAMPLERS[0].name || use_clipped_model_output.is_some();
        for steps in STEPS.into_iter().chain(full_schedule.then_some(all)) {
            let sampling = SamplerOptions {
                sampler,
                steps: Some(steps),
                spacing: Some(spacing),
                threshold: Some(threshold),
                use_clipped_model_output,
                ..SamplerOptions::default()
            };
            let request =
                SampleRequest { count, seed: 1, batch: BATCH, sampling, ..SampleRequest::default() };
            let images = pipeline.sample(request)?;
            let unit = |v: &u8| f32::from(*v) / 127.5 - 1.0;
            let sampled: Vec<Vec<f64>> = images
                .iter()
                .map(|p| features(&p.data.iter().map(unit).collect::<Vec<_>>(), pipeline.shape()))
                .collect();
            let frechet = distance(&truth, &sampled);
            println!(
                "| {} | {spacing} | {} | {steps} | {frechet:.5} |",
                sampler.name,
                setup.threshold_name()
            );
            points.push((steps as f64, frechet));
        }
        lines.push((format!("{} ({spacing}, {})", sampler.name, setup.threshold_name()), points));
    }
    plot::distances(&format!("Samples of {count} images against the data"), &lines)?.save(&plot)?;
    println!("\n{}", plot.display());
    Ok(())
}
