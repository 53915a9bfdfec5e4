//! The GPU behind NVIDIA's driver API.

use crate::compile;
use crate::executor::{self, GpuExecutor};
use crate::ffi;
use crate::ffi::libraries::{CublasLt, Cudnn};
use crate::gpu::{Gpu, Step};
use crate::installed;
use crate::launch::Launch;
use crate::library::{Algorithm, Call, Libraries, Library, LibraryOp};
use crate::lower::CudaOptions;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice,
};
use cudarc::nvrtc::Ptx;
use ddpm_engine::{Device, Error, Executor, Footprint, Graph, PlanOptions, Result};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The lowest compute capability that the kernels support (bf16 and tf32 tensor cores).
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// The oldest CUDA version a driver may support, as 1000 major + 10 minor: that of the oldest NVRTC whose cubins it must load.
const MIN_DRIVER: i32 = 12000;

/// An NVIDIA GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaDevice {
    /// Device index, in the driver's numbering.
    pub index: usize,
    /// How to compute.
    pub options: CudaOptions,
}

impl CudaDevice {
    /// The number of GPUs, or why none can be used.
    ///
    /// # Errors
    /// If the driver library is missing or too old, or the driver reports an error.
    pub fn count() -> Result<usize, String> {
        if !ffi::has_driver() {
            return Err(
                "cannot find the NVIDIA driver (libcuda.so): install it, or use --device cpu".to_owned()
            );
        }
        let count = CudaContext::device_count().map_err(|e| explain(e, STARTING))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Checks that this GPU exists, is recent enough and has the libraries it needs.
    ///
    /// # Errors
    /// What is missing or too old, and what to do.
    pub fn check(&self) -> Result<()> {
        let device = || format!("cuda:{}", self.index);
        self.usable().map_err(|reason| Error::Device { device: device(), reason })
    }

    /// Like [`check`](Self::check), but the reason does not name the device.
    pub(crate) fn usable(&self) -> Result<(), String> {
        match Self::count()? {
            0 => return Err("no NVIDIA GPU found: use --device cpu".to_owned()),
            n if self.index >= n => {
                return Err(format!(
                    "{n} NVIDIA GPU(s) found, numbered from 0: ddpm doctor lists them (or use --device cpu)"
                ));
            }
            _ => {}
        }
        let driver = ffi::driver_version().map_err(|e| explain(e, STARTING))?;
        let supports =
            format!("the NVIDIA driver supports CUDA up to {}.{}", driver / 1000, driver % 1000 / 10);
        if driver < MIN_DRIVER {
            let needed = MIN_DRIVER / 1000;
            return Err(format!(
                "{supports}, but {needed}.0 is required: install a newer driver, or use --device cpu"
            ));
        }
        let (major, minor) = ffi::capability(self.index).map_err(|e| explain(e, STARTING))?;
        if (major, minor) < MIN_CAPABILITY {
            return Err(format!(
                "the GPU has compute capability {major}.{minor}, but the kernels require {}.{} (Ampere) or later: use --device cpu",
                MIN_CAPABILITY.0, MIN_CAPABILITY.1
            ));
        }
        compile::available()?;
        match ffi::nvrtc_version() {
            Some((major, minor)) if major > driver / 1000 => Err(format!(
                "{supports}, but the NVRTC found is from CUDA {major}.{minor}, whose machine code the driver cannot load: install \
                 a newer driver or an older NVRTC (pip install nvidia-cuda-nvrtc-cu{})",
                driver / 1000
            )),
            _ => Ok(()),
        }
    }

    /// The options, without autotuning if no library is installed.
    fn effective_options(&self) -> CudaOptions {
        match self.options.libraries {
            Libraries::Timed if !installed::any() => {
                CudaOptions { libraries: Libraries::Never, ..self.options }
            }
            _ => self.options,
        }
    }
}

impl Device for CudaDevice {
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>> {
        self.check()?;
        Ok(Box::new(GpuExecutor::new(CudaGpu::new(self.index)?, graph, options, self.effective_options())?))
    }

