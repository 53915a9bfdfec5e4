//! Checkpoints: everything a run needs to continue as if it had never stopped.
//!
//! A checkpoint is a folder `step-0001000` in the run's `checkpoints/`:
//!
//! | file | content |
//! |---|---|
//! | `model.safetensors` | the weights, PyTorch's names and layouts, f32 |
//! | `ema.safetensors` | the averaged weights, if any |
//! | `ema-0.999.safetensors`, `power-0.05.safetensors` | additional averages, if configured |
//! | `optimizer.safetensors` | Adam's running means, `exp_avg.NAME` and `exp_avg_sq.NAME` |
//! | `manifest.json` | [`Manifest`]: the step, the settings, the hash of each file and of itself |
//!
//! It is written to a temporary folder next to its final path and renamed once all of it is on the disk, so that a folder
//! with a checkpoint's name is always complete. The same training state gives the same bytes.

mod folder;
mod manifest;
mod tensors;

use std::fs;
use std::io::{self, BufWriter, IntoInnerError, Write};
use std::path::{Path, PathBuf};

pub use folder::{
    Best, Newest, best, list, newest, newest_weights, note_best, path_of, retain, set_aside_after,
    sweep_orphans,
};
pub(crate) use folder::{
    OF_ANOTHER_RUN, forget_best, newest_manifest, newest_where, of_run, remove_superseded,
};
pub use manifest::{FileFacts, Manifest};
pub use tensors::{NamedTensor, check_fits};
pub(crate) use tensors::{TensorFile, check_extent, is_counter};

use crate::storage::{self, FileSystem, OsFileSystem};
use crate::{Error, Result};
use manifest::FORMAT;
pub(crate) use manifest::{hex, sha256};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use tensors::PART;

const MODEL: &str = "model.safetensors";
pub(crate) const EMA: &str = "ema.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const MANIFEST: &str = "manifest.json";
/// The noun for error messages.
const CHECKPOINT: &str = "checkpoint";
/// The files a manifest may list, besides averages.
const FILES: [&str; 3] = [MODEL, EMA, OPTIMIZER];
/// Prefixes of the names of additional averages: EMAs with another decay, and power-function averages.
pub(crate) const DECAY: &str = "ema-";
pub(crate) const POWER: &str = "power-";
pub(crate) const SAFETENSORS: &str = ".safetensors";
/// Prefixes of the optimizer's tensors.
const EXP_AVG: &str = "exp_avg.";
const EXP_AVG_SQ: &str = "exp_avg_sq.";
/// Maximum size of a weights file, in bytes.
pub(crate) const MAX_WEIGHTS: u64 = 8 << 30;

/// A run's state after some step.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its description; [`save`] completes it.
    pub manifest: Manifest,
    /// The weights.
    pub weights: Vec<NamedTensor>,
    /// The averaged weights, with the same names and shapes; empty without averaging.
    pub ema: Vec<NamedTensor>,
    /// Additional averages by name, e.g. `ema-0.999`, with the same names and shapes.
    pub averages: Vec<(String, Vec<NamedTensor>)>,
    /// Adam's running mean of the gradients, named like the weights.
    pub exp_avg: Vec<NamedTensor>,
    /// Adam's running mean of the squared gradients, named like `exp_avg`.
    pub exp_avg_sq: Vec<NamedTensor>,
}

/// Whether a name is that of an additional average, e.g. `ema-0.999`; it is then also its file's name without the extension.
fn is_average(name: &str) -> bool {
    let number = name.strip_prefix(DECAY).or_else(|| name.strip_prefix(POWER));
    number.is_some_and(|n| {
        !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'-'))
    })
}

/// The average stored in a file of this name.
fn average_of(file: &str) -> Option<&str> {
    file.strip_suffix(SAFETENSORS).filter(|name| is_average(name))
}

/// Which of a checkpoint's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightsChoice {
    /// The averaged ones.
    Ema,
    /// The ones the optimizer updates.
    Raw,
    /// The averaged ones if there are any, else the raw ones.
    Auto,
    /// An additional average, by name: `ema-0.999`, `power-0.05`.
    Average(String),
    /// A `.safetensors` file outside a checkpoint ([`posthoc`](crate::train::posthoc)).
    File(PathBuf),
}

impl WeightsChoice {
    /// The path they are read from, for errors: the checkpoint, or the file.
    pub fn origin<'a>(&'a self, checkpoint: &'a Path) -> &'a Path {
        if let Self::File(file) = self { file } else { checkpoint }
    }

