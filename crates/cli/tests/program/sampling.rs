//! `ddpm sample`.

use crate::support::{TestDir, image, names};
use std::fs;

#[test]
fn an_image_depends_only_on_its_index_and_the_seed() {
    let dir = TestDir::new();
    dir.train("r", 3, 0, &[]).succeeds();
    let draw = |out: &str, more: &[&str]| {
        dir.ddpm(&[&["sample", "r", "--out", out], more].concat()).succeeds();
        let images = dir.path(out).join("images");
        names(&images).into_iter().map(|n| fs::read(images.join(n)).unwrap()).collect::<Vec<_>>()
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
fn a_sample_folder_keeps_images_apart_from_other_files() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    let folder = dir.path("runs/r/samples/seed-0-steps-3");
    let draw = |more: &[&str]| {
        dir.ddpm(&[&["sample", "r", "--steps", "3"], more].concat()).succeeds();
        (names(&folder), names(&folder.join("images")))
    };
    let (files, images) = draw(&["-n", "3", "--progress", "x0"]);
    assert_eq!(files, ["grid.png", "images", "progress.gif", "progress.png", "request.json"]);
    assert_eq!(images, ["000000.png", "000001.png", "000002.png"]);
    let one = image::open(folder.join("images/000000.png")).unwrap();
    assert_eq!((one.width(), one.height(), one.color()), (12, 12, image::ColorType::L8), "not enlarged");
    // A later call does not mix its images with those of an earlier one.
    assert_eq!(
        draw(&["-n", "2"]),
        (["grid.png", "images", "request.json"].map(str::to_owned).into(), images[..2].into())
    );
    // The images are a valid data set.
    let done = dir.ddpm(&["data", "check", "runs/r/samples/seed-0-steps-3/images"]).succeeds();
    assert!(done.out.contains("images      2") && done.out.contains("12x12 grey"), "{}", done.out);
    // An earlier version put images beside the grid.
    fs::remove_dir_all(&folder).unwrap();
    for name in ["0000.png", "0001.png", "grid.png"] {
        image(&folder.join(name), 12, 12, 9);
    }
    assert_eq!(draw(&["-n", "1"]).0, ["grid.png", "images", "request.json"]);
}

#[test]
fn grids_are_nearly_square_enlarged_labelled_and_limited() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    // 12x12 images are enlarged 7 times, six pixels apart with a margin of twelve.
    let high = |rows: u32| 24 + 90 * rows - 6;
    for (count, columns, rows) in [("7", 3, 3), ("8", 4, 2), ("9", 3, 3), ("64", 8, 8)] {
        let done = dir.ddpm(&["sample", "runs/r", "-n", count, "--steps", "1"]).succeeds();
        let grid = "runs/r/samples/seed-0-steps-1/grid.png";
        assert_eq!(done.out, format!("{grid}\n"));
        let (width, height) = image::image_dimensions(dir.path(grid)).unwrap();
        assert!(
            height == high(rows) && (24 + 90 * columns..24 + 90 * (columns + 1)).contains(&width),
            "{count}"
        );
    }
    let draw = |more: &[&str]| {
        let done = dir
            .ddpm(&[&["sample", "r", "-n", "150", "--steps", "1", "--out", "o"], more].concat())
            .succeeds();
        (done.err, image::image_dimensions(dir.path("o/grid.png")).ok())
    };
    let (message, size) = draw(&[]);
    assert!(message.contains("the grid shows the first 100 of 150 images; --grid N shows more"), "{message}");
    assert_eq!(size.unwrap().1, high(10));
    let (message, size) = draw(&["--grid", "4", "--resume"]);
    assert!(message.contains("the first 4 of 150") && size.unwrap().1 == high(2), "{message}");
    let (message, size) = draw(&["--grid", "200", "--resume"]);
    assert!(!message.contains("the grid shows") && size.unwrap().1 == high(10), "{message}, {size:?}");
    fs::remove_file(dir.path("o/grid.png")).unwrap();
    assert_eq!(draw(&["--grid", "0", "--resume"]).1, None);
}

