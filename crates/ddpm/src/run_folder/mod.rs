//! Run folders: all files of one training run.
//!
//! `runs/NAME/` holds `config.toml` (all settings), `run.json` ([`RunRecord`]), `metrics.jsonl` ([`MetricsLog`]), `loss.png`,
//! TensorBoard's event files, `samples/`, `checkpoints/` (see [`checkpoint`](crate::checkpoint)) and `README.md`, the model
//! card ([`write_card`]).

mod leftovers;
mod list;
mod metrics;
mod model_card;

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

pub use crate::run_record::{End, RunRecord};
pub(crate) use leftovers::sweep_leftovers;
pub use list::{RunEntry, RunInfo, State, list_runs};
pub use metrics::{Metrics, MetricsLog, read_metrics};
pub(crate) use metrics::{counts_from_zero, missing_metrics};
pub use model_card::{CardFacts, write_card};
pub(crate) use model_card::{NEW_CARD, card_is_edited};

use crate::config::Config;
use crate::storage::{self, OsFileSystem};
use crate::text::{LISTED, escaped, listed, quoted, shown};
use crate::{Error, Result};
use ddpm_text::nearest;

/// The default folder for runs.
pub const RUNS: &str = "runs";

const CONFIG: &str = "config.toml";
const CHECKPOINTS: &str = "checkpoints";
const SAMPLES: &str = "samples";
const LOCK: &str = "lock";

/// The folder of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
    name: String,
}

