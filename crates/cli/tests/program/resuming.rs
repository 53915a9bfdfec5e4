//! Taking up a run: which settings may be others, what is told, and folders that something was done to.

use crate::support::{Done, Place, TINY, copy, losses, names, state};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn resume(place: &Place, more: &[&str]) -> Done {
    place.ddpm(&[&["train", "--resume", "r"], more].concat())
}

#[track_caller]
fn says(done: &Done, parts: &[&str]) {
    for part in parts {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn old_run() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ddpm/tests/golden/old_run")
}

#[test]
fn a_run_of_an_earlier_version_resumes_to_the_same_bits_and_says_what_changed() {
    let place = Place::new();
    copy(&old_run().join("run"), &place.path("runs/r"));
    let old = losses(&place.path("runs/r"));
    assert!(old.iter().map(|l| l.0).eq(0..8), "they count from 0");
    place.ddpm(&["sample", "r", "-n", "1", "--steps", "2", "--out", "drawn"]).well();
    let mut dry = place.command(&["train", "--resume", "r", "--dry-run"]);
    let dry: Done = dry.env("DDPM_ISA", "portable").output().unwrap().into();
    says(&dry.well(), &["note: metrics.jsonl is of an earlier version, whose steps count from 0"]);
    let mut again = place.command(&["train", "--resume", "r"]);
    let done = Done::from(again.env("DDPM_ISA", "portable").output().unwrap()).well();
    says(&done, &["note: metrics.jsonl is of an earlier version"]);
    assert!(!done.err.contains("warning"), "{}", done.err);

    let files = |path: PathBuf| serde_json::from_str::<Value>(&read(path)).unwrap()["files"].clone();
    let expected = files(old_run().join("step-0000008.json"));
    assert_eq!(expected.as_object().unwrap().len(), 3);
    assert_eq!(files(place.checkpoint("r", 8).join("manifest.json")), expected);
    // One numbering in the whole file; the steps made again have the losses that they had.
    let new = losses(&place.path("runs/r"));
    assert!(new.iter().map(|l| l.0).eq(1..=8));
    assert!(new.iter().map(|l| l.1).eq(old.iter().map(|l| l.1)));
    place.assert_intact("r", 8);
    assert!(!resume(&place, &[]).well().err.contains("earlier version"));
}

#[test]
fn metrics_checkpoints_and_sheets_count_the_steps_that_are_done_from_1() {
    let place = Place::new();
    place.train("r", 3, 1, &["--set=train.sample_count=1", "--set=train.sample_every=1"]).well();
    assert!(losses(&place.path("runs/r")).iter().map(|l| l.0).eq(1..=3));
    assert!(read(place.path("runs/r/metrics.jsonl")).starts_with("{\"format\":2,\"step\":1,"));
    assert!(place.checkpoint("r", 3).is_dir() && place.path("runs/r/samples/step-0000001.png").exists());
}

#[test]
fn settings_that_are_part_of_what_was_learnt_are_refused_unless_forced() {
    let place = Place::new();
    place.train("r", 3, 0, &[]).well();
    let config = read(place.path("runs/r/config.toml"));
    let before = state(&place.checkpoint("r", 3));
    for (setting, was, is) in [
        ("diffusion.prediction=v", "diffusion.prediction = \"eps\"", "\"v\""),
        ("diffusion.schedule=cosine", "diffusion.schedule = \"linear\"", "\"cosine\""),
        ("diffusion.timesteps=30", "diffusion.timesteps = 20", "30"),
        ("diffusion.zero_terminal_snr=true", "diffusion.zero_terminal_snr = false", "true"),
        ("diffusion.beta_end=0.03", "diffusion.beta_end = 0.02", "0.03"),
        ("attention.num_heads=4", "attention.num_heads = 2", "4"),
        ("diffusion.learned_variance=true", "diffusion.learned_variance = false", "true"),
        ("attention.num_class_embeds=10", "attention.num_class_embeds = unset", "10"),
    ] {
        let told = format!("{was} (now {is})");
        for dry in [&[][..], &["--dry-run"]] {
            let flags = [&["--steps=4", "--set", setting], dry].concat();
            resume(&place, &flags).fails(1, &["step-0000003: ", &told, "part of what was learnt", "--force"]);
        }
    }
    resume(&place, &["--steps=4", "--set=network.name=simple", "--set=simple.widths=8, 8"])
        .fails(1, &["network.name = \"attention\" (now \"simple\"); this is part of", "--force"]);
    assert_eq!(read(place.path("runs/r/config.toml")), config);
    assert!(state(&place.checkpoint("r", 3)) == before && !place.checkpoint("r", 4).exists());
    // What is the same in another way is no change.
    let done =
        resume(&place, &["--dry-run", "--set=diffusion.max_beta=0.5", "--set=simple.time_emb_dim=8"]).well();
    assert!(!done.err.contains("max_beta") && !done.err.contains("simple"), "{}", done.err);

    let forced = resume(&place, &["--steps=4", "--set", "diffusion.prediction=v", "--force"]).well();
    says(
        &forced,
        &[
            "warning: diffusion.prediction is \"v\" from here on, as forced; the weights were learnt with \"eps\"",
        ],
    );
    // From then on it is the run's.
    let plain = resume(&place, &["--steps=5"]).well();
    assert!(!plain.err.contains("prediction"), "{}", plain.err);
}

#[test]
fn settings_that_change_the_plan_are_told_with_both_values_and_free_ones_are_not() {
    let place = Place::new();
    let run = |isa: &str, args: &[String]| -> Done {
        place.command(args).env("DDPM_ISA", isa).output().unwrap().into()
    };
    run("portable", &crate::support::train("r", 3, 0, &[])).well();
    let args = [
        "train",
        "--resume",
        "r",
        "--steps=4",
        "--seed=1",
        "--batch-size=8",
        "--threads=1",
        "--set=train.keep=5",
        "--set=train.loss=huber",
        "--set=train.loss_weight=min-snr",
        "--set=train.optimizer=adamw",
    ];
    let done = run("portable", &args.map(str::to_owned)).well();
    says(
        &done,
        &[
            "note: train.steps is 4 from here on; it was 3 until step 3",
            "note: train.seed is 1 from here on; it was 0 until step 3",
            "note: train.batch_size is 8 from here on; it was 4",
            "note: train.loss is \"huber\" from here on; it was \"mse\"",
            "note: train.loss_weight is \"min-snr\" from here on; it was \"plain\"",
            "note: losses are measured in another way from here on",
            "note: train.optimizer is \"adamw\" from here on; it was \"adam\"",
        ],
    );
    assert!(!done.err.contains("threads is") && !done.err.contains("train.keep"), "{}", done.err);
    assert!(!done.err.contains("rounds differently"), "{}", done.err);
    // Its checkpoint has the mean of what compares, and is known for the run's own.
    let manifest: Value =
        serde_json::from_str(&read(place.checkpoint("r", 4).join("manifest.json"))).unwrap();
    assert_eq!(manifest["losses_since"], 3);
    assert_eq!(manifest["loss"].as_f64(), Some(losses(&place.path("runs/r"))[3].1));
    assert!(!resume(&place, &["--dry-run"]).well().err.contains("another run"));
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        let moved = run("avx2", &["train", "--resume", "r", "--steps=5"].map(str::to_owned)).well();
        says(
            &moved,
            &["note: computed by avx2 from here on; it was portable until step 4, which rounds differently"],
        );
    }
}

