//! Evaluates the forward operations of a graph in f64 with the naive versions in `ddpm_kernels::reference`: the oracle for whole
//! graphs, precise enough for finite differences.

use ddpm_engine::graph::Node;
use ddpm_engine::ops::{Dropout, Op};
use ddpm_engine::{Graph, Shape, Tensor};
use ddpm_kernels::conv::ConvShape;
use ddpm_kernels::norm::NormShape;
use ddpm_kernels::random::Dropout as Masks;
use ddpm_kernels::reference::{self, AttentionShape};
use ddpm_rng::Purpose;
use std::collections::HashMap;

/// The values of tensors.
pub type Values = HashMap<Tensor, Vec<f64>>;

/// Computes all nodes whose outputs are missing from `values`, which must hold inputs, parameters and random tensors.
pub fn evaluate(graph: &Graph, values: &mut Values) {
    for node in graph.nodes() {
        if !values.contains_key(&node.outputs[0]) {
            let results = compute(graph, node, values);
            for (&t, result) in node.outputs.iter().zip(results) {
                assert_eq!(graph.shape(t).len(), result.len(), "{}", node.name);
                values.insert(t, result);
            }
        }
    }
}

fn compute(graph: &Graph, node: &Node, values: &Values) -> Vec<Vec<f64>> {
    let x = |i: usize| values[&node.inputs[i]].as_slice();
    let shape = |i: usize| graph.shape(node.inputs[i]);
    let result = match &node.op {
        Op::Add(_) => reference::combine(1.0, x(0), 1.0, x(1)),
        Op::AddPerChannel(_) => {
            let images = x(0).chunks(x(0).len() / shape(0).dims()[0]).zip(x(1).chunks(shape(1).channels()));
            images.flat_map(|(x, row)| reference::add_rows(row, x)).collect()
        }
        Op::Concat(_) => {
            let rows = x(0).chunks(shape(0).channels()).zip(x(1).chunks(shape(1).channels()));
            rows.flat_map(|(a, b)| [a, b].concat()).collect()
        }
        Op::Slice(op) => {
            x(0).chunks(shape(0).channels()).flat_map(|row| row[op.from..op.from + op.len].to_vec()).collect()
        }
        Op::Activate(op) => x(0).iter().map(|&x| reference::activate(op.0, x)).collect(),
        Op::Affine(op) => x(0).iter().map(|x| f64::from(op.scale) * x + f64::from(op.shift)).collect(),
        Op::Multiply(_) => x(0).iter().zip(x(1)).map(|(a, b)| a * b).collect(),
        Op::Modulate(_) => {
            let (c, image) = (shape(1).channels(), x(0).len() / shape(0).dims()[0]);
            x(0).iter().enumerate().map(|(i, v)| v * (1.0 + x(1)[i / image * c + i % c])).collect()
        }
        Op::BatchNorm(op) => {
            let (y, mean, variance) = reference::batch_norm(f64::from(op.eps), x(0), x(1), x(2));
            let rows = (y.len() / mean.len()) as f64;
            let rstd = variance.iter().map(|v| 1.0 / (v + f64::from(op.eps)).sqrt()).collect();
            let unbiased = variance.iter().map(|v| v * rows / (rows - 1.0)).collect();
            return vec![y, mean, rstd, unbiased];
        }
        Op::LayerNorm(op) => {
            let rows = x(0).len() / x(1).len();
            return vec![reference::layer_norm(f64::from(op.eps), x(0), x(1), x(2)), vec![0.0; 2 * rows]];
        }
        Op::Resample(op) => {
            let images = x(0).chunks(x(0).len() / shape(0).dims()[0]);
            images.flat_map(|x| reference::resample(&op.rows, &op.columns, shape(0).channels(), x)).collect()
        }
        Op::MaxPool(_) => {
            let [_, h, w, c] = shape(0).nhwc().expect("images");
            x(0).chunks(h * w * c).flat_map(|x| reference::max_pool(h, w, c, x).0).collect()
        }
        Op::Embedding(_) => {
            let c = shape(0).channels();
            x(1).iter().flat_map(|&label| x(0)[label as usize * c..][..c].to_vec()).collect()
        }
        Op::Dropout(op) => {
            let image = x(0).len() / shape(0).dims()[0];
            let factor = |i: usize| masks(op).image((i / image) as u32).factor(i % image);
            x(0).iter().enumerate().map(|(i, v)| v * f64::from(factor(i))).collect()
        }
        Op::Loss(op) => vec![reference::loss_mean(*op, x(0), x(1))],
        Op::WeightedLoss(op) => {
            let image = x(0).len() / shape(0).dims()[0];
            let each = x(0).chunks(image).zip(x(1).chunks(image)).zip(x(2));
            let weighted = each
                .map(|((a, b), &t)| f64::from(op.weight[t as usize]) * reference::loss_mean(op.loss, a, b));
            vec![weighted.sum::<f64>() / shape(0).dims()[0] as f64]
        }
        Op::VariationalBound(op) => {
            let image = x(0).len() / shape(0).dims()[0];
            let of = |i: usize, p: usize| &x(i)[p * image..(p + 1) * image];
            let terms = x(4).iter().enumerate().map(|(p, &t)| {
                reference::bound_sum(&op.steps[t as usize], of(0, p), of(1, p), of(2, p), of(3, p))
            });
            vec![op.scale * terms.sum::<f64>() / x(0).len() as f64 / 2f64.ln()]
        }
        Op::Conv2d(op) => {
            let mut addends = (2..node.inputs.len()).map(x);
            let mut when = |there: bool| if there { addends.next() } else { None };
            let (bias, per_image_bias, residual) =
                (when(op.bias), when(op.per_image_bias), when(op.residual));
            let conv = conv_shape(shape(0), shape(1), graph.shape(node.outputs[0]), op.stride, op.pad.before);
            reference::conv2d(conv, x(0), x(1), bias, per_image_bias, residual)
        }
        Op::Conv2dTranspose(op) => {
            let conv = conv_shape(graph.shape(node.outputs[0]), shape(1), shape(0), op.stride, op.pad.before);
            reference::conv2d_data_grad(conv, x(0), x(1), op.bias.then(|| x(2)))
        }
        Op::GroupNorm(op) => {
            let (n, channels) = (shape(0).dims()[0], shape(0).channels());
            let pixels = x(0).len() / n / channels;
            let norm = NormShape { pixels, channels, groups: op.groups, eps: op.eps, silu: op.silu };
            let images = x(0).chunks(pixels * channels);
            let (y, stats) =
                images.map(|x0| reference::group_norm(norm, x0, x(1), x(2))).unzip::<_, _, Vec<_>, Vec<_>>();
            return vec![y.concat(), stats.concat()];
        }
        Op::Attention(op) => {
            let (n, channels) = (shape(0).dims()[0], shape(0).channels() / 3);
            let tokens = x(0).len() / n / (3 * channels);
            let attention = AttentionShape { tokens, channels, heads: op.heads };
            let images = x(0).chunks(tokens * 3 * channels);
            let of_image = |(i, qkv): (usize, &[f64])| {
                let masks = op.dropout.as_ref().map(|d| masks(d).image(i as u32));
                let factor = |head: usize, query: usize, key: usize| {
                    masks.map_or(1.0, |m| f64::from(m.weight_factor(head, tokens, query, key)))
                };
                reference::attention(attention, qkv, &factor)
            };
            let (o, lse) = images.enumerate().map(of_image).unzip::<_, _, Vec<_>, Vec<_>>();
            return vec![o.concat(), lse.concat()];
        }
        Op::QSample(op) => {
            let image = x(0).len() / x(2).len();
            let images = x(0).chunks(image).zip(x(1).chunks(image)).zip(x(2));
            let tables = |t: f64| {
                (f64::from(op.sqrt_alpha_bar[t as usize]), f64::from(op.sqrt_one_minus_alpha_bar[t as usize]))
            };
            images
                .flat_map(|((x0, eps), &t)| {
                    let (a, b) = tables(t);
                    reference::combine(a, x0, b, eps)
                })
                .collect()
        }
        Op::SinusoidalEmbedding(op) => {
            let half = op.dim / 2;
            assert!(!op.cosines_first, "the cases have the sines first");
            let angle = |t: f64, i: usize| t / 1e4f64.powf(i as f64 / (half as f64 - op.shift));
            let row = |&t: &f64| {
                let sines = (0..half).map(move |i| angle(t, i).sin());
                sines.chain((0..half).map(move |i| angle(t, i).cos())).collect::<Vec<_>>()
            };
            x(0).iter().flat_map(row).collect()
        }
        Op::Fill(op) => vec![f64::from(op.value); op.ty.shape.len()],
        other => panic!("{}: no f64 version of {}", node.name, other.operation().name()),
    };
    vec![result]
}

/// The masks of a run with the default [`RngKey`](ddpm_engine::RngKey).
fn masks(op: &Dropout) -> Masks {
    Masks::new(op.p, [0, 0, Purpose::Dropout as u32 | op.site << 8], [0, 0])
}

/// The convolution of `x` to `y` with weights `w`; anything but an image batch is one image of `rows x 1` pixels.
fn conv_shape(x: Shape, w: Shape, y: Shape, stride: (usize, usize), pad: (usize, usize)) -> ConvShape {
    let pixels = |s: Shape| s.nhwc().unwrap_or([1, s.len() / s.channels(), 1, s.channels()]);
    let ([n, h, wd, cin], [_, oh, ow, cout]) = (pixels(x), pixels(y));
    let [kh, kw, w_in, w_out] = w.nhwc().expect("weights are [kh, kw, cin, cout]");
    assert_eq!((cin, cout), (w_in, w_out));
    ConvShape { n, input: (h, wd), output: (oh, ow), cin, cout, kernel: (kh, kw), stride, pad }
}
