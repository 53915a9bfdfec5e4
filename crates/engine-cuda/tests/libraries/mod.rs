//! Library operations, which the emulated GPU performs with plain loops: their descriptions, weight layouts, surrounding kernels,
//! and autotuning.

use crate::cases::{Golden, run_case};
use crate::emulator::{Emulator, Order};
use crate::table::{self, Form, agree};
use crate::{networks, training};
use ddpm_engine::graph::Graph;
use ddpm_engine::ops::Conv2d;
use ddpm_engine::{ComputeOptions, Executor, MatmulDtype, PlanOptions, Result};
use ddpm_engine_cuda::GpuExecutor;
use ddpm_engine_cuda::gpu::{Gpu, Step};
use ddpm_engine_cuda::launch::Launch;
use ddpm_engine_cuda::library::{Algorithm, Call, ConvPass, Libraries, Library, LibraryOp, MathMode};
use ddpm_engine_cuda::lower::CudaOptions;
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const BF16: ComputeOptions = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, winograd: true };

/// A small workspace, which the emulated libraries overwrite in each operation.
fn forced(number: usize) -> CudaOptions {
    CudaOptions { libraries: Libraries::Forced(number), workspace: 512, ..CudaOptions::default() }
}

/// Operations seen: library, pass, math mode, whether with a bias, with a residual.
type Seen = HashSet<(Library, ConvPass, MathMode, bool, bool)>;

fn make<'a>(
    cuda_options: CudaOptions,
    seen: &'a RefCell<Seen>,
) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> + 'a {
    move |graph, options| {
        let mut gpu = Emulator::with(Order::Forwards).expect("the caller has checked");
        gpu.libraries = true;
        let made = GpuExecutor::new(gpu, graph, options, cuda_options).expect("an executor");
        let of = |(p, _): &(LibraryOp<usize>, _)| {
            (p.library, p.pass, p.math, p.bias.is_some(), p.residual.is_some())
        };
        seen.borrow_mut().extend(made.library_ops().map(of));
        Box::new(made)
    }
}

#[test]
fn libraries_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let seen = RefCell::default();
    for case in table::convolutions(Form::Plain) {
        agree(&case, ComputeOptions::default(), 1e-5, &make(forced(0), &seen));
    }
    // A convolution with a bias has two candidates.
    for candidate in [0, 1] {
        for case in table::convolutions(Form::Stored) {
            let cuda_options = CudaOptions { min_bf16_elems: 1, ..forced(candidate) };
            agree(&case, BF16, table::BF16_TOLERANCE, &make(cuda_options, &seen));
        }
    }
    let seen = seen.into_inner();
    for math in [MathMode::F32, MathMode::Bf16] {
        for pass in [ConvPass::Forward, ConvPass::DataGrad, ConvPass::WeightGrad] {
            // Every linear layer in the table has a bias.
            let bias = pass == ConvPass::Forward;
            assert!(seen.contains(&(Library::CublasLt, pass, math, bias, false)), "{pass:?} {math:?}");
            assert!(seen.contains(&(Library::Cudnn, pass, math, false, false)), "{pass:?} {math:?}");
        }
        for residual in [false, true] {
            assert!(seen.contains(&(Library::Cudnn, ConvPass::Forward, math, true, residual)), "{math:?}");
        }
    }
}

#[test]
fn libraries_agree_with_pytorch() {
    if Emulator::new().is_none() {
        return;
    }
    let (golden, seen) = (Golden::open(), RefCell::default());
    let ops = ["conv2d", "conv_transpose2d", "linear"];
    for case in golden.cases() {
        if ops.contains(&case["op"].as_str().expect("op")) {
            run_case(&golden, &case, "emulated GPU", 1e-5, &make(forced(0), &seen));
        }
    }
    assert!(seen.into_inner().len() > 4);
}

/// Weights are repacked when they change, both in training runs that update them and before other runs.
#[test]
fn networks_with_libraries_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let seen = RefCell::default();
    training::host_controlled(&make(forced(1), &seen));
    training::fused_steps(&make(forced(0), &seen));
    networks::agree(2e-4, &make(forced(1), &seen));
    let seen = seen.into_inner();
    assert!(seen.contains(&(Library::CublasLt, ConvPass::Forward, MathMode::F32, true, true)));
    assert!(seen.contains(&(Library::Cudnn, ConvPass::Forward, MathMode::Bf16, false, false)));
}