    /// The weights in a checkpoint's file of this name; `None` for a file without weights.
    pub fn of_checkpoint_file(name: &str) -> Option<Self> {
        match name {
            MODEL => Some(Self::Raw),
            EMA => Some(Self::Ema),
            name => average_of(name).map(|average| Self::Average(average.to_owned())),
        }
    }
}

impl std::str::FromStr for WeightsChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "ema" => Self::Ema,
            "raw" => Self::Raw,
            name if is_average(name) => Self::Average(name.to_owned()),
            path if path.ends_with(SAFETENSORS) => Self::File(path.into()),
            _ => {
                let reason = format!(
                    "unknown weights {text:?}; give auto, ema, raw, the name of another average such as ema-0.999 or power-0.05, \
                     or a {SAFETENSORS} file"
                );
                return Err(Error::Config { key: "weights".to_owned(), reason });
            }
        })
    }
}

/// Writes `checkpoint` as the folder `dir/step-…` and returns its path. Replaces one of the same step.
///
/// # Errors
/// [`Error::Io`] if the disk is full or cannot be written to; existing checkpoints are then unchanged.
/// [`Error::Checkpoint`] for inconsistent tensors.
pub fn save(dir: &Path, checkpoint: &Checkpoint) -> Result<PathBuf> {
    create_folder(dir, "create the folder of checkpoints")?;
    save_on(&OsFileSystem, dir, checkpoint)
}

/// Creates the folder, but not its parents: if the run's own folder is missing, it was deleted.
fn create_folder(dir: &Path, doing: &'static str) -> Result<()> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created.map_err(Error::io(dir, doing)),
    }
}

fn save_on(fs: &dyn FileSystem, dir: &Path, checkpoint: &Checkpoint) -> Result<PathBuf> {
    let path = path_of(dir, checkpoint.manifest.step);
    let temporary = folder::temporary(&path);
    check_consistent(checkpoint).map_err(|reason| Error::Checkpoint { path: path.clone(), reason })?;
    // Left over from a failed attempt of this process.
    let _ = fs::remove_dir_all(&temporary);
    let io = |e| {
        let error = Error::io(&path, "move the checkpoint to its final path")(e);
        with_advice(error, dir, CHECKPOINT, num_elements(checkpoint))
    };
    let done = write_files(fs, &temporary, checkpoint)
        .and_then(|()| move_into_place(fs, dir, &temporary, &path).map_err(io));
    if done.is_err() {
        // Best effort: otherwise the next start removes it.
        let _ = fs::remove_dir_all(&temporary);
    }
    done.map(|()| path)
}

/// Renames the folder `temporary` to `path` in `dir`. An existing one stays intact until then.
fn move_into_place(fs: &dyn FileSystem, dir: &Path, temporary: &Path, path: &Path) -> io::Result<()> {
    let old = folder::replaced(path);
    let replaces = match fs.rename(path, &old) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(e),
    };
    if let Err(e) = fs.rename(temporary, path) {
        if replaces {
            // If this fails too, the next start restores it.
            let _ = fs.rename(&old, path);
        }
        return Err(e);
    }
    let synced = fs.sync_dir(dir);
    if replaces {
        // The next start removes any remains.
        let _ = fs::remove_dir_all(&old);
    }
    synced
}

