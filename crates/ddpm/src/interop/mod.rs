//! Checkpoints of other programs, read and written: PyTorch's files, safetensors, folders of diffusers.
//!
//! | file | what |
//! |---|---|
//! | `pickle` | pickles by a closed list of names, without running anything |
//! | `file`, `dtype` | the containers and kinds of numbers: what tensors there are, and their numbers |
//! | `recognise` | which of our networks tensors are of, and its settings |
//! | `diffusers` | diffusers' files of settings, both ways |
//! | `torch` | `torch.save` |
//! | `import`, `export` | to a run, from a run |
//!
//! Files are taken for hostile: sizes are checked before memory is taken, and the time is linear in the file's length.

mod diffusers;
mod dtype;
mod export;
mod file;
mod import;
mod pickle;
mod recognise;
mod torch;

pub use export::{Format, export, export_over};
pub use import::{
    Imported, Options, UNKNOWN_DATA, read, read_bytes, read_index, read_settings, read_weights,
};
pub use recognise::Assumed;

#[cfg(test)]
mod tests;
