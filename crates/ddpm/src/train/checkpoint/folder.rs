//! The folder of a run's checkpoints: which there are, which is used, which are removed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tensors::from_bytes;
use super::{Manifest, NamedTensor, Which, load_weights_only, weights_file};
use crate::text::shown;
use crate::train::disk::{self, Disk, RealDisk};
use crate::train::run::RunRecord;
use crate::{Error, Result};

const BEST: &str = "best.json";
/// Beginnings of the names of what is being written or removed, and of what is being replaced.
const TEMPORARY: &str = ".tmp-";
const REPLACED: &str = ".old-";
/// Beginning of the names of checkpoints that a run has gone back behind.
const ASIDE: &str = "aside-";

/// The folder of the checkpoint of `step`.
pub fn path_of(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:07}"))
}

pub(super) fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    // Another spelling of the number is not a checkpoint's name.
    (format!("{step:07}") == digits).then_some(step)
}

fn beside(path: &Path, prefix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{prefix}{name}-{}", std::process::id()))
}

/// Where the checkpoint of the final place `path` is written, or removed.
pub(super) fn temporary(path: &Path) -> PathBuf {
    beside(path, TEMPORARY)
}

/// Where the checkpoint at `path` waits while another takes its place.
pub(super) fn replaced(path: &Path) -> PathBuf {
    beside(path, REPLACED)
}

/// The names of the entries of `dir`; none if there is no such folder.
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

/// The steps there are checkpoints of, ascending; whether those are whole is not looked at.
///
/// # Errors
/// [`Error::Io`].
pub fn list(dir: &Path) -> Result<Vec<u64>> {
    let mut steps: Vec<_> = names(dir)?.iter().filter_map(|n| step_of(n)).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// A checkpoint that cannot be used: the reason and the way out.
pub(super) fn unusable(path: &Path, reason: String) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A bare name's parent is the empty path, which cannot be listed.
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let this = step_of(&name);
    let others = list(dir).unwrap_or_default();
    let older = others.into_iter().rfind(|&s| this.is_none_or(|this| s < this));
    let way_out = match older {
        Some(step) => format!("use an older checkpoint: --checkpoint step-{step:07}"),
        None => "there is no older checkpoint beside it: restore it from a copy, or train anew".into(),
    };
    Error::Checkpoint { path: path.to_owned(), reason: format!("{reason}; {way_out}") }
}

/// The newest whole checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Newest {
    /// Its folder.
    pub path: PathBuf,
    /// Its step.
    pub step: u64,
    /// Newer ones that are not whole, each with the reason.
    pub skipped: Vec<(PathBuf, String)>,
}

impl Newest {
    /// What a person should know of the newer ones that are not whole, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let said = |(path, reason): &(PathBuf, String)| match reason.starts_with(OF_ANOTHER) {
            true => format!("{} was passed over: it {reason}", shown(path)),
            false => format!("{} is damaged and was passed over: {reason}", shown(path)),
        };
        self.skipped.iter().map(said).collect()
    }
}

/// The newest checkpoint of the run all of whose files have their hashes; `None` if there is no checkpoint at all.
///
/// # Errors
/// [`Error::Checkpoint`] if there are some and none is whole; [`Error::Io`].
pub fn newest(dir: &Path) -> Result<Option<Newest>> {
    newest_where(dir, |_| Ok(()))
}

/// [`newest`] of those whose manifest is one that `fits`; its error is the reason why it does not.
pub(crate) fn newest_where(
    dir: &Path,
    fits: impl Fn(&Manifest) -> Result<(), String>,
) -> Result<Option<Newest>> {
    let own = own_id(dir);
    let whole = |path: &Path| {
        let manifest = Manifest::read(path)?;
        of_run(&manifest, own.as_deref())?;
        fits(&manifest)?;
        verify(path)
    };
    Ok(newest_that(dir, whole)?.map(|(newest, ())| newest))
}

/// What reasons begin with why a whole checkpoint is not the run's.
pub(crate) const OF_ANOTHER: &str = "is of another run";

/// The mark of the run whose checkpoints are in `dir`, where it has one; where its record is lost, that of its oldest checkpoint.
fn own_id(dir: &Path) -> Option<String> {
    let oldest = || {
        let paths = list(dir).unwrap_or_default().into_iter().map(|step| path_of(dir, step));
        paths.filter_map(|path| Manifest::read(&path).ok()?.run).next()
    };
    RunRecord::read(dir.parent()?).id.or_else(oldest)
}

/// Whether a checkpoint may be of the run with the mark `own`; the error is the reason why it is not. Those of earlier versions
/// have no mark.
pub(crate) fn of_run(manifest: &Manifest, own: Option<&str>) -> Result<(), String> {
    match (manifest.run.as_deref(), own) {
        (Some(theirs), Some(own)) if theirs != own => {
            Err(format!("{OF_ANOTHER} (its mark is {theirs}, this run's {own}); it was copied here"))
        }
        _ => Ok(()),
    }
}

/// The newest manifest in `dir` that can be read, of the run itself.
pub(crate) fn newest_manifest(dir: &Path) -> Result<Option<(PathBuf, Manifest)>> {
    let own = own_id(dir);
    let paths = list(dir)?.into_iter().rev().map(|step| path_of(dir, step));
    let mut read = paths.filter_map(|path| Manifest::read(&path).ok().map(|manifest| (path, manifest)));
    Ok(read.find(|(_, manifest)| of_run(manifest, own.as_deref()).is_ok()))
}