#[test]
fn a_learning_rate_that_jumps_is_told_with_both_numbers_before_training() {
    let place = Place::new();
    let cosine = "--set=train.lr_schedule=cosine";
    place.train("r", 10, 0, &[cosine]).well();
    // lr (1 + cos(pi k / K)) / 2 with lr = 1e-3: k/K = 9/10 of 10 steps, 10/10, and 10/20.
    let told = "warning: the learning rate of step 11 is 5.000e-4; as it was planned before it would be 0, and step 10 had \
                2.447e-5";
    let dry = resume(&place, &["--steps=20", "--dry-run"]).well();
    says(&dry, &[told, "note: train.steps is 20"]);
    let done = resume(&place, &["--steps=20"]).well();
    says(&done, &[told]);
    assert!(done.err.find(told) < done.err.find("step 20: checkpoint"), "{}", done.err);
    // Going on as planned says nothing.
    place.train("half", 20, 10, &[cosine]).well();
    fs::remove_dir_all(place.checkpoint("half", 20)).unwrap();
    let plain = place.ddpm(&["train", "--resume", "half"]).well();
    assert!(!plain.err.contains("learning rate") && !plain.err.contains("note"), "{}", plain.err);
    for (name, flags) in [
        ("rate", &["--steps=21", "--lr=2e-3"][..]),
        ("warm-up", &["--steps=21", "--set=train.warmup_steps=200"]),
        ("epochs", &["--epochs=3"]),
        ("schedule", &["--steps=21", "--set=train.lr_schedule=constant"]),
    ] {
        let done = resume(&place, &[flags, &["--dry-run"]].concat()).well();
        assert!(done.err.contains("warning: the learning rate of step 21 is "), "{name}: {}", done.err);
    }
}

