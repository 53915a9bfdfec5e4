//! A training run in its folder: steps, metrics, sample sheets, checkpoints, and taking it up again.

use super::checkpoint;
use super::config::Config;
use super::data::open_data;
use super::init::{self, Init};
use super::log::{Entry, RunLog};
use super::losses::Losses;
use super::resume::{Remark, Resume, restore};
use super::run::{
    CardFacts, End, Metrics, NEW_CARD, RunFolder, RunLock, RunRecord, card_is_edited, sweep_leftovers,
    write_card,
};
use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::generate::{Generator, Request};
use crate::image::{Image, save_png};
use crate::plot::sheet::{self, Sheet};
use crate::sampler::Options;
use crate::schedule::Schedule;
use crate::text::shown;
use ddpm_engine::Region;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Seed of the sample sheets, the same all through a run so that sheets compare.
const SHEET_SEED: u64 = 0;

/// What happened; the command line shows it.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A step was made.
    Step {
        /// Steps made.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// Mean loss of the last steps (at most 100).
        loss: f64,
        /// Images a second.
        images_per_second: f64,
        /// Time that the rest will take.
        left: Duration,
    },
    /// A sample sheet is being drawn.
    Drawing {
        /// Denoising steps done.
        done: usize,
        /// All denoising steps.
        steps: usize,
    },
    /// A sample sheet was written.
    Samples {
        /// Steps made.
        step: u64,
        /// The file.
        path: &'a Path,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps made.
        step: u64,
        /// The folder.
        path: &'a Path,
    },
    /// It was asked to stop, and what was learnt is written.
    Stopping {
        /// Steps made.
        step: u64,
    },
    /// Something that a person should know.
    Warning(String),
    /// Something that a person should know, as a matter of course.
    Note(String),
}

/// The sheet of a step's samples: of one size and layout all through a run, so that sheets compare.
fn step_sheet(generator: &Generator, step: u64, images: Vec<Image>) -> Result<Image> {
    let class = |i: usize| Some(generator.class_label(Request::default().class.of(i, generator.classes()?)?));
    let sheet = Sheet {
        title: format!("step {step:07}"),
        columns: sheet::columns(images.len(), generator.shape()),
        captions: (0..images.len()).filter_map(class).collect(),
        images,
        ..Sheet::default()
    };
    sheet.draw()
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were made.
    Finished,
    /// All steps were made, and the loss is that of a training that has diverged: [`Session::divergence`] says more.
    Diverged,
    /// It was asked to stop; a checkpoint was written.
    Stopped,
}

/// A run folder with its trainer.
pub struct Session {
    run: RunFolder,
    _lock: RunLock,
    trainer: Trainer,
    log: RunLog,
    losses: Losses,
    remarks: Vec<Remark>,
    /// The run's mark, which its checkpoints get.
    id: String,
    /// What `config.toml` says; the settings of the trainer take its place with the next checkpoint.
    written: Config,
    /// Time spent on the run, earlier parts included.
    spent: Duration,
}

impl Session {
    /// A trainer for new settings, before there is a folder for it: for telling the plan; and what a person should know. It begins
    /// with drawn weights if none are given.
    ///
    /// # Errors
    /// Weights that were learnt with other settings ([`Change::Learnt`](super::config::Change)), if it is not forced.
    pub fn prepare(config: &Config, init: Option<Init<'_>>) -> Result<(Trainer, Vec<Remark>)> {
        let mut data = open_data(config)?;
        if let Some(init) = init {
            data = init::with_known_classes(data, init.path);
        }
        let mut trainer = Trainer::new(config, data)?;
        let remarks = init.map_or(Ok(Vec::new()), |init| init::begin_with(&mut trainer, init))?;
        Ok((trainer, remarks))
    }

