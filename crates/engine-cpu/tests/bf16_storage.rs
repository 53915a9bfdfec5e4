//! Keeping tensors in bf16 for the backward pass: which tensors, the results, and the memory saved.
#![allow(missing_docs, reason = "tests")]

use ddpm_engine::graph::TensorKind;
use ddpm_engine::ops::{Activate, Activation, Add, Affine, Conv2d, GroupNorm, Loss, Op};
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::passes::bf16_storage::keep_in_bf16;
use ddpm_engine::passes::recompute::recompute;
use ddpm_engine::{ComputeOptions, DType, Executor, Graph, MatmulDtype, PlanOptions, Region, RngKey, Tensor};
use ddpm_engine_cpu::{CpuExecutor, Isa, accepts_bf16};
use ddpm_kernels::bf16;

/// A graph with its loss and gradients.
struct Training {
    graph: Graph,
    loss: Tensor,
    gradients: Vec<Tensor>,
}

impl Training {
    fn new(mut graph: Graph, y: Tensor) -> Self {
        let target = graph.input("target", graph.shape(y));
        let loss = graph.add("loss", Loss::Mse, &[y, target]).expect("the shapes fit");
        let gradients = backward(&mut graph, loss).expect("all operations have gradients");
        Self { graph, loss, gradients }
    }

    /// The same with tensors kept in bf16.
    fn in_bf16(&self) -> Self {
        let mut graph = self.graph.clone();
        keep_in_bf16(&mut graph, &[self.loss], accepts_bf16);
        Self { graph, gradients: self.gradients.clone(), ..*self }
    }

    fn executor(&self, matmul_dtype: MatmulDtype, threads: usize, isa: Isa) -> CpuExecutor {
        let options = PlanOptions {
            gradients: Some(self.gradients.clone()),
            outputs: vec![self.loss],
            compute: ComputeOptions { matmul_dtype, ..ComputeOptions::default() },
            ..PlanOptions::default()
        };
        CpuExecutor::with_isa(self.graph.clone(), &options, threads, isa).expect("a small plan")
    }

