//! Runs the engine's plans on the CPU.
//!
//! - `lower` turns each operation into a kernel, specialized for the shapes of its operands and for the instruction set;
//! - `executor` plans a graph, allocates its memory and runs the kernels one after the other, each on all threads;
//! - `scratch` has the arena's allocation and the scratch memory of threads.
//!
//! The arithmetic is that of `ddpm-kernels`, which knows no threads; this crate splits the work into tasks.
#![forbid(unsafe_code)]

mod executor;
mod kernel;
mod lower;
mod scratch;

pub use ddpm_kernels::Isa;
pub use ddpm_kernels::elementwise::{bf16_fma_throughput, fma_throughput};
pub use executor::{CpuDevice, CpuExecutor};
pub use lower::accepts_bf16;
pub use scratch::MAX_THREADS;