    fn has_own_memory(&self) -> bool {
        true
    }

    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint> {
        executor::footprint(graph, options, self.effective_options())
    }
}

/// Hint for an unexpected error: before anything has run, and while running.
const STARTING: &str =
    "the NVIDIA driver cannot start (nvidia-smi and the kernel log may say why): use --device cpu";
const RUNNING: &str = "the GPU was lost or a kernel failed (see nvidia-smi and the kernel log); the last training \
                       checkpoint is intact: continue from it with --resume";

/// Human-readable explanation of a driver error and what to do about it.
fn explain(error: DriverError, otherwise: &str) -> String {
    let hint = match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => "no NVIDIA GPU found: use --device cpu",
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "the libcuda.so found is the CUDA toolkit's stub, not a driver: remove its folder from LD_LIBRARY_PATH"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver library and the kernel module have different versions: restart the machine"
        }
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the driver is waiting for another service (on NVSwitch machines, the Fabric Manager): start it"
        }
        CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | CUresult::CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER
        | CUresult::CUDA_ERROR_INVALID_IMAGE
        | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "the driver is too old for this GPU or this program: install a newer one (ddpm doctor shows it)"
        }
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "not enough free GPU memory: use a smaller batch (train.batch_size with train.accumulate), image size or \
             network"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => "another program has exclusive use of the GPU",
        _ => otherwise,
    };
    format!("{hint} ({error})")
}

/// Two page-locked buffers of equal length: one is filled while the copy from the other may still be in flight. Each event marks
/// the last copy from its buffer (cudarc's own events are off).
struct PinnedPair {
    buffers: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

/// Uploads below this size use plain copies, which the driver stages as part of the call.
const SMALL_UPLOAD: usize = 64 << 10;

/// How often the calls are repeated within a timed graph, and how often that graph is launched; the shortest time counts.
const TIMED_CALLS: u32 = 10;
const TIMED_STARTS: usize = 3;

/// One GPU with its streams and a single memory allocation.
struct CudaGpu {
    index: usize,
    /// Initialised on first use. First fields, so that they are dropped before the stream and its context.
    cudnn: Option<Result<Cudnn, String>>,
    cublaslt: Option<Result<CublasLt, String>>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Further streams used during graph capture.
    side_streams: Vec<Arc<CudaStream>>,
    functions: HashMap<&'static str, CudaFunction>,
    memory: Option<Mutex<CudaSlice<u8>>>,
    /// By length.
    pinned: Mutex<HashMap<usize, PinnedPair>>,
    base: u64,
    graphs: Vec<ffi::Graph>,
    /// Marks the work submitted before the last [`throttle`](Gpu::throttle).
    throttle_event: Mutex<Option<CudaEvent>>,
}

impl CudaGpu {
    fn new(index: usize) -> Result<Self> {
        let error = |e| Error::Device { device: format!("cuda:{index}"), reason: explain(e, STARTING) };
        let context = CudaContext::new(index).map_err(error)?;
        ffi::without_events(&context);
        let stream = context.new_stream().map_err(error)?;
        let (functions, graphs, pinned) = (HashMap::new(), Vec::new(), Mutex::default());
        let (cudnn, cublaslt, memory, base) = (None, None, None, 0);
        let (side_streams, throttle_event) = (Vec::new(), Mutex::default());
        Ok(Self {
            index,
            cudnn,
            cublaslt,
            context,
            stream,
            side_streams,
            functions,
            memory,
            pinned,
            base,
            graphs,
            throttle_event,
        })
    }

    /// Captures the calls made on the stream into a graph; `None` if there were none.
    fn capture(&self, calls: impl FnOnce() -> Result<()>) -> Result<Option<ffi::Graph>> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.finish()?;
        self.stream.begin_capture(mode).map_err(|e| self.error(e))?;
        let called = calls();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(|e| self.error(e));
        called?;
        Ok(graph?.map(ffi::Graph))
    }

    fn launch_on(&self, stream: &CudaStream, launch: &Launch<usize>) -> Result<()> {
        let function = self.function(launch.kernel)?;
        ffi::launch(stream, function, self.base, launch).map_err(|e| self.error(e))
    }

