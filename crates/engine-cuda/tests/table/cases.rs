//! The cases: graphs with every operation.

use ddpm_engine::graph::{Node, TensorKind};
use ddpm_engine::ops::*;
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::passes::bf16_storage::Operand;
use ddpm_engine::{Graph, Shape, Tensor};
use ddpm_engine_cuda::lower::accepts_bf16;
use ddpm_rng::Purpose;
use std::sync::Arc;

/// A graph, its gradients, and the outputs to compare.
pub struct Case {
    pub(super) name: String,
    pub(super) graph: Graph,
    pub(super) gradients: Option<Vec<Tensor>>,
    pub(super) outputs: Vec<Tensor>,
    pub(super) form: Form,
}

impl Case {
    /// The names of its operations.
    pub(super) fn operations(&self) -> Vec<&'static str> {
        self.graph.nodes().iter().map(|n| n.op.operation().name()).collect()
    }
}

/// Adds nodes to a graph with generated names.
#[derive(Default)]
pub struct Build {
    pub graph: Graph,
    pub inputs: usize,
    /// Whether operands that may be bf16 are computed tensors.
    stored: bool,
}

impl Build {
    pub fn p(&mut self, shape: impl Into<Shape>) -> Tensor {
        let name = format!("p{}", self.graph.parameters().len());
        self.graph.parameter(&name, shape)
    }

    pub fn input(&mut self, shape: impl Into<Shape>) -> Tensor {
        self.inputs += 1;
        self.graph.input(&format!("x{}", self.inputs), shape)
    }

    /// An input of small nonnegative integers.
    fn index_input(&mut self, n: usize) -> Tensor {
        self.inputs += 1;
        self.graph.input(&format!("t{}", self.inputs), [n])
    }

    fn all(&mut self, op: impl Into<Op>, inputs: &[Tensor]) -> Vec<Tensor> {
        let mut node =
            Node { op: op.into(), inputs: inputs.to_vec(), outputs: Vec::new(), name: String::new() };
        let stored = self.stored;
        for (i, &t) in inputs.iter().enumerate().filter(|_| stored) {
            let written = matches!(self.graph.info(t).kind, TensorKind::Input | TensorKind::Parameter(_));
            if written && accepts_bf16(&self.graph, &node, Operand::Input(i)) {
                node.inputs[i] = self.copy(t);
            }
        }
        let name = format!("node{}", self.graph.nodes().len());
        self.graph.add_all(&name, node.op, &node.inputs).expect("the case's shapes fit")
    }

    /// A copy as a computed tensor.
    fn copy(&mut self, t: Tensor) -> Tensor {
        let name = format!("copy{}", self.graph.nodes().len());
        self.graph.add(&name, Affine { scale: 1.0, shift: 0.0 }, &[t]).expect("any shape")
    }

    pub fn add(&mut self, op: impl Into<Op>, inputs: &[Tensor]) -> Tensor {
        self.all(op, inputs)[0]
    }

    pub fn conv(
        &mut self,
        x: Tensor,
        kernel: (usize, usize),
        cout: usize,
        stride: usize,
        pad: usize,
    ) -> Tensor {
        let cin = self.graph.shape(x).channels();
        let (w, b) = (self.p([kernel.0, kernel.1, cin, cout]), self.p([cout]));
        self.add(Conv2d::new(stride, pad), &[x, w, b])
    }

    pub fn norm(&mut self, x: Tensor, groups: usize, silu: bool) -> Tensor {
        let c = self.graph.shape(x).channels();
        let (gamma, beta) = (self.p([c]), self.p([c]));
        self.add(GroupNorm { groups, eps: 1e-5, silu }, &[x, gamma, beta])
    }
}

/// How the cases are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Every result.
    Plain,
    /// Operands and results that may be bf16 are stored so: only the last result and the gradients are compared. Inputs are
    /// rounded to bf16.
    Stored,
}

/// A table under construction.
struct Cases {
    form: Form,
    all: Vec<Case>,
}

