//! Mutated files of other programs against our readers: no panic, no input that takes longer than a second, never more
//! than 1 GiB of memory.
//!
//! ```sh
//! cargo run --release -p ddpm-fuzz -- --seconds 30             # each target for so long
//! cargo run --release -p ddpm-fuzz -- --inputs 200000 pth zip  # so many inputs of these targets
//! cargo run --release -p ddpm-fuzz -- --seed 7 --only 123 pth  # one input again, as a failure names it
//! ```
//!
//! Inputs are made of the files in `seeds` by the seed and their number alone, so that a failure can be repeated; it is also
//! written to `failures`. Needs nothing but a stable compiler.
#![forbid(unsafe_code)]

mod mutate;
mod targets;

use cap::Cap;
use clap::Parser;
use std::alloc::System;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use targets::{TARGETS, Target};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Longest time of an input.
const MOST_TIME: Duration = Duration::from_secs(1);
/// What an input may take before the run is given up as hanging.
const HANGING: Duration = Duration::from_secs(20);
/// Most memory, all that the program holds at once.
const MOST_MEMORY: usize = 1 << 30;

/// Read mutated files
#[derive(Parser)]
struct Args {
    /// Only these targets
    targets: Vec<String>,
    /// Time of each target
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Number of inputs of each target, whatever time they take
    #[arg(long)]
    inputs: Option<u64>,
    /// Seed of the mutations
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only the input of this number
    #[arg(long)]
    only: Option<u64>,
}

/// The number of the input that is being read, and when that began, for the watch; 0: none.
static AT: AtomicU64 = AtomicU64::new(0);
static SINCE: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let args = Args::parse();
    let start = Instant::now();
    if let Some(wrong) = args.targets.iter().find(|t| !TARGETS.iter().any(|known| known.name == **t)) {
        let names: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
        eprintln!("ddpm-fuzz: there is no target {wrong:?}; the targets are {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    std::thread::spawn(move || watch(start));
    let (mut inputs, mut failures) = (0, 0);
    for target in TARGETS {
        if args.targets.is_empty() || args.targets.iter().any(|name| name == target.name) {
            let (read, failed) = fuzz(target, &args, start);
            inputs += read;
            failures += failed;
        }
    }
    println!("{inputs} inputs, {failures} failures");
    if failures > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Ends the program where an input hangs.
fn watch(start: Instant) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let (at, since) = (AT.load(Ordering::Relaxed), SINCE.load(Ordering::Relaxed));
        if at > 0 && start.elapsed().as_millis() as u64 > since + HANGING.as_millis() as u64 {
            eprintln!("input {} hangs", at - 1);
            std::process::exit(1);
        }
    }
}

/// Inputs read, and how many of them failed.
fn fuzz(target: &Target, args: &Args, start: Instant) -> (u64, u64) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seeds = targets::seeds(&folder.join("seeds").join(target.seeds));
    let begun = Instant::now();
    let (mut failures, mut accepted, mut slowest) = (0, 0, Duration::ZERO);
    let mut count = 0;
    loop {
        let i = args.only.unwrap_or(count);
        let done = match args.inputs {
            _ if args.only.is_some() => count > 0,
            Some(inputs) => count >= inputs,
            None => begun.elapsed().as_secs_f64() >= args.seconds,
        };
        if done || failures >= 10 {
            break;
        }
        let input = (target.make)(&seeds, args.seed, i);
        AT.store(i + 1, Ordering::Relaxed);
        SINCE.store(start.elapsed().as_millis() as u64, Ordering::Relaxed);
        let (peak, before) = (ALLOCATOR.max_allocated(), Instant::now());
        let outcome = catch_unwind(AssertUnwindSafe(|| (target.read)(&input)));
        let mut took = before.elapsed();
        if outcome.is_ok() && took > MOST_TIME {
            // On a busy machine the time may be others': that of a second reading counts, if it is shorter.
            let again = Instant::now();
            (target.read)(&input);
            took = took.min(again.elapsed());
        }
        AT.store(0, Ordering::Relaxed);
        count += 1;
        slowest = slowest.max(took);
        let wrong = match outcome {
            Err(_) => Some("panics".to_owned()),
            Ok(_) if took > MOST_TIME => Some(format!("takes {} ms", took.as_millis())),
            Ok(_) if peak <= MOST_MEMORY && ALLOCATOR.max_allocated() > MOST_MEMORY => {
                Some(format!("takes {} MiB", ALLOCATOR.max_allocated() >> 20))
            }
            Ok(read) => {
                accepted += u64::from(read);
                None
            }
        };
        if let Some(wrong) = wrong {
            failures += 1;
            let kept = keep(folder, target, args.seed, i, &input);
            eprintln!("{} --seed {} --only {i}: {wrong}; kept as {}", target.name, args.seed, kept.display());
        }
    }
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    println!(
        "{:12} {count:8} inputs, {rate:6.0} a second, {accepted} read, slowest {} ms, at most {} MiB",
        target.name,
        slowest.as_millis(),
        ALLOCATOR.max_allocated() >> 20
    );
    (count, failures)
}

/// Writes an input that failed.
fn keep(folder: &Path, target: &Target, seed: u64, i: u64, input: &[u8]) -> PathBuf {
    let path = folder.join("failures").join(format!("{}-{seed}-{i}", target.name));
    // Best effort: the seed and the number make it again.
    let _ = std::fs::create_dir_all(folder.join("failures")).and_then(|()| std::fs::write(&path, input));
    path
}
