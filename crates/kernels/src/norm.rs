//! Group normalisation of one image, optionally followed by SiLU, forward and backward.
//!
//! `y = act(x_hat * gamma + beta)` with `x_hat = (x - mean) * rstd`; mean and (biased) variance are over all
//! pixels and the channels of a group (Wu and He 2018). Images are `[pixels, channels]`.

use crate::isa::{Isa, dispatch};
use crate::vector;
use pulp::Simd;

/// Sizes and options of a group normalisation.
#[derive(Clone, Copy, Debug)]
pub struct NormShape {
    /// Pixels of an image.
    pub pixels: usize,
    /// Channels.
    pub channels: usize,
    /// Groups; must divide the channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Whether SiLU follows.
    pub silu: bool,
}

impl NormShape {
    fn per_group(&self) -> usize {
        self.channels / self.groups
    }

    /// Scratch length of both passes, in f32s.
    pub fn scratch_len(&self) -> usize {
        4 * self.channels
    }
}

/// Scale and shift of each channel, `[channels]` each.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// Scale.
    pub gamma: &'a [f32],
    /// Shift.
    pub beta: &'a [f32],
}

/// Operands of the backward pass of one image: those and the result of the forward pass, and the output gradient.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// The input, `[pixels, channels]`.
    pub x: &'a [f32],
    /// Scale and shift.
    pub affine: Affine<'a>,
    /// Means and reciprocal standard deviations, `[2 * groups]`.
    pub stats: &'a [f32],
    /// The output gradient, `[pixels, channels]`.
    pub dy: &'a [f32],
}

/// Forward pass of one image. `stats` receives `[groups]` means, then `[groups]` reciprocal standard deviations.
pub fn group_norm(
    isa: Isa,
    shape: NormShape,
    x: &[f32],
    affine: Affine<'_>,
    y: &mut [f32],
    stats: &mut [f32],
    scratch: &mut [f32],
) {
    assert_eq!(x.len(), shape.pixels * shape.channels);
    assert_eq!(y.len(), x.len());
    dispatch!(isa, s => forward(s, shape, x, affine, y, stats, scratch))
}

#[inline(always)]
fn forward<S: Simd>(
    s: S,
    shape: NormShape,
    x: &[f32],
    affine: Affine<'_>,
    y: &mut [f32],
    stats: &mut [f32],
    scratch: &mut [f32],
) {
    let NormShape { channels: c, groups, .. } = shape;
    let count = (shape.pixels * shape.per_group()) as f64;
    let (sums, rest) = scratch.split_at_mut(c);
    let (shift, _) = rest.split_at_mut(c);
    let (means, rstds) = stats.split_at_mut(groups);

    channel_sums(s, x, c, sums);
    for (mean, sums) in means.iter_mut().zip(sums.chunks(shape.per_group())) {
        *mean = (sums.iter().map(|&v| f64::from(v)).sum::<f64>() / count) as f32;
    }
    for (ch, shift) in shift.iter_mut().enumerate() {
        *shift = means[ch / shape.per_group()];
    }
    channel_sums_shifted(s, x, c, sums, shift);
    for (rstd, sums) in rstds.iter_mut().zip(sums.chunks(shape.per_group())) {
        let variance = sums.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        *rstd = (1.0 / (variance + f64::from(shape.eps)).sqrt()) as f32;
    }

    let scale = sums;
    scale_and_shift(shape, affine, means, rstds, scale, shift);
    for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
        map_row(
            s,
            y,
            x,
            scale,
            shift,
            #[inline(always)]
            |_, x, a, b| {
                let z = s.mul_add_e_f32s(x, a, b);
                if shape.silu { vector::silu(s, z) } else { z }
            },
        );
    }
}

/// `x_hat * gamma + beta = x * scale + shift`, channel by channel.
#[inline(always)]
fn scale_and_shift(
    shape: NormShape,
    Affine { gamma, beta }: Affine<'_>,
    means: &[f32],
    rstds: &[f32],
    scale: &mut [f32],
    shift: &mut [f32],
) {
    for ch in 0..shape.channels {
        let g = ch / shape.per_group();
        scale[ch] = rstds[g] * gamma[ch];
        shift[ch] = beta[ch] - means[g] * scale[ch];
    }
}