impl Cases {
    fn new(form: Form) -> Self {
        Self { form, all: Vec::new() }
    }

    fn add(&mut self, name: &str, build: impl Fn(&mut Build) -> Tensor) {
        let stored = self.form == Form::Stored;
        let mut b = Build { stored, ..Build::default() };
        let mut y = build(&mut b);
        if stored {
            y = b.copy(y);
        }
        let target = b.input(b.graph.shape(y));
        let loss = b.add(Loss::Mse, &[y, target]);
        let all = b.graph.nodes().iter().flat_map(|n| n.outputs.clone());
        let outputs = all.filter(|&t| !stored || t == y).collect();
        let gradients = b
            .graph
            .info(loss)
            .differentiable
            .then(|| backward(&mut b.graph, loss).expect("every operation of the case has a gradient"));
        self.all.push(Case { name: name.to_owned(), graph: b.graph, gradients, outputs, form: self.form });
    }
}

fn weights() -> Arc<[f32]> {
    (0..20).map(|t| 0.3 + 0.5 * t as f32).collect()
}

/// Convolutions, transposed ones and linear layers: kernels, strides, paddings, odd channel counts, several tiles and parts of k.
pub fn convolutions(form: Form) -> Vec<Case> {
    let mut cases = Cases::new(form);
    type Layer = ([usize; 4], (usize, usize), usize, usize, usize);
    let layers: [Layer; 17] = [
        ([2, 5, 6, 3], (3, 3), 5, 1, 1),
        ([2, 8, 8, 8], (3, 3), 12, 1, 1),
        ([1, 7, 9, 17], (3, 3), 33, 2, 1),
        ([2, 12, 10, 16], (4, 4), 24, 2, 1),
        ([3, 5, 5, 4], (1, 1), 7, 1, 0),
        ([2, 4, 6, 20], (2, 3), 8, 1, 0),
        ([1, 9, 9, 2], (7, 7), 3, 1, 3),
        ([2, 16, 16, 12], (3, 3), 68, 1, 1),
        ([1, 10, 11, 40], (3, 3), 132, 1, 1),
        ([2, 6, 6, 128], (3, 3), 8, 3, 1),
        ([1, 1, 1, 300], (1, 1), 5, 1, 0),
        ([1, 2, 2, 6], (2, 2), 9, 5, 4),
        ([2, 9, 7, 24], (3, 3), 16, 2, 1),
        ([1, 13, 12, 136], (3, 3), 200, 1, 1),
        ([2, 5, 5, 64], (1, 1), 72, 1, 0),
        ([2, 20, 21, 8], (3, 3), 8, 1, 1),
        ([1, 1, 1, 900], (1, 1), 5, 1, 0),
    ];
    for (shape, kernel, cout, stride, pad) in layers {
        let name = format!("convolution {shape:?} {kernel:?} {cout} {stride} {pad}");
        cases.add(&name, move |b| {
            let x = b.p(shape);
            b.conv(x, kernel, cout, stride, pad)
        });
    }
    cases.add("convolution with all addends", |b| {
        let (x, w, bias) = (b.p([2, 5, 4, 6]), b.p([3, 3, 6, 9]), b.p([9]));
        let (image, residual) = (b.p([2, 9]), b.p([2, 5, 4, 9]));
        let op = Conv2d { per_image_bias: true, residual: true, ..Conv2d::new(1, 1) };
        b.add(op, &[x, w, bias, image, residual])
    });
    cases.add("convolution with all addends and split k", |b| {
        let (x, w) = (b.p([2, 5, 4, 96]), b.p([3, 3, 96, 9]));
        let (image, residual) = (b.p([2, 9]), b.p([2, 5, 4, 9]));
        let op = Conv2d { bias: false, per_image_bias: true, residual: true, ..Conv2d::new(1, 1) };
        b.add(op, &[x, w, image, residual])
    });
    cases.add("asymmetric padding", |b| {
        let (x, w, bias) = (b.p([2, 6, 6, 4]), b.p([3, 3, 4, 8]), b.p([8]));
        let pad = Padding { before: (0, 0), after: (1, 1) };
        b.add(Conv2d { stride: (2, 2), pad, bias: true, ..Conv2d::default() }, &[x, w, bias])
    });
    cases.add("linear layers", |b| {
        let (x, w, bias) = (b.p([37, 19]), b.p([1, 1, 19, 70]), b.p([70]));
        let y = b.add(Conv2d::linear(), &[x, w, bias]);
        let (w, bias) = (b.p([1, 1, 70, 4]), b.p([4]));
        b.add(Conv2d::linear(), &[y, w, bias])
    });
    type Transpose = ([usize; 4], usize, (usize, usize), usize, usize, (usize, usize), bool);
    let transposes: [Transpose; 5] = [
        ([2, 3, 4, 5], 6, (4, 4), 2, 1, (6, 8), true),
        ([1, 4, 4, 16], 12, (2, 2), 2, 0, (8, 8), true),
        ([2, 3, 3, 8], 3, (3, 3), 2, 1, (6, 6), false),
        ([1, 2, 3, 130], 70, (3, 3), 3, 0, (6, 9), true),
        ([1, 4, 4, 4], 4, (2, 2), 3, 0, (11, 11), true),
    ];
    for (shape, channels, kernel, stride, pad, size, bias) in transposes {
        cases.add(&format!("transposed convolution {shape:?} {kernel:?} {stride} {pad}"), move |b| {
            let (x, w) = (b.p(shape), b.p([kernel.0, kernel.1, channels, shape[3]]));
            let mut operands = vec![x, w];
            if bias {
                operands.push(b.p([channels]));
            }
            let op = Conv2dTranspose {
                stride: (stride, stride),
                pad: Padding::even(pad),
                size,
                like: None,
                gradient: false,
                bias,
            };
            b.add(op, &operands)
        });
    }
    cases.all
}

