//! A training run in its folder: steps, metrics, sample sheets, checkpoints, and resuming.

mod event;
mod sheet;

pub use event::{Event, Outcome};

use super::init::{self, Init};
use super::log::{LogEvent, RunLog};
use super::losses::Losses;
use super::resume::{Remark, Resume, restore};
use super::trainer::Trainer;
use crate::checkpoint;
use crate::config::{Config, open_data};
use crate::error::{Error, Result};
use crate::run_folder::{
    CardFacts, End, Metrics, NEW_CARD, RunFolder, RunLock, RunRecord, card_is_edited, sweep_leftovers,
    write_card,
};
use crate::text::shown;
use ddpm_engine::Region;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A run folder with its trainer.
pub struct Run {
    run: RunFolder,
    _lock: RunLock,
    trainer: Trainer,
    log: RunLog,
    losses: Losses,
    remarks: Vec<Remark>,
    /// The run's id, recorded in its checkpoints.
    id: String,
    /// The settings in `config.toml`; the trainer's settings replace them with the next checkpoint.
    written_config: Config,
    /// Training time of the run, including the time before a resume.
    elapsed: Duration,
}

impl Run {
    /// A trainer for new settings, before its run folder exists (to show the plan), with notes and warnings for the user.
    /// Starts from random weights if none are given.
    ///
    /// # Errors
    /// Weights trained with incompatible settings ([`Change::Breaking`](crate::config::Change)), unless forced.
    pub fn prepare(config: &Config, init: Option<Init<'_>>) -> Result<(Trainer, Vec<Remark>)> {
        let mut data = open_data(config)?;
        if let Some(init) = init {
            data = init::with_known_classes(data, init.path);
        }
        let mut trainer = Trainer::new(config, data)?;
        let remarks = init.map_or(Ok(Vec::new()), |init| init::load_init(&mut trainer, init))?;
        Ok((trainer, remarks))
    }

    /// Creates a run with these settings, in the next free folder of `root`: `run-001`, `run-002` and so on. Its data paths are
    /// made absolute, so that it can be resumed from another folder.
    ///
    /// ```no_run
    /// use ddpm::{Config, Run};
    ///
    /// let config = Config::builder().data("photos").size(32).steps(20_000).build()?;
    /// Run::create("runs", &config)?.train()?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// Data that cannot be read or does not fit the settings; a folder that cannot be created.
    pub fn create(root: impl AsRef<Path>, config: &Config) -> Result<Self> {
        let mut config = config.clone();
        config.make_paths_absolute();
        let (trainer, remarks) = Self::prepare(&config, None)?;
        Ok(Self { remarks, ..Self::start(root.as_ref(), None, trainer)? })
    }

    /// Creates the run folder of a prepared trainer: `root/name`, or a numbered one.
    ///
    /// # Errors
    /// [`Error::Run`] for a name that is taken or invalid; [`Error::Io`].
    pub fn start(root: &Path, name: Option<&str>, trainer: Trainer) -> Result<Self> {
        let run = RunFolder::create(root, name)?;
        let lock = run.lock()?;
        let mut given = Vec::new();
        if trainer.weights_given() {
            let weights = trainer.tensors(Region::Weights)?;
            given.extend(weights.iter().flat_map(|t| &t.data).flat_map(|v| v.to_le_bytes()));
        }
        let id = RunRecord::new_id(trainer.config(), &trainer.data().summary().fingerprint, &given);
        let record = RunRecord { id: Some(id.clone()), end: Some(End::Running), ..RunRecord::default() };
        record.write(run.path())?;
        if trainer.weights_given() {
            // A run that is resumed before its first checkpoint must not start from random weights.
            let mut checkpoint = trainer.checkpoint(None)?;
            checkpoint.manifest.run = Some(id.clone());
            checkpoint::save(&run.checkpoints(), &checkpoint)?;
        }
        // From here on it is a run and can be resumed.
        run.write_config(trainer.config())?;
        let (log, _) = RunLog::open(&run, trainer.config(), None)?;
        let session = Self {
            run,
            _lock: lock,
            written_config: trainer.config().clone(),
            losses: Losses::new(trainer.config(), 0),
            trainer,
            log,
            remarks: Vec::new(),
            id,
            elapsed: Duration::ZERO,
        };
        session.write_card()?;
        Ok(session)
    }

