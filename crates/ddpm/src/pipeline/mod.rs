//! A trained network, ready to sample images.

mod classes;
mod images;
mod request;

pub use images::Images;
pub use request::{BATCH, Labels, SampleRequest};

use crate::checkpoint::{self, Manifest, NamedTensor, Newest, WeightsChoice};
use crate::config::Config;
use crate::data::ImageShape;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::guidance::{Guidance, Guided};
use crate::hardware::Hardware;
use crate::image::Image;
use crate::model::Model;
use crate::run_folder::{RUNS, RunFolder};
use crate::sampler::{NoiseKey, SampleStep, Sampler, SamplerOptions, Variance};
use crate::schedule::Schedule;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Samples a batch with the network and the batch's noise key.
pub type BatchSampler<'a> = dyn FnMut(&mut dyn Denoiser, NoiseKey) -> ddpm_diffusion::Result<Vec<f32>> + 'a;

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
    /// Opens a run by its folder, or by its name in `runs/`, at its newest intact checkpoint; or a checkpoint's folder. The
    /// weights are the averaged ones if there are any, the device is a GPU if one can be used (see [`Hardware`]).
    ///
    /// ```no_run
    /// use ddpm::{Pipeline, SampleRequest};
    ///
    /// let request = SampleRequest { count: 16, seed: 7, ..SampleRequest::default() };
    /// Pipeline::open("runs/run-001")?.sample(request)?.grid(4).save("grid.png")?;
    /// # Ok::<(), ddpm::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Run`] if there is no such run, or it has no checkpoint yet; a checkpoint that cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &WeightsChoice::Auto, Hardware::default())
    }

    /// As [`open`](Self::open), with these weights and on this device.
    ///
    /// # Errors
    /// As [`open`](Self::open); weights that the checkpoint does not have; a device that cannot be used.
    pub fn open_with(
        path: impl AsRef<Path>,
        which: &WeightsChoice,
        hardware: impl Into<Hardware>,
    ) -> Result<Self> {
        let path = path.as_ref();
        if Manifest::exists(path) {
            return Self::open_checkpoint(path, which.clone(), hardware);
        }
        match RunFolder::open_at(Path::new(RUNS), path)? {
            (_, Some(checkpoint)) => Self::open_checkpoint(&checkpoint, which.clone(), hardware),
            (run, None) => match Self::open_newest(&run.checkpoints(), which, hardware)? {
                Some((_, pipeline)) => Ok(pipeline),
                None => Err(run.without_checkpoint()),
            },
        }
    }

    /// Opens the folder of a checkpoint. A number as `hardware` means the CPU with that many threads, 0 for all cores.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, or does not have these weights; a device that cannot be used.
    pub fn open_checkpoint(path: &Path, which: WeightsChoice, hardware: impl Into<Hardware>) -> Result<Self> {
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

    /// The settings that the network was trained with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The network with its weights, for batches of `n`.
    ///
    /// # Errors
    /// Those of [`Model::set_weights`], and for a second model those of [`open_checkpoint`](Self::open_checkpoint), since weights
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
        if request.count == 0 {
            return invalid("count (-n)", "must be at least 1".to_owned());
        }
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

    /// Samples images.
    ///
    /// # Errors
    /// Those of [`check`](Self::check) and of the device.
    pub fn sample(&self, request: SampleRequest) -> Result<Images> {
        self.sample_with(request, &mut |_, _| Ok(()))
    }

    /// As [`sample`](Self::sample); `on_step` is called with the index of the batch's first image and each step. An error from
    /// it stops sampling.
    ///
    /// # Errors
    /// Those of [`sample`](Self::sample) and of `on_step`.
    pub fn sample_with(
        &self,
        request: SampleRequest,
        on_step: &mut dyn FnMut(usize, SampleStep<'_>) -> Result<()>,
    ) -> Result<Images> {
        let sampler = self.sampler(request)?;
        let x = self.sample_batches(request, &mut |denoiser, key| {
            sampler.sample(denoiser, key, &mut |step| Ok(on_step(key.first as usize, step)?))
        })?;
        Ok(self.images(&x).into())
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