/// Backward pass of one image; `dx` is `[pixels, channels]`, `dgamma` and `dbeta` (`[channels]` each) are this image's contribution to the parameter gradients, to be summed over images in order.
pub fn group_norm_backward(
    isa: Isa,
    shape: NormShape,
    saved: Saved<'_>,
    dx: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    scratch: &mut [f32],
) {
    let len = shape.pixels * shape.channels;
    assert_eq!((saved.x.len(), saved.dy.len(), dx.len()), (len, len, len));
    dispatch!(isa, s => backward(s, shape, saved, dx, dgamma, dbeta, scratch))
}

#[inline(always)]
fn backward<S: Simd>(
    s: S,
    shape: NormShape,
    Saved { x, affine, stats, dy }: Saved<'_>,
    dx: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    scratch: &mut [f32],
) {
    let NormShape { channels: c, groups, .. } = shape;
    let count = (shape.pixels * shape.per_group()) as f32;
    let (means, rstds) = stats.split_at(groups);
    let (scale, rest) = scratch.split_at_mut(c);
    let (shift, rest) = rest.split_at_mut(c);
    let (mean, rest) = rest.split_at_mut(c);
    let rstd = &mut rest[..c];
    scale_and_shift(shape, affine, means, rstds, scale, shift);
    for ch in 0..c {
        mean[ch] = means[ch / shape.per_group()];
        rstd[ch] = rstds[ch / shape.per_group()];
    }

    // dz, the gradient before the activation, is kept in dx until the second pass.
    let dz: &mut [f32] = dx;
    if shape.silu {
        for ((dz, dy), x) in dz.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c)) {
            copy(dz, dy);
            map_row(
                s,
                dz,
                x,
                scale,
                shift,
                #[inline(always)]
                |dy, x, a, b| s.mul_f32s(dy, vector::silu_derivative(s, s.mul_add_e_f32s(x, a, b))),
            );
        }
    } else {
        dz.copy_from_slice(dy);
    }
    channel_sums(s, dz, c, dbeta);
    channel_dots_shifted(s, dz, x, c, dgamma, mean);
    for (d, rstd) in dgamma.iter_mut().zip(&*rstd) {
        *d *= rstd;
    }

    // dx = rstd (gamma dz - mean(gamma dz) - x_hat mean(gamma dz x_hat)) = dz * scale + (x - mean) * slope + offset.
    let (slope, offset) = (rstd, shift);
    for g in 0..groups {
        let of_group = g * shape.per_group()..(g + 1) * shape.per_group();
        let dot = |d: &[f32]| -> f64 {
            of_group.clone().map(|ch| f64::from(affine.gamma[ch]) * f64::from(d[ch])).sum::<f64>()
                / f64::from(count)
        };
        let (sum_dz, sum_dz_x) = (dot(dbeta), dot(dgamma));
        let r = f64::from(rstds[g]);
        for ch in of_group.clone() {
            slope[ch] = (-r * r * sum_dz_x) as f32;
            offset[ch] = (-r * sum_dz) as f32;
        }
    }
    for (dz, x) in dz.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
        affine_grad_row(s, dz, x, mean, scale, slope, offset);
    }
}

#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = *f;
    }
}

/// `y = f(y, x, a, b)` for a row of channels.
#[inline(always)]
fn map_row<S: Simd>(
    s: S,
    y: &mut [f32],
    x: &[f32],
    a: &[f32],
    b: &[f32],
    f: impl Fn(S::f32s, S::f32s, S::f32s, S::f32s) -> S::f32s,
) {
    for start in (0..y.len()).step_by(S::F32_LANES) {
        let at = start..y.len().min(start + S::F32_LANES);
        let (y_now, x) = (load(s, &y[at.clone()]), load(s, &x[at.clone()]));
        let v = f(y_now, x, load(s, &a[at.clone()]), load(s, &b[at.clone()]));
        store(s, &mut y[at], v);
    }
}

/// `y = y * a + ((x - m) * b + c)` for a row of channels.
#[inline(always)]
pub(crate) fn affine_grad_row<S: Simd>(
    s: S,
    y: &mut [f32],
    x: &[f32],
    m: &[f32],
    a: &[f32],
    b: &[f32],
    c: &[f32],
) {
    for start in (0..y.len()).step_by(S::F32_LANES) {
        let at = start..y.len().min(start + S::F32_LANES);
        let centred = s.sub_f32s(load(s, &x[at.clone()]), load(s, &m[at.clone()]));
        let rest = s.mul_add_e_f32s(centred, load(s, &b[at.clone()]), load(s, &c[at.clone()]));
        let v = s.mul_add_e_f32s(load(s, &y[at.clone()]), load(s, &a[at.clone()]), rest);
        store(s, &mut y[at], v);
    }
}