    /// The trainer of a run as [`resume`](Self::resume) would restore it, with notes and warnings for the user; changes
    /// nothing on disk.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    pub fn prepare_resume(root: &Path, run: &Path, resume: &Resume<'_>) -> Result<(Trainer, Vec<Remark>)> {
        let restored = restore(&RunFolder::open(root, run)?, resume)?;
        Ok((restored.trainer, restored.remarks))
    }

    /// Resumes a run from its newest intact checkpoint, or from the given one.
    ///
    /// # Errors
    /// Settings incompatible with the weights, a checkpoint of another run (both can be forced), fewer total steps than are
    /// completed; anything that prevents the run from being read.
    pub fn resume(root: &Path, run: &Path, resume: &Resume<'_>) -> Result<Self> {
        let run = RunFolder::open(root, run)?;
        let lock = run.lock()?;
        checkpoint::sweep_orphans(&run.checkpoints())?;
        sweep_leftovers(&run);
        let restored = restore(&run, resume)?;
        let (trainer, mut remarks) = (restored.trainer, restored.remarks);
        let step = trainer.steps_done();
        let id = restored.id.unwrap_or_else(|| {
            RunRecord::new_id(&restored.settings, &trainer.data().summary().fingerprint, &[])
        });
        RunRecord { id: Some(id.clone()), ..RunRecord::read(run.path()) }.write(run.path())?;
        for path in checkpoint::remove_superseded(&run.checkpoints(), step, Some(&id))? {
            let text = format!("removed {}, which was set aside earlier and is now superseded", shown(&path));
            remarks.push(Remark::Note(text));
        }
        for path in checkpoint::set_aside_after(&run.checkpoints(), step)? {
            let text = format!("set aside {}, which is newer than the checkpoint resumed from", shown(&path));
            remarks.push(Remark::Warning(text));
        }
        // Snapshots of steps that will be repeated, perhaps differently.
        checkpoint::sweep_orphans(&run.snapshots())?;
        checkpoint::remove_superseded(&run.snapshots(), step, None)?;
        checkpoint::set_aside_after(&run.snapshots(), step)?;
        // Newly requested settings are written with the first new checkpoint: until then the run stays unchanged.
        if !run.config_path().exists() || run.read_config()? != restored.settings {
            run.write_config(&restored.settings)?;
        }
        let written_config = run.read_config()?;
        let (log, earlier) = RunLog::open(&run, trainer.config(), Some(step))?;
        let mut losses = Losses::new(trainer.config(), restored.losses_since);
        earlier.iter().for_each(|m| losses.record(m.step, m.loss));
        if let Some(diverged) = losses.health.diverged() {
            let (lr, given) = (trainer.config().optimizer.lr, trainer.weights_given());
            let advice = losses.health.recovery_advice(&run, lr, None, given);
            remarks.push(Remark::Warning(format!(
                "the training had diverged by step {step}: {diverged}. {advice}"
            )));
        }
        if card_is_edited(&run) {
            let text = format!("README.md was edited and is kept; the model card is written to {NEW_CARD}");
            remarks.push(Remark::Note(text));
        }
        losses.health.restart();
        let elapsed =
            Duration::try_from_secs_f64(earlier.last().map_or(0.0, |m| m.seconds)).unwrap_or_default();
        Ok(Self { run, _lock: lock, trainer, log, losses, remarks, id, written_config, elapsed })
    }

    /// Takes the notes and warnings for the user; those not taken are reported when training starts.
    pub fn take_remarks(&mut self) -> Vec<Remark> {
        std::mem::take(&mut self.remarks)
    }

    /// The run folder.
    pub fn run_folder(&self) -> &RunFolder {
        &self.run
    }

    /// The trainer.
    pub fn trainer(&mut self) -> &mut Trainer {
        &mut self.trainer
    }

    fn loss(&self) -> Option<f64> {
        self.losses.mean()
    }

    /// A message about divergence with advice on how to recover; `None` if training has not diverged.
    pub fn divergence(&self) -> Option<String> {
        Some(format!("{}. {}", self.losses.health.diverged()?, self.recovery_advice(None)))
    }

    /// How to recover after training diverged, or the step after `failed` could not be completed.
    fn recovery_advice(&self, failed: Option<u64>) -> String {
        let given = self.trainer.weights_given();
        self.losses.health.recovery_advice(&self.run, self.trainer.config().optimizer.lr, failed, given)
    }

    /// Records how the training ended; nothing depends on it.
    fn record_end(&self, end: End, error: Option<String>) {
        let before = RunRecord::read(self.run.path());
        let record = RunRecord { id: Some(self.id.clone()), end: Some(end), error, ..before };
        // A full disk must not hide why training ended. A deleted folder is not recreated.
        let _ = record.write(self.run.path());
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// Errors of the data and the disk, and [`Error::NotFinite`] with advice on how to recover.
    pub fn train(&mut self) -> Result<Outcome> {
        self.train_with(&Arc::default(), &mut |_| {})
    }

    /// Trains to the end, or until `stop` is set: then the current step is aborted and a checkpoint is written. `on_event`
    /// receives each step and whatever else happens.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_with(
        &mut self,
        stop: &Arc<AtomicBool>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome> {
        self.trainer.set_stop(stop.clone());
        for remark in self.remarks.drain(..) {
            on_event(match remark {
                Remark::Note(text) => Event::Note(text),
                Remark::Warning(text) => Event::Warning(text),
            });
        }
        self.record_end(End::Running, None);
        let outcome = self.finish_last_save(on_event).and_then(|()| self.run_steps(stop, on_event));
        let outcome = outcome.map_err(|error| match error {
            Error::NotFinite { step, what, .. } => {
                Error::NotFinite { step, what, advice: self.recovery_advice(step.checked_sub(1)) }
            }
            other => other,
        });
        match &outcome {
            Ok(Outcome::Finished) => self.record_end(End::Finished, None),
            Ok(Outcome::Diverged) => {
                self.record_end(End::Diverged, self.losses.health.diverged());
            }
            Ok(Outcome::Stopped) => self.record_end(End::Stopped, None),
            Err(error) => self.record_end(End::Failed, Some(error.to_string())),
        }
        outcome
    }

    /// Completes what follows the saving of a checkpoint, if the process was killed in between.
    fn finish_last_save(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let (done, dir) = (self.trainer.steps_done(), self.run.checkpoints());
        if done == 0 || !checkpoint::path_of(&dir, done).is_dir() {
            return Ok(());
        }
        self.prune(done)?;
        // Otherwise they are written with the next checkpoint.
        if done == self.trainer.steps() && self.written_config == *self.trainer.config() {
            self.write_card()?;
            self.log_event(LogEvent::Checkpoint, on_event)?;
        }
        Ok(())
    }

    /// Records whether the checkpoint of `step` is the best, and removes those that are not kept.
    fn prune(&self, step: u64) -> Result<()> {
        let dir = self.run.checkpoints();
        // A checkpoint whose loss is on another scale cannot be the best.
        let since = self.losses.since;
        if step > since && checkpoint::best(&dir).is_some_and(|best| best.step <= since) {
            checkpoint::forget_best(&dir)?;
        }
        let best = match self.loss() {
            Some(loss) => checkpoint::note_best(&dir, step, loss)?.map(|b| b.step),
            None => checkpoint::best(&dir).map(|b| b.step),
        };
        checkpoint::retain(&dir, self.trainer.config().output.keep_checkpoints, best)?;
        Ok(())
    }

    fn run_steps(&mut self, stop: &Arc<AtomicBool>, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
        let steps = self.trainer.steps();
        let done = self.trainer.steps_done();
        // The sheet was interrupted after its checkpoint was written.
        if self.sheet_due(done)
            && !self.run.sample_path(done).exists()
            && !self.write_sheet(stop, on_event)?
        {
            return Ok(Outcome::Stopped);
        }
        if done >= steps {
            let advice = "set a larger number with --steps to continue";
            on_event(Event::Warning(format!("all {steps} steps of this run are completed; {advice}")));
            return Ok(Outcome::Finished);
        }
        let (start, mut steps_here, mut training) = (Instant::now(), 0u64, Duration::ZERO);
        let before = self.elapsed;
        let mut saved = self.trainer.steps_done();
        while self.trainer.steps_done() < steps {
            let step_start = Instant::now();
            let step = self.trainer.steps_done();
            let stopping = stop.load(Ordering::Relaxed);
            let result = if stopping { Err(Error::Interrupted) } else { self.trainer.step() };
            let report = match result {
                Err(Error::Interrupted) => {
                    if saved != step {
                        on_event(Event::Stopping { step });
                        self.save(on_event)?;
                    }
                    return Ok(Outcome::Stopped);
                }
                // The data failed, not the weights: save them.
                Err(error @ (Error::Data { .. } | Error::Io { .. })) => {
                    if saved != self.trainer.steps_done() {
                        self.save(on_event)?;
                    }
                    return Err(error);
                }
                other => other?,
            };
            let loss = f64::from(report.loss);
            let took = step_start.elapsed();
            training += took;
            steps_here += 1;
            self.losses.record(step + 1, loss);
            if let Some(diverged) = self.losses.health.newly_diverged() {
                on_event(Event::Warning(format!("step {}: training is diverging: {diverged}", step + 1)));
            }
            let batch = self.trainer.config().images_per_step() as f64;
            self.elapsed = before + start.elapsed();
            let seconds = self.elapsed.as_secs_f64();
            let images_per_second = batch / took.as_secs_f64();
            let (learning_rate, grad_norm) = (report.learning_rate, report.grad_norm);
            let metrics =
                Metrics { step: step + 1, loss, images_per_second, learning_rate, grad_norm, seconds };
            self.log_step(&metrics, on_event)?;
            let mean = training / u32::try_from(steps_here).unwrap_or(u32::MAX);
            let left = mean.saturating_mul(u32::try_from(steps - step - 1).unwrap_or(u32::MAX));
            let loss = self.loss().unwrap_or(loss);
            let images_per_second = batch / mean.as_secs_f64();
            on_event(Event::Step { step: step + 1, steps, loss, images_per_second, left });

            let done = step + 1;
            let ema = &self.trainer.config().ema;
            if !ema.power_widths.is_empty() && self.due(done, ema.snapshot_every) {
                checkpoint::save_snapshot(&self.run.snapshots(), done, &self.trainer.power_averages()?)?;
            }
            if self.due(done, self.trainer.config().output.checkpoint_every) {
                self.save(on_event)?;
                saved = done;
            }
            if self.sheet_due(done) && !self.write_sheet(stop, on_event)? && done == steps {
                return Ok(Outcome::Stopped);
            }
        }
        self.write_card()?;
        Ok(if self.losses.health.diverged().is_some() { Outcome::Diverged } else { Outcome::Finished })
    }

    fn log_step(&mut self, metrics: &Metrics, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let logged = self.log_event(LogEvent::Step(metrics), on_event);
        if let Err(Error::Io { source, .. }) = &logged {
            // If only the metrics file is gone, save the weights.
            if source.kind() == ErrorKind::NotFound && self.run.checkpoints().is_dir() {
                self.save(on_event)?;
            }
        }
        logged
    }

    /// Whether an action with period `every` is due after `done` steps.
    fn due(&self, done: u64, every: u64) -> bool {
        done > 0 && (done == self.trainer.steps() || (every > 0 && done.is_multiple_of(every)))
    }

    fn sheet_due(&self, done: u64) -> bool {
        let output = &self.trainer.config().output;
        output.sample_count > 0 && self.due(done, output.sample_every)
    }

    fn save(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let (step, loss) = (self.trainer.steps_done(), self.loss());
        let mut checkpoint = self.trainer.checkpoint(loss)?;
        checkpoint.manifest.run = Some(self.id.clone());
        checkpoint.manifest.losses_since = Some(self.losses.since).filter(|&since| since > 0);
        self.write_settings(on_event)?;
        let path = checkpoint::save(&self.run.checkpoints(), &checkpoint)?;
        self.prune(step)?;
        self.write_card()?;
        self.log_event(LogEvent::Checkpoint, on_event)?;
        on_event(Event::Checkpoint { step, path: &path });
        Ok(())
    }

    /// Writes the trainer's settings to `config.toml` if they changed, unless the file was edited in the meantime.
    fn write_settings(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        if self.written_config == *self.trainer.config() {
            return Ok(());
        }
        // A file that cannot be read was edited too.
        if self.run.config_path().exists()
            && self.run.read_config().ok().as_ref() != Some(&self.written_config)
        {
            let path = self.run.config_path();
            let text = format!(
                "{} was edited during training; the edits apply when the run is resumed",
                shown(&path)
            );
            on_event(Event::Warning(text));
        } else {
            self.run.write_config(self.trainer.config())?;
        }
        self.written_config = self.trainer.config().clone();
        Ok(())
    }

    /// Writes an event to the run's logs.
    fn log_event(&mut self, event: LogEvent<'_>, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        for warning in self.log.log(event)? {
            on_event(Event::Warning(warning));
        }
        Ok(())
    }

    fn write_card(&self) -> Result<()> {
        let step = self.trainer.steps_done();
        let checkpoints = self.run.checkpoints();
        let path = checkpoint::path_of(&checkpoints, step);
        let inside = path.strip_prefix(self.run.path()).ok().filter(|_| path.is_dir()).map(Path::to_owned);
        let summary = self.trainer.data().summary();
        let facts = CardFacts {
            parameters: self.trainer.num_parameters(),
            classes: self.trainer.class_names().to_vec(),
            data: format!("{} ({} images, {})", summary.source, summary.images, summary.shape),
            steps: step,
            loss: self.loss(),
            seconds: (!self.elapsed.is_zero()).then_some(self.elapsed.as_secs_f64()),
            imported: false,
            // The first checkpoint of an imported run has no EMA, whatever the settings are.
            has_ema: if path.is_dir() {
                path.join(checkpoint::EMA).is_file()
            } else {
                self.trainer.config().ema.decay > 0.0
            },
            checkpoint: inside,
        };
        write_card(&self.run, self.trainer.config(), &facts)
    }
}
