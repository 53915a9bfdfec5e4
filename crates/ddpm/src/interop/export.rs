//! From our checkpoints to other programs'.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::own::Texts;
use super::{diffusers, torch};
use crate::nets;
use crate::output::{self, Kind};
use crate::process::Prediction;
use crate::sampler::{Threshold, Variance};
use crate::text::capped;
use crate::train::checkpoint::{self, NamedTensor, Which, to_bytes_with};
use crate::train::config::{Config, NetworkKind, Size};
use crate::train::disk::{self, Disk, RealDisk};
use crate::{Error, Result};

/// What a checkpoint becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder that `DDPMPipeline.from_pretrained` opens; of the network `unet2d`.
    Diffusers,
    /// A file that `torch.load` reads: the network's state dict.
    Pytorch,
    /// The same as safetensors.
    Safetensors,
}

impl Format {
    /// The name of the file or folder where none is given.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::Pytorch => "model.pth",
            Self::Safetensors => "model.safetensors",
        }
    }
}

/// Writes the weights of the checkpoint in the folder `checkpoint` as the new file or folder `out`; gives what a person
/// should know, a sentence each.
///
/// # Errors
/// [`Error::Checkpoint`] for a checkpoint that cannot be used, and a network that the format is not for;
/// [`Error::Taken`] if there is something at `out` already; [`Error::Io`]. Nothing is left of what was begun.
pub fn export(checkpoint: &Path, which: Which, format: Format, out: &Path) -> Result<Vec<String>> {
    export_over(checkpoint, which, format, out, false)
}

/// [`export`], which replaces a file at `out` if `overwrite` is set; a folder it does not.
///
/// # Errors
/// As [`export`].
pub fn export_over(
    checkpoint: &Path,
    which: Which,
    format: Format,
    out: &Path,
    overwrite: bool,
) -> Result<Vec<String>> {
    // An export of another checkpoint would be lost as well: none is taken for this one's.
    if let Ok(there) = fs::symlink_metadata(out)
        && (there.is_dir() || !overwrite)
    {
        let replace = if there.is_dir() { "" } else { ", or replace it with --overwrite" };
        let reason = format!("is there already; choose another --out, or remove it{replace}");
        return Err(Error::Taken { path: out.to_owned(), reason });
    }
    output::check(out, Kind::Foreign, overwrite)?;
    let origin = which.origin(checkpoint).to_owned();
    let (manifest, mut weights) = checkpoint::load_weights_only(checkpoint, &which)?;
    let config = manifest.config(checkpoint)?;
    let facts = config.image_size().zip(config.image_channels());
    let (size, channels) = facts.ok_or_else(|| Error::Checkpoint {
        path: checkpoint.to_owned(),
        reason: "does not say the size and channels of its images".to_owned(),
    })?;
    if format == Format::Diffusers && config.network.name != NetworkKind::Unet2d {
        let reason = "its network is none that diffusers has; only unet2d can go there. Export it to pytorch or safetensors, \
                      whose names and shapes are those of its tutorial";
        return Err(Error::Checkpoint { path: checkpoint.to_owned(), reason: reason.to_owned() });
    }
    if format == Format::Diffusers && divides_by_zero(&config) && config.sampling.threshold != Threshold::Clip
    {
        let reason = "its network predicts noise and its schedule leaves nothing of the image in the end \
                      (diffusion.zero_terminal_snr), where diffusers divides by zero and draws no numbers, unless \
                      sampling.threshold is clip. Export it to pytorch or safetensors";
        return Err(Error::Checkpoint { path: checkpoint.to_owned(), reason: reason.to_owned() });
    }
    // In the network's order, as state_dict() gives them.
    let (mut order, states) = nets::tensors_of(&*nets::from_config(&config, channels))?;
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
    let about = Texts::of(&config, &manifest.classes).map_err(unusable)?;
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
    // A person knows the place that was asked for.
    let written = written.map_err(|e| match e {
        Error::Io { path, doing, source } if path.starts_with(&temporary) => {
            Error::Io { path: out.to_owned(), doing, source }
        }
        other => other,
    });
    let done = written.and_then(|()| {
        RealDisk
            .rename(&temporary, out)
            .and_then(|()| RealDisk.sync_dir(parent))
            .map_err(Error::io(out, DOING))
    });
    if done.is_err() {
        // Best effort; its name says what it is.
        let _ = if temporary.is_dir() { fs::remove_dir_all(&temporary) } else { fs::remove_file(&temporary) };
    }
    done.map(|()| notes(&config, format))
}

