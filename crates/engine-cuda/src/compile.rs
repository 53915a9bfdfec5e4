//! Kernel compilation with NVRTC.

use crate::cache;
use crate::ffi;
use crate::source::{SOURCES, Source};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Source name and compute capability.
type Key = (&'static str, (i32, i32));

/// Compiled code, shared within the process: a training builds several plans, and a source takes seconds to compile.
static COMPILED: Mutex<Option<HashMap<Key, Arc<[u8]>>>> = Mutex::new(None);

/// Whether NVRTC is available, and if not, what to do.
pub fn available() -> Result<(), String> {
    if ffi::has_nvrtc() {
        return Ok(());
    }
    Err("cannot find the NVRTC library (libnvrtc.so), which compiles the kernels: install the CUDA \
         toolkit, or `pip install nvidia-cuda-nvrtc-cu12` and add the folder of its libnvrtc.so.12 to \
         LD_LIBRARY_PATH"
        .to_owned())
}

/// Machine code of a source for a compute capability, from the cache if possible.
///
/// # Errors
/// If NVRTC is missing or compilation fails.
pub fn compile(source: &Source, capability: (i32, i32)) -> Result<Arc<[u8]>, String> {
    let key = (source.name, capability);
    let compiled = || COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = compiled().as_ref().and_then(|all| all.get(&key)) {
        return Ok(code.clone());
    }
    available()?;
    let file = cache::folder().zip(ffi::nvrtc_version()).map(|(folder, version)| {
        cache::file(&folder, source.name, &source.full_text(), &options(capability), version)
    });
    let code: Arc<[u8]> = match file.as_deref().and_then(cache::read) {
        Some(code) => code.into(),
        None => {
            let code = compile_uncached(source, capability)?;
            if let Some(file) = file {
                cache::write(&file, &code);
            }
            code.into()
        }
    };
    compiled().get_or_insert_with(HashMap::new).insert(key, code.clone());
    Ok(code)
}

fn options((major, minor): (i32, i32)) -> [String; 2] {
    [format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_owned()]
}

/// Compiles without consulting the caches. NVRTC must be available.
///
/// # Errors
/// The compiler's log.
pub fn compile_uncached(source: &Source, capability: (i32, i32)) -> Result<Vec<u8>, String> {
    ffi::compile(&source.full_text(), source.name, &options(capability)).map_err(|e| {
        let (major, minor) = capability;
        format!(
            "cannot compile {} for compute capability {major}.{minor} (an NVRTC older than the GPU does not \
             support it): {e}",
            source.name
        )
    })
}

/// The sources that contain these kernels, without duplicates.
pub fn sources_of(kernels: &[&'static str]) -> Vec<&'static Source> {
    SOURCES.iter().filter(|s| s.kernels.iter().any(|k| kernels.contains(k))).collect()
}