#[test]
fn fewer_steps_than_were_made_are_refused_and_the_plan_stays() {
    let place = Place::new();
    place.train("r", 8, 4, &[]).well();
    fs::remove_dir_all(place.checkpoint("r", 8)).unwrap();
    let files = |place: &Place| {
        (read(place.path("runs/r/config.toml")), read(place.checkpoint("r", 4).join("manifest.json")))
    };
    let before = files(&place);
    resume(&place, &["--steps=2"])
        .fails(1, &["train.steps: 2 is fewer than the 4 steps", "--checkpoint STEP"]);
    resume(&place, &["--steps=2", "--dry-run"]).fails(1, &["train.steps: 2 is fewer"]);
    // Exactly what is done: there is nothing to do.
    says(&resume(&place, &["--steps=4"]).well(), &["all 4 steps of this run are done"]);
    assert_eq!(files(&place), before);
    // As an earlier version may have left it.
    let config = before.0.replace("\nsteps = 8\n", "\nsteps = 2\n");
    fs::write(place.path("runs/r/config.toml"), config).unwrap();
    let done = resume(&place, &[]).well();
    says(
        &done,
        &["config.toml has train.steps = 2 (was 8), fewer than the 4 steps that were made; the plan stays"],
    );
    place.assert_intact("r", 8);
    assert!(read(place.path("runs/r/config.toml")).contains("\nsteps = 8\n"));
}

#[test]
fn an_edited_config_counts_under_the_same_table() {
    let place = Place::new();
    place.train("r", 3, 0, &[]).well();
    let config = place.path("runs/r/config.toml");
    let plain = read(config.clone());
    let edit = |pairs: &[(&str, &str)]| {
        let text = pairs.iter().fold(plain.clone(), |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replace(from, to)
        });
        fs::write(&config, text).unwrap();
    };
    edit(&[("\nlr = 0.001\n", "\nlr = 0.0005\n"), ("\nsteps = 3\n", "\nsteps = 5\n")]);
    let done = resume(&place, &[]).well();
    says(
        &done,
        &[
            "note: config.toml was edited: train.steps = 5 (was 3)",
            "note: config.toml was edited: train.lr = 0.0005 (was 0.001)",
            "the learning rate of step 4 is 5.000e-4; as it was planned before it would be 1.000e-3",
        ],
    );
    place.assert_intact("r", 5);
    let edited = read(config.clone());
    assert!(edited.contains("\nlr = 0.0005\n"));
    // What is asked for wins; and what is told is told once.
    let done = resume(&place, &["--steps=6", "--lr=2e-3"]).well();
    assert!(!done.err.contains("edited"), "{}", done.err);
    assert!(read(config.clone()).contains("\nlr = 0.002\n"));
    // Back to a checkpoint of before: with its settings, which nobody edited.
    let back = resume(&place, &["--checkpoint=3", "--dry-run"]).fails(1, &["there is no checkpoint"]);
    drop(back);
    fs::write(&config, read(config.clone()).replace("prediction = \"eps\"", "prediction = \"v\"")).unwrap();
    resume(&place, &["--steps=7"]).fails(1, &["diffusion.prediction = \"eps\" (now \"v\")", "config.toml"]);
    fs::write(&config, read(config.clone()).replace("prediction = \"v\"", "prediction = \"w\"")).unwrap();
    resume(&place, &["--steps=7"]).fails(1, &["config.toml: line ", "diffusion.prediction"]);
}

