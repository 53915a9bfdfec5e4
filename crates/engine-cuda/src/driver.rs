//! The GPU by NVIDIA's driver.

use crate::compile;
use crate::executor::{self, GpuExecutor};
use crate::ffi;
use crate::ffi::libraries::{CublasLt, Cudnn};
use crate::gpu::{Gpu, Launch, Step};
use crate::library::{self, Algorithm, Call, Libraries, Library, Product};
use crate::translate::Choices;
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

/// The oldest compute capability that the kernels are for (bf16 and tf32 on tensor cores).
const OLDEST: (i32, i32) = (8, 0);

/// The oldest CUDA that a driver must take, as 1000 major + 10 minor: NVRTC's, whose machine code it loads.
const OLDEST_DRIVER: i32 = 12000;

/// An NVIDIA GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaDevice {
    /// Its number, as the driver counts.
    pub index: usize,
    /// How to compute.
    pub choices: Choices,
}

impl CudaDevice {
    /// How many GPUs there are; or why none can be used.
    ///
    /// # Errors
    /// That the driver's library is missing, that the driver is too old, or what it says.
    pub fn count() -> Result<usize, String> {
        if !ffi::has_driver() {
            return Err(
                "the NVIDIA driver (libcuda.so) cannot be found: install it, or use --device cpu".to_owned()
            );
        }
        let count = CudaContext::device_count().map_err(|e| says(e, STARTING))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// This GPU, if it is there and new enough and its libraries are.
    ///
    /// # Errors
    /// What is missing or too old, and what to do.
    pub fn check(&self) -> Result<()> {
        let device = || format!("cuda:{}", self.index);
        self.usable().map_err(|reason| Error::Device { device: device(), reason })
    }

    /// As [`check`](Self::check), which says whose reason it is.
    pub(crate) fn usable(&self) -> Result<(), String> {
        match Self::count()? {
            0 => return Err("there is no NVIDIA GPU: use --device cpu".to_owned()),
            n if self.index >= n => {
                return Err(format!(
                    "there are {n} NVIDIA GPUs, counted from 0: ddpm doctor lists them (or use --device cpu)"
                ));
            }
            _ => {}
        }
        let driver = ffi::driver_version().map_err(|e| says(e, STARTING))?;
        let takes = format!("the NVIDIA driver takes CUDA up to {}.{}", driver / 1000, driver % 1000 / 10);
        if driver < OLDEST_DRIVER {
            let needed = OLDEST_DRIVER / 1000;
            return Err(format!(
                "{takes}, and {needed}.0 is needed: install a newer driver, or use --device cpu"
            ));
        }
        let (major, minor) = ffi::capability(self.index).map_err(|e| says(e, STARTING))?;
        if (major, minor) < OLDEST {
            return Err(format!(
                "it has compute capability {major}.{minor}, and the kernels need {}.{} (Ampere) or later: use --device cpu",
                OLDEST.0, OLDEST.1
            ));
        }
        compile::available()?;
        match ffi::nvrtc_version() {
            Some((major, minor)) if major > driver / 1000 => Err(format!(
                "{takes}, and the NVRTC that was found is of CUDA {major}.{minor}, whose machine code it cannot load: install \
                 a newer driver or an older NVRTC (pip install nvidia-cuda-nvrtc-cu{})",
                driver / 1000
            )),
            _ => Ok(()),
        }
    }

    /// How to compute with the libraries that are there.
    fn choices(&self) -> Choices {
        match self.choices.libraries {
            Libraries::Timed if !library::any() => Choices { libraries: Libraries::Never, ..self.choices },
            _ => self.choices,
        }
    }
}

impl Device for CudaDevice {
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>> {
        self.check()?;
        Ok(Box::new(GpuExecutor::new(CudaGpu::new(self.index)?, graph, options, self.choices())?))
    }

