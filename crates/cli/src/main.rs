//! `ddpm`: train, sample and study denoising diffusion models on your own images.
//!
//! Only this crate knows the command line and prints. Each command is a file in `commands` that holds its flags, their
//! documentation and its code.
#![forbid(unsafe_code)]

/// Writes a line to stderr, control characters escaped. Unlike `eprintln!`, it ignores a closed pipe: `ddpm train 2>&1 | head`
/// must not end a training.
macro_rules! status {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "{}", ddpm::text::escaped_lines(&format!($($text)*)));
    }};
}
pub(crate) use status;

mod commands;
mod limits;
mod listing;
mod progress;
mod signals;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;

/// Exit status after Ctrl-C: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

#[derive(Parser)]
#[command(
    name = "ddpm",
    version,
    about = "Train, sample and study denoising diffusion models on your own images",
    after_help = "Examples:\n  ddpm train                                 train on the built-in digits, in minutes\n  \
                  ddpm train --data photos --size 32         train on a folder of images\n  \
                  ddpm sample runs/run-001 -n 64 --seed 7    sample new images\n\n\
                  Environment:\n  DDPM_ISA=portable|avx2|avx512|neon         force an instruction set",
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
    Nearest(commands::nearest::Args),
    Inpaint(commands::inpaint::Args),
    Vary(commands::vary::Args),
    Interpolate(commands::interpolate::Args),
    Denoise(commands::denoise::Args),
    Eval(commands::eval::Args),
    Average(commands::average::Args),
    Runs(commands::runs::Args),
    Data(commands::data::Args),
    Import(commands::import::Args),
    Export(commands::export::Args),
    Config(commands::config::Args),
    Show(commands::show::Args),
    Bench(commands::bench::Args),
    Doctor(commands::doctor::Args),
    Completions(commands::completions::Args),
}

/// Parses the command line; exits with a message if it is invalid.
fn arguments() -> Cli {
    let command = limits::with_limits(Cli::command());
    let reject = |error: clap::Error| -> ! {
        let args: Vec<String> =
            std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
        limits::with_hint(error, &command, &args).exit()
    };
    let matches = command.clone().try_get_matches().unwrap_or_else(|e| reject(e));
    Cli::from_arg_matches(&matches).unwrap_or_else(|e| reject(e))
}

fn main() -> ExitCode {
    signals::catch_sigxfsz();
    let command = arguments().command;
    ddpm::hardware::start_shared_threads();
    let result = signals::handle().and_then(|()| run(command));
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            status!("ddpm: {}", message(&error));
            if let Some(ddpm::Error::BadFiles { files }) = error.downcast_ref()
                && let Some(line) = listing::write_all(files, None)
            {
                status!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Train(args) => commands::train::run(*args),
        Command::Sample(args) => commands::sample::run(args),
        Command::Nearest(args) => commands::nearest::run(args),
        Command::Inpaint(args) => commands::inpaint::run(args),
        Command::Vary(args) => commands::vary::run(args),
        Command::Interpolate(args) => commands::interpolate::run(args),
        Command::Denoise(args) => commands::denoise::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Average(args) => commands::average::run(args),
        Command::Runs(args) => commands::runs::run(args),
        Command::Data(args) => commands::data::run(args),
        Command::Import(args) => commands::import::run(args),
        Command::Export(args) => commands::export::run(args),
        Command::Config(args) => commands::config::run(args),
        Command::Show(args) => commands::show::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Completions(args) => commands::completions::run(args),
    }
}

/// The error and its causes, without causes that an earlier message already contains.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Whether stdout was closed early (`ddpm config | head`), which is not an error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_printed_once() {
        let cause = std::io::Error::other("it is full");
        let error = anyhow::Error::from(ddpm::Error::io("a/b", "write it")(cause));
        assert_eq!(message(&error), "a/b: cannot write it: it is full");
        assert_eq!(message(&error.context("saving")), "saving: a/b: cannot write it: it is full");
    }

    #[test]
    fn the_flags_are_consistent() {
        limits::with_limits(Cli::command()).debug_assert();
    }
}
