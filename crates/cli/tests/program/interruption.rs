//! Ctrl-C, `kill -9`, and going on afterwards.

use crate::support::{Done, Place, image, losses, names, signal, state, train};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// Waits until `what` is so; the program must not end before.
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

/// SplitMix64 (Steele, Lea, Flood 2014): moments need no more.
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
fn runs_killed_at_twenty_moments_and_taken_up_end_with_the_same_bytes() {
    const STEPS: u64 = 24;
    const EVERY: u64 = 2;
    const KILLS: u32 = 20;
    let seed = match std::env::var("DDPM_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos().into(),
    };
    println!("moments of DDPM_TEST_SEED={seed}");
    let mut moments = Moments(seed);
    let place = Place::new();
    let begun = Instant::now();
    place.train("never-stopped", STEPS, EVERY, &["--threads", "2"]).well();
    let whole = begun.elapsed();
    let expected = state(&place.checkpoint("never-stopped", STEPS));
    let expected_losses = losses(&place.path("runs/never-stopped"));
    assert!(expected_losses.iter().map(|l| l.0).eq(1..=STEPS));

    let (mut kills, mut in_writing, mut runs) = (0, 0, 0);
    while kills < KILLS {
        runs += 1;
        let name = format!("killed-{runs}");
        let run = place.path(format!("runs/{name}"));
        let mut child = place.spawn(&train(&name, STEPS, EVERY, &["--threads", "1"]));
        wait_until(&mut child, || run.join("metrics.jsonl").exists());
        loop {
            let begun = Instant::now();
            let moment = whole.mul_f64(moments.next());
            // Every fourth kill waits for a checkpoint that is being written.
            let is_time = || match kills % 4 {
                3 => names(&run.join("checkpoints")).iter().any(|n| n.starts_with(".tmp-")),
                _ => begun.elapsed() >= moment,
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
            child = place.spawn(&["train", "--resume", &name, "--threads", threads]);
        }
        end(child).well();
        assert!(state(&place.checkpoint(&name, STEPS)) == expected, "{name} ended with other weights");
        assert_eq!(losses(&run), expected_losses, "{name}");
        place.assert_intact(&name, STEPS);
    }
    println!("{kills} kills in {runs} runs, {in_writing} while a checkpoint was written or removed");
    assert!(in_writing > 0);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let place = Place::new();
    for threads in ["1", "2", "3"] {
        place.train(threads, 5, 0, &["--threads", threads]).well();
    }
    let one = state(&place.checkpoint("1", 5));
    assert!(one == state(&place.checkpoint("2", 5)) && one == state(&place.checkpoint("3", 5)));
    assert_eq!(losses(&place.path("runs/1")), losses(&place.path("runs/3")));
}

#[test]
fn ctrl_c_ends_after_the_step_with_a_checkpoint_to_go_on_from() {
    const STEPS: u64 = 60;
    let place = Place::new();
    // Long steps, so that the kill command takes less time than a few of them.
    let more = ["--size", "16", "--batch-size", "48"];
    place.train("whole", STEPS, 0, &more).well();
    let mut child = place.spawn(&train("stopped", STEPS, 0, &more));
    let metrics = place.path("runs/stopped/metrics.jsonl");
    wait_until(&mut child, || lines(&metrics) >= 3);
    signal(&child, "-INT");
    let seen = lines(&metrics);
    end(child).fails(130, &["stopped; go on with:  ddpm train --resume runs/stopped"]);
    let step = lines(&metrics);
    // The step that was being made, and one that ended while the lines were counted.
    assert!(step <= seen + 2 && step < STEPS, "{step} steps were made, {seen} when it was stopped");
    place.assert_intact("stopped", step);
    place.ddpm(&["train", "--resume", "runs/stopped"]).well();
    assert_eq!(losses(&place.path("runs/stopped")), losses(&place.path("runs/whole")));
    assert!(state(&place.checkpoint("stopped", STEPS)) == state(&place.checkpoint("whole", STEPS)));
}

#[test]
fn ctrl_c_while_a_sheet_is_drawn_stops_and_the_sheet_is_drawn_later() {
    let place = Place::new();
    // 5000 denoising steps a sheet.
    let more = ["--set=diffusion.timesteps=5000", "--set=train.sample_count=4", "--set=train.sample_steps=0"];
    let mut child = place.spawn(&train("r", 3, 0, &more));
    let checkpoint = place.checkpoint("r", 3);
    wait_until(&mut child, || checkpoint.exists());
    signal(&child, "-INT");
    end(child).fails(130, &["--resume"]);
    let sheet = place.path("runs/r/samples/step-0000003.png");
    assert!(!sheet.exists());
    place.ddpm(&["train", "--resume", "r", "--set", "train.sample_steps=50"]).well();
    assert!(sheet.exists());
}

/// Some images of 128x128 in the folder `images`.
fn large_images(place: &Place) {
    for i in 0..4 {
        image(&place.path(format!("images/{i}.png")), 128, 128, 60 * i);
    }
}

#[test]
fn ctrl_c_in_the_middle_of_a_step_ends_within_two_seconds() {
    let place = Place::new();
    // A step takes a minute or more.
    large_images(&place);
    let slow = ["--set=network.name=simple", "--data=images", "--size=128", "--batch-size=64"];
    let mut child = place.spawn(&train("r", 2, 1, &slow));
    let metrics = place.path("runs/r/metrics.jsonl");
    wait_until(&mut child, || metrics.exists());
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none());
    let asked = Instant::now();
    signal(&child, "-INT");
    end(child).fails(130, &["stopped; go on with:  ddpm train --resume runs/r"]);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(lines(&metrics), 0);
    assert!(names(&place.path("runs/r/checkpoints")).is_empty());
}