/// The newest checkpoint whose weights `which` are whole, and what [`load_weights_only`] reads of it; the other files are not
/// looked at.
///
/// # Errors
/// As [`newest`]; [`Error::Checkpoint`] where the newest has no such weights.
pub fn newest_weights(dir: &Path, which: &Which) -> Result<Option<(Newest, Manifest, Vec<NamedTensor>)>> {
    let own = own_id(dir);
    let whole = |path: &Path| {
        let manifest = Manifest::read(path)?;
        of_run(&manifest, own.as_deref())?;
        let weights = match (which, weights_file(&manifest, which)) {
            // That it has none such is no reason to take an older one, but an error, below.
            (Which::File(_), _) | (_, Err(_)) => None,
            (_, Ok(name)) => Some(manifest.read_file(path, &name, from_bytes)?),
        };
        Ok((manifest, weights))
    };
    let Some((newest, (manifest, weights))) = newest_that(dir, whole)? else { return Ok(None) };
    let weights = match weights {
        Some(weights) => weights,
        None => load_weights_only(&newest.path, which)?.1,
    };
    Ok(Some((newest, manifest, weights)))
}

/// The newest checkpoint of which `read` gives something.
fn newest_that<T>(dir: &Path, read: impl Fn(&Path) -> Result<T, String>) -> Result<Option<(Newest, T)>> {
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
        format!("no checkpoint is whole: {}; restore one from a copy, or train anew", all.join("; "));
    Err(Error::Checkpoint { path: dir.to_owned(), reason })
}

/// Checks every file of the checkpoint in `path` against its hash; the error is the reason alone.
fn verify(path: &Path) -> Result<(), String> {
    let manifest = Manifest::read(path)?;
    manifest.files.keys().try_for_each(|name| manifest.read_file(path, name, |_| Ok(())))
}

/// Removes what a killed process left half written or half removed, and puts back a checkpoint whose replacement
/// never came. To be called while no other process writes there. Gives what it removed or put back.
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
            fs::rename(&path, dir.join(old)).map_err(Error::io(&path, "put the checkpoint back"))?;
        } else if name.starts_with(TEMPORARY) || name.starts_with(REPLACED) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io(&path, "remove what an interrupted run left"))?;
        } else {
            continue;
        }
        swept.push(path);
    }
    Ok(swept)
}

/// Removes all checkpoints but the newest `keep` (at least two) and the one of the step `best`. Gives the steps
/// removed.
///
/// # Errors
/// [`Error::Io`].
pub fn retain(dir: &Path, keep: usize, best: Option<u64>) -> Result<Vec<u64>> {
    let mut steps = list(dir)?;
    steps.truncate(steps.len().saturating_sub(keep.max(2)));
    steps.retain(|&step| Some(step) != best);
    for &step in &steps {
        let path = path_of(dir, step);
        // Renamed first: a folder half removed must not have a checkpoint's name.
        let doomed = temporary(&path);
        RealDisk.rename(&path, &doomed).map_err(Error::io(&path, "remove the old checkpoint"))?;
        fs::remove_dir_all(&doomed).map_err(Error::io(&path, "remove the old checkpoint"))?;
    }
    Ok(steps)
}

/// Removes checkpoints (or snapshots) that were [set aside](set_aside_after) and that a run at `step` has overtaken since; those of
/// another run than `own` stay. Gives what it removed. To be called while no other process writes there.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn sweep_overtaken(dir: &Path, step: u64, own: Option<&str>) -> Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for name in names(dir)? {
        // "aside-step-0001000", "aside-step-0001000-2"
        let Some(rest) = name.strip_prefix(ASIDE) else { continue };
        let aside = step_of(rest).or_else(|| step_of(rest.rsplit_once('-')?.0));
        let path = dir.join(&name);
        let foreign = Manifest::read(&path).is_ok_and(|manifest| of_run(&manifest, own).is_err());
        if aside.is_some_and(|aside| aside <= step) && !foreign {
            // Renamed first: half of it must not be taken for a checkpoint.
            let doomed = temporary(&path);
            fs::rename(&path, &doomed)
                .and_then(|()| fs::remove_dir_all(&doomed))
                .map_err(Error::io(&path, "remove the checkpoint that was set aside"))?;
            swept.push(path);
        }
    }
    Ok(swept)
}

/// Gives the checkpoints of later steps than `step` names that no function here looks at (`aside-step-…`), for a run
/// that goes on from `step` and so takes another way than they did. Gives the new paths.
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
            let reason = format!("cannot be set aside; remove some of the {ASIDE}* folders beside it");
            return Err(Error::Checkpoint { path, reason });
        };
        fs::rename(&path, &to).map_err(Error::io(&path, "set the later checkpoint aside"))?;
        moved.push(to);
    }
    Ok(moved)
}

/// Which checkpoint has the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its mean recent loss.
    pub loss: f64,
}

/// The best checkpoint as noted; `None` if none is, or the note cannot be understood, or the checkpoint is gone.
pub fn best(dir: &Path) -> Option<Best> {
    let bytes = disk::read(&dir.join(BEST), "read which checkpoint is best", 4096).ok()?;
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

/// Notes the checkpoint of `step` as the best if no other has a lower loss. Gives the best one now; a loss that is
/// not finite is never it.
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
    disk::replace(&RealDisk, &dir.join(BEST), text.as_bytes(), "note which checkpoint is best")?;
    Ok(Some(best))
}
