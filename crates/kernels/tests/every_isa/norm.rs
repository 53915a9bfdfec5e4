//! Group normalisation, forward and backward.

use crate::{Rng, Within, nans, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::norm::{Affine, NormShape, Saved, group_norm, group_norm_backward};
use ddpm_kernels::reference;

/// Mean: in units of the mean of `|x|`. Elements of one sign are added in f32 in a chain over the pixels, at
/// most 1024 here: at worst 512 units, sqrt(1024) / 2 if roundings have both signs.
const MEAN: f64 = 16.0;
/// Reciprocal standard deviation: its own relative error; the variance is a sum of squares, so nothing cancels.
const RSTD: f64 = 8.0;
/// Result: in units of `(|x| + mean |x|) rstd |gamma| + |beta|`, the terms of `x_hat gamma + beta`. The
/// mean's error is one of them.
const FORWARD: f64 = 16.0;
/// Gradients: in units of their formula with every term's absolute value ([`Magnitudes`]).
const BACKWARD: f64 = 8.0;

struct Case {
    shape: NormShape,
    x: Vec<f32>,
    dy: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

impl Case {
    fn new(rng: &mut Rng, shape: NormShape, mean: f32) -> Self {
        let (len, c) = (shape.pixels * shape.channels, shape.channels);
        let x = rng.vec(len).iter().map(|v| v + mean).collect();
        Self { shape, x, dy: rng.vec(len), gamma: rng.vec(c), beta: rng.vec(c) }
    }

    fn affine(&self) -> Affine<'_> {
        Affine { gamma: &self.gamma, beta: &self.beta }
    }

    /// `y` and statistics.
    fn run_forward(&self, isa: Isa) -> (Vec<f32>, Vec<f32>) {
        let (mut y, mut stats) = (unwritten(self.x.len()), unwritten(2 * self.shape.groups));
        let mut scratch = unwritten(self.shape.scratch_len());
        group_norm(isa, self.shape, &self.x, self.affine(), &mut y, &mut stats, &mut scratch);
        (y, stats)
    }

    /// `dx`, `dgamma`, `dbeta`.
    fn run_backward(&self, isa: Isa, stats: &[f32]) -> [Vec<f32>; 3] {
        let c = self.shape.channels;
        let [mut dx, mut dgamma, mut dbeta] = [self.x.len(), c, c].map(unwritten);
        let mut scratch = unwritten(self.shape.scratch_len());
        let saved = Saved { x: &self.x, affine: self.affine(), stats, dy: &self.dy };
        group_norm_backward(isa, self.shape, saved, &mut dx, &mut dgamma, &mut dbeta, &mut scratch);
        [dx, dgamma, dbeta]
    }

    fn oracle_backward(&self) -> [Vec<f64>; 3] {
        let [x, dy, gamma, beta] = [&self.x, &self.dy, &self.gamma, &self.beta].map(|v| wide(v));
        reference::group_norm_backward(self.shape, &x, &dy, &gamma, &beta).into()
    }
}

/// The formulas with the absolute value of every term: the unit of rounding errors.
struct Magnitudes {
    mean: Vec<f64>,
    y: Vec<f64>,
    dx: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

impl Magnitudes {
    fn of(case: &Case, stats: &[f64]) -> Self {
        let NormShape { channels: c, groups, pixels, silu, .. } = case.shape;
        let rstd = &stats[groups..];
        let count = (pixels * c / groups) as f64;
        let channel = |at: usize| at % c;
        let group = |at: usize| at % c / (c / groups);
        let abs = |x: f32| f64::from(x).abs();
        let mut mean = vec![0.0; groups];
        for at in 0..case.x.len() {
            mean[group(at)] += abs(case.x[at]) / count;
        }
        let x_hat: Vec<f64> =
            (0..case.x.len()).map(|at| (abs(case.x[at]) + mean[group(at)]) * rstd[group(at)]).collect();
        let y: Vec<f64> = (0..case.x.len())
            .map(|at| x_hat[at] * abs(case.gamma[channel(at)]) + abs(case.beta[channel(at)]))
            .collect();
        // SiLU's second derivative is below 1, so an error of z is at most the same error of the derivative.
        let dz: Vec<f64> =
            (0..case.x.len()).map(|at| abs(case.dy[at]) * if silu { 1.0 + y[at] } else { 1.0 }).collect();
        let (mut dgamma, mut dbeta) = (vec![0.0; c], vec![0.0; c]);
        let (mut mean_d, mut mean_d_x_hat) = (vec![0.0; groups], vec![0.0; groups]);
        for at in 0..case.x.len() {
            dgamma[channel(at)] += dz[at] * x_hat[at];
            dbeta[channel(at)] += dz[at];
            let d = dz[at] * abs(case.gamma[channel(at)]) / count;
            mean_d[group(at)] += d;
            mean_d_x_hat[group(at)] += d * x_hat[at];
        }
        let dx = (0..case.x.len())
            .map(|at| {
                let d = dz[at] * abs(case.gamma[channel(at)]);
                rstd[group(at)] * (d + mean_d[group(at)] + x_hat[at] * mean_d_x_hat[group(at)])
            })
            .collect();
        Self { mean, y, dx, dgamma, dbeta }
    }
}

fn cases() -> Vec<Case> {
    let mut rng = Rng::new(20);
    let mut cases = Vec::new();
    for channels in [1usize, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 96, 128, 130] {
        for groups in [1, 2, 3, 4, 5, 8, 32, channels] {
            if !channels.is_multiple_of(groups) || (groups == channels && channels > 33) {
                continue;
            }
            for pixels in [1usize, 2, 3, 16, 49, 257] {
                let silu = (pixels + groups).is_multiple_of(2);
                let (mean, eps) = [(0.0, 1e-5), (5.0, 1e-6), (-30.0, 1e-5)][(channels + pixels) % 3];
                cases.push(Case::new(&mut rng, NormShape { pixels, channels, groups, eps, silu }, mean));
            }
        }
    }
    let shape = NormShape { pixels: 1024, channels: 32, groups: 8, eps: 1e-5, silu: true };
    cases.push(Case::new(&mut rng, shape, 1.0));
    cases.push(Case::new(&mut rng, NormShape { silu: false, ..shape }, 100.0));
    cases
}

#[test]
fn group_norm_and_its_gradients_agree_with_the_oracle() {
    let [mut mean, mut rstd] =
        [("group norm, mean", MEAN), ("group norm, rstd", RSTD)].map(|(w, b)| Within::new(w, b));
    let mut y_within = Within::new("group norm, y", FORWARD);
    let [mut dx, mut dgamma, mut dbeta] =
        ["group norm, dx", "group norm, dgamma", "group norm, dbeta"].map(|what| Within::new(what, BACKWARD));
    for case in cases() {
        let shape = case.shape;
        let [x, gamma, beta] = [&case.x, &case.gamma, &case.beta].map(|v| wide(v));
        let (want, stats) = reference::group_norm(shape, &x, &gamma, &beta);
        let want_grads = case.oracle_backward();
        let magnitude = Magnitudes::of(&case, &stats);
        for isa in Isa::all() {
            let (y, got_stats) = case.run_forward(isa);
            let (means, rstds) = stats.split_at(shape.groups);
            mean.check(isa, &shape, &got_stats[..shape.groups], means, &magnitude.mean);
            rstd.check(isa, &shape, &got_stats[shape.groups..], rstds, rstds);
            y_within.check(isa, &shape, &y, &want, &magnitude.y);
            let got = case.run_backward(isa, &got_stats);
            dx.check(isa, &shape, &got[0], &want_grads[0], &magnitude.dx);
            dgamma.check(isa, &shape, &got[1], &want_grads[1], &magnitude.dgamma);
            dbeta.check(isa, &shape, &got[2], &want_grads[2], &magnitude.dbeta);
        }
    }
}

#[test]
fn a_constant_image_is_normalised_to_beta() {
    // The mean of 96 times 0.1 is not exactly 0.1 in f32; rstd is 1 / sqrt(eps).
    let shape = NormShape { pixels: 16, channels: 6, groups: 1, eps: 1e-5, silu: false };
    for isa in Isa::all() {
        let mut case = Case::new(&mut Rng::new(21), shape, 0.0);
        case.x.fill(0.1);
        let (y, _) = case.run_forward(isa);
        for (y, beta) in y.iter().zip(case.beta.iter().cycle()) {
            assert!((y - beta).abs() < 1e-4, "{isa}: {y} {beta}");
        }
    }
}

#[test]
fn nan_propagates_exactly_to_dependents() {
    let mut rng = Rng::new(22);
    for (channels, groups) in [(6, 2), (16, 4), (40, 5), (33, 3)] {
        for silu in [false, true] {
            let shape = NormShape { pixels: 7, channels, groups, eps: 1e-5, silu };
            for poisoned in ["x", "dy", "gamma", "beta"] {
                let mut case = Case::new(&mut rng, shape, 0.5);
                let of = match poisoned {
                    "x" => &mut case.x,
                    "dy" => &mut case.dy,
                    "gamma" => &mut case.gamma,
                    _ => &mut case.beta,
                };
                let at = rng.below(of.len());
                of[at] = f32::NAN;
                let [x, gamma, beta] = [&case.x, &case.gamma, &case.beta].map(|v| wide(v));
                let (want, stats) = reference::group_norm(shape, &x, &gamma, &beta);
                for isa in Isa::all() {
                    let (y, got_stats) = case.run_forward(isa);
                    assert_eq!(nans(wide(&y)), nans(want.clone()), "{poisoned}: y on {isa}, {shape:?}");
                    assert_eq!(nans(wide(&got_stats)), nans(stats.clone()), "{poisoned}: {isa}, {shape:?}");
                    let got = case.run_backward(isa, &got_stats);
                    for (got, want) in got.iter().zip(case.oracle_backward()) {
                        assert_eq!(nans(wide(got)), nans(want), "{poisoned}: gradients on {isa}, {shape:?}");
                    }
                }
            }
        }
    }
}
