//! `ddpm eval`.

use crate::support::{Place, image, names};
use std::fs;

/// The number behind a name in the table of sums.
fn bits(out: &str, name: &str) -> f64 {
    let line = out.lines().find(|l| l.trim_start().starts_with(name)).expect(name);
    line[name.len() + line.len() - line.trim_start().len()..]
        .split_whitespace()
        .find_map(|w| w.parse().ok())
        .expect(line)
}

#[test]
fn the_bound_is_told_in_sums_a_table_and_a_plot_and_is_the_same_again() {
    let place = Place::new();
    place.train("r", 40, 20, &[]).well();
    let done = place.ddpm(&["eval", "r", "--nll", "-n", "20", "--terms", "all"]).well();
    let (total, prior) = (bits(&done.out, "variational bound"), bits(&done.out, "prior, L_T"));
    let rest = bits(&done.out, "steps, L_1 ..") + bits(&done.out, "decoder, L_0");
    assert!((total - prior - rest).abs() < 3e-5 && total > 1.0, "{}", done.out);
    assert!(done.out.contains("of 20 images, by 19 of 19 steps' terms each"), "{}", done.out);
    let folder = place.path("runs/r/eval/step-0000040-n-20-terms-all");
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
    // Batches and threads change nothing but the last digits of sums.
    let again = ["eval", "r", "--nll", "-n", "20", "--terms", "all", "--batch-size", "7", "--threads", "1"];
    assert!((bits(&place.ddpm(&again).well().out, "variational bound") - total).abs() < 2e-5);
    // Fewer terms estimate the same; another checkpoint is another network.
    let few = place.ddpm(&["eval", "r", "--nll", "-n", "64", "--terms", "10", "--out", "few"]).well();
    assert!((bits(&few.out, "variational bound") / total - 1.0).abs() < 0.5, "{}", few.out);
    let early = ["eval", "r", "--nll", "-n", "20", "--terms", "all", "--checkpoint", "20"];
    assert!(bits(&place.ddpm(&early).well().out, "variational bound") != total);
}

