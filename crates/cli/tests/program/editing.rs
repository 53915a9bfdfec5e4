//! `ddpm inpaint`, `vary`, `interpolate` and `denoise`.

use crate::support::{Place, names, picture};
use ddpm::data::digits::Digits;
use ddpm::data::{Dataset, Draw};
use ddpm::picture::{Picture, save_png};
use image::{GrayImage, Luma};
use std::fs;

/// A run of pictures of 12x12, two pictures of that size, and a mask of which the right half is white.
fn place(more: &[&str]) -> Place {
    let place = Place::new();
    place.train("r", 3, 0, more).well();
    picture(&place.path("a.png"), 12, 12, 60);
    picture(&place.path("b.png"), 12, 12, 180);
    let mask = GrayImage::from_fn(12, 12, |x, _| Luma([if x >= 6 { 255 } else { 0 }]));
    mask.save(place.path("mask.png")).unwrap();
    place
}

fn grey(place: &Place, path: &str) -> GrayImage {
    image::open(place.path(path)).expect(path).into_luma8()
}

/// Columns and rows of a sheet of 12x12 images that are enlarged by 7 and have captions; labels may make columns wider.
fn sheet(place: &Place, path: &str) -> (u32, u32) {
    let (width, height) = image::image_dimensions(place.path(path)).expect(path);
    ((width - 18) / 90, (height - 18) / 112)
}

#[test]
fn a_filled_picture_has_the_known_pixels_and_others_by_the_seed() {
    let place = place(&["--set=diffusion.prediction=v"]);
    let fill = |out: &str, more: &[&str]| {
        let args = ["inpaint", "r", "a.png", "--mask", "mask.png", "--resamplings", "2", "--out", out];
        let done = place.ddpm(&[&args, more].concat()).well();
        assert_eq!(done.out, format!("{out}/sheet.png\n"));
        (0..2).map(|i| grey(&place, &format!("{out}/images/00000{i}.png"))).collect::<Vec<_>>()
    };
    let (input, made) = (grey(&place, "a.png"), fill("one", &["-n", "2"]));
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
    assert_eq!(sheet(&place, "one/sheet.png"), (2, 2), "image, mask and two fillings");
    // In a folder of the run unless another is named.
    let done = place.ddpm(&["inpaint", "r", "a.png", "--mask", "mask.png", "-n", "1", "--steps", "1"]).well();
    let folder = "runs/r/samples/inpaint-a-mask-seed-0-steps-1";
    assert_eq!(done.out, format!("{folder}/sheet.png\n"));
    assert_eq!(names(&place.path(folder)), ["images", "request.json", "sheet.png"]);
}

#[test]
fn a_filling_has_the_variance_of_the_run() {
    let place = Place::new();
    GrayImage::from_pixel(12, 12, Luma([255])).save(place.path("all.png")).unwrap();
    picture(&place.path("a.png"), 12, 12, 60);
    // Filling all of a picture, without going back, is drawing one.
    for (run, setting) in [
        ("learned", "--set=diffusion.learned_variance=true"),
        ("large", "--set=sampling.variance=large"),
        ("small", "--set=sampling.variance=small"),
    ] {
        place.train(run, 2, 0, &[setting]).well();
        let both = ["-n", "1", "--steps", "6", "--seed", "3", "--out", "o"];
        place.ddpm(&[&["sample", run][..], &both].concat()).well();
        let drawn = grey(&place, "o/images/000000.png");
        let fill = ["inpaint", run, "a.png", "--mask", "all.png", "--resamplings", "1"];
        place.ddpm(&[&fill[..], &both].concat()).well();
        assert!(grey(&place, "o/images/000000.png") == drawn, "{run}");
    }
}

