//! Data sets of files in one format and in several.

use super::super::test_util::{colour, grey, image, message, notes, open_default, save};
use super::super::{Alpha, Resize, open, open_within};
use super::*;
use image::{DynamicImage, ImageBuffer, Luma, Rgba, RgbaImage};
use std::fs;
use tempfile::TempDir;

fn sized(folder: &TempDir, height: usize, width: usize) -> Result<Box<dyn Dataset>> {
    open(folder.path(), &DataOptions { size: Some((height, width)), ..DataOptions::default() })
}

#[test]
fn several_sizes_are_listed_unless_a_size_is_set() {
    let folder = TempDir::new().unwrap();
    for i in 0..3 {
        save(&folder, &format!("a{i}.png"), grey(20, 30, i));
    }
    for side in 1..=6 {
        save(&folder, &format!("b{side}.png"), grey(side, 9, 0));
    }
    let text = message(open_default(&folder));
    assert!(
        text.contains("7 sizes, 1 to 20 x 9 to 30 (height x width): 20x30 (3 images), 1x9 (1 image), ")
            && text.contains("and 2 more"),
        "{text}"
    );
    assert!(text.contains("--size H (or HxW) resizes them all"));
    let set = sized(&folder, 8, 10).unwrap();
    assert_eq!(set.shape(), ImageShape { height: 8, width: 10, channels: 1 });
    let notes = notes(&*set);
    assert!(notes.contains("7 sizes found") && notes.contains("every image is resized to 8x10"), "{notes}");
    assert!(notes.contains("6 of 9 images are smaller than 8x10: enlarged"), "{notes}");
    assert_eq!(set.summary().found[0].images, 3);
}

#[test]
fn grey_and_colour_together_become_colour() {
    let folder = TempDir::new().unwrap();
    save(&folder, "a.png", grey(4, 4, 77));
    save(&folder, "b.png", colour(4, 4, 5));
    let set = open_default(&folder).unwrap();
    assert_eq!(set.shape().channels, 3);
    assert!(notes(&*set).contains("1 of 2 images is grey: converted to RGB"));
    let a = image(&*set, 0);
    assert_eq!(a[..3], [77.0 / 255.0 * 2.0 - 1.0; 3]);
    assert_eq!(image(&*set, 1)[0], 5.0 / 255.0 * 2.0 - 1.0);
    let options = DataOptions { channels: Some(1), ..DataOptions::default() };
    let set = open(folder.path(), &options).unwrap();
    assert_eq!(set.shape().channels, 1);
    assert!(notes(&*set).contains("1 of 2 images is in colour: converted to grey"));
}

#[test]
fn colour_files_with_only_grey_pixels_become_grey() {
    let folder = TempDir::new().unwrap();
    let as_colour = DynamicImage::ImageLuma8(grey(4, 4, 8)).to_rgb8();
    save(&folder, "a.png", as_colour);
    save(&folder, "b.png", grey(4, 4, 8));
    let set = open_default(&folder).unwrap();
    assert_eq!(set.shape().channels, 1);
    assert!(notes(&*set).contains("1 of 2 images is stored in colour, but every pixel is grey"));
    assert_eq!(image(&*set, 0), image(&*set, 1));
}

#[test]
fn alpha_is_dropped_composited_or_kept() {
    let folder = TempDir::new().unwrap();
    let with =
        |alpha| RgbaImage::from_fn(2, 2, move |x, _| Rgba([200, 10, 10, if x == 0 { 255 } else { alpha }]));
    save(&folder, "a.png", with(255));
    save(&folder, "b.png", with(0));
    let set = open_default(&folder).unwrap();
    assert_eq!(set.shape().channels, 3);
    assert!(notes(&*set).contains("1 of 2 images is stored with a fully opaque alpha channel"));
    assert!(notes(&*set).contains("1 of 2 images is partly transparent: composited on black"));
    assert_eq!(image(&*set, 1)[3..6], [-1.0; 3]);
    let set = open(folder.path(), &DataOptions { channels: Some(4), ..DataOptions::default() }).unwrap();
    let (a, b) = (image(&*set, 0), image(&*set, 1));
    assert_eq!((a[3], a[7], b[3], b[7]), (1.0, 1.0, 1.0, -1.0));
}

