//! Ctrl-C, `kill -9`, and resuming afterwards.

use crate::support::{Done, TestDir, image, losses, names, signal, state, train};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// Waits until `what` is true; the program must not exit before.
#[track_caller]
fn wait_until(child: &mut Child, mut what: impl FnMut() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before what was waited for");
        assert!(start.elapsed() < Duration::from_secs(60), "it takes too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn lines(path: &Path) -> u64 {
    std::fs::read_to_string(path).unwrap_or_default().lines().count() as u64
}

fn end(child: Child) -> Done {
    child.wait_with_output().unwrap().into()
}

/// SplitMix64 (Steele, Lea, Flood 2014), for the moments of kills.
struct Moments(u64);

impl Moments {
    /// Uniform in [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[test]
fn runs_killed_at_twenty_moments_and_resumed_end_with_the_same_bytes() {
    const STEPS: u64 = 24;
    const EVERY: u64 = 2;
    const KILLS: u32 = 20;
    let seed = match std::env::var("DDPM_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into(),
    };
    println!("moments of DDPM_TEST_SEED={seed}");
    let mut moments = Moments(seed);
    let dir = TestDir::new();
    let start = Instant::now();
    dir.train("never-stopped", STEPS, EVERY, &["--threads", "2"]).succeeds();
    let whole = start.elapsed();
    let expected = state(&dir.checkpoint("never-stopped", STEPS));
    let expected_losses = losses(&dir.path("runs/never-stopped"));
    assert!(expected_losses.iter().map(|l| l.0).eq(1..=STEPS));

    let (mut kills, mut in_writing, mut runs) = (0, 0, 0);
    while kills < KILLS {
        runs += 1;
        let name = format!("killed-{runs}");
        let run = dir.path(format!("runs/{name}"));
        let mut child = dir.spawn(&train(&name, STEPS, EVERY, &["--threads", "1"]));
        wait_until(&mut child, || run.join("metrics.jsonl").exists());
        loop {
            let start = Instant::now();
            let moment = whole.mul_f64(moments.next());
            // Every fourth kill waits until a checkpoint is being written.
            let is_time = || match kills % 4 {
                3 => names(&run.join("checkpoints")).iter().any(|n| n.starts_with(".tmp-")),
                _ => start.elapsed() >= moment,
            };
            while kills < KILLS && child.try_wait().unwrap().is_none() && !is_time() {
                std::thread::sleep(Duration::from_micros(200));
            }
            if kills == KILLS || child.try_wait().unwrap().is_some() {
                break;
            }
            signal(&child, "-9");
            child.wait().unwrap();
            kills += 1;
            in_writing += u32::from(names(&run.join("checkpoints")).iter().any(|n| n.starts_with(".tmp-")));
            let threads = if kills % 2 == 0 { "1" } else { "2" };
            child = dir.spawn(&["train", "--resume", &name, "--threads", threads]);
        }
        end(child).succeeds();
        assert!(state(&dir.checkpoint(&name, STEPS)) == expected, "{name} ended with other weights");
        assert_eq!(losses(&run), expected_losses, "{name}");
        dir.assert_intact(&name, STEPS);
    }
    println!("{kills} kills in {runs} runs, {in_writing} while a checkpoint was written or removed");
    assert!(in_writing > 0);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let dir = TestDir::new();
    for threads in ["1", "2", "3"] {
        dir.train(threads, 5, 0, &["--threads", threads]).succeeds();
    }
    let one = state(&dir.checkpoint("1", 5));
    assert!(one == state(&dir.checkpoint("2", 5)) && one == state(&dir.checkpoint("3", 5)));
    assert_eq!(losses(&dir.path("runs/1")), losses(&dir.path("runs/3")));
}

#[test]
fn ctrl_c_stops_after_the_step_with_a_checkpoint_to_resume_from() {
    const STEPS: u64 = 60;
    let dir = TestDir::new();
    // Steps long enough that `kill` takes less time than a few of them.
    let more = ["--size", "16", "--batch-size", "48"];
    dir.train("whole", STEPS, 0, &more).succeeds();
    let mut child = dir.spawn(&train("stopped", STEPS, 0, &more));
    let metrics = dir.path("runs/stopped/metrics.jsonl");
    wait_until(&mut child, || lines(&metrics) >= 3);
    signal(&child, "-INT");
    let seen = lines(&metrics);
    end(child).fails(130, &["stopped; resume with:  ddpm train --resume runs/stopped"]);
    let step = lines(&metrics);
    // The step in progress, and one that finished while the lines were counted.
    assert!(step <= seen + 2 && step < STEPS, "{step} steps were made, {seen} when it was stopped");
    dir.assert_intact("stopped", step);
    dir.ddpm(&["train", "--resume", "runs/stopped"]).succeeds();
    assert_eq!(losses(&dir.path("runs/stopped")), losses(&dir.path("runs/whole")));
    assert!(state(&dir.checkpoint("stopped", STEPS)) == state(&dir.checkpoint("whole", STEPS)));
}

#[test]
fn ctrl_c_during_sampling_stops_and_the_sheet_is_made_on_resuming() {
    let dir = TestDir::new();
    // 5000 denoising steps per sheet.
    let more =
        ["--set=diffusion.timesteps=5000", "--set=output.sample_count=4", "--set=output.sample_steps=0"];
    let mut child = dir.spawn(&train("r", 3, 0, &more));
    let checkpoint = dir.checkpoint("r", 3);
    wait_until(&mut child, || checkpoint.exists());
    signal(&child, "-INT");
    end(child).fails(130, &["--resume"]);
    let sheet = dir.path("runs/r/samples/step-0000003.png");
    assert!(!sheet.exists());
    dir.ddpm(&["train", "--resume", "r", "--set", "output.sample_steps=50"]).succeeds();
    assert!(sheet.exists());
}

/// Some images of 128x128 in the folder `images`.
fn large_images(dir: &TestDir) {
    for i in 0..4 {
        image(&dir.path(format!("images/{i}.png")), 128, 128, 60 * i);
    }
}

#[test]
fn ctrl_c_during_a_step_ends_within_two_seconds() {
    let dir = TestDir::new();
    // A step takes a minute or more.
    large_images(&dir);
    let slow = ["--set=network.name=simple", "--data=images", "--size=128", "--batch-size=64"];
    let mut child = dir.spawn(&train("r", 2, 1, &slow));
    let metrics = dir.path("runs/r/metrics.jsonl");
    wait_until(&mut child, || metrics.exists());
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none());
    let sent = Instant::now();
    signal(&child, "-INT");
    end(child).fails(130, &["stopped; resume with:  ddpm train --resume runs/r"]);
    assert!(sent.elapsed() < Duration::from_secs(2), "{:?}", sent.elapsed());
    assert_eq!(lines(&metrics), 0);
    assert!(names(&dir.path("runs/r/checkpoints")).is_empty());
}

#[test]
fn a_step_aborted_by_ctrl_c_is_repeated_bit_for_bit() {
    const STEPS: u64 = 4;
    let dir = TestDir::new();
    // Steps of half a second and more, with running statistics.
    large_images(&dir);
    let slow = [
        "--set=network.name=simple",
        "--set=simple.widths=[8, 16, 32]",
        "--data=images",
        "--size=128",
        "--batch-size=24",
    ];
    dir.train("whole", STEPS, 0, &slow).succeeds();
    let expected = state(&dir.checkpoint("whole", STEPS));
    for (i, moment) in [100, 300, 600].into_iter().enumerate() {
        let name = format!("stopped-{i}");
        let mut child = dir.spawn(&train(&name, STEPS, 0, &slow));
        let metrics = dir.path(format!("runs/{name}/metrics.jsonl"));
        wait_until(&mut child, || lines(&metrics) >= 1);
        std::thread::sleep(Duration::from_millis(moment));
        signal(&child, "-INT");
        end(child).fails(130, &["stopping: writing the checkpoint of step ", "--resume"]);
        dir.assert_intact(&name, lines(&metrics));
        dir.ddpm(&["train", "--resume", &name]).succeeds();
        assert!(state(&dir.checkpoint(&name, STEPS)) == expected, "{name}");
        let [a, b] = [&name, "whole"].map(|name| losses(&dir.path(format!("runs/{name}"))));
        assert_eq!(a, b, "{name}");
    }
}

#[test]
fn ctrl_c_works_while_timing_a_step_and_during_a_long_sampling_step() {
    let dir = TestDir::new();
    large_images(&dir);
    let slow = ["--set=network.name=simple", "--data=images", "--size=128", "--batch-size=64", "--dry-run"];
    let start = Instant::now();
    let mut child = dir.spawn(&train("r", 2, 1, &slow));
    while start.elapsed() < Duration::from_millis(1500) {
        assert!(child.try_wait().unwrap().is_none(), "it finished too early");
        std::thread::sleep(Duration::from_millis(10));
    }
    let sent = Instant::now();
    signal(&child, "-INT");
    end(child).fails(130, &["stopped"]);
    assert!(sent.elapsed() < Duration::from_secs(2), "{:?}", sent.elapsed());

    // In one batch: a denoising step of that many images takes seconds.
    dir.train("s", 1, 0, &["--size=64"]).succeeds();
    let mut child = dir.spawn(&["sample", "s", "-n", "512", "--batch-size", "512", "--steps", "5"]);
    let out = dir.path("runs/s/samples");
    wait_until(&mut child, || !names(&out).is_empty());
    std::thread::sleep(Duration::from_millis(300));
    let sent = Instant::now();
    signal(&child, "-INT");
    end(child).fails(130, &["stopped"]);
    assert!(sent.elapsed() < Duration::from_secs(2), "{:?}", sent.elapsed());
}

#[test]
fn the_second_ctrl_c_stops_at_once() {
    let dir = TestDir::new();
    // So many more weights than activations that a step is not abandoned once updates have started.
    let slow = [
        "--set=attention.down_channels=[256, 768]",
        "--set=attention.mid_channels=[768, 256]",
        "--batch-size=1",
    ];
    let mut child = dir.spawn(&train("r", 1000, 0, &slow));
    let metrics = dir.path("runs/r/metrics.jsonl");
    wait_until(&mut child, || lines(&metrics) > 0);
    let sent = Instant::now();
    for _ in 0..100 {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        signal(&child, "-INT");
    }
    let took = sent.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let done = end(child).fails(130, &[]);
    // It exited before finishing the step and saving.
    assert!(!done.err.contains("resume with"), "{}", done.err);
}

#[test]
fn ctrl_c_before_the_first_image_writes_nothing() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &["--set=diffusion.timesteps=5000"]).succeeds();
    let mut child = dir.spawn(&["sample", "r", "-n", "16"]);
    let out = dir.path("runs/r/samples/seed-0");
    wait_until(&mut child, || out.exists());
    signal(&child, "-INT");
    end(child).fails(130, &["nothing was written"]);
    assert!(!out.exists() || names(&out).is_empty());
}

