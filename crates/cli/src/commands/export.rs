//! `ddpm export`.

use clap::ValueEnum;
use ddpm::interop::{self, Format};
use ddpm::train::checkpoint::Which;
use ddpm::train::run::RUNS;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Write a run's weights for another program
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm export runs/run-001 --to diffusers --out my-model   opens with DDPMPipeline.from_pretrained(\"my-model\")\n  \
    ddpm export runs/run-001 --to pytorch --out model.pth    for torch.load and load_state_dict\n  \
    ddpm export runs/run-001 --to safetensors --weights raw  in runs/run-001/export")]
pub struct Args {
    /// The run (its folder, or its name under runs/)
    run: PathBuf,
    /// For which program
    #[arg(long, value_name = "FORMAT")]
    to: To,
    /// The new file or folder; in RUN/export if not given
    #[arg(short, long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Replace a file that is there
    #[arg(long)]
    overwrite: bool,
    /// The weights: auto, ema, raw, another average by its name, or a .safetensors file (as `ddpm sample --weights`)
    #[arg(long, value_name = "WHICH", default_value = "auto")]
    weights: Which,
    /// From this checkpoint (a step) instead of the newest
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<String>,
    /// The folder that holds the runs
    #[arg(long, value_name = "FOLDER", default_value = RUNS)]
    runs: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    /// A folder for diffusers' pipelines; the network unet2d only
    Diffusers,
    /// A state dict, as torch.save writes it
    Pytorch,
    /// A state dict as safetensors
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
        tell!("note: {note}");
    }
    writeln!(std::io::stdout(), "{}", ddpm::text::shown(&out))?;
    Ok(ExitCode::SUCCESS)
}
