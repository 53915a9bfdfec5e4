//! Products of libraries, which the emulated GPU makes number by number: their descriptions, orders of weights, what stands
//! around them, and which way is taken.

use crate::cases::{Golden, run_case};
use crate::emulator::{Emulator, Order};
use crate::table::{self, Form, agree};
use crate::{networks, training};
use ddpm_engine::graph::Graph;
use ddpm_engine::ops::Conv2d;
use ddpm_engine::{ComputeOptions, Executor, MatmulDtype, PlanOptions, Result};
use ddpm_engine_cuda::GpuExecutor;
use ddpm_engine_cuda::gpu::{Gpu, Launch, Step};
use ddpm_engine_cuda::library::{Algorithm, Call, Kind, Libraries, Library, Math, Product};
use ddpm_engine_cuda::translate::Choices;
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const BF16: ComputeOptions = ComputeOptions { factors: MatmulDtype::Bf16, winograd: true };

/// A small workspace, which the emulated libraries fill at each product.
fn forced(number: usize) -> Choices {
    Choices { libraries: Libraries::Forced(number), workspace: 512, ..Choices::default() }
}

/// What was made: library, kind, format, whether with a bias, with a residual.
type Seen = HashSet<(Library, Kind, Math, bool, bool)>;

fn make<'a>(
    choices: Choices,
    seen: &'a RefCell<Seen>,
) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> + 'a {
    move |graph, options| {
        let mut gpu = Emulator::with(Order::Forwards).expect("the caller has looked");
        gpu.libraries = true;
        let made = GpuExecutor::new(gpu, graph, options, choices).expect("an executor");
        let of = |(p, _): &(Product<usize>, _)| {
            (p.library, p.kind, p.math, p.bias.is_some(), p.residual.is_some())
        };
        seen.borrow_mut().extend(made.products().map(of));
        Box::new(made)
    }
}

#[test]
fn products_of_libraries_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let seen = RefCell::default();
    for case in table::convolutions(Form::Plain) {
        agree(&case, ComputeOptions::default(), 1e-5, &make(forced(0), &seen));
    }
    // A convolution with a bias can be made in two ways.
    for way in [0, 1] {
        for case in table::convolutions(Form::Stored) {
            let choices = Choices { least_bf16: 1, ..forced(way) };
            agree(&case, BF16, table::STORED, &make(choices, &seen));
        }
    }
    let seen = seen.into_inner();
    for math in [Math::F32, Math::Bf16] {
        for kind in [Kind::Forward, Kind::DataGrad, Kind::WeightGrad] {
            // Every linear layer of the table has a bias.
            let bias = kind == Kind::Forward;
            assert!(seen.contains(&(Library::CublasLt, kind, math, bias, false)), "{kind:?} {math:?}");
            assert!(seen.contains(&(Library::Cudnn, kind, math, false, false)), "{kind:?} {math:?}");
        }
        for residual in [false, true] {
            assert!(seen.contains(&(Library::Cudnn, Kind::Forward, math, true, residual)), "{math:?}");
        }
    }
}

#[test]
fn products_of_libraries_agree_with_pytorch() {
    if Emulator::new().is_none() {
        return;
    }
    let (golden, seen) = (Golden::open(), RefCell::default());
    let products = ["conv2d", "conv_transpose2d", "linear"];
    for case in golden.cases() {
        if products.contains(&case["op"].as_str().expect("op")) {
            run_case(&golden, &case, "emulated GPU", 1e-5, &make(forced(0), &seen));
        }
    }
    assert!(seen.into_inner().len() > 4);
}

/// What is kept of weights is made again when they change, in runs that update them and before others.
#[test]
fn networks_with_libraries_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let seen = RefCell::default();
    training::by_the_host(&make(forced(1), &seen));
    training::in_runs(&make(forced(0), &seen));
    networks::agree(2e-4, &make(forced(1), &seen));
    let seen = seen.into_inner();
    assert!(seen.contains(&(Library::CublasLt, Kind::Forward, Math::F32, true, true)));
    assert!(seen.contains(&(Library::Cudnn, Kind::Forward, Math::Bf16, false, false)));
}

/// A GPU with libraries and a clock of its own.
struct Clocked {
    gpu: Emulator,
    name: &'static str,
    /// How long a product of a library takes; our kernels take 100.
    product: Option<u64>,
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
    fn algorithms(&mut self, product: &Product<usize>) -> Vec<Algorithm> {
        self.gpu.algorithms(product)
    }
    fn product(&self, product: &Product<usize>, algorithm: &Algorithm) -> Result<()> {
        self.gpu.product(product, algorithm)
    }
    fn time(&mut self, calls: &[Call<usize>]) -> Result<Duration> {
        self.timed.fetch_add(1, Ordering::Relaxed);
        calls.iter().try_for_each(|call| self.call(call))?;
        let by_library = calls.iter().any(|call| matches!(call, Call::Product(_)));
        match self.product {
            _ if !by_library => Ok(Duration::from_micros(100)),
            Some(time) => Ok(Duration::from_micros(time)),
            None => self.product_fails(),
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
    fn pace(&self) -> Result<()> {
        self.gpu.pace()
    }
}

impl Clocked {
    fn product_fails(&self) -> Result<Duration> {
        let reason = "the library cannot".to_owned();
        Err(ddpm_engine::Error::Device { device: self.describe(), reason })
    }
}

/// The faster way is taken, and what was timed once is known; what fails is not taken, nor what is as fast.
#[test]
fn the_faster_way_is_taken_once_and_for_all() {
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
    let options = PlanOptions { keep: vec![x], ..PlanOptions::default() };
    let choices = Choices { libraries: Libraries::Timed, workspace: 512, ..Choices::default() };
    for (name, product, taken) in [
        ("fast libraries", Some(50), 2),
        ("slow libraries", Some(200), 0),
        ("libraries as fast", Some(99), 0),
        ("libraries that fail", None, 0),
    ] {
        let timed = Arc::new(AtomicUsize::new(0));
        let make = |libraries| {
            let mut gpu = Emulator::new().expect("the caller has looked");
            gpu.libraries = libraries;
            let gpu = Clocked { gpu, name, product, timed: timed.clone() };
            GpuExecutor::new(gpu, graph.clone(), &options, choices).expect("an executor")
        };
        // Our kernels, and a library's two ways, for the first of two equal layers.
        assert_eq!(make(true).products().count(), taken, "{name}");
        assert_eq!(timed.load(Ordering::Relaxed), 3, "{name}");
        assert_eq!(make(true).products().count(), taken, "{name}");
        assert_eq!(timed.load(Ordering::Relaxed), 3, "{name}");
    }
    // The workspace counts where libraries may be taken, and there alone.
    let bytes = |choices| {
        ddpm_engine_cuda::executor::footprint(graph.clone(), &options, choices)
            .expect("a footprint")
            .arena_bytes
    };
    let large = Choices { workspace: 512 + 4096, ..choices };
    assert_eq!(bytes(large) - bytes(choices), 4096 * choices.streams);
    assert!(bytes(Choices { libraries: Libraries::Never, ..large }) < bytes(choices) - 511);
}
