//! Exports checkpoints for other programs.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::embedded::EmbeddedTexts;
use super::{diffusers, torch};
use crate::checkpoint::{self, NamedTensor, TensorFile, WeightsChoice};
use crate::config::{Config, Size};
use crate::nets;
use crate::nets::NetworkKind;
use crate::output::{self, FileKind};
use crate::process::Prediction;
use crate::sampler::{Threshold, Variance};
use crate::storage::{self, FileSystem, OsFileSystem};
use crate::text::capped;
use crate::{Error, Result};

/// Export format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder for `DDPMPipeline.from_pretrained`; only for the network `unet2d`.
    Diffusers,
    /// The network's state dict, for `torch.load`.
    Pytorch,
    /// The same tensors as safetensors.
    Safetensors,
}

impl Format {
    /// Default name of the file or folder.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::Pytorch => "model.pth",
            Self::Safetensors => "model.safetensors",
        }
    }
}

/// Exports the weights of the checkpoint folder `checkpoint` to the new file or folder `out`. Returns notes for the
/// user, one sentence each.
///
/// # Errors
/// [`Error::Checkpoint`] for an unusable checkpoint, or a network that the format does not support; [`Error::Taken`]
/// if `out` exists; [`Error::Io`]. A partial export is removed.
pub fn export(checkpoint: &Path, which: WeightsChoice, format: Format, out: &Path) -> Result<Vec<String>> {
    export_over(checkpoint, which, format, out, false)
}

/// [`export`] that replaces an existing file, but never a folder, at `out` if `overwrite` is set.
///
/// # Errors
/// As [`export`].
pub fn export_over(
    checkpoint: &Path,
    which: WeightsChoice,
    format: Format,
    out: &Path,
    overwrite: bool,
) -> Result<Vec<String>> {
    // An existing export may be of another checkpoint, so it is never replaced silently.
    if let Ok(there) = fs::symlink_metadata(out)
        && (there.is_dir() || !overwrite)
    {
        let replace = if there.is_dir() { "" } else { ", or replace it with --overwrite" };
        let reason = format!("already exists; choose another --out, or remove it{replace}");
        return Err(Error::Taken { path: out.to_owned(), reason });
    }
    output::check(out, FileKind::Foreign, overwrite)?;
    let origin = which.origin(checkpoint).to_owned();
    let (manifest, mut weights) = checkpoint::load_weights_only(checkpoint, &which)?;
    let config = manifest.config(checkpoint)?;
    let facts = config.image_size().zip(config.image_channels());
    let (size, channels) = facts.ok_or_else(|| Error::Checkpoint {
        path: checkpoint.to_owned(),
        reason: "does not record the size and channels of its images".to_owned(),
    })?;
    if format == Format::Diffusers {
        check_diffusers(checkpoint, &config)?;
    }
    // In the order of state_dict().
    let (mut order, states) = nets::tensors_of(&*config.build_network(channels))?;
    order.extend(states);
    checkpoint::check_fits(&order, &weights, &origin)?;
    let place: HashMap<_, _> = order.iter().enumerate().map(|(i, t)| (t.0.as_str(), i)).collect();
    weights.sort_by_key(|t| place.get(t.name.as_str()).copied());

    const DOING: &str = "write the export";
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io(parent, "make the folder"))?;
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let temporary = out.with_file_name(format!(".tmp-{}-{}", capped(&name, 100), std::process::id()));
    let unusable = |reason| Error::Checkpoint { path: checkpoint.to_owned(), reason };
    let about = EmbeddedTexts::of(&config, &manifest.classes).map_err(unusable)?;
    let written = match format {
        Format::Diffusers => {
            let facts = Facts { channels, size, classes: &manifest.classes, about: &about };
            write_pipeline(&temporary, &config, &weights, &facts)
        }
        Format::Pytorch => {
            let folder = out.file_stem().map_or("archive".into(), |s| s.to_string_lossy());
            write_file(&temporary, |file| {
                torch::write(BufWriter::new(file), &folder, &weights, &about.files())
            })
        }
        Format::Safetensors => write_safetensors(&temporary, &weights, &about),
    };
    // Report the requested path, not the temporary one.
    let written = written.map_err(|e| match e {
        Error::Io { path, doing, source } if path.starts_with(&temporary) => {
            Error::Io { path: out.to_owned(), doing, source }
        }
        other => other,
    });
    let done = written.and_then(|()| {
        OsFileSystem
            .rename(&temporary, out)
            .and_then(|()| OsFileSystem.sync_dir(parent))
            .map_err(Error::io(out, DOING))
    });
    if done.is_err() {
        // Best effort; the name identifies a leftover as temporary.
        let _ = if temporary.is_dir() { fs::remove_dir_all(&temporary) } else { fs::remove_file(&temporary) };
    }
    done.map(|()| notes(&config, format))
}

/// Checks that diffusers can run a network.
fn check_diffusers(checkpoint: &Path, config: &Config) -> Result<()> {
    if config.network.name != NetworkKind::Unet2d {
        let reason = "diffusers does not have this network; only unet2d can be exported to it. Export to pytorch or safetensors, \
                      with the names and shapes of the network's tutorial";
        return Err(Error::Checkpoint { path: checkpoint.to_owned(), reason: reason.to_owned() });
    }
    if divides_by_zero(config) && config.sampling.threshold != Threshold::Clip {
        let reason = "its network predicts noise and its schedule has zero terminal SNR (diffusion.zero_terminal_snr), for which \
                      diffusers divides by zero and samples NaN unless sampling.threshold is clip. Export to pytorch or \
                      safetensors";
        return Err(Error::Checkpoint { path: checkpoint.to_owned(), reason: reason.to_owned() });
    }
    Ok(())
}

