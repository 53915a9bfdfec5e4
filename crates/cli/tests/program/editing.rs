//! `ddpm inpaint`, `vary`, `interpolate` and `denoise`.

use crate::support::{TestDir, image, names};
use ddpm::data::digits::Digits;
use ddpm::data::{AugmentKey, Dataset};
use ddpm::image::Image;
use image::{GrayImage, Luma};
use std::fs;

/// A run on 12x12 images, two images of that size, and a mask whose right half is white.
fn setup(more: &[&str]) -> TestDir {
    let dir = TestDir::new();
    dir.train("r", 3, 0, more).succeeds();
    image(&dir.path("a.png"), 12, 12, 60);
    image(&dir.path("b.png"), 12, 12, 180);
    let mask = GrayImage::from_fn(12, 12, |x, _| Luma([if x >= 6 { 255 } else { 0 }]));
    mask.save(dir.path("mask.png")).unwrap();
    dir
}

fn grey(dir: &TestDir, path: &str) -> GrayImage {
    image::open(dir.path(path)).expect(path).into_luma8()
}

/// Columns and rows of a sheet of captioned 12x12 images, enlarged 7 times; labels may widen columns.
fn sheet(dir: &TestDir, path: &str) -> (u32, u32) {
    let (width, height) = image::image_dimensions(dir.path(path)).expect(path);
    ((width - 18) / 90, (height - 18) / 112)
}

#[test]
fn inpainting_keeps_known_pixels_and_fills_by_seed() {
    let dir = setup(&["--set=diffusion.prediction=v"]);
    let fill = |out: &str, more: &[&str]| {
        let args = ["inpaint", "r", "a.png", "--mask", "mask.png", "--resamplings", "2", "--out", out];
        let done = dir.ddpm(&[&args, more].concat()).succeeds();
        assert_eq!(done.out, format!("{out}/sheet.png\n"));
        (0..2).map(|i| grey(&dir, &format!("{out}/images/00000{i}.png"))).collect::<Vec<_>>()
    };
    let (input, made) = (grey(&dir, "a.png"), fill("one", &["-n", "2"]));
    for filled in &made {
        for (x, y, pixel) in filled.enumerate_pixels().filter(|(x, ..)| *x < 6) {
            assert_eq!(pixel, input.get_pixel(x, y), "{x}, {y}");
        }
        assert!(filled != &input);
    }
    assert!(made[0] != made[1]);
    assert!(fill("again", &["-n", "2", "--batch-size", "1", "--threads", "1"]) == made);
    assert!(fill("other", &["-n", "2", "--seed", "1"]) != made);
    assert!(fill("few", &["-n", "2", "--steps", "4", "--jump", "1"]) != made);
    assert_eq!(sheet(&dir, "one/sheet.png"), (2, 2), "image, mask and two fillings");
    // In a folder of the run by default.
    let done =
        dir.ddpm(&["inpaint", "r", "a.png", "--mask", "mask.png", "-n", "1", "--steps", "1"]).succeeds();
    let folder = "runs/r/samples/inpaint-a-mask-seed-0-steps-1";
    assert_eq!(done.out, format!("{folder}/sheet.png\n"));
    assert_eq!(names(&dir.path(folder)), ["images", "request.json", "sheet.png"]);
}

#[test]
fn inpainting_uses_the_runs_variance() {
    let dir = TestDir::new();
    GrayImage::from_pixel(12, 12, Luma([255])).save(dir.path("all.png")).unwrap();
    image(&dir.path("a.png"), 12, 12, 60);
    // Filling the whole image without jumps is ordinary sampling.
    for (run, setting) in [
        ("learned", "--set=diffusion.learned_variance=true"),
        ("large", "--set=sampling.variance=large"),
        ("small", "--set=sampling.variance=small"),
    ] {
        dir.train(run, 2, 0, &[setting]).succeeds();
        let both = ["-n", "1", "--steps", "6", "--seed", "3", "--out", "o"];
        dir.ddpm(&[&["sample", run][..], &both].concat()).succeeds();
        let sampled = grey(&dir, "o/images/000000.png");
        let fill = ["inpaint", run, "a.png", "--mask", "all.png", "--resamplings", "1"];
        dir.ddpm(&[&fill[..], &both].concat()).succeeds();
        assert!(grey(&dir, "o/images/000000.png") == sampled, "{run}");
    }
}

