//! `ddpm bench`.

use crate::progress::{human_bytes, thousands};
use ddpm::train::Trainer;
use ddpm::train::config::Config;
use ddpm::train::open_data;
use ddpm_engine::NodeTime;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Time training steps, and where their time goes
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ddpm bench                            the built-in digits' network\n  \
    ddpm bench --preset digits28 --profile  the tutorial's network at 28x28, operation by operation\n  \
    ddpm bench --set train.batch_size=16")]
pub struct Args {
    /// A named set of settings
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// A file of settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Any setting, as train.batch_size=16
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Steps that are timed, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: usize,
    /// Tell the time of every kind of operation, and of the slowest nodes
    #[arg(long)]
    profile: bool,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let overrides = crate::commands::pairs(&args.set)?;
    let config = Config::load(args.preset.as_deref(), args.config.as_deref(), &overrides)?;
    let mut out = std::io::stdout();
    let mut trainer = Trainer::new(&config, open_data(&config)?)?;
    let footprint = trainer.executor().footprint();
    let device = trainer.executor().describe();
    let threads = match trainer.config().train.threads {
        0 => std::thread::available_parallelism()?.get(),
        n => n,
    };
    writeln!(
        out,
        "{} parameters, batch {}, {}, {device}",
        thousands(trainer.tensor_numbers()),
        trainer.config().pictures_per_step(),
        trainer.data().shape()
    )?;
    let memory = footprint.arena_bytes + footprint.scratch_bytes;
    let peak = peak_flops(threads);
    writeln!(out, "arena and scratch memory {}", human_bytes(memory as u64))?;
    writeln!(out, "f32 peak, multiply-adds in registers only: {:.0} GFLOP/s", peak / 1e9)?;
    trainer.step()?;
    trainer.executor().set_profiling(args.profile);
    let mut times: Vec<f64> = Vec::new();
    for _ in 0..args.runs.max(1) {
        let start = Instant::now();
        trainer.step()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let micro_batches = trainer.config().train.accumulate as f64;
    let (median, flops) = (times[times.len() / 2], 2.0 * footprint.multiply_adds as f64 * micro_batches);
    writeln!(
        out,
        "train {median:.4} s  {:.1} images/s  {:.1} GFLOP a step  {:.0} GFLOP/s  (min {:.4}, max {:.4}, {} steps)",
        trainer.config().pictures_per_step() as f64 / median,
        flops / 1e9,
        flops / median / 1e9,
        times[0],
        times[times.len() - 1],
        times.len()
    )?;
    if args.profile {
        print_profile(&mut out, &trainer.executor().profile(), peak)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Floating-point operations a second of all threads, in registers only: the best of several short times, because
/// whatever else the machine does makes it less.
fn peak_flops(threads: usize) -> f64 {
    (0..8).map(|_| flops_once(threads)).fold(0.0, f64::max)
}

fn flops_once(threads: usize) -> f64 {
    let isa = ddpm_engine::Isa::from_env().unwrap_or_else(|_| ddpm_engine::Isa::best());
    let rounds = 10_000_000 / isa.lanes().max(2) as u64;
    let start = Instant::now();
    let flops: u64 = std::thread::scope(|s| {
        let all: Vec<_> =
            (0..threads).map(|_| s.spawn(move || ddpm_engine::multiply_add_rounds(isa, rounds))).collect();
        all.into_iter().map(|t| t.join().unwrap_or(0)).sum()
    });
    flops as f64 / start.elapsed().as_secs_f64()
}

fn print_profile(out: &mut impl Write, nodes: &[NodeTime], peak: f64) -> anyhow::Result<()> {
    let mut kinds: BTreeMap<&str, (f64, u64, u64)> = BTreeMap::new();
    for node in nodes.iter().filter(|n| n.runs > 0) {
        let kind = kinds.entry(node.operation).or_default();
        kind.0 += node.time.as_secs_f64() / node.runs as f64;
        kind.1 += node.multiply_adds;
        kind.2 += 1;
    }
    let total: f64 = kinds.values().map(|k| k.0).sum();
    let mut kinds: Vec<_> = kinds.into_iter().collect();
    kinds.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    writeln!(
        out,
        "\n{:24} {:>6} {:>10} {:>7} {:>9} {:>8}",
        "operation", "nodes", "ms", "share", "GFLOP/s", "of peak"
    )?;
    let rate = |flops: f64, time: f64| {
        if flops == 0.0 {
            (String::new(), String::new())
        } else {
            (format!("{:.1}", flops / time / 1e9), format!("{:.0} %", 100.0 * flops / time / peak))
        }
    };
    for (name, (time, multiply_adds, count)) in kinds {
        let (gflops, share) = rate(2.0 * multiply_adds as f64, time);
        writeln!(
            out,
            "{name:24} {count:6} {:10.2} {:6.1}% {gflops:>9} {share:>8}",
            time * 1e3,
            100.0 * time / total
        )?;
    }
    let mut slowest: Vec<&NodeTime> = nodes.iter().filter(|n| n.runs > 0).collect();
    slowest.sort_by_key(|n| std::cmp::Reverse(n.time));
    writeln!(out, "\nslowest nodes")?;
    for node in slowest.iter().take(20) {
        let time = node.time.as_secs_f64() / node.runs as f64;
        let (gflops, share) = rate(2.0 * node.multiply_adds as f64, time);
        writeln!(out, "{:44} {:22} {:9.2} ms {gflops:>8} {share:>6}", node.name, node.operation, time * 1e3)?;
    }
    Ok(())
}
