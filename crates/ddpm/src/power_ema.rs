//! Power-function averages: their profiles, and linear combinations of profiles (Karras et al., "Analyzing and Improving the
//! Training Dynamics of Diffusion Models", 2024, section 3 and appendix C).
//!
//! A power-function average weights step s of t by `(gamma + 1) s^gamma / t^(gamma + 1)` (section 3.1), so that its length
//! grows in proportion to the training: its relative width [`sigma_rel`] is the standard deviation of that profile over t.

use crate::error::{Error, Result};

/// Relative ridge added to the diagonal of the normal equations. It is far above the squared rounding error of the f32
/// snapshots; without it, hundreds of nearly identical profiles would be distinguished by that rounding error alone.
const RIDGE: f64 = 1e-12;
/// The accepted relative widths: the profile must rise, but not so steeply that it covers only the last steps.
pub const SIGMA_REL: (f64, f64) = (0.005, 0.28);

/// The relative width of the profile with exponent `gamma`: `(gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)` (section 3.1).
pub fn sigma_rel(gamma: f64) -> f64 {
    (gamma + 1.0).sqrt() / (gamma + 2.0) / (gamma + 3.0).sqrt()
}

/// The exponent of the profile with that relative width (appendix C); it decreases with the width.
///
/// # Errors
/// [`Error::Config`] for a width outside [`SIGMA_REL`].
pub fn gamma(width: f64) -> Result<f64> {
    if !(SIGMA_REL.0..=SIGMA_REL.1).contains(&width) {
        let reason = format!(
            "{width} is out of range; give {} (only the last weights) to {} (nearly uniform); 0.05 to 0.15 is usual",
            SIGMA_REL.0, SIGMA_REL.1
        );
        return Err(Error::Config { key: "sigma-rel".to_owned(), reason });
    }
    let (mut low, mut high) = (0.0, 1.0 / width);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if sigma_rel(middle) > width { low = middle } else { high = middle }
    }
    Ok(0.5 * (low + high))
}

/// The decay of such an average in step `t`, counted from 1 (section 3.1). With it, the weight of step s in the average is
/// exactly the integral of the profile from s - 1 to s.
pub fn decay(gamma: f64, t: u64) -> f64 {
    (1.0 - 1.0 / t as f64).powf(gamma + 1.0)
}

/// The weighting of the steps up to t in an average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Profile {
    /// The number of steps it covers.
    pub t: f64,
    /// The exponent.
    pub gamma: f64,
}

impl Profile {
    /// The integral of the product of two profiles (appendix C).
    fn dot(self, other: Self) -> f64 {
        let (first, last) = if self.t < other.t { (self, other) } else { (other, self) };
        (self.gamma + 1.0) * (other.gamma + 1.0) * (first.t / last.t).powf(last.gamma)
            / ((self.gamma + other.gamma + 1.0) * last.t)
    }
}

/// The coefficients of the linear combination of the `kept` averages that is closest to the `target` profile, and its
/// relative error in the L2 norm (appendix C, least squares).
///
/// # Errors
/// [`Error::Config`] if `kept` is empty.
pub fn coefficients(kept: &[Profile], target: Profile) -> Result<(Vec<f64>, f64)> {
    let norm: Vec<f64> = kept.iter().map(|p| p.dot(*p).sqrt()).collect();
    let target_norm = target.dot(target).sqrt();
    let row = |i: usize| -> Vec<f64> {
        let product =
            |j: usize| kept[i].dot(kept[j]) / (norm[i] * norm[j]) + if i == j { RIDGE } else { 0.0 };
        (0..kept.len()).map(product).collect()
    };
    let right: Vec<f64> = kept.iter().zip(&norm).map(|(p, s)| p.dot(target) / (s * target_norm)).collect();
    let x = solve((0..kept.len()).map(row).collect(), right.clone());
    if kept.is_empty() || x.iter().any(|x| !x.is_finite()) {
        let reason = "there are no snapshots to compute it from; train with ema.power_widths = [0.05, 0.1]";
        return Err(Error::Config { key: "sigma-rel".to_owned(), reason: reason.to_owned() });
    }
    // |p - w|^2 = w w - 2 x b + x A x, with all profiles normalized.
    let square = |i: usize| -> f64 {
        (0..kept.len()).map(|j| x[i] * x[j] * kept[i].dot(kept[j]) / (norm[i] * norm[j])).sum()
    };
    let error = 1.0 - 2.0 * x.iter().zip(&right).map(|(x, b)| x * b).sum::<f64>()
        + (0..kept.len()).map(square).sum::<f64>();
    let coefficients = x.iter().zip(&norm).map(|(x, s)| x * target_norm / s).collect();
    Ok((coefficients, error.max(0.0).sqrt()))
}

