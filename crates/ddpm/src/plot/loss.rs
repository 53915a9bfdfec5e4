//! The loss curve of a training run.

use super::axis::{Axis, span};
use super::chart::{Chart, Line};
use super::{COLOURS, lighten, render};
use crate::error::Result;
use crate::image::Image;
use std::collections::VecDeque;

/// Window of the running mean, in steps.
const WINDOW: usize = 100;
/// Maximum number of bins: about one per pixel column of the supersampled plot.
const BINS: usize = 1600;
/// Width and height of the plot in pixels.
const SIZE: (u32, u32) = (960, 560);
/// Ratio of largest to smallest loss from which the axis is logarithmic.
const LOG_FROM: f64 = 8.0;

/// The losses of a run, binned to the plot's resolution so that memory stays constant.
#[derive(Clone, Debug)]
pub struct LossCurve {
    /// Steps in a bin, a power of two.
    width: u64,
    bins: Vec<Bin>,
    recent: VecDeque<f64>,
}

/// Consecutive steps; `mean` is the running mean at the last of them, NaN until its window is full.
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
    /// Adds the loss of the next step; a non-finite one is ignored.
    pub fn push(&mut self, step: u64, loss: f64) {
        if !loss.is_finite() {
            return;
        }
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
        // The mean of a partial window would be noisy at first and then fall as if the network were learning.
        let full = self.recent.len() == WINDOW;
        let mean = if full { self.recent.iter().sum::<f64>() / WINDOW as f64 } else { f64::NAN };
        self.bins.push(Bin { number: step / self.width, step, low: loss, high: loss, mean });
        self.merge_last();
        while self.bins.len() > BINS {
            self.width *= 2;
            let bins = std::mem::take(&mut self.bins);
            for bin in bins {
                self.bins.push(Bin { number: bin.number / 2, ..bin });
                self.merge_last();
            }
        }
    }

    /// Merges the last two bins if they have the same number.
    fn merge_last(&mut self) {
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

    /// Plots the loss of every step in a light colour and, from step 100, the mean of the last 100 steps; on a
    /// logarithmic axis if the losses span a factor of eight or more.
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
        let mut lines = vec![line("each step", each.collect(), lighten(COLOURS[0]), 1)];
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
    fn binning_keeps_extremes_and_the_running_mean() {
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
            // Summed in another order: a few f64 rounding errors.
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
    fn few_unusual_or_huge_losses_are_drawn() {
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
    fn both_lines_are_drawn_with_the_mean_on_top() {
        let image = curve((0..500).map(|i| 0.5 + f64::from(i % 2) * 0.3)).plot("x").unwrap();
        let count = |colour: plotters::style::RGBColor| {
            image.data.chunks(3).filter(|p| **p == [colour.0, colour.1, colour.2]).count()
        };
        assert!(count(COLOURS[0]) > 500, "the mean: {}", count(COLOURS[0]));
        assert!(count(lighten(COLOURS[0])) > 10_000, "the steps: {}", count(lighten(COLOURS[0])));
    }
}
