//! The runs in a folder, as far as their files tell without reading weights.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::metrics::last_metrics;
use super::{CHECKPOINTS, CONFIG, End, LOCK, RunFolder, RunRecord, is_run};
use crate::interop::UNKNOWN_DATA;
use crate::train::checkpoint::{self, Manifest};
use crate::train::config::Config;
use crate::{Error, Result};

/// Steps whose mean loss is told.
const WINDOW: usize = 100;

/// Paths need not be UTF-8, JSON must be.
fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.to_string_lossy())
}

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A process trains it now.
    Running,
    /// All steps of its settings are made.
    Finished,
    /// All steps are made, and its loss was that of a training that has diverged.
    Diverged,
    /// It was stopped, or nothing tells how it ended.
    Stopped,
    /// It ended with an error.
    Failed,
    /// Its process ended without a word: it was killed, or the machine went down.
    Killed,
    /// Its weights are from elsewhere, and no step was made here.
    Imported,
}

impl State {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Diverged => "diverged",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::Imported => "imported",
        }
    }
}

/// What is known of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunInfo {
    /// Its name.
    pub name: String,
    /// Its folder.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// What it is doing.
    pub state: State,
    /// Why it failed.
    pub error: Option<String>,
    /// Steps made.
    pub step: u64,
    /// Step of the newest checkpoint, from which it can go on.
    pub checkpoint: Option<u64>,
    /// Steps in all, where the settings tell it without the data.
    pub steps: Option<u64>,
    /// Mean loss of the last steps (at most 100), where there is a finite one.
    pub loss: Option<f64>,
    /// What it learns from (`data.path`).
    pub data: String,
    /// Size and channels of its images, as `32x32x3`, where they are known.
    pub image: Option<String>,
    /// The network.
    pub network: String,
    /// Bytes of all files of the run.
    pub bytes: u64,
    /// When something was last written about its training, in seconds since 1970.
    pub changed: u64,
}

/// A folder of the list.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// What is known, or why the run cannot be understood.
    pub run: Result<RunInfo, String>,
    /// When it was last written to, since 1970.
    pub changed: Duration,
}

/// All runs in the folder `root`, those that were written to last first, and what looks like a run and cannot be understood.
/// Other folders are passed over.
///
/// # Errors
/// [`Error::Run`] if there is no such folder, or it is a run itself.
pub fn list_runs(root: &Path) -> Result<Vec<Listed>> {
    let refuse = |reason: String| Err(Error::Run { path: root.to_owned(), reason });
    if is_run(root) {
        let folder = root.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return refuse(format!(
            "is a run itself; give the folder that holds it: --runs {}",
            folder.display()
        ));
    }
    match fs::metadata(root) {
        Ok(about) if about.is_dir() => {}
        Ok(_) => return refuse("is not a folder; give the folder that holds the runs: --runs FOLDER".into()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return refuse(
                "there is no such folder; `ddpm train` makes it, or give another: --runs FOLDER".into(),
            );
        }
        Err(e) => return Err(Error::io(root, "list the runs")(e)),
    }
    let entries = fs::read_dir(root).map_err(Error::io(root, "list the runs"))?;
    let mut all: Vec<Listed> = entries.flatten().filter_map(|entry| look(&entry.path())).collect();
    all.sort_by(|a, b| b.changed.cmp(&a.changed).then_with(|| b.name.cmp(&a.name)));
    Ok(all)
}

fn look(path: &Path) -> Option<Listed> {
    // A name need not be UTF-8.
    let name = path.file_name()?.to_string_lossy().into_owned();
    if !path.is_dir() {
        return None;
    }
    if let Err(e) = fs::read_dir(path) {
        return Some(Listed { name, run: Err(format!("cannot be listed: {e}")), changed: written(path) });
    }
    let looks_like_one =
        [CONFIG, CHECKPOINTS, super::record::RECORD].iter().any(|part| path.join(part).exists());
    if !looks_like_one {
        return None;
    }
    let run = match is_run(path) {
        true => about(&RunFolder { path: path.to_owned(), name: name.clone() }),
        false => Err(format!("is no run: it has no {CONFIG}, or no folder {CHECKPOINTS}")),
    };
    let (run, changed) = match run {
        Ok((info, changed)) => (Ok(info), changed),
        Err(reason) => (Err(reason), written(path)),
    };
    Some(Listed { name, run, changed })
}

