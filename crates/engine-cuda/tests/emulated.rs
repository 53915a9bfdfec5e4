//! The kernels and their calls on an emulated GPU (`emulator`): the case table with PyTorch's numbers, every operation
//! against the CPU's executor, training steps. Skipped, with a line, where there is no C++ compiler.

#[path = "../../engine/tests/cases/mod.rs"]
mod cases;
mod emulator;
mod libraries;
mod networks;
mod sampling;
mod table;
mod training;

use cases::{Golden, run_case};
use ddpm_engine::{ComputeOptions, Device, Executor, Footprint, Graph, MatmulDtype, PlanOptions, Result};
use ddpm_engine_cuda::gpu::{Gpu, Launch, Step};
use ddpm_engine_cuda::translate::Choices;
use ddpm_engine_cuda::{GpuExecutor, executor};
use emulator::{Emulator, Order};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use table::{Form, agree};

/// Few blocks fill the emulated GPU, so that small products are not cut into parts of k.
fn few() -> Choices {
    Choices { blocks: 1, least_bf16: 1, scores: 1, ..Choices::default() }
}

fn make(choices: Choices) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    in_order(choices, Order::Forwards)
}

fn in_order(choices: Choices, order: Order) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| {
        let gpu = Emulator::with(order).expect("the caller has looked");
        Box::new(GpuExecutor::new(gpu, graph, options, choices).expect("an executor"))
    }
}

#[test]
fn the_case_table_agrees_with_pytorch() {
    if Emulator::new().is_none() {
        return;
    }
    let golden = Golden::open();
    for case in golden.cases() {
        run_case(&golden, &case, "emulated GPU", 1e-5, &make(Choices::default()));
    }
}

#[test]
fn every_operation_agrees_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    for case in table::cases(Form::Plain) {
        // Where a barrier is missing, one of the orders reads what is not written yet.
        for (choices, order) in [(Choices::default(), Order::Forwards), (few(), Order::Backwards)] {
            agree(&case, ComputeOptions::default(), 1e-5, &in_order(choices, order));
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
    for case in table::convolutions(Form::Plain) {
        for blocks in [Choices::default().blocks, 1] {
            // 10 and 7 bits behind the point.
            agree(
                &case,
                ComputeOptions::default(),
                2e-3,
                &make(Choices { tf32: true, blocks, ..Choices::default() }),
            );
            agree(&case, bf16, 1.5e-2, &make(Choices { blocks, ..Choices::default() }));
        }
    }
    // Softmax makes an error of the scores a relative one of the weights.
    for case in table::attentions(Form::Plain) {
        agree(&case, bf16, 3e-2, &in_order(Choices::default(), Order::Backwards));
    }
}

#[test]
fn tensors_in_bf16_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
    let mut seen = Vec::new();
    for case in table::cases(Form::Stored) {
        let all = Choices { least_bf16: 1, ..Choices::default() };
        for (choices, order) in [(all, Order::Forwards), (few(), Order::Backwards)] {
            seen.extend(agree(&case, bf16, table::STORED, &in_order(choices, order)));
        }
    }
    table::all_were_stored(seen);
}

#[test]
fn training_steps_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    training::by_the_host(&make(Choices::default()));
    training::in_runs(&in_order(Choices::default(), Order::Backwards));
    training::held(&make(Choices::default()));
    training::clipped(&make(Choices::default()));
    training::states_are_kept(&make(Choices::default()));
}

#[test]
fn networks_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    networks::agree(2e-4, &make(Choices::default()));
}

/// The emulated GPU as a device, which counts what the host waits for: reads, and writes, which may wait on a real one.
struct Counting {
    order: Order,
    waits: Arc<AtomicUsize>,
}

impl Counting {
    fn new(order: Order) -> Self {
        Self { order, waits: Arc::default() }
    }
}

impl Device for Counting {
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>> {
        let gpu = Emulator::with(self.order).expect("the caller has looked");
        let gpu = Counted { gpu, waits: self.waits.clone() };
        Ok(Box::new(GpuExecutor::new(gpu, graph, options, few())?))
    }

    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint> {
        executor::footprint(graph, options, few())
    }
}

struct Counted {
    gpu: Emulator,
    waits: Arc<AtomicUsize>,
}

impl Counted {
    fn count(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }
}

impl Gpu for Counted {
    fn describe(&self) -> String {
        self.gpu.describe()
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.gpu.reserve(bytes)
    }

    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()> {
        self.gpu.prepare(kernels)
    }

    fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        self.count();
        self.gpu.write(at, data)
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        self.count();
        self.gpu.read(at, out)
    }

    fn launch(&self, launch: &Launch<usize>) -> Result<()> {
        self.gpu.launch(launch)
    }

    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>> {
        self.gpu.record(steps)
    }

    fn replay(&self, graph: usize) -> Result<()> {
        self.gpu.replay(graph)
    }

    fn finish(&self) -> Result<()> {
        self.count();
        self.gpu.finish()
    }

    fn pace(&self) -> Result<()> {
        self.gpu.pace()
    }
}

#[test]
fn samplers_in_the_gpus_memory_draw_what_they_draw_on_the_host() {
    if Emulator::new().is_none() {
        return;
    }
    sampling::every_sampler(&Counting::new(Order::Forwards));
    sampling::from_no_signal(&Counting::new(Order::Forwards));
    sampling::classes_and_variance(&Counting::new(Order::Backwards));
    sampling::editing(&Counting::new(Order::Forwards));
}

#[test]
fn vectors_in_the_gpus_memory_have_the_hosts_arithmetic() {
    if Emulator::new().is_none() {
        return;
    }
    for order in [Order::Forwards, Order::Backwards] {
        sampling::thresholds(&Counting::new(order));
    }
    sampling::arithmetic(&Counting::new(Order::Forwards));
}

#[test]
fn steps_at_which_nobody_looks_wait_for_nothing() {
    if Emulator::new().is_none() {
        return;
    }
    let device = Counting::new(Order::Forwards);
    let mut waits = Vec::new();
    let images = sampling::unseen(&device, &mut || waits.push(device.waits.load(Ordering::Relaxed)));
    assert!(images.iter().all(|x| x.is_finite()));
    assert!(waits.len() > 2 && waits.iter().all(|w| w == &waits[0]), "{waits:?}");
    assert_eq!(device.waits.load(Ordering::Relaxed), waits[0] + 1, "the end is read, and no more");
}
