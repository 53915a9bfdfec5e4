//! The model card.

use std::fmt::Write;
use std::path::PathBuf;

use super::{RunFolder, RunRecord};
use crate::Result;
use crate::checkpoint::sha256;
use crate::config::{Config, SECTIONS};
use crate::nets::NetworkKind;
use crate::objective::{LossKind, Weighting};
use crate::process::Prediction;
use crate::storage::{self, OsFileSystem};
use crate::text::{escaped, quoted, quoted_value, thousands};

/// Maximum number of classes that are listed.
const MAX_LISTED_CLASSES: usize = 1000;

/// The contents of the card besides the settings.
#[derive(Clone, Debug, PartialEq)]
pub struct CardFacts {
    /// Number of parameters of the network.
    pub parameters: u64,
    /// The class names by index; empty if the network is unconditional or they are unknown.
    pub classes: Vec<String>,
    /// A description of the data: source, number and size of the images.
    pub data: String,
    /// Training steps completed.
    pub steps: u64,
    /// Mean loss of the last steps, if any.
    pub loss: Option<f64>,
    /// Training time in seconds, if any.
    pub seconds: Option<f64>,
    /// Whether the weights were imported and not trained further.
    pub imported: bool,
    /// Whether the checkpoints have averaged weights.
    pub has_ema: bool,
    /// The newest checkpoint's folder inside the run's, e.g. `checkpoints/step-0001000`, if any.
    pub checkpoint: Option<PathBuf>,
}

/// The card's file name if `README.md` was edited.
pub(crate) const NEW_CARD: &str = "README.new.md";

/// Writes the run's model card as `README.md`, or as `README.new.md` if that was edited by the user, to keep the edits.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io).
pub fn write_card(run: &RunFolder, config: &Config, facts: &CardFacts) -> Result<()> {
    const DOING: &str = "write the model card";
    let text = card(run, config, facts);
    if card_is_edited(run) {
        return storage::write_atomic(&OsFileSystem, &run.path().join(NEW_CARD), text.as_bytes(), DOING);
    }
    let mut record = RunRecord::read(run.path());
    let hash = sha256(text.as_bytes());
    if record.cards.last() != Some(&hash) {
        // Keep the previous hash too, in case the process is killed between the two writes.
        record.cards = record.cards.pop().into_iter().chain([hash]).collect();
        record.write(run.path())?;
    }
    storage::write_atomic(&OsFileSystem, &run.card_path(), text.as_bytes(), DOING)
}

/// Whether the run's card differs from those written; false for runs of earlier versions, which have no record of it.
pub(crate) fn card_is_edited(run: &RunFolder) -> bool {
    let written = RunRecord::read(run.path()).cards;
    let current = std::fs::read(run.card_path()).map(|bytes| sha256(&bytes));
    current.is_ok_and(|current| !written.is_empty() && !written.contains(&current))
}

fn card(run: &RunFolder, config: &Config, facts: &CardFacts) -> String {
    let path = quoted(run.path());
    let mut text = overview(&escaped(run.name()), config, facts);
    text += &usage(&path, config, facts);
    text += &classes(&facts.classes, &path);
    text += "## Limitations\n\n\
        The model only knows its training images: it reproduces their subjects, their flaws and their biases, and may \
        generate near copies of individual training images, especially after long training on few images. If you \
        distribute the model or its images, make sure that the rights in the training images allow it. It has not been \
        evaluated for any use beyond study.\n\n";
    text + &settings(config)
}

/// The title, and what the model is.
fn overview(name: &str, config: &Config, facts: &CardFacts) -> String {
    let size = match (config.image_size(), config.image_channels()) {
        (Some(size), Some(channels)) => {
            let s = if channels == 1 { "" } else { "s" };
            format!(" of {size} pixels and {channels} channel{s}")
        }
        _ => String::new(),
    };
    let origin = if facts.imported { "Imported" } else { "Trained" };
    format!(
        "# {name}\n\n\
        A denoising diffusion probabilistic model (Ho, Jain, Abbeel: \"Denoising Diffusion Probabilistic Models\", \
        2020) that generates images{size} like those it was trained on. {origin} with ddpm {version}.\n\n\
        - Data: {data}\n\
        - Network: {parameters} parameters, predicting {predicted}\n\
        - Training: {training}\n\
        - Diffusion: {diffusion}\n\n",
        version = env!("CARGO_PKG_VERSION"),
        data = escaped(&facts.data),
        parameters = facts.parameters,
        predicted = predicted(config),
        training = training(config, facts),
        diffusion = diffusion(config),
    )
}