#[test]
fn a_config_that_is_gone_is_written_again_from_the_checkpoint() {
    let place = Place::new();
    place.train("r", 4, 2, &[]).well();
    let config = place.path("runs/r/config.toml");
    let before = read(config.clone());
    fs::remove_file(&config).unwrap();
    place.ddpm(&["sample", "r", "-n", "1", "--steps", "2", "--out", "drawn"]).well();
    assert!(!config.exists(), "only who trains writes it");
    let done = resume(&place, &[]).well();
    says(&done, &["note: config.toml is gone; it is written again from "]);
    assert_eq!(read(config), before);
    // Without either there is nothing to know it by.
    fs::remove_dir_all(place.path("runs/r/checkpoints")).unwrap();
    fs::remove_file(place.path("runs/r/config.toml")).unwrap();
    resume(&place, &[]).fails(1, &["r: there is no such run"]);
    place.ddpm(&["train", "--resume", "runs/r"]).fails(1, &["runs/r: is no run"]);
}

#[test]
fn what_a_run_wanted_counts_only_once_it_has_learnt_with_it() {
    let place = Place::new();
    place.train("r", 2, 0, &[]).well();
    let before = read(place.path("runs/r/config.toml"));
    // It fails before its first checkpoint.
    let explode = ["--lr=10", "--set=train.optimizer=adamw", "--set=train.weight_decay=1000", "--steps=100"];
    resume(&place, &explode).fails(1, &["is not a finite number"]);
    assert_eq!(read(place.path("runs/r/config.toml")), before);
    let done = resume(&place, &["--steps=3"]).well();
    assert!(!done.err.contains("train.lr") && !done.err.contains("edited"), "{}", done.err);
    assert!(read(place.path("runs/r/config.toml")).contains("\nsteps = 3\n"));
}

#[test]
fn lost_and_cut_metrics_are_told() {
    let place = Place::new();
    place.train("r", 6, 0, &[]).well();
    let metrics = place.path("runs/r/metrics.jsonl");
    let whole = read(metrics.clone());
    assert!(!resume(&place, &["--dry-run"]).well().err.contains("metrics.jsonl"));
    let line = |i: usize| whole.lines().nth(i).unwrap().to_owned() + "\n";
    for (text, told) in [
        ((0..4).map(line).collect::<String>(), "lacks steps 5 to 6 of the 6 that were made"),
        ([0, 1, 3, 4, 5].map(line).concat(), "lacks step 3 of the 6 that were made"),
        (whole[..whole.len() / 2].to_owned(), "lacks steps 4 to 6 of the 6"),
        (String::new(), "has none of the 6 steps that were made"),
    ] {
        fs::write(&metrics, text).unwrap();
        // A checkpoint is not taken for another run's because of it, but where the last lines are others.
        let done = resume(&place, &["--dry-run", "--force"]).well();
        says(&done, &["warning: metrics.jsonl ", told]);
    }
    fs::remove_file(&metrics).unwrap();
    says(&resume(&place, &["--steps=7"]).well(), &["metrics.jsonl has none of the 6 steps"]);
    assert!(losses(&place.path("runs/r")).iter().map(|l| l.0).eq([7]));
}

