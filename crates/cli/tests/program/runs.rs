//! `ddpm runs`.

use crate::support::{Place, copy, train};
use serde_json::Value;
use std::fs;

fn listed(place: &Place) -> Vec<Value> {
    serde_json::from_str(&place.ddpm(&["runs", "--json"]).well().out).unwrap()
}

fn of<'a>(all: &'a [Value], name: &str) -> &'a Value {
    all.iter().find(|run| run["name"] == name).unwrap_or_else(|| panic!("{name} is not in {all:?}"))
}

#[test]
fn runs_are_listed_with_what_they_are_doing_and_broken_ones_are_named() {
    let place = Place::new();
    place.ddpm(&["runs"]).fails(1, &["runs: there is no such folder", "--runs FOLDER"]);
    fs::create_dir(place.path("runs")).unwrap();
    assert!(place.ddpm(&["runs"]).well().err.contains("no runs in runs"));

    place.train("done", 3, 0, &[]).well();
    // More steps are asked for, and they fail.
    place.train("failed", 2, 0, &[]).well();
    let explode = ["--lr=10", "--set=train.optimizer=adamw", "--set=train.weight_decay=1000", "--steps=100"];
    place
        .ddpm(&[&["train", "--resume", "failed", "--set=train.checkpoint_every=3"], &explode[..]].concat())
        .fails(1, &[]);
    let old = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../ddpm/tests/golden/old_run/run");
    copy(&old, &place.path("runs/old"));
    fs::create_dir_all(place.path("runs/broken/checkpoints")).unwrap();
    place.train("damaged", 2, 0, &[]).well();
    fs::write(place.checkpoint("damaged", 2).join("manifest.json"), "{}").unwrap();
    fs::create_dir(place.path("runs/notes")).unwrap();
    let golden = old.join("../../interop/attention.pth");
    place.ddpm(&["import", golden.to_str().unwrap(), "--size=12", "--out=runs/imported"]).well();
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::OsStr::from_bytes(b"odd\x1b[31m\xff");
        copy(&old, &place.path("runs").join(name));
    }
    let mut child = place.spawn(&train("busy", 1_000_000, 2, &[]));
    while !place.checkpoint("busy", 2).exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let all = listed(&place);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(all[0]["name"], "busy", "the last one first: {all:?}");
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
    // It says nothing of how it ended; its checkpoint is of step 4 and its record of step 8.
    let old = of(&all, "old");
    assert_eq!((&old["state"], &old["step"], &old["checkpoint"]), (&"stopped".into(), &8.into(), &4.into()));
    assert_eq!(of(&all, "imported")["state"], "imported");
    let failed = of(&all, "failed");
    assert!(
        failed["state"] == "failed" && failed["error"].as_str().unwrap().contains("not a finite number"),
        "{failed:?}"
    );
    for (name, part) in [("broken", "is no run"), ("damaged", "no checkpoint is whole")] {
        let run = of(&all, name);
        assert!(run["state"] == "broken" && run["error"].as_str().unwrap().contains(part), "{run:?}");
    }
    assert!(!all.iter().any(|run| run["name"] == "notes"));
    #[cfg(target_os = "linux")]
    assert_eq!(of(&all, "odd\u{1b}[31m\u{fffd}")["state"], "stopped");

    let done = place.ddpm(&["runs"]).well();
    assert!(!done.out.contains('\u{1b}'), "{}", done.out);
    let line = |name: &str| {
        done.out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {}", done.out))
    };
    assert!(line("busy").contains("killed") && line("busy").contains(" of 1,000,000"), "{}", done.out);
    assert!(line("done").contains("3 of 3") && line("done").contains("digits 12x12x1"), "{}", done.out);
    assert!(
        done.err.contains("runs/broken: is no run") && done.err.contains("runs/damaged: no checkpoint"),
        "{}",
        done.err
    );
    place.ddpm(&["runs", "--runs", "runs/done"]).fails(1, &["is a run itself", "--runs runs"]);
}

#[cfg(unix)]
#[test]
fn a_run_whose_folder_is_gone_stops_at_the_next_step() {
    let place = Place::new();
    // Until it has made a step.
    let training = |name: &str| {
        let mut child = place.spawn(&train(name, 1_000_000, 0, &[]));
        while fs::metadata(place.path(format!("runs/{name}/metrics.jsonl"))).map_or(0, |m| m.len()) == 0 {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child
    };
    let child = training("r");
    fs::rename(place.path("runs/r"), place.path("moved")).unwrap();
    let done: crate::support::Done = child.wait_with_output().unwrap().into();
    done.fails(
        1,
        &["metrics.jsonl: cannot write the metrics: the file is gone", "removed, moved or unmounted"],
    );
    assert!(!place.path("runs/r").exists(), "nothing is made in its place");
    // What was learnt is kept where the file alone is gone.
    let child = training("s");
    fs::remove_file(place.path("runs/s/metrics.jsonl")).unwrap();
    let done: crate::support::Done = child.wait_with_output().unwrap().into();
    done.fails(1, &["the file is gone"]);
    let all = listed(&place);
    assert_eq!(of(&all, "s")["state"], "failed");
    assert!(of(&all, "s")["checkpoint"].as_u64() > Some(0));
}
