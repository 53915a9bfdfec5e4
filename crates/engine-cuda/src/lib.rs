//! Runs the engine's plans on NVIDIA GPUs.
//!
//! - [`source`] has the kernels, CUDA C++ that NVRTC compiles when a plan needs them;
//! - [`translate`] says which kernels an operation is, with which arguments;
//! - [`executor`] lays a plan out in one piece of memory and runs it on a [`gpu`];
//! - `vectors` is what samplers do between two runs, in that memory too;
//! - `driver` is the GPU by NVIDIA's driver, [`compile`] its compiler; both libraries are looked for when the program runs;
//! - [`probe`] says what is there.
//!
//! The tests run the same kernels as C++ on the CPU (`tests/emulator`), so that all but the driver's part is tested
//! without a GPU. `docs/cuda.md` says what was never run on one.
#![deny(unsafe_code)]

pub mod compile;
pub mod control;
mod driver;
pub mod executor;
mod ffi;
pub mod gpu;
pub mod probe;
pub mod source;
pub mod translate;
mod vectors;

pub use driver::CudaDevice;
pub use executor::GpuExecutor;
