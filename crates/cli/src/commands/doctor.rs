//! `ddpm doctor`.

use ddpm::hardware::{BUILT_FOR_CUDA, probe_cuda};
use ddpm_engine_cpu::Isa;
use std::io::Write as _;
use std::process::ExitCode;

/// Report what ddpm finds on this machine: CPU, memory, GPUs, libraries
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
    let gpus = if BUILT_FOR_CUDA {
        "supported by this build"
    } else {
        "not supported by this build (build with --features cuda)"
    };
    lines.push(("NVIDIA GPUs", gpus.to_owned()));
    let found = probe_cuda();
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

/// The instruction set that kernels use, or why none can.
fn chosen() -> String {
    match Isa::from_env() {
        Ok(isa) => isa.name().to_owned(),
        Err(error) => format!("none ({error})"),
    }
}

/// Available and total memory (Linux).
fn memory() -> String {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mib = |key: &str| -> Option<u64> {
        let line = text.lines().find(|l| l.starts_with(key))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? >> 10)
    };
    match (mib("MemAvailable:"), mib("MemTotal:")) {
        (Some(free), Some(all)) => format!("{free} of {all} MiB free"),
        _ => "unknown".to_owned(),
    }
}
