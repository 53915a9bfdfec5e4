//! How far the samples of every sampler are from the data, over the number of steps: a table and a plot.
//!
//! ```sh
//! cargo run --release -p ddpm --example sampler_table -- runs/run-001/checkpoints/step-0001200 2000 table.png
//! cargo run --release -p ddpm --example sampler_table -- CHECKPOINT 500 table.png ddpm dpm++2m unipc   # these alone
//! ```
//!
//! The distance is Fréchet's between normals of the mean and the covariance of features (Heusel et al. 2017). The features
//! are those of a fixed network of two layers with random weights: no judge of pictures, but the same for all, and it
//! needs no download. Numbers compare only between equal numbers of pictures, which is the second argument.

use ddpm::data::{Dataset, Draw, PictureShape};
use ddpm::generate::{BATCH, Generator, Request};
use ddpm::picture::save_png;
use ddpm::plot;
use ddpm::sampler::{Listed, Options, SAMPLERS, find};
use ddpm::train::checkpoint::Which;
use ddpm::train::open_data;
use ddpm::{Error, Result};
use ddpm_engine::rng::{Purpose, Stream};
use std::path::PathBuf;

/// Numbers of steps that are tried; the first sampler of the list also makes all of the schedule's.
const STEPS: [usize; 4] = [5, 10, 20, 50];
/// Channels of the two layers; each of the second has a feature for each quarter of the picture.
const CHANNELS: [usize; 2] = [16, 24];

/// A 3x3 convolution with stride 2 and random weights, rectified.
fn layer(x: &[f32], shape: PictureShape, out: usize, index: u32) -> (Vec<f32>, PictureShape) {
    let PictureShape { height, width, channels } = shape;
    let mut weights = vec![0.0; 9 * channels * out];
    Stream::new(1, Purpose::Test, 0, index).fill_normal(&mut weights);
    let scale = (2.0 / (9 * channels) as f32).sqrt();
    let made = PictureShape { height: height.div_ceil(2), width: width.div_ceil(2), channels: out };
    let mut y = Vec::with_capacity(made.values());
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

/// The features of a picture.
fn features(picture: &[f32], shape: PictureShape) -> Vec<f64> {
    let (h, inner) = layer(picture, shape, CHANNELS[0], 0);
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

/// A symmetric matrix, row by row.
type Matrix = Vec<Vec<f64>>;

/// Mean and covariance.
fn moments(all: &[Vec<f64>]) -> (Vec<f64>, Matrix) {
    let (n, d) = (all.len() as f64, all[0].len());
    let mean: Vec<f64> = (0..d).map(|i| all.iter().map(|f| f[i]).sum::<f64>() / n).collect();
    let cov =
        |i: usize, j: usize| all.iter().map(|f| (f[i] - mean[i]) * (f[j] - mean[j])).sum::<f64>() / (n - 1.0);
    let covariance = (0..d).map(|i| (0..d).map(|j| cov(i, j)).collect()).collect();
    (mean, covariance)
}

/// Eigenvalues, and eigenvectors as columns, by Jacobi's rotations.
fn eigen(mut a: Matrix) -> (Vec<f64>, Matrix) {
    let n = a.len();
    let mut v: Matrix = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let norm: f64 = a.iter().flatten().map(|x| x * x).sum();
    for _ in 0..60 {
        let off: f64 = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i][j] * a[i][j]).sum();
        if off <= 1e-24 * norm {
            break;
        }
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            if a[p][q] == 0.0 {
                continue;
            }
            let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
            let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
            let (c, s) = (1.0 / t.hypot(1.0), t / t.hypot(1.0));
            for row in a.iter_mut().chain(v.iter_mut()) {
                (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
            }
            for k in 0..n {
                (a[p][k], a[q][k]) = (c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]);
            }
        }
    }
    ((0..n).map(|i| a[i][i]).collect(), v)
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let entry = |row: &Vec<f64>, j: usize| row.iter().zip(b).map(|(x, b)| x * b[j]).sum();
    a.iter().map(|row| (0..b[0].len()).map(|j| entry(row, j)).collect()).collect()
}

