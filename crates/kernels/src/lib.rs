//! CPU arithmetic on slices of f32, channels last.
//!
//! Each algorithm is written once, generic over pulp's vector types; [`Isa`] holds the proof that an instruction set
//! was detected, and one macro there is the only place that chooses between them. [`reference`](mod@reference) has
//! the naive version of everything: the oracle that the tests compare every kernel with, on every instruction set
//! that the machine has.
//!
//! What lives here: arithmetic on slices of one task. What may not: threads, allocation on the hot path, graphs. pulp carries
//! the `unsafe`, but for instructions that it does not have (`bf16.rs`, `prefetch.rs`).
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
