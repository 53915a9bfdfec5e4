//! The folder of a run's checkpoints: listing, selecting and removing them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tensors::from_bytes;
use super::{Manifest, NamedTensor, WeightsChoice, load_weights_only, weights_file};
use crate::run_record::RunRecord;
use crate::storage::{self, FileSystem, OsFileSystem};
use crate::text::shown;
use crate::{Error, Result};

const BEST: &str = "best.json";
/// Name prefixes of files and folders that are being written or removed, and of those being replaced.
const TEMPORARY: &str = ".tmp-";
const REPLACED: &str = ".old-";
/// Name prefix of checkpoints set aside because the run went back to an earlier step.
const ASIDE: &str = "aside-";

/// The folder of the checkpoint of `step`.
pub fn path_of(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:07}"))
}

pub(super) fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    // Other spellings of the number are not checkpoint names.
    (format!("{step:07}") == digits).then_some(step)
}

fn sibling(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{prefix}{name}-{}", std::process::id()))
}

/// The temporary path for writing or removing the checkpoint at `path`.
pub(super) fn temporary(path: &Path) -> PathBuf {
    sibling(path, TEMPORARY)
}

/// The temporary path of the checkpoint at `path` while it is being replaced.
pub(super) fn replaced(path: &Path) -> PathBuf {
    sibling(path, REPLACED)
}

/// The names of the entries of `dir`; empty if there is no such folder.
fn names(dir: &Path) -> Result<Vec<String>> {
    let io = || Error::io(dir, "list the checkpoints");
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io())?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry.map_err(io())?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The steps of all checkpoints, ascending; does not check that they are intact.
///
/// # Errors
/// [`Error::Io`].
pub fn list(dir: &Path) -> Result<Vec<u64>> {
    let mut steps: Vec<_> = names(dir)?.iter().filter_map(|n| step_of(n)).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// The error for an unusable checkpoint: the reason and a remedy.
pub(super) fn unusable(path: &Path, reason: String) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The parent of a bare name is the empty path, which cannot be listed.
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let this = step_of(&name);
    let others = list(dir).unwrap_or_default();
    let older = others.into_iter().rfind(|&s| this.is_none_or(|this| s < this));
    let remedy = match older {
        Some(step) => format!("use an older checkpoint: --checkpoint step-{step:07}"),
        None => "there is no older checkpoint: restore it from a backup, or train again".into(),
    };
    Error::Checkpoint { path: path.to_owned(), reason: format!("{reason}; {remedy}") }
}

/// The newest usable checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newest {
    /// Its folder.
    pub path: PathBuf,
    /// Its step.
    pub step: u64,
    /// Newer ones that are unusable, each with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl Newest {
    /// A warning for each newer one that is unusable.
    pub fn warnings(&self) -> Vec<String> {
        let warning = |(path, reason): &(PathBuf, String)| {
            if reason.starts_with(OF_ANOTHER_RUN) {
                format!("{} was skipped: it {reason}", shown(path))
            } else {
                format!("{} is damaged and was skipped: {reason}", shown(path))
            }
        };
        self.skipped.iter().map(warning).collect()
    }
}

/// The newest checkpoint of the run whose files all match their hashes; `None` if there is no checkpoint at all.
///
/// # Errors
/// [`Error::Checkpoint`] if there are checkpoints but none is usable; [`Error::Io`].
pub fn newest(dir: &Path) -> Result<Option<Newest>> {
    newest_where(dir, |_| Ok(()))
}

/// [`newest`] among those whose manifest `fits`; the error of `fits` is the reason why not.
pub(crate) fn newest_where(
    dir: &Path,
    fits: impl Fn(&Manifest) -> Result<(), String>,
) -> Result<Option<Newest>> {
    let own = run_id(dir);
    let usable = |path: &Path| {
        let manifest = Manifest::read(path)?;
        of_run(&manifest, own.as_deref())?;
        fits(&manifest)?;
        verify(path)
    };
    Ok(newest_readable(dir, usable)?.map(|(newest, ())| newest))
}

/// Prefix of the reasons why an intact checkpoint does not belong to the run.
pub(crate) const OF_ANOTHER_RUN: &str = "is of another run";

/// The id of the run whose checkpoints are in `dir`, if recorded; if its record is lost, that of its oldest checkpoint.
fn run_id(dir: &Path) -> Option<String> {
    let oldest = || {
        let paths = list(dir).unwrap_or_default().into_iter().map(|step| path_of(dir, step));
        paths.filter_map(|path| Manifest::read(&path).ok()?.run).next()
    };
    RunRecord::read(dir.parent()?).id.or_else(oldest)
}

