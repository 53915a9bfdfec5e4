//! Resizing and pooling.

use super::grid;
use crate::resample::Taps;

/// `y[oy, ox] = sum over taps of row weight * column weight * x[iy, ix]`, channel by channel, of one image.
pub fn resample(rows: &Taps, columns: &Taps, channels: usize, x: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; rows.outputs() * columns.outputs() * channels];
    for (oy, ox) in grid(rows.outputs(), columns.outputs()) {
        for &(iy, wy) in rows.of(oy) {
            for &(ix, wx) in columns.of(ox) {
                for ch in 0..channels {
                    y[(oy * columns.outputs() + ox) * channels + ch] +=
                        f64::from(wy) * f64::from(wx) * x[(iy * columns.inputs() + ix) * channels + ch];
                }
            }
        }
    }
    y
}

/// The maximum of each 2x2 block of one image `[h, w, channels]`, and its index in x (the first of equals).
pub fn max_pool(h: usize, w: usize, channels: usize, x: &[f64]) -> (Vec<f64>, Vec<usize>) {
    let mut positions = Vec::new();
    for (oy, ox) in grid(h / 2, w / 2) {
        for ch in 0..channels {
            let mut largest = (2 * oy * w + 2 * ox) * channels + ch;
            for (dy, dx) in grid(2, 2) {
                let at = ((2 * oy + dy) * w + 2 * ox + dx) * channels + ch;
                if x[at] > x[largest] {
                    largest = at;
                }
            }
            positions.push(largest);
        }
    }
    (positions.iter().map(|&at| x[at]).collect(), positions)
}