/// `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`.
fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    let ((m1, c1), (m2, c2)) = (moments(a), moments(b));
    let (values, vectors) = eigen(c1.clone());
    let scaled: Matrix = vectors
        .iter()
        .map(|row| row.iter().zip(&values).map(|(v, l)| v * l.max(0.0).sqrt()).collect())
        .collect();
    let turned: Matrix = (0..values.len()).map(|j| vectors.iter().map(|row| row[j]).collect()).collect();
    let root = product(&scaled, &turned);
    let (inner, _) = eigen(product(&product(&root, &c2), &root));
    let trace = |c: &Matrix| c.iter().enumerate().map(|(i, row)| row[i]).sum::<f64>();
    let means: f64 = m1.iter().zip(&m2).map(|(a, b)| (a - b).powi(2)).sum();
    means + trace(&c1) + trace(&c2) - 2.0 * inner.iter().map(|l| l.max(0.0).sqrt()).sum::<f64>()
}

fn features_of_data(data: &dyn Dataset, from: usize, count: usize) -> Result<Vec<Vec<f64>>> {
    let mut picture = vec![0.0; data.shape().values()];
    let each = (from..from + count).map(|i| {
        data.read(i % data.len(), Draw::default(), &mut picture)?;
        Ok(features(&picture, data.shape()))
    });
    each.collect()
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = |reason: &str| Error::Config { key: "arguments".to_owned(), reason: reason.to_owned() };
    let checkpoint = arguments.next().ok_or_else(|| usage("CHECKPOINT [PICTURES] [PLOT.png] [SAMPLERS]"))?;
    let count = arguments.next().map_or(Some(1000), |n| n.to_str()?.parse().ok());
    let count: usize = count.filter(|&n| n > 1).ok_or_else(|| usage("PICTURES is a number above 1"))?;
    let plot = arguments.next().unwrap_or_else(|| "samplers.png".into());
    let named: Vec<&Listed> =
        arguments.map(|name| find(name.to_str().unwrap_or_default())).collect::<Result<_>>()?;
    let samplers = if named.is_empty() { SAMPLERS.iter().collect() } else { named };

    let generator = Generator::open(&checkpoint, Which::Auto, 0)?;
    let data = open_data(generator.config())?;
    let truth = features_of_data(&*data, 0, count)?;
    let other = features_of_data(&*data, count, count)?;
    println!("{} pictures each; other pictures of the data are at {:.5}\n", count, distance(&truth, &other));
    println!("| sampler | spacing | steps | distance |\n| --- | --- | --- | --- |");

    let mut lines = Vec::new();
    for sampler in samplers {
        let all = generator.config().diffusion.timesteps;
        // Each as it is unless something is said: with the spacing that is its own.
        let spacing = sampler.spacings[0];
        let mut points = Vec::new();
        for steps in STEPS.into_iter().chain((sampler.name == SAMPLERS[0].name).then_some(all)) {
            let sampling = Options { sampler, steps: Some(steps), ..Options::default() };
            let request = Request { count, seed: 1, batch: BATCH, sampling, ..Request::default() };
            let pictures = generator.draw(request, &mut |_, _| Ok(()))?;
            let unit = |v: &u8| f32::from(*v) / 127.5 - 1.0;
            let drawn: Vec<Vec<f64>> = pictures
                .iter()
                .map(|p| features(&p.data.iter().map(unit).collect::<Vec<_>>(), generator.shape()))
                .collect();
            let far = distance(&truth, &drawn);
            println!("| {} | {spacing} | {steps} | {far:.5} |", sampler.name);
            points.push((steps as f64, far));
        }
        lines.push((format!("{} ({spacing})", sampler.name), points));
    }
    save_png(&plot::distances(&format!("Samples of {count} pictures against the data"), &lines)?, &plot)?;
    println!("\n{}", plot.display());
    Ok(())
}
