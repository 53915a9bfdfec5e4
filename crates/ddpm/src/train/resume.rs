//! Resuming a run: from which checkpoint, with which settings, and what to report to the user.
//!
//! Settings come from the checkpoint, overridden by later edits of the run's `config.toml`, overridden by what is requested
//! now. The [`Change`] of each setting in the settings table decides what happens if it differs from the checkpoint's.

use super::classes::{self, ClassMatch};
use super::losses::{changes_loss_scale, mean_at};
use super::trainer::Trainer;
use crate::checkpoint::{self, Checkpoint, Manifest, of_run};
use crate::config::open_data;
use crate::config::{Change, Config, Difference};
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::lr_schedule::LearningRate;
use crate::run_folder::{Metrics, RunFolder, RunRecord, counts_from_zero, missing_metrics, read_metrics};
use crate::text::{quoted, shown};
use std::fmt;
use std::path::{Path, PathBuf};

/// How to resume a run.
pub struct Resume<'a> {
    /// The checkpoint (a path, a name, a step); by default the newest intact one.
    pub checkpoint: Option<&'a str>,
    /// Changes settings, e.g. the number of steps or threads.
    pub change: &'a dyn Fn(&mut Config) -> Result<()>,
    /// Whether to accept breaking changes of settings ([`Change::Breaking`]) and checkpoints of another run.
    pub force: bool,
}

impl Default for Resume<'_> {
    /// The newest checkpoint with the run's settings.
    fn default() -> Self {
        Self { checkpoint: None, change: &|_| Ok(()), force: false }
    }
}

/// A message for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// Information.
    Note(String),
    /// Something that may be unintended.
    Warning(String),
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Note(text) => write!(f, "note: {text}"),
            Self::Warning(text) => write!(f, "warning: {text}"),
        }
    }
}

/// A restored run.
pub(super) struct Restored {
    pub trainer: Trainer,
    pub remarks: Vec<Remark>,
    /// The settings of the run without newly requested changes, which `config.toml` should contain until a checkpoint is written.
    pub settings: Config,
    /// The run's id, if recorded.
    pub id: Option<String>,
    /// Number of the last step whose loss is on another scale.
    pub losses_since: u64,
}

/// Checks that a checkpoint belongs to the run with these metrics, by its mean loss. The metrics may be incomplete.
fn fits_metrics(manifest: &Manifest, metrics: &[Metrics]) -> Result<(), String> {
    let since = manifest.losses_since.unwrap_or(0);
    let (Some(recorded), Some(mean)) = (manifest.loss, mean_at(metrics, manifest.step, since)) else {
        return Ok(());
    };
    // The sum may have been computed in another order.
    if (mean - recorded).abs() <= 1e-6 * recorded.abs().max(mean.abs()) || !mean.is_finite() {
        return Ok(());
    }
    Err(format!(
        "{}: its mean loss is {recorded:.6}, but that of metrics.jsonl up to step {} is {mean:.6}",
        checkpoint::OF_ANOTHER_RUN,
        manifest.step
    ))
}

/// The checkpoint to resume from, and warnings about those that were skipped.
fn choose_checkpoint(
    run: &RunFolder,
    resume: &Resume<'_>,
    metrics: &[Metrics],
) -> Result<(Option<PathBuf>, Vec<Remark>)> {
    let dir = run.checkpoints();
    let fits = |manifest: &Manifest| if resume.force { Ok(()) } else { fits_metrics(manifest, metrics) };
    match resume.checkpoint {
        None => {
            let newest = checkpoint::newest_where(&dir, fits)?;
            let remarks = newest.iter().flat_map(|n| n.warnings()).map(Remark::Warning).collect();
            Ok((newest.map(|n| n.path), remarks))
        }
        Some(name) => {
            let path = run.find_checkpoint(name)?;
            let own = RunRecord::read(run.path()).id;
            // Read errors are reported when the checkpoint is loaded.
            if let Ok(manifest) = Manifest::read(&path)
                && !resume.force
                && let Err(reason) = of_run(&manifest, own.as_deref()).and_then(|()| fits(&manifest))
            {
                let reason = format!(
                    "{reason}; start a new run from its weights: --init {}, or resume from it anyway with --force",
                    quoted(&path)
                );
                return Err(Error::Checkpoint { path, reason });
            }
            Ok((Some(path), Vec::new()))
        }
    }
}

/// The edits of the run's `config.toml` since its newest checkpoint was written, with a remark if the file is missing.
fn edits(run: &RunFolder) -> Result<(Vec<Difference>, Option<Remark>)> {
    let Some((path, manifest)) = checkpoint::newest_manifest(&run.checkpoints())? else {
        return Ok((Vec::new(), None));
    };
    let saved = manifest.config(&path)?;
    if !run.config_path().exists() {
        let text = format!("config.toml is missing; it is restored from {}", shown(&path));
        return Ok((Vec::new(), Some(Remark::Note(text))));
    }
    Ok((saved.differences(&run.read_config()?), None))
}

