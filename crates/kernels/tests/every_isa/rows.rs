//! Layer normalisation, and the passes of batch normalisation.

use crate::{Rng, Within, magnitudes, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::batch_norm::{column_dots, column_squares, column_sums, gradient, normalise};
use ddpm_kernels::layer_norm::{Saved, layer_norm, layer_norm_backward};
use ddpm_kernels::reference;

/// Sums over at most 100 rows in order, in units of the sum of absolute values.
const SUM: f64 = 8.0;
/// Three roundings.
const AFFINE: f64 = 4.0;
/// Layer normalisation, in units of its terms (`(|x| + |mean|) rstd |gamma| + |beta|`).
const FORWARD: f64 = 8.0;
/// Its gradients, in units of their formula with every term's absolute value.
const BACKWARD: f64 = 16.0;

const CHANNELS: [usize; 12] = [1, 2, 3, 4, 8, 15, 16, 17, 33, 64, 65, 128];

#[test]
fn the_passes_of_batch_norm_agree_with_their_formulas() {
    let mut rng = Rng::new(80);
    let (mut sums, mut affine) = (Within::new("column sums", SUM), Within::new("normalise", AFFINE));
    for c in CHANNELS {
        for rows in [1, 2, 7, 100] {
            let (x, dy) = (rng.vec(rows * c), rng.vec(rows * c));
            let [mean, scale, slope, shift] = [0; 4].map(|_| rng.vec(c));
            let (x64, dy64) = (wide(&x), wide(&dy));
            let m = |i: usize| f64::from(mean[i % c]);
            let centred: Vec<f64> = x64.iter().enumerate().map(|(i, x)| x - m(i)).collect();
            let squares: Vec<f64> = centred.iter().map(|d| d * d).collect();
            let dots: Vec<f64> = centred.iter().zip(&dy64).map(|(d, dy)| d * dy).collect();
            let absolute = |v: &[f64]| reference::sum_rows(&v.iter().map(|v| v.abs()).collect::<Vec<_>>(), c);
            // The rounding error of x - mean scales with |x| + |mean|.
            let size: Vec<f64> = x64.iter().enumerate().map(|(i, x)| x.abs() + m(i).abs()).collect();
            let dot_size: Vec<f64> = size.iter().zip(&dy64).map(|(s, dy)| s * dy.abs()).collect();
            let of = |v: &[f32], i: usize| f64::from(v[i % c]);
            let y: Vec<f64> = (0..x.len()).map(|i| centred[i] * of(&scale, i) + of(&shift, i)).collect();
            let y_size: Vec<f64> =
                (0..x.len()).map(|i| size[i] * of(&scale, i).abs() + of(&shift, i).abs()).collect();
            let dx: Vec<f64> = (0..x.len())
                .map(|i| dy64[i] * of(&scale, i) + centred[i] * of(&slope, i) + of(&shift, i))
                .collect();
            let dx_size: Vec<f64> = (0..x.len())
                .map(|i| {
                    let product = dy64[i].abs() * of(&scale, i).abs();
                    product + size[i] * of(&slope, i).abs() + of(&shift, i).abs()
                })
                .collect();
            for isa in Isa::all() {
                let case = &(c, rows);
                let mut got = unwritten(c);
                column_sums(isa, &x, &mut got);
                sums.check(isa, case, &got, &reference::sum_rows(&x64, c), &absolute(&x64));
                column_squares(isa, &x, &mean, &mut got);
                let square_size: Vec<f64> = size.iter().map(|s| s * s).collect();
                sums.check(isa, case, &got, &reference::sum_rows(&squares, c), &absolute(&square_size));
                column_dots(isa, &dy, &x, &mean, &mut got);
                sums.check(isa, case, &got, &reference::sum_rows(&dots, c), &absolute(&dot_size));
                let mut got = unwritten(x.len());
                normalise(isa, &mean, &scale, &shift, &x, &mut got);
                affine.check(isa, case, &got, &y, &y_size);
                let mut got = dy.clone();
                gradient(isa, &mean, &scale, &slope, &shift, &x, &mut got);
                affine.check(isa, case, &got, &dx, &dx_size);
            }
        }
    }
}

#[test]
fn layer_norm_and_its_gradient_agree_with_the_oracle() {
    let mut rng = Rng::new(81);
    let mut forward = Within::new("layer norm", FORWARD);
    let mut backward = Within::new("layer norm gradients", BACKWARD);
    let eps = 1e-5f32;
    for c in CHANNELS.into_iter().filter(|&c| c > 1) {
        for (rows, mean) in [(1, 0.0), (5, 0.0), (9, 4.0)] {
            let x: Vec<f32> = rng.vec(rows * c).iter().map(|v| v + mean).collect();
            let (dy, gamma, beta) = (rng.vec(rows * c), rng.vec(c), rng.vec(c));
            let (x64, dy64, gamma64) = (wide(&x), wide(&dy), wide(&gamma));
            let want = reference::layer_norm(f64::from(eps), &x64, &gamma64, &wide(&beta));
            let [mut size, mut dx, mut dx_size] = [(); 3].map(|()| Vec::new());
            let [mut dgamma, mut dbeta, mut dgamma_size] = [(); 3].map(|()| vec![0.0; c]);
            for (x, dy) in x64.chunks(c).zip(dy64.chunks(c)) {
                let n = c as f64;
                let mean = x.iter().sum::<f64>() / n;
                let rstd =
                    1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + f64::from(eps)).sqrt();
                let hat: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
                // |x_hat| including the rounding of x - mean, and of the mean itself.
                let hat_size: Vec<f64> = x.iter().map(|x| (x.abs() + mean.abs()) * rstd).collect();
                let g: Vec<f64> = (0..c).map(|i| dy[i] * gamma64[i]).collect();
                let sum = |f: &dyn Fn(usize) -> f64| (0..c).map(f).sum::<f64>() / n;
                let (a, b) = (sum(&|i| g[i]), sum(&|i| g[i] * hat[i]));
                let (a_size, b_size) = (sum(&|i| g[i].abs()), sum(&|i| g[i].abs() * hat_size[i]));
                for i in 0..c {
                    size.push(hat_size[i] * gamma64[i].abs() + f64::from(beta[i]).abs());
                    dx.push(rstd * (g[i] - a - hat[i] * b));
                    dx_size.push(rstd * (g[i].abs() + a_size + hat_size[i] * b_size));
                    dgamma[i] += dy[i] * hat[i];
                    dgamma_size[i] += dy[i].abs() * hat_size[i];
                    dbeta[i] += dy[i];
                }
            }
            let dbeta_size = reference::sum_rows(&magnitudes(&dy), c);
            for isa in Isa::all() {
                let case = &(c, rows, mean);
                let (mut y, mut stats) = (unwritten(x.len()), unwritten(2 * rows));
                layer_norm(isa, eps, &gamma, &beta, &x, &mut y, &mut stats);
                forward.check(isa, case, &y, &want, &size);
                let [mut got_dx, mut got_dgamma, mut got_dbeta] = [x.len(), c, c].map(unwritten);
                let saved = Saved { gamma: &gamma, x: &x, stats: &stats, dy: &dy };
                layer_norm_backward(isa, saved, &mut got_dx, &mut got_dgamma, &mut got_dbeta);
                backward.check(isa, case, &got_dx, &dx, &dx_size);
                backward.check(isa, case, &got_dgamma, &dgamma, &dgamma_size);
                backward.check(isa, case, &got_dbeta, &dbeta, &dbeta_size);
            }
        }
    }
}
