//! `ddpm show`, and the plots of a run.

use crate::support::{TestDir, image, names};
use std::fs;
use std::path::Path;

/// A PNG as RGB.
fn open(path: &Path) -> image::RgbImage {
    image::open(path).unwrap().into_rgb8()
}

fn count(image: &image::RgbImage, colour: [u8; 3]) -> usize {
    image.pixels().filter(|p| p.0 == colour).count()
}

#[test]
fn schedules_are_plotted() {
    let dir = TestDir::new();
    assert_eq!(dir.ddpm(&["show", "schedules"]).succeeds().out, "schedules.png\n");
    let all = open(&dir.path("schedules.png"));
    let args =
        ["show", "schedules", "--schedule=cosine", "--schedule=linear", "--timesteps=300", "-o", "a.png"];
    assert_eq!(dir.ddpm(&args).succeeds().out, "a.png\n");
    let two = open(&dir.path("a.png"));
    assert!(all.dimensions() == two.dimensions() && all.width() > all.height());
    // The colour of the third line.
    assert!(count(&all, [0, 158, 115]) > 500 && count(&two, [0, 158, 115]) == 0);
    assert_eq!(names(&dir.path("")), ["a.png", "schedules.png"]);

    dir.ddpm(&["show", "schedules", "--schedule", "cosin"]).fails(2, &["cosin", "scaled-linear", "cosine"]);
    dir.ddpm(&["show", "schedules", "--timesteps", "0"]).fails(1, &["diffusion.timesteps"]);
    dir.ddpm(&["show", "schedules", "--set", "diffusion.beta_end=3"]).fails(1, &["diffusion.beta_end"]);
    dir.ddpm(&["show", "schedules", "-o", "missing/a.png"]).fails(1, &["missing/a.png: cannot write"]);
}

#[test]
fn an_image_is_noised() {
    let dir = TestDir::new();
    image(&dir.path("a.png"), 60, 90, 20);
    let args = ["show", "noising", "a.png", "--schedule=linear", "--schedule=cosine", "--timesteps=100"];
    assert_eq!(dir.ddpm(&args).succeeds().out, "noising.png\n");
    let strip = open(&dir.path("noising.png"));
    // Two rows of ten 90x60 images, the first of each without noise.
    assert!(strip.width() > 10 * 90 && strip.height() > 2 * 60, "{:?}", strip.dimensions());
    let same = count(&strip, [20; 3]);
    assert!((2 * (90 * 60 - 1)..3 * 90 * 60).contains(&same), "{same}");
    // Grey images stay grey, and the text has no colour.
    assert!(strip.pixels().all(|p| p.0[0] == p.0[1] && p.0[1] == p.0[2]));

    // The same seed, the same image.
    let bytes = fs::read(dir.path("noising.png")).unwrap();
    dir.ddpm(&args).succeeds();
    assert!(fs::read(dir.path("noising.png")).unwrap() == bytes);
    dir.ddpm(&[&args[..], &["--seed=1"]].concat()).succeeds();
    assert!(fs::read(dir.path("noising.png")).unwrap() != bytes);
}

#[test]
fn data_sets_and_large_and_single_pixel_images_are_noised() {
    let dir = TestDir::new();
    let show = |args: &[&str]| dir.ddpm(&[&["show", "noising", "--schedule=linear"], args].concat());
    show(&[]).succeeds();
    for i in 0..3 {
        image(&dir.path(format!("set/{i}.png")), 20, 30, 50 + i);
    }
    show(&["--data", "set", "--index", "2"]).succeeds();
    assert!(count(&open(&dir.path("noising.png")), [52; 3]) >= 20 * 30 - 1);
    show(&["--data", "set", "--index", "3"]).fails(1, &["set has 3 images", "--index 0 to 2"]);
    show(&["--data", "sets"]).fails(1, &["did you mean set?"]);
    show(&["set/0.png", "--data", "set"]).fails(2, &["cannot be used with"]);
    show(&["set/0.pgn"]).fails(1, &["did you mean", "0.png"]);
    show(&["--data", "set", "--size", "30x"]).fails(1, &["--size 30x", "HEIGHTxWIDTH"]);
    show(&["--data", "set", "--size", "0"]).fails(1, &["data.size", "out of range"]);

    image(&dir.path("large.png"), 1000, 1500, 9);
    show(&["large.png"]).succeeds();
    let (width, height) = open(&dir.path("noising.png")).dimensions();
    assert!(width < 10 * 128 + 200 && height < 250, "{width}x{height}");
    show(&["large.png", "--size", "21x35"]).succeeds();
    image(&dir.path("dot.png"), 1, 1, 9);
    show(&["dot.png", "--timesteps", "1"]).succeeds();
    fs::write(dir.path("broken.png"), "no image").unwrap();
    show(&["broken.png"]).fails(1, &["broken.png"]);
}

#[test]
fn a_run_has_a_loss_curve_and_event_files_that_can_be_disabled() {
    let dir = TestDir::new();
    let events = |run: &str| {
        let names = names(&dir.path(format!("runs/{run}")));
        names.into_iter().filter(|n| n.starts_with("events.out.tfevents.")).count()
    };
    dir.train("r", 4, 2, &["--set=output.sample_count=2"]).succeeds();
    let first = fs::read(dir.path("runs/r/loss.png")).unwrap();
    assert_eq!(events("r"), 1);
    dir.ddpm(&["train", "--resume", "r", "--steps", "6"]).succeeds();
    assert!(fs::read(dir.path("runs/r/loss.png")).unwrap() != first);
    assert_eq!(events("r"), 2);
    // Nothing to do, nothing written.
    dir.ddpm(&["train", "--resume", "r"]).succeeds();
    assert_eq!(events("r"), 2);

    dir.train("quiet", 2, 2, &["--set=output.tensorboard=false"]).succeeds();
    assert_eq!(events("quiet"), 0);
    assert!(dir.path("runs/quiet/loss.png").is_file());
}

#[test]
fn a_plot_that_cannot_be_written_is_a_warning() {
    let dir = TestDir::new();
    dir.train("r", 2, 2, &[]).succeeds();
    fs::remove_file(dir.path("runs/r/loss.png")).unwrap();
    fs::create_dir(dir.path("runs/r/loss.png")).unwrap();
    let done = dir.ddpm(&["train", "--resume", "r", "--steps", "6"]).succeeds();
    let warnings: Vec<_> = done.err.lines().filter(|l| l.starts_with("warning: ")).collect();
    assert!(matches!(warnings[..], [w] if w.contains("runs/r/loss.png")), "{}", done.err);
    dir.assert_intact("r", 6);
}
