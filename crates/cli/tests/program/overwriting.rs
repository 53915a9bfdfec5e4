//! What is there already: no command overwrites what it did not make, and none loses what was measured or drawn before.

use crate::support::{Done, Place, image, names};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A run with snapshots, from which every command can make something.
fn place() -> Place {
    let place = Place::new();
    let more = ["--set=train.power_ema=0.05, 0.1", "--set=train.snapshot_every=2"];
    place.train("r", 4, 2, &more).well();
    image(&place.path("a.png"), 12, 12, 60);
    image(&place.path("mask.png"), 12, 12, 0);
    place
}

#[test]
fn no_command_overwrites_what_it_did_not_make() {
    let place = place();
    let mine = "mine, and no result of a command";
    // The command, the file that it writes, and the flag's value.
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
        place.ddpm(&args)
    };
    for (command, file, out) in commands {
        let path = place.path(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, mine).unwrap();
        call(command, out, &[]).fails(1, &[file, "is there already", "--overwrite"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), mine, "{command}");
        call(command, out, &["--overwrite"]).well();
        assert!(fs::read(&path).unwrap() != mine.as_bytes(), "{command}");
        // Now it is a result; only another program's checkpoint cannot be told from others.
        let again = call(command, out, &[]);
        match command.starts_with("export") {
            true => again.fails(1, &["is there already"]),
            false => again.well(),
        };
    }
    // The default places in the current folder are no exception.
    fs::write(place.path("data.png"), mine).unwrap();
    place.ddpm(&["data", "show", "digits", "-n", "1"]).fails(1, &["data.png: is there already"]);
}

#[test]
fn a_runs_own_files_are_never_overwritten_whatever_is_asked() {
    let place = place();
    let own = [
        "runs/r/config.toml",
        "runs/r/metrics.jsonl",
        "runs/r/loss.png",
        "runs/r/checkpoints/step-0000004/model.safetensors",
        "runs/r/checkpoints/step-0000004/manifest.json",
        "runs/r/snapshots/step-0000004/power-0.1.safetensors",
    ];
    let bytes = || own.map(|file| fs::read(place.path(file)).unwrap());
    let before = bytes();
    for file in own {
        for command in ["average r --sigma-rel 0.1", "export r --to safetensors", "show schedules"] {
            for more in [&[][..], &["--overwrite"]] {
                let args: Vec<&str> =
                    command.split(' ').chain(["--out", file]).chain(more.iter().copied()).collect();
                let done = place.ddpm(&args).fails(1, &[file]);
                assert!(
                    done.err.contains("belongs to") || done.err.contains("is there already"),
                    "{}",
                    done.err
                );
            }
        }
    }
    for command in ["sample r -n 1 --steps 1", "eval r -n 1 --terms 1", "denoise r a.png"] {
        let args: Vec<&str> =
            command.split(' ').chain(["--out", "runs/r/checkpoints/step-0000004"]).collect();
        place.ddpm(&args).fails(1, &["belongs to"]);
    }
    assert!(bytes() == before);
    place.assert_intact("r", 4);
}

#[test]
fn results_of_another_measurement_are_kept() {
    let place = place();
    let eval = |more: &[&str]| place.ddpm(&[&["eval", "r", "-n", "3", "--terms", "2"], more].concat());
    let folder = |done: Done| done.well().out.lines().last().unwrap().replace("/nll.png", "");
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
    let mut there: Vec<String> = names(&place.path("runs/r/eval"));
    assert_eq!(there.len(), 7, "{there:?}");
    // The same again takes its own place, others of the same name one beside.
    assert_eq!(folder(eval(&[])), base);
    let json = place.path(&base).join("nll.json");
    let old = fs::read_to_string(&json).unwrap().replace("\"program\": \"ddpm\"", "\"program\": \"other\"");
    fs::write(&json, old.replace("weights_sha256\": \"", "weights_sha256\": \"0")).unwrap();
    assert_eq!(folder(eval(&[])), format!("{base}-2"));
    there = names(&place.path("runs/r/eval"));
    assert_eq!(there.len(), 8, "{there:?}");
    // Where the place is said, another measurement is refused.
    eval(&["--out", "m"]).well();
    eval(&["--out", "m"]).well();
    eval(&["--out", "m", "--weights", "raw"])
        .fails(1, &["m has the results of another measurement", "--overwrite"]);
    eval(&["--out", "m", "--weights", "raw", "--overwrite"]).well();
}