/// A GPU with libraries and a scripted clock.
struct Clocked {
    gpu: Emulator,
    name: &'static str,
    /// Time of a library operation in microseconds, `None` if it fails; our kernels take 100.
    op_time: Option<u64>,
    timed: Arc<AtomicUsize>,
}

impl Gpu for Clocked {
    fn describe(&self) -> String {
        self.name.to_owned()
    }
    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.gpu.reserve(bytes)
    }
    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()> {
        self.gpu.prepare(kernels)
    }
    fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        self.gpu.write(at, data)
    }
    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        self.gpu.read(at, out)
    }
    fn launch(&self, launch: &Launch<usize>) -> Result<()> {
        self.gpu.launch(launch)
    }
    fn algorithms(&mut self, op: &LibraryOp<usize>) -> Vec<Algorithm> {
        self.gpu.algorithms(op)
    }
    fn call_library(&self, op: &LibraryOp<usize>, algorithm: &Algorithm) -> Result<()> {
        self.gpu.call_library(op, algorithm)
    }
    fn time(&mut self, calls: &[Call<usize>]) -> Result<Duration> {
        self.timed.fetch_add(1, Ordering::Relaxed);
        calls.iter().try_for_each(|call| self.call(call))?;
        let by_library = calls.iter().any(|call| matches!(call, Call::Library(_)));
        match self.op_time {
            _ if !by_library => Ok(Duration::from_micros(100)),
            Some(time) => Ok(Duration::from_micros(time)),
            None => self.op_fails(),
        }
    }
    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>> {
        self.gpu.record(steps)
    }
    fn replay(&self, graph: usize) -> Result<()> {
        self.gpu.replay(graph)
    }
    fn finish(&self) -> Result<()> {
        self.gpu.finish()
    }
    fn throttle(&self) -> Result<()> {
        self.gpu.throttle()
    }
}

impl Clocked {
    fn op_fails(&self) -> Result<Duration> {
        let reason = "the library failed".to_owned();
        Err(ddpm_engine::Error::Device { device: self.describe(), reason })
    }
}

/// The faster candidate is chosen and timings are reused; candidates that fail or are about as fast as our kernels are not chosen.
#[test]
fn the_faster_candidate_is_chosen_once() {
    if Emulator::new().is_none() {
        return;
    }
    let mut graph = Graph::new();
    let mut x = graph.input("x", [2, 5, 5, 8]);
    for name in ["first", "second"] {
        let (w, b) =
            (graph.parameter(&format!("{name}.w"), [3, 3, 8, 8]), graph.parameter(&format!("{name}.b"), [8]));
        x = graph.add(name, Conv2d::new(1, 1), &[x, w, b]).expect("a convolution");
    }
    let options = PlanOptions { outputs: vec![x], ..PlanOptions::default() };
    let cuda_options = CudaOptions { libraries: Libraries::Timed, workspace: 512, ..CudaOptions::default() };
    for (name, op_time, chosen) in [
        ("fast libraries", Some(50), 2),
        ("slow libraries", Some(200), 0),
        ("equally fast libraries", Some(99), 0),
        ("libraries that fail", None, 0),
    ] {
        let timed = Arc::new(AtomicUsize::new(0));
        let make = |libraries| {
            let mut gpu = Emulator::new().expect("the caller has checked");
            gpu.libraries = libraries;
            let gpu = Clocked { gpu, name, op_time, timed: timed.clone() };
            GpuExecutor::new(gpu, graph.clone(), &options, cuda_options).expect("an executor")
        };
        // Our kernels and the library's two candidates, timed for the first of two equal layers.
        assert_eq!(make(true).library_ops().count(), chosen, "{name}");
        assert_eq!(timed.load(Ordering::Relaxed), 3, "{name}");
        assert_eq!(make(true).library_ops().count(), chosen, "{name}");
        assert_eq!(timed.load(Ordering::Relaxed), 3, "{name}");
    }
    // The workspace is allocated only if libraries may be used.
    let bytes = |cuda_options| {
        ddpm_engine_cuda::executor::footprint(graph.clone(), &options, cuda_options)
            .expect("a footprint")
            .arena_bytes
    };
    let large = CudaOptions { workspace: 512 + 4096, ..cuda_options };
    assert_eq!(bytes(large) - bytes(cuda_options), 4096 * cuda_options.streams);
    assert!(bytes(CudaOptions { libraries: Libraries::Never, ..large }) < bytes(cuda_options) - 511);
}
