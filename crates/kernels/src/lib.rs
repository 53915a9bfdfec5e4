//! CPU kernels on f32 slices, channels last.
//!
//! Each algorithm is written once, generic over pulp's vector types. An [`Isa`] value proves that an
//! instruction set was detected, and one macro in `isa.rs` is the only place that dispatches on it.
//! [`reference`](mod@reference) has a naive version of every kernel: the oracle that the tests compare each
//! kernel against, on every instruction set of the machine.
//!
//! What belongs here: arithmetic on the slices of one task. What does not: threads, allocation on the hot
//! path, graphs. pulp encapsulates the `unsafe`, except for instructions it lacks (`bf16.rs`, `prefetch.rs`).
#![deny(unsafe_code)]

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod bf16;
pub mod bound;
pub mod conv;
pub mod elementwise;
pub mod isa;
pub mod layer_norm;
pub mod loss;
pub mod norm;
pub mod pool;
mod prefetch;
pub mod random;
pub mod reference;
pub mod resample;
mod tile;
pub mod vector;

pub use isa::{Isa, IsaError};
