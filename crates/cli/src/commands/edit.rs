//! What the commands share that begin with an image: flags, and drawing into a folder with a sheet.

use super::classes::tell_class;
use super::drawing::{Captioned, Edit, Pass, Seen, at_most, save_sheet};
use super::flags::{GuidanceFlags, OpenRun, RunFlags, given, sampling_record};
use super::folder::{Asked, FlagValue, ImageFolder, OutFlags};
use super::sample::computed;
use crate::signals::stop_flag;
use anyhow::bail;
use ddpm::data::{Single, open_image};
use ddpm::generate::{Classes, Generator, Request};
use ddpm::plot::{Sheet, sheet};
use ddpm::text::thousands;
use ddpm::train::config::SamplingConfig;
use serde_json::{Map, Value};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What the commands share that begin with an image: the class that the network is told, the run, where the result goes.
#[derive(clap::Args)]
pub(super) struct EditFlags {
    /// The class that the network is told, by name or number, of a run that was trained with classes; none if not given
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    #[command(flatten)]
    guidance: GuidanceFlags,
    #[command(flatten)]
    out: OutFlags,
    #[command(flatten)]
    run: RunFlags,
}

/// A run that images are edited with.
pub(super) struct Editor<'a> {
    flags: &'a EditFlags,
    run: OpenRun,
    pub request: Request,
    stop: Arc<AtomicBool>,
}

/// What an edit is called and depends on.
pub(super) struct Named {
    pub command: &'static str,
    /// The beginning of its folder's name.
    pub what: String,
    /// The flags that were given beside those that are known here.
    pub said: Vec<FlagValue>,
    /// The files that it begins with.
    pub files: Vec<(&'static str, PathBuf)>,
    /// What else its images depend on.
    pub request: Vec<(&'static str, Value)>,
}

/// A sheet: images before those that are drawn, and what stands below one of these.
pub(super) struct Shown<'a> {
    pub before: Vec<Captioned>,
    pub caption: &'a dyn Fn(usize) -> String,
    pub after: Vec<Captioned>,
}

impl EditFlags {
    /// Opens the run for the request that is made for its settings, with the class that is given. What cannot be done is refused.
    pub fn open(
        &self,
        request: impl FnOnce(&SamplingConfig) -> ddpm::Result<Request>,
    ) -> anyhow::Result<Editor<'_>> {
        let stop = stop_flag();
        let mut run = self.run.open()?;
        let request = request(&run.generator.config().sampling)?;
        if request.count == 0 || request.batch == 0 {
            bail!("-n and --batch-size must be at least 1");
        }
        run.generator.set_stop(stop.clone());
        let class = match self.class.as_deref() {
            None => Classes::Unlabelled,
            Some(name) => Classes::One(run.generator.class(name)?),
        };
        let request = Request { class, guidance: self.guidance.guidance(), ..request };
        run.generator.check(request)?;
        if self.class.is_some() {
            tell_class(&run.generator, class);
        }
        let request = Request { sampling: run.generator.sampling(request), ..request };
        Ok(Editor { flags: self, run, request, stop })
    }
}

impl Editor<'_> {
    pub fn generator(&self) -> &Generator {
        &self.run.generator
    }

    /// An image file in the form of the run's; what was done to it is told.
    pub fn image(&self, path: &Path) -> anyhow::Result<Single> {
        let image = open_image(path, &self.generator().config().data_options())?;
        if let Some(changes) = image.changes() {
            tell!("{}: {changes}, as the run's images", ddpm::text::shown(path));
        }
        Ok(image)
    }

    fn pass(&self, request: Request, what: &'static str) -> Pass<'_> {
        Pass { generator: self.generator(), request, what, stop: &self.stop }
    }

    /// The values of the request's images; `None` where Ctrl-C stopped it.
    pub fn values(
        &self,
        request: Request,
        what: &'static str,
        edit: &mut Edit<'_>,
    ) -> anyhow::Result<Option<Vec<f32>>> {
        self.pass(request, what).values(edit)
    }

    /// The folder that the images go to: unless it is said, one with the name of what was done and said.
    pub fn folder(&self, named: Named) -> anyhow::Result<ImageFolder> {
        let Named { command, what, said, files, request } = named;
        let class = given([("class", self.flags.class.clone())]);
        let said = [said, class, self.flags.guidance.said(), self.run.said()].concat();
        let mut record = self.run.record();
        record.extend(sampling_record(&self.request.sampling));
        let mut entry = |key: &str, value: Value| record.insert(key.to_owned(), value);
        entry("seed", self.request.seed.into());
        entry("class", serde_json::json!(self.flags.class));
        entry("guidance", format!("{:?}", self.request.guidance).into());
        for (key, path) in files {
            entry(key, ddpm::train::file_sha256(&path)?.into());
        }
        for (key, value) in request {
            entry(key, value);
        }
        let (run, count) = (&self.run.run, self.request.count);
        let computed: Map<String, Value> = computed(self.generator());
        ImageFolder::open(
            &self.flags.out,
            Asked { run, command, what, said, request: record, computed, count },
        )
    }

    /// Draws the images that the folder has not; gives whether Ctrl-C let it.
    pub fn draw(
        &self,
        folder: &mut ImageFolder,
        what: &'static str,
        edit: &mut Edit<'_>,
        seen: &mut Seen<'_>,
    ) -> anyhow::Result<bool> {
        self.pass(self.request, what).run_into(folder, edit, seen)
    }

    /// Writes the sheet, and says where.
    pub fn finish(&self, folder: &ImageFolder, shown: Shown<'_>) -> anyhow::Result<()> {
        let drawn = folder.first(at_most(None, self.generator().shape()))?;
        if drawn.len() < folder.count() {
            tell!(
                "note: the sheet shows the first {} of {} images",
                thousands(drawn.len()),
                thousands(folder.count())
            );
        }
        let drawn = drawn.into_iter().enumerate().map(|(i, image)| (image, (shown.caption)(i)));
        let (images, captions): (Vec<_>, Vec<_>) =
            shown.before.into_iter().chain(drawn).chain(shown.after).unzip();
        let columns = sheet::columns(images.len(), self.generator().shape());
        let path = folder.beside("sheet.png");
        save_sheet(&Sheet { columns, captions, images, ..Sheet::default() }, &path)?;
        writeln!(std::io::stdout(), "{}", ddpm::text::shown(&path))?;
        Ok(())
    }
}