/// Loads up to a vector from a slice; zeros past its end.
#[inline(always)]
pub(crate) fn load<S: Simd>(s: S, x: &[f32]) -> S::f32s {
    if x.len() == S::F32_LANES { S::as_simd_f32s(x).0[0] } else { s.partial_load_f32s(x) }
}

/// Stores as many lanes as the slice holds.
#[inline(always)]
pub(crate) fn store<S: Simd>(s: S, x: &mut [f32], v: S::f32s) {
    if x.len() == S::F32_LANES {
        S::as_mut_simd_f32s(x).0[0] = v;
    } else {
        s.partial_store_f32s(x, v);
    }
}

/// Sum over pixels, for each channel.
#[inline(always)]
pub(crate) fn channel_sums<S: Simd>(s: S, x: &[f32], c: usize, out: &mut [f32]) {
    channels_fold(
        s,
        c,
        out,
        #[inline(always)]
        |at, acc| {
            for row in x.chunks_exact(c) {
                acc.add(
                    &row[at.clone()],
                    #[inline(always)]
                    |v, total, _| s.add_f32s(total, v),
                );
            }
        },
    );
}

/// Sum over pixels of `(x - shift)^2`, for each channel.
#[inline(always)]
pub(crate) fn channel_sums_shifted<S: Simd>(s: S, x: &[f32], c: usize, out: &mut [f32], shift: &[f32]) {
    channels_fold(
        s,
        c,
        out,
        #[inline(always)]
        |at, acc| {
            let shift = load_block(s, &shift[at.clone()]);
            for row in x.chunks_exact(c) {
                acc.add(
                    &row[at.clone()],
                    #[inline(always)]
                    |v, total, i| {
                        let d = s.sub_f32s(v, shift[i]);
                        s.mul_add_e_f32s(d, d, total)
                    },
                );
            }
        },
    );
}

/// Sum over pixels of `d (x - shift)`, for each channel.
#[inline(always)]
pub(crate) fn channel_dots_shifted<S: Simd>(
    s: S,
    d: &[f32],
    x: &[f32],
    c: usize,
    out: &mut [f32],
    shift: &[f32],
) {
    channels_fold(
        s,
        c,
        out,
        #[inline(always)]
        |at, acc| {
            let shift = load_block(s, &shift[at.clone()]);
            for (d, x) in d.chunks_exact(c).zip(x.chunks_exact(c)) {
                let d = load_block(s, &d[at.clone()]);
                acc.add(
                    &x[at.clone()],
                    #[inline(always)]
                    |v, total, i| s.mul_add_e_f32s(d[i], s.sub_f32s(v, shift[i]), total),
                );
            }
        },
    );
}

/// Vectors kept in registers during a pass over the pixels.
const BLOCK: usize = 4;

/// Up to [`BLOCK`] vectors of sums.
struct Sums<S: Simd> {
    s: S,
    acc: [S::f32s; BLOCK],
}

impl<S: Simd> Sums<S> {
    #[inline(always)]
    fn add(&mut self, row: &[f32], f: impl Fn(S::f32s, S::f32s, usize) -> S::f32s) {
        let row = load_block(self.s, row);
        for i in 0..BLOCK {
            self.acc[i] = f(row[i], self.acc[i], i);
        }
    }
}

/// Loads up to [`BLOCK`] vectors from a slice; zeros past its end.
#[inline(always)]
fn load_block<S: Simd>(s: S, x: &[f32]) -> [S::f32s; BLOCK] {
    let mut block = [s.splat_f32s(0.0); BLOCK];
    if x.len() == BLOCK * S::F32_LANES {
        block.copy_from_slice(S::as_simd_f32s(x).0);
    } else {
        for i in 0..BLOCK {
            let from = x.len().min(i * S::F32_LANES);
            block[i] = load(s, &x[from..x.len().min(from + S::F32_LANES)]);
        }
    }
    block
}

/// Iterates over blocks of channels; `pass` adds all pixels of a block to its sums.
#[inline(always)]
fn channels_fold<S: Simd>(
    s: S,
    c: usize,
    out: &mut [f32],
    pass: impl Fn(std::ops::Range<usize>, &mut Sums<S>),
) {
    for start in (0..c).step_by(BLOCK * S::F32_LANES) {
        let at = start..c.min(start + BLOCK * S::F32_LANES);
        let mut sums = Sums { s, acc: [s.splat_f32s(0.0); BLOCK] };
        pass(at.clone(), &mut sums);
        for (part, v) in out[at].chunks_mut(S::F32_LANES).zip(sums.acc) {
            s.partial_store_f32s(part, v);
        }
    }
}
