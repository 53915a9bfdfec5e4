//! The model card.

use std::fmt::Write;
use std::path::PathBuf;

use super::{RunFolder, RunRecord};
use crate::Result;
use crate::objective::Weighting;
use crate::process::Prediction;
use crate::text::{escaped, quoted, quoted_value, thousands};
use crate::train::checkpoint::sha256;
use crate::train::config::{Config, LossKind, NetworkKind, SECTIONS};
use crate::train::disk::{self, RealDisk};

/// Most classes that are named.
const LISTED_CLASSES: usize = 1000;

/// What the card tells beside the settings.
#[derive(Clone, Debug, PartialEq)]
pub struct CardFacts {
    /// Number of parameters of the network.
    pub parameters: u64,
    /// The names of the classes that the network takes, by their numbers; none where it takes none, or they are not known.
    pub classes: Vec<String>,
    /// What the data is, in a sentence: source, number and size of the images.
    pub data: String,
    /// Training steps done.
    pub steps: u64,
    /// Mean loss of the last steps, once there is one.
    pub loss: Option<f64>,
    /// Seconds of training, once there are some.
    pub seconds: Option<f64>,
    /// Whether the weights are another program's, as it left them.
    pub imported: bool,
    /// Whether the checkpoints have averaged weights.
    pub has_ema: bool,
    /// The newest checkpoint's folder inside the run's, as `checkpoints/step-0001000`, once there is one.
    pub checkpoint: Option<PathBuf>,
}

/// The card's name where the one of the usual name was edited.
pub(crate) const NEW_CARD: &str = "README.new.md";

/// Writes the run's model card, `README.md`, in the place of the one before; as `README.new.md` where that was edited, for what a
/// person wrote stays.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io).
pub fn write_card(run: &RunFolder, config: &Config, facts: &CardFacts) -> Result<()> {
    const DOING: &str = "write the model card";
    let text = card(run, config, facts);
    if card_is_edited(run) {
        return disk::replace(&RealDisk, &run.path().join(NEW_CARD), text.as_bytes(), DOING);
    }
    let mut record = RunRecord::read(run.path());
    let hash = sha256(text.as_bytes());
    if record.cards.last() != Some(&hash) {
        // The one before is ours as well, should the process be killed between the two.
        record.cards = record.cards.pop().into_iter().chain([hash]).collect();
        record.write(run.path())?;
    }
    disk::replace(&RealDisk, &run.card_path(), text.as_bytes(), DOING)
}

/// Whether the run's card is another than the ones that were written; of runs of earlier versions nobody knows.
pub(crate) fn card_is_edited(run: &RunFolder) -> bool {
    let written = RunRecord::read(run.path()).cards;
    let there = std::fs::read(run.card_path()).map(|bytes| sha256(&bytes));
    there.is_ok_and(|there| !written.is_empty() && !written.contains(&there))
}