#[test]
fn a_checkpoint_that_is_given_for_its_run_is_taken_and_other_places_are_named() {
    let place = place();
    let checkpoint = "runs/r/checkpoints/step-0000002";
    let image = || fs::read(place.path("o/images/000000.png")).unwrap();
    let draw = |run: &[&str]| {
        place.ddpm(&[&["sample", "-n", "1", "--steps", "2", "--out", "o"], run].concat()).well();
        image()
    };
    let second = draw(&[checkpoint]);
    assert!(second == draw(&["r", "--checkpoint", "2"]) && second != draw(&["r"]));
    assert!(second == draw(&[&format!("{checkpoint}/ema.safetensors")]), "a file of it");
    place.ddpm(&["vary", checkpoint, "a.png", "-n", "1", "--steps", "2"]).well();
    let made = place.ddpm(&["average", checkpoint, "--sigma-rel", "0.1"]).well();
    assert!(made.out.contains("step-0000002.safetensors"), "{}", made.out);
    place.ddpm(&["export", checkpoint, "--to", "pytorch"]).well();
    let done = place.ddpm(&["eval", checkpoint, "-n", "1", "--terms", "1"]).well();
    assert!(done.out.contains("eval/step-0000002"), "{}", done.out);
    place
        .ddpm(&["sample", checkpoint, "--checkpoint", "4"])
        .fails(1, &["is a checkpoint already; leave --checkpoint 4 out"]);
    place
        .ddpm(&["train", "--resume", checkpoint])
        .fails(1, &["is a checkpoint of the run runs/r; give runs/r, with --checkpoint 2"]);
    for inside in ["runs/r/samples", "runs/r/config.toml", "runs/r/checkpoints"] {
        place.ddpm(&["sample", inside]).fails(1, &["is inside the run runs/r; give runs/r"]);
    }
    fs::create_dir(place.path("alone")).unwrap();
    for name in names(&place.path(checkpoint)) {
        fs::copy(place.path(checkpoint).join(&name), place.path("alone").join(&name)).unwrap();
    }
    place.ddpm(&["sample", "alone"]).fails(1, &["alone: is a checkpoint outside a run", "ddpm import"]);
}

#[test]
fn eval_measures_the_bound_by_default_and_says_how_long_it_takes() {
    let place = place();
    let done = place.ddpm(&["eval", "r"]).well();
    assert!(done.out.contains("variational bound") && done.out.contains("of 64 images"), "{}", done.out);
    assert!(done.err.contains("the variational bound of 64 images takes about "), "{}", done.err);
    assert_eq!(names(&place.path("runs/r/eval/step-0000004")), ["nll.csv", "nll.json", "nll.png"]);
}

/// The images of a folder.
fn images(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let folder = folder.join("images");
    names(&folder).into_iter().map(|n| (n.clone(), fs::read(folder.join(n)).unwrap())).collect()
}

