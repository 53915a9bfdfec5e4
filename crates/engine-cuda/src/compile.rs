//! Compiling the kernels with NVRTC.

use crate::ffi;
use crate::source::{SOURCES, Source};

/// Whether NVRTC is there, and if not, what to do.
pub fn available() -> Result<(), String> {
    match ffi::has_nvrtc() {
        true => Ok(()),
        false => Err("the library NVRTC (libnvrtc.so), which compiles the kernels, cannot be found: install the CUDA \
                      toolkit, or `pip install nvidia-cuda-nvrtc-cu12` and add the folder of its libnvrtc.so.12 to \
                      LD_LIBRARY_PATH"
            .to_owned()),
    }
}

/// Machine code of a source for GPUs of a compute capability.
///
/// # Errors
/// What is missing, or what the compiler says.
pub fn compile(source: &Source, (major, minor): (i32, i32)) -> Result<Vec<u8>, String> {
    available()?;
    let options = [format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_owned()];
    ffi::compile(&source.whole(), source.name, &options).map_err(|e| {
        format!("{} cannot be compiled for compute capability {major}.{minor}: {e}", source.name)
    })
}

/// The sources of these kernels, each once.
pub fn sources_of(kernels: &[&'static str]) -> Vec<&'static Source> {
    SOURCES.iter().filter(|s| s.kernels.iter().any(|k| kernels.contains(k))).collect()
}
