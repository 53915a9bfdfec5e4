//! The program with GPUs, as a person meets it, where NVIDIA's driver and NVRTC are a stand-in whose kernels are emulated
//! (`engine-cuda/tests/emulator/driver.cpp`). Skipped, with a line, where there is no C++ compiler.
#![cfg(unix)]

#[path = "../../engine-cuda/tests/emulator/build.rs"]
mod build;
#[allow(dead_code, reason = "the other tests' too")]
#[path = "program/support.rs"]
mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use support::{Done, Place, losses, state, train};

const STEPS: u64 = 8;

/// The program with the stand-in, and `settings` of it.
fn with_gpu(place: &Place, folder: &Path, settings: &[(&str, &str)], args: &[String]) -> Done {
    let mut command = place.command(args);
    command.env("LD_LIBRARY_PATH", folder).env("FAKE_CUDA_REPORT", place.path("report"));
    command.env("DDPM_KERNEL_CACHE", place.path("kernels"));
    command.envs(settings.iter().map(|(name, value)| (format!("FAKE_CUDA_{name}"), value)));
    command.output().unwrap().into()
}

/// The stand-in's folder; `None`, with a line, where it cannot be made, or where a lower instruction set is tested, which is no
/// matter here.
fn stand_in() -> Option<PathBuf> {
    if std::env::var_os("DDPM_ISA").is_some() {
        println!("skipped: with DDPM_ISA, as GPUs have no such thing");
        return None;
    }
    build::libraries(build::ALL)
}

/// What the stand-in counted.
fn report(place: &Place) -> HashMap<String, u64> {
    let text = std::fs::read_to_string(place.path("report")).unwrap();
    let pair = |line: &str| line.split_once(' ').map(|(what, n)| (what.to_owned(), n.parse().unwrap()));
    text.lines().filter_map(pair).collect()
}

fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|&a| a.to_owned()).collect()
}

#[test]
fn doctor_tells_what_is_there() {
    let Some(folder) = stand_in() else { return };
    let place = Place::new();
    let done = with_gpu(&place, &folder, &[], &words(&["doctor"])).well();
    for part in
        ["takes CUDA up to 13.0", "12.9", "Stand-in GPU 0, compute capability 9.0, 4096 of 8192 MiB free"]
    {
        assert!(done.out.contains(part), "{part:?} is missing: {}", done.out);
    }
    for (old, reason) in
        [(("CAPABILITY", "7.5"), "8.0 (Ampere) or later"), (("DRIVER", "11040"), "12.0 is needed")]
    {
        let done = with_gpu(&place, &folder, &[old, ("DEVICES", "2")], &words(&["doctor"])).well();
        assert!(done.out.contains("cuda:1") && done.out.contains(reason), "{}", done.out);
    }
}

#[test]
fn auto_takes_the_gpu_only_if_it_can_be_used() {
    let Some(folder) = stand_in() else { return };
    let place = Place::new();
    for (name, settings, launched) in [
        ("new", &[][..], true),
        ("old", &[("CAPABILITY", "7.5")], false),
        ("mixed", &[("DRIVER", "11080")], false),
    ] {
        with_gpu(&place, &folder, settings, &train(name, 1, 0, &["--device=auto"])).well();
        assert_eq!(report(&place).contains_key("launches"), launched, "{name}");
    }
    let old = [("CAPABILITY", "7.5")];
    with_gpu(&place, &folder, &old, &train("none", 1, 0, &["--device=cuda"]))
        .fails(1, &["7.5", "8.0 (Ampere)"]);
}

#[test]
fn a_training_whose_gpu_is_lost_goes_on_from_the_last_checkpoint_to_the_same_weights() {
    let Some(folder) = stand_in() else { return };
    let place = Place::new();
    let more = [
        "--device=cuda",
        "--set=attention.num_mid_layers=1",
        "--batch-size=2",
        "--set=train.sample_count=1",
        "--set=train.sample_every=4",
        "--set=train.sample_steps=2",
    ];
    with_gpu(&place, &folder, &[], &train("whole", STEPS, 2, &more)).well();
    let counted = report(&place);
    let left: Vec<_> = counted.iter().filter(|(what, n)| what.starts_with("left_") && **n > 0).collect();
    assert!(left.is_empty(), "not given back: {left:?}");
    let (launches, want) = (counted["launches"], state(&place.checkpoint("whole", STEPS)));
    assert!(counted["graph_launches"] >= STEPS);

    // In the step that tells how long training will take, in a later one, at the last launch but a few.
    let mut made_before = Vec::new();
    for (i, at) in [launches / STEPS / 3, launches * 5 / 8, launches - 3].into_iter().enumerate() {
        let (name, fail) = (format!("lost-{i}"), format!("launch:{at}:719"));
        let lost = with_gpu(&place, &folder, &[("FAIL", &fail)], &train(&name, STEPS, 2, &more));
        lost.fails(1, &["cuda:0", "the GPU was lost", "--resume"]);
        let run = place.path(format!("runs/{name}"));
        if !run.exists() {
            with_gpu(&place, &folder, &[], &train(&name, STEPS, 2, &more)).well();
            assert!(state(&place.checkpoint(&name, STEPS)) == want, "{name}: other weights");
            continue;
        }
        let made = losses(&run).len() as u64;
        made_before.push(made);
        let whole = made / 2 * 2;
        if whole > 0 {
            // A machine without a GPU draws from it.
            place.assert_intact(&name, whole);
        }
        with_gpu(&place, &folder, &[], &words(&["train", "--resume", &name])).well();
        assert!(state(&place.checkpoint(&name, STEPS)) == want, "{name}: other weights after {whole} steps");
        assert_eq!(losses(&run), losses(&place.path("runs/whole")));
    }
    assert!(made_before.len() == 2 && (2..STEPS).contains(&made_before[0]), "{made_before:?}");
}
