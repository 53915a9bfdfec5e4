//! What a run writes while it trains, besides checkpoints: several sinks receive the same events.
//!
//! `metrics.jsonl` is the run's record, which a resume reads: if it cannot be written, training stops with an error
//! that names it, and the last checkpoint stays intact. TensorBoard's event files ([`tensorboard`]) and `loss.png`
//! ([`curve`]) are views of it: if one cannot be written, a warning names it and training continues without that view
//! until the run is resumed.

mod curve;
mod tensorboard;

use crate::config::{Change, Config, SECTIONS};
use crate::error::Result;
use crate::image::Image;
use crate::run_folder::{Metrics, MetricsLog, RunFolder, read_metrics};

/// An event of a training run.
#[derive(Clone, Copy)]
pub(super) enum LogEvent<'a> {
    /// A step was completed.
    Step(&'a Metrics),
    /// A sample sheet was generated.
    Samples {
        /// Steps completed.
        step: u64,
        /// The sheet.
        sheet: &'a Image,
    },
    /// A checkpoint was written; happens also after the last step and when training is stopped.
    Checkpoint,
}

trait LogSink {
    fn write(&mut self, event: LogEvent<'_>) -> Result<()>;
}

impl LogSink for MetricsLog {
    fn write(&mut self, event: LogEvent<'_>) -> Result<()> {
        match event {
            LogEvent::Step(metrics) => self.append(metrics),
            _ => Ok(()),
        }
    }
}

/// All log sinks of a run.
pub(super) struct RunLog {
    record: MetricsLog,
    views: Vec<Box<dyn LogSink>>,
}

impl RunLog {
    /// Opens the logs of a run, with TensorBoard event files if enabled. In a run that continues after `done` steps,
    /// entries of later steps are dropped. Returns the metrics that remain.
    pub fn open(run: &RunFolder, config: &Config, done: Option<u64>) -> Result<(Self, Vec<Metrics>)> {
        let path = run.metrics_path();
        let record = MetricsLog::open(&path, done)?;
        let earlier = read_metrics(&path)?;
        let mut views: Vec<Box<dyn LogSink>> = vec![Box::new(curve::LossPlot::new(run, &earlier))];
        if config.output.tensorboard {
            let events = tensorboard::Events::new(run.path(), hyperparameters(config), done);
            views.push(Box::new(events));
        }
        Ok((Self { record, views }, earlier))
    }

    /// Writes the event to every sink. Returns a warning for each view that failed; it receives no more events.
    ///
    /// # Errors
    /// If the record cannot be written.
    pub fn log(&mut self, event: LogEvent<'_>) -> Result<Vec<String>> {
        self.record.write(event)?;
        let mut warnings = Vec::new();
        self.views.retain_mut(|view| match view.write(event) {
            Ok(()) => true,
            Err(e) => {
                warnings.push(format!("{e}; training continues without it"));
                false
            }
        });
        Ok(warnings)
    }
}

/// The settings that affect training, by their full keys, without unset ones.
fn hyperparameters(config: &Config) -> Vec<(String, toml::Value)> {
    let used = SECTIONS.iter().zip(config.values()).filter(|(section, _)| config.uses(section.name));
    let values =
        used.flat_map(|(section, values)| section.settings.iter().zip(values).map(move |v| (section, v)));
    values
        .filter(|(_, (setting, _))| setting.change != Change::Free)
        .filter_map(|(section, (setting, value))| {
            Some((format!("{}.{}", section.name, setting.name), value?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn metrics(step: u64) -> Metrics {
        let (loss, seconds) = (1.0 / step as f64, step as f64);
        Metrics { step, loss, images_per_second: 10.0, learning_rate: 1e-3, grad_norm: 0.5, seconds }
    }

    fn run(root: &Path) -> RunFolder {
        let run = RunFolder::create(root, Some("r")).unwrap();
        run.write_config(&Config::default()).unwrap();
        run
    }

    fn events(run: &RunFolder) -> usize {
        let names = fs::read_dir(run.path()).unwrap().map(|e| e.unwrap().file_name());
        names.filter(|n| n.to_string_lossy().contains("tfevents")).count()
    }

    #[test]
    fn every_view_is_written_and_a_resume_starts_a_new_event_file() {
        let root = tempfile::tempdir().unwrap();
        let run = run(root.path());
        let (mut log, earlier) = RunLog::open(&run, &Config::default(), None).unwrap();
        assert!(earlier.is_empty());
        for step in 1..=5 {
            assert!(log.log(LogEvent::Step(&metrics(step))).unwrap().is_empty());
        }
        assert!(!run.loss_path().exists(), "the plot is written with a checkpoint");
        assert!(log.log(LogEvent::Checkpoint).unwrap().is_empty());
        let plot = fs::read(run.loss_path()).unwrap();
        assert_eq!(events(&run), 1);
        drop(log);

        let (mut log, earlier) = RunLog::open(&run, &Config::default(), Some(3)).unwrap();
        assert_eq!(earlier, [metrics(1), metrics(2), metrics(3)]);
        assert_eq!(events(&run), 1, "nothing was logged yet");
        log.log(LogEvent::Step(&metrics(4))).unwrap();
        log.log(LogEvent::Checkpoint).unwrap();
        assert_eq!(events(&run), 2);
        assert_ne!(fs::read(run.loss_path()).unwrap(), plot);
        // The same steps give the same plot, whether they ran here or before a resume.
        log.log(LogEvent::Step(&metrics(5))).unwrap();
        log.log(LogEvent::Checkpoint).unwrap();
        assert_eq!(fs::read(run.loss_path()).unwrap(), plot);
    }

    #[test]
    fn a_view_that_cannot_be_written_warns_once_and_the_record_continues() {
        let root = tempfile::tempdir().unwrap();
        let run = run(root.path());
        // A folder blocks the plot's path.
        fs::create_dir(run.loss_path()).unwrap();
        let mut config = Config::default();
        config.output.tensorboard = false;
        let (mut log, _) = RunLog::open(&run, &config, None).unwrap();
        log.log(LogEvent::Step(&metrics(1))).unwrap();
        let warnings = log.log(LogEvent::Checkpoint).unwrap();
        assert!(
            matches!(&warnings[..], [w] if w.contains("loss.png") && w.contains("training continues")),
            "{warnings:?}"
        );
        log.log(LogEvent::Step(&metrics(2))).unwrap();
        assert!(log.log(LogEvent::Checkpoint).unwrap().is_empty());
        assert_eq!(read_metrics(&run.metrics_path()).unwrap().len(), 2);
        assert_eq!(events(&run), 0, "event files are disabled");
    }
}