#[test]
fn calls_do_not_mix_their_pictures() {
    let place = place(&[]);
    let vary = |args: &[&str]| {
        let done = place.ddpm(&[&["vary", "r", "a.png"], args].concat()).well();
        let sheet = place.path(done.out.trim_end());
        (names(&sheet.with_file_name("images")), done)
    };
    let (there, done) = vary(&["-n", "3"]);
    assert_eq!(done.out, "runs/r/samples/vary-a-seed-0/sheet.png\n");
    assert_eq!(there, ["000000.png", "000001.png", "000002.png"]);
    let (there, _) = vary(&["-n", "1"]);
    assert_eq!(there, ["000000.png"], "those of the call before are gone");
    // Called otherwise, elsewhere.
    let (_, done) = vary(&["-n", "1", "--strength", "0.3", "--sampler", "ddim", "--weights", "raw"]);
    assert_eq!(done.out, "runs/r/samples/vary-a-seed-0-strength-0.3-sampler-ddim-weights-raw/sheet.png\n");
    // In another's folder nothing is removed, and it is said.
    let (_, done) = vary(&["-n", "2", "--out", "mine"]);
    assert!(!done.err.contains("note:"), "{}", done.err);
    let (there, done) = vary(&["-n", "1", "--out", "mine"]);
    assert_eq!(there, ["000000.png", "000001.png"]);
    assert!(done.err.contains("1 of them, from 000001.png on, are not of this call"), "{}", done.err);
}

#[test]
fn a_variation_of_no_strength_is_the_picture_and_of_all_a_sample() {
    let place = place(&[]);
    let vary = |strength: &str, more: &[&str]| {
        let args = ["vary", "r", "a.png", "-n", "2", "--out", "out", "--strength", strength];
        place.ddpm(&[&args, more].concat()).well();
        assert_eq!(sheet(&place, "out/sheet.png"), (3, 1));
        [grey(&place, "out/images/000000.png"), grey(&place, "out/images/000001.png")]
    };
    let input = grey(&place, "a.png");
    assert!(vary("0", &[]) == [input.clone(), input.clone()]);
    for sampler in ["ddpm", "dpm++2m", "pndm"] {
        let more = ["--sampler", sampler, "--steps", "6", "--seed", "3"];
        let drawn = [&["sample", "r", "-n", "2", "--out", "drawn"][..], &more].concat();
        place.ddpm(&drawn).well();
        let drawn = [grey(&place, "drawn/images/000000.png"), grey(&place, "drawn/images/000001.png")];
        assert!(vary("1", &more) == drawn, "{sampler}");
        let half = vary("0.5", &more);
        assert!(half != drawn && half[0] != half[1] && half[0] != input, "{sampler}");
    }
}

#[test]
fn the_ends_of_an_interpolation_are_the_pictures() {
    // Sixty steps of training, so that the network is not what it began as.
    let place = Place::new();
    place.train("r", 60, 0, &["--set=diffusion.timesteps=200"]).well();
    let digits = Digits::new(0, 12, 2).unwrap();
    for (i, name) in ["a.png", "b.png"].into_iter().enumerate() {
        let mut values = vec![0.0; 144];
        digits.read(i, Draw::default(), &mut values).unwrap();
        save_png(&Picture::from_unit(&values, digits.shape()), &place.path(name)).unwrap();
    }
    let go = |from: &str, to: &str| {
        let args = ["interpolate", "r", from, to, "-n", "5", "--steps", "20", "--out", "out"];
        let done = place.ddpm(&args).well();
        (done, (0..5).map(|i| grey(&place, &format!("out/images/00000{i}.png"))).collect::<Vec<_>>())
    };
    let off = |a: &GrayImage, b: &GrayImage| {
        let off = |(a, b): (&u8, &u8)| a.abs_diff(*b);
        a.as_raw().iter().zip(b.as_raw()).map(off).max().unwrap()
    };
    let (a, b) = (grey(&place, "a.png"), grey(&place, "b.png"));
    let (done, made) = go("a.png", "b.png");
    assert!(off(&a, &made[0]) <= 1 && off(&b, &made[4]) <= 1, "{}", done.err);
    assert!(made[2] != made[0] && made[2] != made[4]);
    assert!(
        done.err.contains("a.png is met within") && done.err.contains("b.png is met within"),
        "{}",
        done.err
    );
    assert_eq!(sheet(&place, "out/sheet.png"), (3, 3), "the pictures themselves at both ends");
    // Drawn pictures are those of `ddpm sample`.
    let args = ["--sampler", "ddim", "--steps", "20", "--threshold", "none", "--out", "drawn"];
    place.ddpm(&[&["sample", "r", "-n", "1", "--seed", "3"][..], &args].concat()).well();
    let (_, made) = go("seed:3", "a.png");
    assert!(made[0] == grey(&place, "drawn/images/000000.png") && off(&a, &made[4]) <= 1);
    let (_, made) = go("seed:3", "seed:3");
    assert!(made.iter().all(|p| off(p, &made[0]) <= 1));
}

