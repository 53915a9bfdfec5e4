//! Multi-head attention, forward and backward.

use crate::{Rng, Within, bits, magnitudes, nans, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::attention::{Attention, Saved};
use ddpm_kernels::conv::MatmulDtype;
use ddpm_kernels::random::Dropout;
use ddpm_kernels::reference::{self, AttentionShape};

/// An error of a score, in units of `sum |q| |k| / sqrt(width)`, is the same relative error of its `e^s`. So
/// all results are measured in (1 + the largest such sum) times their formula with every term's absolute
/// value.
const FORWARD: f64 = 4.0;
/// The same for the gradients; `dp - delta` is recomputed from f32 values of o and lse.
const BACKWARD: f64 = 8.0;
/// The logarithm of the denominator, in units of 1 + the largest sum: exponents, a sum over keys and one logarithm.
const LOGARITHM: f64 = 8.0;

/// 4 and 8 have specialized loops; 16 is a full vector.
const WIDTHS: [usize; 11] = [1, 3, 4, 5, 8, 12, 16, 20, 32, 33, 64];
const TOKENS: [usize; 16] = [1, 2, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 97, 128, 130, 196];

/// More than one chunk of queries, for the widths with a specialized chunk.
fn many_tokens(width: usize) -> Option<usize> {
    match width {
        4 => Some(2083),
        8 => Some(1201),
        _ => None,
    }
}

/// With bf16 operands, in units of the formula with every term's absolute value: each of the two operands of
/// a product is off by at most 2^-9, and an error of a score is an error of its weight.
const BF16: f64 = 4.0;

/// The unit of these bounds, in f32 epsilons.
pub fn unit_of(dtype: MatmulDtype) -> f64 {
    match dtype {
        MatmulDtype::F32 => 1.0,
        MatmulDtype::Bf16 => 1.0 / 512.0 / f64::from(f32::EPSILON),
    }
}

fn prepare(isa: Isa, dtype: MatmulDtype, shape: AttentionShape) -> Attention {
    Attention::new(isa, dtype, shape.tokens, shape.channels, shape.heads)
}

/// `o` and `lse`, in tasks of `part` queries.
pub fn run_forward(
    isa: Isa,
    dtype: MatmulDtype,
    shape: AttentionShape,
    qkv: &[f32],
    dropout: Option<Dropout>,
    part: usize,
) -> (Vec<f32>, Vec<f32>) {
    let AttentionShape { tokens, channels, heads } = shape;
    let tiles = prepare(isa, dtype, shape);
    let (mut o, mut lse) = (unwritten(tokens * channels), unwritten(tokens * heads));
    let parts = o.chunks_mut(part * channels).zip(lse.chunks_mut(part * heads));
    for (i, (o, lse)) in parts.enumerate() {
        tiles.forward(qkv, i * part, dropout, o, lse, &mut unwritten(tiles.scratch_len()));
    }
    (o, lse)
}

pub fn run_backward(isa: Isa, dtype: MatmulDtype, shape: AttentionShape, saved: &Saved<'_>) -> Vec<f32> {
    let tiles = prepare(isa, dtype, shape);
    let mut dqkv = unwritten(saved.qkv.len());
    tiles.backward(saved, &mut dqkv, &mut unwritten(tiles.backward_scratch_len()));
    dqkv
}

/// The same in key ranges, summed for `rows` tokens at a time.
pub fn run_backward_in_ranges(
    isa: Isa,
    dtype: MatmulDtype,
    shape: AttentionShape,
    saved: &Saved<'_>,
    ranges: usize,
    rows: usize,
) -> Vec<f32> {
    let tiles = prepare(isa, dtype, shape);
    let len = tiles.partial_len(ranges);
    let mut partials = unwritten(shape.heads * ranges * len);
    for (task, out) in partials.chunks_mut(len).enumerate() {
        tiles.backward_range(saved, task, ranges, out, &mut unwritten(tiles.backward_scratch_len()));
    }
    let mut dqkv = unwritten(saved.qkv.len());
    for (i, dqkv) in dqkv.chunks_mut(rows * 3 * shape.channels).enumerate() {
        tiles.add_ranges(&partials, ranges, i * rows, dqkv);
    }
    dqkv
}

/// The largest of the sums `sum |q| |k| / sqrt(width)` over all heads.
pub fn score_magnitude(shape: AttentionShape, qkv: &[f32]) -> f64 {
    (0..shape.heads).flat_map(|head| shape.scores(&magnitudes(qkv), head)).fold(0.0, f64::max)
}

/// Results with every term's absolute value: `sum of p D |v|`, and the gradients' formulas with
/// `|ds| = p (D |do| . |v| + sum over keys of p D (|do| . |v|))`; D is the dropout mask,
/// `factor(head, query, key)`.
pub fn result_magnitudes(
    shape: AttentionShape,
    qkv: &[f32],
    d_o: &[f32],
    factor: &dyn Fn(usize, usize, usize) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let AttentionShape { tokens, channels, heads } = shape;
    let width = channels / heads;
    let scale = 1.0 / (width as f64).sqrt();
    let (mut o, mut dqkv) = (vec![0.0; d_o.len()], vec![0.0; qkv.len()]);
    let (abs_qkv, abs_do) = (magnitudes(qkv), magnitudes(d_o));
    for head in 0..heads {
        let (p, _) = shape.weights(&wide(qkv), head);
        let at = |token: usize, part: usize| token * 3 * channels + part * channels + head * width;
        for query in 0..tokens {
            let p = &p[query * tokens..][..tokens];
            let d_o = &abs_do[query * channels + head * width..][..width];
            let dp: Vec<f64> = (0..tokens)
                .map(|key| {
                    let dot: f64 = d_o.iter().zip(&abs_qkv[at(key, 2)..]).map(|(d, v)| d * v).sum();
                    factor(head, query, key) * dot
                })
                .collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for key in 0..tokens {
                let ds = p[key] * (dp[key] + mean) * scale;
                let kept = p[key] * factor(head, query, key);
                for d in 0..width {
                    o[query * channels + head * width + d] += kept * abs_qkv[at(key, 2) + d];
                    dqkv[at(key, 2) + d] += kept * d_o[d];
                    dqkv[at(query, 0) + d] += ds * abs_qkv[at(key, 1) + d];
                    dqkv[at(key, 1) + d] += ds * abs_qkv[at(query, 0) + d];
                }
            }
        }
    }
    (o, dqkv)
}

#[test]
fn attention_and_its_gradient_agree_with_the_oracle() {
    let mut o_within = Within::new("attention, o", FORWARD);
    let mut lse_within = Within::new("attention, lse", LOGARITHM);
    let mut d_within = Within::new("attention, dqkv", BACKWARD);
    let mut rng = Rng::new(30);
    for (i, width) in WIDTHS.into_iter().enumerate() {
        for (j, tokens) in TOKENS.into_iter().chain(many_tokens(width)).enumerate() {
            let heads = if tokens * width > 4000 { 1 } else { 1 + (i + j) % 3 };
            let shape = AttentionShape { tokens, channels: heads * width, heads };
            // Sharp softmaxes too: scores up to about 100.
            let sharpness = [1.0, 3.0, 10.0][(i + 2 * j) % 3];
            let mut qkv = rng.vec(tokens * 3 * shape.channels);
            for token in qkv.chunks_exact_mut(3 * shape.channels) {
                token[..2 * shape.channels].iter_mut().for_each(|v| *v *= sharpness);
            }
            let d_o = rng.vec(tokens * shape.channels);
            let (o, lse) = reference::attention(shape, &wide(&qkv), &|_, _, _| 1.0);
            let dqkv = reference::attention_backward(shape, &wide(&qkv), &wide(&d_o), &|_, _, _| 1.0);
            let unit = 1.0 + score_magnitude(shape, &qkv);
            let (mut o_mag, mut d_mag) = result_magnitudes(shape, &qkv, &d_o, &|_, _, _| 1.0);
            o_mag.iter_mut().chain(&mut d_mag).for_each(|m| *m *= unit);
            for isa in Isa::all() {
                let (got_o, got_lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, tokens);
                o_within.check(isa, &shape, &got_o, &o, &o_mag);
                lse_within.check(isa, &shape, &got_lse, &lse, &vec![unit; lse.len()]);
                let saved = Saved { qkv: &qkv, o: &got_o, lse: &got_lse, d_o: &d_o, dropout: None };
                let got = run_backward(isa, MatmulDtype::F32, shape, &saved);
                d_within.check(isa, &shape, &got, &dqkv, &d_mag);
                let (ranges, rows) = (1 + (i + j) % 3, 40 + 17 * j);
                let with_ranges = run_backward_in_ranges(isa, MatmulDtype::F32, shape, &saved, ranges, rows);
                if ranges == 1 {
                    assert_eq!(bits(&with_ranges), bits(&got), "{isa}, {shape:?}");
                }
                d_within.check(isa, &(shape, ranges), &with_ranges, &dqkv, &d_mag);
            }
        }
    }
}

#[test]
fn bf16_error_is_that_of_rounding() {
    let mut o_within = Within::new("attention in bf16, o", BF16);
    let mut d_within = Within::new("attention in bf16, dqkv", BF16);
    let mut rng = Rng::new(36);
    for (i, (tokens, heads, width)) in [
        (1, 1, 4),
        (2, 2, 5),
        (17, 2, 4),
        (33, 3, 8),
        (49, 1, 64),
        (65, 2, 16),
        (97, 1, 20),
        (130, 2, 16),
        (196, 1, 32),
        (197, 2, 3),
        (1300, 1, 48),
        (1, 1, 8),
        (31, 2, 16),
        (63, 2, 4),
        (64, 2, 8),
        (1201, 1, 8),
        (2083, 1, 4),
    ]
    .into_iter()
    .enumerate()
    {
        let shape = AttentionShape { tokens, channels: heads * width, heads };
        let (qkv, d_o) = (rng.vec(tokens * 3 * shape.channels), rng.vec(tokens * shape.channels));
        let (o, _) = reference::attention(shape, &wide(&qkv), &|_, _, _| 1.0);
        let dqkv = reference::attention_backward(shape, &wide(&qkv), &wide(&d_o), &|_, _, _| 1.0);
        let (mut o_mag, mut d_mag) = result_magnitudes(shape, &qkv, &d_o, &|_, _, _| 1.0);
        let unit = unit_of(MatmulDtype::Bf16) * (1.0 + score_magnitude(shape, &qkv));
        o_mag.iter_mut().chain(&mut d_mag).for_each(|m| *m = unit * m.max(1e-9));
        for isa in Isa::all() {
            let (got, lse) = run_forward(isa, MatmulDtype::Bf16, shape, &qkv, None, tokens);
            o_within.check(isa, &shape, &got, &o, &o_mag);
            // Not computed in f32, unless a single key makes every weight 1.
            let exactly = |(got, want): (&f32, &f64)| (f64::from(*got) - want).abs() < 1e-5 * want.abs();
            assert!(tokens < 17 || !got.iter().zip(&o).all(exactly), "{isa}, {shape:?}");
            let saved = Saved { qkv: &qkv, o: &got, lse: &lse, d_o: &d_o, dropout: None };
            let whole = run_backward(isa, MatmulDtype::Bf16, shape, &saved);
            d_within.check(isa, &shape, &whole, &dqkv, &d_mag);
            for ranges in [1, 2 + i % 3] {
                let got = run_backward_in_ranges(isa, MatmulDtype::Bf16, shape, &saved, ranges, 40 + 17 * i);
                if ranges == 1 {
                    assert_eq!(bits(&got), bits(&whole), "{isa}, {shape:?}");
                }
                d_within.check(isa, &(shape, ranges), &got, &dqkv, &d_mag);
            }
        }
    }
}

#[test]
fn splitting_into_tasks_is_bit_exact() {
    let mut rng = Rng::new(31);
    for (tokens, heads, width) in [(1, 1, 4), (70, 2, 4), (33, 2, 5), (97, 3, 8), (130, 1, 33), (196, 2, 16)]
    {
        let shape = AttentionShape { tokens, channels: heads * width, heads };
        let mut qkv = rng.vec(tokens * 3 * shape.channels);
        // Every third query is long enough to need a maximum, unlike its neighbours.
        for token in qkv.chunks_exact_mut(3 * shape.channels).step_by(3) {
            token[..shape.channels].iter_mut().for_each(|q| *q *= 300.0);
        }
        for isa in Isa::all() {
            let (o, lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, tokens);
            let task = Attention::new(isa, MatmulDtype::F32, tokens, shape.channels, heads).task_queries(16);
            for part in [1, 7, 16, 31, 50, task] {
                let (part_o, part_lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, part);
                assert_eq!(bits(&part_o), bits(&o), "{isa}, {part} queries of {shape:?}");
                assert_eq!(bits(&part_lse), bits(&lse), "{isa}, {part} queries of {shape:?}");
            }
        }
    }
}

#[test]
fn distant_scores_do_not_overflow() {
    // The largest score is in the last block of keys, so all earlier sums are rescaled to nothing.
    for width in [4, 5, 8, 16, 32] {
        let shape = AttentionShape { tokens: 200, channels: width, heads: 1 };
        let mut rng = Rng::new(32);
        let mut qkv = rng.vec(200 * 3 * width);
        for (token, row) in qkv.chunks_exact_mut(3 * width).enumerate() {
            row[..width].fill(10.0);
            row[width..2 * width].fill(if token == 190 { 100.0 } else { -100.0 + token as f32 });
        }
        let d_o = rng.vec(200 * width);
        for isa in Isa::all() {
            let (o, lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, 200);
            for row in o.chunks_exact(width) {
                assert_eq!(row, &qkv[(190 * 3 + 2) * width..191 * 3 * width], "{isa}, {width}");
            }
            let saved = Saved { qkv: &qkv, o: &o, lse: &lse, d_o: &d_o, dropout: None };
            let dqkv = run_backward(isa, MatmulDtype::F32, shape, &saved);
            assert!(dqkv.iter().all(|v| v.is_finite()), "{isa}, {width}");
        }
    }
}

/// Equal scores, from far below zero to far above: with and without a maximum, o is the mean of the values.
#[test]
fn equal_scores_give_the_mean_of_the_values() {
    for (width, score) in
        [1, 4, 8, 16, 33].into_iter().flat_map(|w| [-900.0, -30.0, 0.0, 30.0, 900.0].map(|s| (w, s)))
    {
        let shape = AttentionShape { tokens: 70, channels: width, heads: 1 };
        let mut qkv = Rng::new(35).vec(70 * 3 * width);
        for row in qkv.chunks_exact_mut(3 * width) {
            row[..width].fill(1.0);
            row[width..2 * width].fill(score / (width as f32).sqrt());
        }
        let values = |d: usize| qkv.chunks_exact(3 * width).map(move |row| f64::from(row[2 * width + d]));
        for isa in Isa::all() {
            let (o, lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, 70);
            for (i, o) in o.iter().enumerate() {
                let mean = values(i % width).sum::<f64>() / 70.0;
                // All scores have the same bits, so only the rounding of the sums remains.
                assert!((f64::from(*o) - mean).abs() < 4e-6, "{isa}, {width}, {score}: {o}, not {mean}");
            }
            let want = f64::from(score) + 70f64.ln();
            let close = |lse: &f32| (f64::from(*lse) - want).abs() < 1e-6 * (1.0 + want.abs());
            assert!(lse.iter().all(close), "{isa}, {width}, {score}: {:?}, not {want}", &lse[..3]);
        }
    }
}

#[test]
fn padding_is_ignored_for_very_negative_scores() {
    // Padding keys have score 0, so that if they were counted their weight would be e^300.
    let shape = AttentionShape { tokens: 50, channels: 4, heads: 1 };
    let mut rng = Rng::new(34);
    let mut qkv = rng.vec(50 * 12);
    for row in qkv.chunks_exact_mut(12) {
        row[..4].fill(15.0);
        row[4..8].iter_mut().for_each(|k| *k -= 10.0);
    }
    let d_o: Vec<f32> = rng.vec(50 * 4).iter().map(|v| v * 1e3).collect();
    let unit = 1.0 + score_magnitude(shape, &qkv);
    assert!(unit > 250.0);
    let (mut o_mag, mut d_mag) = result_magnitudes(shape, &qkv, &d_o, &|_, _, _| 1.0);
    o_mag.iter_mut().chain(&mut d_mag).for_each(|m| *m *= unit);
    let (want, _) = reference::attention(shape, &wide(&qkv), &|_, _, _| 1.0);
    let want_d = reference::attention_backward(shape, &wide(&qkv), &wide(&d_o), &|_, _, _| 1.0);
    let mut within = Within::new("attention, low scores", BACKWARD);
    for isa in Isa::all() {
        let (o, lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, 50);
        within.check(isa, "o", &o, &want, &o_mag);
        let saved = Saved { qkv: &qkv, o: &o, lse: &lse, d_o: &d_o, dropout: None };
        within.check(isa, "dqkv", &run_backward(isa, MatmulDtype::F32, shape, &saved), &want_d, &d_mag);
    }
}

#[test]
fn nan_propagates_exactly_to_dependents() {
    let mut rng = Rng::new(33);
    for (tokens, heads, width) in [(5, 1, 3), (20, 2, 4), (100, 3, 5), (97, 2, 16)] {
        let shape = AttentionShape { tokens, channels: heads * width, heads };
        // The first, a middle and the last token; then a NaN in the gradient.
        for (part, token) in (0..4).flat_map(|part| [0, tokens / 2, tokens - 1].map(|t| (part, t))) {
            let mut qkv = rng.vec(tokens * 3 * shape.channels);
            let mut d_o = rng.vec(tokens * shape.channels);
            let d = rng.below(shape.channels);
            match part {
                3 => d_o[token * shape.channels + d] = f32::NAN,
                _ => qkv[(token * 3 + part) * shape.channels + d] = f32::NAN,
            }
            let (o, lse) = reference::attention(shape, &wide(&qkv), &|_, _, _| 1.0);
            let dqkv = reference::attention_backward(shape, &wide(&qkv), &wide(&d_o), &|_, _, _| 1.0);
            for isa in Isa::all() {
                let case = format!("part {part}, token {token} on {isa}, {shape:?}");
                let (got_o, got_lse) = run_forward(isa, MatmulDtype::F32, shape, &qkv, None, tokens);
                assert_eq!(nans(wide(&got_o)), nans(o.clone()), "o: {case}");
                assert_eq!(nans(wide(&got_lse)), nans(lse.clone()), "lse: {case}");
                let saved = Saved { qkv: &qkv, o: &got_o, lse: &got_lse, d_o: &d_o, dropout: None };
                let got = run_backward(isa, MatmulDtype::F32, shape, &saved);
                assert_eq!(nans(wide(&got)), nans(dqkv.clone()), "dqkv: {case}");
            }
        }
    }
}