/// Whether diffusers' first step would compute x_0 from pure noise.
fn divides_by_zero(config: &Config) -> bool {
    config.diffusion.zero_terminal_snr && config.diffusion.prediction == Prediction::Eps
}

fn notes(config: &Config, format: Format) -> Vec<String> {
    let mut notes = Vec::new();
    if format == Format::Diffusers && config.unet2d.num_class_embeds.is_some() {
        notes.push(
            "the network is class-conditional, which DDPMPipeline does not support: call the network directly with \
             class_labels; diffusers cannot call it without a class, so classifier-free guidance is lost"
                .into(),
        );
    }
    let classes = match config.network.name {
        NetworkKind::Attention => config.attention.num_class_embeds,
        NetworkKind::Simple => config.simple.num_class_embeds,
        // DoubleConv has no classes; UNet2DModel has them in PyTorch too.
        NetworkKind::DoubleConv | NetworkKind::Unet2d => None,
    };
    if let Some(classes) = classes {
        notes.push(format!(
            "the network is class-conditional, unlike its tutorial's, whose load_state_dict rejects class_embedding.weight: add \
             torch.nn.Embedding({classes}, ...) of that name and add its output to the timestep embedding"
        ));
    }
    if config.diffusion.learned_variance {
        let embedded = config.sampling.variance.filter(|v| *v != Variance::Learned);
        notes.extend(match (format, embedded) {
            (Format::Diffusers, Some(embedded)) => Some(format!(
                "the network learns the variance, which diffusers uses regardless of sampling.variance ({})",
                embedded.name()
            )),
            (Format::Diffusers, None) => None,
            _ => Some(
                "the network learns the variance: its last convolution has twice as many channels as the images, the second \
                 half for the variance"
                    .to_owned(),
            ),
        });
    }
    let sampler = &config.sampling.sampler;
    if format == Format::Diffusers
        && sampler != "ddpm"
        && diffusers::scheduler_class(config) != diffusers::DDIM
    {
        notes.push(format!(
            "this run samples with {sampler} (sampling.sampler), but the exported pipeline samples with ddpm"
        ));
    }
    if format == Format::Diffusers
        && config.sampling.use_clipped_model_output
        && config.sampling.threshold != Threshold::None
    {
        notes.push(
            "with ddim this run recomputes the noise from the clipped image (sampling.use_clipped_model_output), which diffusers \
             does not store: pass use_clipped_model_output=True to DDIMPipeline for the same samples"
                .into(),
        );
    }
    if format == Format::Diffusers && divides_by_zero(config) {
        notes.push(
            "the network predicts noise and the schedule has zero terminal SNR (diffusion.zero_terminal_snr): at the last \
             timestep, which ddpm skips, diffusers divides by zero and clips the result to black and white"
                .into(),
        );
    }
    notes
}

fn write_file(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
    let all = || {
        let file = File::create_new(path)?;
        write(&file)?;
        file.sync_all()
    };
    all().map_err(Error::io(path, "write the export"))
}

fn write_safetensors(path: &Path, weights: &[NamedTensor], about: &EmbeddedTexts) -> Result<()> {
    let file = TensorFile::new(weights.iter().map(|t| ("", t)), &about.metadata());
    let file = file.map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
    storage::write_synced(&OsFileSystem, path, &file.to_bytes()).map_err(Error::io(path, "write the export"))
}

/// What a pipeline folder records besides settings and weights.
struct Facts<'a> {
    channels: usize,
    size: Size,
    classes: &'a [String],
    about: &'a EmbeddedTexts,
}

/// Writes a pipeline folder.
fn write_pipeline(
    folder: &PathBuf,
    config: &Config,
    weights: &[NamedTensor],
    facts: &Facts<'_>,
) -> Result<()> {
    const DOING: &str = "write the export";
    let (unet, scheduler) = (folder.join("unet"), folder.join("scheduler"));
    for path in [folder, &unet, &scheduler] {
        fs::create_dir(path).map_err(Error::io(path, DOING))?;
    }
    let learned = config.diffusion.learned_variance;
    write_safetensors(&unet.join("diffusion_pytorch_model.safetensors"), weights, facts.about)?;
    let mut files = vec![
        (unet.join("config.json"), diffusers::unet_json(&config.unet2d, facts.channels, learned, facts.size)),
        (scheduler.join("scheduler_config.json"), diffusers::scheduler_json(config)?),
        (folder.join("model_index.json"), diffusers::index_json(config)),
    ];
    if !facts.classes.is_empty() {
        files.push((folder.join("classes.json"), facts.classes.into()));
    }
    for (path, json) in files {
        storage::write_synced(&OsFileSystem, &path, &text(&json)).map_err(Error::io(&path, DOING))?;
    }
    [&unet, &scheduler, folder]
        .into_iter()
        .try_for_each(|p| OsFileSystem.sync_dir(p).map_err(Error::io(p, DOING)))
}

/// JSON as diffusers writes it.
fn text(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}
