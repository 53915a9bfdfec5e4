//! Reports which driver, libraries and GPUs are available; requires none of them.

use crate::driver::CudaDevice;
use crate::ffi;
use crate::installed::{cublaslt_version, cudnn_version};
use cudarc::driver::CudaContext;

/// A library that the program uses if present.
#[derive(Clone, Debug, PartialEq)]
pub struct LibraryInfo {
    /// Name.
    pub name: &'static str,
    /// Purpose.
    pub purpose: &'static str,
    /// Version, or why it cannot be used.
    pub version: Result<String, String>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuInfo {
    /// Device index.
    pub index: usize,
    /// Name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Free and total memory in bytes.
    pub memory: (usize, usize),
    /// Why it cannot be used, if so.
    pub usable: Result<(), String>,
}

fn version(v: i32) -> String {
    format!("{}.{}", v / 1000, v % 1000 / 10)
}

/// All libraries, whether found or not.
pub fn libraries() -> Vec<LibraryInfo> {
    let driver = if ffi::has_driver() {
        ffi::driver_version()
            .map(|v| format!("supports CUDA up to {}", version(v)))
            .map_err(|e| e.to_string())
    } else {
        Err("cannot find libcuda.so".to_owned())
    };
    let nvrtc = if ffi::has_nvrtc() {
        ffi::nvrtc_version()
            .map(|(major, minor)| format!("{major}.{minor}"))
            .ok_or_else(|| "it reports no version".to_owned())
    } else {
        Err("cannot find libnvrtc.so".to_owned())
    };
    let optional = |e: String| format!("{e}; optional: the built-in kernels are used instead");
    let (cudnn, cublaslt) = (cudnn_version().map_err(optional), cublaslt_version().map_err(optional));
    vec![
        LibraryInfo { name: "NVIDIA driver", purpose: "runs the GPUs", version: driver },
        LibraryInfo { name: "NVRTC", purpose: "compiles the kernels", version: nvrtc },
        LibraryInfo { name: "cuDNN", purpose: "can speed up convolutions", version: cudnn },
        LibraryInfo { name: "cuBLASLt", purpose: "can speed up linear layers", version: cublaslt },
    ]
}

/// The GPUs, or why they cannot be listed.
///
/// # Errors
/// As [`CudaDevice::count`].
pub fn devices() -> Result<Vec<GpuInfo>, String> {
    let one = |index: usize| {
        let context = CudaContext::new(index).map_err(|e| e.to_string())?;
        Ok(GpuInfo {
            index,
            name: context.name().map_err(|e| e.to_string())?,
            capability: context.compute_capability().map_err(|e| e.to_string())?,
            memory: context.mem_get_info().map_err(|e| e.to_string())?,
            usable: CudaDevice { index, ..CudaDevice::default() }.usable(),
        })
    };
    (0..CudaDevice::count()?).map(one).collect()
}
