//! End-to-end tests on GPUs, with a stand-in for NVIDIA's driver and NVRTC that emulates kernels
//! (`engine-cuda/tests/emulator/driver.cpp`). Skipped, with a message, without a C++ compiler.
#![cfg(unix)]

#[path = "../../engine-cuda/tests/emulator/build.rs"]
mod build;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "program/support.rs"]
mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use support::{Done, TestDir, losses, state, train};

const STEPS: u64 = 8;

/// Runs the program with the stand-in, which gets `settings`.
fn with_gpu(dir: &TestDir, folder: &Path, settings: &[(&str, &str)], args: &[String]) -> Done {
    let mut command = dir.command(args);
    command.env("LD_LIBRARY_PATH", folder).env("FAKE_CUDA_REPORT", dir.path("report"));
    command.env("DDPM_KERNEL_CACHE", dir.path("kernels"));
    command.envs(settings.iter().map(|(name, value)| (format!("FAKE_CUDA_{name}"), value)));
    command.output().unwrap().into()
}

/// The stand-in's folder; `None`, with a message, if it cannot be built, or when testing a lower CPU instruction set, which does not
/// matter here.
fn stand_in() -> Option<PathBuf> {
    if std::env::var_os("DDPM_ISA").is_some() {
        println!("skipped: DDPM_ISA does not affect GPUs");
        return None;
    }
    build::libraries(build::ALL)
}

/// The stand-in's counters.
fn report(dir: &TestDir) -> HashMap<String, u64> {
    let text = std::fs::read_to_string(dir.path("report")).unwrap();
    let pair = |line: &str| line.split_once(' ').map(|(what, n)| (what.to_owned(), n.parse().unwrap()));
    text.lines().filter_map(pair).collect()
}

fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|&a| a.to_owned()).collect()
}

#[test]
fn doctor_reports_gpus() {
    let Some(folder) = stand_in() else { return };
    let dir = TestDir::new();
    let done = with_gpu(&dir, &folder, &[], &words(&["doctor"])).succeeds();
    for part in
        ["supports CUDA up to 13.0", "12.9", "Stand-in GPU 0, compute capability 9.0, 4096 of 8192 MiB free"]
    {
        assert!(done.out.contains(part), "{part:?} is missing: {}", done.out);
    }
    for (old, reason) in
        [(("CAPABILITY", "7.5"), "8.0 (Ampere) or later"), (("DRIVER", "11040"), "12.0 is required")]
    {
        let done = with_gpu(&dir, &folder, &[old, ("DEVICES", "2")], &words(&["doctor"])).succeeds();
        assert!(done.out.contains("cuda:1") && done.out.contains(reason), "{}", done.out);
    }
}

#[test]
fn auto_uses_the_gpu_only_if_usable() {
    let Some(folder) = stand_in() else { return };
    let dir = TestDir::new();
    for (name, settings, launched) in [
        ("new", &[][..], true),
        ("old", &[("CAPABILITY", "7.5")], false),
        ("mixed", &[("DRIVER", "11080")], false),
    ] {
        with_gpu(&dir, &folder, settings, &train(name, 1, 0, &["--device=auto"])).succeeds();
        assert_eq!(report(&dir).contains_key("launches"), launched, "{name}");
    }
    let old = [("CAPABILITY", "7.5")];
    with_gpu(&dir, &folder, &old, &train("none", 1, 0, &["--device=cuda"]))
        .fails(1, &["7.5", "8.0 (Ampere)"]);
}

#[test]
fn training_resumes_to_the_same_weights_after_losing_the_gpu() {
    let Some(folder) = stand_in() else { return };
    let dir = TestDir::new();
    let more = [
        "--device=cuda",
        "--set=attention.num_mid_layers=1",
        "--batch-size=2",
        "--set=output.sample_count=1",
        "--set=output.sample_every=4",
        "--set=output.sample_steps=2",
    ];
    with_gpu(&dir, &folder, &[], &train("whole", STEPS, 2, &more)).succeeds();
    let counted = report(&dir);
    let left: Vec<_> = counted.iter().filter(|(what, n)| what.starts_with("left_") && **n > 0).collect();
    assert!(left.is_empty(), "not released: {left:?}");
    let (launches, want) = (counted["launches"], state(&dir.checkpoint("whole", STEPS)));
    assert!(counted["graph_launches"] >= STEPS);

    // During the step that is timed, in a later step, and a few launches before the last.
    let mut made_before = Vec::new();
    for (i, at) in [launches / STEPS / 3, launches * 5 / 8, launches - 3].into_iter().enumerate() {
        let (name, fail) = (format!("lost-{i}"), format!("launch:{at}:719"));
        let lost = with_gpu(&dir, &folder, &[("FAIL", &fail)], &train(&name, STEPS, 2, &more));
        lost.fails(1, &["cuda:0", "the GPU was lost", "--resume"]);
        let run = dir.path(format!("runs/{name}"));
        if !run.exists() {
            with_gpu(&dir, &folder, &[], &train(&name, STEPS, 2, &more)).succeeds();
            assert!(state(&dir.checkpoint(&name, STEPS)) == want, "{name}: other weights");
            continue;
        }
        let made = losses(&run).len() as u64;
        made_before.push(made);
        let whole = made / 2 * 2;
        if whole > 0 {
            // The checkpoint can be sampled from without a GPU.
            dir.assert_intact(&name, whole);
        }
        with_gpu(&dir, &folder, &[], &words(&["train", "--resume", &name])).succeeds();
        assert!(state(&dir.checkpoint(&name, STEPS)) == want, "{name}: other weights after {whole} steps");
        assert_eq!(losses(&run), losses(&dir.path("runs/whole")));
    }
    assert!(made_before.len() == 2 && (2..STEPS).contains(&made_before[0]), "{made_before:?}");
}