#[test]
fn calls_do_not_mix_their_images() {
    let dir = setup(&[]);
    let vary = |args: &[&str]| {
        let done = dir.ddpm(&[&["vary", "r", "a.png"], args].concat()).succeeds();
        let sheet = dir.path(done.out.trim_end());
        (names(&sheet.with_file_name("images")), done)
    };
    let (there, done) = vary(&["-n", "3"]);
    assert_eq!(done.out, "runs/r/samples/vary-a-seed-0/sheet.png\n");
    assert_eq!(there, ["000000.png", "000001.png", "000002.png"]);
    let (there, _) = vary(&["-n", "1"]);
    assert_eq!(there, ["000000.png"], "those of the call before are gone");
    // Other flags, another folder.
    let (_, done) = vary(&["-n", "1", "--strength", "0.3", "--sampler", "ddim", "--weights", "raw"]);
    assert_eq!(done.out, "runs/r/samples/vary-a-seed-0-strength-0.3-sampler-ddim-weights-raw/sheet.png\n");
    // In a folder given with --out nothing is removed; a note says so.
    let (_, done) = vary(&["-n", "2", "--out", "mine"]);
    assert!(!done.err.contains("note:"), "{}", done.err);
    let (there, done) = vary(&["-n", "1", "--out", "mine"]);
    assert_eq!(there, ["000000.png", "000001.png"]);
    assert!(done.err.contains("1 of them, from 000001.png on, are not from this call"), "{}", done.err);
}

#[test]
fn strength_0_returns_the_image_and_strength_1_a_sample() {
    let dir = setup(&[]);
    let vary = |strength: &str, more: &[&str]| {
        let args = ["vary", "r", "a.png", "-n", "2", "--out", "out", "--strength", strength];
        dir.ddpm(&[&args, more].concat()).succeeds();
        assert_eq!(sheet(&dir, "out/sheet.png"), (3, 1));
        [grey(&dir, "out/images/000000.png"), grey(&dir, "out/images/000001.png")]
    };
    let input = grey(&dir, "a.png");
    assert!(vary("0", &[]) == [input.clone(), input.clone()]);
    for sampler in ["ddpm", "dpm++2m", "pndm"] {
        let more = ["--sampler", sampler, "--steps", "6", "--seed", "3"];
        let sampled = [&["sample", "r", "-n", "2", "--out", "sampled"][..], &more].concat();
        dir.ddpm(&sampled).succeeds();
        let sampled = [grey(&dir, "sampled/images/000000.png"), grey(&dir, "sampled/images/000001.png")];
        assert!(vary("1", &more) == sampled, "{sampler}");
        let half = vary("0.5", &more);
        assert!(half != sampled && half[0] != half[1] && half[0] != input, "{sampler}");
    }
}

#[test]
fn an_interpolation_reproduces_its_ends() {
    // Sixty training steps, so that the network differs from its initialization.
    let dir = TestDir::new();
    dir.train("r", 60, 0, &["--set=diffusion.timesteps=200"]).succeeds();
    let digits = Digits::new(0, 12, 2).unwrap();
    for (i, name) in ["a.png", "b.png"].into_iter().enumerate() {
        let mut values = vec![0.0; 144];
        digits.read(i, AugmentKey::default(), &mut values).unwrap();
        Image::from_unit(&values, digits.shape()).save(dir.path(name)).unwrap();
    }
    let go = |from: &str, to: &str| {
        let args = ["interpolate", "r", from, to, "-n", "5", "--steps", "20", "--out", "out"];
        let done = dir.ddpm(&args).succeeds();
        (done, (0..5).map(|i| grey(&dir, &format!("out/images/00000{i}.png"))).collect::<Vec<_>>())
    };
    let off = |a: &GrayImage, b: &GrayImage| {
        let off = |(a, b): (&u8, &u8)| a.abs_diff(*b);
        a.as_raw().iter().zip(b.as_raw()).map(off).max().unwrap()
    };
    let (a, b) = (grey(&dir, "a.png"), grey(&dir, "b.png"));
    let (done, made) = go("a.png", "b.png");
    assert!(off(&a, &made[0]) <= 1 && off(&b, &made[4]) <= 1, "{}", done.err);
    assert!(made[2] != made[0] && made[2] != made[4]);
    assert!(
        done.err.contains("a.png is reproduced within") && done.err.contains("b.png is reproduced within"),
        "{}",
        done.err
    );
    assert_eq!(sheet(&dir, "out/sheet.png"), (3, 3), "the images themselves at both ends");
    // Seeds give the images of `ddpm sample`.
    let args = ["--sampler", "ddim", "--steps", "20", "--threshold", "none", "--out", "sampled"];
    dir.ddpm(&[&["sample", "r", "-n", "1", "--seed", "3"][..], &args].concat()).succeeds();
    let (_, made) = go("seed:3", "a.png");
    assert!(made[0] == grey(&dir, "sampled/images/000000.png") && off(&a, &made[4]) <= 1);
    let (_, made) = go("seed:3", "seed:3");
    assert!(made.iter().all(|p| off(p, &made[0]) <= 1));
}

