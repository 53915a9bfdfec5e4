//! A naive version of every kernel: the oracle of the tests. Loops that follow the formulas, in f64, never
//! optimised.
//!
//! Layouts are those of the kernels. Everything takes and returns f64, so that finite differences of these
//! functions are accurate enough to check gradients. Most results are sums of products; the same function
//! applied to absolute values gives the sum of the products' absolute values, which is the scale of a
//! kernel's rounding error.
//!
//! | sizes | meaning |
//! |---|---|
//! | `n, h, w` / `oh, ow` | images, input height and width / output height and width |
//! | `cin, cout` / `c` | input, output channels / channels |
//! | `kh, kw` | kernel height and width |

use crate::activation::Activation;
use crate::bound::BoundStep;
use crate::conv::ConvShape;
use crate::elementwise::AdamStep;
use crate::loss::Loss;
use crate::norm::NormShape;
use crate::resample::Taps;

// ---------------------------------------------------------------------------------------------------- convolution

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

fn grid(height: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..height).flat_map(move |y| (0..width).map(move |x| (y, x)))
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

// -------------------------------------------------------------------------------------------- group normalisation

/// `y = act(x_hat gamma + beta)`, `x_hat = (x - mean) / sqrt(variance + eps)`, mean and biased variance over the
/// pixels and channels of a group, `act` SiLU or nothing.
///
/// One image: `x [pixels, c]`, `gamma [c]`, `beta [c]`. Results `y [pixels, c]` and the statistics
/// `[groups]` means, then `[groups]` reciprocal standard deviations.
pub fn group_norm(shape: NormShape, x: &[f64], gamma: &[f64], beta: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let stats = group_stats(shape, x);
    let mut y = vec![0.0; x.len()];
    for at in 0..x.len() {
        let (channel, group) = channel_and_group(shape, at);
        let z = (x[at] - stats[group]) * stats[shape.groups + group] * gamma[channel] + beta[channel];
        y[at] = if shape.silu { silu(z) } else { z };
    }
    (y, stats)
}

/// The gradients of [`group_norm`] with respect to `x`, `gamma` and `beta`. With `dz` the gradient before the
/// activation and `d = dz gamma`: `dx = (d - mean(d) - x_hat mean(d x_hat)) / sqrt(variance + eps)`, means
/// over the group; `dgamma = sum over pixels of dz x_hat`; `dbeta = sum over pixels of dz`.
///
/// One image: `x, dy [pixels, c]`; results `[pixels, c]`, `[c]`, `[c]`.
pub fn group_norm_backward(
    shape: NormShape,
    x: &[f64],
    dy: &[f64],
    gamma: &[f64],
    beta: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let stats = group_stats(shape, x);
    let (mean, rstd) = stats.split_at(shape.groups);
    let count = (x.len() / shape.groups) as f64;
    let x_hat = |at: usize| {
        let (_, group) = channel_and_group(shape, at);
        (x[at] - mean[group]) * rstd[group]
    };
    let dz = |at: usize| {
        let (channel, _) = channel_and_group(shape, at);
        let z = x_hat(at) * gamma[channel] + beta[channel];
        if shape.silu { dy[at] * silu_derivative(z) } else { dy[at] }
    };
    let (mut dgamma, mut dbeta) = (vec![0.0; shape.channels], vec![0.0; shape.channels]);
    let (mut mean_d, mut mean_d_x_hat) = (vec![0.0; shape.groups], vec![0.0; shape.groups]);
    for at in 0..x.len() {
        let (channel, group) = channel_and_group(shape, at);
        dgamma[channel] += dz(at) * x_hat(at);
        dbeta[channel] += dz(at);
        mean_d[group] += dz(at) * gamma[channel] / count;
        mean_d_x_hat[group] += dz(at) * gamma[channel] * x_hat(at) / count;
    }
    let dx = (0..x.len()).map(|at| {
        let (channel, group) = channel_and_group(shape, at);
        rstd[group] * (dz(at) * gamma[channel] - mean_d[group] - x_hat(at) * mean_d_x_hat[group])
    });
    (dx.collect(), dgamma, dbeta)
}

/// Channel and group of element `at` of an image.
fn channel_and_group(shape: NormShape, at: usize) -> (usize, usize) {
    let channel = at % shape.channels;
    (channel, channel / (shape.channels / shape.groups))
}

