//! Every analytic gradient against central finite differences of the same graph evaluated in f64, on every
//! instruction set.

mod convolutions;
#[path = "../f64_eval/mod.rs"]
mod f64_eval;
mod graphs;

use ddpm_engine::ops::*;
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::{Error, Executor, Graph, PlanOptions, Region, Result, RngKey, Shape, Tensor};
use ddpm_engine_cpu::{CpuExecutor, Isa};
use ddpm_rng::{Purpose, Stream};
use f64_eval::{Values, evaluate};
use std::sync::Arc;

/// Step of the finite differences, in f64: truncation error of 1e-10, rounding error of 1e-11.
const STEP: f64 = 1e-5;
/// Maximum difference, relative to the parameter's largest gradient. A wrong or missing term causes one of about 1; f32
/// rounding through a few layers one of 1e-6.
const TOLERANCE: f64 = 1e-5;
/// Allowed rounding error of a gradient that is exactly 0 (attention to a single token), a sum of values of about 1.
const ZERO: f64 = 1e-7;
/// Elements of each parameter to check.
const SAMPLES: usize = 48;

/// Adds nodes to a graph, with numbered names.
struct Build {
    graph: Graph,
    inputs: Vec<Tensor>,
}

impl Build {
    fn p(&mut self, shape: impl Into<Shape>) -> Tensor {
        let name = format!("p{}", self.graph.parameters().len());
        self.graph.parameter(&name, shape)
    }

    fn input(&mut self, shape: impl Into<Shape>) -> Tensor {
        let t = self.graph.input(&format!("x{}", self.inputs.len()), shape);
        self.inputs.push(t);
        t
    }

    fn add(&mut self, op: impl Into<Op>, inputs: &[Tensor]) -> Tensor {
        let name = format!("node{}", self.graph.nodes().len());
        self.graph.add(&name, op, inputs).expect("the case's shapes fit")
    }

    /// A convolution of `x` with new weights and a new bias.
    fn conv(&mut self, x: Tensor, kernel: (usize, usize), cout: usize, stride: usize, pad: usize) -> Tensor {
        let cin = self.graph.shape(x).channels();
        let (w, b) = (self.p([kernel.0, kernel.1, cin, cout]), self.p([cout]));
        self.add(Conv2d::new(stride, pad), &[x, w, b])
    }

    fn norm(&mut self, x: Tensor, groups: usize, silu: bool) -> Tensor {
        let c = self.graph.shape(x).channels();
        let (gamma, beta) = (self.p([c]), self.p([c]));
        self.add(GroupNorm { groups, eps: 1e-5, silu }, &[x, gamma, beta])
    }
}

fn normal(index: usize, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Stream::new(11, Purpose::Test, 0, index as u32).fill_normal(&mut x);
    x
}

/// A weight for each timestep that [`check`] generates.
fn weights() -> Arc<[f32]> {
    (0..20).map(|t| 0.3 + 0.5 * t as f32).collect()
}

/// A bound with as many timesteps, every second one with the decoder term.
fn bound() -> VariationalBound {
    let step = |t: usize| BoundStep {
        to_x_0: (1.0 + 0.1 * t as f64, -0.2 * t as f64),
        posterior_x_0: 0.3,
        log_variance: (-1.5 - 0.1 * t as f64, 0.5),
        decoder: t.is_multiple_of(2),
    };
    VariationalBound { steps: (0..20).map(step).collect(), scale: 0.7 }
}

