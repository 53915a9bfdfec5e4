//! Axes: range, tick positions and tick labels.

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// Largest magnitude on an axis; beyond it, differences overflow.
const MAX_VALUE: f64 = 1e300;

/// An axis with its title. Both ends are finite, and `low < high`.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub title: String,
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// A linear axis that spans `values`, with `margin` times their range added at either end. Values that are not finite or
    /// exceed [`MAX_VALUE`] are ignored.
    pub fn linear(title: &str, values: impl IntoIterator<Item = f64>, margin: f64) -> Self {
        let (low, high) = span(values.into_iter().filter(|v| v.abs() <= MAX_VALUE)).unwrap_or((0.0, 1.0));
        let room = if high - low > low.abs().max(high.abs()) * 1e-9 {
            (high - low) * margin
        } else {
            // All values are equal.
            low.abs().max(1e-3) / 2.0
        };
        Self { title: title.to_owned(), low: low - room, high: high + room, log: false }
    }

    /// A logarithmic axis that spans the positive `values`, within the same limits.
    pub fn log(title: &str, values: impl IntoIterator<Item = f64>) -> Self {
        let positive = values.into_iter().filter(|v| (1.0 / MAX_VALUE..=MAX_VALUE).contains(v));
        let (low, high) = span(positive).unwrap_or((0.1, 1.0));
        Self { title: title.to_owned(), low: low / 1.1, high: high * 1.1, log: true }
    }

    /// Relative position of a value: 0 at the low end, 1 at the high end.
    fn fraction(&self, value: f64) -> f64 {
        let f = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).log10() } else { v };
        (f(value) - f(self.low)) / (f(self.high) - f(self.low))
    }

    /// At most `most` round tick values.
    fn ticks(&self, most: usize) -> Vec<f64> {
        let inside = |v: &f64| (self.low..=self.high).contains(v);
        if self.log {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let ticks = |digits: &[f64], every: i32| -> Vec<f64> {
                let powers = decades.clone().filter(|p| p % every == 0);
                powers.flat_map(|p| digits.iter().map(move |d| d * 10f64.powi(p))).filter(inside).collect()
            };
            let kinds: [(&[f64], i32); 7] = [
                (&[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0], 1),
                (&[1.0, 2.0, 5.0], 1),
                (&[1.0, 3.0], 1),
                (&[1.0], 1),
                (&[1.0], 2),
                (&[1.0], 10),
                (&[1.0], 100),
            ];
            if let Some(found) =
                kinds.iter().map(|(d, e)| ticks(d, *e)).find(|t| (3..=most).contains(&t.len()))
            {
                return found;
            }
        }
        let tick_step = tick_step(self.high - self.low, most);
        let (first, last) = ((self.low / tick_step).ceil(), (self.high / tick_step).floor());
        (0..=(last - first) as usize).map(|i| (first + i as f64) * tick_step).filter(inside).collect()
    }
}

/// Minimum and maximum.
pub(super) fn span(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |span, v| {
        span.map_or(Some((v, v)), |(low, high): (f64, f64)| Some((low.min(v), high.max(v))))
    })
}

/// The smallest step of 1, 2 or 5 times a power of ten that fits into `range` at most `most - 1` times.
fn tick_step(range: f64, most: usize) -> f64 {
    let least = range / most.max(2).saturating_sub(1) as f64;
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|d| d * power).find(|s| *s >= least).unwrap_or(10.0 * power)
}

/// Formats a tick label: `0.05`, `20,000`, `1e-7`.
fn format_tick(v: f64) -> String {
    // Rounding errors in sums of steps.
    let v = if v.abs() < 1e-300 { 0.0 } else { v };
    if v != 0.0 && !(1e-4..1e7).contains(&v.abs()) {
        return format!("{v:.2e}").replace(".00e", "e").replace("0e", "e");
    }
    let text = format!("{v:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    let (sign, text) = text.strip_prefix('-').map_or(("", text), |t| ("\u{2212}", t));
    let (whole, part) = text.split_once('.').map_or((text, String::new()), |(w, p)| (w, format!(".{p}")));
    let mut grouped = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{part}")
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        // Within the chart and a little beyond it, where plotters clips lines.
        let fraction = self.fraction(*value).clamp(-1.0, 2.0);
        limit.0 + (f64::from(limit.1 - limit.0) * fraction).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        self.ticks(hint.bold_points())
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        format_tick(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_within_the_axis() {
        let axis = Axis::linear("", [0.0, 1.0], 0.0);
        let written = |axis: &Axis, most| axis.ticks(most).into_iter().map(format_tick).collect::<Vec<_>>();
        assert_eq!(written(&axis, 6), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(
            written(&Axis::linear("", [-20.0, 11.0], 0.0), 6),
            ["\u{2212}20", "\u{2212}10", "0", "10"]
        );
        assert_eq!(
            written(&Axis::linear("", [1.0, 40_000.0], 0.0), 5),
            ["10,000", "20,000", "30,000", "40,000"]
        );
        assert_eq!(written(&Axis::log("", [0.02, 1.2]), 8), ["0.02", "0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(written(&Axis::log("", [1e-9, 1.0]), 6), ["1e-8", "1e-6", "0.0001", "0.01", "1"]);
        // Less than a decade gets linear ticks.
        assert!(written(&Axis::log("", [0.51, 0.59]), 8).len() >= 3);
    }

    #[test]
    fn any_values_make_a_drawable_axis() {
        let odd: [&[f64]; 8] = [
            &[],
            &[0.0],
            &[5.0, 5.0],
            &[f64::NAN, f64::INFINITY],
            &[-1.0, 1e-320],
            &[f64::MAX, -f64::MAX],
            &[1e300, 2e300],
            &[1e-300, 1e-301, 1e300],
        ];
        for values in odd {
            for axis in
                [Axis::linear("", values.iter().copied(), 0.05), Axis::log("", values.iter().copied())]
            {
                assert!(
                    axis.low < axis.high && axis.low.is_finite() && axis.high.is_finite(),
                    "{values:?}: {axis:?}"
                );
                for most in [0, 1, 2, 10] {
                    let ticks = axis.ticks(most);
                    assert!(ticks.len() <= most.max(3) + 1, "{values:?}: {ticks:?}");
                }
                assert!((0..=100).contains(&axis.map(&axis.low, (0, 100))));
            }
        }
    }
}
