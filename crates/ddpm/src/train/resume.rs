//! Taking up a run: from which checkpoint, with which settings, and what a person is told of it.
//!
//! Settings come from the checkpoint; what was edited in the run's `config.toml` since goes over them, and what is asked for now
//! over both. [`Change`], which every setting has in the settings' table, decides what becomes of one that is another than the
//! checkpoint's.

use super::checkpoint::{self, Checkpoint, Manifest, of_run};
use super::classes::{self, Classes};
use super::config::{Change, Config, Difference};
use super::data::open_data;
use super::losses::{mean_at, measured_otherwise};
use super::rate::LearningRate;
use super::run::{Metrics, RunFolder, RunRecord, count_from_zero, missing_metrics, read_metrics};
use super::trainer::Trainer;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::text::{quoted, shown};
use std::fmt;
use std::path::{Path, PathBuf};

/// How a run is to be taken up.
pub struct Resume<'a> {
    /// From this checkpoint (a path, a name, a step); the newest whole one if not given.
    pub checkpoint: Option<&'a str>,
    /// Changes settings: the number of steps or of threads, say.
    pub change: &'a dyn Fn(&mut Config) -> Result<()>,
    /// Whether it goes on even where it has to learn again ([`Change::Learnt`]), or the checkpoint is not the run's.
    pub force: bool,
}

/// What a person should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remark {
    /// As a matter of course.
    Note(String),
    /// Because it may not be meant.
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

/// A run as it is taken up.
pub(super) struct Restored {
    pub trainer: Trainer,
    pub remarks: Vec<Remark>,
    /// The settings of the run without what is asked for now: what its `config.toml` should say until a checkpoint is written.
    pub settings: Config,
    /// The run's mark; none where nothing tells it.
    pub id: Option<String>,
    /// Steps after which losses are measured as they are now.
    pub losses_since: u64,
}

/// Why a checkpoint cannot be of the run whose losses are these: its own mean loss is another. The metrics may have fewer steps
/// than were made.
fn fits_metrics(manifest: &Manifest, metrics: &[Metrics]) -> Result<(), String> {
    let since = manifest.losses_since.unwrap_or(0);
    let (Some(told), Some(mean)) = (manifest.loss, mean_at(metrics, manifest.step, since)) else {
        return Ok(());
    };
    // A sum in another order.
    if (mean - told).abs() <= 1e-6 * told.abs().max(mean.abs()) || !mean.is_finite() {
        return Ok(());
    }
    Err(format!(
        "{}: its mean loss is {told:.6}, and that of metrics.jsonl up to step {} is {mean:.6}",
        checkpoint::OF_ANOTHER,
        manifest.step
    ))
}

/// The checkpoint to go on from, and warnings of those that were passed over.
fn find(run: &RunFolder, resume: &Resume<'_>, metrics: &[Metrics]) -> Result<(Option<PathBuf>, Vec<Remark>)> {
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
            // What cannot be read is told where the whole is loaded.
            if let Ok(manifest) = Manifest::read(&path)
                && !resume.force
                && let Err(reason) = of_run(&manifest, own.as_deref()).and_then(|()| fits(&manifest))
            {
                let reason = format!(
                    "{reason}; begin a run with its weights: --init {}, or go on from it all the same with --force",
                    quoted(&path)
                );
                return Err(Error::Checkpoint { path, reason });
            }
            Ok((Some(path), Vec::new()))
        }
    }
}

/// What was edited in the run's `config.toml` since its newest checkpoint was written; with a remark where the file is gone.
fn edits(run: &RunFolder) -> Result<(Vec<Difference>, Option<Remark>)> {
    let Some((path, manifest)) = checkpoint::newest_manifest(&run.checkpoints())? else {
        return Ok((Vec::new(), None));
    };
    let saved = manifest.config(&path)?;
    if !run.config_path().exists() {
        let text = format!("config.toml is gone; it is written again from {}", shown(&path));
        return Ok((Vec::new(), Some(Remark::Note(text))));
    }
    Ok((saved.differences(&run.read_config()?), None))
}

/// Refuses differences in what was learnt, unless it is forced; `source` is where the weights are from, `way_out` what else to do.
pub(super) fn check_learnt(source: &Path, learnt: &[&Difference], force: bool, way_out: &str) -> Result<()> {
    if learnt.is_empty() || force {
        return Ok(());
    }
    let list: Vec<String> =
        learnt.iter().map(|d| format!("{} = {} (now {})", d.key(), d.before(), d.now())).collect();
    let (these, is) = if list.len() == 1 { ("this", "is") } else { ("these", "are") };
    let reason = format!(
        "its weights were learnt with {}; {these} {is} part of what was learnt, and with other values the weights are worth little. \
         {way_out}; --force goes on all the same",
        list.join(", ")
    );
    Err(Error::Run { path: source.to_owned(), reason })
}

