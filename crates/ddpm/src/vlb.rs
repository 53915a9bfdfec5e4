//! The variational bound of a run on a data set ([`ddpm_diffusion::vlb`]).

use crate::data::{AugmentKey, Dataset};
use crate::error::{Error, Result};
use crate::guidance::{Guidance, Guided};
use crate::pipeline::Pipeline;
pub use ddpm_diffusion::vlb::*;

/// Minimum number of image batches that each share their sampled timesteps; the standard error is estimated
/// across them.
const GROUPS: usize = 16;

/// Estimates the bound of a run's network on `count` evenly spaced images of the data, with their classes if
/// the network takes them, in batches of at most `batch`. `on_eval` gets the number of network evaluations
/// done and in all.
///
/// # Errors
/// Those of [`VlbEstimator::new`], [`VlbEstimator::add`] and [`Pipeline::class_indices`]; [`Error::Data`] for
/// images of another shape, and for data without classes if the network needs them.
pub fn evaluate_run(
    pipeline: &Pipeline,
    data: &dyn Dataset,
    count: usize,
    batch: usize,
    options: VlbOptions,
    on_eval: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vlb> {
    let (config, shape) = (pipeline.config(), pipeline.shape());
    if data.shape() != shape {
        let reason = format!("has images of {}, but the run's are {shape}", data.shape());
        return Err(Error::Data { path: data.summary().source.clone().into(), reason });
    }
    let classes = pipeline.classes();
    let class_indices = pipeline.class_indices(data)?;
    if let Some(n) = classes
        && data.classes().is_empty()
        && config.train.label_dropout == 0.0
    {
        let reason = format!(
            "has no classes, but the run cannot work without them: it was trained with train.label_dropout = 0, or \
             imported; give images in one folder per class, of its {n} classes"
        );
        return Err(Error::Data { path: data.summary().source.clone().into(), reason });
    }
    let count = count.clamp(1, data.len());
    let schedule = config.schedule()?;
    let mut estimator = VlbEstimator::new(&schedule, config.diffusion.prediction, options)?;
    // Small enough for several groups, from which the standard error is estimated.
    let max_batch = if estimator.uses_all_terms() { count } else { count.div_ceil(GROUPS) };
    let batch = batch.min(max_batch).max(1);
    let mut model = pipeline.model(batch)?;
    let (mut evals, total) = (0, count.div_ceil(batch) * estimator.num_evals());
    let len = shape.num_elements();
    let mut images = vec![0.0; batch * len];
    for first in (0..count).step_by(batch) {
        let indices: Vec<usize> = (first..count.min(first + batch)).map(|i| i * data.len() / count).collect();
        for (&i, out) in indices.iter().zip(images.chunks_mut(len)) {
            data.read(i, AugmentKey::default(), out)?;
            out.iter_mut().for_each(|x| *x = quantize(*x));
        }
        let x_0 = &images[..indices.len() * len];
        let mut on_eval = || {
            evals += 1;
            Ok(on_eval(evals, total)?)
        };
        match classes {
            None => estimator.add(&mut model, x_0, &mut on_eval)?,
            Some(_) => {
                let index = |&i: &usize| data.label(i).and_then(|l| class_indices.get(l as usize).copied());
                let mut labels: Vec<_> = indices.iter().map(index).collect();
                labels.resize(batch, None);
                let mut conditional = Guided::new(&mut model, &schedule, labels, Guidance::default());
                estimator.add(&mut conditional, x_0, &mut on_eval)?;
            }
        }
    }
    Ok(estimator.finish())
}

/// Rounds to the nearest of 256 levels; resized and 16-bit images have values in between.
fn quantize(x: f32) -> f32 {
    ((f64::from(x.clamp(-1.0, 1.0)) + 1.0) * 127.5).round().mul_add(1.0 / 127.5, -1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_quantized_to_256_levels() {
        for i in 0..=255u16 {
            let x = f32::from(i) / 255.0 * 2.0 - 1.0;
            assert!((quantize(x) - x).abs() < 1e-6 && (quantize(x + 0.003) - x).abs() < 1e-6, "{i}");
        }
        assert_eq!((quantize(-1.0), quantize(1.0), quantize(7.0)), (-1.0, 1.0, 1.0));
    }
}
