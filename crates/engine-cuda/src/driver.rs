//! The GPU by NVIDIA's driver.

use crate::compile;
use crate::executor::{self, GpuExecutor};
use crate::ffi;
use crate::gpu::{Gpu, Launch};
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

/// The oldest compute capability that the kernels are for (bf16 and tf32 on tensor cores).
pub const OLDEST: (i32, i32) = (8, 0);

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
        let count = CudaContext::device_count().map_err(says)?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// This GPU, if it is there and new enough and its libraries are.
    ///
    /// # Errors
    /// What is missing or too old, and what to do.
    pub fn check(&self) -> Result<()> {
        let error = |reason: String| Error::Device { device: format!("cuda:{}", self.index), reason };
        match Self::count().map_err(error)? {
            0 => return Err(error("there is no NVIDIA GPU: use --device cpu".to_owned())),
            n if self.index >= n => {
                return Err(error(format!(
                    "there are {n} NVIDIA GPUs, counted from 0: ddpm doctor lists them (or use --device cpu)"
                )));
            }
            _ => {}
        }
        compile::available().map_err(error)
    }
}

impl Device for CudaDevice {
    fn executor(&self, graph: Graph, options: &PlanOptions) -> Result<Box<dyn Executor>> {
        self.check()?;
        Ok(Box::new(GpuExecutor::new(CudaGpu::new(self.index)?, graph, options, self.choices)?))
    }

    fn footprint(&self, graph: Graph, options: &PlanOptions) -> Result<Footprint> {
        executor::footprint(graph, options, self.choices)
    }
}

/// What a driver's error means for a person, and what to do.
fn says(error: DriverError) -> String {
    let what = error.to_string();
    let hint = match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => "there is no NVIDIA GPU: use --device cpu",
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | CUresult::CUDA_ERROR_NOT_INITIALIZED
        | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "the driver is too old for this GPU or this program: install a newer one (ddpm doctor shows it)"
        }
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "the GPU has not enough free memory: take a smaller batch (train.batch_size with train.accumulate), size or \
             network"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => "another program keeps the GPU to itself",
        _ => {
            "the GPU was lost or a kernel failed; the last checkpoint is whole: start again with --resume (nvidia-smi and \
             the kernel log say what the GPU did)"
        }
    };
    format!("{hint} ({what})")
}

/// Two buffers of one length that the GPU reads by itself: one is filled while the copy from the other may be under way. The
/// event of each is its last copy (the buffers' own ones are not recorded, as events are off).
struct Pinned {
    buffers: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

/// Less is copied by the driver before it returns, in one go with its call.
const SMALL_UPLOAD: usize = 64 << 10;

/// One GPU with one stream and one piece of memory.
struct CudaGpu {
    index: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
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
        let error = |e: DriverError| Error::Device { device: format!("cuda:{index}"), reason: says(e) };
        let context = CudaContext::new(index).map_err(error)?;
        ffi::without_events(&context);
        let stream = context.new_stream().map_err(error)?;
        let capability = context.compute_capability().map_err(error)?;
        if capability < OLDEST {
            let (name, (major, minor)) = (context.name().unwrap_or_default(), capability);
            let reason = format!(
                "{name} has compute capability {major}.{minor}, and the kernels need {}.{} (Ampere) or later: use \
                 --device cpu",
                OLDEST.0, OLDEST.1
            );
            return Err(Error::Device { device: format!("cuda:{index}"), reason });
        }
        let (functions, graphs, pinned) = (HashMap::new(), Vec::new(), Mutex::default());
        let paced = Mutex::default();
        Ok(Self { index, context, stream, functions, memory: None, pinned, base: 0, graphs, paced })
    }

    fn error(&self, e: DriverError) -> Error {
        Error::Device { device: format!("cuda:{}", self.index), reason: says(e) }
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
        // Copies from pinned buffers end before these go. An error leaves nothing to do.
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
        let function = self.function(launch.kernel)?;
        ffi::launch(&self.stream, function, self.base, launch).map_err(|e| self.error(e))
    }

    fn record(&mut self, launches: &[Launch<usize>]) -> Result<Option<usize>> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.finish()?;
        self.stream.begin_capture(mode).map_err(|e| self.error(e))?;
        let launched: Result<()> = launches.iter().try_for_each(|l| self.launch(l));
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(|e| self.error(e));
        launched?;
        let Some(graph) = graph? else { return Ok(None) };
        self.graphs.push(ffi::Graph(graph));
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
