//! Checkpoints of other programs, read and written: PyTorch's files, safetensors, folders of diffusers.
//!
//! | file | what |
//! |---|---|
//! | `pickle` | pickles by a closed list of names, without running anything |
//! | `file`, `dtype` | the containers and dtypes: the tensors' values |
//! | `sets` | which sets of tensors a file has, and what else |
//! | `choose`, `roles` | which of them are weights of our networks, averaged or raw, and which is meant |
//! | `recognise` | the settings of a network by its tensors |
//! | `source` | the files of a folder, and of weights in several files |
//! | `own` | our settings and names of classes, beside the weights |
//! | `diffusers` | diffusers' files of settings, both ways |
//! | `torch` | `torch.save` |
//! | `import`, `export` | to a run, from a run |
//!
//! Files are taken for hostile: sizes are checked before memory is taken, and the time is linear in the file's length.

mod choose;
mod diffusers;
mod dtype;
mod export;
mod file;
mod import;
mod own;
pub(crate) use own::Texts;
mod pickle;
mod recognise;
mod roles;
mod sets;
mod source;
mod torch;

pub use export::{Format, export, export_over};
pub use import::{
    Imported, Options, UNKNOWN_DATA, WeightSet, read, read_bytes, read_index, read_settings, read_weights,
};
pub use recognise::Assumed;
pub use roles::Role;

#[cfg(test)]
mod tests;
