//! The sample sheets of a run.

use super::{Event, Run};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::pipeline::{Pipeline, SampleRequest};
use crate::plot::sheet::{self, Sheet};
use crate::sampler::SamplerOptions;
use crate::train::log::LogEvent;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Seed of the sample sheets, constant over a run so that sheets can be compared.
const SHEET_SEED: u64 = 0;

/// The sheet of a step's samples; its size and layout are constant over a run, so that sheets can be compared.
fn step_sheet(pipeline: &Pipeline, step: u64, images: Vec<Image>) -> Result<Image> {
    let class =
        |i: usize| Some(pipeline.class_label(SampleRequest::default().class.of(i, pipeline.classes()?)?));
    let sheet = Sheet {
        title: format!("step {step:07}"),
        columns: sheet::columns(images.len(), pipeline.shape()),
        captions: (0..images.len()).filter_map(class).collect(),
        images,
        ..Sheet::default()
    };
    sheet.draw()
}

impl Run {
    /// Samples a sheet with the averaged weights (or the raw ones without an average) and writes it. Returns false if
    /// interrupted by `stop`.
    pub(super) fn write_sheet(
        &mut self,
        stop: &Arc<AtomicBool>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool> {
        let (config, step) = (self.trainer.config().clone(), self.trainer.steps_done());
        let mut pipeline = self.trainer.pipeline()?;
        pipeline.set_stop(stop.clone());
        let output = &config.output;
        let max_steps = config.schedule()?.timesteps_with_signal();
        let steps =
            (output.sample_steps > 0 && output.sample_steps < max_steps).then_some(output.sample_steps);
        let sampling = config.sampling.options()?;
        let sampling = SamplerOptions { steps: steps.or(sampling.steps), ..sampling };
        let request = SampleRequest {
            count: output.sample_count,
            seed: SHEET_SEED,
            sampling,
            ..SampleRequest::default()
        };
        let sampled = pipeline.sample_with(request, &mut |first, s| {
            let (batches, batch) = request.batches();
            on_event(Event::Sampling { done: first / batch * s.steps + s.done, steps: batches * s.steps });
            if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
        });
        let images = match sampled {
            Err(Error::Interrupted) => return Ok(false), // the loop sees the flag and saves
            other => other?,
        };
        let path = self.run.sample_path(step);
        let sheet = step_sheet(&pipeline, step, images.into())?;
        sheet.save(&path)?;
        on_event(Event::Samples { step, path: &path });
        self.log_event(LogEvent::Samples { step, sheet: &sheet }, on_event)?;
        Ok(true)
    }
}
