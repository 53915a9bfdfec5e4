//! A static-shape graph of operations with gradients, planned into one memory arena and run many times.
//!
//! - [`graph`] holds tensors and nodes; [`ops`] is the closed set of operations, one file per family;
//! - [`passes`] rewrite a graph: gradients, fusion, rematerialization, storage in bf16;
//! - [`plan`] assigns every tensor its range of one arena;
//! - [`executor`] defines what a device and an executor of plans do; each kind of device implements it in a crate of its own;
//! - [`plan_buffers`] defines the operations of samplers between two runs of a network.
//!
//! What may not live here: anything that knows of a device, of diffusion schedules, networks, files or the command line.
#![forbid(unsafe_code)]

mod error;
pub mod executor;
pub mod graph;
pub mod ops;
pub mod passes;
pub mod plan;
pub mod plan_buffers;
mod rng_key;
pub mod shape;

pub use error::{Error, Result};
pub use executor::{AdamStep, Device, Executor, Footprint, NodeTime, StepOutcome, clip_scale};
pub use graph::{Graph, Tensor};
pub use plan::{ComputeOptions, MatmulDtype, Plan, PlanOptions, Region};
pub use plan_buffers::{BufferId, BufferSpec, PlanBuffers};
pub use rng_key::RngKey;
pub use shape::{DType, Shape, TensorType};