/// Rejects breaking changes unless forced; `source` is the origin of the weights, `remedy` the alternative to suggest.
pub(super) fn check_breaking(
    source: &Path,
    breaking: &[&Difference],
    force: bool,
    remedy: &str,
) -> Result<()> {
    if breaking.is_empty() || force {
        return Ok(());
    }
    let list: Vec<String> =
        breaking.iter().map(|d| format!("{} = {} (now {})", d.key(), d.before(), d.now())).collect();
    let these = if list.len() == 1 { "this setting changes" } else { "these settings change" };
    let reason = format!(
        "its weights were trained with {}; they are of little use if {these}. {remedy}; --force continues anyway",
        list.join(", ")
    );
    Err(Error::Run { path: source.to_owned(), reason })
}

fn breaking(differences: &[Difference]) -> Vec<&Difference> {
    differences.iter().filter(|d| d.change == Change::Breaking).collect()
}

/// The settings of the run, and the requested ones; both may leave unset what depends on the data.
struct Settings {
    /// The checkpoint's.
    saved: Config,
    /// The same with the edits of `config.toml`.
    settings: Config,
    /// The same with the newly requested changes.
    requested: Config,
    remarks: Vec<Remark>,
}

fn settings(
    run: &RunFolder,
    resume: &Resume<'_>,
    loaded: Option<&(PathBuf, Checkpoint)>,
) -> Result<Settings> {
    let Some((path, checkpoint)) = loaded else {
        let saved = run.read_config()?;
        let mut requested = saved.clone();
        (resume.change)(&mut requested)?;
        return Ok(Settings { settings: saved.clone(), saved, requested, remarks: Vec::new() });
    };
    let done = checkpoint.manifest.step;
    let saved = checkpoint.manifest.config(path)?;
    let (mut edits, remark) = edits(run)?;
    let mut remarks: Vec<Remark> = remark.into_iter().collect();
    edits.retain(|edit| {
        let steps = edit.now.as_ref().and_then(toml::Value::as_integer);
        let too_few = edit.key() == "train.steps" && steps.is_some_and(|s| s.unsigned_abs() < done);
        if too_few {
            remarks.push(Remark::Warning(format!(
                "config.toml has {edit}, fewer than the {done} completed steps; this edit is ignored"
            )));
        }
        !too_few
    });
    let settings = saved.with_differences(&edits)?;
    settings.validate()?;
    for edit in edits.iter().filter(|edit| saved.differences(&settings).iter().any(|d| d.key() == edit.key()))
    {
        remarks.push(Remark::Note(format!("config.toml was edited: {edit}")));
    }
    let mut requested = settings.clone();
    (resume.change)(&mut requested)?;
    Ok(Settings { saved, settings, requested, remarks })
}

/// The data with the run's class indices; the error is only the reason.
fn with_run_classes(
    data: Box<dyn Dataset>,
    known: &[String],
    force: bool,
    remarks: &mut Vec<Remark>,
) -> Result<Box<dyn Dataset>, String> {
    let (data, found) = classes::with_class_indices(data, known);
    match found {
        ClassMatch::Same => {}
        ClassMatch::Reindexed => remarks.push(Remark::Note(
            "the classes are ordered differently than when the run started, or some have no images now; each keeps its index"
                .to_owned(),
        )),
        ClassMatch::Unknown(reason) if force => remarks.push(Remark::Warning(reason)),
        ClassMatch::Unknown(reason) => {
            return Err(format!("{reason}; use the run's own images, or continue anyway with --force"));
        }
    }
    Ok(data)
}

/// Restores the trainer of a run from its newest intact checkpoint, or from the given one.
pub(super) fn restore(run: &RunFolder, resume: &Resume<'_>) -> Result<Restored> {
    let path = run.metrics_path();
    let metrics = if path.exists() { read_metrics(&path)? } else { Vec::new() };
    let (found, mut remarks) = choose_checkpoint(run, resume, &metrics)?;
    if counts_from_zero(&path) {
        let text = "metrics.jsonl is of an earlier version, which counted steps from 0; it is converted to count completed steps from \
                    1, as checkpoints and TensorBoard do";
        remarks.push(Remark::Note(text.to_owned()));
    }
    let loaded: Option<(PathBuf, Checkpoint)> =
        found.map(|path| checkpoint::load(&path).map(|c| (path, c))).transpose()?;
    let settings = settings(run, resume, loaded.as_ref())?;
    remarks.extend(settings.remarks);
    let remedy = "Restore them, on the command line and in config.toml, or train a new run";
    if let Some((path, _)) = &loaded {
        // Before the data is opened; settings that depend on it are compared below.
        let (saved, requested) = (&settings.saved, &settings.requested);
        let differences = saved.filled_from(requested).differences(&requested.filled_from(saved));
        check_breaking(path, &breaking(&differences), resume.force, remedy)?;
    }
    let mut data = open_data(&settings.requested)?;
    if let Some((path, checkpoint)) = &loaded {
        let (known, force) = (&checkpoint.manifest.classes, resume.force);
        data = with_run_classes(data, known, force, &mut remarks)
            .map_err(|reason| Error::Run { path: path.clone(), reason })?;
    }
    let mut trainer = Trainer::new(&settings.requested, data)?;
    let mut id = RunRecord::read(run.path()).id;
    let mut losses_since = 0;
    match &loaded {
        Some((path, checkpoint)) => {
            trainer.restore(checkpoint, path)?;
            let manifest = &checkpoint.manifest;
            id = id.or_else(|| manifest.run.clone());
            let saved = settings.saved.filled_from(trainer.config());
            let differences = saved.differences(trainer.config());
            check_breaking(path, &breaking(&differences), resume.force, remedy)?;
            check_steps(&trainer)?;
            losses_since = manifest.losses_since.unwrap_or(0);
            if changes_loss_scale(&differences, trainer.config()) && manifest.step > 0 {
                losses_since = manifest.step;
                let text =
                    "the loss is computed differently from here on and is not comparable with earlier losses";
                remarks.push(Remark::Note(text.to_owned()));
            }
            remarks.extend(report_changes(&trainer, manifest, &saved, &differences)?);
            remarks.extend(report_data_change(&trainer, manifest, path));
            if let Some(text) = missing_metrics(&metrics, manifest.step) {
                remarks.push(Remark::Warning(format!("{text}; loss.png and the mean loss omit them")));
            }
        }
        None => {
            let text = "the run has no checkpoint yet; it starts from the beginning";
            remarks.push(Remark::Warning(text.to_owned()));
        }
    }
    Ok(Restored { trainer, remarks, settings: settings.settings, id, losses_since })
}

