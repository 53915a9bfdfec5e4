//! `ddpm import` and `ddpm export`.

use crate::support::{Place, names};
use std::fs;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../ddpm/tests/golden/interop");

fn golden(name: &str) -> String {
    format!("{GOLDEN}/{name}")
}

#[test]
fn a_file_of_pytorch_becomes_a_run_that_draws_and_learns() {
    let place = Place::new();
    let import =
        ["import", &golden("attention.pth"), "--size=12", "--heads=2", "--timesteps=20", "--out=runs/r"];
    let done = place.ddpm(&import).well();
    assert_eq!(done.out, "runs/r\n");
    for part in [
        "network   attention, ",
        "down_channels = [8, 16]",
        "images  12x12, 1 channel\n",
        "diffusion T = 20, linear schedule, beta from 0.0001 to 0.02, predicting eps\n",
        "assumed   diffusion.prediction = eps, which the file does not tell (--set diffusion.prediction=x0 or v)",
        "assumed   diffusion.schedule = linear, which the file does not tell (--schedule NAME)",
        "ddpm train --resume runs/r --data FOLDER",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    assert!(!done.err.contains("assumed   diffusion.timesteps"), "{}", done.err);
    place.assert_intact("r", 0);
    let card = fs::read_to_string(place.path("runs/r/README.md")).unwrap();
    assert!(
        card.contains("- Training: imported") && card.contains("step-0000000/model.safetensors"),
        "{card}"
    );
    place.ddpm(&["train", "--resume=r"]).fails(1, &["data.path: is not known", "--data FOLDER"]);
    // Before anything is drawn.
    place.ddpm(&["nearest", "r"]).fails(1, &["data.path: is not known", "--data FOLDER"]);
    assert!(!place.path("runs/r/samples/seed-0").exists());
    place.ddpm(&["nearest", "r", "--data=digits", "-n=2", "--steps=2"]).well();
    let flags = ["--set=data.digits_count=16", "--steps=2", "--batch-size=2", "--set=train.sample_count=0"];
    place.ddpm(&[&["train", "--resume=r", "--data=digits"], &flags[..]].concat()).well();
    place.assert_intact("r", 2);
    // The run, and the file itself, as the beginning of another training.
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
        place.ddpm(&[&["train", "--init", init], &net[..], &flags[..]].concat()).well();
    }
}

#[test]
fn a_folder_of_diffusers_goes_there_and_back() {
    let place = Place::new();
    place.ddpm(&["import", &golden("classic"), "-o", "runs/r"]).well();
    let config = fs::read_to_string(place.path("runs/r/config.toml")).unwrap();
    assert!(config.contains("variance = \"large\""), "{config}");
    assert!(config.contains("use_clipped_model_output = false"), "{config}");
    let out = "runs/r/export/diffusers";
    assert_eq!(place.ddpm(&["export", "r", "--to", "diffusers"]).well().out, format!("{out}\n"));
    assert_eq!(names(&place.path(out)), ["model_index.json", "scheduler", "unet"]);
    place.ddpm(&["import", out, "-o", "runs/again"]).well();
    for file in ["config.toml", "checkpoints/step-0000000/model.safetensors"] {
        let of = |run: &str| fs::read(place.path("runs").join(run).join(file)).unwrap();
        assert!(of("r") == of("again"), "{file}");
    }
    place.ddpm(&["export", "r", "--to", "diffusers"]).fails(1, &["diffusers: is there already", "--out"]);
    place.ddpm(&["export", "r", "--to", "pytorch", "--weights", "ema"]).fails(1, &["no averaged weights"]);
    place.ddpm(&["export", "r", "--to", "keras"]).fails(2, &["diffusers", "pytorch", "safetensors"]);
    assert_eq!(names(&place.path("runs/r/export")), ["diffusers"]);
}

