//! Passes: each rewrites a graph into another that computes the same, or nearly the same.
//!
//! A network is built unfused; [`fuse`] comes first, then [`autodiff`] adds the backward pass, then [`recompute`] saves memory.
//! Executors apply [`bf16_storage`] before they plan.

pub mod autodiff;
pub mod bf16_storage;
pub mod fuse;
pub mod recompute;
