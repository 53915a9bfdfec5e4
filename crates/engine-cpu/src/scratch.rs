//! Memory of the CPU executor: the arena's allocation and per-thread scratch memory. Tasks that use scratch memory can be cancelled.

use ddpm_engine::plan::ALIGN;
use ddpm_engine::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Maximum number of threads of an executor.
pub const MAX_THREADS: usize = 1024;

/// Checks a number of threads; 0 stands for all cores.
pub(crate) fn check_threads(threads: usize) -> Result<usize> {
    match threads {
        0..=MAX_THREADS => Ok(threads),
        _ => Err(Error::Resources(format!(
            "{threads} threads are too many; use 0 (all cores) to {MAX_THREADS}"
        ))),
    }
}

/// Scratch memory for each thread of the pool.
pub(crate) struct Scratch {
    threads: Vec<Mutex<Aligned>>,
    /// Set by the caller to request a stop: tasks are then skipped.
    stop: Arc<AtomicBool>,
    /// Whether tasks may be skipped.
    may_stop: bool,
    /// Whether a task was skipped.
    skipped: AtomicBool,
}

impl Scratch {
    /// Allocates `len` values for each of `threads` threads.
    pub(crate) fn new(threads: usize, len: usize) -> Result<Self> {
        let threads = (0..threads).map(|_| Aligned::new(len).map(Mutex::new)).collect::<Result<_>>()?;
        let [stop, skipped] = [false; 2].map(AtomicBool::new);
        Ok(Self { threads, stop: Arc::new(stop), may_stop: true, skipped })
    }

    /// Calls `f` with the current thread's memory, unless a stop was requested. `f` must not wait for other tasks of the pool.
    pub(crate) fn with(&self, f: impl FnOnce(&mut [f32])) {
        if self.may_stop && self.stop.load(Ordering::Relaxed) {
            self.skipped.store(true, Ordering::Relaxed);
            return;
        }
        let thread = rayon::current_thread_index().unwrap_or(0);
        // A poisoned lock means that a task panicked; no later task reads what it left in scratch memory.
        let mut memory = self.threads[thread].lock().unwrap_or_else(|e| e.into_inner());
        f(memory.as_mut_slice());
    }

    /// Sets the flag that requests a stop.
    pub(crate) fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// Begins a run, which may be stopped from here on.
    pub(crate) fn begin(&mut self) {
        self.may_stop = true;
        *self.skipped.get_mut() = false;
    }

    /// From here on the run must not be stopped.
    pub(crate) fn forbid_stop(&mut self) {
        self.may_stop = false;
    }

    /// Whether the run is to stop: the output of the last node may then be incomplete.
    pub(crate) fn stopped(&self) -> bool {
        self.skipped.load(Ordering::Relaxed) || self.may_stop && self.stop.load(Ordering::Relaxed)
    }
}

/// Memory aligned to a cache line.
pub(crate) struct Aligned {
    memory: Box<[f32]>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// Allocates `len` zeros.
    pub(crate) fn new(len: usize) -> Result<Self> {
        // Zeroed lazily by the operating system: untouched pages take no memory.
        let memory = bytemuck::allocation::try_zeroed_slice_box::<f32>(len + ALIGN).map_err(|()| {
            let mib = (len * 4) >> 20;
            Error::Resources(format!(
                "cannot allocate {mib} MiB of memory; use a smaller batch, image size or network"
            ))
        })?;
        let start = memory.as_ptr().align_offset(64).min(ALIGN);
        Ok(Self { memory, start, len })
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
