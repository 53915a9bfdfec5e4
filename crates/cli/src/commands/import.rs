//! `ddpm import`.

use crate::commands::{pairs, size};

use anyhow::bail;
use ddpm::interop::{self, ImportOptions, Imported, Role};
use ddpm::output;
use ddpm::run_folder::RUNS;
use ddpm::sampler::Variance;
use ddpm::text::{quoted, shown, thousands};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Import a PyTorch, safetensors or diffusers checkpoint as a run
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm import ddpm_ckpt.pth                           network and settings are detected\n  \
    ddpm import ddpm-cifar10-32 --out runs/cifar10      a diffusers folder\n  \
    ddpm import cars.pt --size 64 --timesteps 300       settings that the file does not record\n  \
    ddpm import last.ckpt --key model                   one of several sets of weights in a file\n  \
    ddpm import model.safetensors.index.json            sharded weights, by their index\n\n\
    Next: ddpm sample RUN, or ddpm train --resume RUN --data FOLDER. Code in a file is never executed.")]
pub struct Args {
    /// Checkpoint (.pth, .pt, .ckpt, .bin, .safetensors), or folder of a diffusers pipeline or its network
    source: PathBuf,
    /// Folder of the new run; numbered in runs/ by default
    #[arg(short, long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Weights to import if the file holds several sets; the averaged set by default, if there is one
    #[arg(long, value_name = "NAME")]
    key: Option<String>,
    /// Image size: one side, or HEIGHTxWIDTH
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
    /// Number of diffusion steps T in training
    #[arg(long, value_name = "T")]
    timesteps: Option<usize>,
    /// Noise schedule, e.g. linear or cosine (see `ddpm show schedules`)
    #[arg(long, value_name = "NAME")]
    schedule: Option<String>,
    /// Noise variance (beta) of the first step
    #[arg(long, value_name = "BETA")]
    beta_start: Option<f64>,
    /// Noise variance (beta) of the last step
    #[arg(long, value_name = "BETA")]
    beta_end: Option<f64>,
    /// Heads of each attention layer
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Any other setting (`ddpm config`), e.g. unet2d.norm_eps=1e-6; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Args {
    fn options(&self) -> anyhow::Result<ImportOptions> {
        let mut overrides = pairs(&self.set)?;
        let mut flag =
            |key: &str, value: Option<String>| overrides.extend(value.map(|v| (key.to_owned(), v)));
        flag("diffusion.timesteps", self.timesteps.map(|v| v.to_string()));
        flag("diffusion.schedule", self.schedule.clone());
        flag("diffusion.beta_start", self.beta_start.map(|v| format!("{v:e}")));
        flag("diffusion.beta_end", self.beta_end.map(|v| format!("{v:e}")));
        let size = self.size.as_deref().map(size).transpose()?;
        Ok(ImportOptions { key: self.key.clone(), size, heads: self.heads, overrides })
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = args.options()?;
    if let Some(out) = &args.out {
        output::check_folder(out)?;
    }
    if let Some(out) = &args.out
        && out.exists()
    {
        bail!("{} already exists; give another --out, or remove it", shown(out));
    }
    let imported = interop::read(&args.source, &options)?;
    print_summary(&imported);
    let (root, name) = match &args.out {
        None => (PathBuf::from(RUNS), None),
        Some(out) => {
            let parent = out.parent().filter(|p| !p.as_os_str().is_empty());
            let name = out.file_name().map(|n| n.to_string_lossy().into_owned());
            if name.is_none() {
                bail!("--out {}: give the folder of the new run, e.g. runs/imported", shown(out));
            }
            (parent.map_or_else(|| PathBuf::from("."), PathBuf::from), name)
        }
    };
    let run = imported.save(&root, name.as_deref())?;
    let path = quoted(run.path());
    status!("\nsample:          ddpm sample {path} -n 64 --seed 7");
    status!("train further:   ddpm train --resume {path} --data FOLDER");
    writeln!(std::io::stdout(), "{}", shown(run.path()))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what was found, and what was assumed.
fn print_summary(imported: &Imported) {
    let (config, channels) = (&imported.config, imported.config.image_channels().unwrap_or(0));
    status!(
        "weights   {}{}",
        shown(&imported.file),
        match (imported.key.as_str(), imported.role) {
            ("", _) => String::new(),
            (key, Role::Plain) => format!(", {key}"),
            (key, role) => format!(", {key} ({})", role.name()),
        }
    );
    if !imported.others.is_empty() {
        let others = imported.others.iter().map(|set| format!("{:?} ({})", set.key, set.role.name()));
        status!("          others (--key): {}", others.collect::<Vec<_>>().join(", "));
    }
    status!("network   {}, {} parameters", config.network_name(), thousands(imported.parameters));
    for (key, value) in config.network_settings() {
        status!("          {key} = {value}");
    }
    if let Some(size) = config.image_size() {
        status!("images  {size}, {channels} channel{}", if channels == 1 { "" } else { "s" });
    }
    let d = &config.diffusion;
    status!(
        "diffusion T = {}, {} schedule{}{}, predicting {}",
        d.timesteps,
        d.schedule,
        if d.schedule.has_ends() {
            format!(", beta from {} to {}", d.beta_start, d.beta_end)
        } else {
            String::new()
        },
        if d.zero_terminal_snr { ", zero terminal SNR" } else { "" },
        d.prediction
    );
    let variance = match config.sampling.variance {
        None if config.diffusion.learned_variance => Variance::Learned,
        given => given.unwrap_or(Variance::Small),
    };
    status!("sampling  variance {}, threshold {}", variance.name(), config.sampling.threshold.name());
    if !imported.classes.is_empty() {
        const SHOWN: usize = 10;
        let shown = imported.classes.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let more = imported.classes.len().saturating_sub(SHOWN);
        status!("classes   {shown}{}", if more > 0 { format!(" and {more} more") } else { String::new() });
    }
    for assumed in &imported.assumed {
        let flag = match assumed.key {
            "network.im_size" => "--size SIZE".to_owned(),
            "diffusion.timesteps" => "--timesteps T".to_owned(),
            "diffusion.schedule" => "--schedule NAME".to_owned(),
            "diffusion.beta_start" => "--beta-start BETA".to_owned(),
            "diffusion.beta_end" => "--beta-end BETA".to_owned(),
            "attention.num_heads" | "double_conv.num_heads" => "--heads N".to_owned(),
            "diffusion.prediction" => "--set diffusion.prediction=x0 or v".to_owned(),
            key => format!("--set {key}=VALUE"),
        };
        status!("assumed   {} = {}, not recorded in the file ({flag})", assumed.key, assumed.value);
    }
    for note in &imported.notes {
        status!("note: {note}");
    }
}