#[cfg(unix)]
#[test]
fn drawing_that_was_stopped_or_killed_is_gone_on_with_and_ends_with_the_same_images() {
    let place = Place::new();
    place.train("r", 2, 0, &["--set=diffusion.timesteps=400"]).well();
    fn args(out: &str) -> [&str; 8] {
        ["sample", "r", "-n", "24", "--batch-size", "2", "--out", out]
    }
    place.ddpm(&args("whole")).well();
    let whole = images(&place.path("whole"));
    assert_eq!(whole.len(), 24);
    for signal in ["-INT", "-9"] {
        let out = if signal == "-9" { "killed" } else { "stopped" };
        let folder = place.path(out).join("images");
        let mut child = place.spawn(&args(out));
        let begun = Instant::now();
        while !folder.is_dir() || names(&folder).len() < 3 {
            assert!(child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let done: Done = child.wait_with_output().unwrap().into();
        if signal == "-INT" {
            let go_on = format!("go on with:  ddpm sample r -n 24 --batch-size 2 --out {out} --resume");
            done.fails(130, &["stopped; ", "of 24 images are in stopped/images", &go_on]);
        }
        let before = images(&place.path(out));
        let there = before.iter().filter(|(name, _)| !name.starts_with('.')).count();
        assert!((2..24).contains(&there), "{there}");
        for (name, bytes) in before.iter().filter(|(name, _)| !name.starts_with('.')) {
            assert!(whole.contains(&(name.clone(), bytes.clone())), "{name} is whole");
        }
        let done = place.ddpm(&[&args(out)[..], &["--resume"]].concat()).well();
        assert!(done.err.contains(&format!("going on: {there} of 24 images are there")), "{}", done.err);
        assert!(images(&place.path(out)) == whole, "{out}");
        assert!(place.path(out).join("grid.png").is_file());
    }
}

#[test]
fn only_the_same_request_is_gone_on_with() {
    let place = Place::new();
    place.train("r", 2, 1, &[]).well();
    let draw = |more: &[&str]| {
        place.ddpm(&[&["sample", "r", "--steps", "3", "--batch-size", "2", "--out", "o"], more].concat())
    };
    draw(&["-n", "4"]).well();
    let four = images(&place.path("o"));
    // What is gone, cut off or another's is drawn again, and no more; the number of images may grow.
    fs::remove_file(place.path("o/images/000001.png")).unwrap();
    fs::write(place.path("o/images/000002.png"), &four[2].1[..60]).unwrap();
    let done = draw(&["-n", "6", "--resume"]).well();
    assert!(done.err.contains("going on: 2 of 6 images are there"), "{}", done.err);
    let six = images(&place.path("o"));
    assert!(six.len() == 6 && six[..4] == four);
    let done = draw(&["-n", "6", "--resume"]).well();
    assert!(done.err.contains("going on: 6 of 6 images are there") && images(&place.path("o")) == six);
    for (more, part) in [
        (&["--seed", "1"][..], "seed is 0, and here 1"),
        (&["--sampler", "ddim"], "sampler is ddpm, and here ddim"),
        (&["--checkpoint", "1"], "checkpoint is step-0000002, and here step-0000001"),
        (&["--weights", "raw"], "weights sha256 is "),
    ] {
        draw(&[&["-n", "6", "--resume"], more].concat())
            .fails(1, &["o: --resume goes on with the same call only", part, "leave --resume out"]);
    }
    assert!(images(&place.path("o")) == six);
    // Without it the same command begins again, and what was of another request does not count as drawn.
    draw(&["-n", "2", "--seed", "1"]).well();
    draw(&["-n", "6", "--seed", "1", "--resume"]).well();
    let other = images(&place.path("o"));
    assert!(
        other.len() == 6 && other.iter().zip(&six).all(|(a, b)| a.1 != b.1),
        "none is of the earlier seed"
    );
    let done = place.ddpm(&["sample", "r", "-n", "1", "--steps", "3", "--resume"]).well();
    assert!(
        done.err.contains("there is nothing in runs/r/samples/seed-0-steps-3 to go on with"),
        "{}",
        done.err
    );
    image(&place.path("mine/images/0001.png"), 12, 12, 3);
    place
        .ddpm(&["sample", "r", "-n", "1", "--steps", "3", "--out", "mine", "--resume"])
        .fails(1, &["mine has images, but no request.json"]);
    // Edits are gone on with in the same way.
    image(&place.path("a.png"), 12, 12, 60);
    let vary = |more: &[&str]| place.ddpm(&[&["vary", "r", "a.png", "--out", "v"], more].concat());
    vary(&["-n", "2"]).well();
    let two = images(&place.path("v"));
    vary(&["-n", "3", "--resume"]).well();
    assert!(images(&place.path("v"))[..2] == two);
    image(&place.path("a.png"), 12, 12, 61);
    vary(&["-n", "3", "--resume"]).fails(1, &["image is "]);
}
