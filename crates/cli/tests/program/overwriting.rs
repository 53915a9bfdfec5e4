//! Existing files: no command overwrites files that it did not write, or loses earlier results.

use crate::support::{Done, TestDir, image, names};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A run with snapshots, usable by every command.
fn setup() -> TestDir {
    let dir = TestDir::new();
    let more = ["--set=ema.power_widths=0.05, 0.1", "--set=ema.snapshot_every=2"];
    dir.train("r", 4, 2, &more).succeeds();
    image(&dir.path("a.png"), 12, 12, 60);
    image(&dir.path("mask.png"), 12, 12, 0);
    dir
}

#[test]
fn no_command_overwrites_files_it_did_not_write() {
    let dir = setup();
    let mine = "mine, and no result of a command";
    // The command, a file that it writes, and the value of --out.
    let commands: [(&str, &str, &str); 9] = [
        ("average r --sigma-rel 0.1", "w.safetensors", "w.safetensors"),
        ("export r --to safetensors", "e.safetensors", "e.safetensors"),
        ("export r --to pytorch", "e.pth", "e.pth"),
        ("data show digits --size 12 -n 2", "d.png", "d.png"),
        ("show schedules", "s.png", "s.png"),
        ("show noising a.png --schedule linear", "n.png", "n.png"),
        ("sample r -n 2 --steps 1", "o/images/000001.png", "o"),
        ("vary r a.png -n 1 --steps 1", "v/sheet.png", "v"),
        ("eval r -n 2 --terms 2", "m/nll.csv", "m"),
    ];
    let call = |command: &str, out: &str, more: &[&str]| {
        let args: Vec<&str> = command.split(' ').chain(["--out", out]).chain(more.iter().copied()).collect();
        dir.ddpm(&args)
    };
    for (command, file, out) in commands {
        let path = dir.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, mine).unwrap();
        call(command, out, &[]).fails(1, &[file, "already exists", "--overwrite"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), mine, "{command}");
        call(command, out, &["--overwrite"]).succeeds();
        assert!(fs::read(&path).unwrap() != mine.as_bytes(), "{command}");
        // Now it is our own output; only exports are indistinguishable from other programs' files.
        let again = call(command, out, &[]);
        if command.starts_with("export") {
            again.fails(1, &["already exists"])
        } else {
            again.succeeds()
        };
    }
    // The same for default outputs in the current folder.
    fs::write(dir.path("data.png"), mine).unwrap();
    dir.ddpm(&["data", "show", "digits", "-n", "1"]).fails(1, &["data.png: already exists"]);
}

#[test]
fn a_runs_own_files_are_never_overwritten() {
    let dir = setup();
    let own = [
        "runs/r/config.toml",
        "runs/r/metrics.jsonl",
        "runs/r/loss.png",
        "runs/r/checkpoints/step-0000004/model.safetensors",
        "runs/r/checkpoints/step-0000004/manifest.json",
        "runs/r/snapshots/step-0000004/power-0.1.safetensors",
    ];
    let bytes = || own.map(|file| fs::read(dir.path(file)).unwrap());
    let before = bytes();
    for file in own {
        for command in ["average r --sigma-rel 0.1", "export r --to safetensors", "show schedules"] {
            for more in [&[][..], &["--overwrite"]] {
                let args: Vec<&str> =
                    command.split(' ').chain(["--out", file]).chain(more.iter().copied()).collect();
                let done = dir.ddpm(&args).fails(1, &[file]);
                assert!(
                    done.err.contains("belongs to") || done.err.contains("already exists"),
                    "{}",
                    done.err
                );
            }
        }
    }
    for command in ["sample r -n 1 --steps 1", "eval r -n 1 --terms 1", "denoise r a.png"] {
        let args: Vec<&str> =
            command.split(' ').chain(["--out", "runs/r/checkpoints/step-0000004"]).collect();
        dir.ddpm(&args).fails(1, &["belongs to"]);
    }
    assert!(bytes() == before);
    dir.assert_intact("r", 4);
}

