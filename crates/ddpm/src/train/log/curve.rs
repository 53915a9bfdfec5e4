//! `loss.png`: the loss over all steps of a run, drawn anew with every checkpoint.

use super::{Entry, LogSink};
use crate::error::Result;
use crate::image::save_png;
use crate::plot::LossCurve;
use crate::train::run::{Metrics, RunFolder};
use std::path::PathBuf;

/// Letters of a run's name that fit the plot.
const LONGEST_NAME: usize = 60;

pub(super) struct LossPlot {
    path: PathBuf,
    title: String,
    curve: LossCurve,
}

impl LossPlot {
    /// The plot of a run that has made the steps of `earlier`.
    pub fn new(run: &RunFolder, earlier: &[Metrics]) -> Self {
        let mut curve = LossCurve::default();
        for metrics in earlier {
            curve.push(metrics.step, metrics.loss);
        }
        let name: String = run.name().chars().take(LONGEST_NAME).collect();
        Self { path: run.loss_path(), title: format!("Training loss of {name}"), curve }
    }
}

impl LogSink for LossPlot {
    fn write_event(&mut self, entry: Entry<'_>) -> Result<()> {
        match entry {
            Entry::Step(metrics) => self.curve.push(metrics.step, metrics.loss),
            Entry::Checkpoint if !self.curve.is_empty() => {
                save_png(&self.curve.plot(&self.title)?, &self.path)?;
            }
            Entry::Checkpoint | Entry::Samples { .. } => {}
        }
        Ok(())
    }
}