pub(super) fn learnt(differences: &[Difference]) -> Vec<&Difference> {
    differences.iter().filter(|d| d.change == Change::Learnt).collect()
}

/// The settings of the run, and those that are asked for; both may still leave to the data what depends on it.
struct Settings {
    /// The checkpoint's.
    saved: Config,
    /// With the edits of `config.toml`.
    settings: Config,
    /// With what is asked for now.
    asked: Config,
    remarks: Vec<Remark>,
}

fn settings(
    run: &RunFolder,
    resume: &Resume<'_>,
    loaded: Option<&(PathBuf, Checkpoint)>,
) -> Result<Settings> {
    let Some((path, checkpoint)) = loaded else {
        let saved = run.read_config()?;
        let mut asked = saved.clone();
        (resume.change)(&mut asked)?;
        return Ok(Settings { settings: saved.clone(), saved, asked, remarks: Vec::new() });
    };
    let done = checkpoint.manifest.step;
    let saved = checkpoint.manifest.config(path)?;
    let (mut edits, remark) = edits(run)?;
    let mut remarks: Vec<Remark> = remark.into_iter().collect();
    edits.retain(|edit| {
        let steps = edit.now.as_ref().and_then(toml::Value::as_integer);
        let behind = edit.key() == "train.steps" && steps.is_some_and(|s| s.unsigned_abs() < done);
        if behind {
            remarks.push(Remark::Warning(format!(
                "config.toml has {edit}, fewer than the {done} steps that were made; the plan stays as it was"
            )));
        }
        !behind
    });
    let settings = saved.with_differences(&edits)?;
    settings.validate()?;
    for edit in edits.iter().filter(|edit| saved.differences(&settings).iter().any(|d| d.key() == edit.key()))
    {
        remarks.push(Remark::Note(format!("config.toml was edited: {edit}")));
    }
    let mut asked = settings.clone();
    (resume.change)(&mut asked)?;
    Ok(Settings { saved, settings, asked, remarks })
}

/// The data with the numbers that the run has for its classes; the error is the reason alone.
fn with_learnt_classes(
    data: Box<dyn Dataset>,
    learnt: &[String],
    force: bool,
    remarks: &mut Vec<Remark>,
) -> Result<Box<dyn Dataset>, String> {
    let (data, found) = classes::as_learnt(data, learnt);
    match found {
        Classes::Same => {}
        Classes::Renumbered => remarks.push(Remark::Note(
            "the classes are not sorted as when the run began, or some have no images now: each keeps its number"
                .to_owned(),
        )),
        Classes::Others(reason) if force => remarks.push(Remark::Warning(reason)),
        Classes::Others(reason) => {
            return Err(format!("{reason}; give its own images, or go on all the same with --force"));
        }
    }
    Ok(data)
}

/// The trainer of a run at its newest whole checkpoint, or at the named one, and what a person should know.
pub(super) fn restore(run: &RunFolder, resume: &Resume<'_>) -> Result<Restored> {
    let path = run.metrics_path();
    let metrics = if path.exists() { read_metrics(&path)? } else { Vec::new() };
    let (found, mut remarks) = find(run, resume, &metrics)?;
    if count_from_zero(&path) {
        let text = "metrics.jsonl is of an earlier version, whose steps count from 0; from here on all its lines count the steps that are \
                    done, from 1, as checkpoints and TensorBoard do";
        remarks.push(Remark::Note(text.to_owned()));
    }
    let loaded: Option<(PathBuf, Checkpoint)> =
        found.map(|path| checkpoint::load(&path).map(|c| (path, c))).transpose()?;
    let settings = settings(run, resume, loaded.as_ref())?;
    remarks.extend(settings.remarks);
    let way_out = "Leave them as they were, here and in config.toml, or train a new run with them";
    if let Some((path, _)) = &loaded {
        // Before the data is looked at; what it decides is compared below.
        let (saved, asked) = (&settings.saved, &settings.asked);
        let differences = saved.filled_from(asked).differences(&asked.filled_from(saved));
        check_learnt(path, &learnt(&differences), resume.force, way_out)?;
    }
    let mut data = open_data(&settings.asked)?;
    if let Some((path, checkpoint)) = &loaded {
        let (learnt, force) = (&checkpoint.manifest.classes, resume.force);
        data = with_learnt_classes(data, learnt, force, &mut remarks)
            .map_err(|reason| Error::Run { path: path.clone(), reason })?;
    }
    let mut trainer = Trainer::new(&settings.asked, data)?;
    let mut id = RunRecord::read(run.path()).id;
    let mut losses_since = 0;
    match &loaded {
        Some((path, checkpoint)) => {
            trainer.restore(checkpoint, path)?;
            let manifest = &checkpoint.manifest;
            id = id.or_else(|| manifest.run.clone());
            let saved = settings.saved.filled_from(trainer.config());
            let differences = saved.differences(trainer.config());
            check_learnt(path, &learnt(&differences), resume.force, way_out)?;
            check_steps(&trainer)?;
            losses_since = manifest.losses_since.unwrap_or(0);
            if measured_otherwise(&differences, trainer.config()) && manifest.step > 0 {
                losses_since = manifest.step;
                let text =
                    "losses are measured in another way from here on: they do not compare with those before";
                remarks.push(Remark::Note(text.to_owned()));
            }
            remarks.extend(told(&trainer, manifest, &saved, &differences)?);
            remarks.extend(told_of_data(&trainer, manifest, path));
            if let Some(text) = missing_metrics(&metrics, manifest.step) {
                remarks.push(Remark::Warning(format!("{text}: loss.png and the mean loss do without them")));
            }
        }
        None => {
            let text = "the run has no checkpoint yet: it starts from the beginning";
            remarks.push(Remark::Warning(text.to_owned()));
        }
    }
    Ok(Restored { trainer, remarks, settings: settings.settings, id, losses_since })
}

