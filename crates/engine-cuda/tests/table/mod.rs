//! Graphs with every operation, for comparing an executor with the CPU's element by element.

mod cases;

pub use cases::{Build, Case, Form, attentions, cases, convolutions};
use ddpm_engine::graph::TensorKind;
use ddpm_engine::{ComputeOptions, DType, Executor, Graph, PlanOptions, Region, RngKey, Tensor};
use ddpm_engine_cpu::CpuExecutor;
use ddpm_kernels::bf16;
use ddpm_rng::{Purpose, Stream};

/// Makes an executor.
pub type Make<'a> = &'a dyn Fn(Graph, &PlanOptions) -> Box<dyn Executor>;

const KEY: RngKey = RngKey { seed: 0x1234_5678_9abc, step: 5, first_index: 3 };

fn normal(index: usize, len: usize) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Stream::new(11, Purpose::Test, 0, index as u32).fill_normal(&mut x);
    x
}

/// Inputs, states and parameters of a graph, generated. Weights are scaled so that activations keep their magnitude.
pub fn make_inputs(graph: &Graph) -> Vec<(Tensor, Vec<f32>)> {
    let computed: Vec<Tensor> = graph.nodes().iter().flat_map(|n| n.outputs.clone()).collect();
    let read = graph.nodes().iter().flat_map(|n| n.inputs.clone());
    let mut all: Vec<Tensor> =
        read.chain(graph.parameters().iter().copied()).filter(|t| !computed.contains(t)).collect();
    all.sort();
    all.dedup();
    let one = |(i, t): (usize, Tensor)| {
        let (info, shape) = (graph.info(t), graph.shape(t));
        let mut x = normal(i, shape.len());
        if info.name.starts_with('t') {
            x.iter_mut().for_each(|v| *v = (v.abs() * 3.0).floor());
        } else if shape.dims().len() == 4 && graph.nodes().iter().any(|n| n.inputs.get(1) == Some(&t)) {
            let fan_in: usize = shape.dims()[..3].iter().product();
            x.iter_mut().for_each(|v| *v /= (fan_in as f32).sqrt());
        }
        (t, x)
    };
    all.into_iter().enumerate().map(one).collect()
}

/// Those of a case: rounded to bf16 if it is stored in bf16.
fn inputs_for(case: &Case) -> Vec<(Tensor, Vec<f32>)> {
    let mut all = make_inputs(&case.graph);
    if case.form == Form::Stored {
        all.iter_mut().flat_map(|(_, x)| x).for_each(|v| *v = bf16::widen(bf16::round(*v)));
    }
    all
}

/// The plain CPU executor.
pub fn on_cpu(graph: &Graph, options: &PlanOptions) -> Box<dyn Executor> {
    let compute = ComputeOptions { winograd: false, ..ComputeOptions::default() };
    let options = PlanOptions { compute, ..options.clone() };
    Box::new(CpuExecutor::new(graph.clone(), &options, 1).expect("a small plan"))
}

/// Runs a case: the named results and gradients.
fn run(case: &Case, exec: &mut dyn Executor) -> Vec<(String, Vec<f32>)> {
    let graph = &case.graph;
    for &t in &case.outputs {
        // Elements that no kernel writes stay NaN.
        if graph.info(t).kind == TensorKind::Computed {
            exec.write(t, &vec![f32::NAN; graph.shape(t).len()]).expect("its length");
        }
    }
    for (t, x) in inputs_for(case) {
        exec.write(t, &x).expect("its length");
    }
    exec.run(KEY).unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let mut results = Vec::new();
    for node in graph.nodes() {
        for (i, &t) in node.outputs.iter().enumerate().filter(|(_, t)| case.outputs.contains(t)) {
            let mut x = vec![f32::NAN; graph.shape(t).len()];
            exec.read(t, &mut x).expect("its length");
            results.push((format!("{} ({}), result {i}", node.name, node.op.operation().name()), x));
        }
    }
    for (i, &p) in graph.parameters().iter().enumerate().filter(|_| case.gradients.is_some()) {
        let mut x = vec![f32::NAN; graph.shape(p).len()];
        exec.read_parameter(Region::Gradients, i, &mut x).expect("its length");
        results.push((format!("gradient of {}", graph.info(p).name), x));
    }
    // Inputs and weights must not be modified.
    for (t, x) in inputs_for(case) {
        if graph.info(t).kind != TensorKind::State {
            let mut after = vec![f32::NAN; x.len()];
            exec.read(t, &mut after).expect("its length");
            assert_eq!(after, x, "{}: {} was overwritten", case.name, graph.info(t).name);
        }
    }
    results
}

