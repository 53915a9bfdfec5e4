//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `step-0001000` below the run's `checkpoints/`:
//!
//! | file | content |
//! |---|---|
//! | `model.safetensors` | the weights, PyTorch's names and layouts, f32 |
//! | `ema.safetensors` | the averaged weights, if there are any |
//! | `ema-0.999.safetensors`, `power-0.05.safetensors` | other averages, if the settings ask for them |
//! | `optimizer.safetensors` | Adam's running means, `exp_avg.NAME` and `exp_avg_sq.NAME` |
//! | `manifest.json` | [`Manifest`]: the step, the settings, each file's hash, its own hash |
//!
//! It is written in a folder beside its place and renamed when all of it is on the disk, so that a folder with a
//! checkpoint's name is a whole checkpoint. The same training state gives the same bytes.

mod folder;
mod manifest;
mod tensors;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use folder::{
    Best, Newest, best, list, newest, newest_weights, note_best, path_of, retain, set_aside_after,
    sweep_orphans,
};
pub(crate) use folder::{OF_ANOTHER, forget_best, newest_manifest, newest_where, of_run, sweep_overtaken};
pub use manifest::{FileFacts, Manifest};
pub use tensors::{NamedTensor, check_fits};
pub(crate) use tensors::{check_extent, is_counter, to_bytes, to_bytes_with};

use super::disk::{self, Disk, RealDisk};
use crate::{Error, Result};
use manifest::FORMAT;
pub(crate) use manifest::sha256;

const MODEL: &str = "model.safetensors";
pub(crate) const EMA: &str = "ema.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const MANIFEST: &str = "manifest.json";
/// What errors call it.
const CHECKPOINT: &str = "checkpoint";
/// The files a manifest may list.
const FILES: [&str; 3] = [MODEL, EMA, OPTIMIZER];
/// What the names of other averages begin with: those with a decay of their own, and power-function averages.
pub(crate) const DECAY: &str = "ema-";
pub(crate) const POWER: &str = "power-";
pub(crate) const SAFETENSORS: &str = ".safetensors";
/// Prefixes of the optimiser's tensors.
const EXP_AVG: &str = "exp_avg.";
const EXP_AVG_SQ: &str = "exp_avg_sq.";
/// Largest file of weights that is read, in bytes.
pub(crate) const MAX_WEIGHTS: u64 = 8 << 30;

/// A run's state after some step.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// What it is; [`save`] completes it.
    pub manifest: Manifest,
    /// The weights.
    pub weights: Vec<NamedTensor>,
    /// The averaged weights, of the same names and shapes; empty without averaging.
    pub ema: Vec<NamedTensor>,
    /// Other averages by name, as `ema-0.999`; of the same names and shapes.
    pub averages: Vec<(String, Vec<NamedTensor>)>,
    /// Adam's running mean of the gradients, named as the weights.
    pub exp_avg: Vec<NamedTensor>,
    /// Adam's running mean of the squared gradients, named as `exp_avg`.
    pub exp_avg_sq: Vec<NamedTensor>,
}

/// Whether a name is of an average besides the first, as `ema-0.999`; then it is a file's name without its end, too.
fn is_average(name: &str) -> bool {
    let number = name.strip_prefix(DECAY).or_else(|| name.strip_prefix(POWER));
    number.is_some_and(|n| {
        !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'-'))
    })
}

/// The average whose file has this name.
fn average_of(file: &str) -> Option<&str> {
    file.strip_suffix(SAFETENSORS).filter(|name| is_average(name))
}

/// Which of a checkpoint's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The averaged ones.
    Ema,
    /// The ones the optimiser works on.
    Raw,
    /// The averaged ones where there are any, else the raw ones.
    Auto,
    /// Another average, by its name: `ema-0.999`, `power-0.05`.
    Average(String),
    /// Those of a `.safetensors` file that belongs to no checkpoint ([`posthoc`](crate::train::posthoc)).
    File(PathBuf),
}

impl Which {
    /// Where they are read from, for errors: the checkpoint, or the file.
    pub fn origin<'a>(&'a self, checkpoint: &'a Path) -> &'a Path {
        if let Self::File(file) = self { file } else { checkpoint }
    }

    /// Those that are in a file of a checkpoint; `None` for a file that holds none.
    pub fn of_checkpoint_file(name: &str) -> Option<Self> {
        match name {
            MODEL => Some(Self::Raw),
            EMA => Some(Self::Ema),
            name => average_of(name).map(|average| Self::Average(average.to_owned())),
        }
    }
}

impl std::str::FromStr for Which {
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
                    "{text:?} is none; give auto, ema, raw, the name of another average as ema-0.999 or power-0.05, or a \
                     {SAFETENSORS} file"
                );
                return Err(Error::Config { key: "weights".to_owned(), reason });
            }
        })
    }
}

