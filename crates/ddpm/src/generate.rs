//! New images from a trained network.

use crate::data::{Dataset, ImageShape};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::guidance::{Guidance, Guided};
use crate::hardware::Hardware;
use crate::image::Image;
use crate::model::Model;
use crate::nets;
use crate::plot;
use crate::sampler::{Options, SampleStep, Sampler, Seeds, Variance};
use crate::schedule::Schedule;
use crate::text::{LISTED, escaped, listed};
use crate::train::checkpoint::{self, Manifest, NamedTensor, Newest, Which};
use crate::train::config::Config;
use crate::train::config::suggest::nearest;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Most images that are drawn at once, where memory is not short.
pub const BATCH: usize = 64;

/// Which classes the images have, of a network that takes them; numbers start again behind the last class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Classes {
    /// Image i has class i.
    Cycle,
    /// They are not told.
    Unlabelled,
    /// All have this one.
    One(u32),
    /// So many images of each, one class after the other.
    Rows(usize),
}

impl Classes {
    /// The class that image `i` gets, of so many.
    pub fn of(self, i: usize, classes: u32) -> Option<u32> {
        let classes = classes.max(1) as usize;
        match self {
            Self::One(class) => Some(class),
            Self::Cycle => Some((i % classes) as u32),
            Self::Rows(row) => Some((i / row.max(1) % classes) as u32),
            Self::Unlabelled => None,
        }
    }
}

/// How images are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// How many.
    pub count: usize,
    /// The seed; image i depends on it and on i alone.
    pub seed: u64,
    /// Most images at once.
    pub batch: usize,
    /// The classes, where the network takes them.
    pub class: Classes,
    /// How far towards them.
    pub guidance: Guidance,
    /// The sampler and its settings.
    pub sampling: Options,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            count: 1,
            seed: 0,
            batch: BATCH,
            class: Classes::Cycle,
            guidance: Guidance::default(),
            sampling: Options::default(),
        }
    }
}

/// What makes the numbers of a batch, with the network and the batch's random numbers.
pub type BatchDrawing<'a> = dyn FnMut(&mut dyn Denoiser, Seeds) -> Result<Vec<f32>> + 'a;

impl Request {
    /// Number of batches, and images in each: batches of one size, so that one plan serves them all; the last may
    /// draw a few too many.
    pub fn batches(&self) -> (usize, usize) {
        let batches = self.count.div_ceil(self.batch.max(1)).max(1);
        (batches, self.count.div_ceil(batches).max(1))
    }
}

/// Weights for a [`Model`], which has its own copy.
enum Weights {
    /// At hand, for every model.
    Kept(Vec<NamedTensor>),
    /// Of a checkpoint: read, until a model has them, so that they do not stand in memory twice; read again for others.
    Of(PathBuf, Which, Mutex<Option<Vec<NamedTensor>>>),
}

/// A network with its weights, ready to draw.
pub struct Generator {
    config: Config,
    shape: ImageShape,
    schedule: Schedule,
    weights: Weights,
    class_names: Vec<String>,
    origin: PathBuf,
    hardware: Hardware,
    stop: Option<Arc<AtomicBool>>,
}

impl Generator {
    /// From a checkpoint of a run. A number of threads as `hardware` is the CPU with so many, 0 all of its cores.
    pub fn open(path: &Path, which: Which, hardware: impl Into<Hardware>) -> Result<Self> {
        let (manifest, weights) = checkpoint::load_weights_only(path, &which)?;
        Self::of_checkpoint(path, &which, manifest, weights, hardware)
    }

    /// From the newest checkpoint in the folder `dir` whose weights are whole, with which that is; `None` if there is no
    /// checkpoint.
    pub fn open_newest(
        dir: &Path,
        which: &Which,
        hardware: impl Into<Hardware>,
    ) -> Result<Option<(Newest, Self)>> {
        let Some((newest, manifest, weights)) = checkpoint::newest_weights(dir, which)? else {
            return Ok(None);
        };
        let generator = Self::of_checkpoint(&newest.path, which, manifest, weights, hardware)?;
        Ok(Some((newest, generator)))
    }

