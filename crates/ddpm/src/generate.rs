//! Sampling images from a trained network.

use crate::config::Config;
use crate::data::{Dataset, ImageShape};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::guidance::{Guidance, Guided};
use crate::hardware::Hardware;
use crate::image::Image;
use crate::model::Model;
use crate::plot;
use crate::sampler::{NoiseKey, SampleStep, Sampler, SamplerOptions, Variance};
use crate::schedule::Schedule;
use crate::text::{LISTED, escaped, listed};
use crate::train::checkpoint::{self, Manifest, NamedTensor, Newest, WeightsChoice};
use ddpm_text::nearest;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Default number of images per batch.
pub const BATCH: usize = 64;

/// The class of each image, for class-conditional networks; indices wrap around after the last class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// Image i has class i.
    Cycle,
    /// Unconditional.
    Unlabelled,
    /// All images have this class.
    Fixed(u32),
    /// This many images of each class in turn.
    Grouped(usize),
}

impl Labels {
    /// The class of image `i`, out of `classes`.
    pub fn of(self, i: usize, classes: u32) -> Option<u32> {
        let classes = classes.max(1) as usize;
        match self {
            Self::Fixed(class) => Some(class),
            Self::Cycle => Some((i % classes) as u32),
            Self::Grouped(row) => Some((i / row.max(1) % classes) as u32),
            Self::Unlabelled => None,
        }
    }
}

/// What to sample, and how.
#[derive(Clone, Copy, Debug)]
pub struct SampleRequest {
    /// Number of images.
    pub count: usize,
    /// The seed; image i depends only on it and i.
    pub seed: u64,
    /// Largest number of images per batch.
    pub batch: usize,
    /// The classes, for class-conditional networks.
    pub class: Labels,
    /// Guidance towards the class.
    pub guidance: Guidance,
    /// The sampler and its settings.
    pub sampling: SamplerOptions,
}

impl Default for SampleRequest {
    fn default() -> Self {
        Self {
            count: 1,
            seed: 0,
            batch: BATCH,
            class: Labels::Cycle,
            guidance: Guidance::default(),
            sampling: SamplerOptions::default(),
        }
    }
}

/// Samples a batch with the network and the batch's noise key.
pub type BatchSampler<'a> = dyn FnMut(&mut dyn Denoiser, NoiseKey) -> ddpm_diffusion::Result<Vec<f32>> + 'a;

impl SampleRequest {
    /// Number of batches and images in each. All have the same size, so that one plan serves them all; the
    /// last may sample a few surplus images.
    pub fn batches(&self) -> (usize, usize) {
        let batches = self.count.div_ceil(self.batch.max(1)).max(1);
        (batches, self.count.div_ceil(batches).max(1))
    }
}

/// Weights for [`Model`]s, each of which copies them.
enum Weights {
    /// In memory, for every model.
    InMemory(Vec<NamedTensor>),
    /// From a checkpoint: the first model takes the loaded weights, so that they are not in memory twice;
    /// further models read them again.
    Checkpoint(PathBuf, WeightsChoice, Mutex<Option<Vec<NamedTensor>>>),
}

/// A network with its weights, ready to sample.
pub struct Pipeline {
    config: Config,
    shape: ImageShape,
    schedule: Schedule,
    weights: Weights,
    class_names: Vec<String>,
    origin: PathBuf,
    hardware: Hardware,
    stop: Option<Arc<AtomicBool>>,
}

impl Pipeline {
    /// Opens a checkpoint of a run. A number as `hardware` means the CPU with that many threads, 0 for all
    /// cores.
    pub fn open(path: &Path, which: WeightsChoice, hardware: impl Into<Hardware>) -> Result<Self> {
        let (manifest, weights) = checkpoint::load_weights_only(path, &which)?;
        Self::of_checkpoint(path, &which, manifest, weights, hardware)
    }

    /// Opens the newest checkpoint in the folder `dir` with intact weights, and says which one; `None` if
    /// there is no checkpoint.
    pub fn open_newest(
        dir: &Path,
        which: &WeightsChoice,
        hardware: impl Into<Hardware>,
    ) -> Result<Option<(Newest, Self)>> {
        let Some((newest, manifest, weights)) = checkpoint::newest_weights(dir, which)? else {
            return Ok(None);
        };
        let pipeline = Self::of_checkpoint(&newest.path, which, manifest, weights, hardware)?;
        Ok(Some((newest, pipeline)))
    }