/// Refuses a plan that ends before what is done.
fn check_steps(trainer: &Trainer) -> Result<()> {
    let (steps, done) = (trainer.steps(), trainer.steps_done());
    if steps >= done {
        return Ok(());
    }
    let reason = format!(
        "{steps} is fewer than the {done} steps that the run has made, so nothing was changed; give {done} or more, or go back to an \
         earlier checkpoint with --checkpoint STEP"
    );
    Err(Error::Config { key: "train.steps".to_owned(), reason })
}

/// What is told of settings that are others than the checkpoint's.
fn told(
    trainer: &Trainer,
    manifest: &Manifest,
    saved: &Config,
    differences: &[Difference],
) -> Result<Vec<Remark>> {
    let done = manifest.step;
    let mut remarks = Vec::new();
    for d in differences {
        match d.change {
            Change::Learnt => remarks.push(Remark::Warning(format!(
                "{} is {} from here on, as forced; the weights were learnt with {}",
                d.key(),
                d.now(),
                d.before()
            ))),
            // Before the first step nothing was done with it.
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
        remarks.extend(told_of_rate(trainer, manifest, saved)?);
        let now = trainer.computed_by();
        if let Some(before) = manifest.computed_by.as_ref().filter(|before| **before != now) {
            remarks.push(Remark::Note(format!(
                "computed by {now} from here on; it was {before} until step {done}, which rounds differently: the last digits of the \
                 weights will not be those of a run that was not moved"
            )));
        }
    }
    Ok(remarks)
}

/// Both learning rates of the next step, where the plan before had another there.
fn told_of_rate(trainer: &Trainer, manifest: &Manifest, saved: &Config) -> Result<Option<Remark>> {
    let (done, now) = (manifest.step, trainer.learning_rate());
    let mut planned = LearningRate::new(&saved.train);
    planned
        .restore(manifest.plateau)
        .map_err(|reason| Error::Run { path: "learning rate".into(), reason })?;
    let before = planned.at(done);
    if (now - before).abs() <= 1e-9 * now.abs().max(before.abs()) || done >= trainer.steps() {
        return Ok(None);
    }
    let last = planned.at(done - 1);
    Ok(Some(Remark::Warning(format!(
        "the learning rate of step {} is {}; as it was planned before it would be {}, and step {done} had {}",
        done + 1,
        short(now),
        short(before),
        short(last)
    ))))
}

/// A learning rate with four digits.
fn short(rate: f64) -> String {
    if rate == 0.0 { "0".to_owned() } else { format!("{rate:.3e}") }
}

/// What is told of other images than before.
fn told_of_data(trainer: &Trainer, manifest: &Manifest, path: &Path) -> Option<Remark> {
    let summary = trainer.data().summary();
    manifest.data.as_ref().filter(|before| **before != summary.fingerprint)?;
    let count = match manifest.images {
        Some(before) if before != summary.images as u64 => {
            format!(" ({before} then, {} now)", summary.images)
        }
        _ => String::new(),
    };
    Some(Remark::Warning(format!(
        "the images are not those that {} was trained on{count}: the run goes on with {}, and cannot be repeated from these alone",
        shown(path),
        summary.source
    )))
}
