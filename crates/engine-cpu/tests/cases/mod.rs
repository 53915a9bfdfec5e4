//! The case table: every operation, forward and backward, with PyTorch's results (`tools/golden/ops.py`), for any executor.

use ddpm_engine::ops::*;
use ddpm_engine::passes::autodiff::backward_from;
use ddpm_engine::{Executor, Graph, PlanOptions, Region, RngKey, Shape, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::HashMap;

/// Makes an executor for a case.
pub type Make<'a> = &'a dyn Fn(Graph, &PlanOptions) -> Box<dyn Executor>;

/// Factor on the tolerance for large softmax scores: a score s in f32 has an absolute error of about s * 6e-8, which exp turns into a
/// relative error. The cases whose inputs were multiplied by 8 have scores up to about 300.
const LARGE_SCORES: f32 = 10.0;

/// The golden file.
pub struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    /// Reads it.
    pub fn open() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine-cpu/tests/golden/ops.safetensors");
        Self { bytes: std::fs::read(path).expect("the golden file") }
    }

    fn tensor(&self, case: &str, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.bytes).expect("a golden file");
        let view = file.tensor(&format!("{case}/{name}")).ok()?;
        let data =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Some((view.shape().to_vec(), data))
    }

    /// Its cases.
    pub fn cases(&self) -> Vec<Value> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).expect("a golden file");
        let text = &header.metadata().as_ref().expect("metadata")["cases"];
        serde_json::from_str(text).expect("a list of cases")
    }
}

/// Converts a tensor from PyTorch's layout to ours: our dimension i is PyTorch's dimension `order[i]`.
fn permute(shape: &[usize], data: &[f32], order: &[usize]) -> (Vec<usize>, Vec<f32>) {
    let to: Vec<usize> = order.iter().map(|&o| shape[o]).collect();
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    let out = (0..data.len())
        .map(|mut i| {
            let mut from = 0;
            for (&o, &size) in order.iter().zip(&to).rev() {
                from += i % size * strides[o];
                i /= size;
            }
            data[from]
        })
        .collect();
    (to, out)
}

const IMAGE: &[usize] = &[0, 2, 3, 1];
const CONV: &[usize] = &[2, 3, 1, 0];

fn usizes(case: &Value, key: &str) -> (usize, usize) {
    let v = case[key].as_array().expect(key);
    (v[0].as_u64().expect(key) as usize, v[1].as_u64().expect(key) as usize)
}

/// A case under construction. Every golden input becomes a parameter, so that it gets a gradient.
struct Case<'a> {
    golden: &'a Golden,
    name: String,
    graph: Graph,
    inputs: Vec<(String, Tensor, Vec<f32>)>,
    /// What the caller writes and no gradient is compared of.
    constants: Vec<(Tensor, Vec<f32>)>,
    orders: HashMap<String, Vec<usize>>,
    /// Name of the result and of its gradient in the golden file, and the order of their dimensions.
    result: (&'static str, &'static str, &'static [usize]),
}

impl Case<'_> {
    fn load(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let (shape, data) = self.golden.tensor(&self.name, name)?;
        let order = match name.strip_prefix('d').filter(|n| self.orders.contains_key(*n)) {
            Some(plain) => &self.orders[plain],
            None => self.orders.get(name)?,
        };
        Some(permute(&shape, &data, order))
    }

    fn input(&mut self, name: &str, order: &[usize]) -> Tensor {
        self.orders.insert(name.to_owned(), order.to_vec());
        let (shape, data) = self.load(name).unwrap_or_else(|| panic!("{}/{name}", self.name));
        let shape = if order.len() == 2 && name == "weight" { [&[1, 1], &shape[..]].concat() } else { shape };
        let t = self.graph.parameter(name, Shape::new(&shape));
        self.inputs.push((name.to_owned(), t, data));
        t
    }

    fn constant(&mut self, name: &str, data: Vec<f32>) -> Tensor {
        let t = self.graph.input(name, [data.len()]);
        self.constants.push((t, data));
        t
    }

    fn add(&mut self, op: impl Into<Op>, operands: &[Tensor]) -> Tensor {
        self.graph.add(&self.name, op, operands).expect("the case's shapes fit")
    }
}

