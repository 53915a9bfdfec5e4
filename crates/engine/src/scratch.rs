//! Memory for running plans on the CPU: the arena's, and the scratch memory of each thread, whose tasks can be asked to end.

use crate::error::{Error, Result};
use crate::plan::ALIGN;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Most threads of an executor.
pub const MOST_THREADS: usize = 1024;

/// A number of threads that can be started; 0 stands for all cores.
pub(crate) fn threads_of(threads: usize) -> Result<usize> {
    match threads {
        0..=MOST_THREADS => Ok(threads),
        _ => Err(Error::Resources(format!(
            "{threads} threads are too many: give 0 (all cores) to {MOST_THREADS}"
        ))),
    }
}

/// Scratch memory of each thread of the pool.
pub struct Scratch {
    threads: Vec<Mutex<Aligned>>,
    /// Once set, tasks are skipped.
    stop: Arc<AtomicBool>,
    /// Whether tasks may be skipped.
    may_stop: bool,
    /// Whether one was.
    skipped: AtomicBool,
}

impl Scratch {
    /// Memory of `len` values for each of `threads` threads.
    pub(crate) fn new(threads: usize, len: usize) -> Result<Self> {
        let threads = (0..threads).map(|_| Aligned::new(len).map(Mutex::new)).collect::<Result<_>>()?;
        let [stop, skipped] = [false; 2].map(AtomicBool::new);
        Ok(Self { threads, stop: Arc::new(stop), may_stop: true, skipped })
    }

    /// Calls `f` with the current thread's memory, unless the run was asked to stop. `f` must not wait for other tasks of the pool.
    pub fn with(&self, f: impl FnOnce(&mut [f32])) {
        if self.may_stop && self.stop.load(Ordering::Relaxed) {
            self.skipped.store(true, Ordering::Relaxed);
            return;
        }
        let thread = rayon::current_thread_index().unwrap_or(0);
        // A poisoned lock means that a task panicked; its scratch memory holds nothing that the next one reads.
        let mut memory = self.threads[thread].lock().unwrap_or_else(|e| e.into_inner());
        f(memory.as_mut_slice());
    }

    /// The flag that asks for a stop.
    pub(crate) fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// Begins a run, which may be stopped.
    pub(crate) fn begin(&mut self) {
        self.may_stop = true;
        *self.skipped.get_mut() = false;
    }

    /// From now on the run must not be stopped.
    pub(crate) fn hold_on(&mut self) {
        self.may_stop = false;
    }

    /// Whether the run was asked to stop, and may: what the last node made is of no use if so.
    pub(crate) fn stopped(&self) -> bool {
        self.skipped.load(Ordering::Relaxed) || self.may_stop && self.stop.load(Ordering::Relaxed)
    }
}

/// Values that begin at a cache line.
pub(crate) struct Aligned {
    memory: Box<[f32]>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// Takes the memory; all values are zero.
    pub(crate) fn new(len: usize) -> Result<Self> {
        // Zeros that the system gives: a page is there only when something is written to it.
        let memory = bytemuck::allocation::try_zeroed_slice_box::<f32>(len + ALIGN).map_err(|()| {
            let mib = (len * 4) >> 20;
            Error::Resources(format!(
                "{mib} MiB of memory cannot be had: take a smaller batch, size or network"
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