/// Writes all files into the new folder `folder`, the manifest last, and waits until they are on the disk.
fn write_files(fs: &dyn FileSystem, folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    const DOING: &str = "write the checkpoint";
    let dir = folder.parent().unwrap_or(folder);
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e| with_advice(Error::io(path, DOING)(e), dir, CHECKPOINT, num_elements(checkpoint))
    };
    fs.create_dir(folder).map_err(io(folder))?;
    let mut manifest = checkpoint.manifest.clone();
    (manifest.format, manifest.library) = (FORMAT, format!("ddpm {}", env!("CARGO_PKG_VERSION")));
    // JSON cannot represent other values.
    manifest.loss = manifest.loss.filter(|l| l.is_finite());
    manifest.files.clear();
    let averages = checkpoint.averages.iter().map(|(name, set)| (format!("{name}{SAFETENSORS}"), Some(set)));
    let moments = || {
        let exp_avg = checkpoint.exp_avg.iter().map(|t| (EXP_AVG, t));
        exp_avg.chain(checkpoint.exp_avg_sq.iter().map(|t| (EXP_AVG_SQ, t)))
    };
    let mut files = Vec::new();
    for (name, average) in FILES.into_iter().map(|name| (name.to_owned(), None)).chain(averages) {
        let file = match (name.as_str(), average) {
            (_, Some(set)) => TensorFile::new(set.iter().map(|t| ("", t)), &[]),
            (EMA, _) if checkpoint.ema.is_empty() => continue,
            (EMA, _) => TensorFile::new(checkpoint.ema.iter().map(|t| ("", t)), &[]),
            (OPTIMIZER, _) => TensorFile::new(moments(), &[]),
            _ => TensorFile::new(checkpoint.weights.iter().map(|t| ("", t)), &[]),
        };
        let path = folder.join(&name);
        let file = file.map_err(|reason| Error::Checkpoint { path: path.clone(), reason })?;
        files.push((name, path, file));
    }
    // In parallel; the largest first, so that none is left over at the end.
    files.sort_by_key(|(_, _, file)| std::cmp::Reverse(file.len()));
    let write = |(name, path, file): &(String, PathBuf, TensorFile<'_>)| {
        write_tensors(fs, path, file).map(|facts| (name.clone(), facts)).map_err(io(path))
    };
    manifest.files.extend(files.par_iter().with_max_len(1).map(write).collect::<Result<Vec<_>>>()?);
    let path = folder.join(MANIFEST);
    let bytes =
        manifest.to_bytes().map_err(|e| Error::Checkpoint { path: path.clone(), reason: e.to_string() })?;
    storage::write_synced(fs, &path, &bytes).map_err(io(&path))?;
    fs.sync_dir(folder).map_err(io(folder))
}

/// Writes a new file of tensors, hashing it on the way, and waits until it is on the disk.
fn write_tensors(fs: &dyn FileSystem, path: &Path, file: &TensorFile<'_>) -> io::Result<FileFacts> {
    let (mut out, mut sha) = (BufWriter::with_capacity(PART, fs.create(path)?), Sha256::new());
    file.write(&mut |part| {
        sha.update(part);
        out.write_all(part)
    })?;
    out.into_inner().map_err(IntoInnerError::into_error)?.sync()?;
    Ok(FileFacts { bytes: file.len() as u64, sha256: hex(&sha.finalize()) })
}

/// Number of elements of all tensors of a checkpoint.
fn num_elements(checkpoint: &Checkpoint) -> usize {
    let sets = [&checkpoint.weights, &checkpoint.ema, &checkpoint.exp_avg, &checkpoint.exp_avg_sq];
    let sets = sets.into_iter().chain(checkpoint.averages.iter().map(|(_, set)| set));
    sets.flatten().map(|t| t.data.len()).sum()
}

/// Adds to an error while writing a checkpoint (or a snapshot, `what`) into the folder `dir` that the earlier ones are
/// intact, and for a full disk how much space is needed.
fn with_advice(error: Error, dir: &Path, what: &str, elements: usize) -> Error {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    let earlier = if list(dir).is_ok_and(|steps| !steps.is_empty()) {
        format!("earlier {what}s are intact")
    } else {
        format!("there is no earlier {what}")
    };
    match error {
        Error::Io { path, doing, source } if matches!(source.kind(), StorageFull | QuotaExceeded) => {
            let megabytes = (elements as u64 * 4).div_ceil(1_000_000).max(1);
            let help = format!(
                "{source}; a {what} of this run takes {megabytes} MB: free some space and resume; {earlier}"
            );
            Error::Io { path, doing, source: io::Error::new(source.kind(), help) }
        }
        Error::Io { path, doing, source } => {
            let help = format!("{source}; fix this and resume; {earlier}");
            Error::Io { path, doing, source: io::Error::new(source.kind(), help) }
        }
        other => other,
    }
}

