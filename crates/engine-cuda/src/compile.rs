//! Compiling the kernels with NVRTC.

use crate::ffi;
use crate::source::{SOURCES, Source};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A source's name and a compute capability.
type Key = (&'static str, (i32, i32));

/// What was compiled: a training makes several plans, and the compiler takes seconds for a source.
static COMPILED: Mutex<Option<HashMap<Key, Arc<[u8]>>>> = Mutex::new(None);

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
pub fn compile(source: &Source, (major, minor): (i32, i32)) -> Result<Arc<[u8]>, String> {
    let key = (source.name, (major, minor));
    let compiled = || COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = compiled().as_ref().and_then(|all| all.get(&key)) {
        return Ok(code.clone());
    }
    available()?;
    let options = [format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_owned()];
    let code: Arc<[u8]> = ffi::compile(&source.whole(), source.name, &options)
        .map_err(|e| {
            format!(
                "{} cannot be compiled for compute capability {major}.{minor} (an NVRTC that is older than the GPU does \
                 not know it): {e}",
                source.name
            )
        })?
        .into();
    compiled().get_or_insert_with(HashMap::new).insert(key, code.clone());
    Ok(code)
}

/// The sources of these kernels, each once.
pub fn sources_of(kernels: &[&'static str]) -> Vec<&'static Source> {
    SOURCES.iter().filter(|s| s.kernels.iter().any(|k| kernels.contains(k))).collect()
}