#[test]
fn results_of_another_measurement_are_kept() {
    let dir = setup();
    let eval = |more: &[&str]| dir.ddpm(&[&["eval", "r", "-n", "3", "--terms", "2"], more].concat());
    let folder = |done: Done| done.succeeds().out.lines().last().unwrap().replace("/nll.png", "");
    let base = folder(eval(&[]));
    assert_eq!(base, "runs/r/eval/step-0000004-n-3-terms-2");
    let all: Vec<String> = [
        &["--weights", "raw"][..],
        &["--seed", "1"],
        &["--threshold", "none"],
        &["--variance", "large"],
        &["--checkpoint", "2"],
        &["--data", "digits", "--set", "data.digits_count=32"],
    ]
    .map(|more| folder(eval(more)))
    .into();
    assert_eq!(all[0], "runs/r/eval/step-0000004-weights-raw-n-3-terms-2");
    assert!(all[5].starts_with("runs/r/eval/step-0000004-data-digits-"), "{}", all[5]);
    let mut there: Vec<String> = names(&dir.path("runs/r/eval"));
    assert_eq!(there.len(), 7, "{there:?}");
    // The same measurement reuses its folder, another of the same name gets a new one.
    assert_eq!(folder(eval(&[])), base);
    let json = dir.path(&base).join("nll.json");
    let old = fs::read_to_string(&json).unwrap().replace("\"program\": \"ddpm\"", "\"program\": \"other\"");
    fs::write(&json, old.replace("weights_sha256\": \"", "weights_sha256\": \"0")).unwrap();
    assert_eq!(folder(eval(&[])), format!("{base}-2"));
    there = names(&dir.path("runs/r/eval"));
    assert_eq!(there.len(), 8, "{there:?}");
    // With --out, another measurement is rejected.
    eval(&["--out", "m"]).succeeds();
    eval(&["--out", "m"]).succeeds();
    eval(&["--out", "m", "--weights", "raw"])
        .fails(1, &["m has the results of another measurement", "--overwrite"]);
    eval(&["--out", "m", "--weights", "raw", "--overwrite"]).succeeds();
}

#[test]
fn a_checkpoint_can_be_given_as_the_run_and_other_paths_are_explained() {
    let dir = setup();
    let checkpoint = "runs/r/checkpoints/step-0000002";
    let image = || fs::read(dir.path("o/images/000000.png")).unwrap();
    let draw = |run: &[&str]| {
        dir.ddpm(&[&["sample", "-n", "1", "--steps", "2", "--out", "o"], run].concat()).succeeds();
        image()
    };
    let second = draw(&[checkpoint]);
    assert!(second == draw(&["r", "--checkpoint", "2"]) && second != draw(&["r"]));
    assert!(second == draw(&[&format!("{checkpoint}/ema.safetensors")]), "a file of it");
    dir.ddpm(&["vary", checkpoint, "a.png", "-n", "1", "--steps", "2"]).succeeds();
    let made = dir.ddpm(&["average", checkpoint, "--sigma-rel", "0.1"]).succeeds();
    assert!(made.out.contains("step-0000002.safetensors"), "{}", made.out);
    dir.ddpm(&["export", checkpoint, "--to", "pytorch"]).succeeds();
    let done = dir.ddpm(&["eval", checkpoint, "-n", "1", "--terms", "1"]).succeeds();
    assert!(done.out.contains("eval/step-0000002"), "{}", done.out);
    dir.ddpm(&["sample", checkpoint, "--checkpoint", "4"])
        .fails(1, &["is already a checkpoint; omit --checkpoint 4"]);
    dir.ddpm(&["train", "--resume", checkpoint])
        .fails(1, &["is a checkpoint of the run runs/r; use runs/r with --checkpoint 2"]);
    for inside in ["runs/r/samples", "runs/r/config.toml", "runs/r/checkpoints"] {
        dir.ddpm(&["sample", inside]).fails(1, &["is inside the run runs/r; use runs/r"]);
    }
    fs::create_dir(dir.path("alone")).unwrap();
    for name in names(&dir.path(checkpoint)) {
        fs::copy(dir.path(checkpoint).join(&name), dir.path("alone").join(&name)).unwrap();
    }
    dir.ddpm(&["sample", "alone"]).fails(1, &["alone: is a checkpoint outside a run", "ddpm import"]);
}

#[test]
fn eval_measures_the_bound_by_default_and_estimates_its_time() {
    let dir = setup();
    let done = dir.ddpm(&["eval", "r"]).succeeds();
    assert!(done.out.contains("variational bound") && done.out.contains("over 64 images"), "{}", done.out);
    assert!(done.err.contains("the variational bound of 64 images takes about "), "{}", done.err);
    assert_eq!(names(&dir.path("runs/r/eval/step-0000004")), ["nll.csv", "nll.json", "nll.png"]);
}

/// The images of a folder.
fn images(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let folder = folder.join("images");
    names(&folder).into_iter().map(|n| (n.clone(), fs::read(folder.join(n)).unwrap())).collect()
}