    fn of_checkpoint(
        path: &Path,
        which: &WeightsChoice,
        manifest: Manifest,
        weights: Vec<NamedTensor>,
        hardware: impl Into<Hardware>,
    ) -> Result<Self> {
        let pipeline = Self::new(&manifest.config(path)?, Vec::new(), which.origin(path), hardware)?;
        let weights = Weights::Checkpoint(path.to_owned(), which.clone(), Mutex::new(Some(weights)));
        Ok(Self { class_names: manifest.classes, weights, ..pipeline })
    }

    /// From weights in memory; `origin` names them in errors.
    pub fn new(
        config: &Config,
        weights: Vec<NamedTensor>,
        origin: &Path,
        hardware: impl Into<Hardware>,
    ) -> Result<Self> {
        config.validate()?;
        let missing = |key: &str| Error::Config {
            key: key.to_owned(),
            reason: "is not set: these are not the settings of a training run".to_owned(),
        };
        let size = config.image_size().ok_or_else(|| missing("data.size"))?;
        let channels = config.image_channels().ok_or_else(|| missing("data.channels"))?;
        let shape = ImageShape { height: size.height, width: size.width, channels };
        let schedule = config.schedule()?;
        let (config, origin, class_names) = (config.clone(), origin.to_owned(), Vec::new());
        // The run's settings decide the arithmetic, the caller the device.
        let Hardware { tf32, deterministic, .. } = config.compute.hardware();
        let hardware = Hardware { tf32, deterministic, ..hardware.into() };
        let weights = Weights::InMemory(weights);
        Ok(Self { config, shape, schedule, weights, class_names, origin, hardware, stop: None })
    }