/// Convolutions, linear layers, norms and attention. `None` if the operation is none of them.
fn add_layer(c: &mut Case<'_>, op: &str, spec: &Value) -> Option<Tensor> {
    let has_bias = spec["bias"].as_bool() == Some(true);
    Some(match op {
        "conv2d" => {
            let (x, w) = (c.input("x", IMAGE), c.input("weight", CONV));
            let mut operands = vec![x, w];
            if has_bias {
                operands.push(c.input("bias", &[0]));
            }
            let (stride, pad) = (usizes(spec, "stride"), Padding::from(usizes(spec, "padding")));
            c.add(Conv2d { stride, pad, bias: has_bias, ..Conv2d::default() }, &operands)
        }
        "conv_transpose2d" => {
            let (x, w) = (c.input("x", IMAGE), c.input("weight", CONV));
            let mut operands = vec![x, w];
            if has_bias {
                operands.push(c.input("bias", &[0]));
            }
            let (y, _) = c.golden.tensor(&c.name, "y").expect("y");
            let (stride, pad) = (usizes(spec, "stride"), Padding::from(usizes(spec, "padding")));
            let op = Conv2dTranspose {
                stride,
                pad,
                size: (y[2], y[3]),
                like: None,
                gradient: false,
                bias: has_bias,
            };
            c.add(op, &operands)
        }
        "linear" => {
            c.result.2 = &[0, 1];
            let (x, w) = (c.input("x", &[0, 1]), c.input("weight", &[1, 0]));
            let mut operands = vec![x, w];
            if has_bias {
                operands.push(c.input("bias", &[0]));
            }
            c.add(Conv2d { bias: has_bias, ..Conv2d::linear() }, &operands)
        }
        "conv2d_pad_after" => {
            let operands = [c.input("x", IMAGE), c.input("weight", CONV), c.input("bias", &[0])];
            let pad = Padding { before: (0, 0), after: (1, 1) };
            c.add(Conv2d { stride: (2, 2), pad, bias: true, ..Conv2d::default() }, &operands)
        }
        "group_norm" | "group_norm_silu" => {
            let operands = [c.input("x", IMAGE), c.input("weight", &[0]), c.input("bias", &[0])];
            let groups = spec["groups"].as_u64().expect("groups") as usize;
            let eps = spec["eps"].as_f64().expect("eps") as f32;
            c.add(GroupNorm { groups, eps, silu: op == "group_norm_silu" }, &operands)
        }
        "batch_norm" | "layer_norm" => {
            let operands = [c.input("x", IMAGE), c.input("weight", &[0]), c.input("bias", &[0])];
            let eps = spec["eps"].as_f64().expect("eps") as f32;
            let op: Op = if op == "batch_norm" { BatchNorm { eps }.into() } else { LayerNorm { eps }.into() };
            c.add(op, &operands)
        }
        "mha" => {
            // [b, tokens, 3c] as an image of tokens x 1 pixels.
            c.result = ("o", "do", &[0, 1, 2]);
            c.orders.insert("qkv".to_owned(), vec![0, 1, 2]);
            let (s, data) = c.load("qkv").expect("qkv");
            let t = c.graph.parameter("qkv", [s[0], s[1], 1, s[2]]);
            c.inputs.push(("qkv".to_owned(), t, data));
            c.add(Attention { heads: spec["heads"].as_u64().expect("heads") as usize, dropout: None }, &[t])
        }
        _ => return None,
    })
}

/// Elementwise operations, resizing, concatenation and embeddings. `None` if the operation is none of them.
fn add_pointwise(c: &mut Case<'_>, op: &str, spec: &Value) -> Option<Tensor> {
    Some(match op {
        "max_pool" => {
            let x = c.input("x", IMAGE);
            c.add(MaxPool, &[x])
        }
        "avg_pool" | "nearest" | "bilinear" => {
            let x = c.input("x", IMAGE);
            let taps = match op {
                "avg_pool" => Taps::mean_half,
                "nearest" => Taps::nearest_double,
                _ => Taps::linear_double,
            };
            let [_, h, w, _] = c.graph.shape(x).nhwc().expect("images");
            c.add(Resample::both(taps, h, w), &[x])
        }
        "scale_channels" => {
            let operands = [c.input("x", IMAGE), c.input("b", &[0, 1])];
            c.add(Modulate, &operands)
        }
        "silu" | "relu" | "gelu" | "mish" => {
            let act = Activation::ALL.into_iter().find(|a| a.name() == op).expect("an activation");
            let rank = c.golden.tensor(&c.name, "x").expect("x").0.len();
            c.result.2 = &[0, 1, 2, 3][..rank];
            let x = c.input("x", c.result.2);
            c.add(Activate(act), &[x])
        }
        "concat" => {
            let operands = [c.input("a", IMAGE), c.input("b", IMAGE)];
            c.add(Concat, &operands)
        }
        "add" => {
            let operands = [c.input("a", IMAGE), c.input("b", IMAGE)];
            c.add(Add, &operands)
        }
        "add_channels" => {
            let operands = [c.input("x", IMAGE), c.input("b", &[0, 1])];
            c.add(AddPerChannel, &operands)
        }
        "sincos" => {
            c.result = ("y", "", &[0, 1]);
            let (_, t) = c.golden.tensor(&c.name, "t").expect("t");
            let t = c.constant("t", t);
            c.add(
                SinusoidalEmbedding {
                    dim: spec["dim"].as_u64().expect("dim") as usize,
                    shift: 0.0,
                    cosines_first: false,
                },
                &[t],
            )
        }
        _ => return None,
    })
}