/// `[groups]` means, then `[groups]` reciprocal standard deviations.
fn group_stats(shape: NormShape, x: &[f64]) -> Vec<f64> {
    let count = (x.len() / shape.groups) as f64;
    let (mut mean, mut variance) = (vec![0.0; shape.groups], vec![0.0; shape.groups]);
    for (at, x) in x.iter().enumerate() {
        mean[channel_and_group(shape, at).1] += x / count;
    }
    for (at, x) in x.iter().enumerate() {
        let group = channel_and_group(shape, at).1;
        variance[group] += (x - mean[group]).powi(2) / count;
    }
    mean.extend(variance.iter().map(|v| 1.0 / (v + f64::from(shape.eps)).sqrt()));
    mean
}

// ------------------------------------------------------------------------------------------------------ attention

/// The sizes of an attention. Queries, keys and values of an image are `qkv [tokens, 3 * channels]`: for each
/// token the queries of all heads, then the keys, then the values; head `h` owns `width = channels / heads`
/// of each.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Tokens of an image.
    pub tokens: usize,
    /// Channels of the output.
    pub channels: usize,
    /// Heads; must divide the channels.
    pub heads: usize,
}

impl AttentionShape {
    fn width(&self) -> usize {
        self.channels / self.heads
    }

    /// Index in `qkv` of element `d` of a token's query (`part` 0), key (1) or value (2) in a head.
    fn at(&self, token: usize, part: usize, head: usize, d: usize) -> usize {
        token * 3 * self.channels + part * self.channels + head * self.width() + d
    }

    /// Index in `o` of element `d` of a token in a head.
    fn out(&self, token: usize, head: usize, d: usize) -> usize {
        token * self.channels + head * self.width() + d
    }

    /// `s[query, key] = q[query] . k[key] / sqrt(width)` of a head, `[tokens, tokens]`.
    pub fn scores(&self, qkv: &[f64], head: usize) -> Vec<f64> {
        let mut s = vec![0.0; self.tokens * self.tokens];
        for (query, key) in grid(self.tokens, self.tokens) {
            for d in 0..self.width() {
                s[query * self.tokens + key] +=
                    qkv[self.at(query, 0, head, d)] * qkv[self.at(key, 1, head, d)];
            }
            s[query * self.tokens + key] /= (self.width() as f64).sqrt();
        }
        s
    }

    /// `p = softmax(s)` over the keys, `[tokens, tokens]`, and the logarithm of each row's sum of `e^s`.
    pub fn weights(&self, qkv: &[f64], head: usize) -> (Vec<f64>, Vec<f64>) {
        let mut p = self.scores(qkv, head);
        let mut logarithms = vec![0.0; self.tokens];
        for (row, logarithm) in p.chunks_exact_mut(self.tokens).zip(&mut logarithms) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            *logarithm = max + row.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            row.iter_mut().for_each(|s| *s = (*s - *logarithm).exp());
        }
        (p, logarithms)
    }
}

/// Dropout mask of the weights: the factor at (head, query, key).
pub type Factor<'a> = &'a dyn Fn(usize, usize, usize) -> f64;

/// `o[query] = sum over keys of p[query, key] v[key]` with `p = softmax(q k^T / sqrt(width))`, head by head.
///
/// `qkv [tokens, 3 * channels]`; results `o [tokens, channels]` and the softmax denominators' logarithms
/// `[tokens, heads]`. `dropout(head, query, key)` is what `p` is multiplied by before the sum; 1 without dropout.
pub fn attention(shape: AttentionShape, qkv: &[f64], dropout: Factor<'_>) -> (Vec<f64>, Vec<f64>) {
    let AttentionShape { tokens, channels, heads } = shape;
    let (mut o, mut lse) = (vec![0.0; tokens * channels], vec![0.0; tokens * heads]);
    for head in 0..heads {
        let (p, logarithms) = shape.weights(qkv, head);
        for query in 0..tokens {
            lse[query * heads + head] = logarithms[query];
        }
        for (query, key) in grid(tokens, tokens) {
            for d in 0..shape.width() {
                let p = p[query * tokens + key] * dropout(head, query, key);
                o[shape.out(query, head, d)] += p * qkv[shape.at(key, 2, head, d)];
            }
        }
    }
    (o, lse)
}

