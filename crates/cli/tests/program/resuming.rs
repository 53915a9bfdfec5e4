//! Resuming runs: which settings may change, what is reported, and modified run folders.

use crate::support::{Done, TINY, TestDir, copy, losses, names, state};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn resume(dir: &TestDir, more: &[&str]) -> Done {
    dir.ddpm(&[&["train", "--resume", "r"], more].concat())
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
    let dir = TestDir::new();
    copy(&old_run().join("run"), &dir.path("runs/r"));
    let old = losses(&dir.path("runs/r"));
    assert!(old.iter().map(|l| l.0).eq(0..8), "they count from 0");
    dir.ddpm(&["sample", "r", "-n", "1", "--steps", "2", "--out", "sampled"]).succeeds();
    let mut dry = dir.command(&["train", "--resume", "r", "--dry-run"]);
    let dry: Done = dry.env("DDPM_ISA", "portable").output().unwrap().into();
    says(&dry.succeeds(), &["note: metrics.jsonl is of an earlier version, which counted steps from 0"]);
    let mut again = dir.command(&["train", "--resume", "r"]);
    let done = Done::from(again.env("DDPM_ISA", "portable").output().unwrap()).succeeds();
    says(&done, &["note: metrics.jsonl is of an earlier version"]);
    assert!(!done.err.contains("warning"), "{}", done.err);

    let files = |path: PathBuf| serde_json::from_str::<Value>(&read(path)).unwrap()["files"].clone();
    let expected = files(old_run().join("step-0000008.json"));
    assert_eq!(expected.as_object().unwrap().len(), 3);
    assert_eq!(files(dir.checkpoint("r", 8).join("manifest.json")), expected);
    // One numbering in the whole file; repeated steps have the same losses.
    let new = losses(&dir.path("runs/r"));
    assert!(new.iter().map(|l| l.0).eq(1..=8));
    assert!(new.iter().map(|l| l.1).eq(old.iter().map(|l| l.1)));
    dir.assert_intact("r", 8);
    assert!(!resume(&dir, &[]).succeeds().err.contains("earlier version"));
}

#[test]
fn metrics_checkpoints_and_sheets_count_the_steps_that_are_done_from_1() {
    let dir = TestDir::new();
    dir.train("r", 3, 1, &["--set=output.sample_count=1", "--set=output.sample_every=1"]).succeeds();
    assert!(losses(&dir.path("runs/r")).iter().map(|l| l.0).eq(1..=3));
    assert!(read(dir.path("runs/r/metrics.jsonl")).starts_with("{\"format\":2,\"step\":1,"));
    assert!(dir.checkpoint("r", 3).is_dir() && dir.path("runs/r/samples/step-0000001.png").exists());
}

#[test]
fn settings_that_the_weights_depend_on_cannot_change_unless_forced() {
    let dir = TestDir::new();
    dir.train("r", 3, 0, &[]).succeeds();
    let config = read(dir.path("runs/r/config.toml"));
    let before = state(&dir.checkpoint("r", 3));
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
        let message = format!("{was} (now {is})");
        for dry in [&[][..], &["--dry-run"]] {
            let flags = [&["--steps=4", "--set", setting], dry].concat();
            resume(&dir, &flags).fails(
                1,
                &["step-0000003: ", &message, "they are of little use if this setting changes", "--force"],
            );
        }
    }
    resume(&dir, &["--steps=4", "--set=network.name=simple", "--set=simple.widths=8, 8"])
        .fails(1, &["network.name = \"attention\" (now \"simple\"); they are of little use", "--force"]);
    assert_eq!(read(dir.path("runs/r/config.toml")), config);
    assert!(state(&dir.checkpoint("r", 3)) == before && !dir.checkpoint("r", 4).exists());
    // Equivalent settings are no change.
    let done = resume(&dir, &["--dry-run", "--set=diffusion.max_beta=0.5", "--set=simple.time_emb_dim=8"])
        .succeeds();
    assert!(!done.err.contains("max_beta") && !done.err.contains("simple"), "{}", done.err);

    let forced = resume(&dir, &["--steps=4", "--set", "diffusion.prediction=v", "--force"]).succeeds();
    says(
        &forced,
        &[
            "warning: diffusion.prediction is \"v\" from here on (forced); the weights were trained with \"eps\"",
        ],
    );
    // From then on it is the run's setting.
    let plain = resume(&dir, &["--steps=5"]).succeeds();
    assert!(!plain.err.contains("prediction"), "{}", plain.err);
}