    fn has_own_memory(&self) -> bool {
        true
    }

    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint> {
        executor::footprint(graph, options, self.choices())
    }
}

/// What an unexpected error means before anything has run, and after.
const STARTING: &str =
    "the NVIDIA driver cannot start (nvidia-smi and the kernel log may say why): use --device cpu";
const RUNNING: &str = "the GPU was lost or a kernel failed (nvidia-smi and the kernel log say what the GPU did); a training's \
                       last checkpoint is whole: go on from it with --resume";

/// What a driver's error means for a person, and what to do.
fn says(error: DriverError, otherwise: &str) -> String {
    let hint = match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => "there is no NVIDIA GPU: use --device cpu",
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            "the libcuda.so that was found is the CUDA toolkit's stub and no driver: take its folder out of LD_LIBRARY_PATH"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver's library and the kernel's module are of different versions: restart the machine"
        }
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the driver waits for another service (on machines with NVSwitch the Fabric Manager): start it"
        }
        CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | CUresult::CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER
        | CUresult::CUDA_ERROR_INVALID_IMAGE
        | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "the driver is too old for this GPU or this program: install a newer one (ddpm doctor shows it)"
        }
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "the GPU has not enough free memory: take a smaller batch (train.batch_size with train.accumulate), size or \
             network"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => "another program keeps the GPU to itself",
        _ => otherwise,
    };
    format!("{hint} ({error})")
}

/// Two buffers of one length that the GPU reads by itself: one is filled while the copy from the other may be under way. The
/// event of each is its last copy (the buffers' own ones are not recorded, as events are off).
struct Pinned {
    buffers: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

/// Less is copied by the driver before it returns, in one go with its call.
const SMALL_UPLOAD: usize = 64 << 10;

/// How often calls stand in a graph whose time is taken, and how often it is started: the shortest time counts.
const TIMED_CALLS: u32 = 10;
const TIMED_STARTS: usize = 3;

/// One GPU with one stream and one piece of memory.
struct CudaGpu {
    index: usize,
    /// Started when they are first asked for. They stand first, as they end before the stream and its context do.
    cudnn: Option<Result<Cudnn, String>>,
    cublaslt: Option<Result<CublasLt, String>>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Those that graphs are recorded on beside the first.
    others: Vec<Arc<CudaStream>>,
    functions: HashMap<&'static str, CudaFunction>,
    memory: Option<Mutex<CudaSlice<u8>>>,
    /// By their length.
    pinned: Mutex<HashMap<usize, Pinned>>,
    base: u64,
    graphs: Vec<ffi::Graph>,
    /// What was started before the last [`pace`](Gpu::pace).
    paced: Mutex<Option<CudaEvent>>,
}

impl CudaGpu {
    fn new(index: usize) -> Result<Self> {
        let error = |e| Error::Device { device: format!("cuda:{index}"), reason: says(e, STARTING) };
        let context = CudaContext::new(index).map_err(error)?;
        ffi::without_events(&context);
        let stream = context.new_stream().map_err(error)?;
        let (functions, graphs, pinned) = (HashMap::new(), Vec::new(), Mutex::default());
        let (cudnn, cublaslt, memory, base) = (None, None, None, 0);
        let (others, paced) = (Vec::new(), Mutex::default());
        Ok(Self {
            index,
            cudnn,
            cublaslt,
            context,
            stream,
            others,
            functions,
            memory,
            pinned,
            base,
            graphs,
            paced,
        })
    }

    /// What stands between two calls on the stream as a graph; `None` without such calls.
    fn captured(&self, calls: impl FnOnce() -> Result<()>) -> Result<Option<ffi::Graph>> {
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

    fn product_on(
        &self,
        stream: &Arc<CudaStream>,
        product: &Product<usize>,
        algorithm: &Algorithm,
    ) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.error(e))?;
        let base = self.base;
        let missing = || Err("the library was not started".to_owned());
        let started = match product.library {
            Library::Cudnn => self
                .cudnn
                .as_ref()
                .map_or_else(missing, |cudnn| cudnn.as_ref()?.product(stream, base, product, algorithm)),
            Library::CublasLt => self
                .cublaslt
                .as_ref()
                .map_or_else(missing, |lt| lt.as_ref()?.product(stream, base, product, algorithm)),
        };
        started.map_err(|reason| Error::Device { device: format!("cuda:{}", self.index), reason })
    }