/// Writes `checkpoint` as the folder `dir/step-…` and gives its path. One of the same step is replaced.
///
/// # Errors
/// [`Error::Io`] if the disk is full or cannot be written; nothing that was there is changed then.
/// [`Error::Checkpoint`] for tensors that contradict each other.
pub fn save(dir: &Path, checkpoint: &Checkpoint) -> Result<PathBuf> {
    make_folder(dir, "make the folder of checkpoints")?;
    save_on(&RealDisk, dir, checkpoint)
}

/// Makes the folder, not those above it: where the run's own is gone, it was removed.
fn make_folder(dir: &Path, doing: &'static str) -> Result<()> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map_err(Error::io(dir, doing)),
    }
}

fn save_on(disk: &dyn Disk, dir: &Path, checkpoint: &Checkpoint) -> Result<PathBuf> {
    let path = path_of(dir, checkpoint.manifest.step);
    let temporary = folder::temporary(&path);
    consistent(checkpoint).map_err(|reason| Error::Checkpoint { path: path.clone(), reason })?;
    // Left by an attempt of this process that could not clean up after itself.
    let _ = fs::remove_dir_all(&temporary);
    let io = |e| {
        helpful(Error::io(&path, "put the checkpoint in its place")(e), dir, CHECKPOINT, numbers(checkpoint))
    };
    let done = write_files(disk, &temporary, checkpoint)
        .and_then(|()| put_in_place(disk, dir, &temporary, &path).map_err(io));
    if done.is_err() {
        // Best effort: the next start sweeps it otherwise.
        let _ = fs::remove_dir_all(&temporary);
    }
    done.map(|()| path)
}

/// Gives the folder `temporary` its place `path` in `dir`. One that is there is whole until then.
fn put_in_place(disk: &dyn Disk, dir: &Path, temporary: &Path, path: &Path) -> io::Result<()> {
    let old = folder::replaced(path);
    let replaces = match disk.rename(path, &old) {
        Ok(()) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(e),
    };
    if let Err(e) = disk.rename(temporary, path) {
        if replaces {
            // Should this fail too, the next start's sweep puts it back.
            let _ = disk.rename(&old, path);
        }
        return Err(e);
    }
    let synced = disk.sync_dir(dir);
    if replaces {
        // The next start's sweep removes what is left of it.
        let _ = fs::remove_dir_all(&old);
    }
    synced
}

/// Writes all files into the new folder `folder`, the manifest last, and waits until they are on the disk.
fn write_files(disk: &dyn Disk, folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    const DOING: &str = "write the checkpoint";
    let dir = folder.parent().unwrap_or(folder);
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e| helpful(Error::io(path, DOING)(e), dir, CHECKPOINT, numbers(checkpoint))
    };
    disk.create_dir(folder).map_err(io(folder))?;
    let mut manifest = checkpoint.manifest.clone();
    (manifest.format, manifest.library) = (FORMAT, format!("ddpm {}", env!("CARGO_PKG_VERSION")));
    // JSON has no number for these.
    manifest.loss = manifest.loss.filter(|l| l.is_finite());
    manifest.files.clear();
    let averages = checkpoint.averages.iter().map(|(name, set)| (format!("{name}{SAFETENSORS}"), Some(set)));
    let moments = || {
        let first = checkpoint.exp_avg.iter().map(|t| (EXP_AVG, t));
        first.chain(checkpoint.exp_avg_sq.iter().map(|t| (EXP_AVG_SQ, t)))
    };
    for (name, average) in FILES.into_iter().map(|name| (name.to_owned(), None)).chain(averages) {
        let path = folder.join(&name);
        let bytes = match (name.as_str(), average) {
            (_, Some(set)) => to_bytes(set.iter().map(|t| ("", t))),
            (EMA, _) if checkpoint.ema.is_empty() => continue,
            (EMA, _) => to_bytes(checkpoint.ema.iter().map(|t| ("", t))),
            (OPTIMIZER, _) => to_bytes(moments()),
            _ => to_bytes(checkpoint.weights.iter().map(|t| ("", t))),
        };
        let bytes = bytes.map_err(|reason| Error::Checkpoint { path: path.clone(), reason })?;
        disk::write(disk, &path, &bytes).map_err(io(&path))?;
        let facts = FileFacts { bytes: bytes.len() as u64, sha256: sha256(&bytes) };
        manifest.files.insert(name, facts);
    }
    let path = folder.join(MANIFEST);
    let bytes =
        manifest.to_bytes().map_err(|e| Error::Checkpoint { path: path.clone(), reason: e.to_string() })?;
    disk::write(disk, &path, &bytes).map_err(io(&path))?;
    disk.sync_dir(folder).map_err(io(folder))
}