/// Losses and the forward process. `None` if the operation is none of them.
fn add_loss(c: &mut Case<'_>, op: &str, spec: &Value) -> Option<Tensor> {
    Some(match op {
        "mse" | "l1" | "huber" => {
            c.result = ("loss", "", &[]);
            let operands = [c.input("x", IMAGE), c.input("target", IMAGE)];
            let loss = match op {
                "mse" => Loss::Mse,
                "l1" => Loss::L1,
                _ => Loss::Huber { delta: spec["delta"].as_f64().expect("delta") as f32 },
            };
            c.add(loss, &operands)
        }
        "variational_bound" => {
            c.result = ("loss", "", &[]);
            let operands = ["output", "v", "x_0", "x_t"].map(|name| c.input(name, IMAGE));
            let float = |key: &str| spec[key].as_f64().expect(key);
            let t: Vec<f32> =
                spec["t"].as_array().expect("t").iter().map(|v| v.as_f64().expect("t") as f32).collect();
            let t = c.constant("t", t);
            let (steps, first, last) = (float("steps") as usize, float("first"), float("last"));
            let beta = |i: usize| first + (last - first) * i as f64 / (steps - 1) as f64;
            let bar = |n: usize| (0..n).map(|i| 1.0 - beta(i)).product::<f64>();
            let tilde = |i: usize| beta(i) * (1.0 - bar(i)) / (1.0 - bar(i + 1));
            let step = |i: usize| BoundStep {
                to_x_0: (1.0 / bar(i + 1).sqrt(), -((1.0 - bar(i + 1)) / bar(i + 1)).sqrt()),
                posterior_x_0: bar(i).sqrt() * beta(i) / (1.0 - bar(i + 1)),
                log_variance: (tilde(i.max(1)).ln(), beta(i).ln()),
                decoder: i == 0,
            };
            let op = VariationalBound { steps: (0..steps).map(step).collect(), scale: float("scale") };
            c.add(op, &[operands[0], operands[1], operands[2], operands[3], t])
        }
        "q_sample" => {
            c.result = ("x_t", "", IMAGE);
            let operands = [c.input("x0", IMAGE), c.input("eps", IMAGE)];
            let t: Vec<f32> =
                spec["t"].as_array().expect("t").iter().map(|v| v.as_f64().expect("t") as f32).collect();
            let t = c.constant("t", t);
            let steps = spec["timesteps"].as_u64().expect("timesteps") as usize;
            let (first, last) =
                (spec["beta_start"].as_f64().expect("beta"), spec["beta_end"].as_f64().expect("beta"));
            let mut alpha_bar = 1.0;
            let table: Vec<f64> = (0..steps)
                .map(|i| {
                    alpha_bar *= 1.0 - (first + (last - first) * i as f64 / (steps - 1) as f64);
                    alpha_bar
                })
                .collect();
            let op = QSample {
                sqrt_alpha_bar: table.iter().map(|a| a.sqrt() as f32).collect(),
                sqrt_one_minus_alpha_bar: table.iter().map(|a| (1.0 - a).sqrt() as f32).collect(),
            };
            c.add(op, &[operands[0], operands[1], t])
        }
        _ => return None,
    })
}