#[test]
fn the_denoising_is_shown_at_ten_moments() {
    use image::AnimationDecoder;
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    for what in ["x0", "xt"] {
        let args = ["sample", "r", "-n", "3", "--progress", what, "--out", what];
        let done = dir.ddpm(&args).succeeds();
        assert_eq!(done.out.lines().count(), 3);
        let size = image::image_dimensions(dir.path(what).join("progress.png")).unwrap();
        // Below labels of 20 pixels, right of the image indices.
        assert!(size.1 == 24 + 20 + 3 * 90 - 6 && size.0 > 24 + 10 * 90 - 6, "{size:?}");
        let gif = fs::read(dir.path(what).join("progress.gif")).unwrap();
        let frames = image::codecs::gif::GifDecoder::new(std::io::Cursor::new(gif)).unwrap().into_frames();
        assert_eq!(frames.collect_frames().unwrap().len(), 10);
    }
    let strip = |what| fs::read(dir.path(what).join("progress.png")).unwrap();
    assert!(strip("x0") != strip("xt"));
}

#[test]
fn a_run_is_found_by_name_and_by_path() {
    let dir = TestDir::new();
    dir.train("first", 1, 0, &["--runs", "elsewhere"]).succeeds();
    let absolute = dir.path("elsewhere/first").display().to_string();
    for run in [&["first", "--runs", "elsewhere"][..], &["elsewhere/first"], &[&absolute]] {
        dir.ddpm(&[&["sample", "-n", "1", "--steps", "1"], run].concat()).succeeds();
    }
    dir.ddpm(&["sample", "frist", "--runs", "elsewhere"])
        .fails(1, &["frist: there is no such run; did you mean elsewhere/first?"]);
}

#[test]
fn sampling_without_a_checkpoint_is_an_error_with_a_remedy() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    fs::remove_dir_all(dir.checkpoint("r", 1)).unwrap();
    dir.ddpm(&["sample", "r"]).fails(1, &["r: has no checkpoint yet", "ddpm train --resume"]);
    assert!(names(&dir.path("runs/r/samples")).is_empty());
}

