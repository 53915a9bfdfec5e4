//! The program as a person meets it: the built `ddpm`, run in a folder of its own.

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