    fn call_library_on(
        &self,
        stream: &Arc<CudaStream>,
        op: &LibraryOp<usize>,
        algorithm: &Algorithm,
    ) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.error(e))?;
        let base = self.base;
        let missing = || Err("the library was not initialised".to_owned());
        let started = match op.library {
            Library::Cudnn => self
                .cudnn
                .as_ref()
                .map_or_else(missing, |cudnn| cudnn.as_ref()?.run(stream, base, op, algorithm)),
            Library::CublasLt => self
                .cublaslt
                .as_ref()
                .map_or_else(missing, |lt| lt.as_ref()?.run(stream, base, op, algorithm)),
        };
        started.map_err(|reason| Error::Device { device: format!("cuda:{}", self.index), reason })
    }

    /// Submits all steps, each on its slot's stream after the steps it waits for. The side streams fork from the captured main stream
    /// at the start and join it at the end.
    fn submit(&self, steps: &[Step<'_>]) -> Result<()> {
        let error = |e| self.error(e);
        let streams: Vec<&Arc<CudaStream>> = [&self.stream].into_iter().chain(&self.side_streams).collect();
        let mut has_waiters = vec![false; steps.len()];
        steps.iter().flat_map(|step| &step.slot.waits).for_each(|&i| has_waiters[i] = true);
        let mut events: Vec<Option<CudaEvent>> = Vec::with_capacity(steps.len());
        let fork = self.stream.record_event(None).map_err(error)?;
        let mut joined = vec![false; streams.len()];
        joined[0] = true;
        for (step, has_waiters) in steps.iter().zip(has_waiters) {
            let stream = streams[step.slot.stream];
            if !joined[step.slot.stream] {
                stream.wait(&fork).map_err(error)?;
                joined[step.slot.stream] = true;
            }
            for event in step.slot.waits.iter().filter_map(|&i| events[i].as_ref()) {
                stream.wait(event).map_err(error)?;
            }
            for call in step.calls {
                match call {
                    Call::Launch(launch) => self.launch_on(stream, launch)?,
                    Call::Library(both) => self.call_library_on(stream, &both.0, &both.1)?,
                }
            }
            events.push(if has_waiters { Some(stream.record_event(None).map_err(error)?) } else { None });
        }
        for (stream, _) in streams.iter().zip(joined).skip(1).filter(|(_, joined)| *joined) {
            self.stream.wait(&stream.record_event(None).map_err(error)?).map_err(error)?;
        }
        Ok(())
    }

    fn error(&self, e: DriverError) -> Error {
        Error::Device { device: format!("cuda:{}", self.index), reason: explain(e, RUNNING) }
    }

    fn memory(&self) -> Result<std::sync::MutexGuard<'_, CudaSlice<u8>>> {
        let memory = self.memory.as_ref().ok_or_else(|| Error::Device {
            device: format!("cuda:{}", self.index),
            reason: "no GPU memory was reserved".to_owned(),
        })?;
        Ok(memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn function(&self, kernel: &str) -> Result<&CudaFunction> {
        self.functions.get(kernel).ok_or_else(|| Error::Device {
            device: format!("cuda:{}", self.index),
            reason: format!("kernel {kernel} was not loaded"),
        })
    }
}

impl Drop for CudaGpu {
    fn drop(&mut self) {
        // Pinned buffers must outlive copies in flight. A stream-ordered free returns memory to the driver's pool only at the next
        // synchronisation, so the second one makes it available to the next plan. Errors cannot be handled here.
        let _ = self.stream.synchronize();
        self.memory = None;
        let _ = self.stream.synchronize();
    }
}

impl Gpu for CudaGpu {
    fn describe(&self) -> String {
        let name = self.context.name().unwrap_or_else(|_| "an NVIDIA GPU".to_owned());
        format!("{name} (cuda:{})", self.index)
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        let mib = |b: usize| b >> 20;
        let (free, total) = self.context.mem_get_info().map_err(|e| self.error(e))?;
        let out_of_memory = |free: usize| {
            Error::Resources(format!(
                "{} MiB of GPU memory needed, but only {} of cuda:{}'s {} MiB free: use a smaller batch \
                 (train.batch_size with train.accumulate), image size or network, or stop other programs on the GPU",
                mib(bytes),
                mib(free),
                self.index,
                mib(total)
            ))
        };
        if bytes > free {
            return Err(out_of_memory(free));
        }
        let memory = self.stream.alloc_zeros::<u8>(bytes).map_err(|e| match e.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => out_of_memory(free),
            _ => self.error(e),
        })?;
        self.base = memory.device_ptr(&self.stream).0;
        self.memory = Some(Mutex::new(memory));
        Ok(())
    }

    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()> {
        let capability = self.context.compute_capability().map_err(|e| self.error(e))?;
        let sources = compile::sources_of(kernels);
        // Each source takes seconds to compile: compile them in parallel.
        let compiled: Vec<Result<Arc<[u8]>, String>> = thread::scope(|scope| {
            let all: Vec<_> =
                sources.iter().map(|source| scope.spawn(|| compile::compile(source, capability))).collect();
            let panicked = |_| Err("the compiler thread panicked".to_owned());
            all.into_iter().map(|t| t.join().unwrap_or_else(panicked)).collect()
        });
        for (source, code) in sources.iter().zip(compiled) {
            let device = format!("cuda:{}", self.index);
            let code = code.map_err(|reason| Error::Device { device, reason })?;
            let module =
                self.context.load_module(Ptx::from_binary(code.to_vec())).map_err(|e| self.error(e))?;
            for kernel in source.kernels.iter().filter(|k| kernels.contains(k)) {
                let function = module.load_function(kernel).map_err(|e| self.error(e))?;
                self.functions.insert(kernel, function);
            }
        }
        Ok(())
    }

    fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        let mut memory = self.memory()?;
        let mut dst = memory.slice_mut(at..at + data.len());
        self.stream.memcpy_htod(data, &mut dst).map_err(|e| self.error(e))
    }

    fn upload(&self, at: usize, data: &[u8]) -> Result<()> {
        if data.len() < SMALL_UPLOAD {
            return self.write(at, data);
        }
        let mut all = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let PinnedPair { buffers, next } = match all.entry(data.len()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let buffer = || Ok((ffi::pinned(&self.context, data.len())?, self.context.new_event(None)?));
                let both = || -> Result<_, DriverError> { Ok([buffer()?, buffer()?]) };
                // The host may be out of page-locked memory, which only affects speed.
                let Ok(buffers) = both() else { return self.write(at, data) };
                entry.insert(PinnedPair { buffers, next: 0 })
            }
        };
        let (buffer, copied) = &mut buffers[*next];
        *next = 1 - *next;
        // Waits for the last copy from this buffer; returns at once for an event that was never recorded.
        copied.synchronize().map_err(|e| self.error(e))?;
        buffer.as_mut_slice().map_err(|e| self.error(e))?.copy_from_slice(data);
        let mut memory = self.memory()?;
        let mut dst = memory.slice_mut(at..at + data.len());
        self.stream.memcpy_htod(&*buffer, &mut dst).map_err(|e| self.error(e))?;
        copied.record(&self.stream).map_err(|e| self.error(e))
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        let memory = self.memory()?;
        let src = memory.slice(at..at + out.len());
        self.stream.memcpy_dtoh(&src, out).map_err(|e| self.error(e))?;
        self.stream.synchronize().map_err(|e| self.error(e))
    }

    fn launch(&self, launch: &Launch<usize>) -> Result<()> {
        self.launch_on(&self.stream, launch)
    }

    fn algorithms(&mut self, op: &LibraryOp<usize>) -> Vec<Algorithm> {
        if self.context.bind_to_thread().is_err() {
            return Vec::new();
        }
        // Fall back to our kernels if the library fails to start or does not support the operation.
        let found = match op.library {
            Library::Cudnn => {
                let cudnn = self.cudnn.get_or_insert_with(Cudnn::new);
                cudnn.as_ref().map_err(Clone::clone).and_then(|cudnn| cudnn.algorithms(op))
            }
            Library::CublasLt => {
                let cublaslt = self.cublaslt.get_or_insert_with(CublasLt::new);
                cublaslt.as_ref().map_err(Clone::clone).and_then(|lt| lt.algorithms(self.base, op))
            }
        };
        found.unwrap_or_default()
    }

    fn call_library(&self, op: &LibraryOp<usize>, algorithm: &Algorithm) -> Result<()> {
        self.call_library_on(&self.stream, op, algorithm)
    }

    fn time(&mut self, calls: &[Call<usize>]) -> Result<Duration> {
        let once = || calls.iter().try_for_each(|call| self.call(call));
        // The first call lets libraries load lazily, which is not allowed during capture.
        once()?;
        let graph = self.capture(|| (0..TIMED_CALLS).try_for_each(|_| once()))?;
        let mut best = Duration::MAX;
        for _ in 0..TIMED_STARTS {
            self.finish()?;
            let start = Instant::now();
            match &graph {
                Some(graph) => graph.0.launch().map_err(|e| self.error(e))?,
                None => (0..TIMED_CALLS).try_for_each(|_| once())?,
            }
            self.finish()?;
            best = best.min(start.elapsed());
        }
        Ok(best / TIMED_CALLS)
    }

    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>> {
        let streams = steps.iter().map(|step| step.slot.stream + 1).max().unwrap_or(1);
        while self.side_streams.len() + 1 < streams {
            self.side_streams.push(self.context.new_stream().map_err(|e| self.error(e))?);
        }
        let graph = self.capture(|| self.submit(steps))?;
        let Some(graph) = graph else { return Ok(None) };
        self.graphs.push(graph);
        Ok(Some(self.graphs.len() - 1))
    }

    fn replay(&self, graph: usize) -> Result<()> {
        self.graphs[graph].0.launch().map_err(|e| self.error(e))
    }

    fn finish(&self) -> Result<()> {
        self.stream.synchronize().map_err(|e| self.error(e))
    }

    fn throttle(&self) -> Result<()> {
        let mut throttle_event = self.throttle_event.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = &*throttle_event {
            before.synchronize().map_err(|e| self.error(e))?;
            return before.record(&self.stream).map_err(|e| self.error(e));
        }
        let event = self.context.new_event(None).map_err(|e| self.error(e))?;
        event.record(&self.stream).map_err(|e| self.error(e))?;
        *throttle_event = Some(event);
        Ok(())
    }
}