    /// Sets a flag that stops the networks, even within a step, with [`Error::Interrupted`].
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = Some(stop);
    }

    /// The shape of the images.
    pub fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Sets the class names by index, for a network in training: those of the data.
    pub fn with_class_names(self, class_names: Vec<String>) -> Self {
        Self { class_names, ..self }
    }

    /// The label of class `n` in plots: its name, prefixed with the index if the plot font lacks its letters;
    /// only the index if the names are unknown (imported weights).
    pub fn class_label(&self, n: u32) -> String {
        match self.class_names.get(n as usize) {
            Some(name) if plot::can_write(name) => name.clone(),
            Some(name) => format!("#{n} {name}"),
            None => n.to_string(),
        }
    }

    /// The settings that the network was trained with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The network with its weights, for batches of `n`.
    ///
    /// # Errors
    /// Those of [`Model::set_weights`], and for a second model those of [`open`](Self::open), since weights
    /// are read again.
    pub fn model(&self, n: usize) -> Result<Model> {
        let net = self.config.build_network(self.shape.channels);
        let shape = [n, self.shape.height, self.shape.width, self.shape.channels];
        let compute = self.config.compute.options();
        let model = Model::with_compute_options(&*net, shape, self.hardware, compute)?;
        let mut model = model.predicting(self.config.diffusion.prediction);
        if let Some(stop) = &self.stop {
            model.executor().set_stop(stop.clone());
        }
        match &self.weights {
            Weights::InMemory(weights) => model.set_weights(weights, &self.origin)?,
            Weights::Checkpoint(path, which, read) => {
                let read = read.lock().unwrap_or_else(|e| e.into_inner()).take();
                let weights = match read {
                    Some(weights) => weights,
                    None => checkpoint::load_weights_only(path, which)?.1,
                };
                model.set_weights(&weights, &self.origin)?;
            }
        }
        Ok(model)
    }

    /// Checks that [`sample`](Self::sample) supports a request.
    ///
    /// # Errors
    /// [`Error::Config`] for a nonexistent class or too many images, and those of [`SamplerOptions::build`].
    pub fn check(&self, request: SampleRequest) -> Result<()> {
        // The image index is a 32-bit word of the RNG's counter.
        if u32::try_from(request.count).is_err() {
            let reason = format!("{} is too many images; give at most {}", request.count, u32::MAX);
            return Err(Error::Config { key: "count (-n)".to_owned(), reason });
        }
        let invalid = |key: &str, reason: String| Err(Error::Config { key: key.to_owned(), reason });
        let classes = self.classes();
        let unconditional = || "the run was trained without classes; leave it out".to_owned();
        match (request.class, classes) {
            (Labels::Cycle, _) | (Labels::Unlabelled, None) => {}
            (Labels::Unlabelled, Some(n)) => {
                if self.config.train.label_dropout == 0.0 {
                    let reason = "none is given (--class), but the run cannot sample without a class: it was trained with \
                                  train.label_dropout = 0, or imported; it has";
                    return invalid("class", format!("{reason} {}", self.describe_classes(n)));
                }
                if request.guidance != Guidance::default() {
                    let reason = "needs a class, and none is given (--class); the run has";
                    return invalid("guidance", format!("{reason} {}", self.describe_classes(n)));
                }
            }
            (_, None) => return invalid("class", unconditional()),
            (Labels::Fixed(class), Some(n)) if class >= n => {
                return invalid(
                    "class",
                    format!("{class} is out of range; the run has {}", self.describe_classes(n)),
                );
            }
            _ => {}
        }
        request.guidance.check()?;
        if request.guidance != Guidance::default() {
            if classes.is_none() {
                return invalid("guidance", unconditional());
            }
            if self.config.train.label_dropout == 0.0 {
                let reason = "the run has no unconditional predictions, which guidance needs: it was trained with \
                              train.label_dropout = 0, or imported (if it was trained with label dropout, import \
                              it with --set train.label_dropout=0.1)";
                return invalid("guidance", reason.to_owned());
            }
        }
        if request.sampling.variance == Some(Variance::Learned) && !self.config.diffusion.learned_variance {
            return Err(Variance::not_learned().into());
        }
        self.sampler(request).map(drop)
    }

    /// The sampler of a request.
    ///
    /// # Errors
    /// Those of [`SamplerOptions::build`].
    pub fn sampler(&self, request: SampleRequest) -> Result<Box<dyn Sampler>> {
        Ok(self.sampling(request).build(&self.schedule, self.config.diffusion.prediction)?)
    }

    /// A request's sampling options, with the run's settings as defaults.
    pub fn sampling(&self, request: SampleRequest) -> SamplerOptions {
        self.config.sampling.apply_to(request.sampling)
    }

    /// The noise schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The class names by index; empty if the network takes no classes or they are unknown (imported
    /// weights).
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The name of a class, or `#3` if it is unknown.
    pub fn class_name(&self, class: u32) -> String {
        self.class_names
            .get(class as usize)
            .map_or_else(|| format!("#{class}"), |name| escaped(name).into_owned())
    }

    /// Finds a class by name, or by index when given as `#3`. A plain number is a name, and an index only if
    /// the names are unknown.
    ///
    /// # Errors
    /// [`Error::Config`] listing the classes of the run.
    pub fn class(&self, name: &str) -> Result<u32> {
        let invalid = |reason: String| Err(Error::Config { key: "class".to_owned(), reason });
        let Some(n) = self.classes() else {
            return invalid("the run was trained without classes; leave it out".to_owned());
        };
        let index = name.strip_prefix('#').filter(|digits| digits.parse::<u32>().is_ok());
        let matches = |own: &&String| index.is_none() && *own == name;
        let found = || (0u32..).zip(&self.class_names).filter(|(_, own)| matches(own)).map(|(i, _)| i);
        let (first, second) = (found().next(), found().nth(1));
        match (first, second) {
            (Some(only), None) => return Ok(only),
            (Some(a), Some(b)) => {
                let name = escaped(name);
                return invalid(format!(
                    "several classes are named \"{name}\"; give the index: --class=#{a} or --class=#{b}"
                ));
            }
            _ => {}
        }
        let index = index.or(self.class_names.is_empty().then_some(name));
        match index.and_then(|text| text.parse::<u32>().ok()) {
            Some(class) if class < n => Ok(class),
            Some(_) => invalid(format!(
                "there is no class at the index {}: indices go from 0 to {}",
                escaped(name),
                n - 1
            )),
            None => invalid(self.no_such_class(name, n)),
        }
    }

    /// The message for an unknown class name, with suggestions.
    fn no_such_class(&self, name: &str, n: u32) -> String {
        let number = |text: &str| text.trim().parse::<f64>().ok();
        let names = || self.class_names.iter().map(String::as_str);
        // Numbers match by value, however they are written; other names by spelling.
        let near = match number(name) {
            Some(_) => names().find(|own| number(own) == number(name)),
            None => nearest(name, names()),
        };
        let suggestion =
            near.map_or("; the".to_owned(), |near| format!("; did you mean \"{}\"? The", escaped(near)));
        let by_index = match name.parse::<u32>() {
            Ok(index) if index < n => {
                format!(
                    "; the class at the index {index} is \"{}\": --class=#{index}",
                    self.class_name(index)
                )
            }
            _ => String::new(),
        };
        format!(
            "there is no class \"{}\"{suggestion} run has {}{by_index}",
            escaped(name),
            self.describe_classes(n)
        )
    }

    /// The network's class index for each class of a data set: that of the class with the same name, or the
    /// data set's own if the names are unknown (imported weights). Empty if either side has no classes.
    ///
    /// # Errors
    /// [`Error::Data`] for classes that the run does not have.
    pub fn class_indices(&self, data: &dyn Dataset) -> Result<Vec<u32>> {
        let (Some(n), names) = (self.classes(), data.classes()) else { return Ok(Vec::new()) };
        let invalid = |reason| Error::Data { path: data.summary().source.clone().into(), reason };
        if self.class_names.is_empty() {
            if !names.is_empty() && names.len() != n as usize {
                let reason = format!("has {} classes, but the run has {n}, with unknown names", names.len());
                return Err(invalid(reason));
            }
            return Ok((0..names.len() as u32).collect());
        }
        let index = |name: &String| {
            let at = self.class_names.iter().position(|n| n == name);
            at.and_then(|i| u32::try_from(i).ok()).ok_or_else(|| {
                invalid(format!(
                    "has a class \"{}\"; the run has {}; rename the data's classes to match",
                    escaped(name),
                    self.describe_classes(n)
                ))
            })
        };
        names.iter().map(index).collect()
    }

    /// Describes the classes: by name, or as a range if the names are just the indices.
    fn describe_classes(&self, n: u32) -> String {
        if self.class_names.iter().enumerate().all(|(i, name)| *name == i.to_string()) {
            return format!("the classes 0 to {}", n - 1);
        }
        let names: Vec<_> = self.class_names.iter().map(|name| escaped(name)).collect();
        format!("the classes {}", listed(&names, LISTED))
    }

    /// Number of classes that the network is conditioned on; `None` if it takes none.
    pub fn classes(&self) -> Option<u32> {
        let classes = self.config.build_network(self.shape.channels).classes();
        classes.map(|n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// Samples images. `on_step` is called with the index of the batch's first image and each step; an error
    /// from it stops sampling.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) and `on_step`.
    pub fn sample(
        &self,
        request: SampleRequest,
        on_step: &mut dyn FnMut(usize, SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<Image>> {
        let sampler = self.sampler(request)?;
        let x = self.sample_batches(request, &mut |denoiser, key| {
            sampler.sample(denoiser, key, &mut |step| Ok(on_step(key.first as usize, step)?))
        })?;
        Ok(self.images(&x))
    }

    /// The outputs of `draw` for all batches, concatenated, without the last batch's surplus images. The
    /// network is conditioned on the request's classes.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) and `draw`.
    pub fn sample_batches(&self, request: SampleRequest, draw: &mut BatchSampler<'_>) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        self.for_each_batch(request, request.batches().1, &|_| true, draw, &mut |_, x| {
            all.extend_from_slice(x);
            Ok(())
        })?;
        Ok(all)
    }

    /// Like [`sample_batches`](Self::sample_batches), for the images that are `wanted` and one batch of size
    /// `batch` at a time, so that memory does not grow with the number of images. `done` gets the index of
    /// the batch's first image and the values of all its images, including unwanted ones in between.
    ///
    /// # Errors
    /// Those of [`check`](Self::check), `draw` and `done`.
    pub fn for_each_batch(
        &self,
        request: SampleRequest,
        batch: usize,
        wanted: &dyn Fn(usize) -> bool,
        draw: &mut BatchSampler<'_>,
        done: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.check(request)?;
        let (classes, batch) = (self.classes(), batch.max(1));
        let mut model = None;
        let mut next = (0..request.count).find(|&i| wanted(i));
        while let Some(first) = next {
            let model = match &mut model {
                Some(model) => model,
                none => none.insert(self.model(batch)?),
            };
            let key = NoiseKey { seed: request.seed, first: first as u32 };
            let x = match classes {
                None => draw(model, key)?,
                Some(classes) => {
                    let labels = (first..first + batch).map(|i| request.class.of(i, classes)).collect();
                    draw(&mut Guided::new(model, &self.schedule, labels, request.guidance), key)?
                }
            };
            let count = batch.min(request.count - first);
            done(first, &x[..count * self.shape.num_elements()])?;
            next = (first + count..request.count).find(|&i| wanted(i));
        }
        Ok(())
    }

    /// Converts concatenated values in [-1, 1] to images.
    pub fn images(&self, values: &[f32]) -> Vec<Image> {
        values.chunks(self.shape.num_elements()).map(|p| Image::from_unit(p, self.shape)).collect()
    }
}

#[cfg(test)]
mod tests;
