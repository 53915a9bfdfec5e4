//! `ddpm sample`.

use crate::support::{Place, names};
use std::fs;

#[test]
fn a_picture_depends_on_its_number_and_the_seed_alone() {
    let place = Place::new();
    place.train("r", 3, 0, &[]).well();
    let draw = |out: &str, more: &[&str]| {
        place.ddpm(&[&["sample", "r", "--out", out], more].concat()).well();
        let all = names(&place.path(out)).into_iter().filter(|n| n != "grid.png");
        all.map(|n| fs::read(place.path(out).join(n)).unwrap()).collect::<Vec<_>>()
    };
    let seven = draw("seven", &["-n", "7", "--batch-size", "7"]);
    assert_eq!(seven.len(), 7);
    assert!(seven[0] != seven[1]);
    assert!(draw("three", &["-n", "3"]) == seven[..3]);
    for batch in ["1", "2"] {
        for threads in ["1", "2"] {
            let out = format!("batch-{batch}-{threads}");
            let more = ["-n", "7", "--batch-size", batch, "--threads", threads];
            assert!(draw(&out, &more) == seven, "{more:?}");
        }
    }
    assert!(draw("seed", &["-n", "7", "--seed", "1"]).iter().zip(&seven).all(|(a, b)| a != b));
    assert!(draw("raw", &["-n", "7", "--weights", "raw"]) != seven);
}

#[test]
fn the_grid_has_eight_a_row_with_two_pixels_between() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    for (count, width, height) in [("7", 7 * 14 + 2, 16), ("8", 8 * 14 + 2, 16), ("9", 8 * 14 + 2, 30)] {
        let done = place.ddpm(&["sample", "runs/r", "-n", count, "--steps", "3"]).well();
        let grid = "runs/r/samples/seed-0-steps-3/grid.png";
        assert_eq!(done.out, format!("{grid}\n"));
        assert_eq!(image::image_dimensions(place.path(grid)).unwrap(), (width, height));
    }
    let folder = place.path("runs/r/samples/seed-0-steps-3");
    let one = image::open(folder.join("0000.png")).unwrap();
    assert_eq!((one.width(), one.height(), one.color()), (12, 12, image::ColorType::L8));
    // What an earlier call left is not mixed with what a later one draws.
    let draw = |more: &[&str]| {
        place.ddpm(&[&["sample", "r", "--steps", "3"], more].concat()).well();
        names(&folder)
    };
    draw(&["-n", "3", "--progress", "x0"]);
    assert_eq!(draw(&["-n", "2"]), ["0000.png", "0001.png", "grid.png"]);
}

#[test]
fn the_denoising_is_shown_in_ten_moments() {
    use image::AnimationDecoder;
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    for what in ["x0", "xt"] {
        let args = ["sample", "r", "-n", "3", "--progress", what, "--out", what];
        let done = place.ddpm(&args).well();
        assert_eq!(done.out.lines().count(), 3);
        let size = image::image_dimensions(place.path(what).join("progress.png")).unwrap();
        assert_eq!(size, (10 * 14 + 2, 3 * 14 + 2));
        let gif = fs::read(place.path(what).join("progress.gif")).unwrap();
        let frames = image::codecs::gif::GifDecoder::new(std::io::Cursor::new(gif)).unwrap().into_frames();
        assert_eq!(frames.collect_frames().unwrap().len(), 10);
    }
    let strip = |what| fs::read(place.path(what).join("progress.png")).unwrap();
    assert!(strip("x0") != strip("xt"));
}

#[test]
fn a_run_is_found_by_name_and_by_path() {
    let place = Place::new();
    place.train("first", 1, 0, &["--runs", "elsewhere"]).well();
    let absolute = place.path("elsewhere/first").display().to_string();
    for run in [&["first", "--runs", "elsewhere"][..], &["elsewhere/first"], &[&absolute]] {
        place.ddpm(&[&["sample", "-n", "1", "--steps", "1"], run].concat()).well();
    }
    place
        .ddpm(&["sample", "frist", "--runs", "elsewhere"])
        .fails(1, &["frist: there is no such run; did you mean elsewhere/first?"]);
}

#[test]
fn a_run_without_a_checkpoint_cannot_draw_and_the_way_out_is_said() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    fs::remove_dir_all(place.checkpoint("r", 1)).unwrap();
    place.ddpm(&["sample", "r"]).fails(1, &["r has no checkpoint yet", "ddpm train --resume"]);
    assert!(names(&place.path("runs/r/samples")).is_empty());
}

#[test]
fn impossible_requests_are_refused() {
    let place = Place::new();
    place.train("r", 2, 1, &[]).well();
    let refused = |args: &[&str], parts: &[&str]| {
        place.ddpm(&[&["sample", "r"], args].concat()).fails(1, parts);
    };
    refused(&["-n", "0"], &["-n and --batch-size must be at least 1"]);
    refused(&["--steps", "21"], &["the schedule allows 1 to 20"]);
    refused(&["--steps", "0"], &["the schedule allows 1 to 20"]);
    refused(&["--checkpoint", "7"], &["there is no checkpoint \"7\"", "step-0000001, step-0000002"]);
    refused(
        &["--sampler", "ddin"],
        &["there is no sampler \"ddin\"; did you mean ddim?", "the samplers are ddpm"],
    );
    refused(&["--eta", "0.5"], &["ddpm has no eta", "ddim"]);
    refused(&["--sampler", "ddim", "--eta", "2"], &["2 is out of range; give 0 (no noise) to 1"]);
    refused(&["--sampler", "ddim", "--variance", "large"], &["ddim has no choice of variances", "ddpm"]);
    assert!(names(&place.path("runs/r/samples")).is_empty());
    let much = ["sample", "r", "-n", "18446744073709551615"];
    place.ddpm(&much).fails(2, &["--count <N>': give an integer from 1 to 10000000"]);
    place.ddpm(&["sample", "r", "--progress", "x1"]).fails(2, &["x0", "xt"]);
    place
        .ddpm(&["sample", "r", "--spacing", "evenly"])
        .fails(2, &["give one of linspace, uniform, trailing"]);
}

