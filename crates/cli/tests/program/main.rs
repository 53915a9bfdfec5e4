//! End-to-end tests: the built `ddpm`, run in a temporary folder.

mod bench;
mod commands;
mod data;
#[cfg(unix)]
mod documents;
mod editing;
mod errors;
mod eval;
mod interop;
#[cfg(unix)]
mod interruption;
mod overwriting;
mod resuming;
mod runs;
mod sampling;
mod show;
mod support;