#[test]
fn changed_settings_that_affect_training_are_reported_with_both_values() {
    let dir = TestDir::new();
    let run = |isa: &str, args: &[String]| -> Done {
        dir.command(args).env("DDPM_ISA", isa).output().unwrap().into()
    };
    run("portable", &crate::support::train("r", 3, 0, &[])).succeeds();
    let args = [
        "train",
        "--resume",
        "r",
        "--steps=4",
        "--seed=1",
        "--batch-size=8",
        "--threads=1",
        "--set=output.keep_checkpoints=5",
        "--set=loss.name=huber",
        "--set=loss.weighting=min-snr",
        "--set=optimizer.name=adamw",
    ];
    let done = run("portable", &args.map(str::to_owned)).succeeds();
    says(
        &done,
        &[
            "note: train.steps is 4 from here on; it was 3 until step 3",
            "note: train.seed is 1 from here on; it was 0 until step 3",
            "note: train.batch_size is 8 from here on; it was 4",
            "note: loss.name is \"huber\" from here on; it was \"mse\"",
            "note: loss.weighting is \"min-snr\" from here on; it was \"plain\"",
            "note: the loss is computed differently from here on",
            "note: optimizer.name is \"adamw\" from here on; it was \"adam\"",
        ],
    );
    assert!(
        !done.err.contains("threads is") && !done.err.contains("output.keep_checkpoints"),
        "{}",
        done.err
    );
    assert!(!done.err.contains("rounds differently"), "{}", done.err);
    // Its checkpoint has the mean of the comparable losses, and is recognized as the run's own.
    let manifest: Value = serde_json::from_str(&read(dir.checkpoint("r", 4).join("manifest.json"))).unwrap();
    assert_eq!(manifest["losses_since"], 3);
    assert_eq!(manifest["loss"].as_f64(), Some(losses(&dir.path("runs/r"))[3].1));
    assert!(!resume(&dir, &["--dry-run"]).succeeds().err.contains("another run"));
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        let moved = run("avx2", &["train", "--resume", "r", "--steps=5"].map(str::to_owned)).succeeds();
        says(
            &moved,
            &["note: computed by avx2 from here on; it was portable until step 4, which rounds differently"],
        );
    }
}

#[test]
fn a_jump_of_the_learning_rate_is_reported_before_training() {
    let dir = TestDir::new();
    let cosine = "--set=lr_schedule.name=cosine";
    dir.train("r", 10, 0, &[cosine]).succeeds();
    // lr (1 + cos(pi k / K)) / 2 with lr = 1e-3: k/K = 9/10 of 10 steps, 10/10, and 10/20.
    let message = "warning: the learning rate of step 11 is 5.000e-4; with the previous settings it would be 0, and step 10 had \
                2.447e-5";
    let dry = resume(&dir, &["--steps=20", "--dry-run"]).succeeds();
    says(&dry, &[message, "note: train.steps is 20"]);
    let done = resume(&dir, &["--steps=20"]).succeeds();
    says(&done, &[message]);
    assert!(done.err.find(message) < done.err.find("step 20: checkpoint"), "{}", done.err);
    // Resuming as planned prints nothing.
    dir.train("half", 20, 10, &[cosine]).succeeds();
    fs::remove_dir_all(dir.checkpoint("half", 20)).unwrap();
    let plain = dir.ddpm(&["train", "--resume", "half"]).succeeds();
    assert!(!plain.err.contains("learning rate") && !plain.err.contains("note"), "{}", plain.err);
    for (name, flags) in [
        ("rate", &["--steps=21", "--lr=2e-3"][..]),
        ("warm-up", &["--steps=21", "--set=lr_schedule.warmup_steps=200"]),
        ("epochs", &["--epochs=3"]),
        ("schedule", &["--steps=21", "--set=lr_schedule.name=constant"]),
    ] {
        let done = resume(&dir, &[flags, &["--dry-run"]].concat()).succeeds();
        assert!(done.err.contains("warning: the learning rate of step 21 is "), "{name}: {}", done.err);
    }
}