#[test]
fn a_run_with_classes_draws_those_that_are_asked_for() {
    let place = Place::new();
    let settings = [
        "--set",
        "attention.num_class_embeds=10",
        "--set",
        "diffusion.prediction=v",
        "--set",
        "train.loss_weight=min-snr",
    ];
    place.train("r", 3, 0, &settings).well();
    let draw = |args: &[&str]| {
        let out = format!("out{}", args.concat());
        let sampler = ["sample", "r", "--sampler", "ddim", "--steps", "3", "--out", &out];
        place.ddpm(&[&sampler, args].concat()).well();
        fs::read(place.path(&out).join("0000.png")).unwrap()
    };
    let three = draw(&["--class", "3", "-n", "2"]);
    assert!(draw(&["-n", "1"]) != three, "picture 0 has class 0");
    assert!(draw(&["--class", "0", "-n", "1"]) == draw(&["-n", "1"]));
    let guided = draw(&["--class", "3", "--guidance", "4", "-n", "2"]);
    assert!(
        guided != three
            && guided == draw(&["--class", "3", "--guidance", "4", "-n", "2", "--batch-size", "1"])
    );
    assert!(draw(&["--class", "3", "--guidance", "4", "--guidance-interval", "1e6,1e7", "-n", "1"]) == three);
    draw(&["--class", "all"]);
    let grid = image::image_dimensions(place.path("out--classall").join("grid.png")).unwrap();
    assert_eq!(grid, (8 * 14 + 2, 10 * 14 + 2), "a row of each class");

    let refused = |args: &[&str], part: &str| {
        place.ddpm(&[&["sample", "r"], args].concat()).fails(1, &[part]);
    };
    refused(&["--class", "10"], "class: 10 is out of range; the run has the classes 0 to 9");
    refused(&["--class", "cat"], "class: there is no class \"cat\"; the run has the classes 0 to 9");
    refused(&["--guidance", "-1"], "guidance: -1 is out of range");
    refused(&["--guidance-interval", "3,1"], "give two sigmas");
    place.train("plain", 1, 0, &[]).well();
    for args in [["--class", "3"], ["--class", "all"], ["--guidance", "3"]] {
        place.ddpm(&[&["sample", "plain"][..], &args].concat()).fails(1, &["trained without classes"]);
    }
    let none = ["--set", "attention.num_class_embeds=10", "--set", "train.label_dropout=0"];
    place.train("told", 1, 0, &none).well();
    place.ddpm(&["sample", "told", "--guidance", "3"]).fails(1, &["train.label_dropout = 0"]);
}

#[test]
fn the_nearest_training_pictures_are_set_beside_the_samples() {
    let place = Place::new();
    place.train("r", 2, 0, &[]).well();
    let done = place.ddpm(&["nearest", "r", "-n", "5", "--sampler", "ddim", "--steps", "2"]).well();
    for part in
        ["samples to their nearest", "training pictures to their nearest other", "of 5 samples are nearer"]
    {
        assert!(done.out.contains(part), "{part}: {}", done.out);
    }
    let folder = place.path("runs/r/samples/seed-0-sampler-ddim-steps-2");
    let pairs = image::image_dimensions(folder.join("nearest.png")).unwrap();
    assert_eq!(pairs, (8 * 14 + 2, 2 * 14 + 2), "four pairs a row");
    let table = fs::read_to_string(folder.join("nearest.csv")).unwrap();
    assert_eq!((table.lines().count(), names(&folder).len()), (6, 5 + 3));
    let distance = |line: &str| line.rsplit(',').next().and_then(|d| d.parse::<f64>().ok()).unwrap();
    let distances: Vec<f64> = table.lines().skip(1).map(distance).collect();
    assert!(distances.is_sorted() && distances[0] > 0.0);
    place.ddpm(&["nearest", "nowhere"]).fails(1, &["there is no such run"]);
}

#[test]
fn every_sampler_can_be_asked_for_by_name() {
    let place = Place::new();
    place.train("r", 2, 1, &[]).well();
    let draw = |args: &[&str]| {
        let out = format!("out{}", args.concat());
        place.ddpm(&[&["sample", "r", "-n", "1", "--out", &out], args].concat()).well();
        fs::read(place.path(&out).join("0000.png")).unwrap()
    };
    for sampler in ddpm::sampler::SAMPLERS {
        draw(&["--sampler", sampler.name, "--steps", "4"]);
    }
    let ddim = |more: &[&str]| draw(&[&["--sampler", "ddim", "--steps", "5"], more].concat());
    assert!(ddim(&[]) == ddim(&["--eta", "0", "--spacing", "trailing"]));
    assert!(ddim(&[]) != ddim(&["--eta", "1"]) && ddim(&[]) != ddim(&["--spacing", "quadratic"]));
    assert!(draw(&["--variance", "small"]) != draw(&["--variance", "large"]));
    assert!(draw(&["--threshold", "clip"]) != draw(&["--threshold", "none"]));
}