fn card(run: &RunFolder, config: &Config, facts: &CardFacts) -> String {
    let (name, path) = (escaped(run.name()), quoted(run.path()));
    let CardFacts { parameters, steps, .. } = facts;
    let data = escaped(&facts.data);
    let size = match (config.image_size(), config.image_channels()) {
        (Some(size), Some(channels)) => {
            let s = if channels == 1 { "" } else { "s" };
            format!(" of {size} pixels and {channels} channel{s}")
        }
        _ => String::new(),
    };
    let total = config.train.steps.map_or(String::new(), |total| format!(" of {total}"));
    let measure = match config.train.loss {
        LossKind::Mse => "mean squared error",
        LossKind::L1 => "mean absolute error",
        LossKind::Huber => "mean Huber loss",
    };
    let predicted = match config.diffusion.prediction {
        Prediction::Eps => "the noise",
        Prediction::X0 => "the image",
        Prediction::V => "v",
    };
    let weighted = if config.train.loss_weight == Weighting::Plain { "" } else { "weighted " };
    let loss = facts
        .loss
        .map_or(String::new(), |l| format!(", {weighted}{measure} of {predicted} {l:.5} at the end"));
    let d = &config.diffusion;
    let mut diffusion = format!("T = {}, {} schedule", d.timesteps, d.schedule);
    if d.schedule.has_ends() {
        diffusion += &format!(", beta from {} to {}", d.beta_start, d.beta_end);
    }
    if d.zero_terminal_snr {
        diffusion += ", zero terminal SNR";
    }
    if d.learned_variance {
        diffusion += ", learned variance";
    }
    let time = facts.seconds.map_or(String::new(), |s| format!(", {:.1} minutes", s / 60.0));
    let batch = config.images_per_step();
    let (made, training) = match facts.imported {
        true => ("Imported", "imported, as another program left it; no steps were made here".to_owned()),
        false => ("Trained", format!("{steps}{total} steps of {batch} images{loss}{time}")),
    };
    let weights = if facts.has_ema { "ema.safetensors" } else { "model.safetensors" };
    let checkpoint = match &facts.checkpoint {
        Some(path) => path.display().to_string(),
        None => "checkpoints/step-NNNNNNN".to_owned(),
    };

    let original = match config.network.name {
        NetworkKind::Attention => "the U-Net of explainingai-code/DDPM-Pytorch",
        NetworkKind::Simple => "the SimpleUnet of DeepFindr's notebook",
        NetworkKind::DoubleConv => "the U-Net of the CIFAR-10 notebook",
        NetworkKind::Unet2d => "diffusers' UNet2DModel",
    };

    let mut text = format!(
        "# {name}\n\n\
        A denoising diffusion probabilistic model (Ho, Jain, Abbeel: \"Denoising Diffusion Probabilistic Models\", \
        2020) that makes images{size} like those it was trained on. {made} with ddpm {version} on CPUs.\n\n\
        - Data: {data}\n\
        - Network: {parameters} parameters, predicting {predicted}\n\
        - Training: {training}\n\
        - Diffusion: {diffusion}\n\n\
        ## Sampling\n\n\
        ```sh\nddpm sample {path} -n 64 --seed 7\n```\n\n\
        The same seed gives the same images.\n\n\
        ## The weights in PyTorch\n\n\
        The weights are f32 safetensors with the names and layouts of {original}, built with the settings below:\n\n\
        ```python\n\
        from safetensors.torch import load_file\n\n\
        model.load_state_dict(load_file(\"{checkpoint}/{weights}\"))\n\
        ```\n\n",
        version = env!("CARGO_PKG_VERSION"),
    );
    if facts.has_ema {
        text += "`ema.safetensors` holds the weights averaged over training, which sample better; \
            `model.safetensors` beside it the last ones.\n\n";
    }
    text += &classes(&facts.classes, &path);
    text += "## Limits\n\n\
        The model knows nothing but its training images: it repeats their subjects, their faults and their biases, \
        and may come close to single ones of them, the more so the fewer they were and the longer it trained. \
        Whoever passes on the model or its images has to see to the rights in the training images. It was not \
        examined for any use beyond study.\n\n\
        ## Settings\n\n\
        All of them, with explanations, are in `config.toml`.\n\n\
        | setting | value |\n|---|---|\n";
    for (section, values) in SECTIONS.iter().zip(config.values()).filter(|(s, _)| config.uses(s.name)) {
        for (setting, value) in section.settings.iter().zip(values) {
            let value = value.map_or("unset".to_owned(), |v| escaped(&v.to_string()).replace('|', "\\|"));
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| {}.{} | {value} |", section.name, setting.name);
        }
    }
    text
}

/// The classes in their order; nothing without any.
fn classes(names: &[String], run: &str) -> String {
    let Some(first) = names.first() else { return String::new() };
    let shown: Vec<_> = names.iter().take(LISTED_CLASSES).map(|name| code(name)).collect();
    let more = match names.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {} more, all in `manifest.json` of each checkpoint", thousands(more)),
    };
    format!(
        "## Classes\n\nThe network takes one of {} classes. Their indices, from 0, are in this order: {}{more}.\n\n\
         ```sh\nddpm sample {run} --class={}\n```\n\n",
        thousands(names.len()),
        shown.join(", "),
        quoted_value(first)
    )
}

/// Text as Markdown code, whatever is in it.
fn code(text: &str) -> String {
    let text = escaped(text);
    match text.contains('`') {
        true => format!("`` {text} ``"),
        false => format!("`{text}`"),
    }
}