/// The gradient of [`attention`] with respect to `qkv`, with dropout mask D:
/// `dv[key] = sum over queries of p D do`, `dp = D do . v`, `ds = p (dp - sum over keys of p dp)`,
/// `dq[query] = sum over keys of ds k / sqrt(width)`, `dk[key] = sum over queries of ds q / sqrt(width)`.
///
/// `qkv [tokens, 3 * channels]`, `d_o [tokens, channels]`, result `[tokens, 3 * channels]`.
pub fn attention_backward(shape: AttentionShape, qkv: &[f64], d_o: &[f64], dropout: Factor<'_>) -> Vec<f64> {
    let AttentionShape { tokens, heads, .. } = shape;
    let scale = 1.0 / (shape.width() as f64).sqrt();
    let mut dqkv = vec![0.0; qkv.len()];
    for head in 0..heads {
        let (p, _) = shape.weights(qkv, head);
        let mut dp = vec![0.0; tokens * tokens];
        for (query, key) in grid(tokens, tokens) {
            for d in 0..shape.width() {
                let (d_o, v) = (d_o[shape.out(query, head, d)], shape.at(key, 2, head, d));
                let factor = dropout(head, query, key);
                dqkv[v] += p[query * tokens + key] * factor * d_o;
                dp[query * tokens + key] += factor * d_o * qkv[v];
            }
        }
        for query in 0..tokens {
            let row = query * tokens..(query + 1) * tokens;
            let mean: f64 = p[row.clone()].iter().zip(&dp[row.clone()]).map(|(p, dp)| p * dp).sum();
            for key in 0..tokens {
                let ds = p[row.start + key] * (dp[row.start + key] - mean);
                for d in 0..shape.width() {
                    let (q, k) = (shape.at(query, 0, head, d), shape.at(key, 1, head, d));
                    dqkv[q] += ds * qkv[k] * scale;
                    dqkv[k] += ds * qkv[q] * scale;
                }
            }
        }
    }
    dqkv
}

// -------------------------------------------------------------------------------------------------
// elementwise

/// `1 / (1 + e^-x)`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x sigmoid(x)`.
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// The derivative of [`silu`]: `sigmoid(x) + x sigmoid(x) (1 - sigmoid(x))`.
pub fn silu_derivative(x: f64) -> f64 {
    sigmoid(x) + x * sigmoid(x) * sigmoid(-x)
}

/// Standard normal CDF.
pub fn normal_cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x / std::f64::consts::SQRT_2)
}

/// The activation function.
pub fn activate(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => silu(x),
        Activation::Relu => x.max(0.0),
        Activation::Gelu => x * normal_cdf(x),
        Activation::Mish => x * x.exp().ln_1p().tanh(),
    }
}

/// The derivative of [`activate`]; ReLU's at 0 is 0.
pub fn activation_derivative(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => silu_derivative(x),
        Activation::Relu => f64::from(x > 0.0),
        Activation::Gelu => normal_cdf(x) + x * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt(),
        Activation::Mish => {
            let w = x.exp().ln_1p().tanh();
            w + x * (1.0 - w * w) * sigmoid(x)
        }
    }
}

/// `a x + b y`.
pub fn combine(a: f64, x: &[f64], b: f64, y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| a * x + b * y).collect()
}

/// `y[r, c] = x[r, c] + row[c]`.
pub fn add_rows(row: &[f64], x: &[f64]) -> Vec<f64> {
    x.iter().enumerate().map(|(at, x)| x + row[at % row.len()]).collect()
}

/// `y[c] = sum over r of x[r, c]`: the gradient of [`add_rows`] with respect to `row`.
pub fn sum_rows(x: &[f64], columns: usize) -> Vec<f64> {
    let mut y = vec![0.0; columns];
    for (at, x) in x.iter().enumerate() {
        y[at % columns] += x;
    }
    y
}

/// The sum of the losses of `a - b`.
pub fn loss_sum(loss: Loss, a: &[f64], b: &[f64]) -> f64 {
    let one = |d: f64| match loss {
        Loss::Mse => d * d,
        Loss::L1 => d.abs(),
        Loss::Huber { delta } if d.abs() <= f64::from(delta) => d * d / 2.0,
        Loss::Huber { delta } => f64::from(delta) * (d.abs() - f64::from(delta) / 2.0),
    };
    a.iter().zip(b).map(|(a, b)| one(a - b)).sum()
}

/// The mean of the losses of `a - b`.
pub fn loss_mean(loss: Loss, a: &[f64], b: &[f64]) -> f64 {
    loss_sum(loss, a, b) / a.len() as f64
}

/// The gradient of [`loss_mean`] with respect to `a`, times `dloss`.
pub fn loss_grad(loss: Loss, a: &[f64], b: &[f64], dloss: f64) -> Vec<f64> {
    let grad = |d: f64| match loss {
        Loss::Mse => 2.0 * d,
        Loss::L1 if d == 0.0 => 0.0,
        Loss::L1 => d.signum(),
        Loss::Huber { delta } => d.clamp(-f64::from(delta), f64::from(delta)),
    };
    let share = dloss / a.len() as f64;
    a.iter().zip(b).map(|(a, b)| share * grad(a - b)).collect()
}

// ------------------------------------------------------------------------------------- normalisation over one axis

