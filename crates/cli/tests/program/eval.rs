//! `ddpm eval`.

use crate::support::{TestDir, image, names};
use std::fs;

/// The number after a name in the printed sums.
fn bits(out: &str, name: &str) -> f64 {
    let line = out.lines().find(|l| l.trim_start().starts_with(name)).expect(name);
    line[name.len() + line.len() - line.trim_start().len()..]
        .split_whitespace()
        .find_map(|w| w.parse().ok())
        .expect(line)
}

#[test]
fn the_bound_is_reported_as_sums_table_and_plot_and_is_reproducible() {
    let dir = TestDir::new();
    dir.train("r", 40, 20, &[]).succeeds();
    let done = dir.ddpm(&["eval", "r", "--nll", "-n", "20", "--terms", "all"]).succeeds();
    let (total, prior) = (bits(&done.out, "variational bound"), bits(&done.out, "prior, L_T"));
    let rest = bits(&done.out, "steps, L_1 ..") + bits(&done.out, "decoder, L_0");
    assert!((total - prior - rest).abs() < 3e-5 && total > 1.0, "{}", done.out);
    assert!(done.out.contains("over 20 images, with 19 of 19 step terms each"), "{}", done.out);
    let folder = dir.path("runs/r/eval/step-0000040-n-20-terms-all");
    assert_eq!(names(&folder), ["nll.csv", "nll.json", "nll.png"]);
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let (csv, json) = (read("nll.csv"), read("nll.json"));
    assert_eq!(csv.lines().count(), 1 + 20 + 1);
    assert!(
        csv.lines().nth(1).unwrap().starts_with("decoder,1,1,") && csv.contains("\nstep,20,20,"),
        "{csv}"
    );
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!((value["bound"]["total"]["mean"].as_f64().unwrap() - total).abs() < 1e-5);
    assert_eq!(image::image_dimensions(folder.join("nll.png")).unwrap(), (1240, 520));
    // Batch size and threads change only rounding.
    let again = ["eval", "r", "--nll", "-n", "20", "--terms", "all", "--batch-size", "7", "--threads", "1"];
    assert!((bits(&dir.ddpm(&again).succeeds().out, "variational bound") - total).abs() < 2e-5);
    // Fewer terms estimate the same value; another checkpoint differs.
    let few = dir.ddpm(&["eval", "r", "--nll", "-n", "64", "--terms", "10", "--out", "few"]).succeeds();
    assert!((bits(&few.out, "variational bound") / total - 1.0).abs() < 0.5, "{}", few.out);
    let early = ["eval", "r", "--nll", "-n", "20", "--terms", "all", "--checkpoint", "20"];
    assert!(bits(&dir.ddpm(&early).succeeds().out, "variational bound") != total);
}

#[test]
fn learned_variances_are_measured_sampled_and_rejected_without_any() {
    let dir = TestDir::new();
    dir.train("l", 3, 0, &["--set=diffusion.learned_variance=true"]).succeeds();
    dir.train("f", 1, 0, &[]).succeeds();
    for variance in [&[][..], &["--variance", "learned"], &["--variance", "small"], &["--variance", "large"]]
    {
        dir.ddpm(&[&["eval", "l", "--nll", "-n", "4", "--terms", "5"], variance].concat()).succeeds();
        dir.ddpm(&[&["sample", "l", "-n", "2", "--steps", "5"], variance].concat()).succeeds();
    }
    let sampled = |variance: &[&str]| {
        dir.ddpm(&[&["sample", "l", "-n", "1", "--out", "o"], variance].concat()).succeeds();
        fs::read(dir.path("o/images/000000.png")).unwrap()
    };
    let own = sampled(&[]);
    assert!(own == sampled(&["--variance", "learned"]) && own != sampled(&["--variance", "large"]));
    dir.ddpm(&["sample", "l", "-n", "1", "--sampler", "ddim", "--steps", "4"]).succeeds();
    dir.ddpm(&["sample", "l", "--sampler", "ddim", "--variance", "learned"])
        .fails(1, &["ddim has no variance setting", "use ddpm"]);
    for command in [&["sample", "f"][..], &["eval", "f", "--nll"]] {
        let parts = ["the network has no learned variance", "give small or large"];
        dir.ddpm(&[command, &["--variance", "learned"]].concat()).fails(1, &parts);
    }
    let zero = ["--set=diffusion.learned_variance=true", "--set=diffusion.zero_terminal_snr=true"];
    dir.train("z", 1, 0, &zero).fails(1, &["diffusion.learned_variance", "diffusion.prediction = v or x0"]);
}

