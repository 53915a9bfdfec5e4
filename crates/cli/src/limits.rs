//! Ranges of numeric flags, and hints for flags and commands that other programs call differently.

use clap::builder::ValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command};
use ddpm::config::{find_name, limits};
use ddpm::text::quoted;
use std::any::TypeId;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Maximum images that one command samples, measures or edits. Sample indices are 32 bits wide.
const MAX_IMAGES: u64 = 10_000_000;

/// Ranges of integer flags by argument id, the same in all commands.
const INTEGERS: &[(&str, RangeInclusive<u64>)] = &[
    ("batch_size", 1..=limits::BATCH_SIZE as u64),
    ("channels", 1..=4),
    ("count", 1..=MAX_IMAGES),
    ("epochs", 1..=limits::STEPS),
    ("grid", 0..=MAX_IMAGES),
    ("heads", 1..=1024),
    ("index", 0..=u32::MAX as u64),
    ("iterations", 1..=100_000),
    ("jump", 1..=limits::TIMESTEPS as u64),
    ("resamplings", 1..=1000),
    ("runs", 1..=1_000_000),
    ("seed", 0..=i64::MAX as u64),
    ("step", 0..=limits::STEPS),
    ("steps", 1..=limits::STEPS),
    ("threads", 0..=limits::THREADS as u64),
    ("timesteps", 1..=limits::TIMESTEPS as u64),
];

/// Flags that take positive numbers: the maximum, and a typical value. Others (`--eta`, `--guidance`) have ranges that depend on
/// the run; the library checks them.
const POSITIVE: &[(&str, (f64, &str))] =
    &[("beta_end", (1.0, "0.02")), ("beta_start", (1.0, "1e-4")), ("lr", (limits::LR, "1e-4"))];

/// Names of flags in other programs (diffusers' scripts, PyTorch Lightning, well-known repositories) and ours; of several, the first
/// that the command has.
const FLAG_SYNONYMS: &[(&[&str], &[&str])] = &[
    (&["image-size", "img-size", "im-size", "resolution", "image-resolution", "img-dim"], &["--size"]),
    (&["learning-rate", "base-lr"], &["--lr"]),
    (&["num-epochs", "num-train-epochs", "n-epochs", "max-epochs", "epoch"], &["--epochs"]),
    (
        &[
            "max-train-steps",
            "num-train-steps",
            "train-num-steps",
            "max-steps",
            "num-steps",
            "iters",
            "num-iterations",
        ],
        &["--steps"],
    ),
    (
        &["num-inference-steps", "ddpm-num-inference-steps", "sampling-steps", "timestep-respacing"],
        &["--steps"],
    ),
    (
        &["train-batch-size", "eval-batch-size", "per-device-train-batch-size", "bs", "batch"],
        &["--batch-size"],
    ),
    (
        &[
            "train-data-dir",
            "data-dir",
            "data-path",
            "dataset",
            "dataset-name",
            "dataset-path",
            "dataroot",
            "input",
        ],
        &["--data"],
    ),
    (
        &["output", "output-dir", "out-dir", "outdir", "output-path", "save-dir", "logdir"],
        &["--out", "--runs"],
    ),
    (&["run-name", "exp-name", "experiment", "project-name"], &["--name"]),
    (&["num-samples", "n-samples", "num-images", "samples", "num", "n"], &["-n"]),
    (&["guidance-scale", "cfg-scale", "cfg", "w"], &["--guidance"]),
    (&["label", "class-label", "class-idx", "class-id"], &["--class"]),
    (
        &["resume-from-checkpoint", "resume-path", "ckpt-path", "from-checkpoint"],
        &["--resume", "--checkpoint"],
    ),
    (&["pretrained-model-name-or-path", "pretrained", "load", "weights-path"], &["--init"]),
    (&["num-threads", "num-workers", "workers", "num-cpus", "jobs"], &["--threads"]),
    (&["gpu", "gpus", "cuda", "accelerator", "use-gpu"], &["--device"]),
    (&["random-seed", "manual-seed"], &["--seed"]),
    (&["config-file", "cfg-file", "yaml"], &["--config"]),
    (
        &["gradient-accumulation-steps", "gradient-accumulate-every", "accumulation-steps"],
        &["--set train.accumulate=N"],
    ),
    (&["mixed-precision", "amp", "bf16", "fp16", "half"], &["--set compute.precision=bf16"]),
    (
        &["checkpointing-steps", "save-every", "save-interval", "save-model-epochs"],
        &["--set output.checkpoint_every=N"],
    ),
    (&["save-images-epochs", "sample-interval", "save-and-sample-every"], &["--set output.sample_every=N"]),
    (&["checkpoints-total-limit", "save-total-limit"], &["--set output.keep_checkpoints=N"]),
    (&["lr-scheduler", "scheduler"], &["--set lr_schedule.name=cosine"]),
    (&["lr-warmup-steps", "warmup"], &["--set lr_schedule.warmup_steps=N"]),
    (&["max-grad-norm", "grad-clip", "gradient-clip-val"], &["--set optimizer.clip_norm=NORM"]),
    (
        &["ddpm-num-steps", "num-timesteps", "diffusion-steps", "num-diffusion-timesteps"],
        &["--set diffusion.timesteps=N"],
    ),
    (&["ddpm-beta-schedule", "beta-schedule", "noise-schedule"], &["--set diffusion.schedule=cosine"]),
    (&["prediction-type", "objective", "parameterization"], &["--set diffusion.prediction=v"]),
    (&["learn-sigma"], &["--set diffusion.learned_variance=true"]),
    (&["random-flip", "flip", "hflip"], &["--set data.horizontal_flip=true"]),
    (&["use-ema", "ema"], &["--set ema.decay=0.9999"]),
    (
        &["dim", "model-channels", "num-channels", "base-channels"],
        &["--set simple.widths=64,128,256 (see ddpm config)"],
    ),
];