type Case = (&'static str, fn(&mut Build) -> Tensor);

/// Checks all gradients of `mse(y, target)`.
fn check((name, case): (&str, impl Fn(&mut Build) -> Tensor)) {
    let mut b = Build { graph: Graph::new(), inputs: Vec::new() };
    let y = case(&mut b);
    let target = b.input(b.graph.shape(y));
    let loss = b.add(Loss::Mse, &[y, target]);
    let Build { mut graph, inputs } = b;
    let forward = graph.clone();
    let gradients = backward(&mut graph, loss).expect("every operation of the case has a gradient");
    let parameters = forward.parameters().to_vec();
    let data: Vec<(Tensor, Vec<f32>)> = (parameters.iter().chain(&inputs).enumerate())
        .map(|(i, &t)| {
            let values = normal(i, forward.shape(t).len());
            // Inputs with one dimension, other than the target, are timesteps or labels.
            let timesteps =
                forward.info(t).name.starts_with('x') && t != target && forward.shape(t).dims().len() == 1;
            (t, if timesteps { values.iter().map(|v| (v.abs() * 3.0).floor()).collect() } else { values })
        })
        .collect();
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let start: Values = data.iter().map(|(t, x)| (*t, wide(x))).collect();
    let loss_of = |values: &Values| {
        let mut values = values.clone();
        evaluate(&forward, &mut values);
        values[&loss][0]
    };

    // (parameter, element, difference quotient)
    let mut quotients = Vec::new();
    for (i, p) in parameters.iter().enumerate() {
        let len = forward.shape(*p).len();
        for s in 0..SAMPLES.min(len) {
            let at = s * len / SAMPLES.min(len);
            let mut values = start.clone();
            let mut side = |by: f64| {
                values.get_mut(p).expect("given")[at] = start[p][at] + by;
                loss_of(&values)
            };
            quotients.push((i, at, (side(STEP) - side(-STEP)) / (2.0 * STEP)));
        }
    }

    for isa in Isa::all() {
        let options =
            PlanOptions { gradients: Some(gradients.clone()), outputs: vec![loss], ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(graph.clone(), &options, 2, isa).expect("a small plan");
        for (t, x) in &data {
            executor.write(*t, x).expect("right length");
        }
        executor.run(RngKey::default()).expect("runs");
        let mut got_loss = [0.0];
        executor.read(loss, &mut got_loss).expect("an output");
        let want_loss = loss_of(&start);
        let error = (f64::from(got_loss[0]) - want_loss).abs();
        assert!(error <= 1e-5 * want_loss.abs(), "{name} on {isa}: loss {} not {want_loss}", got_loss[0]);
        let mut worst = 0.0f64;
        for (i, &p) in parameters.iter().enumerate() {
            let mut got = vec![f32::NAN; forward.shape(p).len()];
            executor.read_parameter(Region::Gradients, i, &mut got).expect("a training plan");
            let of_p = || quotients.iter().filter(|q| q.0 == i);
            let scale = of_p().map(|q| q.2.abs()).fold(0.0, f64::max);
            for &(_, at, want) in of_p() {
                let error = (f64::from(got[at]) - want).abs() / (scale + ZERO / TOLERANCE);
                let p = &forward.info(p).name;
                assert!(
                    error <= TOLERANCE,
                    "{name} on {isa}: gradient of {p}[{at}] is {}, not {want} (largest {scale})",
                    got[at]
                );
                worst = worst.max(error);
            }
        }
        println!("{name} on {isa}: worst {worst:.1e} in {} gradients", quotients.len());
    }
}

#[test]
fn pointwise_operations() {
    let cases: [Case; 17] = [
        ("silu", |b| {
            let x = b.p([2, 3, 5, 7]);
            b.add(Activate(Activation::Silu), &[x])
        }),
        ("silu of one element", |b| {
            let x = b.p([1]);
            b.add(Activate(Activation::Silu), &[x])
        }),
        ("add", |b| {
            // Both parameters have the same gradient: each must get its own copy.
            let (x, y) = (b.p([2, 3, 1, 5]), b.p([2, 3, 1, 5]));
            b.add(Add, &[x, y])
        }),
        ("add a tensor to itself", |b| {
            let x = b.p([3, 17]);
            b.add(Add, &[x, x])
        }),
        ("add a computed tensor to itself", |b| {
            let x = b.p([3, 17]);
            let y = b.add(Activate(Activation::Silu), &[x]);
            b.add(Add, &[y, y])
        }),
        ("add per channel", |b| {
            let (x, r) = (b.p([3, 2, 5, 7]), b.p([3, 7]));
            b.add(AddPerChannel, &[x, r])
        }),
        ("add per channel to an input", |b| {
            let (x, r) = (b.input([2, 3, 3, 1]), b.p([2, 1]));
            b.add(AddPerChannel, &[x, r])
        }),
        ("mse between two parameters", |b| {
            let (x, y) = (b.p([5, 3]), b.p([5, 3]));
            b.add(Loss::Mse, &[x, y])
        }),
        ("l1 between two parameters", |b| {
            let (x, y) = (b.p([5, 3]), b.p([5, 3]));
            b.add(Loss::L1, &[x, y])
        }),
        ("huber between a parameter and an input", |b| {
            let (x, y) = (b.p([5, 7]), b.input([5, 7]));
            b.add(Loss::Huber { delta: 0.8 }, &[x, y])
        }),
        ("weighted mse of two images", |b| {
            let (x, y, t) = (b.p([2, 3, 5, 7]), b.input([2, 3, 5, 7]), b.input([2]));
            b.add(WeightedLoss { loss: Loss::Mse, weight: weights() }, &[x, y, t])
        }),
        ("weighted huber of images of one element", |b| {
            let (x, y, t) = (b.p([5, 1]), b.input([5, 1]), b.input([5]));
            b.add(WeightedLoss { loss: Loss::Huber { delta: 0.8 }, weight: weights() }, &[x, y, t])
        }),
        ("variational bound of five images", |b| {
            let (output, v) = (b.input([5, 2, 3, 2]), b.p([5, 2, 3, 2]));
            let (x_0, x_t, t) = (b.input([5, 2, 3, 2]), b.input([5, 2, 3, 2]), b.input([5]));
            b.add(bound(), &[output, v, x_0, x_t, t])
        }),
        ("variational bound of half of the channels", |b| {
            let x = b.p([4, 2, 2, 6]);
            let v = b.add(Slice { from: 3, len: 3 }, &[x]);
            let (output, x_0, x_t) = (b.input([4, 2, 2, 3]), b.input([4, 2, 2, 3]), b.input([4, 2, 2, 3]));
            let t = b.input([4]);
            b.add(bound(), &[output, v, x_0, x_t, t])
        }),
        ("mse of a tensor with itself", |b| {
            let (x, y) = (b.p([5, 3]), b.p([1]));
            let zero = b.add(Loss::Mse, &[x, x]);
            b.add(Add, &[zero, y])
        }),
        ("the parameter itself", |b| b.p([4, 3])),
        ("a parameter without influence", |b| {
            let (x, _) = (b.p([4, 3]), b.p([2, 2]));
            b.add(Activate(Activation::Silu), &[x])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn the_bound_has_a_gradient_for_the_variance_only() {
    let mut b = Build { graph: Graph::new(), inputs: Vec::new() };
    let (output, v) = (b.p([5, 2]), b.p([5, 2]));
    let (x_0, x_t, t) = (b.input([5, 2]), b.input([5, 2]), b.input([5]));
    let loss = b.add(bound(), &[output, v, x_0, x_t, t]);
    let mut graph = b.graph;
    let options =
        PlanOptions { gradients: Some(backward(&mut graph, loss).unwrap()), ..PlanOptions::default() };
    let mut executor = CpuExecutor::with_isa(graph, &options, 1, Isa::best()).unwrap();
    for (i, x) in [output, v, x_0, x_t].into_iter().enumerate() {
        executor.write(x, &normal(i, 10)).unwrap();
    }
    executor.write(t, &[1.0; 5]).unwrap();
    executor.run(RngKey::default()).unwrap();
    let [output_grad, v_grad] = [0, 1].map(|i| {
        let mut gradient = vec![f32::NAN; 10];
        executor.read_parameter(Region::Gradients, i, &mut gradient).unwrap();
        gradient
    });
    assert!(
        output_grad.iter().all(|g| *g == 0.0) && v_grad.iter().all(|g| *g != 0.0),
        "{output_grad:?}, {v_grad:?}"
    );
}

#[test]
fn activations_and_products() {
    let act = |act: Activation| {
        move |b: &mut Build| {
            let x = b.p([2, 3, 5, 7]);
            b.add(Activate(act), &[x])
        }
    };
    check(("relu", act(Activation::Relu)));
    check(("gelu", act(Activation::Gelu)));
    check(("mish", act(Activation::Mish)));
    let cases: [Case; 5] = [
        ("affine", |b| {
            let x = b.p([3, 17]);
            b.add(Affine { scale: -0.7, shift: 0.3 }, &[x])
        }),
        ("multiply", |b| {
            let (x, y) = (b.p([2, 3, 1, 5]), b.p([2, 3, 1, 5]));
            b.add(Multiply, &[x, y])
        }),
        ("modulate", |b| {
            let (x, r) = (b.p([3, 2, 5, 7]), b.p([3, 7]));
            b.add(Modulate, &[x, r])
        }),
        ("embedding", |b| {
            // Labels 0 to about 8, some of them twice.
            let (table, label) = (b.p([16, 5]), b.input([9]));
            b.add(Embedding, &[table, label])
        }),
        ("dropout", |b| {
            let x = b.p([2, 5, 7, 3]);
            let y = b.add(Dropout { p: 0.3, site: 1 }, &[x]);
            b.add(Dropout { p: 0.5, site: 2 }, &[y])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn resizing() {
    let cases: [Case; 6] = [
        ("nearest", |b| {
            let x = b.p([2, 3, 2, 5]);
            b.add(Resample::both(Taps::nearest_double, 3, 2), &[x])
        }),
        ("bilinear", |b| {
            let x = b.p([2, 3, 4, 17]);
            b.add(Resample::both(Taps::linear_double, 3, 4), &[x])
        }),
        ("bilinear of one pixel", |b| {
            let x = b.p([2, 1, 2, 3]);
            b.add(Resample::both(Taps::linear_double, 1, 2), &[x])
        }),
        ("mean", |b| {
            let x = b.p([2, 5, 4, 3]);
            b.add(Resample::both(Taps::mean_half, 5, 4), &[x])
        }),
        ("max pool", |b| {
            let x = b.p([2, 4, 6, 17]);
            b.add(MaxPool, &[x])
        }),
        ("max pool, odd", |b| {
            let x = b.p([2, 5, 3, 3]);
            b.add(MaxPool, &[x])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn normalisation_over_rows_and_over_the_batch() {
    let batch = |x: &'static [usize]| {
        move |b: &mut Build| {
            let x = b.p(Shape::new(x));
            let c = b.graph.shape(x).channels();
            let (gamma, beta) = (b.p([c]), b.p([c]));
            b.add(BatchNorm { eps: 1e-5 }, &[x, gamma, beta])
        }
    };
    check(("batch norm", batch(&[3, 2, 5, 7])));
    check(("batch norm of more rows than a task has", batch(&[5, 12, 17, 3])));
    check(("batch norm of rows", batch(&[6, 17])));
    let layer = |x: &'static [usize]| {
        move |b: &mut Build| {
            let x = b.p(Shape::new(x));
            let c = b.graph.shape(x).channels();
            let (gamma, beta) = (b.p([c]), b.p([c]));
            b.add(LayerNorm { eps: 1e-5 }, &[x, gamma, beta])
        }
    };
    check(("layer norm", layer(&[2, 3, 5, 7])));
    check(("layer norm of more rows than a task has", layer(&[2, 13, 12, 33])));
}

#[test]
fn concatenation() {
    let cases: [Case; 5] = [
        ("slices", |b| {
            let x = b.p([3, 2, 5, 7]);
            let (a, c) = (b.add(Slice { from: 0, len: 3 }, &[x]), b.add(Slice { from: 4, len: 3 }, &[x]));
            let a = b.add(Activate(Activation::Silu), &[a]);
            b.add(Multiply, &[a, c])
        }),
        ("concat", |b| {
            let (x, y) = (b.p([2, 3, 2, 3]), b.p([2, 3, 2, 17]));
            b.add(Concat, &[x, y])
        }),
        ("concat of rows", |b| {
            let (x, y) = (b.p([5, 1]), b.p([5, 6]));
            b.add(Concat, &[x, y])
        }),
        ("concat of a tensor with itself", |b| {
            let x = b.p([2, 3, 2, 5]);
            b.add(Concat, &[x, x])
        }),
        ("concat with an input, read twice", |b| {
            let (x, y) = (b.p([1, 2, 2, 3]), b.input([1, 2, 2, 4]));
            let joined = b.add(Concat, &[y, x]);
            let other = b.add(Activate(Activation::Silu), &[joined]);
            b.add(Add, &[joined, other])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn group_normalisation() {
    let cases: [Case; 6] = [
        ("group norm", |b| {
            let x = b.p([2, 3, 4, 6]);
            b.norm(x, 2, false)
        }),
        ("group norm with silu", |b| {
            let x = b.p([2, 3, 4, 6]);
            b.norm(x, 3, true)
        }),
        ("group norm, one group", |b| {
            let x = b.p([1, 2, 3, 17]);
            b.norm(x, 1, true)
        }),
        ("group norm, a group for each channel", |b| {
            let x = b.p([2, 5, 1, 5]);
            b.norm(x, 5, true)
        }),
        ("group norm, one pixel", |b| {
            let x = b.p([3, 1, 1, 8]);
            b.norm(x, 2, false)
        }),
        ("group norm of an input, 33 channels", |b| {
            let x = b.input([2, 3, 3, 33]);
            b.norm(x, 3, true)
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn attention() {
    let cases: [Case; 6] = [
        ("attention", |b| {
            let qkv = b.p([2, 2, 3, 3 * 8]);
            b.add(Attention { heads: 2, dropout: None }, &[qkv])
        }),
        ("attention, heads of size 1", |b| {
            let qkv = b.p([1, 3, 3, 3 * 3]);
            b.add(Attention { heads: 3, dropout: None }, &[qkv])
        }),
        ("attention, heads of size 5", |b| {
            let qkv = b.p([1, 5, 7, 3 * 10]);
            b.add(Attention { heads: 2, dropout: None }, &[qkv])
        }),
        ("attention, heads of size 33", |b| {
            let qkv = b.p([1, 2, 2, 3 * 33]);
            b.add(Attention { heads: 1, dropout: None }, &[qkv])
        }),
        ("attention, one token", |b| {
            let qkv = b.p([2, 1, 1, 3 * 4]);
            b.add(Attention { heads: 1, dropout: None }, &[qkv])
        }),
        ("attention, more tokens than a block of keys", |b| {
            let qkv = b.p([1, 10, 10, 3 * 4]);
            b.add(Attention { heads: 1, dropout: None }, &[qkv])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn an_operation_without_a_gradient_is_reported_by_name() {
    let build = || -> Result<(Graph, Tensor)> {
        let mut g = Graph::new();
        let [x, c] = [g.parameter("p", [2, 3]), g.parameter("q", [3])];
        let y = g.add("the.norm", BatchNormInference { eps: 1e-5 }, &[x, c, c, c, c])?;
        let target = g.input("target", [2, 3]);
        let loss = g.add("loss", Loss::Mse, &[y, target])?;
        Ok((g, loss))
    };
    let (mut g, loss) = build().expect("a valid graph");
    let error = backward(&mut g, loss).expect_err("inference batch norm has no gradient");
    assert!(matches!(&error, Error::NoGradient { node, .. } if node == "the.norm"), "{error}");
}