/// Rejects a total number of steps below the completed ones.
fn check_steps(trainer: &Trainer) -> Result<()> {
    let (steps, done) = (trainer.steps(), trainer.steps_done());
    if steps >= done {
        return Ok(());
    }
    let reason = format!(
        "{steps} is fewer than the {done} steps that the run has completed, so nothing was changed; give {done} or more, or go back \
         to an earlier checkpoint with --checkpoint STEP"
    );
    Err(Error::Config { key: "train.steps".to_owned(), reason })
}

/// Remarks about settings that differ from the checkpoint's.
fn report_changes(
    trainer: &Trainer,
    manifest: &Manifest,
    saved: &Config,
    differences: &[Difference],
) -> Result<Vec<Remark>> {
    let done = manifest.step;
    let mut remarks = Vec::new();
    for d in differences {
        match d.change {
            Change::Breaking => remarks.push(Remark::Warning(format!(
                "{} is {} from here on (forced); the weights were trained with {}",
                d.key(),
                d.now(),
                d.before()
            ))),
            // Before the first step a change has no effect.
            Change::Noted if done > 0 => remarks.push(Remark::Note(format!(
                "{} is {} from here on; it was {} until step {done}",
                d.key(),
                d.now(),
                d.before()
            ))),
            Change::Noted | Change::Free => {}
        }
    }
    if done > 0 {
        remarks.extend(report_lr_change(trainer, manifest, saved)?);
        let now = trainer.computed_by();
        if let Some(before) = manifest.computed_by.as_ref().filter(|before| **before != now) {
            remarks.push(Remark::Note(format!(
                "computed by {now} from here on; it was {before} until step {done}, which rounds differently: the weights will differ \
                 in the last digits from those of a run that was not moved"
            )));
        }
    }
    Ok(remarks)
}

/// A remark with both learning rates of the next step, if the previous settings gave another one.
fn report_lr_change(trainer: &Trainer, manifest: &Manifest, saved: &Config) -> Result<Option<Remark>> {
    let (done, now) = (manifest.step, trainer.learning_rate());
    let mut planned = LearningRate::new(saved);
    planned
        .restore(manifest.plateau)
        .map_err(|reason| Error::Run { path: "learning rate".into(), reason })?;
    let before = planned.at(done);
    if (now - before).abs() <= 1e-9 * now.abs().max(before.abs()) || done >= trainer.steps() {
        return Ok(None);
    }
    let last = planned.at(done - 1);
    Ok(Some(Remark::Warning(format!(
        "the learning rate of step {} is {}; with the previous settings it would be {}, and step {done} had {}",
        done + 1,
        short(now),
        short(before),
        short(last)
    ))))
}

/// A learning rate with four significant digits.
fn short(rate: f64) -> String {
    if rate == 0.0 { "0".to_owned() } else { format!("{rate:.3e}") }
}

/// A remark if the images differ from those of the checkpoint.
fn report_data_change(trainer: &Trainer, manifest: &Manifest, path: &Path) -> Option<Remark> {
    let summary = trainer.data().summary();
    manifest.data.as_ref().filter(|before| **before != summary.fingerprint)?;
    let count = match manifest.images {
        Some(before) if before != summary.images as u64 => {
            format!(" ({before} before, {} now)", summary.images)
        }
        _ => String::new(),
    };
    Some(Remark::Warning(format!(
        "the images are not those that {} was trained on{count}; the run continues with {}, and can no longer be reproduced from these alone",
        shown(path),
        summary.source
    )))
}