#[test]
fn a_checkpoint_of_another_run_is_not_taken_for_the_runs_own() {
    let place = Place::new();
    place.train("r", 4, 2, &[]).well();
    place.train("other", 8, 8, &["--seed=5"]).well();
    copy(&place.checkpoint("other", 8), &place.checkpoint("r", 8));
    let told = "step-0000008 was passed over: it is of another run";
    // Nor by those that draw.
    let drawn = place.ddpm(&["sample", "r", "-n", "1", "--steps", "2", "--out", "drawn"]).well();
    says(&drawn, &["warning: ", told]);
    resume(&place, &["--checkpoint=8"]).fails(1, &["step-0000008: is of another run", "--init ", "--force"]);
    let done = resume(&place, &["--steps=6"]).well();
    says(&done, &[told, "set aside runs/r/checkpoints/aside-step-0000008"]);
    place.train("whole", 4, 2, &[]).well();
    let more = place.ddpm(&["train", "--resume", "whole", "--steps=6"]).well();
    drop(more);
    assert!(state(&place.checkpoint("r", 6)) == state(&place.checkpoint("whole", 6)));
    // It is somebody's: it stays, however far the run gets.
    resume(&place, &["--steps=9"]).well();
    resume(&place, &["--steps=10"]).well();
    assert!(place.path("runs/r/checkpoints/aside-step-0000008/manifest.json").exists());

    // One of an earlier version has no mark; its mean loss tells.
    let old = place.path("runs/old");
    copy(&old_run().join("run"), &old);
    let metrics = read(old.join("metrics.jsonl"));
    fs::write(old.join("metrics.jsonl"), metrics.replace("\"loss\":1.", "\"loss\":0.")).unwrap();
    let done = place.ddpm(&["train", "--resume", "old"]);
    done.fails(1, &["no checkpoint is whole: step-0000004: is of another run: its mean loss is "]);
    place.ddpm(&["train", "--resume", "old", "--force"]).well();
}

#[test]
fn what_follows_the_last_checkpoint_is_completed_and_leftovers_are_swept() {
    let place = Place::new();
    place.train("r", 4, 1, &[]).well();
    let run = place.path("runs/r");
    let card = read(run.join("README.md"));
    let plot = fs::read(run.join("loss.png")).unwrap();
    let kept = names(&run.join("checkpoints"));
    // As if it had been killed between its last checkpoint and all that follows.
    for name in ["README.md", "loss.png", "checkpoints/best.json"] {
        fs::remove_file(run.join(name)).unwrap();
    }
    let newer = names(&run.join("checkpoints")).into_iter().rfind(|n| n.starts_with("step-")).unwrap();
    copy(&run.join("checkpoints").join(newer), &run.join("checkpoints/step-0000001"));
    fs::write(run.join(".tmp-README.md-4194305"), "half").unwrap();
    fs::write(run.join("samples/.step-0000004.png.4194305-0.tmp"), "half").unwrap();
    fs::create_dir(run.join("checkpoints/.tmp-step-0000005-4194305")).unwrap();
    let live = format!("samples/.x.png.{}-0.tmp", std::process::id());
    fs::write(run.join(&live), "").unwrap();
    let done = resume(&place, &[]).well();
    says(&done, &["all 4 steps of this run are done"]);
    assert_eq!(read(run.join("README.md")), card);
    assert!(fs::read(run.join("loss.png")).unwrap() == plot);
    let now: Vec<String> = names(&run.join("checkpoints"));
    // Which is the best is known of the last alone now.
    assert!(
        now.contains(&"best.json".to_owned()) && !now.contains(&"step-0000001".to_owned()),
        "{kept:?} {now:?}"
    );
    assert!(now.iter().all(|name| !name.starts_with(".tmp-")));
    assert!(names(&run).iter().all(|name| !name.starts_with(".tmp-")));
    if cfg!(target_os = "linux") {
        assert_eq!(names(&run.join("samples")), [live.strip_prefix("samples/").unwrap()]);
    }
}

#[test]
fn checkpoints_set_aside_go_when_the_run_has_passed_them_and_not_before() {
    let place = Place::new();
    place.train("r", 6, 2, &["--set=train.keep=5"]).well();
    let aside = |step: u64| place.path(format!("runs/r/checkpoints/aside-step-{step:07}"));
    says(
        &resume(&place, &["--checkpoint=2", "--steps=3"]).well(),
        &["set aside ", "aside-step-0000004", "aside-step-0000006"],
    );
    assert!(aside(4).exists() && aside(6).exists());
    resume(&place, &["--steps=5"]).well();
    assert!(aside(4).exists(), "it was not passed when the run was taken up");
    let done = resume(&place, &["--steps=7"]).well();
    says(&done, &["note: removed runs/r/checkpoints/aside-step-0000004, which was set aside"]);
    assert!(!aside(4).exists() && aside(6).exists());
}