#[test]
fn learned_variances_are_measured_sampled_and_refused_where_there_are_none() {
    let place = Place::new();
    place.train("l", 3, 0, &["--set=diffusion.learned_variance=true"]).well();
    place.train("f", 1, 0, &[]).well();
    for variance in [&[][..], &["--variance", "learned"], &["--variance", "small"], &["--variance", "large"]]
    {
        place.ddpm(&[&["eval", "l", "--nll", "-n", "4", "--terms", "5"], variance].concat()).well();
        place.ddpm(&[&["sample", "l", "-n", "2", "--steps", "5"], variance].concat()).well();
    }
    let drawn = |variance: &[&str]| {
        place.ddpm(&[&["sample", "l", "-n", "1", "--out", "o"], variance].concat()).well();
        fs::read(place.path("o/images/000000.png")).unwrap()
    };
    let own = drawn(&[]);
    assert!(own == drawn(&["--variance", "learned"]) && own != drawn(&["--variance", "large"]));
    place.ddpm(&["sample", "l", "-n", "1", "--sampler", "ddim", "--steps", "4"]).well();
    place
        .ddpm(&["sample", "l", "--sampler", "ddim", "--variance", "learned"])
        .fails(1, &["ddim has no choice of variances", "take ddpm"]);
    for command in [&["sample", "f"][..], &["eval", "f", "--nll"]] {
        let parts = ["the network has learnt no variance", "give small or large"];
        place.ddpm(&[command, &["--variance", "learned"]].concat()).fails(1, &parts);
    }
    let zero = ["--set=diffusion.learned_variance=true", "--set=diffusion.zero_terminal_snr=true"];
    place.train("z", 1, 0, &zero).fails(1, &["diffusion.learned_variance", "diffusion.prediction = v or x0"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    let refused = |args: &[&str], parts: &[&str]| {
        place.ddpm(&[&["eval", "r"], args].concat()).fails(1, parts);
    };
    refused(&["--nll", "-n", "0"], &["must be at least 1"]);
    refused(&["--nll", "--terms", "20"], &["terms: 20 is out of range; give 1 to 19"]);
    refused(&["--nll", "--terms", "few"], &["--terms few: give a number, or all"]);
    refused(&["--nll", "--data", "nowhere"], &["nowhere"]);
    refused(&["--nll", "--checkpoint", "7"], &["there is no checkpoint \"7\"; there are: step-0000001"]);
    // Images without the classes that the network must be told.
    fs::create_dir(place.path("held-out")).unwrap();
    image(&place.path("held-out/a.png"), 12, 12, 60);
    for (run, dropout) in [("told", "0"), ("both", "0.1")] {
        let dropout = format!("--set=train.label_dropout={dropout}");
        place.train(run, 1, 0, &["--set=attention.num_class_embeds=10", &dropout]).well();
    }
    let eval = ["--nll", "--data", "held-out", "--terms", "1"];
    place.ddpm(&[&["eval", "both"], &eval[..]].concat()).well();
    let parts =
        ["held-out: has no classes", "train.label_dropout = 0", "a folder for each of its 10 classes"];
    place.ddpm(&[&["eval", "told"], &eval[..]].concat()).fails(1, &parts);
}

#[test]
fn other_images_are_read_in_their_own_way_and_told_their_classes() {
    let place = Place::new();
    // A run on the images that a table names, of three classes.
    for (id, value) in [("a", 30), ("b", 120), ("c", 220)] {
        image(&place.path(format!("own/{id}.png")), 12, 12, value);
    }
    fs::write(place.path("own.csv"), "id,kind\na,ant\nb,bee\nc,cat\n").unwrap();
    let settings = [
        "--set=data.path=own",
        "--set=data.csv=own.csv",
        "--set=data.csv_label_column=kind",
        "--set=attention.num_class_embeds=3",
    ];
    place.train("r", 20, 0, &settings).well();
    let eval =
        |args: &[&str]| place.ddpm(&[&["eval", "r", "--nll", "-n", "1", "--terms", "all"], args].concat());
    let total = |args: &[&str]| {
        let done = eval(args).well();
        bits(&done.out, "variational bound")
    };
    // The same image in a folder of its class: nothing of the table is asked of it, and it is said.
    for class in ["ant", "bee", "dog"] {
        image(&place.path(format!("{class}s/{class}/x.png")), 12, 12, 120);
    }
    let done = eval(&["--data", "bees"]).well();
    assert!(
        done.err.contains("own.csv) is left out for bees; --set data.csv=FILE gives one"),
        "{}",
        done.err
    );
    let (ant, bee) = (total(&["--data", "ants"]), total(&["--data", "bees"]));
    assert!(ant != bee, "told the class by its name: {ant}");
    // The same again by a table, whose ids have another column and whose classes the run's.
    image(&place.path("flat/x.jpeg"), 12, 12, 0);
    fs::copy(place.path("bees/bee/x.png"), place.path("flat/x.png")).unwrap();
    fs::write(place.path("flat.csv"), "kind,file\nbee,x\n").unwrap();
    let table = ["--data", "flat", "--set", "data.csv=flat.csv", "--set", "data.csv_id_column=file"];
    assert_eq!(total(&table), bee);
    eval(&["--data", "dogs"]).fails(1, &["dogs: has a class \"dog\"; the run has the classes ant, bee, cat"]);
    eval(&["--set", "train.lr=1"]).fails(1, &["--set train.lr: only settings of the images"]);
    eval(&["--set", "data.cvs=x"]).fails(1, &["data.cvs"]);
}

#[test]
fn averages_are_chosen_by_name_and_made_afterwards() {
    let place = Place::new();
    let settings = [
        "--set=train.ema=fixed",
        "--set=train.ema_decays=0.5, 0.9",
        "--set=train.power_ema=0.05, 0.1",
        "--set=train.snapshot_every=4",
    ];
    place.train("r", 18, 9, &settings).well();
    let sample = |weights: &str| {
        let args = ["sample", "r", "-n", "1", "--steps", "4", "--out", "o", "--weights", weights];
        place.ddpm(&args).well();
        fs::read(place.path("o/images/000000.png")).unwrap()
    };
    for weights in ["raw", "ema", "ema-0.5", "ema-0.9", "power-0.05", "power-0.1"] {
        sample(weights);
    }
    let files = ["model", "ema", "ema-0.5", "ema-0.9", "power-0.05", "power-0.1"];
    let files = files.map(|f| fs::read(place.checkpoint("r", 18).join(format!("{f}.safetensors"))).unwrap());
    for (i, a) in files.iter().enumerate() {
        assert!(!files[..i].contains(a), "{i}");
    }
    let steps: Vec<String> = [4, 8, 12, 16, 18].map(|s| format!("step-{s:07}")).into();
    assert_eq!(names(&place.path("runs/r/snapshots")), steps);
    // A width that was kept is made of itself.
    let made = place.ddpm(&["average", "r", "--sigma-rel", "0.1"]).well();
    assert!(made.err.contains("of 10 snapshots up to step 18"), "{}", made.err);
    let file = "runs/r/averages/sigma-rel-0.1-step-0000018.safetensors";
    assert_eq!(made.out, format!("{file}\n"));
    let made = ddpm_weights(&place, file);
    let kept = ddpm_weights(&place, "runs/r/snapshots/step-0000018/power-0.1.safetensors");
    let far = made.iter().zip(&kept).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(made.len() == kept.len() && far < 1e-4, "{far}");
    sample(file);
    let middle =
        place.ddpm(&["average", "r", "--sigma-rel", "0.08", "--step", "12", "--out", "w.safetensors"]).well();
    assert!(middle.err.contains("of 6 snapshots up to step 12"), "{}", middle.err);
    place.ddpm(&["eval", "r", "--nll", "-n", "2", "--terms", "3", "--weights", "w.safetensors"]).well();
    // What is taken up makes its snapshots again, the same.
    let before = fs::read(place.path("runs/r/snapshots/step-0000012/power-0.1.safetensors")).unwrap();
    place.ddpm(&["train", "--resume", "r", "--checkpoint", "9"]).well();
    assert!(before == fs::read(place.path("runs/r/snapshots/step-0000012/power-0.1.safetensors")).unwrap());

    let refused = |args: &[&str], parts: &[&str]| place.ddpm(args).fails(1, parts);
    // A width that is wanted too late, whose average would be of the last steps alone.
    refused(
        &["train", "--resume", "r", "--steps", "20", "--set", "train.power_ema=0.05, 0.08"],
        &["train.power_ema: 0.08 is not kept in", "checkpoints/step-0000018", "--init"],
    );
    refused(&["average", "r", "--sigma-rel", "0.5"], &["0.5 is out of range", "0.05 to 0.15 being usual"]);
    refused(
        &["average", "r", "--sigma-rel", "0.1", "--step", "5"],
        &["no snapshot of step 5", "there are: 4, 8, 12"],
    );
    refused(
        &["sample", "r", "--weights", "ema-0.7"],
        &["no average \"ema-0.7\"; there are ema-0.5, ema-0.9, power-0.05"],
    );
    // A file of other weights is named, and not the checkpoint.
    let other = "runs/r/checkpoints/step-0000018/optimizer.safetensors";
    for command in [&["sample", "r"][..], &["export", "r", "--to", "safetensors"]] {
        let parts =
            ["ddpm: runs/r/checkpoints/step-0000018/optimizer.safetensors: these are another network's"];
        refused(&[command, &["--weights", other]].concat(), &parts);
    }
    place.train("plain", 1, 0, &[]).well();
    refused(&["average", "plain", "--sigma-rel", "0.1"], &["has no snapshots", "train.power_ema=0.05,0.1"]);
    place
        .train("half", 1, 0, &["--set=train.ema=half-life", "--set=train.ema_decays=[0.9]"])
        .fails(1, &["train.ema_decays"]);
    place
        .train("twice", 1, 0, &["--set=train.power_ema=0.1,0.1"])
        .fails(1, &["train.power_ema: 0.1 is there twice"]);
    place.ddpm(&["sample", "r", "--weights", "best"]).fails(2, &["give auto, ema, raw"]);
}

/// All numbers of a file of weights.
fn ddpm_weights(place: &Place, file: &str) -> Vec<f32> {
    let bytes = fs::read(place.path(file)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file.iter().collect();
    all.sort_by_key(|t| t.0.to_owned());
    let numbers =
        |v: &[u8]| v.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>();
    all.iter().flat_map(|(_, v)| numbers(v.data())).collect()
}
