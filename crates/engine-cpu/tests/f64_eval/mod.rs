//! Evaluates the forward operations of a graph in f64 with the naive versions in `ddpm_kernels::reference`: the oracle for whole
//! graphs, precise enough for finite differences.

use ddpm_engine::graph::Node;
use ddpm_engine::ops::{
    Attention, BatchNorm, Conv2d, Conv2dTranspose, Dropout, GroupNorm, LayerNorm, Loss, Op, QSample,
    SinusoidalEmbedding, VariationalBound, WeightedLoss,
};
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
            let results = compute(&Operands { graph, node, values });
            for (&t, result) in node.outputs.iter().zip(results) {
                assert_eq!(graph.shape(t).len(), result.len(), "{}", node.name);
                values.insert(t, result);
            }
        }
    }
}

/// A node's operands.
struct Operands<'a> {
    graph: &'a Graph,
    node: &'a Node,
    values: &'a Values,
}

impl Operands<'_> {
    fn x(&self, i: usize) -> &[f64] {
        &self.values[&self.node.inputs[i]]
    }

    fn shape(&self, i: usize) -> Shape {
        self.graph.shape(self.node.inputs[i])
    }

    fn output_shape(&self) -> Shape {
        self.graph.shape(self.node.outputs[0])
    }
}

fn compute(o: &Operands<'_>) -> Vec<Vec<f64>> {
    let (x, shape) = (|i: usize| o.x(i), |i: usize| o.shape(i));
    let result = match &o.node.op {
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
        Op::BatchNorm(op) => return batch_norm(op, o),
        Op::LayerNorm(op) => return layer_norm(op, o),
        Op::Resample(op) => {
            let images = x(0).chunks(x(0).len() / shape(0).dims()[0]);
            images.flat_map(|x| reference::resample(&op.rows, &op.columns, shape(0).channels(), x)).collect()
        }
        Op::MaxPool(_) => {
            let [_, h, w, c] = shape(0).nhwc().expect("images");
            x(0).chunks(h * w * c).flat_map(|x| reference::max_pool(h, w, c, x).0).collect()
        }
        Op::Embedding(_) => embedding(o),
        Op::Dropout(op) => dropout(op, o),
        Op::Loss(op) => loss(op, o),
        Op::WeightedLoss(op) => weighted_loss(op, o),
        Op::VariationalBound(op) => variational_bound(op, o),
        Op::Conv2d(op) => conv2d(op, o),
        Op::Conv2dTranspose(op) => conv2d_transpose(op, o),
        Op::GroupNorm(op) => return group_norm(op, o),
        Op::Attention(op) => return attention(op, o),
        Op::QSample(op) => q_sample(op, o),
        Op::SinusoidalEmbedding(op) => sinusoidal_embedding(op, o),
        Op::Fill(op) => vec![f64::from(op.value); op.ty.shape.len()],
        other => panic!("{}: no f64 version of {}", o.node.name, other.operation().name()),
    };
    vec![result]
}

fn conv2d(op: &Conv2d, o: &Operands<'_>) -> Vec<f64> {
    let mut addends = (2..o.node.inputs.len()).map(|i| o.x(i));
    let mut when = |there: bool| if there { addends.next() } else { None };
    let (bias, per_image_bias, residual) = (when(op.bias), when(op.per_image_bias), when(op.residual));
    let conv = conv_shape(o.shape(0), o.shape(1), o.output_shape(), op.stride, op.pad.before);
    reference::conv2d(conv, o.x(0), o.x(1), bias, per_image_bias, residual)
}

fn conv2d_transpose(op: &Conv2dTranspose, o: &Operands<'_>) -> Vec<f64> {
    let conv = conv_shape(o.output_shape(), o.shape(1), o.shape(0), op.stride, op.pad.before);
    reference::conv2d_data_grad(conv, o.x(0), o.x(1), op.bias.then(|| o.x(2)))
}

fn batch_norm(op: &BatchNorm, o: &Operands<'_>) -> Vec<Vec<f64>> {
    let (y, mean, variance) = reference::batch_norm(f64::from(op.eps), o.x(0), o.x(1), o.x(2));
    let rows = (y.len() / mean.len()) as f64;
    let rstd = variance.iter().map(|v| 1.0 / (v + f64::from(op.eps)).sqrt()).collect();
    let unbiased = variance.iter().map(|v| v * rows / (rows - 1.0)).collect();
    vec![y, mean, rstd, unbiased]
}