#[test]
fn what_cannot_be_imported_is_refused_and_leaves_nothing() {
    let place = Place::new();
    fs::write(place.path("text.pth"), "this is not a checkpoint").unwrap();
    fs::create_dir(place.path("empty")).unwrap();
    fs::create_dir_all(place.path("lone")).unwrap();
    fs::copy(golden("attention.pth"), place.path("lone/a.pth")).unwrap();
    let refused = |args: &[&str], parts: &[&str]| {
        place.ddpm(&[&["import"], args].concat()).fails(1, parts);
        assert!(!place.path("runs").exists());
    };
    refused(
        &[&golden("evil-plain.pth")],
        &["would call os.system when Python loads it", "Nothing of it was run"],
    );
    refused(&[&golden("evil-zip.pth")], &["would call posix.system"]);
    refused(&["nothing.pth"], &["nothing.pth: there is no such file or folder", ".pth, .pt, .ckpt, .bin"]);
    refused(&["text.pth"], &["text.pth: is neither a file of PyTorch's"]);
    refused(&["empty"], &["empty: is no folder of diffusers", "model_index.json"]);
    refused(&["lone"], &["give the file itself", "a.pth"]);
    refused(&[&golden("tensors.pth")], &["is of none of our networks", "it has tensors as"]);
    let two = golden("kinds/two-networks.pt");
    refused(&[&two], &["\"first\" (weights), \"other\" (weights)", "ddpm import FILE --key NAME"]);
    refused(&[&two, "--key=third"], &["no weights called \"third\"", "\"first\" (weights)"]);
    refused(&[&golden("kinds/sparse.pth")], &["tensor conv0.weight is sparse", "tensor.to_dense()"]);
    let attention = golden("attention.pth");
    refused(&[&attention, "--size", "7"], &["7x7 cannot be halved"]);
    refused(&[&attention, "--size", "big"], &["--size big", "HEIGHTxWIDTH"]);
    refused(&[&attention, "--heads", "3"], &["attention.num_heads: 3 heads do not divide"]);
    refused(&[&attention, "--schedule", "lineer"], &["diffusion.schedule: "]);
    refused(
        &[&attention, "--set", "attention.time_emb_dim=16"],
        &["another network's weights", "t_proj.0.weight is [8, 8], the network's is [16, 16]"],
    );
    refused(&[&golden("classic"), "--heads", "2"], &["unet2d.attention_head_dim"]);
    place.ddpm(&["import", &attention, "-o", "runs/r"]).well();
    place.ddpm(&["import", &attention, "-o", "runs/r"]).fails(1, &["runs/r is there already", "--out"]);
    place.ddpm(&["import", "runs/r"]).fails(1, &["is a run of ddpm already"]);
}

#[test]
fn an_import_says_which_weights_there_are_which_were_taken_and_what_was_left_out() {
    let place = Place::new();
    let done = place.ddpm(&["import", &golden("kinds/ema-pytorch.pt"), "--size=8", "--out=runs/a"]).well();
    for part in [
        "ema-pytorch.pt, ema.ema_model.model (averaged)\n",
        "also there (--key): \"model.model\" (raw), \"ema.online_model.model\" (raw)\n",
    ] {
        assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
    }
    let done = place.ddpm(&["import", &golden("kinds/extras.pth"), "--size=8", "--out=runs/b"]).well();
    let part = "note: left out, as ddpm runs no code that could make them: best_loss (numpy.generic), ";
    assert!(done.err.contains(part) && done.err.contains("args (argparse.Namespace)"), "{}", done.err);
    place.ddpm(&["sample", "runs/b", "-n=1", "--steps=2"]).well();
}

#[test]
fn an_export_carries_settings_and_classes_and_an_import_takes_them_up() {
    let place = Place::new();
    let net = [
        "train",
        "--preset=digits",
        "--set=network.name=simple",
        "--set=simple.widths=4,8",
        "--set=simple.num_class_embeds=10",
        "--set=data.digits_count=16",
        "--set=data.size=16",
        "--set=train.sample_count=0",
        "--set=diffusion.timesteps=55",
        "--set=diffusion.schedule=cosine",
        "--steps=1",
        "--batch-size=2",
    ];
    place.ddpm(&net).well();
    for (format, file) in [("safetensors", "a.safetensors"), ("pytorch", "a.pth")] {
        place.ddpm(&["export", "run-001", "--to", format, "--out", file]).well();
        let done = place.ddpm(&["import", file, "-o", &format!("runs/{format}")]).well();
        assert!(!done.err.contains("assumed"), "{}", done.err);
        for part in
            ["images  16x16, 1 channel\n", "diffusion T = 55, cosine schedule", "classes   0, 1, 2, 3"]
        {
            assert!(done.err.contains(part), "{part:?} is not in: {}", done.err);
        }
        // Guidance needs to know that the network was trained for it, and a class goes by its name.
        place.ddpm(&["sample", format, "-n=1", "--steps=2", "--class=3", "--guidance=2"]).well();
    }
}