/// Normalises rows `[rows, channels]` channel by channel over all rows:
/// `(x - mean) / sqrt(variance + eps) gamma + beta`; also returns the means and the biased variances,
/// `[channels]` each.
pub fn batch_norm(eps: f64, x: &[f64], gamma: &[f64], beta: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let c = gamma.len();
    let rows = (x.len() / c) as f64;
    let mean: Vec<f64> = sum_rows(x, c).iter().map(|s| s / rows).collect();
    let squares: Vec<f64> = x.iter().enumerate().map(|(i, x)| (x - mean[i % c]).powi(2)).collect();
    let variance: Vec<f64> = sum_rows(&squares, c).iter().map(|s| s / rows).collect();
    let value = |(i, x): (usize, &f64)| {
        (x - mean[i % c]) / (variance[i % c] + eps).sqrt() * gamma[i % c] + beta[i % c]
    };
    (x.iter().enumerate().map(value).collect(), mean, variance)
}

/// Normalises each of the rows `[rows, channels]` over its channels, then `* gamma + beta`.
pub fn layer_norm(eps: f64, x: &[f64], gamma: &[f64], beta: &[f64]) -> Vec<f64> {
    let c = gamma.len();
    let row = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / c as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
        let of = |i: usize| (x[i] - mean) / (variance + eps).sqrt() * gamma[i] + beta[i];
        (0..c).map(of).collect::<Vec<_>>()
    };
    x.chunks_exact(c).flat_map(row).collect()
}

// -------------------------------------------------------------------------------------------------------- resizing

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

// --------------------------------------------------------------------------------------------- variational bound

/// Sum of an image's terms of the variational bound, in nats (Ho et al. 2020, eq. 5 and 13), from variances
/// instead of their logarithms.
pub fn bound_sum(step: &BoundStep, output: &[f64], v: &[f64], x_0: &[f64], x_t: &[f64]) -> f64 {
    let (low, high) = (step.log_variance.0.exp(), step.log_variance.1.exp());
    let below = |z: f64| 0.5 * libm::erfc(-z / 2f64.sqrt());
    let term = |i: usize| {
        let mean = step.to_x_0.0 * x_t[i] + step.to_x_0.1 * output[i];
        let variance = low.powf(0.5 - 0.5 * v[i]) * high.powf(0.5 + 0.5 * v[i]);
        if !step.decoder {
            let difference = step.posterior_x_0 * (x_0[i] - mean);
            return 0.5 * ((variance / low).ln() + (low + difference * difference) / variance - 1.0);
        }
        // Mirrored if it lies above the mean: near 1 the CDF loses precision.
        let (x, mean) = if x_0[i] > mean { (-x_0[i], -mean) } else { (x_0[i], mean) };
        let edge = |side: f64| below((x + side / 255.0 - mean) / variance.sqrt());
        let from = if x < -0.999 { 0.0 } else { edge(-1.0) };
        let to = if x > 0.999 { 1.0 } else { edge(1.0) };
        -(to - from).max(1e-12).ln()
    };
    (0..x_0.len()).map(term).sum()
}

// ------------------------------------------------------------------------------------------------------ optimizer

/// A weight with its optimizer state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trained {
    /// The weight.
    pub weight: f64,
    /// The gradient's moving average.
    pub exp_avg: f64,
    /// The squared gradient's moving average.
    pub exp_avg_sq: f64,
    /// The weight's moving average.
    pub ema: f64,
}

/// One step of Adam (Kingma and Ba 2015, algorithm 1, with L2 decay added to the gradient) or, decoupled, of AdamW
/// (Loshchilov and Hutter 2019, algorithm 2), then `ema = decay ema + (1 - decay) weight`.
pub fn adam(step: &AdamStep, grad: f64, old: Trained) -> Trained {
    let AdamStep { lr, beta1, beta2, eps, weight_decay, decoupled, .. } = *step;
    let t = step.step as f64;
    let mut g = grad * step.grad_scale;
    let mut weight = old.weight;
    if decoupled {
        weight -= lr * weight_decay * weight;
    } else {
        g += weight_decay * weight;
    }
    let exp_avg = beta1 * old.exp_avg + (1.0 - beta1) * g;
    let exp_avg_sq = beta2 * old.exp_avg_sq + (1.0 - beta2) * g * g;
    let (m_hat, v_hat) = (exp_avg / (1.0 - beta1.powf(t)), exp_avg_sq / (1.0 - beta2.powf(t)));
    weight -= lr * m_hat / (v_hat.sqrt() + eps);
    let ema = step.ema_decay * old.ema + (1.0 - step.ema_decay) * weight;
    Trained { weight, exp_avg, exp_avg_sq, ema }
}
