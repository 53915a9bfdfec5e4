//! Comparison of noise schedules.

use super::axis::Axis;
use super::chart::{Chart, Line};
use super::{COLOURS, render};
use crate::error::Result;
use crate::image::Image;
use crate::schedule::Schedule;

/// Width and height of the plot in pixels: two charts side by side.
const SIZE: (u32, u32) = (1240, 520);
/// Maximum points per line; longer schedules are subsampled.
const POINTS: usize = 300;

/// Plots named schedules, of any lengths: `alpha_bar_t`, the remaining share of the image's variance, and the
/// logarithm of the signal-to-noise ratio `alpha_bar_t / (1 - alpha_bar_t)`, both against t / T (t from 1 to T, as in
/// the paper).
///
/// # Errors
/// [`Error::Plot`](crate::Error::Plot).
pub fn schedules(all: &[(String, Schedule)]) -> Result<Image> {
    let charts = [
        chart("Remaining share of the image's variance", "\u{1fb1}(t)", all, Schedule::alpha_bar),
        chart(
            "Signal-to-noise ratio",
            "ln SNR(t) = ln[ \u{1fb1}(t) / (1 \u{2212} \u{1fb1}(t)) ]",
            all,
            Schedule::log_snr,
        ),
    ];
    render(SIZE.0, SIZE.1, |area| {
        for (area, chart) in area.split_evenly((1, charts.len())).iter().zip(&charts) {
            chart.draw(area)?;
        }
        Ok(())
    })
}

fn chart(title: &str, y: &str, all: &[(String, Schedule)], value: fn(&Schedule, usize) -> f64) -> Chart {
    let lines: Vec<Line> = all
        .iter()
        .zip(COLOURS.iter().cycle())
        .map(|((name, schedule), &colour)| {
            let last = schedule.timesteps() - 1;
            let count = POINTS.min(last + 1);
            let t = |i: usize| if count == 1 { 0 } else { i * last / (count - 1) };
            let points = (0..count).map(t).map(|t| ((t + 1) as f64 / (last + 1) as f64, value(schedule, t)));
            Line { name: name.clone(), points: points.collect(), colour, width: 2 }
        })
        .collect();
    let values = lines.iter().flat_map(|l| &l.points).map(|p| p.1);
    Chart {
        title: title.to_owned(),
        x: Axis::linear("t / T", [0.0, 1.0], 0.0),
        y: Axis::linear(y, values, 0.04),
        lines,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_of_any_length_have_their_own_colours() {
        let all = [1, 2, 300, 5000].map(|t| (format!("T = {t}"), Schedule::linear(t, 1e-4, 0.02).unwrap()));
        let image = schedules(&all).unwrap();
        for (colour, (name, _)) in COLOURS.iter().zip(&all) {
            let found = image.data.chunks(3).filter(|p| **p == [colour.0, colour.1, colour.2]).count();
            // At least in the two legends: lines of 24 by 2 pixels.
            assert!(found >= 90, "{name}: {found}");
        }
        assert!(schedules(&[]).is_ok());
    }
}