/// Checks that the sets of tensors have the same names and shapes; the error is only the reason.
fn check_consistent(checkpoint: &Checkpoint) -> Result<(), String> {
    let shapes = |set: &[NamedTensor]| -> Vec<(String, Vec<usize>)> {
        let mut all: Vec<_> = set.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        all.sort();
        all
    };
    let (weights, ema) = (shapes(&checkpoint.weights), shapes(&checkpoint.ema));
    let (first, second) = (shapes(&checkpoint.exp_avg), shapes(&checkpoint.exp_avg_sq));
    // The first entry of `a` that `b` lacks or has with another shape.
    let missing = |a: &[(String, Vec<usize>)], b: &[(String, Vec<usize>)]| {
        a.iter().find(|t| b.binary_search(t).is_err()).map(|(name, shape)| format!("{name} {shape:?}"))
    };
    for (a, a_file, b, b_file) in [
        (&ema, EMA, &weights, MODEL),
        (&weights, MODEL, if ema.is_empty() { &weights } else { &ema }, EMA),
        (&first, "optimizer.safetensors, exp_avg,", &weights, MODEL),
        (&first, "optimizer.safetensors, exp_avg,", &second, "optimizer.safetensors, exp_avg_sq,"),
        (&second, "optimizer.safetensors, exp_avg_sq,", &first, "optimizer.safetensors, exp_avg,"),
    ] {
        if let Some(tensor) = missing(a, b) {
            return Err(format!("{a_file} has the tensor {tensor}, but {b_file} does not"));
        }
    }
    for (name, set) in &checkpoint.averages {
        if !is_average(name) {
            return Err(format!("{name:?} is not the name of an average"));
        }
        if shapes(set) != weights {
            return Err(format!("the tensors of {name}{SAFETENSORS} differ from those of {MODEL}"));
        }
    }
    Ok(())
}

/// The mean loss recorded in a checkpoint: `Some(None)` if it was written before the first step, `None` if its manifest
/// cannot be read.
pub fn loss_of(path: &Path) -> Option<Option<f64>> {
    Manifest::read(path).ok().map(|manifest| manifest.loss)
}

/// Reads the checkpoint in the folder `path`. The tensors are sorted by name.
///
/// # Errors
/// [`Error::Checkpoint`] for missing, damaged or inconsistent files, with an older checkpoint that could be used.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let read = || -> Result<Checkpoint, String> {
        let manifest = Manifest::read(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = folder::step_of(&name).filter(|&step| step != manifest.step) {
            return Err(format!(
                "{MANIFEST}: is of step {}, but the folder's name says {step}",
                manifest.step
            ));
        }
        let file = |name: &str| manifest.read_file(path, name, tensors::from_bytes);
        let weights = file(MODEL)?;
        let ema = if manifest.has_ema() { file(EMA)? } else { Vec::new() };
        let names = manifest.files.keys().filter_map(|f| average_of(f).map(str::to_owned));
        let averages = names.map(|name| Ok((file(&format!("{name}{SAFETENSORS}"))?, name)));
        let averages: Vec<_> = averages
            .map(|r: Result<_, String>| r.map(|(set, name)| (name, set)))
            .collect::<Result<_, _>>()?;
        let (mut exp_avg, mut exp_avg_sq) = (Vec::new(), Vec::new());
        for mut tensor in file(OPTIMIZER)? {
            let (set, name) = match (tensor.name.strip_prefix(EXP_AVG), tensor.name.strip_prefix(EXP_AVG_SQ))
            {
                (Some(name), _) => (&mut exp_avg, name.to_owned()),
                (_, Some(name)) => (&mut exp_avg_sq, name.to_owned()),
                _ => {
                    return Err(format!(
                        "{OPTIMIZER}: the tensor {} is not part of Adam's state",
                        tensor.name
                    ));
                }
            };
            tensor.name = name;
            set.push(tensor);
        }
        let checkpoint = Checkpoint { manifest, weights, ema, averages, exp_avg, exp_avg_sq };
        check_consistent(&checkpoint)?;
        Ok(checkpoint)
    };
    read().map_err(|reason| folder::unusable(path, reason))
}

/// Reads only the weights of the checkpoint in the folder `path`, sorted by name, without the optimizer state.
///
/// # Errors
/// As [`load`]; [`WeightsChoice::Ema`] if the run has no averages.
pub fn load_weights_only(path: &Path, which: &WeightsChoice) -> Result<(Manifest, Vec<NamedTensor>)> {
    let unusable = |reason| folder::unusable(path, reason);
    let manifest = Manifest::read(path).map_err(unusable)?;
    let weights = match which {
        WeightsChoice::File(file) => read_weights_file(file)?,
        which => {
            let name = weights_file(&manifest, which)
                .map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
            manifest.read_file(path, &name, tensors::from_bytes).map_err(unusable)?
        }
    };
    Ok((manifest, weights))
}

