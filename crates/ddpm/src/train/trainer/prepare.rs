//! Builds the training graph from the settings and the data, before any memory is allocated.

use crate::config::{Config, DataFacts, Size};
use crate::data::loader::Loader;
use crate::data::{Dataset, ImageShape};
use crate::error::{Error, Result};
use crate::model::{NoiseSource, TrainingGraph};
use crate::nets::Network;
use crate::nets::check_size;
use ddpm_engine::PlanOptions;
use std::sync::Arc;

/// The training graph before any memory is allocated for it.
pub(super) struct Prepared {
    pub config: Config,
    pub graph: TrainingGraph,
    pub options: PlanOptions,
}

impl Prepared {
    /// Completes the settings with properties of the data and builds the graph.
    pub fn new(config: &Config, data: &dyn Dataset) -> Result<Self> {
        config.validate()?;
        let shape = data.shape();
        // Checked before the settings are completed, so that the error can list sizes that would fit.
        let net: Box<dyn Network> = config.build_network(shape.channels);
        check_size(&*net, shape.height, shape.width)?;
        if let Some(classes) = net.classes()
            && classes != data.classes().len()
        {
            let reason = match data.classes().len() {
                0 => format!("is {classes}, but the images have no classes; unset it (none)"),
                n => format!("is {classes}, but the images have {n} classes; give {n}"),
            };
            let key = format!("{}.num_class_embeds", config.network_section());
            return Err(Error::Config { key, reason });
        }
        Self::of(config, shape, data.len())
    }

    /// The same for `count` images of that shape, without checking classes.
    pub fn of(config: &Config, shape: ImageShape, count: usize) -> Result<Self> {
        let size = Size { height: shape.height, width: shape.width };
        let net: Box<dyn Network> = config.build_network(shape.channels);
        let config = config.resolve(&DataFacts { count, size, channels: shape.channels })?;
        config.validate()?;
        let schedule = config.schedule()?;
        let batch = [config.train.batch_size, shape.height, shape.width, shape.channels];
        let objective = config.objective();
        let graph = TrainingGraph::with_objective(&*net, &schedule, batch, NoiseSource::Random, objective)
            .map_err(|e| without_variance(e, batch))?;
        let accumulate = config.train.accumulate > 1;
        let compute = config.compute.options();
        // Only gradient accumulation needs all gradients at once.
        let fuse_optimizer = (!accumulate).then_some(graph.loss);
        let (ema, clip_norm) = (config.ema.decay > 0.0, config.optimizer.clip_norm);
        let defer_updates = true;
        let options = PlanOptions {
            accumulate,
            fuse_optimizer,
            defer_updates,
            clip_norm,
            compute,
            ..graph.options(ema)
        };
        Ok(Self { config, graph, options })
    }
}

/// Replaces the engine's error about batch normalization over a single value per channel by one with a remedy.
fn without_variance(error: Error, [n, height, width, _]: [usize; 4]) -> Error {
    match error {
        Error::Engine(ddpm_engine::Error::Shape { operation: "batch_norm", .. }) if n == 1 => {
            let reason = format!(
                "is 1, and with one {height}x{width} image the deepest layers have a single value per channel, which batch \
                 normalization cannot normalize; train with 2 or more images per step (--batch-size 2), or with larger images \
                 (--size {}x{})",
                2 * height,
                2 * width
            );
            Error::Config { key: "train.batch_size".to_owned(), reason }
        }
        other => other,
    }
}

/// Bytes of memory that training with these settings on this data needs, without allocating them: for the network with its
/// optimizer, and for the images.
///
/// # Errors
/// As [`Trainer::new`](super::Trainer::new).
pub fn memory(config: &Config, data: Box<dyn Dataset>) -> Result<(u64, u64)> {
    let Prepared { config, graph, options } = Prepared::new(config, &*data)?;
    let parameters = graph.graph.parameter_count();
    let network = config.compute.hardware().open()?.footprint(graph.graph, &options)?;
    let data: Arc<dyn Dataset> = Arc::from(data);
    let images = data.summary().memory_bytes;
    let prefetch = Loader::new(data, config.train.seed, config.train.batch_size).memory();
    let averages = (config.ema.extra_decays.len() + config.ema.power_widths.len()) * parameters * 4;
    Ok(((network.arena_bytes + network.scratch_bytes + averages) as u64, images + prefetch))
}