#[test]
fn seeds_are_what_is_sampled_where_nothing_is_left_of_a_picture_and_with_classes() {
    let settings = [
        "--set=diffusion.zero_terminal_snr=true",
        "--set=diffusion.prediction=v",
        "--set=attention.num_class_embeds=10",
    ];
    let place = place(&settings);
    let class = ["--class", "3", "--guidance", "2", "--steps", "6"];
    let go = |from: &str, to: &str, args: &[&str]| {
        let go = ["interpolate", "r", from, to, "-n", "2", "--out", "out"];
        let done = place.ddpm(&[&go, args].concat()).well();
        (done.err, [grey(&place, "out/images/000000.png"), grey(&place, "out/images/000001.png")])
    };
    let sample = |seed: &str, args: &[&str]| {
        let sample = ["sample", "r", "-n", "1", "--seed", seed, "--out", "drawn"];
        let ddim = ["--sampler", "ddim", "--threshold", "none"];
        place.ddpm(&[&sample[..], &ddim, args].concat()).well();
        grey(&place, "drawn/images/000000.png")
    };
    let (_, made) = go("seed:3", "seed:4", &class);
    assert!(made == [sample("3", &class), sample("4", &class)]);
    // None is told unless one is named: as with guidance 0.
    let (_, made) = go("seed:3", "seed:4", &["--steps", "6"]);
    let untold = ["--class", "3", "--guidance", "0", "--steps", "6"];
    assert!(made == [sample("3", &untold), sample("4", &untold)]);
    // A picture is found where something is left of it, and is met.
    let (told, made) = go("a.png", "seed:4", &["--class", "3", "--steps", "19"]);
    let off = made[0].as_raw().iter().zip(grey(&place, "a.png").as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(off <= Some(1), "{off:?}, {told}");
}

#[test]
fn noise_is_estimated_told_and_taken() {
    let place = place(&[]);
    let denoise = |more: &[&str]| {
        let done = place.ddpm(&[&["denoise", "r", "a.png", "--out", "out"], more].concat()).well();
        assert_eq!(sheet(&place, "out/sheet.png"), (2, 1), "the picture and the result");
        (done.err, grey(&place, "out/images/000000.png"))
    };
    let input = grey(&place, "a.png");
    let (told, made) = denoise(&[]);
    let none =
        "a.png: no noise was found (estimated sigma 0), and the image is returned as it is; --sigma gives it";
    assert!(told.contains(none) && !told.contains("noise of sigma"), "{told}");
    assert!(!told.contains("impulse noise"), "{told}");
    assert!(made == input, "no noise, nothing to take");
    let mut salted = GrayImage::from_pixel(12, 12, Luma([90]));
    for (x, y) in [(2, 2), (6, 3), (9, 9), (3, 8)] {
        salted.put_pixel(x, y, Luma([255]));
    }
    salted.save(place.path("salted.png")).unwrap();
    let told = place.ddpm(&["denoise", "r", "salted.png", "--out", "salted"]).well().err;
    assert!(told.contains("salted.png: no noise was found (estimated sigma 0)"), "{told}");
    assert!(told.contains("salted.png: 4 pixels stand out from all around them, as impulse noise"), "{told}");
    assert!(salted == grey(&place, "salted/images/000000.png"));
    let (told, fraction) = denoise(&["--sigma", "51/255"]);
    assert!(told.contains("noise of sigma 0.2000 (51.0 of 255): t = "), "{told}");
    let (_, number) = denoise(&["--sigma", "0.2"]);
    assert!(fraction == number && number != input);
    let (_, drawn) = denoise(&["--sigma", "0.2", "--sampler", "heun", "--steps", "3"]);
    assert!(drawn != number);
}

#[test]
fn pictures_are_brought_to_the_runs_form_and_it_is_said() {
    let place = place(&[]);
    let wide = image::RgbImage::from_fn(40, 24, |x, y| image::Rgb([(6 * x) as u8, (9 * y) as u8, 30]));
    wide.save(place.path("wide.png")).unwrap();
    GrayImage::from_fn(40, 24, |x, _| Luma([if x > 20 { 255 } else { 0 }]))
        .save(place.path("m.png"))
        .unwrap();
    let told = "wide.png: brought from 24x40 to 12x12 and made grey from RGB, as the run's images";
    for args in [
        &["inpaint", "r", "wide.png", "--mask", "m.png", "-n", "1", "--steps", "2"][..],
        &["vary", "r", "wide.png", "-n", "1"],
        &["denoise", "r", "wide.png"],
        &["interpolate", "r", "wide.png", "a.png", "-n", "2", "--steps", "2"],
    ] {
        let done = place.ddpm(args).well();
        assert!(done.err.contains(told), "{args:?}: {}", done.err);
    }
}

#[test]
fn what_cannot_be_edited_is_refused_with_the_choices() {
    let place = place(&[]);
    let refused = |args: &str, parts: &[&str]| {
        place.ddpm(&args.split(' ').collect::<Vec<_>>()).fails(1, parts);
    };
    GrayImage::from_pixel(10, 14, Luma([255])).save(place.path("small.png")).unwrap();
    GrayImage::new(12, 12).save(place.path("black.png")).unwrap();
    fs::write(place.path("text.png"), "no picture").unwrap();
    refused("inpaint r a.png --mask small.png", &["small.png: the mask is 14x10 and the image 12x12"]);
    refused(
        "inpaint r a.png --mask black.png",
        &["black.png: nothing is to be filled", "white is what is filled"],
    );
    refused("inpaint r a.png --mask gone.png", &["gone.png: cannot be read"]);
    refused("inpaint r a.png --mask mask.png --steps 0", &["0 steps: the schedule allows 1 to 20"]);
    refused(
        "inpaint r a.png --mask mask.png --jump 20",
        &["jump: 20 is out of range; of 20 steps give 1 to 19"],
    );
    refused("inpaint r a.png --mask mask.png --resamplings 0", &["resamplings: 0 is out of range"]);
    refused("inpaint r a.png --mask mask.png -n 0", &["must be at least 1"]);
    refused("vary r text.png", &["text.png: is not a picture"]);
    refused("vary r a.png --strength 1.5", &["strength: 1.5 is out of range; give 0"]);
    refused("vary r a.png --steps 21", &["the schedule allows 1 to 20"]);
    refused("vary r a.png --sampler ddin", &["did you mean ddim?", "the samplers are ddpm"]);
    refused("vary r a.png --sampler pndm --spacing karras", &["pndm cannot take karras; give uniform"]);
    refused("vary r a.png --class 3", &["trained without classes"]);
    refused("interpolate r a.png seed:x", &["seed:x: give a whole number, as seed:3"]);
    refused("interpolate r a.png gone.png", &["gone.png: cannot be read"]);
    refused("interpolate r a.png b.png --steps 0", &["0 steps: the schedule allows 1 to 20"]);
    refused("interpolate r a.png b.png -n 1", &["give at least 2"]);
    refused("denoise r a.png --sigma 99", &["sigma: 99 is out of range", "up to"]);
    refused("denoise r a.png --sigma 25", &["sigma: 25 is out of range (25/255 is meant", "up to"]);
    refused("denoise r a.png --sigma -1", &["sigma: -1 is out of range"]);
    place.ddpm(&["denoise", "r", "a.png", "--sigma", "much"]).fails(2, &["25/255, or auto"]);
    assert!(names(&place.path("runs/r/samples")).is_empty(), "nothing was begun");
}

#[test]
fn a_run_with_classes_is_told_the_class_that_is_given() {
    let place = place(&["--set=attention.num_class_embeds=10"]);
    let vary = |more: &[&str]| {
        let args = ["vary", "r", "a.png", "-n", "1", "--out", "out", "--sampler", "ddim", "--steps", "4"];
        place.ddpm(&[&args, more].concat()).well();
        fs::read(place.path("out/images/000000.png")).unwrap()
    };
    let three = vary(&["--class", "3"]);
    assert!(vary(&[]) != three && vary(&["--class", "3", "--guidance", "4"]) != three);
    assert!(vary(&["--class", "3", "--guidance", "0"]) == vary(&[]), "not told");
    let refused = |args: &[&str], part: &str| {
        place.ddpm(&[&["vary", "r", "a.png"], args].concat()).fails(1, &[part]);
    };
    refused(&["--class", "10"], "class: there is no class \"10\"; the run has the classes 0 to 9");
    refused(&["--guidance", "3"], "guidance: goes towards a class, and none is given (--class)");
    place.train("told", 1, 0, &["--set=attention.num_class_embeds=10", "--set=train.label_dropout=0"]).well();
    place
        .ddpm(&["vary", "told", "a.png"])
        .fails(1, &["class: none is given (--class)", "the classes 0 to 9"]);
}

#[test]
fn what_a_mask_marks_is_said_and_the_other_way_is_a_flag() {
    let place = place(&[]);
    let fill = |mask: &str, more: &[&str]| {
        let args = ["inpaint", "r", "a.png", "--mask", mask, "-n", "1", "--steps", "1", "--out", "out"];
        place.ddpm(&[&args, more].concat())
    };
    let kept = || {
        let (input, made) = (grey(&place, "a.png"), grey(&place, "out/images/000000.png"));
        let count = |left: bool| {
            let here = input.enumerate_pixels().filter(|(x, ..)| (*x < 6) == left);
            here.filter(|(x, y, pixel)| *pixel == made.get_pixel(*x, *y)).count()
        };
        (count(true), count(false))
    };
    let told = |mask: &str, more: &[&str]| fill(mask, more).well().err;
    let err = told("mask.png", &[]);
    assert!(
        err.contains("mask.png: white (255) is filled, 50 % of the image; --invert-mask fills the rest"),
        "{err}"
    );
    assert!(kept().0 == 72 && kept().1 < 60, "{:?}", kept());
    let err = told("mask.png", &["--invert-mask"]);
    assert!(err.contains("mask.png: black (0) is filled, 50 %"), "{err}");
    assert!(kept().1 == 72 && kept().0 < 60, "{:?}", kept());
    // As numpy's masks are written.
    GrayImage::from_fn(12, 12, |x, _| Luma([u8::from(x >= 6)])).save(place.path("bits.png")).unwrap();
    assert!(told("bits.png", &[]).contains("the brighter of its two values, 0 and 1, is filled, 50 %"));
    assert_eq!(kept().0, 72);
    GrayImage::from_pixel(12, 12, Luma([255])).save(place.path("white.png")).unwrap();
    assert!(told("white.png", &[]).contains("white (255) is filled, all of the image: nothing is kept"));
    fill("white.png", &["--invert-mask"])
        .fails(1, &["white.png: nothing is to be filled", "255 of 255 everywhere, which counts as white"]);
    let alpha =
        image::RgbaImage::from_fn(12, 12, |x, _| image::Rgba([0, 0, 0, if x >= 6 { 255 } else { 0 }]));
    alpha.save(place.path("alpha.png")).unwrap();
    assert!(told("alpha.png", &[]).contains("alpha.png: opaque (255) is filled, 50 %"));
    assert_eq!(kept().0, 72);
}

#[test]
fn patterns_and_textures_are_not_denoised_as_noise() {
    let place = place(&[]);
    let checks = |name: &str, low: u8, high: u8| {
        let image = GrayImage::from_fn(12, 12, |x, y| Luma([if (x + y) % 2 == 0 { low } else { high }]));
        image.save(place.path(name)).unwrap();
        place.ddpm(&["denoise", "r", name])
    };
    for (name, low, high) in [("grey.png", 60, 190), ("ends.png", 0, 255), ("dark.png", 0, 90)] {
        checks(name, low, high).fails(1, &[name, "pattern or texture", "--sigma gives it", "for this run"]);
    }
    place.ddpm(&["denoise", "r", "grey.png", "--sigma", "0.1"]).well();
    // How sure an estimate is stands with it.
    let mut state = 7u32;
    let noisy = GrayImage::from_fn(12, 12, |_, _| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Luma([(100 + (state >> 16) % 31 + (state >> 24) % 31) as u8])
    });
    noisy.save(place.path("noisy.png")).unwrap();
    let done = place.ddpm(&["denoise", "r", "noisy.png"]).well();
    assert!(
        done.err.contains(" +- 0.0") && done.err.contains("in which fine texture counts as noise"),
        "{}",
        done.err
    );
}
