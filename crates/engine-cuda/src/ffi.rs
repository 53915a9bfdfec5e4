//! The calls into NVIDIA's libraries that cudarc leaves to its caller: the crate's only `unsafe` code.
#![allow(unsafe_code, reason = "foreign functions; every block says why it may call them")]

pub mod libraries;

use crate::gpu::{Arg, Launch};
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaStream, DriverError, LaunchConfig, PinnedHostSlice,
    PushKernelArg, result,
};
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys as nvrtc_sys;
use std::ffi::{CString, c_char};
use std::sync::Arc;

/// Whether the driver's library can be loaded.
pub fn has_driver() -> bool {
    // SAFETY: loading runs the library's initialisers; it is NVIDIA's driver, or nothing of that name is there.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Memory of the host that the GPU reads by itself.
pub fn pinned(context: &Arc<CudaContext>, bytes: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
    // SAFETY: the memory comes from the driver, not from the compiler, and any bytes are numbers; they are written before
    // they are read.
    unsafe { context.alloc_pinned(bytes) }
}

/// Whether NVRTC's library can be loaded.
pub fn has_nvrtc() -> bool {
    // SAFETY: loading runs the library's initialisers; it is NVIDIA's compiler, or nothing of that name is there.
    unsafe { nvrtc_sys::is_culib_present() }
}

/// The newest CUDA that the driver takes, as 1000 major + 10 minor. The driver's library must be there.
pub fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the function writes one int to where it is told, and needs no context.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// A GPU's compute capability. The driver's library must be there.
pub fn capability(index: usize) -> Result<(i32, i32), DriverError> {
    result::init()?;
    let device = result::device::get(i32::try_from(index).unwrap_or(i32::MAX))?;
    // SAFETY: the driver has just given the device.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok((
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// Major and minor number of NVRTC, whose library must be there.
pub fn nvrtc_version() -> Option<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the function writes two ints to where it is told.
    unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
    Some((major, minor))
}

/// A program of NVRTC, destroyed when it goes.
struct Program(nvrtc_sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created by NVRTC, and nobody else destroys it. An error leaves nothing to do.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Compiles CUDA C++ with these options to machine code of one architecture; or says what the compiler said. NVRTC's
/// library must be there.
pub fn compile(source: &str, name: &str, options: &[String]) -> Result<Vec<u8>, String> {
    let text = |s: &str| CString::new(s).map_err(|e| e.to_string());
    let (source, name) = (text(source)?, text(name)?);
    let program = Program(nvrtc::create_program(&source, Some(&name)).map_err(|e| e.to_string())?);
    // SAFETY: the program is alive, and so are the source and its name, which it refers to.
    if let Err(error) = unsafe { nvrtc::compile_program(program.0, options) } {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        return Err(format!("{error}: {}", String::from_utf8_lossy(&log).trim()));
    }
    let mut size = 0usize;
    // SAFETY: the program is alive and compiled; the function writes one number.
    unsafe { nvrtc_sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(|e| e.to_string())?;
    let mut code = vec![0u8; size];
    // SAFETY: the function writes as many bytes as it said.
    unsafe { nvrtc_sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>()) }
        .result()
        .map_err(|e| e.to_string())?;
    Ok(code)
}

/// Leaves the order of calls to the one stream that there is.
pub fn without_events(context: &CudaContext) {
    // SAFETY: all memory of the GPU is used on one stream, so nothing of it relies on events; pinned memory of the host has
    // events of its own (`driver.rs`).
    unsafe { context.disable_event_tracking() };
}

/// A graph of launches, which may go to another thread with its GPU.
pub struct Graph(pub CudaGraph);

// SAFETY: the driver wants calls on a graph to be made one after the other, from whatever thread: what holds a graph is
// not `Sync` (its pointers are not), so no two threads have it at once.
unsafe impl Send for Graph {}

/// Starts a kernel on the stream; places are offsets from `base`.
///
/// What the kernel does with them is its own affair: that its arguments are those of its signature, and that it stays
/// inside of what they name, is what the tests with the emulator show.
pub fn launch(
    stream: &CudaStream,
    function: &CudaFunction,
    base: u64,
    launch: &Launch<usize>,
) -> Result<(), DriverError> {
    // Pointers first, so that their addresses stay as they are while the arguments are handed on.
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
    // SAFETY: number and types of the arguments are those of the kernel's signature, and the places lie in the GPU's one
    // piece of memory, which outlives the stream: `tests/emulated.rs` checks both for every kernel.
    unsafe { builder.launch(config) }.map(|_| ())
}
