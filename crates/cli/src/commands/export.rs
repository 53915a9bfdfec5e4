//! `ddpm export`.

use clap::ValueEnum;
use ddpm::checkpoint::WeightsChoice;
use ddpm::interop::{self, Format};
use ddpm::run_folder::RUNS;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Export a run's weights to diffusers, PyTorch or safetensors
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm export runs/run-001 --to diffusers --out my-model   for DDPMPipeline.from_pretrained\n  \
    ddpm export runs/run-001 --to pytorch --out model.pth    for torch.load and load_state_dict\n  \
    ddpm export runs/run-001 --to safetensors --weights raw  in runs/run-001/export")]
pub struct Args {
    /// Run folder, or its name in runs/
    run: PathBuf,
    /// Target format
    #[arg(long, value_name = "FORMAT")]
    to: To,
    /// Output file or folder; in RUN/export by default
    #[arg(short, long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Overwrite an existing file
    #[arg(long)]
    overwrite: bool,
    /// Weights: auto, ema, raw, another average or a .safetensors file (see `ddpm sample --help`)
    #[arg(long, value_name = "WEIGHTS", default_value = "auto")]
    weights: WeightsChoice,
    /// Checkpoint to use, by its step; the newest by default
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<String>,
    /// Folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    /// Folder of a diffusers pipeline; only for the network unet2d
    Diffusers,
    /// State dict in torch.save format
    Pytorch,
    /// State dict in safetensors format
    Safetensors,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (run, at) = super::flags::open_run(&args.runs, &args.run, args.checkpoint.as_deref())?;
    let which = super::flags::weights_of(&args.run, at.as_deref(), &args.weights)?;
    let checkpoint = at.map_or_else(|| super::flags::newest(&run), Ok)?;
    let format = match args.to {
        To::Diffusers => Format::Diffusers,
        To::Pytorch => Format::Pytorch,
        To::Safetensors => Format::Safetensors,
    };
    let out = args.out.unwrap_or_else(|| run.path().join("export").join(format.file_name()));
    for note in interop::export_over(&checkpoint, which, format, &out, args.overwrite)? {
        status!("note: {note}");
    }
    writeln!(std::io::stdout(), "{}", ddpm::text::shown(&out))?;
    Ok(ExitCode::SUCCESS)
}
