//! The operands of a convolution, and its epilogue: bias and residual, added as results are stored.

use pulp::Simd;

/// Optional terms added to the product before it is stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// `[cout]`, added to every pixel.
    pub bias: Option<&'a [f32]>,
    /// `[n, cout]`, added to every pixel of its image (the time embedding).
    pub per_image_bias: Option<&'a [f32]>,
    /// `[n, oh, ow, cout]`, added elementwise (the residual).
    pub residual: Option<&'a [f32]>,
}

/// Operands of a convolution with packed weights, or of its data gradient.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// The entire input, `[n, h, w, cin]`.
    pub input: &'a [f32],
    /// The packed weights.
    pub packed: &'a [f32],
    /// What is added to the product.
    pub epilogue: Epilogue<'a>,
}

/// A pixel of a block: its output index, and where its taps start.
#[derive(Clone, Copy, Default)]
pub(super) struct Pixel {
    pub(super) out: usize,
    pub(super) image: usize,
    pub(super) y: isize,
    pub(super) x: isize,
}

/// Stores a pixel's sums, for the columns from `from` on. With an epilogue adds its terms, else what `row`
/// holds.
#[inline(always)]
pub(super) fn finish_row<S: Simd, const NV: usize>(
    s: S,
    sums: &[f32],
    pixel: &Pixel,
    epilogue: Option<Epilogue<'_>>,
    from: usize,
    cout: usize,
    row: &mut [f32],
) {
    if row.len() < sums.len() {
        match epilogue {
            Some(epilogue) => {
                row.copy_from_slice(&sums[..row.len()]);
                epilogue.add(s, pixel, from, cout, row);
            }
            None => row.iter_mut().zip(sums).for_each(|(y, x)| *y += x),
        }
        return;
    }
    let (sums, row) = (S::as_simd_f32s(sums).0, S::as_mut_simd_f32s(row).0);
    match epilogue {
        Some(epilogue) => {
            let addends = epilogue.addends(pixel, from, cout, NV * S::F32_LANES);
            for v in 0..NV {
                row[v] = s.add_f32s(sums[v], sum_at(s, addends, v));
            }
        }
        None => {
            for v in 0..NV {
                row[v] = s.add_f32s(sums[v], row[v]);
            }
        }
    }
}

/// The sum of vector `v` of each addend.
#[inline(always)]
fn sum_at<S: Simd>(s: S, addends: [Option<&[f32]>; 3], v: usize) -> S::f32s {
    let mut sum = s.splat_f32s(0.0);
    for i in 0..addends.len() {
        if let Some(x) = addends[i] {
            let x = &x[v * S::F32_LANES..][..S::F32_LANES];
            sum = s.add_f32s(sum, S::as_simd_f32s(x).0[0]);
        }
    }
    sum
}

impl<'a> Epilogue<'a> {
    /// The addends for `len` columns of an output pixel from `from` on.
    #[inline(always)]
    fn addends(&self, pixel: &Pixel, from: usize, cout: usize, len: usize) -> [Option<&'a [f32]>; 3] {
        [
            self.bias.map(|b| &b[from..from + len]),
            self.per_image_bias.map(|b| &b[pixel.image * cout + from..][..len]),
            self.residual.map(|r| &r[pixel.out * cout + from..][..len]),
        ]
    }

    /// Adds the sum of the addends to an output pixel's columns from `from` on.
    #[inline(always)]
    pub(super) fn add<S: Simd>(&self, s: S, pixel: &Pixel, from: usize, cout: usize, row: &mut [f32]) {
        let len = row.len();
        let addends = self.addends(pixel, from, cout, len);
        let (full, rest) = S::as_mut_simd_f32s(row);
        for (v, y) in full.iter_mut().enumerate() {
            *y = s.add_f32s(*y, sum_at(s, addends, v));
        }
        if !rest.is_empty() {
            let mut sum = s.splat_f32s(0.0);
            for i in 0..addends.len() {
                if let Some(x) = addends[i] {
                    sum = s.add_f32s(sum, s.partial_load_f32s(&x[len - rest.len()..]));
                }
            }
            let y = s.add_f32s(s.partial_load_f32s(rest), sum);
            s.partial_store_f32s(rest, y);
        }
    }
}
