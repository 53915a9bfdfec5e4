//! The terms of a variational bound over the timesteps.

use super::axis::Axis;
use super::chart::{Chart, Line};
use super::{COLOURS, render};
use crate::error::Result;
use crate::image::Image;

/// Width and height of the plot in pixels: two charts side by side.
const SIZE: (u32, u32) = (1240, 520);

/// Plots the mean term in consecutive ranges of timesteps, and the cumulative sum. A range is given by its first and last
/// timestep (from 1, as in the paper) and the mean of its terms in bits per dimension; ranges are ascending without gaps.
///
/// # Errors
/// [`Error::Plot`](crate::Error::Plot).
pub fn bound(title: &str, parts: &[(f64, f64, f64)]) -> Result<Image> {
    let ends = || parts.iter().flat_map(|p| [p.0, p.1]);
    let chart = |title: &str, name: &str, y: Axis, points| Chart {
        title: title.to_owned(),
        x: Axis::log("timestep t (log scale)", ends()),
        y,
        lines: vec![Line { name: name.to_owned(), points, colour: COLOURS[0], width: 2 }],
    };
    // A staircase: the mean of a range stands for each of its terms.
    let terms: Vec<(f64, f64)> = parts.iter().flat_map(|p| [(p.0, p.2), (p.1, p.2)]).collect();
    let mut sum = 0.0;
    let sums: Vec<(f64, f64)> = parts
        .iter()
        .map(|p| {
            sum += p.2 * (p.1 - p.0 + 1.0);
            (p.1, sum)
        })
        .collect();
    // Leaves room for the legend above the curve's end.
    let (least, most) = (0.0, 1.15 * sums.last().map_or(0.0, |s| s.1));
    let charts = [
        chart(
            title,
            "mean of each range",
            Axis::log("term at t, bits/dim (log scale)", terms.iter().map(|p| p.1)),
            terms,
        ),
        chart("Sum of the terms up to t", "sum", Axis::linear("bits/dim", [least, most], 0.04), sums),
    ];
    render(SIZE.0, SIZE.1, |area| {
        for (area, chart) in area.split_evenly((1, charts.len())).iter().zip(&charts) {
            chart.draw(area)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusual_terms_are_drawn() {
        let falling: Vec<_> =
            (1..100).map(|t| (f64::from(t), f64::from(t), 1.0 / f64::from(t * t))).collect();
        for parts in [&falling[..], &[(1.0, 1.0, 0.5)], &[(1.0, 1.0, f64::NAN), (2.0, 50.0, -1e-9)], &[]] {
            let image = bound("terms", parts).unwrap();
            assert_eq!((image.width as u32, image.height as u32), SIZE);
        }
        let image = bound("terms", &falling).unwrap();
        let blue = [COLOURS[0].0, COLOURS[0].1, COLOURS[0].2];
        assert!(image.data.chunks(3).filter(|p| **p == blue).count() > 500);
    }
}
