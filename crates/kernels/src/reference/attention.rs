//! Multi-head self-attention and its gradient.

use super::grid;

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
