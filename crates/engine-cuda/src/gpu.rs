//! The GPU interface that the executor needs, small enough for a second implementation in tests: the same kernels compiled as
//! C++ for the CPU (`tests/emulator`).

use crate::launch::Launch;
use crate::library::{Algorithm, Call, LibraryOp};
use crate::streams::StreamSlot;
use ddpm_engine::{Error, Result};
use std::time::{Duration, Instant};

/// Calls that run in sequence, and their place in the stream schedule.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// The calls.
    pub calls: &'a [Call<usize>],
    /// Stream and dependencies; indices refer to steps of the same list.
    pub slot: StreamSlot,
}

/// A GPU with a single memory allocation. Calls run in order; all except [`read`](Self::read), [`finish`](Self::finish) and
/// [`throttle`](Self::throttle) may return before completion, but no longer need the caller's buffers then.
pub trait Gpu: Send {
    /// Human-readable description, such as "NVIDIA H200 (cuda:0)".
    fn describe(&self) -> String;

    /// Allocates the memory, zeroed.
    fn reserve(&mut self, bytes: usize) -> Result<()>;

    /// Compiles and loads these kernels.
    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()>;

    /// Copies host to device.
    fn write(&self, at: usize, data: &[u8]) -> Result<()>;

    /// Like [`write`](Self::write), for data of one length that is uploaded repeatedly, such as image batches: may use
    /// page-locked staging buffers.
    fn upload(&self, at: usize, data: &[u8]) -> Result<()> {
        self.write(at, data)
    }

    /// Copies device to host and waits.
    fn read(&self, at: usize, out: &mut [u8]) -> Result<()>;

    /// Launches a kernel.
    fn launch(&self, launch: &Launch<usize>) -> Result<()>;

    /// A library's algorithms for an operation, expected fastest first; empty if the library is missing or does not support it.
    fn algorithms(&mut self, _: &LibraryOp<usize>) -> Vec<Algorithm> {
        Vec::new()
    }

    /// Starts a library operation.
    fn call_library(&self, _: &LibraryOp<usize>, _: &Algorithm) -> Result<()> {
        Err(Error::Device { device: self.describe(), reason: "it has no cuDNN or cuBLASLt".to_owned() })
    }

    /// Starts a kernel or a library operation.
    fn call(&self, call: &Call<usize>) -> Result<()> {
        match call {
            Call::Launch(launch) => self.launch(launch),
            Call::Library(both) => self.call_library(&both.0, &both.1),
        }
    }

    /// Time of these calls within a graph, after a warm-up run.
    fn time(&mut self, calls: &[Call<usize>]) -> Result<Duration> {
        calls.iter().try_for_each(|call| self.call(call))?;
        self.finish()?;
        let start = Instant::now();
        calls.iter().try_for_each(|call| self.call(call))?;
        self.finish()?;
        Ok(start.elapsed())
    }

    /// Records the steps as a graph and returns its index; `None` if graphs are not supported. Steps run concurrently where their
    /// stream slots allow.
    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>>;

    /// Launches a graph, ordered after all earlier calls.
    fn replay(&self, graph: usize) -> Result<()>;

    /// Waits for all submitted work.
    fn finish(&self) -> Result<()>;

    /// Waits for the work submitted before the previous call of this function; later work continues.
    fn throttle(&self) -> Result<()>;
}