/// Whether a checkpoint may belong to the run with the id `own`; the error is the reason why not. Checkpoints of earlier
/// versions have no id.
pub(crate) fn of_run(manifest: &Manifest, own: Option<&str>) -> Result<(), String> {
    match (manifest.run.as_deref(), own) {
        (Some(theirs), Some(own)) if theirs != own => {
            Err(format!("{OF_ANOTHER_RUN} (its id is {theirs}, this run's is {own}); it was copied here"))
        }
        _ => Ok(()),
    }
}

/// The newest readable manifest in `dir` that belongs to the run.
pub(crate) fn newest_manifest(dir: &Path) -> Result<Option<(PathBuf, Manifest)>> {
    let own = run_id(dir);
    let paths = list(dir)?.into_iter().rev().map(|step| path_of(dir, step));
    let mut read = paths.filter_map(|path| Manifest::read(&path).ok().map(|manifest| (path, manifest)));
    Ok(read.find(|(_, manifest)| of_run(manifest, own.as_deref()).is_ok()))
}

/// The newest checkpoint whose weights `which` are intact, with what [`load_weights_only`] reads from it; the other files
/// are not checked.
///
/// # Errors
/// As [`newest`]; [`Error::Checkpoint`] if the newest has no such weights.
pub fn newest_weights(
    dir: &Path,
    which: &WeightsChoice,
) -> Result<Option<(Newest, Manifest, Vec<NamedTensor>)>> {
    let own = run_id(dir);
    let usable = |path: &Path| {
        let manifest = Manifest::read(path)?;
        of_run(&manifest, own.as_deref())?;
        let weights = match (which, weights_file(&manifest, which)) {
            // If it has no such weights, that is an error (below), not a reason to use an older one.
            (WeightsChoice::File(_), _) | (_, Err(_)) => None,
            (_, Ok(name)) => Some(manifest.read_file(path, &name, from_bytes)?),
        };
        Ok((manifest, weights))
    };
    let Some((newest, (manifest, weights))) = newest_readable(dir, usable)? else { return Ok(None) };
    let weights = match weights {
        Some(weights) => weights,
        None => load_weights_only(&newest.path, which)?.1,
    };
    Ok(Some((newest, manifest, weights)))
}

/// The newest checkpoint for which `read` succeeds.
fn newest_readable<T>(dir: &Path, read: impl Fn(&Path) -> Result<T, String>) -> Result<Option<(Newest, T)>> {
    let mut skipped = Vec::new();
    for step in list(dir)?.into_iter().rev() {
        let path = path_of(dir, step);
        match read(&path) {
            Ok(read) => return Ok(Some((Newest { path, step, skipped }, read))),
            Err(reason) => skipped.push((path, reason)),
        }
    }
    if skipped.is_empty() {
        return Ok(None);
    }
    let all: Vec<_> = skipped
        .iter()
        .map(|(path, reason)| format!("{}: {reason}", path.file_name().unwrap_or_default().to_string_lossy()))
        .collect();
    let reason =
        format!("no checkpoint is usable: {}; restore one from a backup, or train again", all.join("; "));
    Err(Error::Checkpoint { path: dir.to_owned(), reason })
}

/// Verifies the hash of every file of the checkpoint in `path`; the error is only the reason.
fn verify(path: &Path) -> Result<(), String> {
    let manifest = Manifest::read(path)?;
    manifest.files.keys().try_for_each(|name| manifest.read_file(path, name, |_| Ok(())))
}

/// Removes what a killed process left partially written or removed, and restores a checkpoint whose replacement was not
/// completed. Must not run while another process writes there. Returns the paths it removed or restored.
///
/// # Errors
/// [`Error::Io`].
pub fn sweep_orphans(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for name in names(dir)? {
        let path = dir.join(&name);
        // ".old-step-0001000-PID"
        if let Some(old) = name.strip_prefix(REPLACED).and_then(|n| n.rsplit_once('-')).map(|(name, _)| name)
            && step_of(old).is_some()
            && !dir.join(old).exists()
        {
            fs::rename(&path, dir.join(old)).map_err(Error::io(&path, "restore the replaced checkpoint"))?;
        } else if name.starts_with(TEMPORARY) || name.starts_with(REPLACED) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io(&path, "remove the remains of an interrupted run"))?;
        } else {
            continue;
        }
        swept.push(path);
    }
    Ok(swept)
}

