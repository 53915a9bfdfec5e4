//! Runs the engine's plans on NVIDIA GPUs.
//!
//! - [`source`] has the kernels, CUDA C++ that NVRTC compiles when a plan needs them;
//! - [`translate`] says which kernels an operation is, with which arguments;
//! - [`schedule`] says which nodes wait for which;
//! - `layout` lays a plan out in one piece of memory, [`executor`] runs it on a [`gpu`];
//! - `vectors` is what samplers do between two runs, in that memory too;
//! - `driver` is the GPU by NVIDIA's driver, [`compile`] its compiler, whose work a `cache` keeps; both libraries are looked for when the program runs;
//! - [`library`] describes products that cuDNN and cuBLASLt may make in place of kernels, where they are there; `choice` times
//!   both;
//! - [`probe`] says what is there.
//!
//! The tests run the same kernels as C++ on the CPU (`tests/emulator`), also behind a stand-in for NVIDIA's driver, so that
//! all of it is tested without a GPU. `docs/cuda.md` says what that cannot show.
#![deny(unsafe_code)]

mod cache;
mod choice;
pub mod compile;
pub mod control;
mod driver;
pub mod executor;
mod ffi;
pub mod gpu;
mod layout;
pub mod library;
pub mod probe;
pub mod schedule;
pub mod source;
pub mod translate;
mod vectors;

pub use driver::CudaDevice;
pub use executor::GpuExecutor;