#[cfg(unix)]
#[test]
fn interrupted_sampling_resumes_to_the_same_images() {
    let dir = TestDir::new();
    dir.train("r", 2, 0, &["--set=diffusion.timesteps=400"]).succeeds();
    fn args(out: &str) -> [&str; 8] {
        ["sample", "r", "-n", "24", "--batch-size", "2", "--out", out]
    }
    dir.ddpm(&args("whole")).succeeds();
    let whole = images(&dir.path("whole"));
    assert_eq!(whole.len(), 24);
    for signal in ["-INT", "-9"] {
        let out = if signal == "-9" { "killed" } else { "stopped" };
        let folder = dir.path(out).join("images");
        let mut child = dir.spawn(&args(out));
        let start = Instant::now();
        while !folder.is_dir() || names(&folder).len() < 3 {
            assert!(child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let done: Done = child.wait_with_output().unwrap().into();
        if signal == "-INT" {
            let resume = format!("resume with:  ddpm sample r -n 24 --batch-size 2 --out {out} --resume");
            done.fails(130, &["stopped; ", "of 24 images are in stopped/images", &resume]);
        }
        let before = images(&dir.path(out));
        let there = before.iter().filter(|(name, _)| !name.starts_with('.')).count();
        assert!((2..24).contains(&there), "{there}");
        for (name, bytes) in before.iter().filter(|(name, _)| !name.starts_with('.')) {
            assert!(whole.contains(&(name.clone(), bytes.clone())), "{name} is whole");
        }
        let done = dir.ddpm(&[&args(out)[..], &["--resume"]].concat()).succeeds();
        assert!(done.err.contains(&format!("resuming: {there} of 24 images exist")), "{}", done.err);
        assert!(images(&dir.path(out)) == whole, "{out}");
        assert!(dir.path(out).join("grid.png").is_file());
    }
}

#[test]
fn only_the_same_request_is_resumed() {
    let dir = TestDir::new();
    dir.train("r", 2, 1, &[]).succeeds();
    let draw = |more: &[&str]| {
        dir.ddpm(&[&["sample", "r", "--steps", "3", "--batch-size", "2", "--out", "o"], more].concat())
    };
    draw(&["-n", "4"]).succeeds();
    let four = images(&dir.path("o"));
    // Only missing and truncated images are sampled again; the number of images may grow.
    fs::remove_file(dir.path("o/images/000001.png")).unwrap();
    fs::write(dir.path("o/images/000002.png"), &four[2].1[..60]).unwrap();
    let done = draw(&["-n", "6", "--resume"]).succeeds();
    assert!(done.err.contains("resuming: 2 of 6 images exist"), "{}", done.err);
    let six = images(&dir.path("o"));
    assert!(six.len() == 6 && six[..4] == four);
    let done = draw(&["-n", "6", "--resume"]).succeeds();
    assert!(done.err.contains("resuming: 6 of 6 images exist") && images(&dir.path("o")) == six);
    for (more, part) in [
        (&["--seed", "1"][..], "seed was 0, now 1"),
        (&["--sampler", "ddim"], "sampler was ddpm, now ddim"),
        (&["--checkpoint", "1"], "checkpoint was step-0000002, now step-0000001"),
        (&["--weights", "raw"], "weights sha256 was "),
    ] {
        draw(&[&["-n", "6", "--resume"], more].concat())
            .fails(1, &["o: --resume requires the same request", part, "omit --resume"]);
    }
    assert!(images(&dir.path("o")) == six);
    // Without --resume the command starts over, and images of another request do not count.
    draw(&["-n", "2", "--seed", "1"]).succeeds();
    draw(&["-n", "6", "--seed", "1", "--resume"]).succeeds();
    let other = images(&dir.path("o"));
    assert!(
        other.len() == 6 && other.iter().zip(&six).all(|(a, b)| a.1 != b.1),
        "none is of the earlier seed"
    );
    let done = dir.ddpm(&["sample", "r", "-n", "1", "--steps", "3", "--resume"]).succeeds();
    assert!(done.err.contains("nothing to resume in runs/r/samples/seed-0-steps-3"), "{}", done.err);
    image(&dir.path("mine/images/0001.png"), 12, 12, 3);
    dir.ddpm(&["sample", "r", "-n", "1", "--steps", "3", "--out", "mine", "--resume"])
        .fails(1, &["mine has images, but no request.json"]);
    // Edits resume in the same way.
    image(&dir.path("a.png"), 12, 12, 60);
    let vary = |more: &[&str]| dir.ddpm(&[&["vary", "r", "a.png", "--out", "v"], more].concat());
    vary(&["-n", "2"]).succeeds();
    let two = images(&dir.path("v"));
    vary(&["-n", "3", "--resume"]).succeeds();
    assert!(images(&dir.path("v"))[..2] == two);
    image(&dir.path("a.png"), 12, 12, 61);
    vary(&["-n", "3", "--resume"]).fails(1, &["image was "]);
}