#[test]
fn fewer_steps_than_completed_are_rejected() {
    let dir = TestDir::new();
    dir.train("r", 8, 4, &[]).succeeds();
    fs::remove_dir_all(dir.checkpoint("r", 8)).unwrap();
    let files = |dir: &TestDir| {
        (read(dir.path("runs/r/config.toml")), read(dir.checkpoint("r", 4).join("manifest.json")))
    };
    let before = files(&dir);
    resume(&dir, &["--steps=2"]).fails(1, &["train.steps: 2 is fewer than the 4 steps", "--checkpoint STEP"]);
    resume(&dir, &["--steps=2", "--dry-run"]).fails(1, &["train.steps: 2 is fewer"]);
    // Exactly the completed steps: nothing to do.
    says(&resume(&dir, &["--steps=4"]).succeeds(), &["all 4 steps of this run are completed"]);
    assert_eq!(files(&dir), before);
    // As an earlier version may have written it.
    let config = before.0.replace("\nsteps = 8\n", "\nsteps = 2\n");
    fs::write(dir.path("runs/r/config.toml"), config).unwrap();
    let done = resume(&dir, &[]).succeeds();
    says(
        &done,
        &["config.toml has train.steps = 2 (was 8), fewer than the 4 completed steps; this edit is ignored"],
    );
    dir.assert_intact("r", 8);
    assert!(read(dir.path("runs/r/config.toml")).contains("\nsteps = 8\n"));
}

#[test]
fn an_edited_config_follows_the_same_rules() {
    let dir = TestDir::new();
    dir.train("r", 3, 0, &[]).succeeds();
    let config = dir.path("runs/r/config.toml");
    let plain = read(config.clone());
    let edit = |pairs: &[(&str, &str)]| {
        let text = pairs.iter().fold(plain.clone(), |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replace(from, to)
        });
        fs::write(&config, text).unwrap();
    };
    edit(&[("\nlr = 0.001\n", "\nlr = 0.0005\n"), ("\nsteps = 3\n", "\nsteps = 5\n")]);
    let done = resume(&dir, &[]).succeeds();
    says(
        &done,
        &[
            "note: config.toml was edited: train.steps = 5 (was 3)",
            "note: config.toml was edited: optimizer.lr = 0.0005 (was 0.001)",
            "the learning rate of step 4 is 5.000e-4; with the previous settings it would be 1.000e-3",
        ],
    );
    dir.assert_intact("r", 5);
    let edited = read(config.clone());
    assert!(edited.contains("\nlr = 0.0005\n"));
    // Flags win, and changes are reported once.
    let done = resume(&dir, &["--steps=6", "--lr=2e-3"]).succeeds();
    assert!(!done.err.contains("edited"), "{}", done.err);
    assert!(read(config.clone()).contains("\nlr = 0.002\n"));
    // An earlier checkpoint comes with its own, unedited settings.
    let back = resume(&dir, &["--checkpoint=3", "--dry-run"]).fails(1, &["there is no checkpoint"]);
    drop(back);
    fs::write(&config, read(config.clone()).replace("prediction = \"eps\"", "prediction = \"v\"")).unwrap();
    resume(&dir, &["--steps=7"]).fails(1, &["diffusion.prediction = \"eps\" (now \"v\")", "config.toml"]);
    fs::write(&config, read(config.clone()).replace("prediction = \"v\"", "prediction = \"w\"")).unwrap();
    resume(&dir, &["--steps=7"]).fails(1, &["config.toml: line ", "diffusion.prediction"]);
}

#[test]
fn a_missing_config_is_restored_from_the_checkpoint() {
    let dir = TestDir::new();
    dir.train("r", 4, 2, &[]).succeeds();
    let config = dir.path("runs/r/config.toml");
    let before = read(config.clone());
    fs::remove_file(&config).unwrap();
    dir.ddpm(&["sample", "r", "-n", "1", "--steps", "2", "--out", "sampled"]).succeeds();
    assert!(!config.exists(), "only training writes it");
    let done = resume(&dir, &[]).succeeds();
    says(&done, &["note: config.toml is missing; it is restored from "]);
    assert_eq!(read(config), before);
    // Without either it is not recognized as a run.
    fs::remove_dir_all(dir.path("runs/r/checkpoints")).unwrap();
    fs::remove_file(dir.path("runs/r/config.toml")).unwrap();
    resume(&dir, &[]).fails(1, &["r: there is no such run"]);
    dir.ddpm(&["train", "--resume", "runs/r"]).fails(1, &["runs/r: is not a run"]);
}