/// Names of commands in other programs, and ours.
const COMMAND_SYNONYMS: &[(&[&str], &str)] = &[
    (&["generate", "gen", "infer", "inference", "predict", "draw"], "ddpm sample RUN"),
    (&["resume", "continue"], "ddpm train --resume RUN"),
    (&["finetune", "fine-tune"], "ddpm train --init WEIGHTS"),
    (&["fid", "evaluate", "test", "validate", "metrics"], "ddpm eval RUN"),
    (&["convert", "load"], "ddpm import FILE"),
    (&["ls", "list", "status"], "ddpm runs"),
    (&["edit", "img2img"], "ddpm vary RUN IMAGE"),
    (&["fill", "repaint"], "ddpm inpaint RUN IMAGE --mask MASK"),
    (&["ema"], "ddpm average RUN"),
    (&["info", "env"], "ddpm doctor"),
    (&["presets", "settings"], "ddpm config"),
    (&["check", "dataset"], "ddpm data check FOLDER"),
];

/// Adds the ranges of all numbers; where a number is expected, a leading minus is part of it.
pub fn with_limits(command: Command) -> Command {
    command.mut_args(limit_arg).mut_subcommands(with_limits)
}

fn limit_arg(arg: Arg) -> Arg {
    let (id, parsed) = (arg.get_id().to_string(), arg.get_value_parser().type_id());
    let parser = [
        (TypeId::of::<usize>(), integer::<usize> as fn(&str) -> ValueParser),
        (TypeId::of::<u64>(), integer::<u64>),
        (TypeId::of::<u32>(), integer::<u32>),
        (TypeId::of::<f64>(), number),
    ];
    match parser.into_iter().find(|(id, _)| parsed == *id) {
        Some((_, parser)) => arg.allow_hyphen_values(true).value_parser(parser(&id)),
        None if arg.get_action().takes_values() && !arg.is_positional() => arg.allow_negative_numbers(true),
        None => arg,
    }
}

/// Parser for integers in the range of the argument `id`.
fn integer<T>(id: &str) -> ValueParser
where
    T: FromStr + TryFrom<u64> + Clone + Send + Sync + 'static,
{
    let range =
        INTEGERS.iter().find(|(name, _)| *name == id).map_or(0..=u64::MAX, |(_, range)| range.clone());
    ValueParser::new(move |text: &str| {
        // Zero is left to the command, whose message knows the run.
        let value = text.trim().parse::<u64>().ok().filter(|n| *n == 0 || range.contains(n));
        value
            .and_then(|n| T::try_from(n).ok())
            .ok_or_else(|| between("an integer", range.start(), range.end()))
    })
}

fn between(what: &str, low: impl Display, high: impl Display) -> String {
    format!("give {what} from {low} to {high}")
}

/// Parser for numbers, in the range of the argument `id` if it has one.
fn number(id: &str) -> ValueParser {
    let range = POSITIVE.iter().find(|(name, _)| *name == id).map(|(_, range)| *range);
    ValueParser::new(move |text: &str| {
        let value = text.trim().parse::<f64>().ok();
        let Some((high, typical)) = range else { return value.ok_or_else(|| "give a number".to_owned()) };
        let refused = || format!("give a number above 0 and at most {high}; {typical} is typical");
        value.filter(|v| *v > 0.0 && *v <= high).ok_or_else(refused)
    })
}