/// Tolerance against f32 if tensors are stored in bf16: each is rounded several times to 8 bits, and gradients of norms are
/// differences of such values.
pub const BF16_TOLERANCE: f32 = 3e-2;

/// Runs a case on both executors; each element may differ by `tolerance` of its tensor's largest (or of 1e-3, if all are smaller:
/// values that cancel have no relative precision). If tensors are stored in bf16, the RMS difference may be half of that.
///
/// Returns the operations with a tensor that was stored in bf16.
pub fn agree(case: &Case, compute: ComputeOptions, tolerance: f32, make: Make<'_>) -> Vec<&'static str> {
    let options = PlanOptions {
        gradients: case.gradients.clone(),
        outputs: case.outputs.clone(),
        compute,
        ..PlanOptions::default()
    };
    let want = run(
        case,
        &mut *on_cpu(&case.graph, &PlanOptions { compute: ComputeOptions::default(), ..options.clone() }),
    );
    let mut exec = make(case.graph.clone(), &options);
    let got = run(case, &mut *exec);
    for ((what, got), (_, want)) in got.iter().zip(&want) {
        let scale = want.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!(
                (g - w).abs() <= tolerance * scale,
                "{}: {what}: element {i} is {g}, not {w} (largest {scale})",
                case.name
            );
        }
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|v| v * v).sum::<f32>();
        let difference = squares(&mut got.iter().zip(want).map(|(g, w)| g - w));
        let (typical, size) = (difference.sqrt(), squares(&mut want.iter().copied()).sqrt());
        let bound = tolerance / 2.0 * size.max(1e-3);
        assert!(
            case.form == Form::Plain || got.len() < 16 || typical <= bound,
            "{}: {what} differs by {typical}, more than {bound} (its norm is {size})",
            case.name
        );
    }
    assert_eq!(got.len(), want.len());
    let planned = exec.plan().graph();
    let is_bf16 = |t: &Tensor| planned.ty(*t).dtype == DType::Bf16;
    let stored = planned.nodes().iter().filter(|n| n.inputs.iter().chain(&n.outputs).any(is_bf16));
    stored.map(|n| n.op.operation().name()).collect()
}

/// Asserts that every operation with bf16 kernels was tested with tensors stored in bf16.
pub fn assert_all_stored(mut seen: Vec<&'static str>) {
    seen.sort_unstable();
    seen.dedup();
    let want = [
        "add",
        "add_per_channel",
        "affine",
        "attention",
        "attention_grad",
        "batch_norm",
        "batch_norm_fixed",
        "batch_norm_grad",
        "concat",
        "conv2d",
        "conv2d_transpose",
        "conv2d_weight_grad",
        "dropout",
        "gelu",
        "gelu_grad",
        "group_norm",
        "group_norm_grad",
        "group_norm_silu",
        "group_norm_silu_grad",
        "layer_norm",
        "layer_norm_grad",
        "max_pool",
        "max_pool_grad",
        "mish",
        "mish_grad",
        "modulate",
        "multiply",
        "relu",
        "relu_grad",
        "resample",
        "silu",
        "silu_grad",
        "slice",
        "sum_pixels",
        "sum_rows",
    ];
    assert_eq!(seen, want);
}

/// The table covers every operation.
#[test]
fn no_operation_is_left_out() {
    let mut seen: Vec<&str> = cases(Form::Plain).iter().flat_map(Case::operations).collect();
    seen.sort_unstable();
    seen.dedup();
    for name in [
        "silu",
        "relu",
        "gelu",
        "mish",
        "silu_grad",
        "relu_grad",
        "gelu_grad",
        "mish_grad",
        "add",
        "add_per_channel",
        "affine",
        "attention",
        "attention_grad",
        "batch_norm",
        "batch_norm_fixed",
        "batch_norm_grad",
        "concat",
        "conv2d",
        "conv2d_transpose",
        "conv2d_weight_grad",
        "draw_normal",
        "draw_timestep",
        "dropout",
        "fill",
        "group_norm",
        "group_norm_grad",
        "group_norm_silu",
        "group_norm_silu_grad",
        "layer_norm",
        "layer_norm_grad",
        "mse",
        "l1",
        "huber",
        "loss_grad",
        "lookup",
        "lookup_grad",
        "max_pool",
        "max_pool_grad",
        "multiply",
        "q_sample",
        "resample",
        "running_average",
        "modulate",
        "sinusoidal_embedding",
        "slice",
        "sum_pixels",
        "sum_rows",
        "variational_bound",
        "variational_bound_grad",
        "weighted_loss",
        "weighted_loss_grad",
    ] {
        assert!(seen.contains(&name), "{name}");
    }
}
