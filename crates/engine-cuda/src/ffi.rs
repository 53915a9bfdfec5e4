//! Calls into NVIDIA's libraries that cudarc leaves to its users: the crate's only `unsafe` code.
#![allow(unsafe_code, reason = "foreign functions; every block states why the call is sound")]

pub mod libraries;

use crate::launch::{Arg, Launch};
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaStream, DriverError, LaunchConfig, PinnedHostSlice,
    PushKernelArg, result,
};
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys as nvrtc_sys;
use std::ffi::{CString, c_char};
use std::sync::Arc;

/// Whether the driver library can be loaded.
pub fn has_driver() -> bool {
    // SAFETY: loading runs the library's initialisers; a library of that name, if any, is NVIDIA's driver.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Page-locked host memory.
pub fn pinned(context: &Arc<CudaContext>, bytes: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
    // SAFETY: the driver provides the memory, and every bit pattern is a valid `u8`; the buffer is written before it is read.
    unsafe { context.alloc_pinned(bytes) }
}

/// Whether the NVRTC library can be loaded.
pub fn has_nvrtc() -> bool {
    // SAFETY: loading runs the library's initialisers; a library of that name, if any, is NVIDIA's compiler.
    unsafe { nvrtc_sys::is_culib_present() }
}

/// The newest CUDA version that the driver supports, as 1000 major + 10 minor. The driver library must be present.
pub fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the function writes one int through the pointer and needs no context.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// Compute capability of a GPU. The driver library must be present.
pub fn capability(index: usize) -> Result<(i32, i32), DriverError> {
    result::init()?;
    let device = result::device::get(i32::try_from(index).unwrap_or(i32::MAX))?;
    // SAFETY: the driver has just returned the device.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok((
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// Major and minor version of NVRTC, whose library must be present.
pub fn nvrtc_version() -> Option<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the function writes two ints through the pointers.
    unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
    Some((major, minor))
}

/// An NVRTC program, destroyed on drop.
struct Program(nvrtc_sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: NVRTC created the program, and this is its only owner. Errors cannot be handled here.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Compiles CUDA C++ to machine code for the architecture given in the options, or returns the compiler's log. The NVRTC library
/// must be present.
pub fn compile(source: &str, name: &str, options: &[String]) -> Result<Vec<u8>, String> {
    let text = |s: &str| CString::new(s).map_err(|e| e.to_string());
    let (source, name) = (text(source)?, text(name)?);
    let program = Program(nvrtc::create_program(&source, Some(&name)).map_err(|e| e.to_string())?);
    // SAFETY: the program is alive, and so are the source and name that it refers to.
    if let Err(error) = unsafe { nvrtc::compile_program(program.0, options) } {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        return Err(format!("{error}: {}", String::from_utf8_lossy(&log).trim()));
    }
    let mut size = 0usize;
    // SAFETY: the program is alive and compiled; the function writes one `size_t`.
    unsafe { nvrtc_sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(|e| e.to_string())?;
    let mut code = vec![0u8; size];
    // SAFETY: the function writes exactly the number of bytes that it reported.
    unsafe { nvrtc_sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>()) }
        .result()
        .map_err(|e| e.to_string())?;
    Ok(code)
}

/// Turns off cudarc's event tracking, as the stream order suffices.
pub fn without_events(context: &CudaContext) {
    // SAFETY: all GPU memory is used on one stream, so nothing relies on tracked events; pinned host memory has its own events
    // (`driver.rs`).
    unsafe { context.disable_event_tracking() };
}

/// An instantiated CUDA graph, which may move to another thread together with its GPU.
pub struct Graph(pub CudaGraph);

// SAFETY: the driver allows calls on a graph from any thread if they do not overlap: the owner of a graph is not `Sync` (its
// pointers are not), so no two threads use it at once.
unsafe impl Send for Graph {}

/// Launches a kernel on the stream; addresses are offsets from `base`.
///
/// That arguments match the kernel's signature and that the kernel stays within the tensors it is given is verified by the
/// emulator tests.
pub fn launch(
    stream: &CudaStream,
    function: &CudaFunction,
    base: u64,
    launch: &Launch<usize>,
) -> Result<(), DriverError> {
    // Collected first, so that their addresses stay stable while arguments are pushed.
    let pointers: Vec<u64> = launch
        .args
        .iter()
        .map(|arg| match arg {
            Arg::At(at) => base + *at as u64,
            _ => 0,
        })
        .collect();
    let mut builder = stream.launch_builder(function);
    for (arg, pointer) in launch.args.iter().zip(&pointers) {
        match arg {
            Arg::At(_) => builder.arg(pointer),
            Arg::Int(v) => builder.arg(v),
            Arg::Uint(v) => builder.arg(v),
            Arg::Float(v) => builder.arg(v),
            Arg::Double(v) => builder.arg(v),
        };
    }
    let tuple = |[x, y, z]: [u32; 3]| (x, y, z);
    let config =
        LaunchConfig { grid_dim: tuple(launch.grid), block_dim: tuple(launch.block), shared_mem_bytes: 0 };
    // SAFETY: number and types of the arguments match the kernel's signature, and the addresses lie within the GPU's single
    // allocation, which outlives the stream: `tests/emulated.rs` checks both for every kernel.
    unsafe { builder.launch(config) }.map(|_| ())
}
