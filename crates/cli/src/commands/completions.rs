//! `ddpm completions`.

use clap::CommandFactory;
use clap_complete::Shell;
use std::process::ExitCode;

/// Print a completion script for your shell
#[derive(clap::Args)]
#[command(after_help = "Example:\n  ddpm completions bash > ~/.local/share/bash-completion/completions/ddpm")]
pub struct Args {
    /// Shell
    shell: Shell,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "ddpm", &mut text);
    std::io::Write::write_all(&mut std::io::stdout(), &text)?;
    Ok(ExitCode::SUCCESS)
}
