//! Zhao, Bai, Rao, Zhou, Lu, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", 2023.

use super::dpm_solver::MAX_STEP_RATIO;
use super::registry::{EXPONENTIAL_FIRST, SamplerInfo};
use super::state::SamplerState;
use super::{Levels, Sampler, Threshold};
use crate::buffers::{BufferId, X, X_0, scratch};
use crate::error::Result;
use crate::schedule::Level;

/// Largest number of predicted images that a step uses.
const MAX_ORDER: usize = 3;

/// Their buffers, in any order, and x at the start of a step.
const HISTORY: [BufferId; MAX_ORDER] = [scratch(0), scratch(1), scratch(2)];
const START: BufferId = scratch(3);

/// UniPC in data prediction, with `B(h) = e^h - 1` (the authors' "bh2"). A step uses the last `p` predicted
/// images, and each prediction is used twice: to correct the step that led to it and to make the next. Order
/// p + 1, one evaluation per step.
#[derive(Clone, Debug)]
pub struct UniPc {
    /// Noise levels to visit.
    pub levels: Levels,
    /// The paper's p, 1 to 3.
    pub p: usize,
    /// Treatment of predicted images outside [-1, 1].
    pub threshold: Threshold,
}

/// The predicted images of the last levels, newest first.
#[derive(Default)]
struct History {
    levels: Vec<Level>,
    x_0: Vec<BufferId>,
}

impl History {
    fn add(&mut self, d: &mut SamplerState<'_>, level: Level) -> Result<()> {
        let oldest = if self.x_0.len() == MAX_ORDER { self.x_0.pop() } else { None };
        let backend = oldest.unwrap_or(HISTORY[self.x_0.len()]);
        d.copy(backend, X_0)?;
        self.x_0.insert(0, backend);
        self.levels.insert(0, level);
        self.levels.truncate(MAX_ORDER);
        Ok(())
    }

    /// A step of order `p` from the newest level to another; `corrected` is the image predicted there, if
    /// known (algorithms 1 and 2; eq. 9).
    /// ```text
    /// x_t = sigma_t / sigma_s x_s + alpha_t (1 - e^-h) (m_0 + sum of rho_k (m_k - m_0) / r_k)
    /// ```
    /// with `r_k = (lambda_k - lambda_s) / h`, which is 1 for `corrected`. The rho solve `sum of rho_k
    /// r_k^(j-1) = b_j`, j = 1, ..; without `corrected` the last equation is dropped.
    fn step(&self, d: &mut SamplerState<'_>, to: Level, p: usize, corrected: Option<BufferId>) -> Result<()> {
        let from = self.levels[0];
        let h = to.lambda() - from.lambda();
        let mut r: Vec<f64> = (1..p).map(|k| (self.levels[k].lambda() - from.lambda()) / h).collect();
        let mut known = self.x_0[1..p].to_vec();
        if let Some(m) = corrected {
            r.push(1.0);
            known.push(m);
        }
        let rho = match known.len() {
            // The authors' choice for a single known image; any value gives the order.
            1 => vec![0.5],
            n => solve(&r, &moments(-h, n)),
        };
        let gain = to.alpha * -(-h).exp_m1();
        let total: f64 = rho.iter().zip(&r).map(|(rho, r)| rho / r).sum();
        d.axpby(X, to.sigma / from.sigma, [(gain * (1.0 - total), self.x_0[0])])?;
        for ((m, rho), r) in known.into_iter().zip(rho).zip(r) {
            d.axpby(X, 1.0, [(gain * rho / r, m)])?;
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

/// Solves `sum of rho_k r_k^(j-1) = b_j` for rho, one equation per r; all r are distinct.
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

pub(super) const UNIPC: SamplerInfo = SamplerInfo {
    steps: Some(10),
    order: Some(3),
    spacings: &EXPONENTIAL_FIRST,
    ..SamplerInfo::new("unipc", "UniPC-2, good in 5 to 15 steps (Zhao et al. 2023)", |args| {
        Box::new(UniPc { levels: args.levels, p: 2, threshold: args.threshold })
    })
};

impl Sampler for UniPc {
    fn levels(&self) -> &Levels {
        &self.levels
    }

    fn threshold(&self) -> Threshold {
        self.threshold
    }

    /// ```text
    /// for each level:
    ///     m = x_0(x)                 the prediction at this level
    ///     x = the previous step, redone with m                (UniC-p, not at the first level)
    ///     x = the step to the next level                      (UniP-p)
    /// ```
    /// The order is lower in the first and last steps, and 1 in a step much longer than the previous one, as
    /// in [`DpmSolver2M`](super::DpmSolver2M).
    fn run(&self, d: &mut SamplerState<'_>) -> Result<()> {
        let steps = self.levels.steps();
        let (mut history, mut p) = (History::default(), 1);
        d.copy(START, X)?;
        for (i, (from, to)) in self.levels.pairs().enumerate() {
            d.denoise(from)?;
            if i > 0 {
                d.copy(X, START)?;
                history.step(d, from, p, Some(X_0))?;
                d.copy(START, X)?;
            }
            history.add(d, from)?;
            p = self.p.clamp(1, MAX_ORDER).min(i + 1).min(steps - i);
            let length = |from: Level, to: Level| to.lambda() - from.lambda();
            if p > 1 && length(from, to) > MAX_STEP_RATIO * length(history.levels[1], from) {
                p = 1;
            }
            history.step(d, to, p, None)?;
            d.step(from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rho_solves_its_equations() {
        let (r, b) = ([-2.0, -0.7, 1.0], [0.3, -0.2, 0.9]);
        let rho = solve(&r, &b);
        for (j, b) in b.iter().enumerate() {
            let sum: f64 = r.iter().zip(&rho).map(|(r, rho)| rho * r.powi(j as i32)).sum();
            // A few rounding errors at magnitudes up to 4.
            assert!((sum - b).abs() < 1e-14, "{j}");
        }
        // phi_2(h) h / (e^h - 1) tends to 1/2, and 2 phi_3(h) h / (e^h - 1) to 1/3; the error is h / 12.
        let b = moments(-1e-3, 2);
        assert!((b[0] - 0.5).abs() < 1e-4 && (b[1] - 1.0 / 3.0).abs() < 1e-4, "{b:?}");
    }
}
