//! Convolution and its gradients.

use super::{grid, sum_rows};
use crate::conv::ConvShape;

/// Calls `f(output pixel, kernel position, input pixel)` for every product of a convolution: output pixel
/// `(oy, ox)` reads kernel position `(ky, kx)` at input pixel
/// `(oy * stride + ky - pad, ox * stride + kx - pad)` if that is inside the image. Pixels are numbered across
/// all images.
fn products(shape: ConvShape, mut f: impl FnMut(usize, usize, usize)) {
    let ConvShape { n, input: (h, w), output: (oh, ow), kernel: (kh, kw), stride, pad, .. } = shape;
    for image in 0..n {
        for (oy, ox) in grid(oh, ow) {
            for (ky, kx) in grid(kh, kw) {
                let (y, x) = (oy * stride.0 + ky, ox * stride.1 + kx);
                if (pad.0..pad.0 + h).contains(&y) && (pad.1..pad.1 + w).contains(&x) {
                    let (iy, ix) = (y - pad.0, x - pad.1);
                    f((image * oh + oy) * ow + ox, ky * kw + kx, (image * h + iy) * w + ix);
                }
            }
        }
    }
}

/// `y[o, co] = sum of x[i, ci] w[k, ci, co] + bias[co] + per_image_bias[image, co] + residual[o, co]` over all
/// products `(o, k, i)`.
///
/// `x [n, h, w, cin]`, `w [kh, kw, cin, cout]`, `bias [cout]`, `per_image_bias [n, cout]`, `residual` and result
/// `[n, oh, ow, cout]`.
pub fn conv2d(
    shape: ConvShape,
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    per_image_bias: Option<&[f64]>,
    residual: Option<&[f64]>,
) -> Vec<f64> {
    let ConvShape { n, output, cin, cout, .. } = shape;
    let pixels = output.0 * output.1;
    let mut y = vec![0.0; n * pixels * cout];
    products(shape, |o, k, i| {
        for ci in 0..cin {
            for co in 0..cout {
                y[o * cout + co] += x[i * cin + ci] * w[(k * cin + ci) * cout + co];
            }
        }
    });
    for (at, y) in y.iter_mut().enumerate() {
        let (image, co) = (at / (pixels * cout), at % cout);
        *y += bias.map_or(0.0, |b| b[co]);
        *y += per_image_bias.map_or(0.0, |b| b[image * cout + co]);
        *y += residual.map_or(0.0, |r| r[at]);
    }
    y
}

/// The gradient of [`conv2d`] with respect to `x`, plus a bias:
/// `dx[i, ci] = sum of dy[o, co] w[k, ci, co] + bias[ci]` over all products `(o, k, i)`. This is also the
/// transposed convolution of `dy`.
///
/// `dy [n, oh, ow, cout]`, `w [kh, kw, cin, cout]`, `bias [cin]`, result `[n, h, w, cin]`.
pub fn conv2d_data_grad(shape: ConvShape, dy: &[f64], w: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let ConvShape { n, input, cin, cout, .. } = shape;
    let mut dx = vec![0.0; n * input.0 * input.1 * cin];
    products(shape, |o, k, i| {
        for ci in 0..cin {
            for co in 0..cout {
                dx[i * cin + ci] += dy[o * cout + co] * w[(k * cin + ci) * cout + co];
            }
        }
    });
    for (at, dx) in dx.iter_mut().enumerate() {
        *dx += bias.map_or(0.0, |b| b[at % cin]);
    }
    dx
}

/// The gradients of [`conv2d`] with respect to `w` and `bias`: `dw[k, ci, co] = sum of x[i, ci] dy[o, co]`
/// over all products `(o, k, i)`, and `db[co] = sum of dy[o, co]`.
///
/// `x [n, h, w, cin]`, `dy [n, oh, ow, cout]`, results `[kh, kw, cin, cout]` and `[cout]`.
pub fn conv2d_weight_grad(shape: ConvShape, x: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let ConvShape { cin, cout, .. } = shape;
    let mut dw = vec![0.0; shape.weights()];
    products(shape, |o, k, i| {
        for ci in 0..cin {
            for co in 0..cout {
                dw[(k * cin + ci) * cout + co] += x[i * cin + ci] * dy[o * cout + co];
            }
        }
    });
    (dw, sum_rows(dy, cout))
}