#[test]
fn mixed_bit_depths_keep_sixteen_bits() {
    let folder = TempDir::new().unwrap();
    save(&folder, "a.png", grey(1, 1, 200));
    save(
        &folder,
        "b.png",
        DynamicImage::ImageLuma16(ImageBuffer::from_pixel(1, 1, Luma([200u16 * 257 + 1]))),
    );
    let set = open_default(&folder).unwrap();
    assert_eq!(set.summary().bit_depth, 16);
    assert!(notes(&*set).contains("1 of 2 images is 16-bit, the others 8-bit"));
    let difference = image(&*set, 1)[0] - image(&*set, 0)[0];
    assert!((difference - 2.0 / 65_535.0).abs() < 1e-7, "{difference}");
}

/// Two good files, three bad ones.
fn damaged() -> TempDir {
    let folder = TempDir::new().unwrap();
    save(&folder, "x/a.png", colour(30, 30, 0));
    save(&folder, "x/c.png", colour(30, 30, 0));
    save(&folder, "y/good.png", colour(30, 30, 0));
    let cut = folder.path().join("x/a.png");
    let bytes = fs::read(&cut).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    fs::write(folder.path().join("x/b.png"), "not an image").unwrap();
    fs::write(folder.path().join("y/empty.jpg"), "").unwrap();
    folder
}