    fn of_checkpoint(
        path: &Path,
        which: &Which,
        manifest: Manifest,
        weights: Vec<NamedTensor>,
        hardware: impl Into<Hardware>,
    ) -> Result<Self> {
        let generator = Self::new(&manifest.config(path)?, Vec::new(), which.origin(path), hardware)?;
        let weights = Weights::Of(path.to_owned(), which.clone(), Mutex::new(Some(weights)));
        Ok(Self { class_names: manifest.classes, weights, ..generator })
    }

    /// From weights that are at hand; `origin` names them in errors.
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
        let schedule = Schedule::from_config(&config.diffusion)?;
        let (config, origin, class_names) = (config.clone(), origin.to_owned(), Vec::new());
        // Arithmetic belongs to the training's settings, the device to whoever draws.
        let Hardware { tf32, deterministic, .. } = config.train.hardware();
        let hardware = Hardware { tf32, deterministic, ..hardware.into() };
        let weights = Weights::Kept(weights);
        Ok(Self { config, shape, schedule, weights, class_names, origin, hardware, stop: None })
    }

    /// A flag that ends what the networks are doing, in the middle of a step too, with [`Error::Interrupted`].
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = Some(stop);
    }

    /// The images' shape.
    pub fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Gives the classes names, by number: those of the data, of a network that is being trained.
    pub fn with_class_names(self, class_names: Vec<String>) -> Self {
        Self { class_names, ..self }
    }

    /// What class `n` is called in a plot: its name, behind its index where the plot's font cannot write that; the index alone where
    /// the run knows no names (of imported weights).
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
    /// As [`Model::set_weights`], and for a second model as [`open`](Self::open), since weights are read again.
    pub fn model(&self, n: usize) -> Result<Model> {
        let net = nets::from_config(&self.config, self.shape.channels);
        let shape = [n, self.shape.height, self.shape.width, self.shape.channels];
        let arithmetic = self.config.train.arithmetic();
        let model = Model::with_arithmetic(&*net, shape, self.hardware, arithmetic)?;
        let mut model = model.predicting(self.config.diffusion.prediction);
        if let Some(stop) = &self.stop {
            model.executor().set_stop(stop.clone());
        }
        match &self.weights {
            Weights::Kept(weights) => model.set_weights(weights, &self.origin)?,
            Weights::Of(path, which, read) => {
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

    /// Whether [`draw`](Self::draw) can do this.
    ///
    /// # Errors
    /// [`Error::Config`] for a class that is not there, more images than can be numbered, and as [`Options::build`].
    pub fn check(&self, request: Request) -> Result<()> {
        // The number of an image is a 32-bit word in the random numbers' counter.
        if u32::try_from(request.count).is_err() {
            let reason = format!("{} images are too many; give at most {}", request.count, u32::MAX);
            return Err(Error::Config { key: "count (-n)".to_owned(), reason });
        }
        let wrong = |key: &str, reason: String| Err(Error::Config { key: key.to_owned(), reason });
        let classes = self.classes();
        let without = || "the run was trained without classes; leave it out".to_owned();
        match (request.class, classes) {
            (Classes::Cycle, _) | (Classes::Unlabelled, None) => {}
            (Classes::Unlabelled, Some(n)) => {
                if self.config.train.label_dropout == 0.0 {
                    let reason = "none is given (--class), and the run was trained with train.label_dropout = 0, or was imported: it \
                                  knows no image without its class; it has";
                    return wrong("class", format!("{reason} {}", self.class_list(n)));
                }
                if request.guidance != Guidance::default() {
                    let reason = "goes towards a class, and none is given (--class); the run has";
                    return wrong("guidance", format!("{reason} {}", self.class_list(n)));
                }
            }
            (_, None) => return wrong("class", without()),
            (Classes::One(class), Some(n)) if class >= n => {
                return wrong(
                    "class",
                    format!("{class} is out of range; the run has {}", self.class_list(n)),
                );
            }
            _ => {}
        }
        request.guidance.check()?;
        if request.guidance != Guidance::default() {
            if classes.is_none() {
                return wrong("guidance", without());
            }
            if self.config.train.label_dropout == 0.0 {
                let reason = "the run was trained with train.label_dropout = 0, or was imported (if it did learn images \
                              without their class, import it with --set train.label_dropout=0.1): it knows no \
                              image without its class, from which guidance goes on";
                return wrong("guidance", reason.to_owned());
            }
        }
        if request.sampling.variance == Some(Variance::Learned) && !self.config.diffusion.learned_variance {
            return Err(Variance::not_learned());
        }
        self.sampler(request).map(drop)
    }

    /// The sampler of a request.
    ///
    /// # Errors
    /// As [`Options::build`].
    pub fn sampler(&self, request: Request) -> Result<Box<dyn Sampler>> {
        self.sampling(request).build(&self.schedule, self.config.diffusion.prediction)
    }

    /// How a request's images are sampled, with the run's settings where it says nothing.
    pub fn sampling(&self, request: Request) -> Options {
        request.sampling.with_defaults(&self.config.sampling)
    }

    /// The noise schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The names of the classes by their numbers; none where the network takes no classes, or they are not known (of imported
    /// weights).
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// The class in words: its name, or `#3` where that is not known.
    pub fn class_name(&self, class: u32) -> String {
        self.class_names
            .get(class as usize)
            .map_or_else(|| format!("#{class}"), |name| escaped(name).into_owned())
    }

    /// The class with that index where it is asked for as `#3`, or of that name. A number is a name: only where no names are known is
    /// it the index.
    ///
    /// # Errors
    /// [`Error::Config`] with the classes that there are.
    pub fn class(&self, name: &str) -> Result<u32> {
        let wrong = |reason: String| Err(Error::Config { key: "class".to_owned(), reason });
        let Some(n) = self.classes() else {
            return wrong("the run was trained without classes; leave it out".to_owned());
        };
        let index = name.strip_prefix('#').filter(|digits| digits.parse::<u32>().is_ok());
        let named = |own: &&String| index.is_none() && *own == name;
        let places = || (0u32..).zip(&self.class_names).filter(|(_, own)| named(own)).map(|(i, _)| i);
        let (first, second) = (places().next(), places().nth(1));
        match (first, second) {
            (Some(only), None) => return Ok(only),
            (Some(a), Some(b)) => {
                let name = escaped(name);
                return wrong(format!(
                    "several classes are named \"{name}\"; ask by the index: --class=#{a} or --class=#{b}"
                ));
            }
            _ => {}
        }
        let index = index.or(self.class_names.is_empty().then_some(name));
        match index.and_then(|text| text.parse::<u32>().ok()) {
            Some(class) if class < n => Ok(class),
            Some(_) => wrong(format!(
                "there is no class at the index {}: indices go from 0 to {}",
                escaped(name),
                n - 1
            )),
            None => wrong(self.no_such_class(name, n)),
        }
    }

    /// That there is no class of this name, and what there is instead.
    fn no_such_class(&self, name: &str, n: u32) -> String {
        let number = |text: &str| text.trim().parse::<f64>().ok();
        let names = || self.class_names.iter().map(String::as_str);
        // A number is meant as a number, however it is written; other names are like one another by their letters.
        let near = match number(name) {
            Some(_) => names().find(|own| number(own) == number(name)),
            None => nearest(name, names()),
        };
        let meant =
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
        format!("there is no class \"{}\"{meant} run has {}{by_index}", escaped(name), self.class_list(n))
    }

    /// The number that the network knows each of a data set's classes by: that of the class with the same name, or, where the
    /// names are not known (of imported weights), the data's own. Nothing without classes on either side.
    ///
    /// # Errors
    /// [`Error::Data`] for classes that the run has not.
    pub fn class_numbers(&self, data: &dyn Dataset) -> Result<Vec<u32>> {
        let (Some(n), names) = (self.classes(), data.classes()) else { return Ok(Vec::new()) };
        let wrong = |reason| Error::Data { path: data.summary().source.clone().into(), reason };
        if self.class_names.is_empty() {
            if !names.is_empty() && names.len() != n as usize {
                let reason =
                    format!("has {} classes, and the run {n}, whose names are not known", names.len());
                return Err(wrong(reason));
            }
            return Ok((0..names.len() as u32).collect());
        }
        let number = |name: &String| {
            let at = self.class_names.iter().position(|n| n == name);
            at.and_then(|i| u32::try_from(i).ok()).ok_or_else(|| {
                wrong(format!(
                    "has a class \"{}\"; the run has {}; name the data's classes as the run's",
                    escaped(name),
                    self.class_list(n)
                ))
            })
        };
        names.iter().map(number).collect()
    }

    /// The classes in words: their names, or their numbers where these say as much.
    fn class_list(&self, n: u32) -> String {
        if self.class_names.iter().enumerate().all(|(i, name)| *name == i.to_string()) {
            return format!("the classes 0 to {}", n - 1);
        }
        let names: Vec<_> = self.class_names.iter().map(|name| escaped(name)).collect();
        format!("the classes {}", listed(&names, LISTED))
    }

    /// Number of classes that the network is told; `None`: it takes none.
    pub fn classes(&self) -> Option<u32> {
        let classes = nets::from_config(&self.config, self.shape.channels).classes();
        classes.map(|n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// Draws images. `on_step` sees each step of each batch and the index of the batch's first image; an error of
    /// its stops the drawing.
    ///
    /// # Errors
    /// As [`check`](Self::check), and what `on_step` gives.
    pub fn draw(
        &self,
        request: Request,
        on_step: &mut dyn FnMut(usize, SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<Image>> {
        let sampler = self.sampler(request)?;
        let x = self.in_batches(request, &mut |denoiser, seeds| {
            sampler.sample(denoiser, seeds, &mut |step| on_step(seeds.first as usize, step))
        })?;
        Ok(self.images(&x))
    }

    /// The numbers that `draw` makes of each batch, one image behind the other, without those of a last batch that are too
    /// many; the network is told the classes that the request has for them.
    ///
    /// # Errors
    /// As [`check`](Self::check), and what `draw` gives.
    pub fn in_batches(&self, request: Request, draw: &mut BatchDrawing<'_>) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        self.each_batch(request, request.batches().1, &|_| true, draw, &mut |_, x| {
            all.extend_from_slice(x);
            Ok(())
        })?;
        Ok(all)
    }

    /// As [`in_batches`](Self::in_batches) for the images that are `wanted`, handing each batch on as it is drawn: memory does not
    /// grow with the number of images. `batch` images are drawn at once; `done` gets the index of the first and the values of
    /// all of them, also of those between that are not wanted.
    ///
    /// # Errors
    /// As [`check`](Self::check), and what `draw` and `done` give.
    pub fn each_batch(
        &self,
        request: Request,
        batch: usize,
        wanted: &dyn Fn(usize) -> bool,
        draw: &mut BatchDrawing<'_>,
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
            let seeds = Seeds { seed: request.seed, first: first as u32 };
            let x = match classes {
                None => draw(model, seeds)?,
                Some(classes) => {
                    let labels = (first..first + batch).map(|i| request.class.of(i, classes)).collect();
                    draw(&mut Guided::new(model, &self.schedule, labels, request.guidance), seeds)?
                }
            };
            let here = batch.min(request.count - first);
            done(first, &x[..here * self.shape.values()])?;
            next = (first + here..request.count).find(|&i| wanted(i));
        }
        Ok(())
    }

    /// The images of numbers in [-1, 1], one behind the other.
    pub fn images(&self, numbers: &[f32]) -> Vec<Image> {
        numbers.chunks(self.shape.values()).map(|p| Image::from_unit(p, self.shape)).collect()
    }
}

#[cfg(test)]
mod tests;
