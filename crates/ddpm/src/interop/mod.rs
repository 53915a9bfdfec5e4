//! Import and export of other programs' checkpoints: PyTorch files, safetensors, diffusers folders.
//!
//! | file | contents |
//! |---|---|
//! | `pickle` | unpickling with an allow-list, without executing anything |
//! | `file`, `dtype` | container formats and dtypes: reading tensor values |
//! | `state_dicts` | the state dicts in a file, and what else it holds |
//! | `choose`, `roles` | which state dicts are weights of our networks, averaged or raw, and which to import |
//! | `detect` | a network's settings from the names and shapes of its tensors |
//! | `source` | diffusers folders and sharded weights |
//! | `embedded` | ddpm's settings and class names, stored with the weights |
//! | `diffusers` | diffusers' JSON configuration, both ways |
//! | `torch` | writing `torch.save` files |
//! | `import`, `export` | to a run, from a run |
//!
//! Input files are untrusted: sizes are checked before allocating, and reading takes time linear in the file's length.

mod choose;
mod diffusers;
mod dtype;
mod embedded;
mod export;
mod file;
mod import;
pub(crate) use embedded::EmbeddedTexts;
mod detect;
mod pickle;
mod roles;
mod source;
mod state_dicts;
mod torch;

pub use detect::Assumed;
pub use export::{Format, export, export_over};
pub use import::{
    ImportOptions, Imported, WeightSet, read, read_bytes, read_index, read_settings, read_weights,
};
pub use roles::Role;

#[cfg(test)]
mod tests;
