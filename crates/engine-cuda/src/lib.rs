//! Runs the engine's plans on NVIDIA GPUs.
//!
//! - [`source`] contains the kernels, CUDA C++ compiled by NVRTC when a plan needs them;
//! - [`lower`] turns operations into kernel [launches](launch) with their arguments;
//! - [`streams`] derives dependencies between nodes and assigns them to streams;
//! - `layout` lays a plan out in a single allocation, [`executor`] runs it on a [`gpu`], with samplers' arithmetic between runs in the
//!   same allocation;
//! - `driver` implements the GPU with NVIDIA's driver, [`compile`] calls NVRTC, and `cache` keeps its output on disk; both libraries are
//!   loaded at run time;
//! - [`library`] describes operations that cuDNN and cuBLASLt can perform instead of kernels; `autotune` times both; [`installed`] calls those that are
//!   installed;
//! - [`probe`] reports which drivers, libraries and GPUs are available.
//!
//! The tests run the same kernels as C++ on the CPU (`tests/emulator`), also below a stand-in for NVIDIA's driver, so that everything
//! is tested without a GPU. `docs/cuda.md` lists what that cannot show.
#![deny(unsafe_code)]

mod autotune;
mod buffer_layout;
mod cache;
pub mod compile;
pub mod control;
mod driver;
pub mod executor;
mod ffi;
pub mod gpu;
pub mod installed;
pub mod launch;
mod layout;
pub mod library;
pub mod lower;
pub mod probe;
pub mod source;
pub mod streams;

pub use driver::CudaDevice;
pub use executor::GpuExecutor;
