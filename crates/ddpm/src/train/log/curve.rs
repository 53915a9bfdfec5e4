//! `loss.png`: the loss over all steps of a run, redrawn with every checkpoint.

use super::{LogEvent, LogSink};
use crate::error::Result;
use crate::plot::LossCurve;
use crate::run_folder::{Metrics, RunFolder};
use std::path::PathBuf;

/// Characters of a run's name that fit into the plot's title.
const MAX_NAME: usize = 60;

pub(super) struct LossPlot {
    path: PathBuf,
    title: String,
    curve: LossCurve,
}

impl LossPlot {
    /// The plot of a run that already has the metrics `earlier`.
    pub fn new(run: &RunFolder, earlier: &[Metrics]) -> Self {
        let mut curve = LossCurve::default();
        for metrics in earlier {
            curve.push(metrics.step, metrics.loss);
        }
        let name: String = run.name().chars().take(MAX_NAME).collect();
        Self { path: run.loss_path(), title: format!("Training loss of {name}"), curve }
    }
}

impl LogSink for LossPlot {
    fn write(&mut self, event: LogEvent<'_>) -> Result<()> {
        match event {
            LogEvent::Step(metrics) => self.curve.push(metrics.step, metrics.loss),
            LogEvent::Checkpoint if !self.curve.is_empty() => {
                self.curve.plot(&self.title)?.save(&self.path)?;
            }
            LogEvent::Checkpoint | LogEvent::Samples { .. } => {}
        }
        Ok(())
    }
}
