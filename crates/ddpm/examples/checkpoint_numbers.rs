//! Saves a checkpoint's outputs as tensors, to compare with other programs (`tools/check_interop.py`).
//!
//! ```sh
//! # Reads x [n, c, h, w], t [n] and, with classes, label [n] from in.safetensors; writes the prediction y to
//! out.safetensors
//! cargo run --release -p ddpm --example checkpoint_numbers -- predict CHECKPOINT in.safetensors out.safetensors
//! # Samples a chain; writes the initial noise start, noise [steps, n, c, h, w] and the images x
//! cargo run --release -p ddpm --example checkpoint_numbers -- chain CHECKPOINT out.safetensors ddim 50 uniform
//! # The same with the run's default sampling settings
//! cargo run --release -p ddpm --example checkpoint_numbers -- chain CHECKPOINT out.safetensors
//! # DDIM as above, but recomputing the noise from the clipped image
//! cargo run --release -p ddpm --example checkpoint_numbers -- chain CHECKPOINT out.safetensors ddim 50 uniform true
//! ```

use ddpm::checkpoint::{NamedTensor, read_weights_file};
use ddpm::denoiser::{ConditionalDenoiser, Denoiser};
use ddpm::pipeline::Pipeline;
use ddpm::process::Prediction;
use ddpm::sampler::{self, NoiseKey, SamplerOptions};
use ddpm_rng::Purpose;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::error::Error;
use std::path::Path;

/// Images of a chain.
const IMAGES: usize = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["predict", checkpoint, input, output] => predict(checkpoint, input, output),
        ["chain", checkpoint, output] => chain(checkpoint, output, None),
        ["chain", checkpoint, output, name, steps, spacing, ref clipped @ ..] if clipped.len() < 2 => {
            let (steps, spacing) = (Some(steps.parse()?), Some(spacing.parse()?));
            let use_clipped_model_output = clipped.first().map(|clipped| clipped.parse()).transpose()?;
            let sampler = sampler::find(name)?;
            let options = SamplerOptions {
                sampler,
                steps,
                spacing,
                use_clipped_model_output,
                ..SamplerOptions::default()
            };
            chain(checkpoint, output, Some(options))
        }
        _ => {
            println!(
                "predict CHECKPOINT IN OUT, or chain CHECKPOINT OUT [SAMPLER STEPS SPACING [USE_CLIPPED_MODEL_OUTPUT]]"
            );
            Ok(())
        }
    }
}

/// Converts images from channels last to channels first (PyTorch's layout), or `back`.
fn permute_channels(x: &[f32], [h, w, c]: [usize; 3], back: bool) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (image, out) in x.chunks(h * w * c).zip(out.chunks_mut(h * w * c)) {
        for at in 0..h * w {
            for ch in 0..c {
                let (last, first) = (at * c + ch, ch * h * w + at);
                let (from, to) = if back { (first, last) } else { (last, first) };
                out[to] = image[from];
            }
        }
    }
    out
}

fn save(path: &str, tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> Result<(), Box<dyn Error>> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, x)| x.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        Ok::<_, Box<dyn Error>>((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?))
    });
    std::fs::write(path, safetensors::serialize(views.collect::<Result<Vec<_>, _>>()?, None)?)?;
    Ok(())
}

fn predict(checkpoint: &str, input: &str, output: &str) -> Result<(), Box<dyn Error>> {
    let pipeline = Pipeline::open(checkpoint)?;
    let tensors_in = read_weights_file(Path::new(input))?;
    let find = |name: &str| tensors_in.iter().find(|t: &&NamedTensor| t.name == name);
    let (Some(x), Some(t)) = (find("x"), find("t")) else { return Err("x and t are needed".into()) };
    let (mut model, shape) = (pipeline.model(1)?, pipeline.shape());
    let dims = [shape.height, shape.width, shape.channels];
    if x.shape[1..] != [dims[2], dims[0], dims[1]] {
        return Err(
            format!("x is {:?}, the network takes {dims:?} (height, width, channels)", x.shape).into()
        );
    }
    let mut y = Vec::new();
    for (i, image) in x.data.chunks(shape.num_elements()).enumerate() {
        if let Some(label) = find("label") {
            model.set_labels(&[Some(label.data[i] as u32)])?;
        }
        let mut one = vec![0.0; shape.num_elements()];
        model.predict(&permute_channels(image, dims, true), f64::from(t.data[i]), &mut one)?;
        y.extend(permute_channels(&one, dims, false));
    }
    save(output, &[("y", x.shape.clone(), y)])
}

fn chain(
    checkpoint: &str,
    output: &str,
    options_override: Option<SamplerOptions>,
) -> Result<(), Box<dyn Error>> {
    let pipeline = Pipeline::open(checkpoint)?;
    let config = pipeline.config();
    let schedule = config.schedule()?;
    let options = options_override
        .map_or_else(|| config.sampling.options(), |options| Ok(config.sampling.apply_to(options)))?;
    let sampler = options.build(&schedule, Prediction::Eps)?;
    let (mut model, shape) = (pipeline.model(IMAGES)?, pipeline.shape());
    let (seeds, dims) = (NoiseKey { seed: 7, first: 0 }, [shape.height, shape.width, shape.channels]);
    let steps = options.steps.or(options.sampler.steps).unwrap_or(schedule.timesteps());
    let noise_at = |purpose, step| {
        let mut z = vec![0.0; IMAGES * shape.num_elements()];
        seeds.fill(purpose, step, shape.num_elements(), &mut z);
        permute_channels(&z, dims, false)
    };
    let x = sampler.sample(&mut model, seeds, &mut |_| Ok(()))?;
    let batch = vec![IMAGES, dims[2], dims[0], dims[1]];
    // Samplers count the remaining steps.
    let noise = (0..steps as u32).rev().flat_map(|left| noise_at(Purpose::SampleNoise, left)).collect();
    let start = noise_at(Purpose::SampleStart, 0);
    let all = [&[steps], &batch[..]].concat();
    save(
        output,
        &[
            ("start", batch.clone(), start),
            ("noise", all, noise),
            ("x", batch, permute_channels(&x, dims, false)),
        ],
    )
}
