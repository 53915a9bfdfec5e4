//! Distance of samples from the data against the number of steps.

use super::axis::Axis;
use super::chart::{Chart, Line};
use super::{COLOURS, lighten, render};
use crate::error::Result;
use crate::image::Image;

/// Width and height of the plot in pixels.
const SIZE: (u32, u32) = (1000, 620);

/// One line per sampler, of (steps, distance), on logarithmic axes.
///
/// # Errors
/// [`Error::Plot`](crate::Error::Plot).
pub fn distances(title: &str, all: &[(String, Vec<(f64, f64)>)]) -> Result<Image> {
    let points = || all.iter().flat_map(|(_, points)| points);
    let mut chart = Chart {
        title: title.to_owned(),
        x: Axis::log("steps", points().map(|p| p.0)),
        y: Axis::log("Fréchet distance", points().map(|p| p.1)),
        lines: Vec::new(),
    };
    for (i, (name, points)) in all.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        // Colours repeat in a lighter shade.
        let colour = if i < COLOURS.len() { colour } else { lighten(colour) };
        chart.lines.push(Line { name: name.clone(), points: points.clone(), colour, width: 2 });
    }
    render(SIZE.0, SIZE.1, |area| chart.draw(area))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sampler_has_a_line() {
        let all: Vec<_> = (0..9)
            .map(|i| (format!("sampler {i}"), vec![(5.0, 1.0 + f64::from(i)), (50.0, 0.1), (1000.0, 0.05)]))
            .collect();
        let image = distances("distances", &all).unwrap();
        assert_eq!((image.width, image.height), (1000, 620));
        for colour in COLOURS {
            assert!(image.data.chunks(3).any(|p| *p == [colour.0, colour.1, colour.2]));
        }
        assert!(distances("none", &[]).is_ok());
    }
}