/// Runs a case and returns its largest difference, relative to the largest value of the tensor, which must be within `tolerance` (ten
/// times that with large scores). `on` names the executor in errors.
pub fn run_case(golden: &Golden, spec: &Value, on: &str, tolerance: f32, make: Make<'_>) -> f32 {
    let (name, op) = (spec["name"].as_str().expect("name"), spec["op"].as_str().expect("op"));
    let (graph, inputs, constants, orders) = (Graph::new(), vec![], vec![], HashMap::new());
    let mut c =
        Case { golden, name: name.to_owned(), graph, inputs, constants, orders, result: ("y", "dy", IMAGE) };
    let y = add_layer(&mut c, op, spec)
        .or_else(|| add_pointwise(&mut c, op, spec))
        .or_else(|| add_loss(&mut c, op, spec))
        .unwrap_or_else(|| panic!("unknown operation {op}"));
    let result = c.result;

    // q_sample and the sinusoidal embedding have no gradient in the engine.
    let gradients = if op == "q_sample" || op == "sincos" {
        None
    } else if result.0 == "loss" {
        Some(ddpm_engine::passes::autodiff::backward(&mut c.graph, y).expect("gradients"))
    } else {
        c.orders.insert(result.1[1..].to_owned(), result.2.to_vec());
        let (_, data) = c.load(result.1).expect("the output's gradient");
        let dy = c.graph.input("dy", c.graph.shape(y));
        c.constants.push((dy, data));
        Some(backward_from(&mut c.graph, y, dy).expect("gradients"))
    };
    let options = PlanOptions { gradients: gradients.clone(), outputs: vec![y], ..PlanOptions::default() };
    let mut exec = make(c.graph.clone(), &options);
    for (i, (_, _, data)) in c.inputs.iter().enumerate() {
        exec.write_parameter(Region::Weights, i, data).expect("an input");
    }
    for (t, data) in &c.constants {
        exec.write(*t, data).expect("an input");
    }
    exec.run(RngKey::default()).expect("a run");

    let mut got = vec![0.0; c.graph.shape(y).len()];
    exec.read(y, &mut got).expect("the result");
    c.orders.insert(result.0.to_owned(), result.2.to_vec());
    let (_, want) = c.load(result.0).expect("the golden result");
    let tolerance = if name.ends_with("_times8") { LARGE_SCORES * tolerance } else { tolerance };
    let mut worst = compare(&format!("{on} {name}/{}", result.0), &got, &want, tolerance, 0.0);
    if gradients.is_some() {
        for (i, (input, t, _)) in c.inputs.iter().enumerate() {
            let (_, want) = c.load(&format!("d{input}")).expect("a golden gradient");
            let mut got = vec![0.0; c.graph.shape(*t).len()];
            exec.read_parameter(Region::Gradients, i, &mut got).expect("a gradient");
            worst = worst.max(compare(
                &format!("{on} {name}/d{input}"),
                &got,
                &want,
                tolerance,
                floor(&c, op, spec, input),
            ));
        }
    }
    worst
}

/// Lower bound of the scale of a group norm's input gradient: the size of its terms, `max rstd * max |dy| * max |gamma|`. In groups of
/// two elements the terms cancel almost entirely, and no f32 implementation is accurate relative to the remainder
/// (PyTorch's error is 6e-5 of the largest gradient in `group_norm_b1_c16_1x1_g8`).
fn floor(c: &Case<'_>, op: &str, spec: &Value, gradient_of: &str) -> f32 {
    if !op.starts_with("group_norm") || gradient_of != "x" {
        return 0.0;
    }
    let load = |name: &str| c.golden.tensor(&c.name, name).expect("a golden tensor");
    let largest = |name: &str| load(name).1.iter().fold(0f32, |m, v| m.max(v.abs()));
    let (shape, x) = load("x");
    let groups = shape[0] * spec["groups"].as_u64().expect("groups") as usize;
    let rstd = x.chunks(x.len() / groups).map(|g| {
        let mean = g.iter().sum::<f32>() / g.len() as f32;
        1.0 / (g.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / g.len() as f32 + 1e-5).sqrt()
    });
    rstd.fold(0.0, f32::max) * largest("dy") * largest("weight")
}

fn compare(what: &str, got: &[f32], want: &[f32], tolerance: f32, floor: f32) -> f32 {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(floor.max(1e-30), |m, v| m.max(v.abs()));
    let worst = got
        .iter()
        .zip(want)
        .map(|(g, w)| (g - w).abs())
        .fold(0.0, |m: f32, d| if d > m || d.is_nan() { d } else { m });
    let error = worst / scale;
    assert!(error <= tolerance, "{what}: error of {error:.2e}, relative to the largest value {scale}");
    error
}
