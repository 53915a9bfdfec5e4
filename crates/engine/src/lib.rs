//! A static-shape graph of operations with gradients, planned into one memory arena.
#![forbid(unsafe_code)]

pub mod rng;
