//! A static-shape graph of operations with gradients, planned into one memory arena and run many times.
//!
//! - [`graph`] holds tensors and nodes; [`ops`] is the closed set of operations, one file a family;
//! - [`autodiff`] adds the backward pass to the same graph;
//! - [`fuse`] joins operations that one kernel does in one pass;
//! - [`recompute`] forgets what the backward pass can make again;
//! - [`plan`] gives every tensor its place in one arena;
//! - [`executor`] says what an executor can do, [`cpu`] is the CPU's;
//! - [`rng`] has the counter-based random numbers.
//!
//! What may not live here: anything that knows of diffusion schedules, networks, files or the command line.
#![forbid(unsafe_code)]

pub mod autodiff;
pub mod cpu;
mod error;
pub mod executor;
pub mod fuse;
pub mod graph;
pub mod keep;
pub mod ops;
pub mod plan;
pub mod recompute;
pub mod rng;
mod scratch;
pub mod shape;
pub mod vectors;

pub use cpu::{CpuDevice, CpuExecutor};
pub use ddpm_kernels::Isa;
pub use ddpm_kernels::bf16::fma_throughput as bf16_multiply_add_rounds;
pub use ddpm_kernels::elementwise::fma_throughput;
pub use error::{Error, Result};
pub use executor::{AdamStep, Device, Draws, Executor, Footprint, NodeTime, StepOutcome, clip_scale};
pub use graph::{Graph, Tensor};
pub use plan::{ComputeOptions, MatmulDtype, Plan, PlanOptions, Region};
pub use scratch::MOST_THREADS;
pub use shape::{DType, Shape, TensorType};
pub use vectors::{BufferSpec, PlanVectors, Vector, Vectors};