#[test]
fn bad_files_are_all_listed() {
    let folder = damaged();
    match open_default(&folder) {
        Err(Error::BadFiles { files }) => {
            let names: Vec<_> = files.iter().map(|(p, _)| p.strip_prefix(folder.path()).unwrap()).collect();
            assert_eq!(names, [Path::new("x/a.png"), Path::new("x/b.png"), Path::new("y/empty.jpg")]);
            assert!(files[0].1.contains("damaged or cut off"), "{}", files[0].1);
            assert!(files[1].1.contains("is not an image"));
            assert_eq!(files[2].1, "is empty");
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn bad_files_can_be_skipped_while_any_image_remains() {
    let folder = damaged();
    let options = DataOptions { on_bad_file: OnBadFile::Skip, ..DataOptions::default() };
    let set = open(folder.path(), &options).unwrap();
    assert_eq!((set.len(), set.label(0), set.label(1)), (2, Some(0), Some(1)));
    assert_eq!(set.summary().skipped.len(), 3);
    assert!(notes(&*set).contains("3 files skipped"));
    fs::remove_file(folder.path().join("x/c.png")).unwrap();
    fs::remove_file(folder.path().join("y/good.png")).unwrap();
    assert!(message(open(folder.path(), &options)).contains("no file here can be read as an image"));
}

#[test]
fn images_on_disk_equal_images_in_memory() {
    let folder = TempDir::new().unwrap();
    for i in 0..6 {
        save(&folder, &format!("{i}.png"), colour(20, 16, i));
    }
    save(&folder, "6.png", grey(20, 16, 0));
    for size in [None, Some((8, 8))] {
        let options = DataOptions { size, ..DataOptions::default() };
        let in_memory = open(folder.path(), &options).unwrap();
        let on_disk = open_within(folder.path(), &options, 100).unwrap();
        assert_eq!(on_disk.summary().memory_bytes, 0);
        assert!(in_memory.summary().memory_bytes > 0);
        assert!(notes(&*on_disk).contains("every read decodes them again"));
        assert_eq!(in_memory.summary().fingerprint, on_disk.summary().fingerprint);
        for i in 0..7 {
            assert_eq!(image(&*in_memory, i), image(&*on_disk, i));
        }
    }
    let set = open_within(folder.path(), &DataOptions::default(), 100).unwrap();
    save(&folder, "0.png", colour(21, 16, 0));
    fs::remove_file(folder.path().join("1.png")).unwrap();
    let mut out = vec![0.0; set.shape().num_elements()];
    for (i, what) in [(0, "it is now 21x16, which resizes to a different size"), (1, "cannot be read")] {
        let text = set.read(i, AugmentKey::default(), &mut out).unwrap_err().to_string();
        assert!(text.contains("has changed since") && text.contains(what), "{text}");
    }
}

#[test]
fn the_fingerprint_covers_pixels_and_names() {
    let make = |name: &str, value: u8, in_colour: bool| {
        let folder = TempDir::new().unwrap();
        let image = DynamicImage::ImageLuma8(grey(3, 3, value));
        if in_colour {
            save(&folder, name, image.to_rgb8());
        } else {
            save(&folder, name, image);
        }
        open_default(&folder).unwrap().summary().fingerprint.clone()
    };
    let first = make("a.png", 1, false);
    assert_eq!(first.len(), 64);
    assert_eq!(first, make("a.png", 1, true));
    assert_ne!(first, make("a.png", 2, false));
    assert_ne!(first, make("b.png", 1, false));
    assert_ne!(first, make("a/a.png", 1, false));
}

#[test]
fn kept_alpha_uses_the_channels_that_all_images_need() {
    let folder = TempDir::new().unwrap();
    let keep = |channels| DataOptions { alpha: Some(Alpha::Keep), channels, ..DataOptions::default() };
    save(&folder, "a.png", RgbaImage::from_pixel(2, 2, Rgba([9, 9, 9, 128])));
    let set = open(folder.path(), &keep(None)).unwrap();
    assert_eq!(set.shape().channels, 2);
    let refused = message(open(folder.path(), &keep(Some(1))));
    assert!(refused.starts_with("data.alpha: the image is partly transparent"), "{refused}");
    assert!(refused.contains("data.channels = 2"), "{refused}");
    // Grey with alpha beside colour without.
    save(&folder, "b.png", colour(2, 2, 5));
    let set = open(folder.path(), &keep(None)).unwrap();
    assert_eq!(set.shape().channels, 4);
    assert_eq!(image(&*set, 0)[..4], [9, 9, 9, 128].map(|v: u8| f32::from(v) / 255.0 * 2.0 - 1.0));
    assert_eq!(image(&*set, 1)[3], 1.0);
    let white = DataOptions { alpha: Some(Alpha::White), ..DataOptions::default() };
    let set = open(folder.path(), &white).unwrap();
    assert_eq!(set.shape().channels, 3);
    assert!(notes(&*set).contains("composited on white"));
    // Without transparency three channels are enough.
    fs::remove_file(folder.path().join("a.png")).unwrap();
    assert_eq!(open(folder.path(), &keep(Some(3))).unwrap().shape().channels, 3);
    assert_eq!(open(folder.path(), &keep(None)).unwrap().shape().channels, 3);
}

#[test]
fn exact_resizing_does_not_crop() {
    let folder = TempDir::new().unwrap();
    // White, with a black column at each end.
    let edges = image::GrayImage::from_fn(30, 10, |x, _| Luma([if (3..27).contains(&x) { 255 } else { 0 }]));
    save(&folder, "a.png", edges);
    let corner = |resize| {
        let options = DataOptions { size: Some((10, 10)), resize, ..DataOptions::default() };
        let set = open(folder.path(), &options).unwrap();
        (image(&*set, 0)[0], notes(&*set))
    };
    assert_eq!(corner(Resize::ShortSide).0, 1.0);
    let (value, notes) = corner(Resize::Exact);
    assert!(value < -0.5 && notes.contains("resized to 10x10 (both sides)"), "{value} {notes}");
}

#[test]
fn random_crops_and_flips_are_the_same_in_memory_and_from_disk() {
    let folder = TempDir::new().unwrap();
    for (i, (height, width)) in [(20, 30), (41, 17), (16, 16), (1, 1)].into_iter().enumerate() {
        save(&folder, &format!("{i}.png"), colour(height, width, i as u8));
    }
    let options = DataOptions {
        size: Some((8, 12)),
        random_crop_scale: Some([0.3, 1.0]),
        horizontal_flip: true,
        ..DataOptions::default()
    };
    let in_memory = open(folder.path(), &options).unwrap();
    let on_disk = open_within(folder.path(), &options, 0).unwrap();
    let note = "every read of an image applies a random crop of 30 to 100 % of the area and a random flip";
    assert!(notes(&*in_memory).contains(note), "{}", notes(&*in_memory));
    assert_eq!(in_memory.summary().fingerprint, on_disk.summary().fingerprint);
    assert_eq!(in_memory.shape(), ImageShape { height: 8, width: 12, channels: 3 });
    let read = |set: &dyn Dataset, index, epoch| {
        let mut out = vec![9.0; 8 * 12 * 3];
        set.read(index, AugmentKey { seed: 4, epoch }, &mut out).unwrap();
        out
    };
    for index in 0..4 {
        for epoch in 0..3 {
            assert_eq!(read(&*in_memory, index, epoch), read(&*on_disk, index, epoch));
        }
    }
    assert_ne!(read(&*in_memory, 0, 0), read(&*in_memory, 0, 1));
}