/// Held while a process trains a run; the operating system releases it when the process ends, for whatever reason.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunFolder {
    /// Creates the folder of a new run in `root`: with the given `name`, or the next free number, e.g. `run-001`. It becomes
    /// a run once its settings are written ([`write_config`](Self::write_config)); a folder of that name whose creation was
    /// interrupted is reused.
    ///
    /// # Errors
    /// [`Error::Run`] for a name that is taken or invalid; [`Error::Io`].
    pub fn create(root: &Path, name: Option<&str>) -> Result<Self> {
        if let Some(name) = name {
            check_name(root, name)?;
        }
        const DOING: &str = "create the run's folder";
        fs::create_dir_all(root).map_err(Error::io(root, DOING))?;
        let run = match name {
            Some(name) => {
                let path = root.join(name);
                match fs::create_dir(&path) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists && is_unfinished(&path) => {}
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        let reason = format!(
                            "this run already exists; continue it with --resume {}, or choose another --name",
                            quoted(&path)
                        );
                        return Err(Error::Run { path, reason });
                    }
                    created => created.map_err(Error::io(&path, DOING))?,
                }
                Self { path, name: name.to_owned() }
            }
            None => {
                let numbers =
                    names(root).into_iter().filter_map(|n| n.strip_prefix("run-")?.parse::<u32>().ok());
                let mut number = numbers.max().unwrap_or(0);
                loop {
                    number = number.checked_add(1).ok_or_else(|| Error::Run {
                        path: root.to_owned(),
                        reason: "no run numbers are left; choose a --name".into(),
                    })?;
                    let name = format!("run-{number:03}");
                    let path = root.join(&name);
                    match fs::create_dir(&path) {
                        Ok(()) => break Self { path, name },
                        // Another process was faster.
                        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                        Err(e) => return Err(Error::io(&path, DOING)(e)),
                    }
                }
            }
        };
        for path in [run.samples(), run.checkpoints()] {
            if let Err(e) = fs::create_dir(&path)
                && e.kind() != io::ErrorKind::AlreadyExists
            {
                // Best effort: an incomplete run folder would block the next attempt.
                let _ = fs::remove_dir_all(&run.path);
                return Err(Error::io(&path, DOING)(e));
            }
        }
        Ok(run)
    }

    /// Opens the run whose folder is `run`, or whose name in `root` is `run`.
    ///
    /// # Errors
    /// [`Error::Run`] if there is no such run, with the most similar name.
    pub fn open(root: &Path, run: &Path) -> Result<Self> {
        let inside = root.join(run);
        let bare = matches!(run.components().collect::<Vec<_>>()[..], [Component::Normal(_)]);
        let candidates = [Some(run), bare.then_some(inside.as_path())];
        if let Some(path) = candidates.into_iter().flatten().find(|p| is_run(p)) {
            // "." and "x/.." have the name of the folder they resolve to.
            let name = match path.file_name() {
                Some(name) => name.to_string_lossy().into_owned(),
                None => {
                    let full = path.canonicalize().map_err(Error::io(path, "open the run's folder"))?;
                    full.file_name().unwrap_or_default().to_string_lossy().into_owned()
                }
            };
            return Ok(Self { path: path.to_owned(), name });
        }
        let runs: Vec<_> = names(root).into_iter().filter(|n| is_run(&root.join(n))).collect();
        let wanted = run.file_name().unwrap_or_default().to_string_lossy();
        let hint = match nearest(&wanted, runs.iter().map(String::as_str)) {
            _ if let Some((containing_run, checkpoint)) = inside_run(run) => match checkpoint {
                Some(checkpoint) => format!(
                    "is a checkpoint of the run {0}; use {0} with --checkpoint {1}",
                    containing_run.display(),
                    short(&checkpoint.file_name().unwrap_or_default().to_string_lossy())
                ),
                None => format!("is inside the run {0}; use {0}", containing_run.display()),
            },
            _ if run.join("manifest.json").is_file() => format!(
                "is a checkpoint outside a run; move it into the folder {CHECKPOINTS} of its run, or create a run from its \
                 model.safetensors with ddpm import"
            ),
            _ if run.is_dir() => format!("is not a run: it has no {CONFIG} or no {CHECKPOINTS} folder"),
            Some(near) => format!("there is no such run; did you mean {}?", shown(root.join(near))),
            None if runs.is_empty() => format!("there is no such run; {} contains no runs", shown(root)),
            None => format!("there is no such run; {} contains {}", shown(root), listed(&runs, LISTED)),
        };
        Err(Error::Run { path: run.to_owned(), reason: hint })
    }

    /// As [`open`](Self::open), but `run` may also be a checkpoint's folder, which is then returned too.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_at(root: &Path, run: &Path) -> Result<(Self, Option<PathBuf>)> {
        match (Self::open(root, run), inside_run(run)) {
            (Err(_), Some((containing_run, Some(checkpoint)))) => {
                Ok((Self::open(root, &containing_run)?, Some(checkpoint)))
            }
            (opened, _) => Ok((opened?, None)),
        }
    }

    /// The error for a run that has no checkpoint yet.
    pub fn without_checkpoint(&self) -> Error {
        let reason =
            format!("has no checkpoint yet; train it further: ddpm train --resume {}", quoted(&self.path));
        Error::Run { path: self.path.clone(), reason }
    }

    /// Prevents other processes from training this run while the lock is held.
    ///
    /// # Errors
    /// [`Error::Run`] if another process does.
    pub fn lock(&self) -> Result<RunLock> {
        let path = self.path.join(LOCK);
        const DOING: &str = "lock the run";
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io(&path, DOING))?;
        match file.try_lock() {
            Ok(()) => {
                // Only for the message below; a full disk is no reason to fail.
                let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            }
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // Best effort: where locks also block readers, the id is unavailable.
                let _ = file.take(20).read_to_string(&mut text);
                let who = text.trim().parse::<u32>().map_or(String::new(), |id| format!(" (process {id})"));
                let reason =
                    format!("another process{who} is training this run; wait for it, or stop it first");
                return Err(Error::Run { path: self.path.clone(), reason });
            }
            // Some network file systems do not support locks; training there is still allowed.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(Error::io(&path, DOING)(e)),
        }
        Ok(RunLock { _file: file })
    }

    /// Writes `config.toml`.
    ///
    /// # Errors
    /// Settings that are not valid; [`Error::Io`].
    pub fn write_config(&self, config: &Config) -> Result<()> {
        config.validate()?;
        let text = config.to_toml_commented();
        storage::write_atomic(&OsFileSystem, &self.config_path(), text.as_bytes(), "write the run's settings")
    }

    /// Reads `config.toml`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn read_config(&self) -> Result<Config> {
        Config::load(None, Some(&self.config_path()), &[])
    }

    /// The run's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `config.toml`, all settings.
    pub fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// `metrics.jsonl`.
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// `loss.png`, the plot of the loss.
    pub fn loss_path(&self) -> PathBuf {
        self.path.join("loss.png")
    }

    /// `README.md`, the model card.
    pub fn card_path(&self) -> PathBuf {
        self.path.join("README.md")
    }

    /// The folder of sample sheets.
    pub fn samples(&self) -> PathBuf {
        self.path.join(SAMPLES)
    }

    /// The sample sheet of `step`, e.g. `samples/step-0001000.png`.
    pub fn sample_path(&self, step: u64) -> PathBuf {
        self.samples().join(format!("step-{step:07}.png"))
    }

    /// The folder of checkpoints, for the functions of [`checkpoint`](crate::checkpoint).
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    /// The folder of snapshots of power-function averages, for [`posthoc`](crate::train::posthoc); only with `ema.power_widths`.
    pub fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    /// The folder of the checkpoint that the user names as a path, as `step-0001000`, or as `1000`.
    ///
    /// # Errors
    /// [`Error::Run`] if there is none, with a list of the existing ones.
    pub fn find_checkpoint(&self, checkpoint: &str) -> Result<PathBuf> {
        let inside = self.checkpoints();
        let number = checkpoint.strip_prefix("step-").unwrap_or(checkpoint).parse::<u64>();
        let by_step = number.ok().map(|step| crate::checkpoint::path_of(&inside, step));
        let candidates = [by_step, Some(PathBuf::from(checkpoint)), Some(inside.join(checkpoint))];
        if let Some(path) = candidates.into_iter().flatten().find(|p| !checkpoint.is_empty() && p.is_dir()) {
            return Ok(path);
        }
        let steps: Vec<_> =
            crate::checkpoint::list(&inside)?.into_iter().map(|step| format!("step-{step:07}")).collect();
        let available = if steps.is_empty() { "none".to_owned() } else { listed(&steps, LISTED) };
        let reason = format!("there is no checkpoint {checkpoint:?}; available: {available}");
        Err(Error::Run { path: self.path.clone(), reason })
    }
}