/// Adds our name for an unknown flag or command to the error. `args` are the program's arguments.
pub fn with_hint(mut error: clap::Error, root: &Command, args: &[String]) -> clap::Error {
    let hint =
        match (error.kind(), error.get(ContextKind::InvalidArg), error.get(ContextKind::InvalidSubcommand)) {
            (ErrorKind::UnknownArgument, Some(ContextValue::String(flag)), _) => {
                hint(flag, subcommand(root, args))
            }
            (ErrorKind::InvalidSubcommand, _, Some(ContextValue::String(name))) => {
                let known =
                    COMMAND_SYNONYMS.iter().find(|(names, _)| names.contains(&name.to_lowercase().as_str()));
                known.map(|(_, here)| format!("use {here}"))
            }
            _ => None,
        };
    if let Some(hint) = hint {
        error.remove(ContextKind::SuggestedArg);
        error.remove(ContextKind::SuggestedSubcommand);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![hint.into()]));
    }
    error
}

/// The subcommand that the arguments select.
fn subcommand<'a>(root: &'a Command, args: &[String]) -> &'a Command {
    let mut command = root;
    for arg in args {
        match command.find_subcommand(arg) {
            Some(inner) => command = inner,
            None if !arg.starts_with('-') => break,
            None => {}
        }
    }
    command
}