#[test]
fn a_step_that_ctrl_c_breaks_off_is_made_again_with_the_same_bits() {
    const STEPS: u64 = 4;
    let place = Place::new();
    // Steps of half a second and more, with running statistics.
    large_images(&place);
    let slow = [
        "--set=network.name=simple",
        "--set=simple.widths=[8, 16, 32]",
        "--data=images",
        "--size=128",
        "--batch-size=24",
    ];
    place.train("whole", STEPS, 0, &slow).well();
    let expected = state(&place.checkpoint("whole", STEPS));
    for (i, moment) in [100, 300, 600].into_iter().enumerate() {
        let name = format!("stopped-{i}");
        let mut child = place.spawn(&train(&name, STEPS, 0, &slow));
        let metrics = place.path(format!("runs/{name}/metrics.jsonl"));
        wait_until(&mut child, || lines(&metrics) >= 1);
        std::thread::sleep(Duration::from_millis(moment));
        signal(&child, "-INT");
        end(child).fails(130, &["stopping: the checkpoint of step ", "--resume"]);
        place.assert_intact(&name, lines(&metrics));
        place.ddpm(&["train", "--resume", &name]).well();
        assert!(state(&place.checkpoint(&name, STEPS)) == expected, "{name}");
        let [a, b] = [&name, "whole"].map(|name| losses(&place.path(format!("runs/{name}"))));
        assert_eq!(a, b, "{name}");
    }
}

#[test]
fn ctrl_c_is_obeyed_while_a_step_is_timed_and_while_samples_are_drawn_in_one_long_step() {
    let place = Place::new();
    large_images(&place);
    let slow = ["--set=network.name=simple", "--data=images", "--size=128", "--batch-size=64", "--dry-run"];
    let begun = Instant::now();
    let mut child = place.spawn(&train("r", 2, 1, &slow));
    while begun.elapsed() < Duration::from_millis(1500) {
        assert!(child.try_wait().unwrap().is_none(), "it was over before");
        std::thread::sleep(Duration::from_millis(10));
    }
    let asked = Instant::now();
    signal(&child, "-INT");
    end(child).fails(130, &["stopped"]);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());

    // All at once: one denoising step of so many images takes seconds.
    place.train("s", 1, 0, &["--size=64"]).well();
    let mut child = place.spawn(&["sample", "s", "-n", "512", "--batch-size", "512", "--steps", "5"]);
    let out = place.path("runs/s/samples");
    wait_until(&mut child, || !names(&out).is_empty());
    std::thread::sleep(Duration::from_millis(300));
    let asked = Instant::now();
    signal(&child, "-INT");
    end(child).fails(130, &["stopped"]);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
}

#[test]
fn the_second_ctrl_c_stops_at_once() {
    let place = Place::new();
    // Weights of which there are so many more than activations that a step is not given up once updates have begun.
    let slow = [
        "--set=attention.down_channels=[256, 768]",
        "--set=attention.mid_channels=[768, 256]",
        "--batch-size=1",
    ];
    let mut child = place.spawn(&train("r", 1000, 0, &slow));
    let metrics = place.path("runs/r/metrics.jsonl");
    wait_until(&mut child, || lines(&metrics) > 0);
    let asked = Instant::now();
    for _ in 0..100 {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        signal(&child, "-INT");
    }
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let done = end(child).fails(130, &[]);
    // Not after it wrote what there is to write.
    assert!(!done.err.contains("go on with"), "{}", done.err);
}

#[test]
fn ctrl_c_while_drawing_writes_nothing() {
    let place = Place::new();
    place.train("r", 1, 0, &["--set=diffusion.timesteps=5000"]).well();
    let mut child = place.spawn(&["sample", "r", "-n", "16"]);
    let out = place.path("runs/r/samples/seed-0");
    wait_until(&mut child, || out.exists());
    signal(&child, "-INT");
    end(child).fails(130, &["nothing was written"]);
    assert!(!out.exists() || names(&out).is_empty());
}

#[test]
fn an_image_that_goes_missing_costs_no_step_that_was_made() {
    let place = Place::new();
    for (i, value) in [(0, 30), (1, 90), (2, 150), (3, 210)] {
        image(&place.path(format!("images/{i}.png")), 16, 16, value);
    }
    // Each is read from the disk whenever its turn comes.
    let from_disk = ["--data=images", "--set=data.memory_mib=0"];
    let mut child = place.spawn(&train("r", 100_000, 0, &from_disk));
    let run = place.path("runs/r");
    wait_until(&mut child, || lines(&run.join("metrics.jsonl")) > 2);
    std::fs::rename(place.path("images/2.png"), place.path("2.png")).unwrap();
    end(child).fails(1, &["2.png", "--resume"]);
    let made = lines(&run.join("metrics.jsonl"));
    place.assert_intact("r", made);
    std::fs::rename(place.path("2.png"), place.path("images/2.png")).unwrap();
    let steps = made + 2;
    place.ddpm(&["train", "--resume", "r", &format!("--steps={steps}")]).well();
    // As if nothing had happened.
    place.train("whole", steps, 0, &from_disk).well();
    assert!(state(&place.checkpoint("r", steps)) == state(&place.checkpoint("whole", steps)));
}