#[test]
fn a_missing_image_loses_no_completed_step() {
    let dir = TestDir::new();
    for (i, value) in [(0, 30), (1, 90), (2, 150), (3, 210)] {
        image(&dir.path(format!("images/{i}.png")), 16, 16, value);
    }
    // Each image is read from disk whenever it is used.
    let from_disk = ["--data=images", "--set=data.memory_mib=0"];
    let mut child = dir.spawn(&train("r", 100_000, 0, &from_disk));
    let run = dir.path("runs/r");
    wait_until(&mut child, || lines(&run.join("metrics.jsonl")) > 2);
    std::fs::rename(dir.path("images/2.png"), dir.path("2.png")).unwrap();
    end(child).fails(1, &["2.png", "--resume"]);
    let made = lines(&run.join("metrics.jsonl"));
    dir.assert_intact("r", made);
    std::fs::rename(dir.path("2.png"), dir.path("images/2.png")).unwrap();
    let steps = made + 2;
    dir.ddpm(&["train", "--resume", "r", &format!("--steps={steps}")]).succeeds();
    // The same result as without interruption.
    dir.train("whole", steps, 0, &from_disk).succeeds();
    assert!(state(&dir.checkpoint("r", steps)) == state(&dir.checkpoint("whole", steps)));
}