#[test]
fn changed_settings_are_saved_only_with_a_checkpoint() {
    let dir = TestDir::new();
    dir.train("r", 2, 0, &[]).succeeds();
    let before = read(dir.path("runs/r/config.toml"));
    // Fails before the next checkpoint.
    let explode =
        ["--lr=10", "--set=optimizer.name=adamw", "--set=optimizer.weight_decay=1000", "--steps=100"];
    resume(&dir, &explode).fails(1, &["is not finite"]);
    assert_eq!(read(dir.path("runs/r/config.toml")), before);
    let done = resume(&dir, &["--steps=3"]).succeeds();
    assert!(!done.err.contains("optimizer.lr") && !done.err.contains("edited"), "{}", done.err);
    assert!(read(dir.path("runs/r/config.toml")).contains("\nsteps = 3\n"));
}

#[test]
fn missing_metrics_are_reported() {
    let dir = TestDir::new();
    dir.train("r", 6, 0, &[]).succeeds();
    let metrics = dir.path("runs/r/metrics.jsonl");
    let whole = read(metrics.clone());
    assert!(!resume(&dir, &["--dry-run"]).succeeds().err.contains("metrics.jsonl"));
    let line = |i: usize| whole.lines().nth(i).unwrap().to_owned() + "\n";
    for (text, message) in [
        ((0..4).map(line).collect::<String>(), "lacks steps 5 to 6 of the 6 completed steps"),
        ([0, 1, 3, 4, 5].map(line).concat(), "lacks step 3 of the 6 completed steps"),
        (whole[..whole.len() / 2].to_owned(), "lacks steps 4 to 6 of the 6"),
        (String::new(), "has none of the 6 completed steps"),
    ] {
        fs::write(&metrics, text).unwrap();
        // Only differing last lines mark a checkpoint as another run's, not missing ones.
        let done = resume(&dir, &["--dry-run", "--force"]).succeeds();
        says(&done, &["warning: metrics.jsonl ", message]);
    }
    fs::remove_file(&metrics).unwrap();
    says(&resume(&dir, &["--steps=7"]).succeeds(), &["metrics.jsonl has none of the 6 completed steps"]);
    assert!(losses(&dir.path("runs/r")).iter().map(|l| l.0).eq([7]));
}

#[test]
fn a_checkpoint_of_another_run_is_rejected() {
    let dir = TestDir::new();
    dir.train("r", 4, 2, &[]).succeeds();
    dir.train("other", 8, 8, &["--seed=5"]).succeeds();
    copy(&dir.checkpoint("other", 8), &dir.checkpoint("r", 8));
    let message = "step-0000008 was skipped: it is of another run";
    // Nor for sampling.
    let sampled = dir.ddpm(&["sample", "r", "-n", "1", "--steps", "2", "--out", "sampled"]).succeeds();
    says(&sampled, &["warning: ", message]);
    resume(&dir, &["--checkpoint=8"]).fails(1, &["step-0000008: is of another run", "--init ", "--force"]);
    let done = resume(&dir, &["--steps=6"]).succeeds();
    says(&done, &[message, "set aside runs/r/checkpoints/aside-step-0000008"]);
    dir.train("whole", 4, 2, &[]).succeeds();
    let more = dir.ddpm(&["train", "--resume", "whole", "--steps=6"]).succeeds();
    drop(more);
    assert!(state(&dir.checkpoint("r", 6)) == state(&dir.checkpoint("whole", 6)));
    // It belongs to another run, so it stays however far this run gets.
    resume(&dir, &["--steps=9"]).succeeds();
    resume(&dir, &["--steps=10"]).succeeds();
    assert!(dir.path("runs/r/checkpoints/aside-step-0000008/manifest.json").exists());

    // One of an earlier version has no run id; its mean loss gives it away.
    let old = dir.path("runs/old");
    copy(&old_run().join("run"), &old);
    let metrics = read(old.join("metrics.jsonl"));
    fs::write(old.join("metrics.jsonl"), metrics.replace("\"loss\":1.", "\"loss\":0.")).unwrap();
    let done = dir.ddpm(&["train", "--resume", "old"]);
    done.fails(1, &["no checkpoint is usable: step-0000004: is of another run: its mean loss is "]);
    dir.ddpm(&["train", "--resume", "old", "--force"]).succeeds();
}