#[test]
fn invalid_requests_are_rejected() {
    let dir = TestDir::new();
    dir.train("r", 2, 1, &[]).succeeds();
    let refused = |args: &[&str], parts: &[&str]| {
        dir.ddpm(&[&["sample", "r"], args].concat()).fails(1, parts);
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
    refused(&["--sampler", "ddim", "--variance", "large"], &["ddim has no variance setting", "ddpm"]);
    assert!(names(&dir.path("runs/r/samples")).is_empty());
    let much = ["sample", "r", "-n", "18446744073709551615"];
    dir.ddpm(&much).fails(2, &["--count <N>': give an integer from 1 to 10000000"]);
    dir.ddpm(&["sample", "r", "--progress", "x1"]).fails(2, &["x0", "xt"]);
    dir.ddpm(&["sample", "r", "--spacing", "evenly"]).fails(2, &["give one of linspace, uniform, trailing"]);
}

#[test]
fn a_run_with_classes_samples_the_requested_ones() {
    let dir = TestDir::new();
    let settings = [
        "--set",
        "attention.num_class_embeds=10",
        "--set",
        "diffusion.prediction=v",
        "--set",
        "loss.weighting=min-snr",
    ];
    dir.train("r", 3, 0, &settings).succeeds();
    let draw = |args: &[&str]| {
        let out = format!("out{}", args.concat());
        let sampler = ["sample", "r", "--sampler", "ddim", "--steps", "3", "--out", &out];
        dir.ddpm(&[&sampler, args].concat()).succeeds();
        fs::read(dir.path(&out).join("images/000000.png")).unwrap()
    };
    let three = draw(&["--class", "3", "-n", "2"]);
    assert!(draw(&["-n", "1"]) != three, "image 0 has class 0");
    assert!(draw(&["--class", "0", "-n", "1"]) == draw(&["-n", "1"]));
    let guided = draw(&["--class", "3", "--guidance", "4", "-n", "2"]);
    assert!(
        guided != three
            && guided == draw(&["--class", "3", "--guidance", "4", "-n", "2", "--batch-size", "1"])
    );
    assert!(draw(&["--class", "3", "--guidance", "4", "--guidance-interval", "1e6,1e7", "-n", "1"]) == three);
    draw(&["--class", "all"]);
    let grid = image::image_dimensions(dir.path("out--classall").join("grid.png")).unwrap();
    assert!(
        grid.1 == 24 + 10 * 90 - 6 && grid.0 > 24 + 8 * 90,
        "a row of each class, with its name: {grid:?}"
    );

    let refused = |args: &[&str], part: &str| {
        dir.ddpm(&[&["sample", "r"], args].concat()).fails(1, &[part]);
    };
    refused(&["--class", "10"], "class: there is no class \"10\"; the run has the classes 0 to 9");
    refused(&["--class", "cat"], "class: there is no class \"cat\"; the run has the classes 0 to 9");
    refused(&["--guidance", "-1"], "guidance: -1 is out of range");
    refused(&["--guidance-interval", "3,1"], "give two sigmas");
    dir.train("plain", 1, 0, &[]).succeeds();
    for args in [["--class", "3"], ["--class", "all"], ["--guidance", "3"]] {
        dir.ddpm(&[&["sample", "plain"][..], &args].concat()).fails(1, &["trained without classes"]);
    }
    let none = ["--set", "attention.num_class_embeds=10", "--set", "train.label_dropout=0"];
    dir.train("conditional", 1, 0, &none).succeeds();
    dir.ddpm(&["sample", "conditional", "--guidance", "3"]).fails(1, &["train.label_dropout = 0"]);
}

#[test]
fn nearest_shows_samples_beside_their_training_images() {
    let dir = TestDir::new();
    dir.train("r", 2, 0, &[]).succeeds();
    let done = dir.ddpm(&["nearest", "r", "-n", "5", "--sampler", "ddim", "--steps", "2"]).succeeds();
    for part in
        ["samples to their nearest", "training images to their nearest other", "of 5 samples are nearer"]
    {
        assert!(done.out.contains(part), "{part}: {}", done.out);
    }
    let folder = dir.path("runs/r/samples/seed-0-sampler-ddim-steps-2");
    let pairs = image::image_dimensions(folder.join("nearest.png")).unwrap();
    // Below labels, with captions of 22 pixels.
    assert!(pairs.1 == 24 + 20 + 2 * 112 - 6 && pairs.0 > 8 * 90, "four pairs a row: {pairs:?}");
    assert!(
        done.out.contains("too few to tell whether the run memorizes (5 samples and 64 training images"),
        "{}",
        done.out
    );
    let table = fs::read_to_string(folder.join("nearest.csv")).unwrap();
    assert_eq!((table.lines().count(), names(&folder.join("images")).len()), (6, 5));
    let distance = |line: &str| line.rsplit(',').next().and_then(|d| d.parse::<f64>().ok()).unwrap();
    let distances: Vec<f64> = table.lines().skip(1).map(distance).collect();
    assert!(distances.is_sorted() && distances[0] > 0.0);
    dir.ddpm(&["nearest", "nowhere"]).fails(1, &["there is no such run"]);
}

#[test]
fn every_sampler_can_be_selected_by_name() {
    let dir = TestDir::new();
    dir.train("r", 2, 1, &[]).succeeds();
    let draw = |args: &[&str]| {
        let out = format!("out{}", args.concat());
        dir.ddpm(&[&["sample", "r", "-n", "1", "--out", &out], args].concat()).succeeds();
        fs::read(dir.path(&out).join("images/000000.png")).unwrap()
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

#[test]
fn ddim_uses_the_clipped_output_by_default_or_the_prediction_on_request() {
    let dir = TestDir::new();
    dir.train("r", 2, 1, &[]).succeeds();
    let draw = |args: &[&str]| {
        let out = format!("out{}", args.concat());
        let sample = ["sample", "r", "-n", "1", "--sampler", "ddim", "--steps", "5", "--out", &out];
        dir.ddpm(&[&sample, args].concat()).succeeds();
        fs::read(dir.path(&out).join("images/000000.png")).unwrap()
    };
    let config = fs::read_to_string(dir.path("runs/r/config.toml")).unwrap();
    assert!(config.contains("use_clipped_model_output = true"), "{config}");
    let [clipped, predicted] = ["true", "false"].map(|used| draw(&["--use-clipped-model-output", used]));
    assert!(draw(&[]) == clipped && clipped != predicted);
    dir.ddpm(&["sample", "r", "--sampler", "heun", "--use-clipped-model-output", "true"])
        .fails(1, &["heun has no use_clipped_model_output", "use ddim"]);
    dir.ddpm(&["sample", "r", "--use-clipped-model-output", "often"]).fails(2, &["true", "false"]);
}

#[test]
fn unusable_noise_levels_are_rejected_by_name() {
    let dir = TestDir::new();
    dir.train("r", 2, 1, &["--set=diffusion.timesteps=1000"]).succeeds();
    for sampler in ["ddim", "heun", "dpm++2m", "unipc"] {
        let sample =
            |more: &[&str]| dir.ddpm(&[&["sample", "r", "-n", "1", "--sampler", sampler], more].concat());
        sample(&["--spacing", "sigma", "--steps", "20"]).fails(
            1,
            &["sigma in 20 steps leaves gaps of 8.28", "give karras or exponential, or at least 1575 steps"],
        );
        sample(&["--spacing", "uniform", "--steps", "1"])
            .fails(1, &["uniform in 1 step starts at t = 0", "trailing"]);
    }
}

#[test]
fn sampled_classes_are_printed_by_name() {
    let dir = TestDir::new();
    for (i, name) in ["01", "02", "10"].iter().enumerate() {
        for k in 0..2 {
            image(&dir.path(format!("months/{name}/{k}.png")), 12, 12, (50 * i + 9 * k) as u8);
        }
    }
    fs::create_dir(dir.path("months/11")).unwrap();
    fs::write(dir.path("months/11/a.png"), "no image").unwrap();
    let more = ["--data=months", "--on-bad-file=skip", "--set=attention.num_class_embeds=3"];
    let done = dir.train("r", 2, 0, &more).succeeds();
    assert!(done.err.contains("1 class without images omitted (11): 3 of 4 remain"), "{}", done.err);
    let card = fs::read_to_string(dir.path("runs/r/README.md")).unwrap();
    assert!(card.contains("in the order of their indices, from 0: `01`, `02`, `10`."), "{card}");
    let draw = |more: &[&str]| dir.ddpm(&[&["sample", "r", "--steps=2"], more].concat());
    assert!(draw(&["-n1", "--class=02"]).succeeds().err.contains("class     02 (#1)\n"));
    assert!(draw(&["-n1", "--class=#2"]).succeeds().err.contains("class     10 (#2)\n"));
    assert!(draw(&["--class=all"]).succeeds().err.contains("rows      01, 02, 10, from the top\n"));
    assert!(draw(&["-n3"]).succeeds().err.contains("classes   3 in turn: 01, 02, 10\n"));
    // All rows have the same length.
    draw(&["--class=all", "-n", "7"])
        .fails(1, &["each of the 3 classes, and 7 is not a multiple: give -n 6 or -n 9"]);
    draw(&["--class=all", "-n", "2"]).fails(1, &["give -n 3"]);
    let done = draw(&["-n1", "--class=10", "--out=one"]).succeeds();
    let other = draw(&["-n1", "--class=01", "--out=one", "--resume"]).fails(1, &["class was 10, now 01"]);
    assert!(done.out.contains("one") && !other.err.contains("One("), "{}", other.err);
    draw(&["-n1", "--class=1"]).fails(
        1,
        &[
            "there is no class \"1\"; did you mean \"01\"?",
            "the classes 01, 02, 10",
            "index 1 is \"02\": --class=#1",
        ],
    );
}

#[test]
fn long_input_names_have_results() {
    let dir = TestDir::new();
    dir.train("r", 1, 0, &[]).succeeds();
    let name = format!("{}.png", "東".repeat(80));
    image(&dir.path(&name), 12, 12, 90);
    let done = dir.ddpm(&["denoise", "r", &name, "--sigma=0.1"]).succeeds();
    assert!(dir.path(done.out.trim()).is_file(), "{}", done.out);
    let long = format!("{}.png", "a".repeat(251));
    dir.ddpm(&["data", "show", "digits", "--size=12", "-n4", "-o", &long]).succeeds();
    assert!(dir.path(&long).is_file());
}

#[test]
fn a_checkpoint_file_selects_its_weights() {
    let dir = TestDir::new();
    dir.train("r", 2, 0, &[]).succeeds();
    let draw = |run: &str, more: &[&str], out: &str| {
        let all = [&["sample", run, "-n1", "--sampler=ddim", "--steps=2", "--out", out], more].concat();
        dir.ddpm(&all).succeeds();
        fs::read(dir.path(out).join("images/000000.png")).unwrap()
    };
    let folder = "runs/r/checkpoints/step-0000002";
    let (raw, ema) = (draw("r", &["--weights=raw"], "a"), draw("r", &["--weights=ema"], "b"));
    assert!(raw != ema);
    assert!(draw(&format!("{folder}/model.safetensors"), &[], "c") == raw);
    assert!(draw(&format!("{folder}/ema.safetensors"), &[], "d") == ema);
    let fails = |file: &str, more: &[&str], part: &str| {
        let file = format!("{folder}/{file}");
        dir.ddpm(&[&["sample", &file], more].concat()).fails(1, &[part]);
    };
    fails("optimizer.safetensors", &[], "does not hold model weights");
    fails("model.safetensors", &["--weights=ema"], "other weights than --weights requests");
}
