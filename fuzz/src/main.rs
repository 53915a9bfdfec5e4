//! Fuzzes the readers of other programs' files with mutated inputs: no panics, at most a second per input, at most 1 GiB of
//! memory.
//!
//! ```sh
//! cargo run --release -p ddpm-fuzz -- --seconds 30             # 30 seconds per target
//! cargo run --release -p ddpm-fuzz -- --inputs 200000 pth zip  # 200000 inputs of each of these targets
//! cargo run --release -p ddpm-fuzz -- --seed 7 --only 123 pth  # repeat one input, as printed by a failure
//! ```
//!
//! An input depends only on the files in `seeds`, the seed and its index, so failures are reproducible; failing
//! inputs are also written to `failures`. Works with stable Rust.
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

/// Maximum time per input.
const MAX_TIME: Duration = Duration::from_secs(1);
/// Time after which an input counts as hanging and the program exits.
const HANG_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum memory allocated at once by the whole program.
const MAX_MEMORY: usize = 1 << 30;

/// Fuzz the readers of other programs' files
#[derive(Parser)]
struct Args {
    /// Targets to run; all by default
    targets: Vec<String>,
    /// Seconds per target
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Number of inputs per target, instead of a time
    #[arg(long)]
    inputs: Option<u64>,
    /// Seed of the mutations
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Run only the input with this index
    #[arg(long)]
    only: Option<u64>,
}

/// For the watchdog: 1 + index of the current input, 0 for none; and its start time in milliseconds.
static CURRENT_INPUT: AtomicU64 = AtomicU64::new(0);
static INPUT_START_MS: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let args = Args::parse();
    let start = Instant::now();
    if let Some(problem) = args.targets.iter().find(|t| !TARGETS.iter().any(|known| known.name == **t)) {
        let names: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
        eprintln!("ddpm-fuzz: unknown target {problem:?}; the targets are {}", names.join(", "));
        return ExitCode::FAILURE;
    }
    std::thread::spawn(move || watchdog(start));
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

/// Exits the program if an input hangs.
fn watchdog(start: Instant) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let (at, since) = (CURRENT_INPUT.load(Ordering::Relaxed), INPUT_START_MS.load(Ordering::Relaxed));
        if at > 0 && start.elapsed().as_millis() as u64 > since + HANG_TIMEOUT.as_millis() as u64 {
            eprintln!("input {} hangs", at - 1);
            std::process::exit(1);
        }
    }
}

/// Runs a target; returns the number of inputs and of failures.
fn fuzz(target: &Target, args: &Args, start: Instant) -> (u64, u64) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seeds = targets::seeds(&folder.join("seeds").join(target.seeds));
    let target_start = Instant::now();
    let (mut failures, mut accepted, mut slowest) = (0, 0, Duration::ZERO);
    let mut count = 0;
    loop {
        let i = args.only.unwrap_or(count);
        let done = match args.inputs {
            _ if args.only.is_some() => count > 0,
            Some(inputs) => count >= inputs,
            None => target_start.elapsed().as_secs_f64() >= args.seconds,
        };
        if done || failures >= 10 {
            break;
        }
        let input = (target.make)(&seeds, args.seed, i);
        CURRENT_INPUT.store(i + 1, Ordering::Relaxed);
        INPUT_START_MS.store(start.elapsed().as_millis() as u64, Ordering::Relaxed);
        let (peak, before) = (ALLOCATOR.max_allocated(), Instant::now());
        let outcome = catch_unwind(AssertUnwindSafe(|| (target.read)(&input)));
        let mut elapsed = before.elapsed();
        if outcome.is_ok() && elapsed > MAX_TIME {
            // On a busy machine the time may be inflated: repeat, and use the shorter time.
            let again = Instant::now();
            (target.read)(&input);
            elapsed = elapsed.min(again.elapsed());
        }
        CURRENT_INPUT.store(0, Ordering::Relaxed);
        count += 1;
        slowest = slowest.max(elapsed);
        let problem = match outcome {
            Err(_) => Some("panics".to_owned()),
            Ok(_) if elapsed > MAX_TIME => Some(format!("takes {} ms", elapsed.as_millis())),
            Ok(_) if peak <= MAX_MEMORY && ALLOCATOR.max_allocated() > MAX_MEMORY => {
                Some(format!("takes {} MiB", ALLOCATOR.max_allocated() >> 20))
            }
            Ok(read) => {
                accepted += u64::from(read);
                None
            }
        };
        if let Some(problem) = problem {
            failures += 1;
            let saved = save_input(folder, target, args.seed, i, &input);
            eprintln!(
                "{} --seed {} --only {i}: {problem}; saved as {}",
                target.name,
                args.seed,
                saved.display()
            );
        }
    }
    let rate = count as f64 / target_start.elapsed().as_secs_f64();
    println!(
        "{:12} {count:8} inputs, {rate:6.0} a second, {accepted} read, slowest {} ms, at most {} MiB",
        target.name,
        slowest.as_millis(),
        ALLOCATOR.max_allocated() >> 20
    );
    (count, failures)
}

/// Saves a failing input.
fn save_input(folder: &Path, target: &Target, seed: u64, i: u64, input: &[u8]) -> PathBuf {
    let path = folder.join("failures").join(format!("{}-{seed}-{i}", target.name));
    // Best effort: the seed and the index reproduce it.
    let _ = std::fs::create_dir_all(folder.join("failures")).and_then(|()| std::fs::write(&path, input));
    path
}