#[test]
fn invalid_measurements_are_rejected() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    let refused = |args: &[&str], parts: &[&str]| {
        dir.ddpm(&[&["eval", "r"], args].concat()).fails(1, parts);
    };
    refused(&["--nll", "-n", "0"], &["must be at least 1"]);
    refused(&["--nll", "--terms", "20"], &["terms: 20 is out of range; give 1 to 19"]);
    refused(&["--nll", "--terms", "few"], &["--terms few: give a number, or all"]);
    refused(&["--nll", "--data", "nowhere"], &["nowhere"]);
    refused(&["--nll", "--checkpoint", "7"], &["there is no checkpoint \"7\"; available: step-0000001"]);
    // Images without the classes that the network requires.
    fs::create_dir(dir.path("held-out")).unwrap();
    image(&dir.path("held-out/a.png"), 12, 12, 60);
    for (run, dropout) in [("conditional", "0"), ("both", "0.1")] {
        let dropout = format!("--set=train.label_dropout={dropout}");
        dir.train(run, 1, 0, &["--set=attention.num_class_embeds=10", &dropout]).succeeds();
    }
    let eval = ["--nll", "--data", "held-out", "--terms", "1"];
    dir.ddpm(&[&["eval", "both"], &eval[..]].concat()).succeeds();
    let parts =
        ["held-out: has no classes", "train.label_dropout = 0", "one folder per class, of its 10 classes"];
    dir.ddpm(&[&["eval", "conditional"], &eval[..]].concat()).fails(1, &parts);
}

#[test]
fn other_images_have_their_own_data_settings_and_classes() {
    let dir = TestDir::new();
    // A run on the images listed in a table, with three classes.
    for (id, value) in [("a", 30), ("b", 120), ("c", 220)] {
        image(&dir.path(format!("own/{id}.png")), 12, 12, value);
    }
    fs::write(dir.path("own.csv"), "id,kind\na,ant\nb,bee\nc,cat\n").unwrap();
    let settings = [
        "--set=data.path=own",
        "--set=data.csv=own.csv",
        "--set=data.csv_label_column=kind",
        "--set=attention.num_class_embeds=3",
    ];
    dir.train("r", 20, 0, &settings).succeeds();
    let eval =
        |args: &[&str]| dir.ddpm(&[&["eval", "r", "--nll", "-n", "1", "--terms", "all"], args].concat());
    let total = |args: &[&str]| {
        let done = eval(args).succeeds();
        bits(&done.out, "variational bound")
    };
    // The same image in a class folder: the table does not apply, and a note says so.
    for class in ["ant", "bee", "dog"] {
        image(&dir.path(format!("{class}s/{class}/x.png")), 12, 12, 120);
    }
    let done = eval(&["--data", "bees"]).succeeds();
    assert!(
        done.err.contains("own.csv) is not used for bees; set one with --set data.csv=FILE"),
        "{}",
        done.err
    );
    let (ant, bee) = (total(&["--data", "ants"]), total(&["--data", "bees"]));
    assert!(ant != bee, "conditioned on the class by its name: {ant}");
    // The same with a table that has another id column and the run's classes.
    image(&dir.path("flat/x.jpeg"), 12, 12, 0);
    fs::copy(dir.path("bees/bee/x.png"), dir.path("flat/x.png")).unwrap();
    fs::write(dir.path("flat.csv"), "kind,file\nbee,x\n").unwrap();
    let table = ["--data", "flat", "--set", "data.csv=flat.csv", "--set", "data.csv_id_column=file"];
    assert_eq!(total(&table), bee);
    eval(&["--data", "dogs"]).fails(1, &["dogs: has a class \"dog\"; the run has the classes ant, bee, cat"]);
    eval(&["--set", "optimizer.lr=1"]).fails(1, &["--set optimizer.lr: only data settings"]);
    eval(&["--set", "data.cvs=x"]).fails(1, &["data.cvs"]);
}