/// Our name for an unknown flag, if it is a synonym or a setting.
fn hint(flag: &str, command: &Command) -> Option<String> {
    let has = |long: &str| command.get_arguments().any(|a| a.get_long() == Some(long));
    if !flag.starts_with('-') {
        return has("data").then(|| format!("give images with --data {}", quoted(flag)));
    }
    let name = flag.trim_start_matches('-').split('=').next()?.to_lowercase().replace('_', "-");
    let exists = |known: &str| match known.strip_prefix("--") {
        Some(long) => has(long.split(' ').next().unwrap_or(long)),
        None => command.get_arguments().any(|a| a.get_short() == known.chars().nth(1)),
    };
    // Underscores, as in --batch_size.
    if has(&name) {
        return Some(format!("use --{name}"));
    }
    let known = FLAG_SYNONYMS.iter().filter(|(names, _)| names.contains(&name.as_str()));
    if let Some(flag) = known.flat_map(|(_, flags)| flags.iter()).find(|flag| exists(flag)) {
        return Some(format!("use {flag}"));
    }
    let setting = name.replace('-', "_");
    let key = find_name(&setting).filter(|_| has("set"))?;
    Some(format!("it is a setting: --set {key}=VALUE (see ddpm config)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cli;
    use clap::CommandFactory;
    use ddpm::config::{SECTIONS, Section};

    /// Every argument of every command, with the command's name.
    fn arguments(command: &Command) -> Vec<(String, Arg)> {
        let own = command.get_arguments().map(|a| (command.get_name().to_owned(), a.clone()));
        own.chain(command.get_subcommands().flat_map(arguments)).collect()
    }

    #[test]
    fn every_integer_flag_has_a_range() {
        let all = arguments(&Cli::command());
        let is = |arg: &Arg, id: TypeId| arg.get_value_parser().type_id() == id;
        for (command, arg) in &all {
            let id = arg.get_id().as_str();
            let integer = [TypeId::of::<usize>(), TypeId::of::<u64>(), TypeId::of::<u32>()];
            if integer.into_iter().any(|t| is(arg, t)) {
                assert!(INTEGERS.iter().any(|(name, _)| *name == id), "{command}: {id} has no range");
            }
        }
    }

    #[test]
    fn out_of_range_numbers_are_rejected_with_the_range_and_negative_ones_are_not_flags() {
        let reject = |args: &[&str]| {
            let all = ["ddpm"].iter().chain(args);
            let error = with_limits(Cli::command()).try_get_matches_from(all).expect_err("out of range");
            error.to_string()
        };
        for (args, expected) in [
            (
                &["train", "--lr", "-1"][..],
                "--lr <RATE>': give a number above 0 and at most 10; 1e-4 is typical",
            ),
            (&["train", "--lr", "99"], "above 0 and at most 10"),
            (&["train", "--lr", "nan"], "above 0 and at most 10"),
            (&["train", "--threads", "100000"], "give an integer from 0 to 1024"),
            (&["sample", "r", "--threads", "1025"], "from 0 to 1024"),
            (&["bench", "--threads=-4"], "from 0 to 1024"),
            (&["train", "--steps", "-5"], "'-5' for '--steps <N>': give an integer from 1 to 4294967295"),
            (&["train", "--batch-size", "65537"], "from 1 to 65536"),
            (&["sample", "r", "-n", "-3"], "from 1 to 10000000"),
            (&["sample", "r", "-n", "1.5"], "give an integer from 1"),
            (&["vary", "r", "a.png", "--strength", "-x"], "'-x' for '--strength <FRACTION>': give a number"),
            (&["train", "--lr", "--steps"], "'--steps' for '--lr <RATE>': give a number above 0"),
            (&["train", "--lr", "-.5"], "above 0 and at most 10"),
            (&["interpolate", "r", "a", "b", "--iterations=1000000000"], "from 1 to 100000"),
            (&["inpaint", "r", "a", "--mask=b", "--resamplings", "99999"], "from 1 to 1000"),
            (&["show", "schedules", "--timesteps=-1"], "from 1 to 1000000"),
        ] {
            let text = reject(args);
            assert!(text.contains(expected), "{args:?}: {text}");
        }
        let fine = ["ddpm", "vary", "r", "a.png", "--strength", "-.5"];
        with_limits(Cli::command()).try_get_matches_from(fine).expect("left to the library");
        let fine = ["ddpm", "train", "--lr", "1e-3", "--threads", "1024", "--set", "optimizer.lr=-1"];
        with_limits(Cli::command()).try_get_matches_from(fine).expect("in range");
    }

    #[test]
    fn flags_of_other_programs_get_hints() {
        let error_text = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|&a| a.to_owned()).collect();
            let all = ["ddpm".to_owned()].into_iter().chain(args.clone());
            let root = with_limits(Cli::command());
            let error = root.clone().try_get_matches_from(all).expect_err("no such flag");
            with_hint(error, &root, &args).to_string()
        };
        for (args, expected) in [
            (&["train", "--image-size", "64"][..], "use --size"),
            (&["train", "--resolution=64"], "use --size"),
            (&["train", "--learning_rate", "1e-4"], "use --lr"),
            (&["train", "--num_epochs", "3"], "use --epochs"),
            (&["train", "--train_batch_size", "16"], "use --batch-size"),
            (&["train", "--batch_size=16"], "use --batch-size"),
            (&["train", "--output", "runs"], "use --runs"),
            (&["sample", "r", "--output", "x"], "use --out"),
            (&["sample", "r", "--num_images", "4"], "use -n"),
            (&["data", "check", "x", "--image_size", "64"], "use --size"),
            (&["train", "--weight-decay", "0.1"], "--set optimizer.weight_decay=VALUE"),
            (&["train", "--mixed_precision", "bf16"], "use --set compute.precision=bf16"),
            (&["train", "my photos"], "give images with --data 'my photos'"),
            (&["generate", "runs/r"], "use ddpm sample RUN"),
            (&["resume", "runs/r"], "use ddpm train --resume RUN"),
        ] {
            let text = error_text(args);
            assert!(text.contains(expected), "{args:?}: {text}");
        }
        assert!(error_text(&["train", "--stpes", "3"]).contains("--steps"), "clap's own hints remain");
    }

    #[test]
    fn every_hint_names_an_existing_flag_or_command() {
        let root = Cli::command();
        for (names, here) in COMMAND_SYNONYMS {
            let words: Vec<String> = here.split(' ').skip(1).map(str::to_owned).collect();
            let command = subcommand(&root, &words);
            assert_ne!(command.get_name(), "ddpm", "{here}");
            let flags = words.iter().filter_map(|word| word.strip_prefix("--"));
            for flag in flags {
                assert!(command.get_arguments().any(|a| a.get_long() == Some(flag)), "{here}");
            }
            assert!(names.iter().all(|name| root.find_subcommand(name).is_none()), "{names:?}");
        }
        let flags: Vec<String> = arguments(&root)
            .iter()
            .flat_map(|(_, a)| {
                a.get_long()
                    .map(|l| format!("--{l}"))
                    .into_iter()
                    .chain(a.get_short().map(|s| format!("-{s}")))
            })
            .collect();
        for flag in FLAG_SYNONYMS.iter().flat_map(|(_, flags)| flags.iter()) {
            let first = flag.split(' ').next().unwrap_or(flag);
            assert!(flags.iter().any(|f| f == first), "{flag}");
            if let Some(setting) = flag.strip_prefix("--set ") {
                let key = setting.split('=').next().unwrap_or(setting);
                let known = |s: &Section| s.settings.iter().any(|k| format!("{}.{}", s.name, k.name) == key);
                assert!(SECTIONS.iter().any(known), "{key}");
            }
        }
    }
}