#[test]
fn seeds_match_sampling_at_zero_snr_and_with_classes() {
    let settings = [
        "--set=diffusion.zero_terminal_snr=true",
        "--set=diffusion.prediction=v",
        "--set=attention.num_class_embeds=10",
    ];
    let dir = setup(&settings);
    let class = ["--class", "3", "--guidance", "2", "--steps", "6"];
    let go = |from: &str, to: &str, args: &[&str]| {
        let go = ["interpolate", "r", from, to, "-n", "2", "--out", "out"];
        let done = dir.ddpm(&[&go, args].concat()).succeeds();
        (done.err, [grey(&dir, "out/images/000000.png"), grey(&dir, "out/images/000001.png")])
    };
    let sample = |seed: &str, args: &[&str]| {
        let sample = ["sample", "r", "-n", "1", "--seed", seed, "--out", "sampled"];
        let ddim = ["--sampler", "ddim", "--threshold", "none"];
        dir.ddpm(&[&sample[..], &ddim, args].concat()).succeeds();
        grey(&dir, "sampled/images/000000.png")
    };
    let (_, made) = go("seed:3", "seed:4", &class);
    assert!(made == [sample("3", &class), sample("4", &class)]);
    // Unconditional by default, as with guidance 0.
    let (_, made) = go("seed:3", "seed:4", &["--steps", "6"]);
    let unconditional = ["--class", "3", "--guidance", "0", "--steps", "6"];
    assert!(made == [sample("3", &unconditional), sample("4", &unconditional)]);
    // At a level with signal left, an image is inverted and reproduced.
    let (message, made) = go("a.png", "seed:4", &["--class", "3", "--steps", "19"]);
    let off = made[0].as_raw().iter().zip(grey(&dir, "a.png").as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(off <= Some(1), "{off:?}, {message}");
}

#[test]
fn noise_is_estimated_reported_and_removed() {
    let dir = setup(&[]);
    let denoise = |more: &[&str]| {
        let done = dir.ddpm(&[&["denoise", "r", "a.png", "--out", "out"], more].concat()).succeeds();
        assert_eq!(sheet(&dir, "out/sheet.png"), (2, 1), "the image and the result");
        (done.err, grey(&dir, "out/images/000000.png"))
    };
    let input = grey(&dir, "a.png");
    let (message, made) = denoise(&[]);
    let none = "a.png: no noise was found (estimated sigma 0), so the image is returned unchanged; set it with --sigma";
    assert!(message.contains(none) && !message.contains("noise of sigma"), "{message}");
    assert!(!message.contains("impulse noise"), "{message}");
    assert!(made == input, "no noise, nothing to take");
    let mut salted = GrayImage::from_pixel(12, 12, Luma([90]));
    for (x, y) in [(2, 2), (6, 3), (9, 9), (3, 8)] {
        salted.put_pixel(x, y, Luma([255]));
    }
    salted.save(dir.path("salted.png")).unwrap();
    let message = dir.ddpm(&["denoise", "r", "salted.png", "--out", "salted"]).succeeds().err;
    assert!(message.contains("salted.png: no noise was found (estimated sigma 0)"), "{message}");
    assert!(
        message.contains("salted.png: 4 pixels differ from all their neighbours, as in impulse noise"),
        "{message}"
    );
    assert!(salted == grey(&dir, "salted/images/000000.png"));
    let (message, fraction) = denoise(&["--sigma", "51/255"]);
    assert!(message.contains("noise of sigma 0.2000 (51.0 of 255): t = "), "{message}");
    let (_, number) = denoise(&["--sigma", "0.2"]);
    assert!(fraction == number && number != input);
    let (_, sampled) = denoise(&["--sigma", "0.2", "--sampler", "heun", "--steps", "3"]);
    assert!(sampled != number);
}

#[test]
fn images_are_converted_to_the_runs_format_and_reported() {
    let dir = setup(&[]);
    let wide = image::RgbImage::from_fn(40, 24, |x, y| image::Rgb([(6 * x) as u8, (9 * y) as u8, 30]));
    wide.save(dir.path("wide.png")).unwrap();
    GrayImage::from_fn(40, 24, |x, _| Luma([if x > 20 { 255 } else { 0 }])).save(dir.path("m.png")).unwrap();
    let message =
        "wide.png: resized from 24x40 to 12x12 and converted from RGB to grey, to match the run's images";
    for args in [
        &["inpaint", "r", "wide.png", "--mask", "m.png", "-n", "1", "--steps", "2"][..],
        &["vary", "r", "wide.png", "-n", "1"],
        &["denoise", "r", "wide.png"],
        &["interpolate", "r", "wide.png", "a.png", "-n", "2", "--steps", "2"],
    ] {
        let done = dir.ddpm(args).succeeds();
        assert!(done.err.contains(message), "{args:?}: {}", done.err);
    }
}

#[test]
fn invalid_edits_are_rejected_with_the_choices() {
    let dir = setup(&[]);
    let refused = |args: &str, parts: &[&str]| {
        dir.ddpm(&args.split(' ').collect::<Vec<_>>()).fails(1, parts);
    };
    GrayImage::from_pixel(10, 14, Luma([255])).save(dir.path("small.png")).unwrap();
    GrayImage::new(12, 12).save(dir.path("black.png")).unwrap();
    fs::write(dir.path("text.png"), "no image").unwrap();
    refused("inpaint r a.png --mask small.png", &["small.png: the mask is 14x10 and the image 12x12"]);
    refused("inpaint r a.png --mask black.png", &["black.png: nothing to fill", "white is filled"]);
    refused("inpaint r a.png --mask gone.png", &["gone.png: cannot be read"]);
    refused("inpaint r a.png --mask mask.png --steps 0", &["0 steps: the schedule allows 1 to 20"]);
    refused(
        "inpaint r a.png --mask mask.png --jump 20",
        &["jump: 20 is out of range; with 20 steps give 1 to 19"],
    );
    refused("inpaint r a.png --mask mask.png --resamplings 0", &["resamplings: 0 is out of range"]);
    refused("inpaint r a.png --mask mask.png -n 0", &["must be at least 1"]);
    refused("vary r text.png", &["text.png: is not an image"]);
    refused("vary r a.png --strength 1.5", &["strength: 1.5 is out of range; give 0"]);
    refused("vary r a.png --steps 21", &["the schedule allows 1 to 20"]);
    refused("vary r a.png --sampler ddin", &["did you mean ddim?", "the samplers are ddpm"]);
    refused("vary r a.png --sampler pndm --spacing karras", &["pndm does not support karras; give uniform"]);
    refused("vary r a.png --class 3", &["trained without classes"]);
    refused("interpolate r a.png seed:x", &["seed:x: give an integer, e.g. seed:3"]);
    refused("interpolate r a.png gone.png", &["gone.png: cannot be read"]);
    refused("interpolate r a.png b.png --steps 0", &["0 steps: the schedule allows 1 to 20"]);
    refused("interpolate r a.png b.png -n 1", &["give at least 2"]);
    refused("denoise r a.png --sigma 99", &["sigma: 99 is out of range", "up to"]);
    refused(
        "denoise r a.png --sigma 25",
        &["sigma: 25 is out of range (for 255 levels, give 25/255)", "up to"],
    );
    refused("denoise r a.png --sigma -1", &["sigma: -1 is out of range"]);
    dir.ddpm(&["denoise", "r", "a.png", "--sigma", "much"]).fails(2, &["25/255, or auto"]);
    assert!(names(&dir.path("runs/r/samples")).is_empty(), "nothing was begun");
}

#[test]
fn edits_are_conditioned_on_the_given_class() {
    let dir = setup(&["--set=attention.num_class_embeds=10"]);
    let vary = |more: &[&str]| {
        let args = ["vary", "r", "a.png", "-n", "1", "--out", "out", "--sampler", "ddim", "--steps", "4"];
        dir.ddpm(&[&args, more].concat()).succeeds();
        fs::read(dir.path("out/images/000000.png")).unwrap()
    };
    let three = vary(&["--class", "3"]);
    assert!(vary(&[]) != three && vary(&["--class", "3", "--guidance", "4"]) != three);
    assert!(vary(&["--class", "3", "--guidance", "0"]) == vary(&[]), "unconditional");
    let refused = |args: &[&str], part: &str| {
        dir.ddpm(&[&["vary", "r", "a.png"], args].concat()).fails(1, &[part]);
    };
    refused(&["--class", "10"], "class: there is no class \"10\"; the run has the classes 0 to 9");
    refused(&["--guidance", "3"], "guidance: needs a class, and none is given (--class)");
    dir.train("conditional", 1, 0, &["--set=attention.num_class_embeds=10", "--set=train.label_dropout=0"])
        .succeeds();
    dir.ddpm(&["vary", "conditional", "a.png"])
        .fails(1, &["class: none is given (--class)", "the classes 0 to 9"]);
}

#[test]
fn the_reading_of_a_mask_is_printed_and_can_be_inverted() {
    let dir = setup(&[]);
    let fill = |mask: &str, more: &[&str]| {
        let args = ["inpaint", "r", "a.png", "--mask", mask, "-n", "1", "--steps", "1", "--out", "out"];
        dir.ddpm(&[&args, more].concat())
    };
    let kept = || {
        let (input, made) = (grey(&dir, "a.png"), grey(&dir, "out/images/000000.png"));
        let count = |left: bool| {
            let here = input.enumerate_pixels().filter(|(x, ..)| (*x < 6) == left);
            here.filter(|(x, y, pixel)| *pixel == made.get_pixel(*x, *y)).count()
        };
        (count(true), count(false))
    };
    let message = |mask: &str, more: &[&str]| fill(mask, more).succeeds().err;
    let err = message("mask.png", &[]);
    assert!(
        err.contains("mask.png: white (255) is filled, 50 % of the image; --invert-mask fills the rest"),
        "{err}"
    );
    assert!(kept().0 == 72 && kept().1 < 60, "{:?}", kept());
    let err = message("mask.png", &["--invert-mask"]);
    assert!(err.contains("mask.png: black (0) is filled, 50 %"), "{err}");
    assert!(kept().1 == 72 && kept().0 < 60, "{:?}", kept());
    // Values 0 and 1, as numpy writes masks.
    GrayImage::from_fn(12, 12, |x, _| Luma([u8::from(x >= 6)])).save(dir.path("bits.png")).unwrap();
    assert!(message("bits.png", &[]).contains("the brighter of its two values, 0 and 1, is filled, 50 %"));
    assert_eq!(kept().0, 72);
    GrayImage::from_pixel(12, 12, Luma([255])).save(dir.path("white.png")).unwrap();
    assert!(message("white.png", &[]).contains("white (255) is filled, all of the image: nothing is kept"));
    fill("white.png", &["--invert-mask"])
        .fails(1, &["white.png: nothing to fill", "255 of 255 everywhere, which counts as white"]);
    let alpha =
        image::RgbaImage::from_fn(12, 12, |x, _| image::Rgba([0, 0, 0, if x >= 6 { 255 } else { 0 }]));
    alpha.save(dir.path("alpha.png")).unwrap();
    assert!(message("alpha.png", &[]).contains("alpha.png: opaque (255) is filled, 50 %"));
    assert_eq!(kept().0, 72);
}

#[test]
fn patterns_and_textures_are_not_denoised_as_noise() {
    let dir = setup(&[]);
    let checks = |name: &str, low: u8, high: u8| {
        let image = GrayImage::from_fn(12, 12, |x, y| Luma([if (x + y) % 2 == 0 { low } else { high }]));
        image.save(dir.path(name)).unwrap();
        dir.ddpm(&["denoise", "r", name])
    };
    for (name, low, high) in [("grey.png", 60, 190), ("ends.png", 0, 255), ("dark.png", 0, 90)] {
        checks(name, low, high)
            .fails(1, &[name, "pattern or texture", "set it with --sigma", "for this run"]);
    }
    dir.ddpm(&["denoise", "r", "grey.png", "--sigma", "0.1"]).succeeds();
    // The estimate is printed with its uncertainty.
    let mut state = 7u32;
    let noisy = GrayImage::from_fn(12, 12, |_, _| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Luma([(100 + (state >> 16) % 31 + (state >> 24) % 31) as u8])
    });
    noisy.save(dir.path("noisy.png")).unwrap();
    let done = dir.ddpm(&["denoise", "r", "noisy.png"]).succeeds();
    assert!(
        done.err.contains(" +- 0.0") && done.err.contains("with fine texture counted as noise"),
        "{}",
        done.err
    );
}
