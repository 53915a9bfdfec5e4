//! `ddpm import` and `ddpm export`.

use crate::support::{TestDir, names};
use std::fs;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../ddpm/tests/golden/interop");

fn golden(name: &str) -> String {
    format!("{GOLDEN}/{name}")
}

#[test]
fn a_pytorch_file_becomes_a_run_that_samples_and_trains() {
    let dir = TestDir::new();
    let import =
        ["import", &golden("attention.pth"), "--size=12", "--heads=2", "--timesteps=20", "--out=runs/r"];
    let done = dir.ddpm(&import).succeeds();
    assert_eq!(done.out, "runs/r\n");
    for part in [
        "network   attention, ",
        "down_channels = [8, 16]",
        "images  12x12, 1 channel\n",
        "diffusion T = 20, linear schedule, beta from 0.0001 to 0.02, predicting eps\n",
        "assumed   diffusion.prediction = eps, not recorded in the file (--set diffusion.prediction=x0 or v)",
        "assumed   diffusion.schedule = linear, not recorded in the file (--schedule NAME)",
        "ddpm train --resume runs/r --data FOLDER",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    assert!(!done.err.contains("assumed   diffusion.timesteps"), "{}", done.err);
    dir.assert_intact("r", 0);
    let card = fs::read_to_string(dir.path("runs/r/README.md")).unwrap();
    assert!(
        card.contains("- Training: imported") && card.contains("step-0000000/model.safetensors"),
        "{card}"
    );
    dir.ddpm(&["train", "--resume=r"]).fails(1, &["data.path: is unknown", "--data FOLDER"]);
    // Before sampling anything.
    dir.ddpm(&["nearest", "r"]).fails(1, &["data.path: is unknown", "--data FOLDER"]);
    assert!(!dir.path("runs/r/samples/seed-0").exists());
    dir.ddpm(&["nearest", "r", "--data=digits", "-n=2", "--steps=2"]).succeeds();
    let flags = ["--set=data.digits_count=16", "--steps=2", "--batch-size=2", "--set=output.sample_count=0"];
    dir.ddpm(&[&["train", "--resume=r", "--data=digits"], &flags[..]].concat()).succeeds();
    dir.assert_intact("r", 2);
    // Training initialized from the run, and from the file itself.
    for init in ["runs/r", &golden("attention.pth")] {
        let net = [
            "--set=attention.down_channels=[8, 16]",
            "--set=attention.mid_channels=[16, 16, 8]",
            "--set=attention.down_sample=[true]",
            "--set=attention.time_emb_dim=8",
            "--set=attention.num_heads=2",
            "--set=data.size=12",
            "--set=diffusion.timesteps=20",
        ];
        dir.ddpm(&[&["train", "--init", init], &net[..], &flags[..]].concat()).succeeds();
    }
}

#[test]
fn a_diffusers_folder_round_trips() {
    let dir = TestDir::new();
    dir.ddpm(&["import", &golden("classic"), "-o", "runs/r"]).succeeds();
    let config = fs::read_to_string(dir.path("runs/r/config.toml")).unwrap();
    assert!(config.contains("variance = \"large\""), "{config}");
    assert!(config.contains("use_clipped_model_output = false"), "{config}");
    let out = "runs/r/export/diffusers";
    assert_eq!(dir.ddpm(&["export", "r", "--to", "diffusers"]).succeeds().out, format!("{out}\n"));
    assert_eq!(names(&dir.path(out)), ["model_index.json", "scheduler", "unet"]);
    dir.ddpm(&["import", out, "-o", "runs/again"]).succeeds();
    for file in ["config.toml", "checkpoints/step-0000000/model.safetensors"] {
        let of = |run: &str| fs::read(dir.path("runs").join(run).join(file)).unwrap();
        assert!(of("r") == of("again"), "{file}");
    }
    dir.ddpm(&["export", "r", "--to", "diffusers"]).fails(1, &["diffusers: already exists", "--out"]);
    dir.ddpm(&["export", "r", "--to", "pytorch", "--weights", "ema"]).fails(1, &["no averaged weights"]);
    dir.ddpm(&["export", "r", "--to", "keras"]).fails(2, &["diffusers", "pytorch", "safetensors"]);
    assert_eq!(names(&dir.path("runs/r/export")), ["diffusers"]);
}

#[test]
fn failed_imports_leave_nothing_behind() {
    let dir = TestDir::new();
    fs::write(dir.path("text.pth"), "this is not a checkpoint").unwrap();
    fs::create_dir(dir.path("empty")).unwrap();
    fs::create_dir_all(dir.path("lone")).unwrap();
    fs::copy(golden("attention.pth"), dir.path("lone/a.pth")).unwrap();
    let refused = |args: &[&str], parts: &[&str]| {
        dir.ddpm(&[&["import"], args].concat()).fails(1, parts);
        assert!(!dir.path("runs").exists());
    };
    refused(
        &[&golden("evil-plain.pth")],
        &[
            "would call os.system when loaded in Python",
            "never executes code from a file, and ran none of it",
        ],
    );
    refused(&[&golden("evil-zip.pth")], &["would call posix.system"]);
    refused(&["nothing.pth"], &["nothing.pth: does not exist", ".pth, .pt, .ckpt, .bin"]);
    refused(&["text.pth"], &["text.pth: is neither a PyTorch file"]);
    refused(&["empty"], &["empty: is not a diffusers folder", "model_index.json"]);
    refused(&["lone"], &["give the file itself", "a.pth"]);
    refused(&[&golden("tensors.pth")], &["matches none of the networks", "it has tensors such as"]);
    let two = golden("kinds/two-networks.pt");
    refused(&[&two], &["\"first\" (weights), \"other\" (weights)", "ddpm import FILE --key NAME"]);
    refused(&[&two, "--key=third"], &["no weights named \"third\"", "\"first\" (weights)"]);
    refused(&[&golden("kinds/sparse.pth")], &["tensor conv0.weight is sparse", "tensor.to_dense()"]);
    let attention = golden("attention.pth");
    refused(&[&attention, "--size", "7"], &["7x7 cannot be halved"]);
    refused(&[&attention, "--size", "big"], &["--size big", "HEIGHTxWIDTH"]);
    refused(&[&attention, "--heads", "3"], &["attention.num_heads: 3 heads do not divide"]);
    refused(&[&attention, "--schedule", "lineer"], &["diffusion.schedule: "]);
    refused(
        &[&attention, "--set", "attention.time_emb_dim=16"],
        &["the weights of another network", "t_proj.0.weight is [8, 8], but the network's is [16, 16]"],
    );
    refused(&[&golden("classic"), "--heads", "2"], &["unet2d.attention_head_dim"]);
    dir.ddpm(&["import", &attention, "-o", "runs/r"]).succeeds();
    dir.ddpm(&["import", &attention, "-o", "runs/r"]).fails(1, &["runs/r already exists", "--out"]);
    dir.ddpm(&["import", "runs/r"]).fails(1, &["is already a ddpm run"]);
}

#[test]
fn an_import_reports_available_chosen_and_skipped_weights() {
    let dir = TestDir::new();
    let done = dir.ddpm(&["import", &golden("kinds/ema-pytorch.pt"), "--size=8", "--out=runs/a"]).succeeds();
    for part in [
        "ema-pytorch.pt, ema.ema_model.model (averaged)\n",
        "others (--key): \"model.model\" (raw), \"ema.online_model.model\" (raw)\n",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    let done = dir.ddpm(&["import", &golden("kinds/extras.pth"), "--size=8", "--out=runs/b"]).succeeds();
    let part = "note: skipped objects that need code outside the file, which ddpm never executes: best_loss (numpy.generic), ";
    assert!(done.err.contains(part) && done.err.contains("args (argparse.Namespace)"), "{}", done.err);
    dir.ddpm(&["sample", "runs/b", "-n=1", "--steps=2"]).succeeds();
}

#[test]
fn exports_carry_settings_and_classes_that_imports_read() {
    let dir = TestDir::new();
    let net = [
        "train",
        "--preset=digits",
        "--set=network.name=simple",
        "--set=simple.widths=4,8",
        "--set=simple.num_class_embeds=10",
        "--set=data.digits_count=16",
        "--set=data.size=16",
        "--set=output.sample_count=0",
        "--set=diffusion.timesteps=55",
        "--set=diffusion.schedule=cosine",
        "--steps=1",
        "--batch-size=2",
    ];
    dir.ddpm(&net).succeeds();
    for (format, file) in [("safetensors", "a.safetensors"), ("pytorch", "a.pth")] {
        dir.ddpm(&["export", "run-001", "--to", format, "--out", file]).succeeds();
        let done = dir.ddpm(&["import", file, "-o", &format!("runs/{format}")]).succeeds();
        assert!(!done.err.contains("assumed"), "{}", done.err);
        for part in
            ["images  16x16, 1 channel\n", "diffusion T = 55, cosine schedule", "classes   0, 1, 2, 3"]
        {
            assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
        }
        // Guidance needs the label dropout of training; the class is given by name.
        dir.ddpm(&["sample", format, "-n=1", "--steps=2", "--class=3", "--guidance=2"]).succeeds();
    }
}
