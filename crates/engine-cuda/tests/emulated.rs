//! Kernels and launches on an emulated GPU (`emulator`): the case table with PyTorch's results, every operation against the CPU
//! executor, training steps. Skipped, with a message, if there is no C++ compiler.

#[path = "../../engine-cpu/tests/cases/mod.rs"]
mod cases;
mod emulator;
mod libraries;
mod networks;
mod sampling;
mod table;
mod training;

use cases::{Golden, run_case};
use ddpm_engine::{ComputeOptions, Device, Executor, Footprint, Graph, MatmulDtype, PlanOptions, Result};
use ddpm_engine_cuda::gpu::{Gpu, Step};
use ddpm_engine_cuda::launch::Launch;
use ddpm_engine_cuda::lower::CudaOptions;
use ddpm_engine_cuda::{GpuExecutor, executor};
use emulator::{Emulator, Order};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use table::{Form, agree};

/// One block fills the emulated GPU, so that small products do not split k.
fn one_block() -> CudaOptions {
    CudaOptions { blocks: 1, min_bf16_elems: 1, max_scores: 1, ..CudaOptions::default() }
}

fn make(cuda_options: CudaOptions) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    in_order(cuda_options, Order::Forwards)
}

fn in_order(cuda_options: CudaOptions, order: Order) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| {
        let gpu = Emulator::with(order).expect("the caller has checked");
        Box::new(GpuExecutor::new(gpu, graph, options, cuda_options).expect("an executor"))
    }
}

#[test]
fn the_case_table_agrees_with_pytorch() {
    if Emulator::new().is_none() {
        return;
    }
    let golden = Golden::open();
    for case in golden.cases() {
        run_case(&golden, &case, "emulated GPU", 1e-5, &make(CudaOptions::default()));
    }
}

#[test]
fn every_operation_agrees_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    for case in table::cases(Form::Plain) {
        // A missing barrier makes one of the orders read what is not written yet.
        for (cuda_options, order) in
            [(CudaOptions::default(), Order::Forwards), (one_block(), Order::Backwards)]
        {
            agree(&case, ComputeOptions::default(), 1e-5, &in_order(cuda_options, order));
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
    for case in table::convolutions(Form::Plain) {
        for blocks in [CudaOptions::default().blocks, 1] {
            // Mantissas of 10 and 7 bits.
            agree(
                &case,
                ComputeOptions::default(),
                2e-3,
                &make(CudaOptions { tf32: true, blocks, ..CudaOptions::default() }),
            );
            agree(&case, bf16, 1.5e-2, &make(CudaOptions { blocks, ..CudaOptions::default() }));
        }
    }
    // Softmax turns an error of the scores into a relative error of the weights.
    for case in table::attentions(Form::Plain) {
        agree(&case, bf16, 3e-2, &in_order(CudaOptions::default(), Order::Backwards));
    }
}

#[test]
fn tensors_in_bf16_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
    let mut seen = Vec::new();
    for case in table::cases(Form::Stored) {
        let all = CudaOptions { min_bf16_elems: 1, ..CudaOptions::default() };
        for (cuda_options, order) in [(all, Order::Forwards), (one_block(), Order::Backwards)] {
            seen.extend(agree(&case, bf16, table::BF16_TOLERANCE, &in_order(cuda_options, order)));
        }
    }
    table::assert_all_stored(seen);
}

#[test]
fn training_steps_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    training::host_controlled(&make(CudaOptions::default()));
    training::fused_steps(&in_order(CudaOptions::default(), Order::Backwards));
    training::skipped_updates(&make(CudaOptions::default()));
    training::clipped(&make(CudaOptions::default()));
    training::states_are_restored(&make(CudaOptions::default()));
}

#[test]
fn networks_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    networks::agree(2e-4, &make(CudaOptions::default()));
}

/// The emulated GPU as a device that counts possible waits of the host: reads, and writes, which may wait on a real GPU.
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
        let gpu = Emulator::with(self.order).expect("the caller has checked");
        let gpu = Counted { gpu, waits: self.waits.clone() };
        Ok(Box::new(GpuExecutor::new(gpu, graph, options, one_block())?))
    }

    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint> {
        executor::footprint(graph, options, one_block())
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

    fn throttle(&self) -> Result<()> {
        self.gpu.throttle()
    }
}

#[test]
fn samplers_on_the_gpu_agree_with_the_host() {
    if Emulator::new().is_none() {
        return;
    }
    sampling::every_sampler(&Counting::new(Order::Forwards));
    sampling::from_zero_snr(&Counting::new(Order::Forwards));
    sampling::classes_and_variance(&Counting::new(Order::Backwards));
    sampling::editing(&Counting::new(Order::Forwards));
}

#[test]
fn buffers_on_the_gpu_have_the_hosts_arithmetic() {
    if Emulator::new().is_none() {
        return;
    }
    for order in [Order::Forwards, Order::Backwards] {
        sampling::thresholds(&Counting::new(order));
    }
    sampling::arithmetic(&Counting::new(Order::Forwards));
}

#[test]
fn unobserved_steps_do_not_wait() {
    if Emulator::new().is_none() {
        return;
    }
    let device = Counting::new(Order::Forwards);
    let mut waits = Vec::new();
    let images = sampling::unobserved(&device, &mut || waits.push(device.waits.load(Ordering::Relaxed)));
    assert!(images.iter().all(|x| x.is_finite()));
    assert!(waits.len() > 2 && waits.iter().all(|w| w == &waits[0]), "{waits:?}");
    assert_eq!(device.waits.load(Ordering::Relaxed), waits[0] + 1, "only the result is read");
}