#[test]
fn resuming_completes_unfinished_outputs_and_removes_leftovers() {
    let dir = TestDir::new();
    dir.train("r", 4, 1, &[]).succeeds();
    let run = dir.path("runs/r");
    let card = read(run.join("README.md"));
    let plot = fs::read(run.join("loss.png")).unwrap();
    let kept = names(&run.join("checkpoints"));
    // As if killed between its last checkpoint and what follows.
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
    let done = resume(&dir, &[]).succeeds();
    says(&done, &["all 4 steps of this run are completed"]);
    assert_eq!(read(run.join("README.md")), card);
    assert!(fs::read(run.join("loss.png")).unwrap() == plot);
    let now: Vec<String> = names(&run.join("checkpoints"));
    // Only the loss of the last one is known now.
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
fn checkpoints_set_aside_are_removed_once_the_run_has_passed_them() {
    let dir = TestDir::new();
    dir.train("r", 6, 2, &["--set=output.keep_checkpoints=5"]).succeeds();
    let aside = |step: u64| dir.path(format!("runs/r/checkpoints/aside-step-{step:07}"));
    says(
        &resume(&dir, &["--checkpoint=2", "--steps=3"]).succeeds(),
        &["set aside ", "aside-step-0000004", "aside-step-0000006"],
    );
    assert!(aside(4).exists() && aside(6).exists());
    resume(&dir, &["--steps=5"]).succeeds();
    assert!(aside(4).exists(), "it was not passed when the run was resumed");
    let done = resume(&dir, &["--steps=7"]).succeeds();
    says(&done, &["note: removed runs/r/checkpoints/aside-step-0000004, which was set aside"]);
    assert!(!aside(4).exists() && aside(6).exists());
}

#[test]
fn initial_weights_are_rejected_under_settings_they_were_not_trained_with() {
    let dir = TestDir::new();
    dir.train("r", 2, 0, &["--set=diffusion.prediction=v", "--set=diffusion.schedule=cosine"]).succeeds();
    let file = "runs/r/checkpoints/step-0000002/model.safetensors";
    for source in ["runs/r", "runs/r/checkpoints/step-0000002", file] {
        let args = [&["train", "--init", source, "--steps=1"], &TINY[..]].concat();
        dir.ddpm(&args).fails(
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
        let done = dir.ddpm(&[&args[..], &given].concat()).succeeds();
        assert!(!done.err.contains("warning"), "{}", done.err);
    }
    let args = [&["train", "--init", "runs/r", "--steps=1", "--force", "--dry-run"], &TINY[..]].concat();
    says(
        &dir.ddpm(&args).succeeds(),
        &["warning: diffusion.prediction is \"eps\" (forced); the weights were trained with \"v\""],
    );
    assert!(!dir.path("runs/run-001").exists());
}

#[test]
fn unknown_classes_are_rejected_and_missing_ones_do_not_shift_the_others() {
    let dir = TestDir::new();
    let image = |class: &str, i: u8| {
        crate::support::image(&dir.path(format!("set/{class}/{i}.png")), 12, 12, 40 + 30 * i);
    };
    for i in 0..3 {
        image("bird", i);
        image("dog", i);
    }
    let classes = ["--data=set", "--set=attention.num_class_embeds=2"];
    dir.train("r", 2, 0, &classes).succeeds();
    fs::rename(dir.path("set/bird"), dir.path("set/cat")).unwrap();
    resume(&dir, &["--steps=3"])
        .fails(1, &["the class \"cat\", on which the run was not trained", "\"bird\", \"dog\"", "--force"]);
    fs::rename(dir.path("set/cat"), dir.path("set/bird")).unwrap();
    // Classes without images leave the indices of the others unchanged.
    fs::rename(dir.path("set/bird"), dir.path("bird")).unwrap();
    image("dog", 7);
    let done = resume(&dir, &["--steps=3"]).succeeds();
    says(&done, &["each keeps its index", "the images are not those", "(6 before, 4 now)"]);
    let manifest: Value = serde_json::from_str(&read(dir.checkpoint("r", 3).join("manifest.json"))).unwrap();
    assert_eq!(manifest["classes"], serde_json::json!(["bird", "dog"]));
}

#[test]
fn force_requires_resume_or_init() {
    let dir = TestDir::new();
    dir.ddpm(&[&["train", "--force", "--steps=1"], &TINY[..]].concat()).fails(2, &["--init", "--resume"]);
}

#[test]
fn a_gap_in_the_metrics_does_not_disown_checkpoints() {
    let dir = TestDir::new();
    dir.train("r", 8, 2, &[]).succeeds();
    let path = dir.path("runs/r/metrics.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().enumerate().filter(|(i, _)| *i != 2).map(|(_, line)| line).collect();
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    let done = dir.ddpm(&["train", "--resume", "r", "--steps", "9"]).succeeds();
    assert!(!done.err.contains("of another run"), "{}", done.err);
    assert!(dir.checkpoint("r", 9).is_dir() && dir.checkpoint("r", 8).is_dir());
}
