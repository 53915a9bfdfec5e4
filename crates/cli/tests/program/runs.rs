//! `ddpm runs`.

use crate::support::{TestDir, copy, train};
use serde_json::Value;
use std::fs;

fn listed(dir: &TestDir) -> Vec<Value> {
    serde_json::from_str(&dir.ddpm(&["runs", "--json"]).succeeds().out).unwrap()
}

fn of<'a>(all: &'a [Value], name: &str) -> &'a Value {
    all.iter().find(|run| run["name"] == name).unwrap_or_else(|| panic!("{name} is not in {all:?}"))
}

#[test]
fn runs_are_listed_with_their_state_and_broken_ones_are_named() {
    let dir = TestDir::new();
    dir.ddpm(&["runs"]).fails(1, &["runs: there is no such folder", "--runs FOLDER"]);
    fs::create_dir(dir.path("runs")).unwrap();
    assert!(dir.ddpm(&["runs"]).succeeds().err.contains("no runs in runs"));

    dir.train("done", 3, 0, &[]).succeeds();
    // Further steps fail.
    dir.train("failed", 2, 0, &[]).succeeds();
    let explode =
        ["--lr=10", "--set=optimizer.name=adamw", "--set=optimizer.weight_decay=1000", "--steps=100"];
    dir.ddpm(&[&["train", "--resume", "failed", "--set=output.checkpoint_every=3"], &explode[..]].concat())
        .fails(1, &[]);
    let old = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../ddpm/tests/golden/old_run/run");
    copy(&old, &dir.path("runs/old"));
    fs::create_dir_all(dir.path("runs/broken/checkpoints")).unwrap();
    dir.train("damaged", 2, 0, &[]).succeeds();
    fs::write(dir.checkpoint("damaged", 2).join("manifest.json"), "{}").unwrap();
    fs::create_dir(dir.path("runs/notes")).unwrap();
    let golden = old.join("../../interop/attention.pth");
    dir.ddpm(&["import", golden.to_str().unwrap(), "--size=12", "--out=runs/imported"]).succeeds();
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::OsStr::from_bytes(b"odd\x1b[31m\xff");
        copy(&old, &dir.path("runs").join(name));
    }
    let mut child = dir.spawn(&train("busy", 1_000_000, 2, &[]));
    while !dir.checkpoint("busy", 2).exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let all = listed(&dir);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(all[0]["name"], "busy", "the latest first: {all:?}");
    assert_eq!(of(&all, "busy")["state"], "running");
    assert!(of(&all, "busy")["step"].as_u64() >= Some(2) && of(&all, "busy")["steps"] == 1_000_000);
    let done = of(&all, "done");
    assert_eq!(
        (&done["state"], &done["step"], &done["steps"], &done["checkpoint"]),
        (&"finished".into(), &3.into(), &3.into(), &3.into())
    );
    assert!(done["loss"].as_f64().unwrap() > 0.0 && done["bytes"].as_u64().unwrap() > 10_000);
    assert_eq!(
        (&done["data"], &done["image"], &done["network"]),
        (&"digits".into(), &"12x12x1".into(), &"attention".into())
    );
    // How it ended is not recorded; its checkpoint is of step 4 and its metrics end at step 8.
    let old = of(&all, "old");
    assert_eq!((&old["state"], &old["step"], &old["checkpoint"]), (&"stopped".into(), &8.into(), &4.into()));
    assert_eq!(of(&all, "imported")["state"], "imported");
    let failed = of(&all, "failed");
    assert!(
        failed["state"] == "failed" && failed["error"].as_str().unwrap().contains("not finite"),
        "{failed:?}"
    );
    for (name, part) in [("broken", "is not a run"), ("damaged", "no checkpoint is usable")] {
        let run = of(&all, name);
        assert!(run["state"] == "broken" && run["error"].as_str().unwrap().contains(part), "{run:?}");
    }
    assert!(!all.iter().any(|run| run["name"] == "notes"));
    #[cfg(target_os = "linux")]
    assert_eq!(of(&all, "odd\u{1b}[31m\u{fffd}")["state"], "stopped");

    let done = dir.ddpm(&["runs"]).succeeds();
    assert!(!done.out.contains('\u{1b}'), "{}", done.out);
    let line = |name: &str| {
        done.out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {}", done.out))
    };
    assert!(line("busy").contains("killed") && line("busy").contains(" of 1,000,000"), "{}", done.out);
    assert!(line("done").contains("3 of 3") && line("done").contains("digits 12x12x1"), "{}", done.out);
    assert!(
        done.err.contains("runs/broken: is not a run") && done.err.contains("runs/damaged: no checkpoint"),
        "{}",
        done.err
    );
    dir.ddpm(&["runs", "--runs", "runs/done"]).fails(1, &["is a run itself", "--runs runs"]);
}

#[cfg(unix)]
#[test]
fn a_run_whose_folder_disappears_stops_at_the_next_step() {
    let dir = TestDir::new();
    // Returns after the first step.
    let training = |name: &str| {
        let mut child = dir.spawn(&train(name, 1_000_000, 0, &[]));
        while fs::metadata(dir.path(format!("runs/{name}/metrics.jsonl"))).map_or(0, |m| m.len()) == 0 {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child
    };
    let child = training("r");
    fs::rename(dir.path("runs/r"), dir.path("moved")).unwrap();
    let done: crate::support::Done = child.wait_with_output().unwrap().into();
    done.fails(
        1,
        &["metrics.jsonl: cannot write the metrics: the file is gone", "removed, moved or unmounted"],
    );
    assert!(!dir.path("runs/r").exists(), "nothing is made in its dir");
    // Progress is saved if only the file is gone.
    let child = training("s");
    fs::remove_file(dir.path("runs/s/metrics.jsonl")).unwrap();
    let done: crate::support::Done = child.wait_with_output().unwrap().into();
    done.fails(1, &["the file is gone"]);
    let all = listed(&dir);
    assert_eq!(of(&all, "s")["state"], "failed");
    assert!(of(&all, "s")["checkpoint"].as_u64() > Some(0));
}