/// All numbers of a checkpoint's tensors.
fn numbers(checkpoint: &Checkpoint) -> usize {
    let sets = [&checkpoint.weights, &checkpoint.ema, &checkpoint.exp_avg, &checkpoint.exp_avg_sq];
    let sets = sets.into_iter().chain(checkpoint.averages.iter().map(|(_, set)| set));
    sets.flatten().map(|t| t.data.len()).sum()
}

/// Adds to an error in writing a checkpoint (or a snapshot, `what`) into the folder `dir`, of so many numbers, that those before are
/// whole, and for a full disk how much room is needed.
fn helpful(error: Error, dir: &Path, what: &str, numbers: usize) -> Error {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    let before = match list(dir).is_ok_and(|steps| !steps.is_empty()) {
        true => format!("the {what}s before it are whole"),
        false => format!("there is no {what} before it"),
    };
    match error {
        Error::Io { path, doing, source } if matches!(source.kind(), StorageFull | QuotaExceeded) => {
            let megabytes = (numbers as u64 * 4).div_ceil(1_000_000).max(1);
            let help = format!(
                "{source}; a {what} of this run takes {megabytes} MB: make room and resume; {before}"
            );
            Error::Io { path, doing, source: io::Error::new(source.kind(), help) }
        }
        Error::Io { path, doing, source } => {
            let help = format!("{source}; mend this and resume; {before}");
            Error::Io { path, doing, source: io::Error::new(source.kind(), help) }
        }
        other => other,
    }
}

/// Whether the sets of tensors belong together; the error is the reason alone.
fn consistent(checkpoint: &Checkpoint) -> Result<(), String> {
    let shapes = |set: &[NamedTensor]| -> Vec<(String, Vec<usize>)> {
        let mut all: Vec<_> = set.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        all.sort();
        all
    };
    let (weights, ema) = (shapes(&checkpoint.weights), shapes(&checkpoint.ema));
    let (first, second) = (shapes(&checkpoint.exp_avg), shapes(&checkpoint.exp_avg_sq));
    // Entries of `a` that `b` has not, or has in another shape.
    let lacks = |a: &[(String, Vec<usize>)], b: &[(String, Vec<usize>)]| {
        a.iter().find(|t| b.binary_search(t).is_err()).map(|(name, shape)| format!("{name} {shape:?}"))
    };
    for (a, a_file, b, b_file) in [
        (&ema, EMA, &weights, MODEL),
        (&weights, MODEL, if ema.is_empty() { &weights } else { &ema }, EMA),
        (&first, "optimizer.safetensors, exp_avg,", &weights, MODEL),
        (&first, "optimizer.safetensors, exp_avg,", &second, "optimizer.safetensors, exp_avg_sq,"),
        (&second, "optimizer.safetensors, exp_avg_sq,", &first, "optimizer.safetensors, exp_avg,"),
    ] {
        if let Some(tensor) = lacks(a, b) {
            return Err(format!("{a_file} has the tensor {tensor}, {b_file} has not"));
        }
    }
    for (name, set) in &checkpoint.averages {
        if !is_average(name) {
            return Err(format!("{name:?} is no name of an average"));
        }
        if shapes(set) != weights {
            return Err(format!("{name}{SAFETENSORS} has other tensors than {MODEL}"));
        }
    }
    Ok(())
}

/// The mean loss that a checkpoint was written with: none where it was written before the first step. `None` where its manifest
/// cannot be read.
pub fn loss_of(path: &Path) -> Option<Option<f64>> {
    Manifest::read(path).ok().map(|manifest| manifest.loss)
}