/// Attention: head widths up to and below each kernel's maximum, more and fewer tokens than a tile, with dropout.
pub fn attentions(form: Form) -> Vec<Case> {
    let mut cases = Cases::new(form);
    let attentions = [
        ([2, 3, 5, 12], 1),
        ([1, 5, 5, 24], 2),
        ([2, 8, 9, 48], 4),
        ([1, 1, 1, 9], 3),
        ([1, 12, 12, 96], 2),
        ([2, 9, 8, 48], 2),
        ([1, 13, 11, 240], 2),
        ([1, 10, 7, 192], 1),
        ([2, 9, 8, 864], 2),
        ([1, 6, 7, 192], 2),
        ([1, 5, 5, 99], 1),
        ([1, 5, 4, 384], 1),
        ([1, 3, 3, 771], 1),
        ([1, 3, 3, 1536], 1),
    ];
    for (shape, heads) in attentions {
        for dropout in [None, Some(Dropout { p: 0.4, site: 3 })] {
            cases.add(&format!("attention {shape:?} {heads} {dropout:?}"), move |b| {
                let x = b.p(shape);
                b.add(Attention { heads, dropout }, &[x])
            });
        }
    }
    cases.all
}

/// Elementwise operations, broadcasts over pixels, dropout, layer norm, slices and concatenations.
fn pointwise(cases: &mut Cases) {
    for shape in [&[2, 3, 5, 7][..], &[1], &[3, 17], &[2, 20, 24, 16]] {
        for act in Activation::ALL {
            cases.add(act.name(), move |b| {
                let x = b.p(Shape::new(shape));
                b.add(Activate(act), &[x])
            });
        }
        cases.add("sums and products", move |b| {
            let (x, y) = (b.p(Shape::new(shape)), b.p(Shape::new(shape)));
            let z = b.add(Add, &[x, y]);
            let z = b.add(Multiply, &[z, y]);
            let z = b.add(Affine { scale: -0.7, shift: 0.3 }, &[z]);
            let z = b.add(Activate(Activation::Silu), &[z]);
            b.add(Add, &[z, z])
        });
    }
    for shape in [[3, 2, 5, 7], [2, 16, 17, 8], [1, 1, 1, 1], [2, 30, 30, 33]] {
        cases.add("by image", move |b| {
            let (x, r, s) = (b.p(shape), b.p([shape[0], shape[3]]), b.p([shape[0], shape[3]]));
            let y = b.add(AddPerChannel, &[x, r]);
            b.add(Modulate, &[y, s])
        });
        cases.add("dropout", move |b| {
            let x = b.p(shape);
            let y = b.add(Dropout { p: 0.3, site: 7 }, &[x]);
            b.add(Dropout { p: 0.5, site: 2 }, &[y])
        });
        cases.add("layer norm", move |b| {
            let (x, gamma, beta) = (b.p(shape), b.p([shape[3]]), b.p([shape[3]]));
            b.add(LayerNorm { eps: 1e-2 }, &[x, gamma, beta])
        });
    }
    cases.add("slices and concatenations", |b| {
        let (x, y) = (b.p([2, 3, 4, 8]), b.p([2, 3, 4, 12]));
        let z = b.add(Concat, &[x, y]);
        let first = b.add(Slice { from: 4, len: 8 }, &[z]);
        let y = b.p([2, 3, 4, 5]);
        let z = b.add(Concat, &[first, y]);
        b.add(Slice { from: 3, len: 7 }, &[z])
    });
}

