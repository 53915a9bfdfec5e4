//! The passes of batch normalisation (Ioffe and Szegedy 2015) over rows `[rows, channels]`.
//!
//! Statistics are over all rows of a batch; a task sums a range of rows, and the caller adds up the ranges in
//! order.
//!
//! ```text
//! forward    mean = sum x / rows;   variance = sum (x - mean)^2 / rows;   y = (x - mean) gamma rstd + beta
//! backward   dbeta = sum dy;   dgamma = rstd sum dy (x - mean)
//!            dx = gamma rstd (dy - dbeta / rows - (x - mean) rstd dgamma / rows)
//! ```

use crate::isa::{Isa, dispatch};
use crate::norm::{affine_grad_row, channel_dots_shifted, channel_sums, channel_sums_shifted, load, store};
use pulp::Simd;

/// `sums [channels] = sum of the rows of x`.
pub fn column_sums(isa: Isa, x: &[f32], sums: &mut [f32]) {
    let c = sums.len();
    dispatch!(isa, s => channel_sums(s, x, c, sums))
}

/// `sums [channels] = sum over rows of (x - mean)^2`.
pub fn column_squares(isa: Isa, x: &[f32], mean: &[f32], sums: &mut [f32]) {
    let c = mean.len();
    dispatch!(isa, s => channel_sums_shifted(s, x, c, sums, mean))
}

/// `sums [channels] = sum over rows of dy (x - mean)`.
pub fn column_dots(isa: Isa, dy: &[f32], x: &[f32], mean: &[f32], sums: &mut [f32]) {
    let c = mean.len();
    dispatch!(isa, s => channel_dots_shifted(s, dy, x, c, sums, mean))
}

/// `y = (x - mean) * scale + shift`, row by row.
pub fn normalise(isa: Isa, mean: &[f32], scale: &[f32], shift: &[f32], x: &[f32], y: &mut [f32]) {
    #[inline(always)]
    fn run<S: Simd>(s: S, mean: &[f32], scale: &[f32], shift: &[f32], x: &[f32], y: &mut [f32]) {
        let c = mean.len();
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
            for start in (0..c).step_by(S::F32_LANES) {
                let at = start..c.min(start + S::F32_LANES);
                let centred = s.sub_f32s(load(s, &x[at.clone()]), load(s, &mean[at.clone()]));
                let v = s.mul_add_e_f32s(centred, load(s, &scale[at.clone()]), load(s, &shift[at.clone()]));
                store(s, &mut y[at], v);
            }
        }
    }
    assert_eq!(x.len(), y.len());
    dispatch!(isa, s => run(s, mean, scale, shift, x, y))
}

/// `g = g * scale + (x - mean) * slope + offset`, row by row; `g` holds `dy` on entry and `dx` on return.
pub fn gradient(
    isa: Isa,
    mean: &[f32],
    scale: &[f32],
    slope: &[f32],
    offset: &[f32],
    x: &[f32],
    g: &mut [f32],
) {
    #[inline(always)]
    fn run<S: Simd>(
        s: S,
        mean: &[f32],
        scale: &[f32],
        slope: &[f32],
        offset: &[f32],
        x: &[f32],
        g: &mut [f32],
    ) {
        let c = mean.len();
        for (x, g) in x.chunks_exact(c).zip(g.chunks_exact_mut(c)) {
            affine_grad_row(s, g, x, mean, scale, slope, offset);
        }
    }
    assert_eq!(x.len(), g.len());
    dispatch!(isa, s => run(s, mean, scale, slope, offset, x, g))
}
