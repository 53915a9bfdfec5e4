//! Standard output, messages, help and settings.

use crate::support::{TINY, TUTORIAL, TestDir, names};
use std::fs;

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let dir = TestDir::new();
    let args = [&["train", "--dry-run", "--steps=7", "--threads=1"], &TINY[..]].concat();
    let done = dir.ddpm(&args).succeeds();
    for part in
        ["64 images, 12x12 grey", " parameters\n", " per checkpoint\n", "for 7 steps of ", "1 thread,"]
    {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    let memory = done.err.lines().find(|l| l.starts_with("memory ")).unwrap();
    assert!(memory.contains("network, optimizer and activations "), "{memory}");
    let data = done.err.lines().find(|l| l.starts_with("data ")).unwrap();
    assert!(data.contains("22.5 KiB in memory"), "{data}");
    assert!(names(&dir.path("")).is_empty());
}

#[test]
fn a_dry_run_with_slow_steps_prints_what_is_known_at_once_and_ends_soon() {
    use std::io::BufRead;
    let dir = TestDir::new();
    for i in 0..6 {
        crate::support::image(&dir.path(format!("cars/{i}.png")), 80, 100, 20 * i);
    }
    // 3e12 operations a step.
    let start = std::time::Instant::now();
    let mut child = dir.spawn(&["train", "--preset", "cars", "--data", "cars", "--dry-run", "--threads=2"]);
    let mut seen = Vec::new();
    for line in std::io::BufReader::new(child.stderr.take().unwrap()).lines() {
        seen.push((start.elapsed(), line.unwrap()));
    }
    assert!(child.wait().unwrap().success(), "{seen:?}");
    let at =
        |name: &str| seen.iter().find(|(_, line)| line.starts_with(name)).map(|(at, _)| at.as_secs_f64());
    // Much longer than an idle machine needs, much shorter than two steps.
    let order = ["network ", "memory ", "disk ", "data ", "time "].map(|name| at(name).expect(name));
    assert!(order.is_sorted() && order[2] < 5.0 && order[4] < 25.0, "{seen:?}");
    let time = &seen.last().unwrap().1;
    assert!(time.contains("for 5 steps of ") && time.contains("2 threads"), "{time}");
}

#[test]
fn a_dry_run_of_resuming_writes_nothing() {
    let dir = TestDir::new();
    dir.train("r", 4, 2, &[]).succeeds();
    let all = || {
        let mut files = vec![dir.path("runs/r")];
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
    let done = dir.ddpm(&args).succeeds();
    assert!(done.err.contains("for 7 steps of "), "{}", done.err);
    assert!(all() == before);
    dir.ddpm(&["train", "--resume", "r", "--checkpoint=3", "--dry-run"]).fails(1, &["no checkpoint \"3\""]);
}

#[test]
fn printed_settings_are_read_back() {
    let dir = TestDir::new();
    for preset in ["digits", "digits28"] {
        let printed = dir.ddpm(&["config", "--preset", preset]).succeeds().out;
        fs::write(dir.path("mine.toml"), &printed).unwrap();
        assert_eq!(dir.ddpm(&["config", "--config", "mine.toml"]).succeeds().out, printed);
        let args =
            ["train", "--config", "mine.toml", "--dry-run", "--set=data.digits_count=8", "--batch-size=1"];
        dir.ddpm(&args).succeeds();
    }
    let list = dir.ddpm(&["config", "--list"]).succeeds().out;
    assert!(["digits ", "digits28 ", "mnist "].iter().all(|name| list.contains(name)), "{list}");
}

#[test]
fn the_tutorials_file_is_read() {
    let dir = TestDir::new();
    let image = |class: u8| dir.path(format!("data/train/images/{class}/{class}.png"));
    for class in 0..3 {
        crate::support::image(&image(class), 28, 28, class);
    }
    fs::write(dir.path("default.yaml"), TUTORIAL).unwrap();
    let args = ["train", "--config", "default.yaml", "--dry-run", "--batch-size=1"];
    let done = dir.ddpm(&args).succeeds();
    for part in
        ["3 images, 28x28 grey", "3 classes", "for 120 steps of ", "note: train_params.ckpt_name is ignored"]
    {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    // The file's size wins over the images' own.
    crate::support::image(&image(1), 40, 32, 3);
    let done = dir.ddpm(&args).succeeds();
    assert!(done.err.contains("resized to 28x28"), "{}", done.err);
    let other = TUTORIAL.replace("im_size", "im_sice");
    fs::write(dir.path("default.yaml"), other).unwrap();
    dir.ddpm(&args).fails(1, &["default.yaml: line 9: model_params.im_sice", "did you mean im_size?"]);
}

#[test]
fn every_command_explains_itself_with_an_example() {
    let dir = TestDir::new();
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
        let done = dir.ddpm(command).succeeds();
        let (_, examples) = done.out.split_once("Example").expect(&done.out);
        assert!(examples.contains("  ddpm "), "{}", done.out);
        assert!(done.err.is_empty());
    }
    assert!(dir.ddpm(&["--version"]).succeeds().out.starts_with("ddpm "));
}

#[test]
fn shells_get_their_completions() {
    let dir = TestDir::new();
    for shell in ["bash", "zsh", "fish"] {
        let done = dir.ddpm(&["completions", shell]).succeeds();
        for part in ["batch-size", "completions", "noising", "scaled-linear"] {
            assert!(done.out.contains(part), "{part} {shell}: {}", done.out);
        }
    }
    dir.ddpm(&["completions", "bsh"]).fails(2, &["bash"]);
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_not_an_error() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    // The reader exits before the program starts.
    for command in ["config", "config --list", "completions bash", "sample r -n 1 --steps 1 --progress x0"] {
        dir.shell(&format!("{{ sleep 0.2; \"$ddpm\" {command} 2>err; echo $? >code; }} | true"));
        assert_eq!(fs::read_to_string(dir.path("err")).unwrap(), "", "{command}");
        assert_eq!(fs::read_to_string(dir.path("code")).unwrap(), "0\n", "{command}");
    }
    // Training continues when its messages have no reader.
    let flags = TINY.map(|f| format!("'{f}'")).join(" ");
    dir.shell(&format!(
        "{{ sleep 0.2; \"$ddpm\" train --name t --steps 2 {flags}; echo $? >code; }} 2>&1 | true"
    ));
    assert_eq!(fs::read_to_string(dir.path("code")).unwrap(), "0\n");
    dir.assert_intact("t", 2);
}

#[test]
fn without_a_terminal_progress_is_plain_lines() {
    let dir = TestDir::new();
    let done =
        dir.train("r", 4, 2, &["--set=output.sample_count=2", "--set=output.sample_every=2"]).succeeds();
    assert!(done.out.is_empty());
    for part in [
        "step 2: checkpoint runs/r/checkpoints/step-0000002\n",
        "step 2: samples runs/r/samples/step-0000002.png\n",
        "samples:  runs/r/samples/step-0000004.png\n",
        "ddpm sample runs/r",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    let plain = |text: &str| text.chars().all(|c| c == '\n' || !c.is_control());
    assert!(plain(&done.err), "{:?}", done.err);
    let sampled = dir.ddpm(&["sample", "r", "-n", "2"]).succeeds();
    assert!(plain(&sampled.err) && plain(&sampled.out));
}

#[test]
fn doctor_reports_the_machine() {
    let done = TestDir::new().ddpm(&["doctor"]).succeeds();
    for part in ["threads", "memory", "portable", " is used\n", "NVIDIA GPUs"] {
        assert!(done.out.contains(part), "{part}: {}", done.out);
    }
}