/// SHA-256 of the weights file that [`load_weights_only`] reads, in hexadecimal; for a checkpoint, taken from its manifest.
///
/// # Errors
/// As [`load_weights_only`].
pub fn weights_sha256(path: &Path, which: &WeightsChoice) -> Result<String> {
    if let WeightsChoice::File(file) = which {
        return Ok(sha256(&storage::read(file, "read the weights", MAX_WEIGHTS)?));
    }
    let manifest = Manifest::read(path).map_err(|reason| folder::unusable(path, reason))?;
    let wrong = |reason| Error::Checkpoint { path: path.to_owned(), reason };
    let name = weights_file(&manifest, which).map_err(wrong)?;
    let facts = manifest.files.get(&name).map(|facts| facts.sha256.clone());
    facts.ok_or_else(|| folder::unusable(path, format!("its manifest does not list {name}")))
}

/// The checkpoint file with these weights; the error is only the reason.
fn weights_file(manifest: &Manifest, which: &WeightsChoice) -> Result<String, String> {
    Ok(match which {
        WeightsChoice::Average(name) => {
            let file = format!("{name}{SAFETENSORS}");
            if !manifest.files.contains_key(&file) {
                let available: Vec<&str> = manifest.files.keys().filter_map(|f| average_of(f)).collect();
                return Err(if available.is_empty() {
                    format!(
                        "has no average {name:?}; it has no additional averages (ema.extra_decays, ema.power_widths)"
                    )
                } else {
                    format!("has no average {name:?}; there are {}", available.join(", "))
                });
            }
            file
        }
        WeightsChoice::Ema if !manifest.has_ema() => {
            return Err("has no averaged weights (ema.decay was 0); use the raw ones".into());
        }
        WeightsChoice::Auto if !manifest.has_ema() => MODEL.to_owned(),
        WeightsChoice::Ema | WeightsChoice::Auto => EMA.to_owned(),
        WeightsChoice::Raw | WeightsChoice::File(_) => MODEL.to_owned(),
    })
}

/// Writes averages as the folder `dir/step-…`, one file each, and returns its path; [`posthoc`](crate::train::posthoc)
/// combines them. Replaces one of the same step.
///
/// # Errors
/// [`Error::Io`]; existing snapshots are then unchanged.
pub fn save_snapshot(dir: &Path, step: u64, averages: &[(String, Vec<NamedTensor>)]) -> Result<PathBuf> {
    create_folder(dir, "create the folder of snapshots")?;
    save_snapshot_on(&OsFileSystem, dir, step, averages)
}

fn save_snapshot_on(
    fs: &dyn FileSystem,
    dir: &Path,
    step: u64,
    averages: &[(String, Vec<NamedTensor>)],
) -> Result<PathBuf> {
    let elements = averages.iter().flat_map(|(_, set)| set).map(|t| t.data.len()).sum();
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e| with_advice(Error::io(path, "write the snapshot")(e), dir, "snapshot", elements)
    };
    let path = path_of(dir, step);
    let temporary = folder::temporary(&path);
    // Left over from a failed attempt of this process.
    let _ = fs::remove_dir_all(&temporary);
    let write = || -> Result<()> {
        fs.create_dir(&temporary).map_err(io(&temporary))?;
        for (name, set) in averages {
            let file = temporary.join(format!("{name}{SAFETENSORS}"));
            let tensors = TensorFile::new(set.iter().map(|t| ("", t)), &[])
                .map_err(|reason| Error::Checkpoint { path: file.clone(), reason })?;
            write_tensors(fs, &file, &tensors).map_err(io(&file))?;
        }
        fs.sync_dir(&temporary).map_err(io(&temporary))?;
        move_into_place(fs, dir, &temporary, &path).map_err(io(&path))
    };
    let done = write();
    if done.is_err() {
        // Best effort: otherwise the next start removes it.
        let _ = fs::remove_dir_all(&temporary);
    }
    done.map(|()| path)
}

/// Reads the weights of a `.safetensors` file outside a checkpoint, sorted by name.
///
/// # Errors
/// [`Error::Io`], and [`Error::Checkpoint`] for a file that is damaged or not f32.
pub fn read_weights_file(path: &Path) -> Result<Vec<NamedTensor>> {
    let bytes = storage::read(path, "read the weights", MAX_WEIGHTS)?;
    tensors::from_bytes(&bytes).map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })
}

#[cfg(test)]
mod tests;