/// When a file was last written to, since 1970; 0 if there is none.
fn written(path: &Path) -> Duration {
    let time = fs::metadata(path).and_then(|about| about.modified()).ok();
    time.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default()
}

/// What is known of one run, and when it was last written to; the error is the reason alone.
fn about(run: &RunFolder) -> Result<(RunInfo, Duration), String> {
    let dir = run.checkpoints();
    let steps = checkpoint::list(&dir).map_err(|e| e.to_string())?;
    // The manifests alone: their hashes are checked, the weights are not read.
    let mut damaged = None;
    let mut newest = None;
    for &step in steps.iter().rev() {
        match Manifest::read(&checkpoint::path_of(&dir, step)) {
            Ok(manifest) => {
                newest = Some(manifest);
                break;
            }
            Err(reason) => damaged = damaged.or(Some(format!("checkpoint of step {step}: {reason}"))),
        }
    }
    if newest.is_none()
        && let Some(reason) = damaged
    {
        return Err(format!("no checkpoint is whole: {reason}"));
    }
    let config = match (run.read_config(), &newest) {
        (Ok(config), _) => config,
        (Err(_), Some(manifest)) if !run.config_path().exists() => {
            manifest.config(&dir).map_err(|e| e.to_string())?
        }
        (Err(e), _) => return Err(e.to_string()),
    };
    let metrics = last_metrics(&run.metrics_path(), WINDOW as u64);
    let saved = newest.as_ref().map(|m| m.step);
    let step = metrics.last().map(|m| m.step).max(saved).unwrap_or(0);
    let record = RunRecord::read(&run.path);
    let state = state(run, &config, &record, saved, step);
    let losses: Vec<f64> = metrics.iter().rev().take(WINDOW).map(|m| m.loss).collect();
    let mean = (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64);
    let loss = mean.or(newest.as_ref().and_then(|m| m.loss)).filter(|l| l.is_finite());
    let image = config.image_size().zip(config.image_channels()).map(|(size, c)| format!("{size}x{c}"));
    let manifest = saved.map(|step| checkpoint::path_of(&dir, step).join("manifest.json"));
    let times = [Some(run.metrics_path()), Some(run.config_path()), manifest];
    let changed = times.into_iter().flatten().map(|path| written(&path)).max().unwrap_or_default();
    let info = RunInfo {
        name: run.name.clone(),
        path: run.path.clone(),
        state,
        error: record.error.filter(|_| state == State::Failed),
        step,
        checkpoint: saved,
        steps: config.train.steps,
        loss,
        data: config.data.path.clone(),
        image,
        network: config.network_name().to_owned(),
        bytes: bytes(&run.path, 0),
        changed: changed.as_secs(),
    };
    Ok((info, changed))
}

fn state(run: &RunFolder, config: &Config, record: &RunRecord, saved: Option<u64>, step: u64) -> State {
    if is_locked(&run.path.join(LOCK)) {
        return State::Running;
    }
    if saved.is_some_and(|saved| config.train.steps.is_some_and(|steps| saved >= steps)) {
        return if record.end == Some(End::Diverged) { State::Diverged } else { State::Finished };
    }
    match record.end {
        Some(End::Failed) => State::Failed,
        Some(End::Running) => State::Killed,
        None if step == 0 && config.data.path == UNKNOWN_DATA => State::Imported,
        // More steps were asked for since it had finished.
        Some(End::Stopped | End::Finished | End::Diverged) | None => State::Stopped,
    }
}

/// Whether a process holds the lock. The look itself locks for a moment, shared, so that two looks do not see each other.
fn is_locked(lock: &Path) -> bool {
    let Ok(file) = File::open(lock) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Bytes of all files below `path`; links are not followed.
fn bytes(path: &Path, depth: u32) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let of = |entry: fs::DirEntry| match entry.metadata() {
        Ok(about) if about.is_dir() && depth < 8 => bytes(&entry.path(), depth + 1),
        Ok(about) if about.is_file() => about.len(),
        _ => 0,
    };
    entries.map(of).sum()
}