/// What the network predicts.
fn predicted(config: &Config) -> &'static str {
    match config.diffusion.prediction {
        Prediction::Eps => "the noise",
        Prediction::X0 => "the image",
        Prediction::V => "v",
    }
}

/// The length of the training, its final loss and its time.
fn training(config: &Config, facts: &CardFacts) -> String {
    if facts.imported {
        return "imported from another program; not trained further".to_owned();
    }
    let total = config.train.steps.map_or(String::new(), |total| format!(" of {total}"));
    let loss_name = match config.loss.name {
        LossKind::Mse => "mean squared error",
        LossKind::L1 => "mean absolute error",
        LossKind::Huber => "mean Huber loss",
    };
    let weighted = if config.loss.weighting == Weighting::Plain { "" } else { "weighted " };
    let predicted = predicted(config);
    let loss =
        facts.loss.map_or(String::new(), |l| format!(", final {weighted}{loss_name} of {predicted} {l:.5}"));
    let time = facts.seconds.map_or(String::new(), |s| format!(", {:.1} minutes", s / 60.0));
    format!("{}{total} steps of {} images{loss}{time}", facts.steps, config.images_per_step())
}

/// The schedule.
fn diffusion(config: &Config) -> String {
    let d = &config.diffusion;
    let mut text = format!("T = {}, {} schedule", d.timesteps, d.schedule);
    if d.schedule.has_ends() {
        text += &format!(", beta from {} to {}", d.beta_start, d.beta_end);
    }
    if d.zero_terminal_snr {
        text += ", zero terminal SNR";
    }
    if d.learned_variance {
        text += ", learned variance";
    }
    text
}

/// How to sample, and how to load the weights in PyTorch.
fn usage(path: &str, config: &Config, facts: &CardFacts) -> String {
    let original = match config.network.name {
        NetworkKind::Attention => "the U-Net of explainingai-code/DDPM-Pytorch",
        NetworkKind::Simple => "the SimpleUnet of DeepFindr's notebook",
        NetworkKind::DoubleConv => "the U-Net of the CIFAR-10 notebook",
        NetworkKind::Unet2d => "diffusers' UNet2DModel",
    };
    let weights = if facts.has_ema { "ema.safetensors" } else { "model.safetensors" };
    let checkpoint = match &facts.checkpoint {
        Some(path) => path.display().to_string(),
        None => "checkpoints/step-NNNNNNN".to_owned(),
    };
    let mut text = format!(
        "## Sampling\n\n\
        ```sh\nddpm sample {path} -n 64 --seed 7\n```\n\n\
        The same seed always gives the same images.\n\n\
        ## Loading the weights in PyTorch\n\n\
        The weights are f32 safetensors with the names and layouts of {original}, built with the settings below:\n\n\
        ```python\n\
        from safetensors.torch import load_file\n\n\
        model.load_state_dict(load_file(\"{checkpoint}/{weights}\"))\n\
        ```\n\n"
    );
    if facts.has_ema {
        text += "`ema.safetensors` contains the exponential moving average of the weights, which gives better samples; \
            `model.safetensors` next to it contains the final weights.\n\n";
    }
    text
}

/// The table of settings.
fn settings(config: &Config) -> String {
    let mut text = "## Settings\n\n\
        `config.toml` contains all settings with explanations.\n\n\
        | setting | value |\n|---|---|\n"
        .to_owned();
    for (section, values) in SECTIONS.iter().zip(config.values()).filter(|(s, _)| config.uses(s.name)) {
        for (setting, value) in section.settings.iter().zip(values) {
            let value = value.map_or("unset".to_owned(), |v| escaped(&v.to_string()).replace('|', "\\|"));
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| {}.{} | {value} |", section.name, setting.name);
        }
    }
    text
}

/// The section about classes; empty without any.
fn classes(names: &[String], run: &str) -> String {
    let Some(first) = names.first() else { return String::new() };
    let shown: Vec<_> = names.iter().take(MAX_LISTED_CLASSES).map(|name| code(name)).collect();
    let more = match names.len() - shown.len() {
        0 => String::new(),
        more => {
            format!(" and {} more (all are listed in each checkpoint's `manifest.json`)", thousands(more))
        }
    };
    format!(
        "## Classes\n\nThe network is conditioned on one of {} classes, in the order of their indices, from 0: {}{more}.\n\n\
         ```sh\nddpm sample {run} --class={}\n```\n\n",
        thousands(names.len()),
        shown.join(", "),
        quoted_value(first)
    )
}

/// Any text as Markdown inline code.
fn code(text: &str) -> String {
    let text = escaped(text);
    if text.contains('`') { format!("`` {text} ``") } else { format!("`{text}`") }
}