/// Whether diffusers' first step takes an image from noise in which there is none.
fn divides_by_zero(config: &Config) -> bool {
    config.diffusion.zero_terminal_snr && config.diffusion.prediction == Prediction::Eps
}

fn notes(config: &Config, format: Format) -> Vec<String> {
    let mut notes = Vec::new();
    if format == Format::Diffusers && config.unet2d.num_class_embeds.is_some() {
        notes.push(
            "the network is told classes, which DDPMPipeline does not do: call the network yourself, with class_labels; it \
             cannot be asked without a class there, so that guidance does not travel"
                .into(),
        );
    }
    let classes = match config.network.name {
        NetworkKind::Attention => config.attention.num_class_embeds,
        NetworkKind::Simple => config.simple.num_class_embeds,
        // The first has none, the second has them there too.
        NetworkKind::DoubleConv | NetworkKind::Unet2d => None,
    };
    if let Some(classes) = classes {
        notes.push(format!(
            "the network is told classes, which its tutorial's is not: load_state_dict refuses class_embedding.weight there; add \
             torch.nn.Embedding({classes}, ...) of that name, whose row is added to the timestep's embedding"
        ));
    }
    if config.diffusion.learned_variance {
        let own = config.sampling.variance.filter(|v| *v != Variance::Learned);
        notes.extend(match (format, own) {
            (Format::Diffusers, Some(own)) => Some(format!(
                "the network learns the variance, which diffusers takes whatever sampling.variance says ({})",
                own.name()
            )),
            (Format::Diffusers, None) => None,
            _ => Some(
                "the network learns the variance: its last convolution has twice the images' channels, the second half \
                 for the variance"
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
            "this run samples with {sampler} (sampling.sampler), which the export does not: its pipeline samples with ddpm"
        ));
    }
    if format == Format::Diffusers
        && config.sampling.use_clipped_model_output
        && config.sampling.threshold != Threshold::None
    {
        notes.push(
            "with ddim this run takes the noise from the clipped image (sampling.use_clipped_model_output), which no file of \
             diffusers holds: give its DDIMPipeline use_clipped_model_output=True to sample as here"
                .into(),
        );
    }
    if format == Format::Diffusers && divides_by_zero(config) {
        notes.push(
            "the network predicts noise and the schedule leaves nothing of the image in the end \
             (diffusion.zero_terminal_snr): at the last timestep, where ours does not begin, diffusers divides by zero and \
             clips what comes of it to black and white"
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

fn write_safetensors(path: &Path, weights: &[NamedTensor], about: &Texts) -> Result<()> {
    let bytes = to_bytes_with(weights.iter().map(|t| ("", t)), &about.metadata());
    let bytes = bytes.map_err(|reason| Error::Checkpoint { path: path.to_owned(), reason })?;
    disk::write(&RealDisk, path, &bytes).map_err(Error::io(path, "write the export"))
}

/// What the folder of a pipeline has besides settings and weights.
struct Facts<'a> {
    channels: usize,
    size: Size,
    classes: &'a [String],
    about: &'a Texts,
}

/// The folder of a pipeline.
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
        disk::write(&RealDisk, &path, &text(&json)).map_err(Error::io(&path, DOING))?;
    }
    [&unet, &scheduler, folder]
        .into_iter()
        .try_for_each(|p| RealDisk.sync_dir(p).map_err(Error::io(p, DOING)))
}

/// JSON as diffusers writes it.
fn text(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}
