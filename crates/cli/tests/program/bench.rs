//! `ddpm bench`.

use crate::support::{Done, TINY, TestDir, names};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

/// `ddpm bench` with the tiny network.
fn args<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["bench"], &TINY[..], more].concat()
}

fn bench(more: &[&str]) -> Done {
    let dir = TestDir::new();
    let done = dir.ddpm(&args(more)).succeeds();
    assert!(names(&dir.path("")).is_empty());
    done
}

/// A measured number, which must be positive.
#[track_caller]
fn positive(value: &Value) -> f64 {
    let number = value.as_f64().filter(|&v| v > 0.0);
    number.unwrap_or_else(|| panic!("{value} is not positive"))
}

#[test]
fn the_number_of_threads_is_a_flag() {
    let out = bench(&["--runs=1", "--only=forward", "--threads=1"]).out;
    assert!(out.contains(", 1 thread, "), "{out}");
}

#[test]
fn the_report_has_every_part() {
    let out = bench(&["--runs=1", "--profile"]).out;
    for part in [
        "attention, ",
        " parameters, batch 4, 12x12 grey, 2 threads, ",
        "\nf32 peak, ",
        "\ntrain ",
        " % of peak",
        "\n  forward ",
        "\n  backward ",
        "\n  update ",
        "\n  rest ",
        "\n  memory   arena ",
        "\nforward ",
        "\nsample ",
        "a step of 4 images, 20 steps each: ",
        "\nsample-one ",
        "a step of one image, ",
        "\nconv2d_weight_grad ",
        "\nslowest nodes\n",
    ] {
        assert!(out.contains(part), "{part:?} is not in: {out}");
    }
}

#[test]
fn json_reports_are_consistent() {
    let out = bench(&["--runs=2", "--json", "--profile", "--set=train.accumulate=2"]).out;
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["network"], "attention");
    assert_eq!(report["image"], serde_json::json!([12, 12, 1]));
    let peak = positive(&report["peak_gflops"]);
    assert!(peak < 1e5, "{peak}");
    let parts = report["parts"].as_array().unwrap();
    let names: Vec<_> = parts.iter().map(|p| p["part"].as_str().unwrap()).collect();
    assert_eq!(names, ["train", "forward", "sample", "sample-one"]);
    for part in parts {
        assert_eq!(part["runs"], 2);
        let [least, median, most] = ["least", "seconds", "most"].map(|k| positive(&part[k]));
        assert!(least <= median && median <= most);
        let images = positive(&part["images_per_second"]) * median * positive(&part["steps"]);
        assert!((images / positive(&part["images"]) - 1.0).abs() < 1e-9);
        if cfg!(target_os = "linux") {
            assert!(positive(&part["resident_bytes"]) >= positive(&part["arena_bytes"]));
        }
    }
    assert_eq!([&parts[0]["images"], &parts[1]["images"], &parts[3]["images"]], [8, 4, 1]);
    // Forward and backward of eight images against forward of four.
    let (step, pass) = (positive(&parts[0]["gflop"]), positive(&parts[1]["gflop"]));
    assert!((4.0..=6.5).contains(&(step / pass)), "{step} {pass}");
    let shares = parts[0]["shares"].as_array().unwrap();
    let of: f64 = shares.iter().map(|s| s["gflop"].as_f64().unwrap()).sum();
    assert!((of / step - 1.0).abs() < 1e-9);
    let operations = report["operations"].as_array().unwrap();
    let total: f64 = operations.iter().map(|o| o["share"].as_f64().unwrap()).sum();
    assert!((total - 1.0).abs() < 1e-9);
    assert!(!report["nodes"].as_array().unwrap().is_empty());
}

#[test]
fn random_images_have_any_size_and_channels_and_need_no_files() {
    let sets = ["--set=data.path=not-there", "--set=data.size=[16, 24]", "--set=data.channels=3"];
    let done = bench(&[&["--only=forward", "--runs=1", "--random-data"], &sets[..]].concat());
    assert!(done.out.contains("16x24 RGB"), "{}", done.out);
    assert!(done.out.contains("\nforward ") && !done.out.contains("\ntrain "), "{}", done.out);
    let classes = ["--set=network.name=unet2d", "--set=unet2d.num_class_embeds=3"];
    let small = ["--set=unet2d.block_out_channels=[32, 32]", "--set=unet2d.layers_per_block=1"];
    let blocks = [
        "--set=unet2d.down_block_types=['DownBlock2D', 'DownBlock2D']",
        "--set=unet2d.up_block_types=['UpBlock2D', 'UpBlock2D']",
    ];
    let done =
        bench(&[&["--only=train", "--runs=1", "--random-data"], &classes[..], &small, &blocks].concat());
    assert!(done.out.starts_with("unet2d, "), "{}", done.out);
}

#[test]
fn a_step_waits_for_its_line() {
    let dir = TestDir::new();
    for (flags, part) in [
        (&["--loop=on-line"][..], "train"),
        (&["--loop=on-line", "--only=forward"], "forward"),
        (&["--loop=on-line", "--only=sample"], "sample"),
    ] {
        let mut command = dir.command(&args(&[flags, &["--json"]].concat()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut to = child.stdin.take().unwrap();
        let mut from = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..3 {
            writeln!(to).unwrap();
            let step: Value = serde_json::from_str(&from.next().unwrap().unwrap()).unwrap();
            assert_eq!(step["part"], part);
            positive(&step["seconds"]);
        }
        drop(to);
        let report: Value = serde_json::from_str(&from.next().unwrap().unwrap()).unwrap();
        let parts = report["parts"].as_array().unwrap();
        assert_eq!((parts.len(), &parts[0]["part"], &parts[0]["runs"]), (1, &part.into(), &2.into()));
        assert!(from.next().is_none());
        assert!(child.wait().unwrap().success());
    }
}

#[cfg(unix)]
#[test]
fn a_loop_runs_until_its_output_is_closed() {
    let dir = TestDir::new();
    let flags = TINY.map(|f| format!("'{f}'")).join(" ");
    let done = dir.shell(&format!("{{ \"$ddpm\" bench --loop {flags} 2>err; echo $? >code; }} | head -n 3"));
    assert_eq!(done.out.lines().filter(|l| l.starts_with("train ") && l.ends_with(" s")).count(), 3);
    assert_eq!(std::fs::read_to_string(dir.path("err")).unwrap(), "");
    assert_eq!(std::fs::read_to_string(dir.path("code")).unwrap(), "0\n");
}

#[test]
fn invalid_benchmarks_are_rejected() {
    let dir = TestDir::new();
    dir.ddpm(&args(&["--loop", "--runs=3"])).fails(2, &["--runs"]);
    dir.ddpm(&args(&["--only=sampling"])).fails(2, &["sampling", "sample"]);
    dir.ddpm(&args(&["--random-data", "--set=data.size=13"])).fails(1, &["13x13"]);
    dir.ddpm(&args(&["--set=data.path=not-there"])).fails(1, &["not-there"]);
}
