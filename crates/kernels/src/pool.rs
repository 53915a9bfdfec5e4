//! 2x2 max pooling, forward and backward.

use crate::isa::{Isa, dispatch};
use pulp::Simd;
use std::ops::Range;

/// The channels of the four pixels of block `column`, from two rows with `channels` each pixel.
#[inline(always)]
fn block<'a>(top: &'a [f32], bottom: &'a [f32], channels: usize, column: usize) -> [&'a [f32]; 4] {
    let at = 2 * column * channels;
    let (a, b) = (at..at + channels, at + channels..at + 2 * channels);
    [&top[a.clone()], &top[b.clone()], &bottom[a], &bottom[b]]
}

/// The maximum of the four; NaN if any is NaN.
#[inline(always)]
fn largest<S: Simd>(s: S, pixels: &[&[f32]; 4], at: Range<usize>) -> S::f32s {
    let mut max = s.partial_load_f32s(&pixels[0][at.clone()]);
    for pixel in &pixels[1..] {
        let v = s.partial_load_f32s(&pixel[at.clone()]);
        let larger = s.select_f32s(s.less_than_or_equal_f32s(v, max), max, v);
        max = s.select_f32s(s.equal_f32s(max, max), larger, max);
    }
    max
}

/// One output row `y [w / 2, channels]` from two input rows `[w, channels]`; an odd last column is dropped.
pub fn max_pool_row(isa: Isa, channels: usize, top: &[f32], bottom: &[f32], y: &mut [f32]) {
    dispatch!(isa, s => forward(s, channels, top, bottom, y))
}

#[inline(always)]
fn forward<S: Simd>(s: S, c: usize, top: &[f32], bottom: &[f32], y: &mut [f32]) {
    for (column, y) in y.chunks_exact_mut(c).enumerate() {
        let pixels = block(top, bottom, c, column);
        for start in (0..c).step_by(S::F32_LANES) {
            let end = c.min(start + S::F32_LANES);
            let max = largest(s, &pixels, start..end);
            s.partial_store_f32s(&mut y[start..end], max);
        }
    }
}

/// Gradient of [`max_pool_row`]: the first maximum of each block receives all of `dy`, the others 0.
pub fn max_pool_row_backward(
    isa: Isa,
    channels: usize,
    top: &[f32],
    bottom: &[f32],
    dy: &[f32],
    d_top: &mut [f32],
    d_bottom: &mut [f32],
) {
    dispatch!(isa, s => backward(s, channels, top, bottom, dy, d_top, d_bottom))
}

#[inline(always)]
fn backward<S: Simd>(
    s: S,
    c: usize,
    top: &[f32],
    bottom: &[f32],
    dy: &[f32],
    d_top: &mut [f32],
    d_bottom: &mut [f32],
) {
    let zero = s.splat_f32s(0.0);
    for (column, dy) in dy.chunks_exact(c).enumerate() {
        let pixels = block(top, bottom, c, column);
        let at = 2 * column * c;
        for start in (0..c).step_by(S::F32_LANES) {
            let end = c.min(start + S::F32_LANES);
            let max = largest(s, &pixels, start..end);
            let mut left = s.partial_load_f32s(&dy[start..end]);
            for (i, pixel) in pixels.iter().enumerate() {
                let hit = s.equal_f32s(s.partial_load_f32s(&pixel[start..end]), max);
                let to = at + (i % 2) * c;
                let row: &mut [f32] = if i < 2 { &mut *d_top } else { &mut *d_bottom };
                s.partial_store_f32s(&mut row[to + start..to + end], s.select_f32s(hit, left, zero));
                left = s.select_f32s(hit, zero, left);
            }
        }
    }
    // An odd last column belongs to no block.
    let used = dy.len() * 2;
    d_top[used..].fill(0.0);
    d_bottom[used..].fill(0.0);
}
