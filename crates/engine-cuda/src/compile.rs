//! Compiling the kernels with NVRTC.

use crate::cache;
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

/// Machine code of a source for GPUs of a compute capability: what was compiled before, or else compiled now.
///
/// # Errors
/// What is missing, or what the compiler says.
pub fn compile(source: &Source, capability: (i32, i32)) -> Result<Arc<[u8]>, String> {
    let key = (source.name, capability);
    let compiled = || COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = compiled().as_ref().and_then(|all| all.get(&key)) {
        return Ok(code.clone());
    }
    available()?;
    let file = cache::folder().zip(ffi::nvrtc_version()).map(|(folder, version)| {
        cache::file(&folder, source.name, &source.whole(), &options(capability), version)
    });
    let code: Arc<[u8]> = match file.as_deref().and_then(cache::read) {
        Some(code) => code.into(),
        None => {
            let code = compile_anew(source, capability)?;
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

/// The same, by the compiler in any case, whose library must be there.
///
/// # Errors
/// What the compiler says.
pub fn compile_anew(source: &Source, capability: (i32, i32)) -> Result<Vec<u8>, String> {
    ffi::compile(&source.whole(), source.name, &options(capability)).map_err(|e| {
        let (major, minor) = capability;
        format!(
            "{} cannot be compiled for compute capability {major}.{minor} (an NVRTC that is older than the GPU does not \
             know it): {e}",
            source.name
        )
    })
}

/// The sources of these kernels, each once.
pub fn sources_of(kernels: &[&'static str]) -> Vec<&'static Source> {
    SOURCES.iter().filter(|s| s.kernels.iter().any(|k| kernels.contains(k))).collect()
}
