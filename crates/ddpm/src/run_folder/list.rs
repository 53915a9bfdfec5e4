//! Lists the runs in a folder, without reading weights.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::metrics::last_metrics;
use super::{CHECKPOINTS, CONFIG, End, LOCK, RunFolder, RunRecord, is_run};
use crate::checkpoint::{self, Manifest};
use crate::config::Config;
use crate::config::UNKNOWN_DATA;
use crate::{Error, Result};

/// Number of recent steps whose mean loss is reported.
const WINDOW: usize = 100;

/// Serializes a path, which need not be UTF-8, as JSON, which must be.
fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.to_string_lossy())
}

/// The state of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// A process is training it.
    Running,
    /// All steps are completed.
    Finished,
    /// All steps are completed, but the training had diverged.
    Diverged,
    /// It was stopped, or how it ended is not recorded.
    Stopped,
    /// It failed with an error.
    Failed,
    /// Its process ended without recording why: it was killed, or the machine went down.
    Killed,
    /// Its weights were imported and not trained further.
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

/// Information about a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunInfo {
    /// Its name.
    pub name: String,
    /// Its folder.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Its state.
    pub state: State,
    /// The error message, if it failed.
    pub error: Option<String>,
    /// Steps completed.
    pub step: u64,
    /// Step of the newest checkpoint, from which it can be resumed.
    pub checkpoint: Option<u64>,
    /// Total number of steps, if known without the data.
    pub steps: Option<u64>,
    /// Mean loss of the last steps (at most 100), if finite.
    pub loss: Option<f64>,
    /// Its training data (`data.path`).
    pub data: String,
    /// Size and channels of its images, e.g. `32x32x3`, if known.
    pub image: Option<String>,
    /// The network.
    pub network: String,
    /// Bytes of all files of the run.
    pub bytes: u64,
    /// Time of the last change, in seconds since 1970.
    pub changed: u64,
}

/// An entry of the list.
#[derive(Clone, Debug, PartialEq)]
pub struct RunEntry {
    /// Its name.
    pub name: String,
    /// Its information, or why the run cannot be read.
    pub run: Result<RunInfo, String>,
    /// Time of the last change, since 1970.
    pub changed: Duration,
}

/// All runs in the folder `root`, most recently changed first, including folders that look like a run but cannot be read.
/// Other folders are skipped.
///
/// # Errors
/// [`Error::Run`] if there is no such folder, or it is a run itself.
pub fn list_runs(root: &Path) -> Result<Vec<RunEntry>> {
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
                "there is no such folder; `ddpm train` creates it, or give another: --runs FOLDER".into(),
            );
        }
        Err(e) => return Err(Error::io(root, "list the runs")(e)),
    }
    let entries = fs::read_dir(root).map_err(Error::io(root, "list the runs"))?;
    let mut all: Vec<RunEntry> = entries.flatten().filter_map(|entry| inspect(&entry.path())).collect();
    all.sort_by(|a, b| b.changed.cmp(&a.changed).then_with(|| b.name.cmp(&a.name)));
    Ok(all)
}

fn inspect(path: &Path) -> Option<RunEntry> {
    // A name need not be UTF-8.
    let name = path.file_name()?.to_string_lossy().into_owned();
    if !path.is_dir() {
        return None;
    }
    if let Err(e) = fs::read_dir(path) {
        return Some(RunEntry { name, run: Err(format!("cannot be listed: {e}")), changed: modified(path) });
    }
    let looks_like_run =
        [CONFIG, CHECKPOINTS, crate::run_record::RECORD].iter().any(|part| path.join(part).exists());
    if !looks_like_run {
        return None;
    }
    let run = if is_run(path) {
        run_info(&RunFolder { path: path.to_owned(), name: name.clone() })
    } else {
        Err(format!("is not a run: it has no {CONFIG}, or no folder {CHECKPOINTS}"))
    };
    let (run, changed) = match run {
        Ok((info, changed)) => (Ok(info), changed),
        Err(reason) => (Err(reason), modified(path)),
    };
    Some(RunEntry { name, run, changed })
}

/// When a file was last modified, since 1970; 0 if there is none.
fn modified(path: &Path) -> Duration {
    let time = fs::metadata(path).and_then(|about| about.modified()).ok();
    time.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default()
}

/// Information about one run, and when it was last modified; the error is only the reason.
fn run_info(run: &RunFolder) -> Result<(RunInfo, Duration), String> {
    let dir = run.checkpoints();
    let steps = checkpoint::list(&dir).map_err(|e| e.to_string())?;
    // Only reads manifests and checks their hashes, not the weights.
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
        return Err(format!("no checkpoint is usable: {reason}"));
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
    let changed = times.into_iter().flatten().map(|path| modified(&path)).max().unwrap_or_default();
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
        // The number of steps was raised after it had finished.
        Some(End::Stopped | End::Finished | End::Diverged) | None => State::Stopped,
    }
}

/// Whether a process holds the lock. The check itself takes a shared lock briefly, so that two checks do not collide.
fn is_locked(lock: &Path) -> bool {
    let Ok(file) = File::open(lock) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Total size of all files below `path`, in bytes; does not follow links.
fn bytes(path: &Path, depth: u32) -> u64 {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(about) if about.is_dir() && depth < 8 => bytes(&entry.path(), depth + 1),
        Ok(about) if about.is_file() => about.len(),
        _ => 0,
    };
    entries.map(size).sum()
}
