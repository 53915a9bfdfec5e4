//! `ddpm`: train, sample and study denoising diffusion models on your own pictures.
//!
//! Only this crate knows the command line and prints. Each command is a file in `commands`, with its flags, their
//! documentation and its work together.
#![forbid(unsafe_code)]

mod commands;
mod progress;
mod signals;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Exit status after Ctrl-C: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

#[derive(Parser)]
#[command(
    name = "ddpm",
    version,
    about = "Train, sample and study denoising diffusion models on your own pictures",
    after_help = "Examples:\n  ddpm train                              learn the built-in digits, in minutes\n  \
                  ddpm train --data photos --size 32      learn a folder of pictures\n  \
                  ddpm sample runs/run-001 -n 64 --seed 7 draw new ones\n\n\
                  DDPM_ISA=portable|avx2|avx512|neon forces an instruction set.",
    propagate_version = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(Box<commands::train::Args>),
    Sample(commands::sample::Args),
    Config(commands::config::Args),
    Bench(commands::bench::Args),
    Completions(commands::completions::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Train(args) => commands::train::run(*args),
        Command::Sample(args) => commands::sample::run(args),
        Command::Config(args) => commands::config::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Completions(args) => commands::completions::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ddpm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the reader of our output went away (`ddpm config | head`), which is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
