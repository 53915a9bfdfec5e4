//! What is there: driver, libraries, GPUs. Nothing of it is needed to ask.

use crate::driver::CudaDevice;
use crate::ffi;
use crate::library::{cublaslt_version, cudnn_version};
use cudarc::driver::CudaContext;

/// A library that the program looks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Library {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Its version, or why it cannot be used.
    pub version: Result<String, String>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its number.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// Free bytes and all bytes of its memory.
    pub memory: (usize, usize),
    /// What is in the way of computing on it.
    pub usable: Result<(), String>,
}

fn version(v: i32) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

/// The libraries, there or not.
pub fn libraries() -> Vec<Library> {
    let driver = match ffi::has_driver() {
        true => ffi::driver_version()
            .map(|v| format!("takes CUDA up to {}", version(v)))
            .map_err(|e| e.to_string()),
        false => Err("libcuda.so cannot be found".to_owned()),
    };
    let nvrtc = match ffi::has_nvrtc() {
        true => ffi::nvrtc_version()
            .map(|(major, minor)| format!("{major}.{minor}"))
            .ok_or_else(|| "it does not say its version".to_owned()),
        false => Err("libnvrtc.so cannot be found".to_owned()),
    };
    let without = |e: String| format!("{e}; it is optional: the program's own kernels are used");
    let (cudnn, cublaslt) = (cudnn_version().map_err(without), cublaslt_version().map_err(without));
    vec![
        Library { name: "NVIDIA driver", purpose: "runs GPUs", version: driver },
        Library { name: "NVRTC", purpose: "compiles the kernels", version: nvrtc },
        Library { name: "cuDNN", purpose: "may make convolutions faster", version: cudnn },
        Library { name: "cuBLASLt", purpose: "may make linear layers faster", version: cublaslt },
    ]
}

/// The GPUs; or why none can be asked for.
///
/// # Errors
/// As [`CudaDevice::count`].
pub fn devices() -> Result<Vec<Found>, String> {
    let one = |index: usize| {
        let context = CudaContext::new(index).map_err(|e| e.to_string())?;
        Ok(Found {
            index,
            name: context.name().map_err(|e| e.to_string())?,
            capability: context.compute_capability().map_err(|e| e.to_string())?,
            memory: context.mem_get_info().map_err(|e| e.to_string())?,
            usable: CudaDevice { index, ..CudaDevice::default() }.usable(),
        })
    };
    (0..CudaDevice::count()?).map(one).collect()
}