/// Solves `A x = b` by Gaussian elimination with partial pivoting; not finite if A is singular.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| a[i][k].abs().total_cmp(&a[j][k].abs())).unwrap_or(k);
        a.swap(k, pivot);
        b.swap(k, pivot);
        for i in k + 1..n {
            let factor = a[i][k] / a[k][k];
            for j in k..n {
                a[i][j] -= factor * a[k][j];
            }
            b[i] -= factor * b[k];
        }
    }
    for k in (0..n).rev() {
        let known: f64 = (k + 1..n).map(|j| a[k][j] * b[j]).sum();
        b[k] = (b[k] - known) / a[k][k];
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_and_exponents_match_the_paper() {
        // Section 3: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94.
        for (width, want) in [(0.05, 16.97), (0.10, 6.94)] {
            assert!((gamma(width).unwrap() - want).abs() < 0.005, "{width}: {}", gamma(width).unwrap());
        }
        for width in [0.005, 0.02, 0.15, 0.25, 0.28] {
            let gamma = gamma(width).unwrap();
            assert!((sigma_rel(gamma) / width - 1.0).abs() < 1e-12 && gamma > 0.0);
            // The standard deviation of the profile over t, from its moments: E[s] = (g + 1) / (g + 2), E[s^2] = (g + 1) / (g + 3).
            let (mean, square) = ((gamma + 1.0) / (gamma + 2.0), (gamma + 1.0) / (gamma + 3.0));
            assert!(((square - mean * mean).sqrt() / width - 1.0).abs() < 1e-9);
        }
        for bad in [0.0, 0.3, -1.0, f64::NAN] {
            assert!(gamma(bad).unwrap_err().to_string().contains("0.05 to 0.15 is usual"), "{bad}");
        }
    }

    #[test]
    fn profile_products_match_numerical_integrals() {
        const N: usize = 200_000;
        for (a, b) in
            [((100.0, 7.0), (100.0, 17.0)), ((40.0, 3.0), (100.0, 0.5)), ((100.0, 2.0), (70.0, 30.0))]
        {
            let (a, b) = (Profile { t: a.0, gamma: a.1 }, Profile { t: b.0, gamma: b.1 });
            let at = |p: Profile, s: f64| {
                if s > p.t { 0.0 } else { (p.gamma + 1.0) * s.powf(p.gamma) / p.t.powf(p.gamma + 1.0) }
            };
            let h = a.t.min(b.t) / N as f64;
            let sum: f64 = (0..N).map(|i| (i as f64 + 0.5) * h).map(|s| at(a, s) * at(b, s) * h).sum();
            assert!((a.dot(b) / sum - 1.0).abs() < 1e-7 && a.dot(b) == b.dot(a), "{a:?}, {b:?}");
        }
    }

    #[test]
    fn reconstructed_averages_match_tracked_ones() {
        const STEPS: u64 = 2000;
        const EVERY: u64 = 100;
        // Weights that move quickly at first and then drift, as in training.
        let mut noise = 1u32;
        let mut drift = 0.0;
        let weights: Vec<f64> = (1..=STEPS)
            .map(|t| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                drift += (f64::from(noise) / f64::from(u32::MAX) - 0.5) * 0.05;
                2.0 * (1.0 - (-(t as f64) / 300.0).exp()) + (t as f64 / 150.0).sin() * 0.1 + drift
            })
            .collect();
        let kept = |gamma: f64| -> Vec<f64> {
            let mut average = f64::NAN;
            let update = |(t, w): (u64, &f64)| {
                let decay = decay(gamma, t);
                average = if decay == 0.0 { *w } else { decay * average + (1.0 - decay) * w };
                average
            };
            (1..=STEPS).zip(&weights).map(update).collect()
        };
        let (mut profiles, mut values) = (Vec::new(), Vec::new());
        for width in [0.05, 0.10] {
            let gamma = gamma(width).unwrap();
            let all = kept(gamma);
            for t in (EVERY..=STEPS).step_by(EVERY as usize) {
                profiles.push(Profile { t: t as f64, gamma });
                // Rounded, as in a file.
                values.push(f64::from(all[t as usize - 1] as f32));
            }
        }
        let spread = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max)
            - weights.iter().copied().fold(f64::INFINITY, f64::min);
        for t in [2000u64, 1300] {
            let up_to = |p: &&Profile| p.t <= t as f64;
            let used: Vec<Profile> = profiles.iter().filter(up_to).copied().collect();
            let of: Vec<f64> =
                profiles.iter().zip(&values).filter(|(p, _)| up_to(p)).map(|(_, n)| *n).collect();
            for (width, profile_error, error) in [
                (0.05, 1e-5, 1e-5),
                (0.08, 1e-2, 1e-3),
                (0.10, 1e-5, 1e-5),
                (0.15, 0.05, 3e-3),
                (0.2, 0.1, 1e-2),
            ] {
                let gamma = gamma(width).unwrap();
                let (coefficients, profile_distance) =
                    coefficients(&used, Profile { t: t as f64, gamma }).unwrap();
                let got: f64 = coefficients.iter().zip(&of).map(|(c, n)| c * n).sum();
                let want = kept(gamma)[t as usize - 1];
                println!(
                    "{width} at {t}: profile {profile_distance:.1e}, weights {:.1e}",
                    (got - want).abs() / spread
                );
                assert!(profile_distance < profile_error, "{width} at {t}: {profile_distance}");
                assert!((got - want).abs() < error * spread, "{width} at {t}: {got}, not {want}");
                assert!((coefficients.iter().sum::<f64>() - 1.0).abs() < 0.02, "{width} at {t}");
            }
        }
        assert!(coefficients(&[], Profile { t: 1.0, gamma: 7.0 }).is_err());
    }

    #[test]
    fn linear_equations_are_solved_with_pivoting() {
        let a = vec![vec![0.0, 2.0, 1.0], vec![1.0, 1.0, 0.0], vec![3.0, 0.0, -1.0]];
        let x = [1.0, -2.0, 3.0];
        let b = a.iter().map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum()).collect();
        assert!(solve(a, b).iter().zip(x).all(|(got, x)| (got - x).abs() < 1e-14));
        assert!(solve(vec![vec![0.0]], vec![1.0])[0].is_infinite());
    }
}
