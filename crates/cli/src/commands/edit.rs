//! Shared by the commands that start from an image: flags, and sampling into a folder with a sheet.

use super::classes::print_class;
use super::flags::{GuidanceFlags, OpenRun, RunFlags, given, sampling_record};
use super::folder::{FlagValue, FolderRequest, ImageFolder, OutFlags};
use super::sample::computed;
use super::sampling::{BatchFn, Captioned, OnBatch, SamplingJob, max_shown, save_sheet};
use crate::signals::stop_flag;
use anyhow::bail;
use ddpm::config::SamplingConfig;
use ddpm::data::{LoadedImage, open_image};
use ddpm::pipeline::{Labels, Pipeline, SampleRequest};
use ddpm::plot::{Sheet, sheet};
use ddpm::text::thousands;
use serde_json::{Map, Value};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Flags of the commands that start from an image: class, guidance, output, run.
#[derive(clap::Args)]
pub(super) struct EditFlags {
    /// Class to condition on, by name or #INDEX; none by default
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    #[command(flatten)]
    guidance: GuidanceFlags,
    #[command(flatten)]
    out: OutFlags,
    #[command(flatten)]
    run: RunFlags,
}

/// A run opened for editing images.
pub(super) struct Editor<'a> {
    flags: &'a EditFlags,
    run: OpenRun,
    pub request: SampleRequest,
    stop: Arc<AtomicBool>,
}

/// What an edit's folder is named after, and what its images depend on.
pub(super) struct EditRequest {
    pub command: &'static str,
    /// Start of its folder's name.
    pub what: String,
    /// Explicit flags besides those of [`EditFlags`].
    pub explicit: Vec<FlagValue>,
    /// Input files.
    pub files: Vec<(&'static str, PathBuf)>,
    /// What else the images depend on.
    pub request: Vec<(&'static str, Value)>,
}

/// A sheet: images before and after the results, and the caption of results `i`.
pub(super) struct SheetParts<'a> {
    pub before: Vec<Captioned>,
    pub caption: &'a dyn Fn(usize) -> String,
    pub after: Vec<Captioned>,
}

impl EditFlags {
    /// Opens the run for the request built from its settings, with class and guidance from the flags. Rejects invalid requests.
    pub fn open(
        &self,
        request: impl FnOnce(&SamplingConfig) -> ddpm::Result<SampleRequest>,
    ) -> anyhow::Result<Editor<'_>> {
        let stop = stop_flag();
        let mut run = self.run.open()?;
        let request = request(&run.pipeline.config().sampling)?;
        if request.count == 0 || request.batch == 0 {
            bail!("-n and --batch-size must be at least 1");
        }
        run.pipeline.set_stop(stop.clone());
        let class = match self.class.as_deref() {
            None => Labels::Unlabelled,
            Some(name) => Labels::Fixed(run.pipeline.class(name)?),
        };
        let request = SampleRequest { class, guidance: self.guidance.guidance(), ..request };
        run.pipeline.check(request)?;
        if self.class.is_some() {
            print_class(&run.pipeline, class);
        }
        let request = SampleRequest { sampling: run.pipeline.sampling(request), ..request };
        Ok(Editor { flags: self, run, request, stop })
    }
}

impl Editor<'_> {
    pub fn pipeline(&self) -> &Pipeline {
        &self.run.pipeline
    }

    /// Reads an image file, converted to the format of the run's images; prints the conversions.
    pub fn image(&self, path: &Path) -> anyhow::Result<LoadedImage> {
        let image = open_image(path, &self.pipeline().config().data_options())?;
        if let Some(changes) = image.changes() {
            status!("{}: {changes}, to match the run's images", ddpm::text::shown(path));
        }
        Ok(image)
    }

    fn job(&self, request: SampleRequest, what: &'static str) -> SamplingJob<'_> {
        SamplingJob { pipeline: self.pipeline(), request, what, stop: &self.stop }
    }

    /// The pixel values of the request's images; `None` if interrupted.
    pub fn values(
        &self,
        request: SampleRequest,
        what: &'static str,
        batch_fn: &mut BatchFn<'_>,
    ) -> anyhow::Result<Option<Vec<f32>>> {
        self.job(request, what).values(batch_fn)
    }

    /// The output folder: `--out`, or one in the run named after the edit and the explicit flags.
    pub fn folder(&self, named: EditRequest) -> anyhow::Result<ImageFolder> {
        let EditRequest { command, what, explicit, files, request } = named;
        let class = given([("class", self.flags.class.clone())]);
        let explicit =
            [explicit, class, self.flags.guidance.explicit_flags(), self.run.explicit_flags()].concat();
        let mut record = self.run.record();
        record.extend(sampling_record(&self.request.sampling));
        let mut entry = |key: &str, value: Value| record.insert(key.to_owned(), value);
        entry("seed", self.request.seed.into());
        entry("class", serde_json::json!(self.flags.class));
        entry("guidance", format!("{:?}", self.request.guidance).into());
        for (key, path) in files {
            entry(key, ddpm::storage::file_sha256(&path)?.into());
        }
        for (key, value) in request {
            entry(key, value);
        }
        let (run, count) = (&self.run.run, self.request.count);
        let computed: Map<String, Value> = computed(self.pipeline());
        ImageFolder::open(
            &self.flags.out,
            FolderRequest { run, command, what, explicit, request: record, computed, count },
        )
    }

    /// Makes the images that are missing from the folder; false if interrupted.
    pub fn sample(
        &self,
        folder: &mut ImageFolder,
        what: &'static str,
        batch_fn: &mut BatchFn<'_>,
        on_batch: &mut OnBatch<'_>,
    ) -> anyhow::Result<bool> {
        self.job(self.request, what).run_into(folder, batch_fn, on_batch)
    }

    /// Writes the sheet and prints its path.
    pub fn write_sheet(&self, folder: &ImageFolder, shown: SheetParts<'_>) -> anyhow::Result<()> {
        let results = folder.read_first(max_shown(None, self.pipeline().shape()))?;
        if results.len() < folder.count() {
            status!(
                "note: the sheet shows the first {} of {} images",
                thousands(results.len()),
                thousands(folder.count())
            );
        }
        let results = results.into_iter().enumerate().map(|(i, image)| (image, (shown.caption)(i)));
        let (images, captions): (Vec<_>, Vec<_>) =
            shown.before.into_iter().chain(results).chain(shown.after).unzip();
        let columns = sheet::columns(images.len(), self.pipeline().shape());
        let path = folder.side_file("sheet.png");
        save_sheet(&Sheet { columns, captions, images, ..Sheet::default() }, &path)?;
        writeln!(std::io::stdout(), "{}", ddpm::text::shown(&path))?;
        Ok(())
    }
}