/// Reads the checkpoint in the folder `path`. The tensors come in the order of their names.
///
/// # Errors
/// [`Error::Checkpoint`] for files that are missing, damaged or contradict each other, with the older checkpoints
/// that could be used.
pub fn load(path: &Path) -> Result<Checkpoint> {
    let read = || -> Result<Checkpoint, String> {
        let manifest = Manifest::read(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = folder::step_of(&name).filter(|&step| step != manifest.step) {
            return Err(format!(
                "{MANIFEST}: is of step {}, and the folder's name says {step}",
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
                _ => return Err(format!("{OPTIMIZER}: the tensor {} is none of Adam's", tensor.name)),
            };
            tensor.name = name;
            set.push(tensor);
        }
        let checkpoint = Checkpoint { manifest, weights, ema, averages, exp_avg, exp_avg_sq };
        consistent(&checkpoint)?;
        Ok(checkpoint)
    };
    read().map_err(|reason| folder::unusable(path, reason))
}

/// Reads the weights of the checkpoint in the folder `path`, in the order of their names, without the optimiser's
/// state.
///
/// # Errors
/// As [`load`]; [`Which::Ema`] where the run kept no averages.
pub fn load_weights_only(path: &Path, which: &Which) -> Result<(Manifest, Vec<NamedTensor>)> {
    let unusable = |reason| folder::unusable(path, reason);
    let manifest = Manifest::read(path).map_err(unusable)?;
    let weights = match which {
        Which::File(file) => read_weights_file(file)?,
        which => {
            let name = weights_file(&manifest, which)
                .map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
            manifest.read_file(path, &name, tensors::from_bytes).map_err(unusable)?
        }
    };
    Ok((manifest, weights))
}

/// SHA-256 of the file of weights that [`load_weights_only`] reads, in hexadecimal: a checkpoint's manifest has it.
///
/// # Errors
/// As [`load_weights_only`].
pub fn weights_sha256(path: &Path, which: &Which) -> Result<String> {
    if let Which::File(file) = which {
        return Ok(sha256(&disk::read(file, "read the weights", MAX_WEIGHTS)?));
    }
    let manifest = Manifest::read(path).map_err(|reason| folder::unusable(path, reason))?;
    let wrong = |reason| Error::Checkpoint { path: path.to_owned(), reason };
    let name = weights_file(&manifest, which).map_err(wrong)?;
    let facts = manifest.files.get(&name).map(|facts| facts.sha256.clone());
    facts.ok_or_else(|| folder::unusable(path, format!("its manifest does not list {name}")))
}

/// The file of a checkpoint that holds these weights; the error is the reason alone.
fn weights_file(manifest: &Manifest, which: &Which) -> Result<String, String> {
    Ok(match which {
        Which::Average(name) => {
            let file = format!("{name}{SAFETENSORS}");
            if !manifest.files.contains_key(&file) {
                let there: Vec<&str> = manifest.files.keys().filter_map(|f| average_of(f)).collect();
                return Err(match there.is_empty() {
                    true => {
                        format!("has no average {name:?}, nor any other (train.ema_decays, train.power_ema)")
                    }
                    false => format!("has no average {name:?}; there are {}", there.join(", ")),
                });
            }
            file
        }
        Which::Ema if !manifest.has_ema() => {
            return Err("has no averaged weights (train.ema_decay was 0); use the raw ones".into());
        }
        Which::Auto if !manifest.has_ema() => MODEL.to_owned(),
        Which::Ema | Which::Auto => EMA.to_owned(),
        Which::Raw | Which::File(_) => MODEL.to_owned(),
    })
}

/// Writes averages as the folder `dir/step-…`, a file each, and gives its path: what [`posthoc`](crate::train::posthoc) makes
/// others of. One of the same step is replaced.
///
/// # Errors
/// [`Error::Io`]; nothing that was there is changed then.
pub fn save_snapshot(dir: &Path, step: u64, averages: &[(String, Vec<NamedTensor>)]) -> Result<PathBuf> {
    make_folder(dir, "make the folder of snapshots")?;
    save_snapshot_on(&RealDisk, dir, step, averages)
}

fn save_snapshot_on(
    disk: &dyn Disk,
    dir: &Path,
    step: u64,
    averages: &[(String, Vec<NamedTensor>)],
) -> Result<PathBuf> {
    let numbers = averages.iter().flat_map(|(_, set)| set).map(|t| t.data.len()).sum();
    let io = |path: &Path| {
        let path = path.to_owned();
        move |e| helpful(Error::io(path, "write the snapshot")(e), dir, "snapshot", numbers)
    };
    let path = path_of(dir, step);
    let temporary = folder::temporary(&path);
    // Left by an attempt of this process that could not clean up after itself.
    let _ = fs::remove_dir_all(&temporary);
    let write = || -> Result<()> {
        disk.create_dir(&temporary).map_err(io(&temporary))?;
        for (name, set) in averages {
            let file = temporary.join(format!("{name}{SAFETENSORS}"));
            let bytes = to_bytes(set.iter().map(|t| ("", t)))
                .map_err(|reason| Error::Checkpoint { path: file.clone(), reason })?;
            disk::write(disk, &file, &bytes).map_err(io(&file))?;
        }
        disk.sync_dir(&temporary).map_err(io(&temporary))?;
        put_in_place(disk, dir, &temporary, &path).map_err(io(&path))
    };
    let done = write();
    if done.is_err() {
        // Best effort: the next start sweeps it otherwise.
        let _ = fs::remove_dir_all(&temporary);
    }
    done.map(|()| path)
}

/// Reads a `.safetensors` file of weights that belongs to no checkpoint, in the order of their names.
///
/// # Errors
/// [`Error::Io`], and [`Error::Checkpoint`] for a file that is damaged or holds other than f32.
pub fn read_weights_file(path: &Path) -> Result<Vec<NamedTensor>> {
    let bytes = disk::read(path, "read the weights", MAX_WEIGHTS)?;
    tensors::from_bytes(&bytes).map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })
}

#[cfg(test)]
mod tests;