/// Whether the folder is a run: it has settings, or a checkpoint, which contains them.
pub(crate) fn is_run(path: &Path) -> bool {
    let checkpoints = path.join(CHECKPOINTS);
    let has_checkpoint = || crate::checkpoint::list(&checkpoints).is_ok_and(|steps| !steps.is_empty());
    checkpoints.is_dir() && (path.join(CONFIG).is_file() || has_checkpoint())
}

/// A checkpoint's step in short form: 1000 for `step-0001000`.
fn short(name: &str) -> String {
    let step = name.strip_prefix("step-").and_then(|digits| digits.parse::<u64>().ok());
    step.map_or_else(|| name.to_owned(), |step| step.to_string())
}

/// The run that contains `path`, and the checkpoint folder that `path` is or lies in.
fn inside_run(path: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let within = |path: &Path| {
        let run = path.ancestors().skip(1).find(|p| is_run(p))?.to_owned();
        let inside = path.strip_prefix(&run).ok()?;
        let mut parts = inside.components();
        let folder = parts.next()?;
        let checkpoint = parts.next().filter(|_| folder.as_os_str() == CHECKPOINTS);
        let checkpoint = checkpoint.map(|name| run.join(folder).join(name));
        Some((run, checkpoint.filter(|c| c.join("manifest.json").is_file())))
    };
    if !path.exists() {
        return None;
    }
    // By the path as given, if that is conclusive; else by the resolved path.
    within(path).or_else(|| within(&path.canonicalize().ok()?))
}

/// Whether a file of this name in a run's samples folder is a sheet written during training.
pub(crate) fn step_sheet(name: &str) -> bool {
    let step = name.strip_prefix("step-").and_then(|rest| rest.strip_suffix(".png"));
    step.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether the creation of a run was interrupted before its settings were written, so that it contains nothing of value.
fn is_unfinished(path: &Path) -> bool {
    let (samples, checkpoints) = (path.join(SAMPLES), path.join(CHECKPOINTS));
    let inside = names(path);
    let ours = [SAMPLES, CHECKPOINTS, LOCK, crate::run_record::RECORD];
    !inside.is_empty()
        && inside.iter().all(|name| ours.contains(&name.as_str()))
        && names(&samples).is_empty()
        && crate::checkpoint::list(&checkpoints).is_ok_and(|steps| steps.iter().all(|&step| step == 0))
}

/// The names in the folder `root`, sorted; none if it cannot be listed.
fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn check_name(root: &Path, name: &str) -> Result<()> {
    let reason = if name.is_empty() {
        "the run's name is empty"
    } else if name.contains(['/', '\\', ':']) {
        "the run's name contains a path separator"
    } else if name.starts_with(['.', '-']) {
        "the run's name starts with a dot or a dash"
    } else if name.chars().any(char::is_control) {
        "the run's name contains control characters"
    } else if name.len() > 100 {
        "the run's name is longer than 100 bytes"
    } else {
        return Ok(());
    };
    let reason = format!(
        "{reason}; choose another --name made of letters and digits: \"{}\" cannot be a folder here",
        escaped(name)
    );
    Err(Error::Run { path: root.to_owned(), reason })
}

#[cfg(test)]
mod tests;
