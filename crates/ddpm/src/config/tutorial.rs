//! Reads the YAML settings of explainingai-code/DDPM-Pytorch (`config/default.yaml`) unchanged.

use std::collections::HashMap;
use std::path::Path;

use serde_saphyr::Spanned;
use toml::Value;

use super::layer::{Entry, Layer};
use crate::{Error, Result};
use ddpm_text::nearest;

/// What one of the tutorial's keys maps to.
enum Means {
    /// The setting with this section and name.
    Setting(&'static str, &'static str),
    /// The run's name.
    RunName,
    /// Nothing; the reason.
    Ignored(&'static str),
}

use Means::{Ignored, RunName, Setting};

const MEANING: &[(&str, &str, Means)] = &[
    ("dataset_params", "im_path", Setting("data", "path")),
    ("diffusion_params", "num_timesteps", Setting("diffusion", "timesteps")),
    ("diffusion_params", "beta_start", Setting("diffusion", "beta_start")),
    ("diffusion_params", "beta_end", Setting("diffusion", "beta_end")),
    ("model_params", "im_channels", Setting("network", "im_channels")),
    ("model_params", "im_size", Setting("network", "im_size")),
    ("model_params", "down_channels", Setting("attention", "down_channels")),
    ("model_params", "mid_channels", Setting("attention", "mid_channels")),
    ("model_params", "down_sample", Setting("attention", "down_sample")),
    ("model_params", "time_emb_dim", Setting("attention", "time_emb_dim")),
    ("model_params", "num_down_layers", Setting("attention", "num_down_layers")),
    ("model_params", "num_mid_layers", Setting("attention", "num_mid_layers")),
    ("model_params", "num_up_layers", Setting("attention", "num_up_layers")),
    ("model_params", "num_heads", Setting("attention", "num_heads")),
    ("train_params", "task_name", RunName),
    ("train_params", "batch_size", Setting("train", "batch_size")),
    ("train_params", "num_epochs", Setting("train", "epochs")),
    ("train_params", "num_samples", Setting("output", "sample_count")),
    ("train_params", "num_grid_rows", Ignored("the layout of sample sheets is automatic")),
    ("train_params", "lr", Setting("optimizer", "lr")),
    ("train_params", "ckpt_name", Ignored("checkpoints are written to the run's folder")),
];

/// The tutorial's settings as a layer, with the rest of the file.
pub(super) struct Tutorial {
    pub layer: Layer,
    pub run_name: Option<String>,
    pub notes: Vec<String>,
}

/// Whether the settings file is the tutorial's YAML: judged by its extension, or, if that is inconclusive, by the
/// tutorial's section names.
pub(super) fn looks_like(path: &Path, text: &str) -> bool {
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("yaml" | "yml") => true,
        Some("toml") => false,
        _ => text.lines().any(|line| {
            let name = line.split(':').next().unwrap_or_default().trim_end();
            line.contains(':') && MEANING.iter().any(|(section, _, _)| *section == name)
        }),
    }
}

/// Reads the YAML `text` of the file `path`.
pub(super) fn read(path: &Path, text: &str) -> Result<Tutorial> {
    type Sections = HashMap<Spanned<String>, Spanned<HashMap<Spanned<String>, Spanned<Value>>>>;
    let at = |line: u64, reason: String| Error::ConfigFile {
        path: path.to_owned(),
        reason: if line > 0 { format!("line {line}: {reason}") } else { reason },
    };
    let sections: Sections = serde_saphyr::from_str(text).map_err(|e| {
        let e = e.without_snippet();
        let line = e.location().map_or(0, |l| l.line());
        let message = e.to_string();
        at(
            line,
            format!(
                "{} (read as the DDPM-Pytorch tutorial's YAML)",
                message.lines().next().unwrap_or("is empty")
            ),
        )
    })?;
    let mut flat = Vec::new();
    for (section, content) in sections {
        let line = section.defined.line();
        if !MEANING.iter().any(|(s, _, _)| *s == section.value) {
            let mut known: Vec<_> = MEANING.iter().map(|&(s, _, _)| s).collect();
            known.dedup();
            let hint = match nearest(&section.value, known.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("the tutorial's sections are {}", known.join(", ")),
            };
            return Err(at(line, format!("{}: unknown section; {hint}", section.value)));
        }
        flat.extend(content.value.into_iter().map(|(key, value)| (section.value.clone(), key, value)));
    }
    // Report the first mistake in the file first.
    flat.sort_by_key(|(_, key, _)| key.defined.line());

    let (mut entries, mut run_name, mut notes) = (Vec::new(), None, Vec::new());
    for (section, key, value) in flat {
        let full = format!("{section}.{}", key.value);
        let line = key.defined.line();
        let Some((_, _, means)) = MEANING.iter().find(|(s, k, _)| *s == section && *k == key.value) else {
            let known: Vec<_> =
                MEANING.iter().filter(|(s, _, _)| *s == section).map(|&(_, k, _)| k).collect();
            let hint = match nearest(&key.value, known.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("{section} has {}", known.join(", ")),
            };
            return Err(at(line, format!("{full}: unknown setting; {hint}")));
        };
        match means {
            Setting(section, name) => entries.push(Entry {
                section: (*section).into(),
                name: (*name).into(),
                line: usize::try_from(line).ok().filter(|&l| l > 0),
                interpretations: vec![value.value],
            }),
            RunName => match value.value {
                Value::String(name) => run_name = Some(name),
                other => run_name = Some(other.to_string()),
            },
            Ignored(why) => notes.push(format!("{full} is ignored: {why}")),
        }
    }
    Ok(Tutorial { layer: Layer { file: Some(path.to_owned()), entries }, run_name, notes })
}