/// Group norm and batch norm.
fn norms(cases: &mut Cases) {
    for (shape, groups) in [
        ([2, 3, 5, 8], 2),
        ([2, 7, 3, 9], 3),
        ([1, 1, 1, 12], 3),
        ([2, 20, 20, 32], 8),
        ([1, 4, 4, 70], 1),
        ([3, 2, 2, 6], 6),
        ([1, 41, 40, 24], 1),
        ([2, 9, 11, 64], 16),
        ([1, 6, 5, 32], 16),
        ([1, 3, 4, 256], 2),
    ] {
        for silu in [false, true] {
            cases.add(&format!("group norm {shape:?} {groups} {silu}"), move |b| {
                let x = b.p(shape);
                b.norm(x, groups, silu)
            });
        }
    }
    for shape in [[2, 3, 5, 7], [3, 16, 17, 33], [5, 1, 1, 4]] {
        cases.add("batch norm", move |b| {
            let c = shape[3];
            let (x, gamma, beta) = (b.p(shape), b.p([c]), b.p([c]));
            let state = b.graph.state("running", [c]);
            let outputs = b.all(BatchNorm { eps: 1e-5 }, &[x, gamma, beta]);
            b.add(RunningAverage { momentum: 0.1 }, &[state, outputs[1]]);
            b.add(Activate(Activation::Silu), &[outputs[0]])
        });
        cases.add("batch norm with given statistics", move |b| {
            let c = shape[3];
            let operands = [b.input(shape), b.input([c]), b.input([c]), b.input([c]), b.index_input(c)];
            b.add(BatchNormInference { eps: 1e-2 }, &operands)
        });
    }
}

/// Random numbers, embeddings and the forward process.
fn random_and_embeddings(cases: &mut Cases) {
    cases.add("random samples", |b| {
        let t = b.add(RandomTimestep { n: 3, steps: 20 }, &[]);
        let eps = b.add(RandomNormal { shape: [3, 4, 5, 3].into(), purpose: Purpose::Noise }, &[]);
        let x = b.input([3, 4, 5, 3]);
        let table = |f: fn(f32) -> f32| (0..20).map(|t| f(t as f32 / 20.0)).collect::<Arc<[f32]>>();
        let op = QSample { sqrt_alpha_bar: table(|t| 1.0 - t), sqrt_one_minus_alpha_bar: table(|t| t) };
        b.add(op, &[x, eps, t])
    });
    for cosines_first in [false, true] {
        cases.add("embedding", move |b| {
            let t = b.index_input(5);
            b.add(SinusoidalEmbedding { dim: 10, shift: 1.0, cosines_first }, &[t])
        });
    }
    cases.add("lookup", |b| {
        let (table, label) = (b.p([4, 7]), b.index_input(9));
        b.add(Embedding, &[table, label])
    });
}

