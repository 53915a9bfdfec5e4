//! `ddpm sample`.

use crate::support::{Place, image, names};
use std::fs;

#[test]
fn an_image_depends_on_its_number_and_the_seed_alone() {
    let place = Place::new();
    place.train("r", 3, 0, &[]).well();
    let draw = |out: &str, more: &[&str]| {
        place.ddpm(&[&["sample", "r", "--out", out], more].concat()).well();
        let images = place.path(out).join("images");
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
fn a_sample_folder_has_a_folder_of_nothing_but_images_and_all_else_beside() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    let folder = place.path("runs/r/samples/seed-0-steps-3");
    let draw = |more: &[&str]| {
        place.ddpm(&[&["sample", "r", "--steps", "3"], more].concat()).well();
        (names(&folder), names(&folder.join("images")))
    };
    let (beside, images) = draw(&["-n", "3", "--progress", "x0"]);
    assert_eq!(beside, ["grid.png", "images", "progress.gif", "progress.png", "request.json"]);
    assert_eq!(images, ["000000.png", "000001.png", "000002.png"]);
    let one = image::open(folder.join("images/000000.png")).unwrap();
    assert_eq!((one.width(), one.height(), one.color()), (12, 12, image::ColorType::L8), "as it was drawn");
    // What an earlier call left is not mixed with what a later one draws.
    assert_eq!(
        draw(&["-n", "2"]),
        (["grid.png", "images", "request.json"].map(str::to_owned).into(), images[..2].into())
    );
    // The images are a data set of ours as well.
    let done = place.ddpm(&["data", "check", "runs/r/samples/seed-0-steps-3/images"]).well();
    assert!(done.out.contains("images    2") && done.out.contains("12x12 grey"), "{}", done.out);
    // What an earlier version left has the images beside the grid.
    fs::remove_dir_all(&folder).unwrap();
    for name in ["0000.png", "0001.png", "grid.png"] {
        image(&folder.join(name), 12, 12, 9);
    }
    assert_eq!(draw(&["-n", "1"]).0, ["grid.png", "images", "request.json"]);
}

#[test]
fn grids_are_nearly_square_enlarged_labelled_and_show_no_more_than_can_be_seen() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    // Images of 12x12 are enlarged by 7, six pixels apart, twelve around.
    let high = |rows: u32| 24 + 90 * rows - 6;
    for (count, columns, rows) in [("7", 3, 3), ("8", 4, 2), ("9", 3, 3), ("64", 8, 8)] {
        let done = place.ddpm(&["sample", "runs/r", "-n", count, "--steps", "1"]).well();
        let grid = "runs/r/samples/seed-0-steps-1/grid.png";
        assert_eq!(done.out, format!("{grid}\n"));
        let (width, height) = image::image_dimensions(place.path(grid)).unwrap();
        assert!(
            height == high(rows) && (24 + 90 * columns..24 + 90 * (columns + 1)).contains(&width),
            "{count}"
        );
    }
    let draw = |more: &[&str]| {
        let done =
            place.ddpm(&[&["sample", "r", "-n", "150", "--steps", "1", "--out", "o"], more].concat()).well();
        (done.err, image::image_dimensions(place.path("o/grid.png")).ok())
    };
    let (told, size) = draw(&[]);
    assert!(told.contains("the grid shows the first 100 of 150 images; --grid N shows more"), "{told}");
    assert_eq!(size.unwrap().1, high(10));
    let (told, size) = draw(&["--grid", "4", "--resume"]);
    assert!(told.contains("the first 4 of 150") && size.unwrap().1 == high(2), "{told}");
    let (told, size) = draw(&["--grid", "200", "--resume"]);
    assert!(!told.contains("the grid shows") && size.unwrap().1 == high(10), "{told}, {size:?}");
    fs::remove_file(place.path("o/grid.png")).unwrap();
    assert_eq!(draw(&["--grid", "0", "--resume"]).1, None);
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
        // Under labels of 20 pixels, behind the numbers of the images.
        assert!(size.1 == 24 + 20 + 3 * 90 - 6 && size.0 > 24 + 10 * 90 - 6, "{size:?}");
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
        fs::read(place.path(&out).join("images/000000.png")).unwrap()
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
    let grid = image::image_dimensions(place.path("out--classall").join("grid.png")).unwrap();
    assert!(
        grid.1 == 24 + 10 * 90 - 6 && grid.0 > 24 + 8 * 90,
        "a row of each class, with its name: {grid:?}"
    );

    let refused = |args: &[&str], part: &str| {
        place.ddpm(&[&["sample", "r"], args].concat()).fails(1, &[part]);
    };
    refused(&["--class", "10"], "class: there is no class \"10\"; the run has the classes 0 to 9");
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
fn the_nearest_training_images_are_set_beside_the_samples() {
    let place = Place::new();
    place.train("r", 2, 0, &[]).well();
    let done = place.ddpm(&["nearest", "r", "-n", "5", "--sampler", "ddim", "--steps", "2"]).well();
    for part in
        ["samples to their nearest", "training images to their nearest other", "of 5 samples are nearer"]
    {
        assert!(done.out.contains(part), "{part}: {}", done.out);
    }
    let folder = place.path("runs/r/samples/seed-0-sampler-ddim-steps-2");
    let pairs = image::image_dimensions(folder.join("nearest.png")).unwrap();
    // Under labels, with captions of 22 pixels.
    assert!(pairs.1 == 24 + 20 + 2 * 112 - 6 && pairs.0 > 8 * 90, "four pairs a row: {pairs:?}");
    assert!(
        done.out.contains("too few to say whether the run copies (5 samples and 64 training images"),
        "{}",
        done.out
    );
    let table = fs::read_to_string(folder.join("nearest.csv")).unwrap();
    assert_eq!((table.lines().count(), names(&folder.join("images")).len()), (6, 5));
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
        fs::read(place.path(&out).join("images/000000.png")).unwrap()
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
fn ddim_takes_the_noise_from_the_clipped_image_by_default_and_as_predicted_where_it_is_asked() {
    let place = Place::new();
    place.train("r", 2, 1, &[]).well();
    let draw = |args: &[&str]| {
        let out = format!("out{}", args.concat());
        let sample = ["sample", "r", "-n", "1", "--sampler", "ddim", "--steps", "5", "--out", &out];
        place.ddpm(&[&sample, args].concat()).well();
        fs::read(place.path(&out).join("images/000000.png")).unwrap()
    };
    let config = fs::read_to_string(place.path("runs/r/config.toml")).unwrap();
    assert!(config.contains("use_clipped_model_output = true"), "{config}");
    let [clipped, predicted] = ["true", "false"].map(|used| draw(&["--use-clipped-model-output", used]));
    assert!(draw(&[]) == clipped && clipped != predicted);
    place
        .ddpm(&["sample", "r", "--sampler", "heun", "--use-clipped-model-output", "true"])
        .fails(1, &["heun has no use_clipped_model_output", "take ddim"]);
    place.ddpm(&["sample", "r", "--use-clipped-model-output", "often"]).fails(2, &["true", "false"]);
}

#[test]
fn lists_of_levels_that_leave_no_images_are_refused_by_name() {
    let place = Place::new();
    place.train("r", 2, 1, &["--set=diffusion.timesteps=1000"]).well();
    for sampler in ["ddim", "heun", "dpm++2m", "unipc"] {
        let sample =
            |more: &[&str]| place.ddpm(&[&["sample", "r", "-n", "1", "--sampler", sampler], more].concat());
        sample(&["--spacing", "sigma", "--steps", "20"]).fails(
            1,
            &["sigma in 20 steps leaves gaps of 8.28", "give karras or exponential, or at least 1575 steps"],
        );
        sample(&["--spacing", "uniform", "--steps", "1"])
            .fails(1, &["uniform in 1 step begins at t = 0", "trailing"]);
    }
}

#[test]
fn the_class_that_is_drawn_is_said_by_its_name() {
    let place = Place::new();
    for (i, name) in ["01", "02", "10"].iter().enumerate() {
        for k in 0..2 {
            image(&place.path(format!("months/{name}/{k}.png")), 12, 12, (50 * i + 9 * k) as u8);
        }
    }
    fs::create_dir(place.path("months/11")).unwrap();
    fs::write(place.path("months/11/a.png"), "no image").unwrap();
    let more = ["--data=months", "--on-bad-file=skip", "--set=attention.num_class_embeds=3"];
    let done = place.train("r", 2, 0, &more).well();
    assert!(done.err.contains("1 class without images left out (11): 3 of the 4 are left"), "{}", done.err);
    let card = fs::read_to_string(place.path("runs/r/README.md")).unwrap();
    assert!(card.contains("Their indices, from 0, are in this order: `01`, `02`, `10`."), "{card}");
    let draw = |more: &[&str]| place.ddpm(&[&["sample", "r", "--steps=2"], more].concat());
    assert!(draw(&["-n1", "--class=02"]).well().err.contains("class     02 (#1)\n"));
    assert!(draw(&["-n1", "--class=#2"]).well().err.contains("class     10 (#2)\n"));
    assert!(draw(&["--class=all"]).well().err.contains("rows      01, 02, 10, from the top\n"));
    assert!(draw(&["-n3"]).well().err.contains("classes   3 in turn: 01, 02, 10\n"));
    // Rows are of one length.
    draw(&["--class=all", "-n", "7"])
        .fails(1, &["each of the 3 classes, and 7 are no multiple of that: give -n 6 or -n 9"]);
    draw(&["--class=all", "-n", "2"]).fails(1, &["give -n 3"]);
    let done = draw(&["-n1", "--class=10", "--out=one"]).well();
    let other = draw(&["-n1", "--class=01", "--out=one", "--resume"]).fails(1, &["class is 10, and here 01"]);
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
fn an_input_of_240_bytes_in_its_name_has_results() {
    let place = Place::new();
    place.train("r", 1, 0, &[]).well();
    let name = format!("{}.png", "東".repeat(80));
    image(&place.path(&name), 12, 12, 90);
    let done = place.ddpm(&["denoise", "r", &name, "--sigma=0.1"]).well();
    assert!(place.path(done.out.trim()).is_file(), "{}", done.out);
    let long = format!("{}.png", "a".repeat(251));
    place.ddpm(&["data", "show", "digits", "--size=12", "-n4", "-o", &long]).well();
    assert!(place.path(&long).is_file());
}

#[test]
fn a_file_of_a_checkpoint_is_drawn_from_with_the_weights_in_it() {
    let place = Place::new();
    place.train("r", 2, 0, &[]).well();
    let draw = |run: &str, more: &[&str], out: &str| {
        let all = [&["sample", run, "-n1", "--sampler=ddim", "--steps=2", "--out", out], more].concat();
        place.ddpm(&all).well();
        fs::read(place.path(out).join("images/000000.png")).unwrap()
    };
    let folder = "runs/r/checkpoints/step-0000002";
    let (raw, ema) = (draw("r", &["--weights=raw"], "a"), draw("r", &["--weights=ema"], "b"));
    assert!(raw != ema);
    assert!(draw(&format!("{folder}/model.safetensors"), &[], "c") == raw);
    assert!(draw(&format!("{folder}/ema.safetensors"), &[], "d") == ema);
    let fails = |file: &str, more: &[&str], part: &str| {
        let file = format!("{folder}/{file}");
        place.ddpm(&[&["sample", &file], more].concat()).fails(1, &[part]);
    };
    fails("optimizer.safetensors", &[], "holds no weights of its own");
    fails("model.safetensors", &["--weights=ema"], "other weights than --weights asks for");
}