    /// The loss and all gradients; the first parameter goes through `first`.
    fn run(&self, exec: &mut CpuExecutor, first: impl Fn(f32) -> f32) -> Vec<f32> {
        let g = &self.graph;
        let ramp = |i: usize, len: usize| -> Vec<f32> {
            (0..len).map(|j| ((j * 31 + i * 17) % 997) as f32 / 498.0 - 1.0).collect()
        };
        for (i, &p) in g.parameters().iter().enumerate() {
            let mut values = ramp(i, g.shape(p).len());
            if i == 0 {
                values.iter_mut().for_each(|x| *x = first(*x));
            }
            exec.write_parameter(Region::Weights, i, &values).expect("its length");
        }
        for t in
            g.nodes().iter().flat_map(|n| n.inputs.clone()).filter(|&t| g.info(t).kind == TensorKind::Input)
        {
            exec.write(t, &ramp(7, g.shape(t).len())).expect("its length");
        }
        exec.run(RngKey::default()).expect("a run");
        let mut all = vec![0.0];
        exec.read(self.loss, &mut all).expect("an output");
        for (i, &p) in g.parameters().iter().enumerate() {
            let mut gradient = vec![0.0; g.shape(p).len()];
            exec.read_parameter(Region::Gradients, i, &mut gradient).expect("its length");
            all.extend(gradient);
        }
        all
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

fn rounded(x: f32) -> f32 {
    bf16::widen(bf16::round(x))
}

/// Names of the tensors that are kept in bf16.
fn cast_names(g: &Graph) -> Vec<&str> {
    g.nodes().iter().filter(|n| matches!(n.op, Op::Cast(_))).map(|n| n.name.as_str()).collect()
}

#[test]
fn operations_on_bf16_tensors_match_those_on_rounded_f32() {
    // Odd numbers of elements per image and in total, several tasks, a shorter last one.
    for shape in [[3, 37, 37, 3], [2, 64, 48, 16], [1, 1, 8191, 1]] {
        let mut ops: Vec<Op> = Activation::ALL.map(|a| Activate(a).into()).to_vec();
        for silu in [false, true] {
            ops.push(GroupNorm { groups: 1, eps: 1e-5, silu }.into());
        }
        for op in ops {
            let (name, mut g) = (op.operation().name(), Graph::new());
            let p = g.parameter("p", shape);
            let x = g.add("x", Affine { scale: 1.0, shift: 0.0 }, &[p]).expect("the shapes fit");
            let mut operands = vec![x];
            if matches!(op, Op::GroupNorm(_)) {
                operands.extend(["gamma", "beta"].map(|name| g.parameter(name, [shape[3]])));
            }
            let y = g.add("y", op, &operands).expect("the shapes fit");
            let plain = Training::new(g, y);
            let in_bf16 = plain.in_bf16();
            assert_eq!(cast_names(&in_bf16.graph), ["x"], "{name}");
            for isa in Isa::all() {
                let [mut a, mut b] = [&plain, &in_bf16].map(|t| t.executor(MatmulDtype::F32, 2, isa));
                let (want, got) = (plain.run(&mut a, rounded), in_bf16.run(&mut b, |x| x));
                assert!(want.iter().all(|v| v.is_finite()));
                assert_eq!(bits(&got), bits(&want), "{name} of {shape:?} on {isa}");
                assert_ne!(bits(&got), bits(&plain.run(&mut a, |x| x)), "{name}: nothing was rounded");
            }
        }
    }
}

/// Blocks as in real networks: tensors read by norms and activations, by convolutions, by both, and as a residual.
fn network() -> Training {
    let mut g = Graph::new();
    let conv = |g: &mut Graph, name: &str, x: Tensor| {
        let (w, b) = (g.parameter("w", [3, 3, 16, 16]), g.parameter("b", [16]));
        g.add(name, Conv2d::new(1, 1), &[x, w, b]).expect("the shapes fit")
    };
    let norm = |g: &mut Graph, x: Tensor| {
        let [gamma, beta] = ["gamma", "beta"].map(|name| g.parameter(name, [16]));
        g.add("norm", GroupNorm { groups: 4, eps: 1e-5, silu: true }, &[x, gamma, beta]).expect("fits")
    };
    let x = g.input("x", [2, 32, 32, 16]);
    let first = conv(&mut g, "first", x);
    let y = norm(&mut g, first);
    let second = conv(&mut g, "second", y);
    let y = g.add("gelu", Activate(Activation::Gelu), &[second]).expect("fits");
    let third = conv(&mut g, "third", y);
    let y = g.add("sum", Add, &[third, first]).expect("fits");
    // Read by a convolution and a norm.
    let z = norm(&mut g, y);
    let (a, b) = (conv(&mut g, "of_norm", z), conv(&mut g, "of_sum", y));
    let y = g.add("join", Add, &[a, b]).expect("fits");
    let Training { mut graph, loss, gradients } = Training::new(g, y);
    recompute(&mut graph);
    Training { graph, loss, gradients }
}

#[test]
fn only_tensors_read_by_norms_and_activations_are_kept_in_bf16() {
    let in_bf16 = network().in_bf16();
    // A weight gradient reads the sum, so it stays in f32.
    assert_eq!(cast_names(&in_bf16.graph), ["first", "second"]);
    let is_bf16 = |t: Tensor| in_bf16.graph.ty(t).dtype == DType::Bf16;
    let backward_start = in_bf16.graph.backward_start().expect("it has a backward pass");
    for (i, node) in in_bf16.graph.nodes().iter().enumerate() {
        for (operand, &t) in node.inputs.iter().enumerate() {
            let accepts = accepts_bf16(node, operand);
            assert!(accepts || !is_bf16(t), "{} does not accept bf16", node.name);
            let name = &in_bf16.graph.info(t).name;
            let reads_original =
                !is_bf16(t) && ["first", "second"].contains(&name.as_str()) && i >= backward_start;
            assert!(!reads_original, "{} reads {name} in f32", node.name);
        }
    }
    assert!(
        matches!(in_bf16.graph.nodes()[backward_start].op, Op::Fill(_)),
        "the backward pass begins with the loss's gradient"
    );
}

#[test]
fn bf16_plans_are_smaller_and_do_not_depend_on_the_number_of_threads() {
    let training = network();
    for isa in Isa::all() {
        let mut f32 = training.executor(MatmulDtype::F32, 2, isa);
        let mut bf16 = training.executor(MatmulDtype::Bf16, 2, isa);
        assert_eq!(cast_names(bf16.plan().graph()).len(), 2);
        assert!(cast_names(f32.plan().graph()).is_empty());
        let image = 2 * 32 * 32 * 16;
        assert!(bf16.plan().arena_len() + image / 2 <= f32.plan().arena_len());

        let (want, got) = (training.run(&mut f32, |x| x), training.run(&mut bf16, |x| x));
        let rms = (want.iter().map(|v| f64::from(v * v)).sum::<f64>() / want.len() as f64).sqrt();
        let difference = want.iter().zip(&got).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let difference = (difference / want.len() as f64).sqrt() / rms;
        assert!((1e-5..2e-2).contains(&difference), "{isa}: {difference}");
        for threads in [1, 3] {
            let again = training.run(&mut training.executor(MatmulDtype::Bf16, threads, isa), |x| x);
            assert_eq!(bits(&again), bits(&got), "{threads} threads on {isa}");
        }
    }
}

#[test]
fn reading_a_bf16_tensor_as_f32_is_an_error() {
    let in_bf16 = network().in_bf16();
    let cast = in_bf16.graph.nodes().iter().find(|n| matches!(n.op, Op::Cast(_))).expect("there are two");
    let exec = in_bf16.executor(MatmulDtype::F32, 1, Isa::best());
    let error = exec.read(cast.outputs[0], &mut [0.0; 4]).expect_err("another format");
    assert!(error.to_string().contains("bf16"), "{error}");
}
