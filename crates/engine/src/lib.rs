//! A static-shape graph of operations with gradients, planned into one memory arena and run many times.
//!
//! - [`graph`] holds tensors and nodes; [`ops`] is the closed set of operations, one file per family;
//! - [`autodiff`] adds the backward pass to the same graph;
//! - [`fuse`] merges operations that one kernel computes in one pass;
//! - [`recompute`] drops activations that the backward pass can cheaply recompute;
//! - [`bf16_storage`] stores tensors in bf16;
//! - [`plan`] assigns every tensor its range of one arena;
//! - [`executor`] defines what an executor does, [`cpu`] is the CPU's;
//! - [`sampler_buffers`] defines the operations of samplers between two runs of a network;
//! - [`rng`] has the counter-based random numbers.
//!
//! What may not live here: anything that knows of diffusion schedules, networks, files or the command line.
#![forbid(unsafe_code)]

pub mod autodiff;
pub mod bf16_storage;
pub mod cpu;
mod error;
pub mod executor;
pub mod fuse;
pub mod graph;
pub mod ops;
pub mod plan;
pub mod recompute;
pub mod sampler_buffers;
mod scratch;
pub mod shape;

pub use cpu::{CpuDevice, CpuExecutor};
pub use ddpm_kernels::Isa;
pub use ddpm_kernels::elementwise::{bf16_fma_throughput, fma_throughput};
pub use ddpm_rng as rng;
pub use error::{Error, Result};
pub use executor::{AdamStep, Device, Executor, Footprint, NodeTime, RngKey, StepOutcome, clip_scale};
pub use graph::{Graph, Tensor};
pub use plan::{ComputeOptions, MatmulDtype, Plan, PlanOptions, Region};
pub use sampler_buffers::{BufferId, BufferSpec, PlanBuffers, SamplerBuffers};
pub use scratch::MAX_THREADS;
pub use shape::{DType, Shape, TensorType};