    /// Makes the run folder of a prepared trainer: `root/name`, or a numbered one.
    pub fn create(root: &Path, name: Option<&str>, trainer: Trainer) -> Result<Self> {
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
            // A run that is taken up before its first checkpoint must not begin with drawn weights.
            let mut checkpoint = trainer.checkpoint(None)?;
            checkpoint.manifest.run = Some(id.clone());
            checkpoint::save(&run.checkpoints(), &checkpoint)?;
        }
        // From here on it is a run, which can be taken up.
        run.write_config(trainer.config())?;
        let (log, _) = RunLog::open(&run, trainer.config(), None)?;
        let session = Self {
            run,
            _lock: lock,
            written: trainer.config().clone(),
            losses: Losses::new(trainer.config(), 0),
            trainer,
            log,
            remarks: Vec::new(),
            id,
            spent: Duration::ZERO,
        };
        session.write_card()?;
        Ok(session)
    }

    /// The trainer of a run as [`resume`](Self::resume) would take it up, and what a person should know; changes
    /// nothing on the disk.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    pub fn prepare_resume(root: &Path, run: &Path, resume: &Resume<'_>) -> Result<(Trainer, Vec<Remark>)> {
        let restored = restore(&RunFolder::open(root, run)?, resume)?;
        Ok((restored.trainer, restored.remarks))
    }

    /// Takes up a run at its newest whole checkpoint, or at the named one.
    ///
    /// # Errors
    /// Settings that the weights were not learnt with, a checkpoint of another run (both may be forced), a plan that ends before
    /// what is done; whatever keeps the run from being read.
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
        for path in checkpoint::sweep_overtaken(&run.checkpoints(), step, Some(&id))? {
            let text =
                format!("removed {}, which was set aside and which the run has passed since", shown(&path));
            remarks.push(Remark::Note(text));
        }
        for path in checkpoint::set_aside_after(&run.checkpoints(), step)? {
            let text = format!("set aside {}, which is newer than the one taken up", shown(&path));
            remarks.push(Remark::Warning(text));
        }
        // Of steps that are made again, perhaps in another way.
        checkpoint::sweep_orphans(&run.snapshots())?;
        checkpoint::sweep_overtaken(&run.snapshots(), step, None)?;
        checkpoint::set_aside_after(&run.snapshots(), step)?;
        // What is asked for now is written with the first checkpoint that it has made: until then the run is as it was.
        if !run.config_path().exists() || run.read_config()? != restored.settings {
            run.write_config(&restored.settings)?;
        }
        let written = run.read_config()?;
        let (log, earlier) = RunLog::open(&run, trainer.config(), Some(step))?;
        let mut losses = Losses::new(trainer.config(), restored.losses_since);
        earlier.iter().for_each(|m| losses.note(m.step, m.loss));
        if let Some(diverged) = losses.health.diverged() {
            let (lr, given) = (trainer.config().train.lr, trainer.weights_given());
            let way = losses.health.way_back(&run, lr, None, given);
            remarks.push(Remark::Warning(format!(
                "the training had diverged by step {step}: {diverged}. {way}"
            )));
        }
        if card_is_edited(&run) {
            let text = format!("README.md was edited and stays as it is; the model card goes to {NEW_CARD}");
            remarks.push(Remark::Note(text));
        }
        losses.health.take_up();
        let spent =
            Duration::try_from_secs_f64(earlier.last().map_or(0.0, |m| m.seconds)).unwrap_or_default();
        Ok(Self { run, _lock: lock, trainer, log, losses, remarks, id, written, spent })
    }

    /// What a person should know before it trains; what is not taken is told when it begins.
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

    /// What is known of a training that has diverged, and where to go on from.
    pub fn divergence(&self) -> Option<String> {
        Some(format!("{}. {}", self.losses.health.diverged()?, self.way_back(None)))
    }

    /// From where, and how, to go on after the training left what is good, or could not make the step behind `failed`.
    fn way_back(&self, failed: Option<u64>) -> String {
        let given = self.trainer.weights_given();
        self.losses.health.way_back(&self.run, self.trainer.config().train.lr, failed, given)
    }

    /// Notes how the training ended; nothing depends on it.
    fn note_end(&self, end: End, error: Option<String>) {
        let before = RunRecord::read(self.run.path());
        let record = RunRecord { id: Some(self.id.clone()), end: Some(end), error, ..before };
        // A disk that is full must not hide why the training ended. A folder that is gone is not made again.
        let _ = record.write(self.run.path());
    }

    /// Trains to the end, or until `stop` is set: then what is being made is given up, and what was learnt before is written.
    ///
    /// # Errors
    /// Of the data, of the disk, and [`Error::NotFinite`] with where to go on from.
    pub fn train(&mut self, stop: &Arc<AtomicBool>, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
        self.trainer.set_stop(stop.clone());
        for remark in self.remarks.drain(..) {
            on_event(match remark {
                Remark::Note(text) => Event::Note(text),
                Remark::Warning(text) => Event::Warning(text),
            });
        }
        self.note_end(End::Running, None);
        let outcome = self.tidy(on_event).and_then(|()| self.make_steps(stop, on_event));
        let outcome = outcome.map_err(|error| match error {
            Error::NotFinite { step, what, .. } => {
                Error::NotFinite { step, what, advice: self.way_back(step.checked_sub(1)) }
            }
            other => other,
        });
        match &outcome {
            Ok(Outcome::Finished) => self.note_end(End::Finished, None),
            Ok(Outcome::Diverged) => {
                self.note_end(End::Diverged, self.losses.health.diverged());
            }
            Ok(Outcome::Stopped) => self.note_end(End::Stopped, None),
            Err(error) => self.note_end(End::Failed, Some(error.to_string())),
        }
        outcome
    }

    /// Completes what follows a checkpoint, where a process was killed between the two.
    fn tidy(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let (done, dir) = (self.trainer.steps_done(), self.run.checkpoints());
        if done == 0 || !checkpoint::path_of(&dir, done).is_dir() {
            return Ok(());
        }
        self.prune(done)?;
        // Else they are made again with the next checkpoint.
        if done == self.trainer.steps() && self.written == *self.trainer.config() {
            self.write_card()?;
            self.note(Entry::Checkpoint, on_event)?;
        }
        Ok(())
    }

    /// Notes whether the checkpoint of `step` is the best, and removes those that are not kept.
    fn prune(&self, step: u64) -> Result<()> {
        let dir = self.run.checkpoints();
        // One whose loss is of another measure is not the best of those that are compared now.
        let since = self.losses.since;
        if step > since && checkpoint::best(&dir).is_some_and(|best| best.step <= since) {
            checkpoint::forget_best(&dir)?;
        }
        let best = match self.loss() {
            Some(loss) => checkpoint::note_best(&dir, step, loss)?.map(|b| b.step),
            None => checkpoint::best(&dir).map(|b| b.step),
        };
        checkpoint::retain(&dir, self.trainer.config().train.keep, best)?;
        Ok(())
    }

    fn make_steps(&mut self, stop: &Arc<AtomicBool>, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
        let steps = self.trainer.steps();
        let done = self.trainer.steps_done();
        // Where drawing it was interrupted after the checkpoint.
        if self.sheet_due(done) && !self.run.sample_path(done).exists() && !self.draw_sheet(stop, on_event)? {
            return Ok(Outcome::Stopped);
        }
        if done >= steps {
            let advice = "give more with --steps to go on";
            on_event(Event::Warning(format!("all {steps} steps of this run are done: {advice}")));
            return Ok(Outcome::Finished);
        }
        let (start, mut steps_here, mut training) = (Instant::now(), 0u64, Duration::ZERO);
        let before = self.spent;
        let mut saved = self.trainer.steps_done();
        while self.trainer.steps_done() < steps {
            let begun = Instant::now();
            let step = self.trainer.steps_done();
            let asked = stop.load(Ordering::Relaxed);
            let made = if asked { Err(Error::Interrupted) } else { self.trainer.step() };
            let report = match made {
                Err(Error::Interrupted) => {
                    if saved != step {
                        on_event(Event::Stopping { step });
                        self.save(on_event)?;
                    }
                    return Ok(Outcome::Stopped);
                }
                // The images failed, not the weights: what was learnt is kept.
                Err(error @ (Error::Data { .. } | Error::Io { .. })) => {
                    if saved != self.trainer.steps_done() {
                        self.save(on_event)?;
                    }
                    return Err(error);
                }
                other => other?,
            };
            let loss = f64::from(report.loss);
            let took = begun.elapsed();
            training += took;
            steps_here += 1;
            self.losses.note(step + 1, loss);
            if let Some(diverged) = self.losses.health.newly_diverged() {
                on_event(Event::Warning(format!("step {}: the training diverges: {diverged}", step + 1)));
            }
            let batch = self.trainer.config().images_per_step() as f64;
            self.spent = before + start.elapsed();
            let seconds = self.spent.as_secs_f64();
            let images_per_second = batch / took.as_secs_f64();
            let (learning_rate, grad_norm) = (report.learning_rate, report.grad_norm);
            let metrics =
                Metrics { step: step + 1, loss, images_per_second, learning_rate, grad_norm, seconds };
            if let Err(error) = self.note(Entry::Step(&metrics), on_event) {
                // Where the file alone is gone, what was learnt is kept.
                let gone = matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::NotFound);
                if gone && self.run.checkpoints().is_dir() {
                    self.save(on_event)?;
                }
                return Err(error);
            }
            let mean = training / u32::try_from(steps_here).unwrap_or(u32::MAX);
            let left = mean.saturating_mul(u32::try_from(steps - step - 1).unwrap_or(u32::MAX));
            let loss = self.loss().unwrap_or(loss);
            let images_per_second = batch / mean.as_secs_f64();
            on_event(Event::Step { step: step + 1, steps, loss, images_per_second, left });

            let done = step + 1;
            let train = &self.trainer.config().train;
            if !train.power_ema.is_empty() && self.due(done, train.snapshot_every) {
                checkpoint::save_snapshot(&self.run.snapshots(), done, &self.trainer.power_averages()?)?;
            }
            if self.due(done, self.trainer.config().train.checkpoint_every) {
                self.save(on_event)?;
                saved = done;
            }
            if self.sheet_due(done) && !self.draw_sheet(stop, on_event)? && done == steps {
                return Ok(Outcome::Stopped);
            }
        }
        self.write_card()?;
        Ok(if self.losses.health.diverged().is_some() { Outcome::Diverged } else { Outcome::Finished })
    }

    /// Whether what is done `every` so many steps is due after `done` steps.
    fn due(&self, done: u64, every: u64) -> bool {
        done > 0 && (done == self.trainer.steps() || (every > 0 && done.is_multiple_of(every)))
    }

    fn sheet_due(&self, done: u64) -> bool {
        let t = &self.trainer.config().train;
        t.sample_count > 0 && self.due(done, t.sample_every)
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
        self.note(Entry::Checkpoint, on_event)?;
        on_event(Event::Checkpoint { step, path: &path });
        Ok(())
    }

    /// Puts the settings that are trained with into `config.toml`, where they are others, unless it was edited meanwhile.
    fn write_settings(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        if self.written == *self.trainer.config() {
            return Ok(());
        }
        // One that cannot be read now was edited too.
        if self.run.config_path().exists() && self.run.read_config().ok().as_ref() != Some(&self.written) {
            let path = self.run.config_path();
            let text =
                format!("{} was edited while the run trained; it counts when it is taken up", shown(&path));
            on_event(Event::Warning(text));
        } else {
            self.run.write_config(self.trainer.config())?;
        }
        self.written = self.trainer.config().clone();
        Ok(())
    }

    /// Tells the run's logs.
    fn note(&mut self, entry: Entry<'_>, on_event: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        for warning in self.log.tell(entry)? {
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
            seconds: (!self.spent.is_zero()).then_some(self.spent.as_secs_f64()),
            imported: false,
            // The first checkpoint of an imported run has none, whatever the settings ask for.
            has_ema: match path.is_dir() {
                true => path.join(checkpoint::EMA).is_file(),
                false => self.trainer.config().train.ema_decay > 0.0,
            },
            checkpoint: inside,
        };
        write_card(&self.run, self.trainer.config(), &facts)
    }

    /// Draws the sheet with the averaged weights (the raw ones without an average) and writes it, unless
    /// `stop` is set: gives whether it did.
    fn draw_sheet(&mut self, stop: &Arc<AtomicBool>, on_event: &mut dyn FnMut(Event<'_>)) -> Result<bool> {
        let (config, step) = (self.trainer.config().clone(), self.trainer.steps_done());
        let region = if config.train.ema_decay > 0.0 { Region::Ema } else { Region::Weights };
        let weights = self.trainer.tensors(region)?;
        let generator = Generator::new(&config, weights, self.run.path(), config.train.hardware())?;
        let mut generator = generator.with_class_names(self.trainer.data().classes().to_vec());
        generator.set_stop(stop.clone());
        let t = &config.train;
        let most = Schedule::from_config(&config.diffusion)?.timesteps_with_signal();
        let steps = (t.sample_steps > 0 && t.sample_steps < most).then_some(t.sample_steps);
        let sampling = Options::of_run(&config.sampling)?;
        let sampling = Options { steps: steps.or(sampling.steps), ..sampling };
        let request = Request { count: t.sample_count, seed: SHEET_SEED, sampling, ..Request::default() };
        let drawn = generator.draw(request, &mut |first, s| {
            let (batches, batch) = request.batches();
            on_event(Event::Drawing { done: first / batch * s.steps + s.done, steps: batches * s.steps });
            if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
        });
        let images = match drawn {
            Err(Error::Interrupted) => return Ok(false), // the loop sees the flag and saves
            other => other?,
        };
        let path = self.run.sample_path(step);
        let sheet = step_sheet(&generator, step, images)?;
        save_png(&sheet, &path)?;
        on_event(Event::Samples { step, path: &path });
        self.note(Entry::Samples { step, sheet: &sheet }, on_event)?;
        Ok(true)
    }
}
