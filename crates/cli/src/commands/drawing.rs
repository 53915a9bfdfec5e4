//! Drawing many images in batches, each written as it is done; and sheets of them.

use super::folder::ImageFolder;
use crate::progress::{Progress, thousands};
use ddpm::data::ImageShape;
use ddpm::denoiser::Denoiser;
use ddpm::generate::{Classes, Generator, Request};
use ddpm::image::{Image, save_png};
use ddpm::plot::{Sheet, sheet};
use ddpm::sampler::{SampleStep, Seeds};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Images that a sheet shows unless another number is asked for.
pub(super) const SHOWN: usize = 100;
/// Of a sheet with a row for each class: images in a row, and rows.
const CLASS_ROW: usize = 10;
const CLASS_ROWS: usize = 40;

/// What is told of each step.
pub(super) type OnStep<'a> = &'a mut dyn FnMut(SampleStep<'_>) -> ddpm::Result<()>;
/// What makes the values of a batch, and tells its steps.
pub(super) type Edit<'a> = dyn FnMut(&mut dyn Denoiser, Seeds, OnStep<'_>) -> ddpm::Result<Vec<f32>> + 'a;
/// What sees the values of a batch, whose first image has that number.
pub(super) type Seen<'a> = dyn FnMut(usize, &[f32]) -> ddpm::Result<()> + 'a;

/// Images to be drawn.
pub(super) struct Pass<'a> {
    pub generator: &'a Generator,
    pub request: Request,
    pub what: &'static str,
    /// Set by Ctrl-C.
    pub stop: &'a AtomicBool,
}

impl Pass<'_> {
    /// Draws all images and gives their values; `None` where Ctrl-C stopped it.
    pub fn values(&self, edit: &mut Edit<'_>) -> anyhow::Result<Option<Vec<f32>>> {
        let mut all = Vec::new();
        let (_, batch) = self.request.batches();
        let drawn = self.batches(self.request.count, batch, &|_| true, edit, &mut |_, x| {
            all.extend_from_slice(x);
            Ok(())
        });
        match drawn {
            Err(ddpm::Error::Interrupted) => {
                tell!("stopped; nothing was written");
                Ok(None)
            }
            other => Ok(other.map(|()| Some(all))?),
        }
    }

    /// Draws the images that the folder has not, into it; gives whether Ctrl-C let it.
    pub fn run_into(
        &self,
        folder: &mut ImageFolder,
        edit: &mut Edit<'_>,
        seen: &mut Seen<'_>,
    ) -> anyhow::Result<bool> {
        let missing = folder.missing();
        let (_, batch) = Request { count: missing, ..self.request }.batches();
        let shared = RefCell::new(folder);
        let wanted = |i: usize| shared.borrow().wants(i);
        let drawn = self.batches(missing, batch, &wanted, edit, &mut |first, x| {
            shared.borrow_mut().put(first, &self.generator.images(x))?;
            seen(first, x)
        });
        let folder = shared.into_inner();
        match drawn {
            Ok(()) => Ok(true),
            Err(ddpm::Error::Interrupted) => {
                folder.stopped();
                Ok(false)
            }
            Err(error) => {
                folder.stopped();
                Err(error.into())
            }
        }
    }

    fn batches(
        &self,
        missing: usize,
        batch: usize,
        wanted: &dyn Fn(usize) -> bool,
        edit: &mut Edit<'_>,
        done: &mut Seen<'_>,
    ) -> ddpm::Result<()> {
        let mut progress = Progress::new(self.what, 0);
        let (before, all) = (Cell::new(0usize), missing.div_ceil(batch.max(1)));
        let drawn = self.generator.each_batch(
            self.request,
            batch,
            wanted,
            &mut |denoiser, seeds| {
                edit(denoiser, seeds, &mut |step| {
                    let done = before.get() * step.steps + step.done;
                    progress.set(done as u64, (all.max(before.get() + 1) * step.steps) as u64, String::new);
                    if self.stop.load(Ordering::Relaxed) { Err(ddpm::Error::Interrupted) } else { Ok(()) }
                })
            },
            &mut |first, x| {
                before.set(before.get() + 1);
                done(first, x)
            },
        );
        progress.finish();
        drawn
    }
}

/// Writes a sheet.
pub(super) fn save_sheet(sheet: &Sheet, path: &Path) -> anyhow::Result<()> {
    Ok(save_png(&sheet.draw()?, path)?)
}

/// At most so many images of a shape go on a sheet.
pub(super) fn at_most(asked: Option<usize>, shape: ImageShape) -> usize {
    asked.unwrap_or(SHOWN).min(sheet::most(shape))
}

/// The sheet of the images in a folder, and a note where it does not show all; none where none are asked for. Rows are labelled with
/// the number of their first image, or with its class where each has one; images with their classes where these take turns.
pub(super) fn grid(
    generator: &Generator,
    class: Classes,
    folder: &ImageFolder,
    asked: Option<usize>,
) -> ddpm::Result<(Option<Sheet>, Option<String>)> {
    let (shape, count) = (generator.shape(), folder.count());
    let shown = at_most(asked, shape);
    if shown == 0 {
        return Ok((None, None));
    }
    let label = |class: u32| generator.class_label(class);
    if let (Classes::Rows(row), Some(classes)) = (class, generator.classes()) {
        let (row, all) = (row.max(1), count.div_ceil(row.max(1)));
        let columns = row.min(CLASS_ROW).min(shown);
        let most = asked.map_or(CLASS_ROWS, |shown| (shown / columns).max(1));
        let rows = all.min(most).min(sheet::most(shape) / columns).max(1);
        let places = (0..rows).flat_map(|r| (0..columns).map(move |c| r * row + c)).filter(|&i| i < count);
        let images = places.map(|i| ddpm::image::read_png(&folder.image(i))).collect::<ddpm::Result<_>>()?;
        let row_labels = (0..rows).filter_map(|r| class.of(r * row, classes)).map(label).collect();
        let note = (columns < row || rows < all).then(|| {
            format!(
                "the grid shows {columns} of {row} images of {rows} of {all} classes; --grid N shows others"
            )
        });
        return Ok((Some(Sheet { columns, row_labels, images, ..Sheet::default() }), note));
    }
    let images = folder.first(shown)?;
    let columns = sheet::columns(images.len(), shape);
    let captions = match (class, generator.classes()) {
        (Classes::Cycle, Some(n)) => (0..images.len()).filter_map(|i| class.of(i, n)).map(label).collect(),
        _ => Vec::new(),
    };
    let rows = images.len().div_ceil(columns);
    let row_labels = (0..rows).map(|r| (r * columns).to_string()).collect();
    let note = (images.len() < count).then(|| {
        let (shown, count) = (thousands(images.len() as u64), thousands(count as u64));
        format!("the grid shows the first {shown} of {count} images; --grid N shows more")
    });
    Ok((Some(Sheet { columns, row_labels, captions, images, ..Sheet::default() }), note))
}

/// Images of a sheet with what stands below each.
pub(super) type Captioned = (Image, String);
