//! Linear resampling of images: every output row and column is a weighted sum of a few input rows and
//! columns.
//!
//! Nearest and bilinear upsampling and 2x2 mean pooling are this one kernel with different weights, and so
//! are their gradients, with transposed weights.

use crate::isa::{Isa, dispatch};
use pulp::Simd;

/// For each output position along one axis, the input positions it reads and their weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Taps {
    inputs: usize,
    /// Where the taps of each output position begin, plus the end.
    starts: Vec<usize>,
    taps: Vec<(usize, f32)>,
}

impl Taps {
    /// Builds the taps of each output position, over `inputs` input positions.
    pub fn new(inputs: usize, outputs: impl IntoIterator<Item = Vec<(usize, f32)>>) -> Self {
        let (mut starts, mut taps) = (vec![0], Vec::new());
        for of_one in outputs {
            taps.extend(of_one);
            starts.push(taps.len());
        }
        assert!(taps.iter().all(|&(i, _)| i < inputs), "tap out of bounds");
        Self { inputs, starts, taps }
    }

    /// Repeats every position.
    pub fn nearest_double(inputs: usize) -> Self {
        Self::new(inputs, (0..2 * inputs).map(|o| vec![(o / 2, 1.0)]))
    }

    /// Doubles the positions with linear interpolation, keeping the first and last in place (PyTorch's
    /// `align_corners=True`).
    pub fn linear_double(inputs: usize) -> Self {
        let outputs = 2 * inputs;
        Self::new(
            inputs,
            (0..outputs).map(|o| {
                let at = (o * (inputs - 1)) as f64 / (outputs - 1) as f64;
                let (low, share) = (at as usize, at.fract() as f32);
                if low + 1 == inputs { vec![(low, 1.0)] } else { vec![(low, 1.0 - share), (low + 1, share)] }
            }),
        )
    }

    /// Averages each two positions; an odd last one is dropped.
    pub fn mean_half(inputs: usize) -> Self {
        Self::new(inputs, (0..inputs / 2).map(|o| vec![(2 * o, 0.5), (2 * o + 1, 0.5)]))
    }

    /// Input positions.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Output positions.
    pub fn outputs(&self) -> usize {
        self.starts.len() - 1
    }

    /// The taps of an output position.
    pub fn of(&self, output: usize) -> &[(usize, f32)] {
        &self.taps[self.starts[output]..self.starts[output + 1]]
    }

    /// The same weights from outputs to inputs: the gradient.
    pub fn transposed(&self) -> Self {
        let mut of_input = vec![Vec::new(); self.inputs];
        for o in 0..self.outputs() {
            for &(i, weight) in self.of(o) {
                of_input[i].push((o, weight));
            }
        }
        Self::new(self.outputs(), of_input)
    }
}

/// Computes output row `row` (`y [columns.outputs(), channels]`) of an image
/// `x [rows.inputs(), columns.inputs(), channels]`.
pub fn resample_row(
    isa: Isa,
    rows: &Taps,
    columns: &Taps,
    channels: usize,
    x: &[f32],
    row: usize,
    y: &mut [f32],
) {
    assert_eq!(x.len(), rows.inputs() * columns.inputs() * channels);
    assert_eq!(y.len(), columns.outputs() * channels);
    dispatch!(isa, s => run(s, rows, columns, channels, x, row, y))
}

#[inline(always)]
fn run<S: Simd>(s: S, rows: &Taps, columns: &Taps, c: usize, x: &[f32], row: usize, y: &mut [f32]) {
    let width = columns.inputs() * c;
    for (o, y) in y.chunks_exact_mut(c).enumerate() {
        for start in (0..c).step_by(S::F32_LANES) {
            let end = c.min(start + S::F32_LANES);
            let mut sum = s.splat_f32s(0.0);
            for &(iy, wy) in rows.of(row) {
                for &(ix, wx) in columns.of(o) {
                    let pixel = &x[iy * width + ix * c..][start..end];
                    sum = s.mul_add_e_f32s(s.splat_f32s(wy * wx), s.partial_load_f32s(pixel), sum);
                }
            }
            s.partial_store_f32s(&mut y[start..end], sum);
        }
    }
}