    /// Starts all steps, each on the stream of its turn, behind those that it waits for. The others join the first stream, which
    /// is captured, at the beginning, and it waits for them at the end.
    fn start(&self, steps: &[Step<'_>]) -> Result<()> {
        let error = |e| self.error(e);
        let streams: Vec<&Arc<CudaStream>> = [&self.stream].into_iter().chain(&self.others).collect();
        let mut awaited = vec![false; steps.len()];
        steps.iter().flat_map(|step| &step.turn.waits).for_each(|&i| awaited[i] = true);
        let mut events: Vec<Option<CudaEvent>> = Vec::with_capacity(steps.len());
        let beginning = self.stream.record_event(None).map_err(error)?;
        let mut joined = vec![false; streams.len()];
        joined[0] = true;
        for (step, awaited) in steps.iter().zip(awaited) {
            let stream = streams[step.turn.stream];
            if !joined[step.turn.stream] {
                stream.wait(&beginning).map_err(error)?;
                joined[step.turn.stream] = true;
            }
            for event in step.turn.waits.iter().filter_map(|&i| events[i].as_ref()) {
                stream.wait(event).map_err(error)?;
            }
            for call in step.calls {
                match call {
                    Call::Launch(launch) => self.launch_on(stream, launch)?,
                    Call::Product(both) => self.product_on(stream, &both.0, &both.1)?,
                }
            }
            events.push(if awaited { Some(stream.record_event(None).map_err(error)?) } else { None });
        }
        for (stream, _) in streams.iter().zip(joined).skip(1).filter(|(_, joined)| *joined) {
            self.stream.wait(&stream.record_event(None).map_err(error)?).map_err(error)?;
        }
        Ok(())
    }

    fn error(&self, e: DriverError) -> Error {
        Error::Device { device: format!("cuda:{}", self.index), reason: says(e, RUNNING) }
    }

    fn memory(&self) -> Result<std::sync::MutexGuard<'_, CudaSlice<u8>>> {
        let memory = self.memory.as_ref().ok_or_else(|| Error::Device {
            device: format!("cuda:{}", self.index),
            reason: "no memory was reserved".to_owned(),
        })?;
        Ok(memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn function(&self, kernel: &str) -> Result<&CudaFunction> {
        self.functions.get(kernel).ok_or_else(|| Error::Device {
            device: format!("cuda:{}", self.index),
            reason: format!("the kernel {kernel} was not prepared"),
        })
    }
}

impl Drop for CudaGpu {
    fn drop(&mut self) {
        // Copies from pinned buffers end before these go. What is freed in the stream's order stays the driver's pool's until
        // somebody waits: the next plan finds it free. An error leaves nothing to do.
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
        let enough = |free: usize| {
            Error::Resources(format!(
                "{} MiB of GPU memory are needed, and {} of cuda:{}'s {} MiB are free: take a smaller batch \
                 (train.batch_size with train.accumulate), size or network, or end what else uses the GPU",
                mib(bytes),
                mib(free),
                self.index,
                mib(total)
            ))
        };
        if bytes > free {
            return Err(enough(free));
        }
        let memory = self.stream.alloc_zeros::<u8>(bytes).map_err(|e| match e.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => enough(free),
            _ => self.error(e),
        })?;
        self.base = memory.device_ptr(&self.stream).0;
        self.memory = Some(Mutex::new(memory));
        Ok(())
    }

    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()> {
        let capability = self.context.compute_capability().map_err(|e| self.error(e))?;
        let sources = compile::sources_of(kernels);
        // The compiler takes seconds for a source: all at once.
        let compiled: Vec<Result<Arc<[u8]>, String>> = thread::scope(|scope| {
            let all: Vec<_> =
                sources.iter().map(|source| scope.spawn(|| compile::compile(source, capability))).collect();
            let panicked = |_| Err("the compiler's thread ended early".to_owned());
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
        let mut place = memory.slice_mut(at..at + data.len());
        self.stream.memcpy_htod(data, &mut place).map_err(|e| self.error(e))
    }

    fn upload(&self, at: usize, data: &[u8]) -> Result<()> {
        if data.len() < SMALL_UPLOAD {
            return self.write(at, data);
        }
        let mut all = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let Pinned { buffers, next } = match all.entry(data.len()) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(place) => {
                let buffer = || Ok((ffi::pinned(&self.context, data.len())?, self.context.new_event(None)?));
                let both = || -> Result<_, DriverError> { Ok([buffer()?, buffer()?]) };
                // The host may have no such memory left: it is a matter of speed.
                let Ok(buffers) = both() else { return self.write(at, data) };
                place.insert(Pinned { buffers, next: 0 })
            }
        };
        let (buffer, copied) = &mut buffers[*next];
        *next = 1 - *next;
        // The copy before the last; an event that was never recorded is not waited for.
        copied.synchronize().map_err(|e| self.error(e))?;
        buffer.as_mut_slice().map_err(|e| self.error(e))?.copy_from_slice(data);
        let mut memory = self.memory()?;
        let mut place = memory.slice_mut(at..at + data.len());
        self.stream.memcpy_htod(&*buffer, &mut place).map_err(|e| self.error(e))?;
        copied.record(&self.stream).map_err(|e| self.error(e))
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        let memory = self.memory()?;
        let place = memory.slice(at..at + out.len());
        self.stream.memcpy_dtoh(&place, out).map_err(|e| self.error(e))?;
        self.stream.synchronize().map_err(|e| self.error(e))
    }

    fn launch(&self, launch: &Launch<usize>) -> Result<()> {
        self.launch_on(&self.stream, launch)
    }

    fn algorithms(&mut self, product: &Product<usize>) -> Vec<Algorithm> {
        if self.context.bind_to_thread().is_err() {
            return Vec::new();
        }
        // What a library cannot do, or one that does not start, is our kernels' part.
        let found = match product.library {
            Library::Cudnn => {
                let cudnn = self.cudnn.get_or_insert_with(Cudnn::new);
                cudnn.as_ref().map_err(Clone::clone).and_then(|cudnn| cudnn.algorithms(product))
            }
            Library::CublasLt => {
                let cublaslt = self.cublaslt.get_or_insert_with(CublasLt::new);
                cublaslt.as_ref().map_err(Clone::clone).and_then(|lt| lt.algorithms(self.base, product))
            }
        };
        found.unwrap_or_default()
    }

    fn product(&self, product: &Product<usize>, algorithm: &Algorithm) -> Result<()> {
        self.product_on(&self.stream, product, algorithm)
    }

    fn time(&mut self, calls: &[Call<usize>]) -> Result<Duration> {
        let once = || calls.iter().try_for_each(|call| self.call(call));
        // Libraries load what they need; a graph would not take that.
        once()?;
        let graph = self.captured(|| (0..TIMED_CALLS).try_for_each(|_| once()))?;
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
        let streams = steps.iter().map(|step| step.turn.stream + 1).max().unwrap_or(1);
        while self.others.len() + 1 < streams {
            self.others.push(self.context.new_stream().map_err(|e| self.error(e))?);
        }
        let graph = self.captured(|| self.start(steps))?;
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

    fn pace(&self) -> Result<()> {
        let mut paced = self.paced.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = &*paced {
            before.synchronize().map_err(|e| self.error(e))?;
            return before.record(&self.stream).map_err(|e| self.error(e));
        }
        let event = self.context.new_event(None).map_err(|e| self.error(e))?;
        event.record(&self.stream).map_err(|e| self.error(e))?;
        *paced = Some(event);
        Ok(())
    }
}
