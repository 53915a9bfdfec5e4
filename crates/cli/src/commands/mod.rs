//! The commands, one file each.

pub mod bench;
pub mod completions;
pub mod config;
pub mod sample;
pub mod train;
