//! `ddpm doctor`.

use ddpm::hardware::{BUILT_FOR_CUDA, findings};
use ddpm_engine::Isa;
use std::io::Write as _;
use std::process::ExitCode;

/// Tell what the program finds on this machine: processor, memory, GPUs, libraries
#[derive(clap::Args)]
#[command(after_help = "Example:\n  ddpm doctor")]
pub struct Args {}

pub fn run(_: Args) -> anyhow::Result<ExitCode> {
    let mut lines = vec![
        (
            "ddpm",
            format!("{} for {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH),
        ),
        ("threads", std::thread::available_parallelism().map_or_else(|e| e.to_string(), |n| n.to_string())),
        ("memory", memory()),
    ];
    let sets: Vec<&str> = Isa::all().iter().map(|isa| isa.name()).collect();
    lines.push(("instructions", format!("{}; {} is used", sets.join(", "), chosen())));
    let gpus = match BUILT_FOR_CUDA {
        true => "this program can use them",
        false => "this program was built without them (--features cuda)",
    };
    lines.push(("NVIDIA GPUs", gpus.to_owned()));
    let found = findings();
    for finding in &found {
        let state = match &finding.state {
            Ok(state) => state.clone(),
            Err(reason) => format!("not usable: {reason}"),
        };
        lines.push((&finding.name, state));
    }
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut out = std::io::stdout();
    for (name, text) in lines {
        writeln!(out, "{name:width$}  {text}")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The instruction set that kernels would run on, or why none would.
fn chosen() -> String {
    match Isa::from_env() {
        Ok(isa) => isa.name().to_owned(),
        Err(error) => format!("none ({error})"),
    }
}

/// Free and all memory, where the system tells.
fn memory() -> String {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mib = |key: &str| -> Option<u64> {
        let line = text.lines().find(|l| l.starts_with(key))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? >> 10)
    };
    match (mib("MemAvailable:"), mib("MemTotal:")) {
        (Some(free), Some(all)) => format!("{free} of {all} MiB free"),
        _ => "the system does not tell".to_owned(),
    }
}
