//! New pictures from a trained network.

use crate::data::PictureShape;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nets;
use crate::picture::Picture;
use crate::process::Prediction;
use crate::sampler::{Options, SampleStep, Sampler, Seeds};
use crate::schedule::Schedule;
use crate::train::checkpoint::{self, NamedTensor, Which};
use crate::train::config::Config;
use std::path::Path;

/// Most pictures that are drawn at once, where memory is not short.
pub const BATCH: usize = 64;

/// How pictures are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// How many.
    pub count: usize,
    /// The seed; picture i depends on it and on i alone.
    pub seed: u64,
    /// Most pictures at once.
    pub batch: usize,
    /// The class of all of them, where the network takes classes; `None`: picture i gets class i modulo their number.
    pub class: Option<u32>,
    /// The sampler and its settings.
    pub sampling: Options,
}

impl Default for Request {
    fn default() -> Self {
        Self { count: 1, seed: 0, batch: BATCH, class: None, sampling: Options::default() }
    }
}

impl Request {
    /// Number of batches, and pictures in each: batches of one size, so that one plan serves them all; the last may
    /// draw a few too many.
    pub fn batches(&self) -> (usize, usize) {
        let batches = self.count.div_ceil(self.batch.max(1)).max(1);
        (batches, self.count.div_ceil(batches).max(1))
    }
}

/// A network with its weights, ready to draw.
pub struct Generator {
    config: Config,
    shape: PictureShape,
    schedule: Schedule,
    weights: Vec<NamedTensor>,
    origin: std::path::PathBuf,
    threads: usize,
}

impl Generator {
    /// From a checkpoint of a run. `threads` 0 takes all cores.
    pub fn open(path: &Path, which: Which, threads: usize) -> Result<Self> {
        let (manifest, weights) = checkpoint::load_weights_only(path, which)?;
        Self::new(&manifest.config(path)?, weights, path, threads)
    }

    /// From weights that are at hand; `origin` names them in errors.
    pub fn new(config: &Config, weights: Vec<NamedTensor>, origin: &Path, threads: usize) -> Result<Self> {
        config.validate()?;
        let missing = |key: &str| Error::Config {
            key: key.to_owned(),
            reason: "is not set: these are not the settings of a training run".to_owned(),
        };
        let size = config.picture_size().ok_or_else(|| missing("data.size"))?;
        let channels = config.picture_channels().ok_or_else(|| missing("data.channels"))?;
        let shape = PictureShape { height: size.height, width: size.width, channels };
        let schedule = Schedule::from_config(&config.diffusion)?;
        Ok(Self { config: config.clone(), shape, schedule, weights, origin: origin.to_owned(), threads })
    }

    /// The pictures' shape.
    pub fn shape(&self) -> PictureShape {
        self.shape
    }

    /// The settings that the network was trained with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The network with its weights, for batches of `n`.
    pub fn model(&self, n: usize) -> Result<Model> {
        let net = nets::from_config(&self.config, self.shape.channels);
        let shape = [n, self.shape.height, self.shape.width, self.shape.channels];
        let mut model = Model::new(&*net, shape, self.threads)?;
        model.set_weights(&self.weights, &self.origin)?;
        Ok(model)
    }

    /// Whether [`draw`](Self::draw) can do this.
    ///
    /// # Errors
    /// [`Error::Config`] for a class that is not there, more pictures than can be numbered, and as [`Options::build`].
    pub fn check(&self, request: Request) -> Result<()> {
        // The number of a picture is a 32-bit word in the random numbers' counter.
        if u32::try_from(request.count).is_err() {
            let reason = format!("{} pictures are too many; give at most {}", request.count, u32::MAX);
            return Err(Error::Config { key: "count (-n)".to_owned(), reason });
        }
        if let Some(class) = request.class {
            let wrong = |reason: String| Err(Error::Config { key: "class".to_owned(), reason });
            match self.classes() {
                None => return wrong("the run was trained without classes; leave it out".to_owned()),
                Some(n) if class >= n => {
                    return wrong(format!("{class} is out of range; the run has the classes 0 to {}", n - 1));
                }
                Some(_) => {}
            }
        }
        self.sampler(request).map(drop)
    }

    fn sampler(&self, request: Request) -> Result<Box<dyn Sampler>> {
        request.sampling.with_defaults(&self.config.sampling).build(&self.schedule, Prediction::Eps)
    }

    /// Number of classes that the network is told; `None`: it takes none.
    pub fn classes(&self) -> Option<u32> {
        let classes = nets::from_config(&self.config, self.shape.channels).classes();
        classes.map(|n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// Draws pictures. `on_step` sees each step of each batch and the index of the batch's first picture; an error of
    /// its stops the drawing.
    pub fn draw(
        &self,
        request: Request,
        on_step: &mut dyn FnMut(usize, SampleStep<'_>) -> Result<()>,
    ) -> Result<Vec<Picture>> {
        self.check(request)?;
        let sampler = self.sampler(request)?;
        let mut pictures = Vec::new();
        if request.count == 0 {
            return Ok(pictures);
        }
        let (_, batch) = request.batches();
        let classes = self.classes();
        let mut model = self.model(batch)?;
        for first in (0..request.count).step_by(batch) {
            if let Some(classes) = classes {
                let of = |i: usize| request.class.unwrap_or((i % classes as usize) as u32);
                model.set_labels(&(first..first + batch).map(of).collect::<Vec<_>>())?;
            }
            let seeds = Seeds { seed: request.seed, first: first as u32 };
            let x = sampler.sample(&mut model, seeds, &mut |step| on_step(first, step))?;
            let left = request.count - first;
            pictures
                .extend(x.chunks(self.shape.values()).take(left).map(|p| Picture::from_unit(p, self.shape)));
        }
        Ok(pictures)
    }
}