fn layer_norm(op: &LayerNorm, o: &Operands<'_>) -> Vec<Vec<f64>> {
    let rows = o.x(0).len() / o.x(1).len();
    vec![reference::layer_norm(f64::from(op.eps), o.x(0), o.x(1), o.x(2)), vec![0.0; 2 * rows]]
}

fn group_norm(op: &GroupNorm, o: &Operands<'_>) -> Vec<Vec<f64>> {
    let (n, channels) = (o.shape(0).dims()[0], o.shape(0).channels());
    let pixels = o.x(0).len() / n / channels;
    let norm = NormShape { pixels, channels, groups: op.groups, eps: op.eps, silu: op.silu };
    let images = o.x(0).chunks(pixels * channels);
    let (y, stats) =
        images.map(|x0| reference::group_norm(norm, x0, o.x(1), o.x(2))).unzip::<_, _, Vec<_>, Vec<_>>();
    vec![y.concat(), stats.concat()]
}

fn loss(op: &Loss, o: &Operands<'_>) -> Vec<f64> {
    vec![reference::loss_mean(*op, o.x(0), o.x(1))]
}

fn weighted_loss(op: &WeightedLoss, o: &Operands<'_>) -> Vec<f64> {
    let image = o.x(0).len() / o.shape(0).dims()[0];
    let each = o.x(0).chunks(image).zip(o.x(1).chunks(image)).zip(o.x(2));
    let weighted =
        each.map(|((a, b), &t)| f64::from(op.weight[t as usize]) * reference::loss_mean(op.loss, a, b));
    vec![weighted.sum::<f64>() / o.shape(0).dims()[0] as f64]
}

fn variational_bound(op: &VariationalBound, o: &Operands<'_>) -> Vec<f64> {
    let image = o.x(0).len() / o.shape(0).dims()[0];
    let of = |i: usize, p: usize| &o.x(i)[p * image..(p + 1) * image];
    let terms =
        o.x(4).iter().enumerate().map(|(p, &t)| {
            reference::bound_sum(&op.steps[t as usize], of(0, p), of(1, p), of(2, p), of(3, p))
        });
    vec![op.scale * terms.sum::<f64>() / o.x(0).len() as f64 / 2f64.ln()]
}

fn q_sample(op: &QSample, o: &Operands<'_>) -> Vec<f64> {
    let image = o.x(0).len() / o.x(2).len();
    let images = o.x(0).chunks(image).zip(o.x(1).chunks(image)).zip(o.x(2));
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

fn sinusoidal_embedding(op: &SinusoidalEmbedding, o: &Operands<'_>) -> Vec<f64> {
    let half = op.dim / 2;
    assert!(!op.cosines_first, "the cases have the sines first");
    let angle = |t: f64, i: usize| t / 1e4f64.powf(i as f64 / (half as f64 - op.shift));
    let row = |&t: &f64| {
        let sines = (0..half).map(move |i| angle(t, i).sin());
        sines.chain((0..half).map(move |i| angle(t, i).cos())).collect::<Vec<_>>()
    };
    o.x(0).iter().flat_map(row).collect()
}

fn embedding(o: &Operands<'_>) -> Vec<f64> {
    let c = o.shape(0).channels();
    o.x(1).iter().flat_map(|&label| o.x(0)[label as usize * c..][..c].to_vec()).collect()
}

fn dropout(op: &Dropout, o: &Operands<'_>) -> Vec<f64> {
    let image = o.x(0).len() / o.shape(0).dims()[0];
    let factor = |i: usize| masks(op).image((i / image) as u32).factor(i % image);
    o.x(0).iter().enumerate().map(|(i, v)| v * f64::from(factor(i))).collect()
}

fn attention(op: &Attention, o: &Operands<'_>) -> Vec<Vec<f64>> {
    let (n, channels) = (o.shape(0).dims()[0], o.shape(0).channels() / 3);
    let tokens = o.x(0).len() / n / (3 * channels);
    let attention = AttentionShape { tokens, channels, heads: op.heads };
    let images = o.x(0).chunks(tokens * 3 * channels);
    let of_image = |(i, qkv): (usize, &[f64])| {
        let masks = op.dropout.as_ref().map(|d| masks(d).image(i as u32));
        let factor = |head: usize, query: usize, key: usize| {
            masks.map_or(1.0, |m| f64::from(m.weight_factor(head, tokens, query, key)))
        };
        reference::attention(attention, qkv, &factor)
    };
    let (o, lse) = images.enumerate().map(of_image).unzip::<_, _, Vec<_>, Vec<_>>();
    vec![o.concat(), lse.concat()]
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
