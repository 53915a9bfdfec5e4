//! The loss of a training run over its steps.

use super::axis::{Axis, span};
use super::chart::{Chart, Line};
use super::{COLOURS, pale, render};
use crate::error::Result;
use crate::image::Image;
use std::collections::VecDeque;

/// Steps that the running mean is over.
const WINDOW: usize = 100;
/// Most bins that are kept: about as many as the plot has columns to draw on.
const BINS: usize = 1600;
/// Width and height of the plot, in pixels.
const SIZE: (u32, u32) = (960, 560);
/// How many times the least loss the largest must be for a logarithmic axis.
const LOG_FROM: f64 = 8.0;

/// The losses of a run, kept as finely as a plot can show them: memory does not grow with the run.
#[derive(Clone, Debug)]
pub struct LossCurve {
    /// Steps in a bin, a power of two.
    width: u64,
    bins: Vec<Bin>,
    recent: VecDeque<f64>,
}

/// Some consecutive steps; `mean` is the running mean at the last of them, NaN where fewer steps than its window were made.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bin {
    number: u64,
    step: u64,
    low: f64,
    high: f64,
    mean: f64,
}

impl Default for LossCurve {
    fn default() -> Self {
        Self { width: 1, bins: Vec::new(), recent: VecDeque::new() }
    }
}

impl LossCurve {
    /// Adds the loss of a later step; one that is not finite is left out.
    pub fn push(&mut self, step: u64, loss: f64) {
        if !loss.is_finite() {
            return;
        }
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
        // A mean of fewer steps would start as noisy as they are, and fall like a loss that is learnt.
        let full = self.recent.len() == WINDOW;
        let mean = if full { self.recent.iter().sum::<f64>() / WINDOW as f64 } else { f64::NAN };
        self.bins.push(Bin { number: step / self.width, step, low: loss, high: loss, mean });
        self.join();
        while self.bins.len() > BINS {
            self.width *= 2;
            let bins = std::mem::take(&mut self.bins);
            for bin in bins {
                self.bins.push(Bin { number: bin.number / 2, ..bin });
                self.join();
            }
        }
    }

    /// Makes one of the last two bins if they have one number.
    fn join(&mut self) {
        if let [.., before, last] = &mut self.bins[..]
            && before.number == last.number
        {
            *before = Bin { low: before.low.min(last.low), high: before.high.max(last.high), ..*last };
            self.bins.pop();
        }
    }

    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.bins.is_empty()
    }

    /// Draws the loss of every step faint, the mean of the last 100 strong from the 100th step on; on a logarithmic axis if the
    /// losses span a factor of eight or more.
    ///
    /// # Errors
    /// [`Error::Plot`](crate::Error::Plot).
    pub fn plot(&self, title: &str) -> Result<Image> {
        let all = || self.bins.iter().flat_map(|b| [b.low, b.high]);
        let y = match span(all()) {
            Some((low, high)) if low > 0.0 && high >= LOG_FROM * low => Axis::log("loss (log scale)", all()),
            _ => Axis::linear("loss", all(), 0.05),
        };
        let last = self.bins.last().map_or(0, |b| b.step);
        let each = self.bins.iter().flat_map(|b| {
            let ends = if b.low == b.high { &[b.low][..] } else { &[b.low, b.high][..] };
            ends.iter().map(|&loss| (b.step as f64, loss)).collect::<Vec<_>>()
        });
        let mean: Vec<_> =
            self.bins.iter().filter(|b| b.mean.is_finite()).map(|b| (b.step as f64, b.mean)).collect();
        let line = |name: &str, points, colour, width| Line { name: name.to_owned(), points, colour, width };
        let mut lines = vec![line("each step", each.collect(), pale(COLOURS[0]), 1)];
        if !mean.is_empty() {
            lines.push(line(&format!("mean of the last {WINDOW}"), mean, COLOURS[0], 2));
        }
        let x = Axis::linear("training step", [0.0, last as f64], 0.0);
        let chart = Chart { title: title.to_owned(), x, y, lines };
        render(SIZE.0, SIZE.1, |area| chart.draw(area))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(losses: impl IntoIterator<Item = f64>) -> LossCurve {
        let mut curve = LossCurve::default();
        losses.into_iter().enumerate().for_each(|(step, loss)| curve.push(step as u64, loss));
        curve
    }

    #[test]
    fn thinning_keeps_every_extreme_and_the_running_mean() {
        let losses: Vec<f64> = (0..50_000).map(|i| f64::from(i * 7919 % 10_007) / 1e4 + 0.1).collect();
        let curve = curve(losses.iter().copied());
        assert!(curve.bins.len() <= BINS && curve.bins.len() > BINS / 2, "{}", curve.bins.len());
        let mut first = 0;
        for bin in &curve.bins {
            let steps = &losses[first..=bin.step as usize];
            assert_eq!(span(steps.iter().copied()), Some((bin.low, bin.high)));
            first = bin.step as usize + 1;
            let Some(from) = first.checked_sub(WINDOW) else {
                assert!(bin.mean.is_nan(), "step {first} has no full window");
                continue;
            };
            let recent = &losses[from..first];
            // A sum in another order: a few rounding errors of f64.
            assert!((bin.mean - recent.iter().sum::<f64>() / recent.len() as f64).abs() < 1e-12);
        }
        assert_eq!(first, losses.len());
    }

    #[test]
    fn the_running_mean_starts_where_its_window_is_full() {
        let short = curve((0..99).map(|_| 0.5));
        assert!(short.bins.iter().all(|b| b.mean.is_nan()));
        let blue = |image: &Image| {
            let blue = [COLOURS[0].0, COLOURS[0].1, COLOURS[0].2];
            image.data.chunks(3).filter(|p| **p == blue).count()
        };
        assert_eq!(blue(&short.plot("short").unwrap()), 0, "neither a line nor a legend");
        let long = curve((0..300).map(|i| if i < 100 { 1.0 } else { 0.5 }));
        assert!(long.bins[98].mean.is_nan() && long.bins[99].mean == 1.0 && long.bins[299].mean == 0.5);
        assert!(blue(&long.plot("long").unwrap()) > 100);
    }

    #[test]
    fn few_odd_or_enormous_losses_are_drawn_too() {
        let odd: [&[f64]; 7] = [
            &[],
            &[0.5],
            &[0.0, 0.0, 0.0],
            &[f64::NAN, f64::INFINITY],
            &[-1.0, 1e300, 1e-300],
            &[1e300, 1e-300],
            &[f64::MAX, f64::MIN],
        ];
        for losses in odd {
            let image = curve(losses.iter().copied()).plot("odd").unwrap();
            assert_eq!((image.width as u32, image.height as u32), SIZE, "{losses:?}");
        }
        let mut late = LossCurve::default();
        late.push(u64::MAX, 1.0);
        late.plot("late").unwrap();
    }

    #[test]
    fn both_lines_are_in_the_image_with_the_steps_behind_the_mean() {
        let image = curve((0..500).map(|i| 0.5 + f64::from(i % 2) * 0.3)).plot("x").unwrap();
        let count = |colour: plotters::style::RGBColor| {
            image.data.chunks(3).filter(|p| **p == [colour.0, colour.1, colour.2]).count()
        };
        assert!(count(COLOURS[0]) > 500, "the mean: {}", count(COLOURS[0]));
        assert!(count(pale(COLOURS[0])) > 10_000, "the steps: {}", count(pale(COLOURS[0])));
    }
}