#[test]
fn averages_are_chosen_by_name_and_computed_post_hoc() {
    let dir = TestDir::new();
    let settings = [
        "--set=ema.schedule=fixed",
        "--set=ema.extra_decays=0.5, 0.9",
        "--set=ema.power_widths=0.05, 0.1",
        "--set=ema.snapshot_every=4",
    ];
    dir.train("r", 18, 9, &settings).succeeds();
    let sample = |weights: &str| {
        let args = ["sample", "r", "-n", "1", "--steps", "4", "--out", "o", "--weights", weights];
        dir.ddpm(&args).succeeds();
        fs::read(dir.path("o/images/000000.png")).unwrap()
    };
    for weights in ["raw", "ema", "ema-0.5", "ema-0.9", "power-0.05", "power-0.1"] {
        sample(weights);
    }
    let files = ["model", "ema", "ema-0.5", "ema-0.9", "power-0.05", "power-0.1"];
    let files = files.map(|f| fs::read(dir.checkpoint("r", 18).join(format!("{f}.safetensors"))).unwrap());
    for (i, a) in files.iter().enumerate() {
        assert!(!files[..i].contains(a), "{i}");
    }
    let steps: Vec<String> = [4, 8, 12, 16, 18].map(|s| format!("step-{s:07}")).into();
    assert_eq!(names(&dir.path("runs/r/snapshots")), steps);
    // A width that was kept is reproduced.
    let made = dir.ddpm(&["average", "r", "--sigma-rel", "0.1"]).succeeds();
    assert!(made.err.contains("of 10 snapshots up to step 18"), "{}", made.err);
    let file = "runs/r/averages/sigma-rel-0.1-step-0000018.safetensors";
    assert_eq!(made.out, format!("{file}\n"));
    let made = ddpm_weights(&dir, file);
    let kept = ddpm_weights(&dir, "runs/r/snapshots/step-0000018/power-0.1.safetensors");
    let far = made.iter().zip(&kept).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(made.len() == kept.len() && far < 1e-4, "{far}");
    sample(file);
    let middle = dir
        .ddpm(&["average", "r", "--sigma-rel", "0.08", "--step", "12", "--out", "w.safetensors"])
        .succeeds();
    assert!(middle.err.contains("of 6 snapshots up to step 12"), "{}", middle.err);
    dir.ddpm(&["eval", "r", "--nll", "-n", "2", "--terms", "3", "--weights", "w.safetensors"]).succeeds();
    // A resumed run writes identical snapshots.
    let before = fs::read(dir.path("runs/r/snapshots/step-0000012/power-0.1.safetensors")).unwrap();
    dir.ddpm(&["train", "--resume", "r", "--checkpoint", "9"]).succeeds();
    assert!(before == fs::read(dir.path("runs/r/snapshots/step-0000012/power-0.1.safetensors")).unwrap());

    let refused = |args: &[&str], parts: &[&str]| dir.ddpm(args).fails(1, parts);
    // A width added too late would average only the last steps.
    refused(
        &["train", "--resume", "r", "--steps", "20", "--set", "ema.power_widths=0.05, 0.08"],
        &["ema.power_widths: 0.08 is not kept in", "checkpoints/step-0000018", "--init"],
    );
    refused(&["average", "r", "--sigma-rel", "0.5"], &["0.5 is out of range", "0.05 to 0.15 is usual"]);
    refused(
        &["average", "r", "--sigma-rel", "0.1", "--step", "5"],
        &["no snapshot of step 5", "available: 4, 8, 12"],
    );
    refused(
        &["sample", "r", "--weights", "ema-0.7"],
        &["no average \"ema-0.7\"; there are ema-0.5, ema-0.9, power-0.05"],
    );
    // The error names the file, not the checkpoint.
    let other = "runs/r/checkpoints/step-0000018/optimizer.safetensors";
    for command in [&["sample", "r"][..], &["export", "r", "--to", "safetensors"]] {
        let parts = [
            "ddpm: runs/r/checkpoints/step-0000018/optimizer.safetensors: these are the weights of another network",
        ];
        refused(&[command, &["--weights", other]].concat(), &parts);
    }
    dir.train("plain", 1, 0, &[]).succeeds();
    refused(&["average", "plain", "--sigma-rel", "0.1"], &["has no snapshots", "ema.power_widths=0.05,0.1"]);
    dir.train("half", 1, 0, &["--set=ema.schedule=half-life", "--set=ema.extra_decays=[0.9]"])
        .fails(1, &["ema.extra_decays"]);
    dir.train("twice", 1, 0, &["--set=ema.power_widths=0.1,0.1"])
        .fails(1, &["ema.power_widths: lists 0.1 twice"]);
    dir.ddpm(&["sample", "r", "--weights", "best"]).fails(2, &["give auto, ema, raw"]);
}

/// All values in a weights file.
fn ddpm_weights(dir: &TestDir, file: &str) -> Vec<f32> {
    let bytes = fs::read(dir.path(file)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file.iter().collect();
    all.sort_by_key(|t| t.0.to_owned());
    let numbers =
        |v: &[u8]| v.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    all.iter().flat_map(|(_, v)| numbers(v.data())).collect()
}