/// Removes all checkpoints but the newest `keep` (at least two) and that of the step `best`. Returns the removed steps.
///
/// # Errors
/// [`Error::Io`].
pub fn retain(dir: &Path, keep: usize, best: Option<u64>) -> Result<Vec<u64>> {
    let mut steps = list(dir)?;
    steps.truncate(steps.len().saturating_sub(keep.max(2)));
    steps.retain(|&step| Some(step) != best);
    for &step in &steps {
        let path = path_of(dir, step);
        // Renamed first: a partially removed folder must not have a checkpoint's name.
        let doomed = temporary(&path);
        OsFileSystem.rename(&path, &doomed).map_err(Error::io(&path, "remove the old checkpoint"))?;
        fs::remove_dir_all(&doomed).map_err(Error::io(&path, "remove the old checkpoint"))?;
    }
    Ok(steps)
}

/// Removes checkpoints (or snapshots) that were [set aside](set_aside_after) and that a run now at `step` has passed; keeps
/// those of a run other than `own`. Returns the removed paths. Must not run while another process writes there.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_superseded(dir: &Path, step: u64, own: Option<&str>) -> Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for name in names(dir)? {
        // "aside-step-0001000", "aside-step-0001000-2"
        let Some(rest) = name.strip_prefix(ASIDE) else { continue };
        let aside = step_of(rest).or_else(|| step_of(rest.rsplit_once('-')?.0));
        let path = dir.join(&name);
        let foreign = Manifest::read(&path).is_ok_and(|manifest| of_run(&manifest, own).is_err());
        if aside.is_some_and(|aside| aside <= step) && !foreign {
            // Renamed first: a partially removed folder must not be mistaken for a checkpoint.
            let doomed = temporary(&path);
            fs::rename(&path, &doomed)
                .and_then(|()| fs::remove_dir_all(&doomed))
                .map_err(Error::io(&path, "remove the checkpoint that was set aside"))?;
            swept.push(path);
        }
    }
    Ok(swept)
}

/// Renames the checkpoints of steps after `step` to `aside-step-…`, which all functions here ignore, because a run that
/// continues from `step` diverges from them. Returns the new paths.
///
/// # Errors
/// [`Error::Io`].
pub fn set_aside_after(dir: &Path, step: u64) -> Result<Vec<PathBuf>> {
    let mut moved = Vec::new();
    for later in list(dir)?.into_iter().filter(|&s| s > step) {
        let path = path_of(dir, later);
        let name = |n: u32| match n {
            1 => format!("{ASIDE}step-{later:07}"),
            n => format!("{ASIDE}step-{later:07}-{n}"),
        };
        let Some(to) = (1..1000).map(|n| dir.join(name(n))).find(|to| !to.exists()) else {
            let reason = format!("cannot be set aside; remove some of the {ASIDE}* folders next to it");
            return Err(Error::Checkpoint { path, reason });
        };
        fs::rename(&path, &to).map_err(Error::io(&path, "set the later checkpoint aside"))?;
        moved.push(to);
    }
    Ok(moved)
}

/// The checkpoint with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its mean recent loss.
    pub loss: f64,
}

/// The recorded best checkpoint; `None` if there is no readable record or the checkpoint is gone.
pub fn best(dir: &Path) -> Option<Best> {
    let bytes = storage::read(&dir.join(BEST), "read which checkpoint is best", 4096).ok()?;
    let best: Best = serde_json::from_slice(&bytes).ok()?;
    path_of(dir, best.step).is_dir().then_some(best)
}

/// Forgets which checkpoint is the best.
pub(crate) fn forget_best(dir: &Path) -> Result<()> {
    let path = dir.join(BEST);
    match fs::remove_file(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io(&path, "forget which checkpoint is best")),
    }
}

/// Records the checkpoint of `step` as the best if no other has a lower loss. Returns the current best; a loss that is not
/// finite is never the best.
///
/// # Errors
/// [`Error::Io`].
pub fn note_best(dir: &Path, step: u64, loss: f64) -> Result<Option<Best>> {
    let current = best(dir);
    if !loss.is_finite() || current.is_some_and(|b| b.loss <= loss && b.step != step) {
        return Ok(current);
    }
    let best = Best { step, loss };
    let text = format!("{{\"step\":{step},\"loss\":{loss}}}\n");
    storage::write_atomic(
        &OsFileSystem,
        &dir.join(BEST),
        text.as_bytes(),
        "record which checkpoint is best",
    )?;
    Ok(Some(best))
}