/// Resizing and sums.
fn resizing_and_sums(cases: &mut Cases) {
    type MakeTaps = fn(usize) -> Taps;
    for taps in [Taps::nearest_double as MakeTaps, Taps::linear_double, Taps::mean_half] {
        cases.add("resample", move |b| {
            let x = b.p([2, 6, 5, 3]);
            b.add(Resample::both(taps, 6, 5), &[x])
        });
    }
    for shape in [[2, 6, 4, 3], [1, 5, 7, 2], [1, 2, 2, 1]] {
        cases.add("max pool", move |b| {
            let x = b.p(shape);
            b.add(MaxPool, &[x])
        });
    }
    cases.add("sums", |b| {
        // Gradients of biases and of per-image addends: many rows, many pixels.
        let (x, w, r) = (b.input([2, 30, 31, 5]), b.p([1, 1, 5, 35]), b.p([2, 35]));
        let y = b.add(Conv2d { bias: false, ..Conv2d::new(1, 0) }, &[x, w]);
        let y = b.add(AddPerChannel, &[y, r]);
        let y = b.add(ReduceSpatial, &[y.to_owned()].map(|_| x));
        let z = b.p([2, 5]);
        b.add(Add, &[z, y])
    });
    cases.add("bias gradient of a transposed convolution", |b| {
        let (x, w, bias) = (b.input([2, 15, 15, 3]), b.p([2, 2, 4, 3]), b.p([4]));
        let op = Conv2dTranspose {
            stride: (2, 2),
            pad: Padding::even(0),
            size: (30, 30),
            like: None,
            gradient: false,
            bias: true,
        };
        b.add(op, &[x, w, bias])
    });
}

/// Losses.
fn losses(cases: &mut Cases) {
    for loss in [Loss::Mse, Loss::L1, Loss::Huber { delta: 0.8 }] {
        cases.add(&format!("{loss:?}"), move |b| {
            let (x, y) = (b.p([5, 30, 30, 3]), b.p([5, 30, 30, 3]));
            b.add(loss, &[x, y])
        });
        cases.add(&format!("weighted {loss:?}"), move |b| {
            let (x, y, t) = (b.p([5, 30, 30, 3]), b.input([5, 30, 30, 3]), b.index_input(5));
            b.add(WeightedLoss { loss, weight: weights() }, &[x, y, t])
        });
    }
    cases.add("variational bound", |b| {
        // Steps with and without the decoder term, and values beyond the extreme levels.
        let step = |t: usize| BoundStep {
            to_x_0: (1.0 + 0.1 * t as f64, -0.2 - 0.1 * t as f64),
            posterior_x_0: 0.9 / (1.0 + t as f64),
            log_variance: (-4.0 + 0.1 * t as f64, -2.0 + 0.1 * t as f64),
            decoder: t.is_multiple_of(3),
        };
        let (output, v) = (b.p([5, 30, 30, 3]), b.p([5, 30, 30, 3]));
        let (x_0, x_t, t) = (b.input([5, 30, 30, 3]), b.input([5, 30, 30, 3]), b.index_input(5));
        let bound = VariationalBound { steps: (0..4).map(step).collect(), scale: 0.7 };
        b.add(bound, &[output, v, x_0, x_t, t])
    });
}

/// Every operation.
pub fn cases(form: Form) -> Vec<Case> {
    let mut cases = Cases::new(form);
    cases.all.extend(convolutions(form));
    pointwise(&mut cases);
    norms(&mut cases);
    cases.all.extend(attentions(form));
    random_and_embeddings(&mut cases);
    resizing_and_sums(&mut cases);
    losses(&mut cases);
    cases.all
}