#[test]
fn weights_to_begin_with_are_refused_under_settings_that_they_were_not_learnt_with() {
    let place = Place::new();
    place.train("r", 2, 0, &["--set=diffusion.prediction=v", "--set=diffusion.schedule=cosine"]).well();
    let file = "runs/r/checkpoints/step-0000002/model.safetensors";
    for source in ["runs/r", "runs/r/checkpoints/step-0000002", file] {
        let args = [&["train", "--init", source, "--steps=1"], &TINY[..]].concat();
        place.ddpm(&args).fails(
            1,
            &[
                source,
                "diffusion.prediction = \"v\" (now \"eps\")",
                "--set diffusion.schedule=cosine --set diffusion.prediction=v",
                "--force",
            ],
        );
        let given =
            ["--set=diffusion.schedule=cosine", "--set=diffusion.prediction=v", "--lr=1e-5", "--dry-run"];
        let done = place.ddpm(&[&args[..], &given].concat()).well();
        assert!(!done.err.contains("warning"), "{}", done.err);
    }
    let args = [&["train", "--init", "runs/r", "--steps=1", "--force", "--dry-run"], &TINY[..]].concat();
    says(
        &place.ddpm(&args).well(),
        &["warning: diffusion.prediction is \"eps\", as forced; the weights were learnt with \"v\""],
    );
    assert!(!place.path("runs/run-001").exists());
}

#[test]
fn classes_of_another_set_are_refused_and_new_ones_in_between_do_not_shift_the_others() {
    let place = Place::new();
    let image = |class: &str, i: u8| {
        crate::support::image(&place.path(format!("set/{class}/{i}.png")), 12, 12, 40 + 30 * i);
    };
    for i in 0..3 {
        image("bird", i);
        image("dog", i);
    }
    let classes = ["--data=set", "--set=attention.num_class_embeds=2"];
    place.train("r", 2, 0, &classes).well();
    fs::rename(place.path("set/bird"), place.path("set/cat")).unwrap();
    resume(&place, &["--steps=3"])
        .fails(1, &["the class \"cat\", which the run has not learnt", "\"bird\", \"dog\"", "--force"]);
    fs::rename(place.path("set/cat"), place.path("set/bird")).unwrap();
    // Classes that have no images now leave the others their numbers; a new one is not learnt.
    fs::rename(place.path("set/bird"), place.path("bird")).unwrap();
    image("dog", 7);
    let done = resume(&place, &["--steps=3"]).well();
    says(&done, &["each keeps its number", "the images are not those", "(6 then, 4 now)"]);
    let manifest: Value =
        serde_json::from_str(&read(place.checkpoint("r", 3).join("manifest.json"))).unwrap();
    assert_eq!(manifest["classes"], serde_json::json!(["bird", "dog"]));
}

#[test]
fn force_is_for_runs_and_weights_that_are_taken_up() {
    let place = Place::new();
    place.ddpm(&[&["train", "--force", "--steps=1"], &TINY[..]].concat()).fails(2, &["--init", "--resume"]);
}

#[test]
fn a_gap_in_the_metrics_does_not_make_a_runs_own_checkpoints_those_of_another() {
    let place = Place::new();
    place.train("r", 8, 2, &[]).well();
    let path = place.path("runs/r/metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().enumerate().filter(|(i, _)| *i != 2).map(|(_, line)| line).collect();
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    let done = place.ddpm(&["train", "--resume", "r", "--steps", "9"]).well();
    assert!(!done.err.contains("of another run"), "{}", done.err);
    assert!(place.checkpoint("r", 9).is_dir() && place.checkpoint("r", 8).is_dir());
}
