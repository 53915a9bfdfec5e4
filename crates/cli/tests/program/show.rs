//! `ddpm show`, and what a run shows of itself.

use crate::support::{Place, image, names};
use std::fs;
use std::path::Path;

/// The colours in a PNG.
fn open(path: &Path) -> image::RgbImage {
    image::open(path).unwrap().into_rgb8()
}

fn count(image: &image::RgbImage, colour: [u8; 3]) -> usize {
    image.pixels().filter(|p| p.0 == colour).count()
}

#[test]
fn schedules_are_plotted() {
    let place = Place::new();
    assert_eq!(place.ddpm(&["show", "schedules"]).well().out, "schedules.png\n");
    let all = open(&place.path("schedules.png"));
    let args =
        ["show", "schedules", "--schedule=cosine", "--schedule=linear", "--timesteps=300", "-o", "a.png"];
    assert_eq!(place.ddpm(&args).well().out, "a.png\n");
    let two = open(&place.path("a.png"));
    assert!(all.dimensions() == two.dimensions() && all.width() > all.height());
    // The third line's colour.
    assert!(count(&all, [0, 158, 115]) > 500 && count(&two, [0, 158, 115]) == 0);
    assert_eq!(names(&place.path("")), ["a.png", "schedules.png"]);

    place.ddpm(&["show", "schedules", "--schedule", "cosin"]).fails(2, &["cosin", "scaled-linear", "cosine"]);
    place.ddpm(&["show", "schedules", "--timesteps", "0"]).fails(1, &["diffusion.timesteps"]);
    place.ddpm(&["show", "schedules", "--set", "diffusion.beta_end=3"]).fails(1, &["diffusion.beta_end"]);
    place.ddpm(&["show", "schedules", "-o", "missing/a.png"]).fails(1, &["missing/a.png: cannot write"]);
}

#[test]
fn an_image_is_lost_in_noise() {
    let place = Place::new();
    image(&place.path("a.png"), 60, 90, 20);
    let args = ["show", "noising", "a.png", "--schedule=linear", "--schedule=cosine", "--timesteps=100"];
    assert_eq!(place.ddpm(&args).well().out, "noising.png\n");
    let strip = open(&place.path("noising.png"));
    // Ten images of 90 by 60 in each of two rows, the first of each as it is.
    assert!(strip.width() > 10 * 90 && strip.height() > 2 * 60, "{:?}", strip.dimensions());
    let same = count(&strip, [20; 3]);
    assert!((2 * (90 * 60 - 1)..3 * 90 * 60).contains(&same), "{same}");
    // Grey stays grey: nothing but the text and the images, none in colour.
    assert!(strip.pixels().all(|p| p.0[0] == p.0[1] && p.0[1] == p.0[2]));

    // The same seed, the same image.
    let bytes = fs::read(place.path("noising.png")).unwrap();
    place.ddpm(&args).well();
    assert!(fs::read(place.path("noising.png")).unwrap() == bytes);
    place.ddpm(&[&args[..], &["--seed=1"]].concat()).well();
    assert!(fs::read(place.path("noising.png")).unwrap() != bytes);
}

#[test]
fn noise_is_shown_of_data_sets_and_of_large_and_single_pixel_images() {
    let place = Place::new();
    let show = |args: &[&str]| place.ddpm(&[&["show", "noising", "--schedule=linear"], args].concat());
    show(&[]).well();
    for i in 0..3 {
        image(&place.path(format!("set/{i}.png")), 20, 30, 50 + i);
    }
    show(&["--data", "set", "--index", "2"]).well();
    assert!(count(&open(&place.path("noising.png")), [52; 3]) >= 20 * 30 - 1);
    show(&["--data", "set", "--index", "3"]).fails(1, &["set has 3 images", "--index 0 to 2"]);
    show(&["--data", "sets"]).fails(1, &["did you mean set?"]);
    show(&["set/0.png", "--data", "set"]).fails(2, &["cannot be used with"]);
    show(&["set/0.pgn"]).fails(1, &["did you mean", "0.png"]);
    show(&["--data", "set", "--size", "30x"]).fails(1, &["--size 30x", "HEIGHTxWIDTH"]);
    show(&["--data", "set", "--size", "0"]).fails(1, &["data.size", "out of range"]);

    image(&place.path("large.png"), 1000, 1500, 9);
    show(&["large.png"]).well();
    let (width, height) = open(&place.path("noising.png")).dimensions();
    assert!(width < 10 * 128 + 200 && height < 250, "{width}x{height}");
    show(&["large.png", "--size", "21x35"]).well();
    image(&place.path("dot.png"), 1, 1, 9);
    show(&["dot.png", "--timesteps", "1"]).well();
    fs::write(place.path("broken.png"), "no image").unwrap();
    show(&["broken.png"]).fails(1, &["broken.png"]);
}

#[test]
fn a_run_has_its_loss_curve_and_event_files_and_they_can_be_left_out() {
    let place = Place::new();
    let events = |run: &str| {
        let names = names(&place.path(format!("runs/{run}")));
        names.into_iter().filter(|n| n.starts_with("events.out.tfevents.")).count()
    };
    place.train("r", 4, 2, &["--set=train.sample_count=2"]).well();
    let first = fs::read(place.path("runs/r/loss.png")).unwrap();
    assert_eq!(events("r"), 1);
    place.ddpm(&["train", "--resume", "r", "--steps", "6"]).well();
    assert!(fs::read(place.path("runs/r/loss.png")).unwrap() != first);
    assert_eq!(events("r"), 2);
    // Nothing left to do, nothing written.
    place.ddpm(&["train", "--resume", "r"]).well();
    assert_eq!(events("r"), 2);

    place.train("quiet", 2, 2, &["--set=train.tensorboard=false"]).well();
    assert_eq!(events("quiet"), 0);
    assert!(place.path("runs/quiet/loss.png").is_file());
}

#[test]
fn a_plot_that_cannot_be_written_is_a_warning() {
    let place = Place::new();
    place.train("r", 2, 2, &[]).well();
    fs::remove_file(place.path("runs/r/loss.png")).unwrap();
    fs::create_dir(place.path("runs/r/loss.png")).unwrap();
    let done = place.ddpm(&["train", "--resume", "r", "--steps", "6"]).well();
    let warnings: Vec<_> = done.err.lines().filter(|l| l.starts_with("warning: ")).collect();
    assert!(matches!(warnings[..], [w] if w.contains("runs/r/loss.png")), "{}", done.err);
    place.assert_intact("r", 6);
}
