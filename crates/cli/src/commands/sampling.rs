//! Sampling many images in batches, each written when finished; and sheets of them.

use super::folder::ImageFolder;
use crate::progress::Progress;
use ddpm::data::ImageShape;
use ddpm::denoiser::Denoiser;
use ddpm::image::Image;
use ddpm::pipeline::{Labels, Pipeline, SampleRequest};
use ddpm::plot::{Sheet, sheet};
use ddpm::sampler::{NoiseKey, SampleStep};
use ddpm::text::thousands;
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Default maximum of images on a sheet.
pub(super) const MAX_SHOWN: usize = 100;
/// Maximum images in a row, and rows, of a sheet with a row for each class.
const CLASS_ROW: usize = 10;
const CLASS_ROWS: usize = 40;

/// Called after each step.
pub(super) type OnStep<'a> = &'a mut dyn FnMut(SampleStep<'_>) -> ddpm::diffusion::Result<()>;
/// Computes the pixel values of a batch, calling `OnStep` after each step.
pub(super) type BatchFn<'a> =
    dyn FnMut(&mut dyn Denoiser, NoiseKey, OnStep<'_>) -> ddpm::diffusion::Result<Vec<f32>> + 'a;
/// Called with the index of a batch's first image and the pixel values of the batch.
pub(super) type OnBatch<'a> = dyn FnMut(usize, &[f32]) -> ddpm::Result<()> + 'a;

/// A request to be sampled.
pub(super) struct SamplingJob<'a> {
    pub pipeline: &'a Pipeline,
    pub request: SampleRequest,
    pub what: &'static str,
    /// Set by Ctrl-C.
    pub stop: &'a AtomicBool,
}

impl SamplingJob<'_> {
    /// Samples all images and returns their pixel values; `None` if interrupted.
    pub fn values(&self, batch_fn: &mut BatchFn<'_>) -> anyhow::Result<Option<Vec<f32>>> {
        let mut all = Vec::new();
        let (_, batch) = self.request.batches();
        let result = self.batches(self.request.count, batch, &|_| true, batch_fn, &mut |_, x| {
            all.extend_from_slice(x);
            Ok(())
        });
        match result {
            Err(ddpm::Error::Interrupted) => {
                status!("stopped; nothing was written");
                Ok(None)
            }
            other => Ok(other.map(|()| Some(all))?),
        }
    }

    /// Samples the images missing from the folder into it; false if interrupted.
    pub fn run_into(
        &self,
        folder: &mut ImageFolder,
        batch_fn: &mut BatchFn<'_>,
        on_batch: &mut OnBatch<'_>,
    ) -> anyhow::Result<bool> {
        let missing = folder.missing();
        let (_, batch) = SampleRequest { count: missing, ..self.request }.batches();
        let shared = RefCell::new(folder);
        let wanted = |i: usize| shared.borrow().is_missing(i);
        let result = self.batches(missing, batch, &wanted, batch_fn, &mut |first, x| {
            shared.borrow_mut().write(first, &self.pipeline.images(x))?;
            on_batch(first, x)
        });
        let folder = shared.into_inner();
        match result {
            Ok(()) => Ok(true),
            Err(ddpm::Error::Interrupted) => {
                folder.report_stop();
                Ok(false)
            }
            Err(error) => {
                folder.report_stop();
                Err(error.into())
            }
        }
    }

    fn batches(
        &self,
        missing: usize,
        batch: usize,
        wanted: &dyn Fn(usize) -> bool,
        batch_fn: &mut BatchFn<'_>,
        on_batch: &mut OnBatch<'_>,
    ) -> ddpm::Result<()> {
        let mut progress = Progress::new(self.what, 0);
        let (before, all) = (Cell::new(0usize), missing.div_ceil(batch.max(1)));
        let result = self.pipeline.for_each_batch(
            self.request,
            batch,
            wanted,
            &mut |denoiser, seeds| {
                batch_fn(denoiser, seeds, &mut |step| {
                    let done = before.get() * step.steps + step.done;
                    progress.set(done as u64, (all.max(before.get() + 1) * step.steps) as u64, String::new);
                    if self.stop.load(Ordering::Relaxed) {
                        Err(ddpm::diffusion::Error::Interrupted)
                    } else {
                        Ok(())
                    }
                })
            },
            &mut |first, x| {
                before.set(before.get() + 1);
                on_batch(first, x)
            },
        );
        progress.finish();
        result
    }
}

/// Writes a sheet.
pub(super) fn save_sheet(sheet: &Sheet, path: &Path) -> anyhow::Result<()> {
    Ok(sheet.draw()?.save(path)?)
}

/// Maximum images of a shape on a sheet.
pub(super) fn max_shown(requested: Option<usize>, shape: ImageShape) -> usize {
    requested.unwrap_or(MAX_SHOWN).min(sheet::max_images(shape))
}

/// The sheet of the images in a folder (`None` if 0 images are requested), and a note if it does not show all. Rows are labelled
/// with the index of their first image, or with their class if each has one; images with their class if classes are cycled.
pub(super) fn grid(
    pipeline: &Pipeline,
    class: Labels,
    folder: &ImageFolder,
    requested: Option<usize>,
) -> ddpm::Result<(Option<Sheet>, Option<String>)> {
    let (shape, count) = (pipeline.shape(), folder.count());
    let shown = max_shown(requested, shape);
    if shown == 0 {
        return Ok((None, None));
    }
    let label = |class: u32| pipeline.class_label(class);
    if let (Labels::Grouped(row), Some(classes)) = (class, pipeline.classes()) {
        let (row, all) = (row.max(1), count.div_ceil(row.max(1)));
        let columns = row.min(CLASS_ROW).min(shown);
        let most = requested.map_or(CLASS_ROWS, |shown| (shown / columns).max(1));
        let rows = all.min(most).min(sheet::max_images(shape) / columns).max(1);
        let places = (0..rows).flat_map(|r| (0..columns).map(move |c| r * row + c)).filter(|&i| i < count);
        let images = places.map(|i| ddpm::image::read_png(&folder.image(i))).collect::<ddpm::Result<_>>()?;
        let row_labels = (0..rows).filter_map(|r| class.of(r * row, classes)).map(label).collect();
        let note = (columns < row || rows < all).then(|| {
            format!(
                "the grid shows {columns} of {row} images of {rows} of {all} classes; --grid N shows more"
            )
        });
        return Ok((Some(Sheet { columns, row_labels, images, ..Sheet::default() }), note));
    }
    let images = folder.read_first(shown)?;
    let columns = sheet::columns(images.len(), shape);
    let captions = match (class, pipeline.classes()) {
        (Labels::Cycle, Some(n)) => (0..images.len()).filter_map(|i| class.of(i, n)).map(label).collect(),
        _ => Vec::new(),
    };
    let rows = images.len().div_ceil(columns);
    let row_labels = (0..rows).map(|r| (r * columns).to_string()).collect();
    let note = (images.len() < count).then(|| {
        let (shown, count) = (thousands(images.len()), thousands(count));
        format!("the grid shows the first {shown} of {count} images; --grid N shows more")
    });
    Ok((Some(Sheet { columns, row_labels, captions, images, ..Sheet::default() }), note))
}

/// An image on a sheet and its caption.
pub(super) type Captioned = (Image, String);
