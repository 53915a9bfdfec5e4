//! What is printed, and what is only told.

use crate::support::{Place, TINY, TUTORIAL, names};
use std::fs;

#[test]
fn a_dry_run_tells_the_plan_and_writes_nothing() {
    let place = Place::new();
    let args = [&["train", "--dry-run", "--steps=7", "--threads=1"], &TINY[..]].concat();
    let done = place.ddpm(&args).well();
    for part in ["64 images, 12x12 grey", " parameters\n", " a checkpoint\n", "for 7 steps of ", "1 thread,"]
    {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    let memory = done.err.lines().find(|l| l.starts_with("memory ")).unwrap();
    assert!(memory.contains("network, optimizer and activations "), "{memory}");
    let data = done.err.lines().find(|l| l.starts_with("data ")).unwrap();
    assert!(data.contains("22.5 KiB in memory"), "{data}");
    assert!(names(&place.path("")).is_empty());
}

#[test]
fn a_dry_run_of_a_step_of_minutes_tells_what_is_known_at_once_and_ends_soon() {
    use std::io::BufRead;
    let place = Place::new();
    for i in 0..6 {
        crate::support::image(&place.path(format!("cars/{i}.png")), 80, 100, 20 * i);
    }
    // 3e12 operations a step.
    let begun = std::time::Instant::now();
    let mut child = place.spawn(&["train", "--preset", "cars", "--data", "cars", "--dry-run", "--threads=2"]);
    let mut seen = Vec::new();
    for line in std::io::BufReader::new(child.stderr.take().unwrap()).lines() {
        seen.push((begun.elapsed(), line.unwrap()));
    }
    assert!(child.wait().unwrap().success(), "{seen:?}");
    let at =
        |name: &str| seen.iter().find(|(_, line)| line.starts_with(name)).map(|(at, _)| at.as_secs_f64());
    // Much longer than an idle machine takes, and much shorter than two steps.
    let order = ["network ", "memory ", "disk ", "data ", "time "].map(|name| at(name).expect(name));
    assert!(order.is_sorted() && order[2] < 5.0 && order[4] < 25.0, "{seen:?}");
    let time = &seen.last().unwrap().1;
    assert!(time.contains("for 5 steps of ") && time.contains("2 threads"), "{time}");
}

#[test]
fn a_dry_run_of_going_on_writes_nothing_either() {
    let place = Place::new();
    place.train("r", 4, 2, &[]).well();
    let all = || {
        let mut files = vec![place.path("runs/r")];
        let mut at = 0;
        while at < files.len() {
            if files[at].is_dir() {
                let inside = names(&files[at]).into_iter().map(|n| files[at].join(n)).collect::<Vec<_>>();
                files.extend(inside);
            }
            at += 1;
        }
        let content = |p: std::path::PathBuf| (fs::read(&p).ok(), p);
        files.into_iter().map(content).filter(|(_, p)| !p.ends_with("lock")).collect::<Vec<_>>()
    };
    let before = all();
    let args = ["train", "--resume", "r", "--checkpoint=2", "--steps=9", "--dry-run"];
    let done = place.ddpm(&args).well();
    assert!(done.err.contains("for 7 steps of "), "{}", done.err);
    assert!(all() == before);
    place.ddpm(&["train", "--resume", "r", "--checkpoint=3", "--dry-run"]).fails(1, &["no checkpoint \"3\""]);
}

#[test]
fn printed_settings_are_read_back() {
    let place = Place::new();
    for preset in ["digits", "digits28"] {
        let printed = place.ddpm(&["config", "--preset", preset]).well().out;
        fs::write(place.path("mine.toml"), &printed).unwrap();
        assert_eq!(place.ddpm(&["config", "--config", "mine.toml"]).well().out, printed);
        let args =
            ["train", "--config", "mine.toml", "--dry-run", "--set=data.digits_count=8", "--batch-size=1"];
        place.ddpm(&args).well();
    }
    let list = place.ddpm(&["config", "--list"]).well().out;
    assert!(["digits ", "digits28 ", "mnist "].iter().all(|name| list.contains(name)), "{list}");
}

#[test]
fn the_tutorials_file_is_understood() {
    let place = Place::new();
    let image = |class: u8| place.path(format!("data/train/images/{class}/{class}.png"));
    for class in 0..3 {
        crate::support::image(&image(class), 28, 28, class);
    }
    fs::write(place.path("default.yaml"), TUTORIAL).unwrap();
    let args = ["train", "--config", "default.yaml", "--dry-run", "--batch-size=1"];
    let done = place.ddpm(&args).well();
    for part in
        ["3 images, 28x28 grey", "3 classes", "for 120 steps of ", "note: train_params.ckpt_name is not used"]
    {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    // The size is that of the file, whatever the images have.
    crate::support::image(&image(1), 40, 32, 3);
    let done = place.ddpm(&args).well();
    assert!(done.err.contains("resized to 28x28"), "{}", done.err);
    let other = TUTORIAL.replace("im_size", "im_sice");
    fs::write(place.path("default.yaml"), other).unwrap();
    place.ddpm(&args).fails(1, &["default.yaml: line 9: model_params.im_sice", "did you mean im_size?"]);
}

#[test]
fn every_command_explains_itself_with_an_example() {
    let place = Place::new();
    for command in [
        &["--help"][..],
        &["train", "--help"],
        &["sample", "--help"],
        &["config", "--help"],
        &["show", "--help"],
        &["show", "schedules", "--help"],
        &["show", "noising", "--help"],
        &["bench", "--help"],
        &["completions", "--help"],
    ] {
        let done = place.ddpm(command).well();
        let (_, examples) = done.out.split_once("Example").expect(&done.out);
        assert!(examples.contains("  ddpm "), "{}", done.out);
        assert!(done.err.is_empty());
    }
    assert!(place.ddpm(&["--version"]).well().out.starts_with("ddpm "));
}

#[test]
fn shells_get_their_completions() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let done = place.ddpm(&["completions", shell]).well();
        for part in ["batch-size", "completions", "noising", "scaled-linear"] {
            assert!(done.out.contains(part), "{part} {shell}: {}", done.out);
        }
    }
    place.ddpm(&["completions", "bsh"]).fails(2, &["bash"]);
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    // The reader has gone before the program begins.
    for command in ["config", "config --list", "completions bash", "sample r -n 1 --steps 1 --progress x0"] {
        place.shell(&format!("{{ sleep 0.2; \"$ddpm\" {command} 2>err; echo $? >code; }} | true"));
        assert_eq!(fs::read_to_string(place.path("err")).unwrap(), "", "{command}");
        assert_eq!(fs::read_to_string(place.path("code")).unwrap(), "0\n", "{command}");
    }
    // A training goes on when nobody reads its messages any more.
    let flags = TINY.map(|f| format!("'{f}'")).join(" ");
    place.shell(&format!(
        "{{ sleep 0.2; \"$ddpm\" train --name t --steps 2 {flags}; echo $? >code; }} 2>&1 | true"
    ));
    assert_eq!(fs::read_to_string(place.path("code")).unwrap(), "0\n");
    place.assert_intact("t", 2);
}

#[test]
fn without_a_terminal_progress_is_plain_lines() {
    let place = Place::new();
    let done = place.train("r", 4, 2, &["--set=train.sample_count=2", "--set=train.sample_every=2"]).well();
    assert!(done.out.is_empty());
    for part in [
        "step 2: checkpoint runs/r/checkpoints/step-0000002\n",
        "step 2: samples runs/r/samples/step-0000002.png\n",
        "look at  runs/r/samples/step-0000004.png\n",
        "ddpm sample runs/r",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    let plain = |text: &str| text.chars().all(|c| c == '\n' || !c.is_control());
    assert!(plain(&done.err), "{:?}", done.err);
    let drawn = place.ddpm(&["sample", "r", "-n", "2"]).well();
    assert!(plain(&drawn.err) && plain(&drawn.out));
}

#[test]
fn the_doctor_tells_what_the_machine_has() {
    let done = Place::new().ddpm(&["doctor"]).well();
    for part in ["threads", "memory", "portable", " is used\n", "NVIDIA GPUs"] {
        assert!(done.out.contains(part), "{part}: {}", done.out);
    }
}
