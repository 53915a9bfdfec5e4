//! Zhao, Bai, Rao, Zhou, Lu, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", 2023.

use super::dpm_solver::LONGEST;
use super::drawing::{Drawing, X, X_0, own};
use super::{Levels, SampleStep, Sampler, Seeds, Threshold};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Level;
use ddpm_engine::Vector;

/// Most expected images that a step looks back on.
const MOST: usize = 3;

/// Their places, in any order, and x where a step begins.
const PAST: [Vector; MOST] = [own(0), own(1), own(2)];
const START: Vector = own(3);

/// UniPC in the data prediction, with `B(h) = e^h - 1` (the authors' "bh2"). A step looks back on `p` expected images,
/// and each prediction serves twice: it corrects the step that led to it, and makes the next. Of order p + 1, one
/// prediction a step.
#[derive(Clone, Debug)]
pub struct UniPc {
    /// The levels that are visited.
    pub levels: Levels,
    /// The paper's p, 1 to 3.
    pub p: usize,
    /// What is done about expected images outside [-1, 1].
    pub threshold: Threshold,
}

/// The expected images of the last levels, the newest first.
#[derive(Default)]
struct Past {
    levels: Vec<Level>,
    x_0: Vec<Vector>,
}

impl Past {
    fn add(&mut self, d: &mut Drawing<'_>, level: Level) -> Result<()> {
        let oldest = if self.x_0.len() == MOST { self.x_0.pop() } else { None };
        let place = oldest.unwrap_or(PAST[self.x_0.len()]);
        d.copy(place, X_0)?;
        self.x_0.insert(0, place);
        self.levels.insert(0, level);
        self.levels.truncate(MOST);
        Ok(())
    }

    /// One step to a level from the newest of these, looking back on `p`; `corrected` is what the network expects there,
    /// where that is known. (algorithm 1 and 2; eq. 9)
    /// ```text
    /// x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) (m_0 + sum of rho_k (m_k - m_0) / r_k)
    /// ```
    /// with `r_k = (lambda_k - lambda_s) / h`, where 1 stands for the corrected one. The rho solve the equations
    /// `sum of rho_k r_k^(j-1) = b_j`, j = 1, .., of which the last is left out where there is nothing corrected.
    fn step(&self, d: &mut Drawing<'_>, to: Level, p: usize, corrected: Option<Vector>) -> Result<()> {
        let from = self.levels[0];
        let h = to.lambda() - from.lambda();
        let mut r: Vec<f64> = (1..p).map(|k| (self.levels[k].lambda() - from.lambda()) / h).collect();
        let mut known = self.x_0[1..p].to_vec();
        if let Some(m) = corrected {
            r.push(1.0);
            known.push(m);
        }
        let rho = match known.len() {
            // The authors' choice where one image is known: any gives the order.
            1 => vec![0.5],
            n => solve(&r, &moments(-h, n)),
        };
        let gain = to.alpha * -(-h).exp_m1();
        let total: f64 = rho.iter().zip(&r).map(|(rho, r)| rho / r).sum();
        d.blend(X, to.sigma / from.sigma, [(gain * (1.0 - total), self.x_0[0])])?;
        for ((m, rho), r) in known.into_iter().zip(rho).zip(r) {
            d.blend(X, 1.0, [(gain * rho / r, m)])?;
        }
        Ok(())
    }
}

/// `b_j = j! phi_{j+1}(h) h / (e^h - 1)` for j from 1, with `phi_1 = (e^h - 1) / h` and `phi_{j+1} = (phi_j - 1 / j!) / h`.
fn moments(h: f64, n: usize) -> Vec<f64> {
    let b = h.exp_m1();
    let (mut phi, mut factorial) = (b / h - 1.0, 1.0);
    let each = (1..=n).map(|j| {
        let moment = phi * factorial / b;
        factorial *= (j + 1) as f64;
        phi = phi / h - 1.0 / factorial;
        moment
    });
    each.collect()
}

/// The rho of `sum of rho_k r_k^(j-1) = b_j`, one equation for each r; no two r are alike.
fn solve(r: &[f64], b: &[f64]) -> Vec<f64> {
    let n = r.len();
    let row = |j: usize| r.iter().map(|r| r.powi(j as i32)).chain([b[j]]).collect::<Vec<f64>>();
    let mut rows: Vec<Vec<f64>> = (0..n).map(row).collect();
    for i in 0..n {
        let pivot = rows[i].clone();
        for (j, row) in rows.iter_mut().enumerate().filter(|&(j, _)| j != i) {
            let factor = row[i] / pivot[i];
            debug_assert!(factor.is_finite(), "row {j}");
            row.iter_mut().zip(&pivot).for_each(|(a, p)| *a -= factor * p);
        }
    }
    rows.iter().enumerate().map(|(i, row)| row[n] / row[i]).collect()
}

impl Sampler for UniPc {
    /// ```text
    /// for each level:
    ///     m = x_0(x)                 the prediction at the level
    ///     x = the step before, made anew with m               (UniC-p, not at the first level)
    ///     x = the step to the next level                      (UniP-p)
    /// ```
    /// The first steps and the last look back on as many as there are, or are needed; one that is much longer than the one before on
    /// none, as that of [`DpmSolver2M`](super::DpmSolver2M).
    fn sample_from(
        &self,
        start: Option<&[f32]>,
        denoiser: &mut dyn Denoiser,
        seeds: Seeds,
        on_step: &mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let steps = self.levels.steps();
        let mut d = Drawing::new(start, denoiser, seeds, self.threshold, steps, on_step)?;
        let (mut past, mut p) = (Past::default(), 1);
        d.copy(START, X)?;
        for (i, (from, to)) in self.levels.pairs().enumerate() {
            d.denoise(from)?;
            if i > 0 {
                d.copy(X, START)?;
                past.step(&mut d, from, p, Some(X_0))?;
                d.copy(START, X)?;
            }
            past.add(&mut d, from)?;
            p = self.p.clamp(1, MOST).min(i + 1).min(steps - i);
            let length = |from: Level, to: Level| to.lambda() - from.lambda();
            if p > 1 && length(from, to) > LONGEST * length(past.levels[1], from) {
                p = 1;
            }
            past.step(&mut d, to, p, None)?;
            d.step(from)?;
        }
        d.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rho_solve_their_equations() {
        let (r, b) = ([-2.0, -0.7, 1.0], [0.3, -0.2, 0.9]);
        let rho = solve(&r, &b);
        for (j, b) in b.iter().enumerate() {
            let sum: f64 = r.iter().zip(&rho).map(|(r, rho)| rho * r.powi(j as i32)).sum();
            // A few roundings of numbers up to 4.
            assert!((sum - b).abs() < 1e-14, "{j}");
        }
        // phi_2(h) h / (e^h - 1) tends to 1/2, and 2 phi_3(h) h / (e^h - 1) to 1/3; the error is h / 12.
        let b = moments(-1e-3, 2);
        assert!((b[0] - 0.5).abs() < 1e-4 && (b[1] - 1.0 / 3.0).abs() < 1e-4, "{b:?}");
    }
}
