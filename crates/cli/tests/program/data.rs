//! `ddpm data`, and training on every kind of data.

use crate::support::{TINY, TestDir, image, losses};
use std::fs;
use std::io::Write;
use std::path::Path;

/// Trains three steps on the images given in `more`.
fn train(dir: &TestDir, more: &[&str]) -> crate::support::Done {
    let tiny: Vec<&str> = TINY.into_iter().filter(|f| !f.contains("data.path")).collect();
    dir.ddpm(&[&["train", "--steps=3"], &tiny[..], more].concat())
}

/// CRC-32 as in zip and PNG.
fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        (0..8).for_each(|_| crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()));
    }
    (!crc).to_le_bytes()
}

/// Writes a zip of the files, uncompressed; the directory gives each the size `claimed`, if set.
fn zip(path: &Path, files: &[(&str, &[u8])], claimed: Option<u32>) {
    // Written by hand: each file after a header, then the directory.
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in files {
        let offset = (bytes.len() as u32).to_le_bytes();
        let size = content.len() as u32;
        let common = |size: u32| {
            let sizes = [(content.len() as u32).to_le_bytes(), size.to_le_bytes()].concat();
            [&[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0][..], &crc(content), &sizes].concat()
        };
        let lengths = [&(name.len() as u16).to_le_bytes()[..], &[0, 0]].concat();
        bytes.extend([&b"PK\x03\x04"[..], &common(size), &lengths, name.as_bytes(), content].concat());
        let rest = [&[0; 10][..], &offset].concat();
        let common = common(claimed.unwrap_or(size));
        directory.extend([&b"PK\x01\x02\x14\0"[..], &common, &lengths, &rest, name.as_bytes()].concat());
    }
    let n = (files.len() as u16).to_le_bytes();
    let sizes = [(directory.len() as u32).to_le_bytes(), (bytes.len() as u32).to_le_bytes()].concat();
    let end = [&b"PK\x05\x06\0\0\0\0"[..], &n, &n, &sizes, &[0, 0]].concat();
    fs::write(path, [bytes, directory, end].concat()).unwrap();
}

#[test]
fn check_reports_on_the_images() {
    let dir = TestDir::new();
    for i in 0..6u8 {
        image(&dir.path(format!("set/{}/{i}.png", ["cat", "dog"][i as usize % 2])), 12, 12, 20 * i);
    }
    fs::copy(dir.path("set/cat/0.png"), dir.path("set/dog/again.png")).unwrap();
    let done = dir.ddpm(&["data", "check", "set", "--set=attention.down_sample=[true,true]"]).succeeds();
    for part in [
        "data        set\n",
        "images      7\n",
        "7  12x12 grey, 8 bits per sample",
        "classes     2\n",
        "3  cat",
        "4  dog",
        "unreadable  none",
        "duplicates  1 image\n",
        "set/cat/0.png = set/dog/again.png",
        "trained as  12x12 grey, 8 bits",
        "memory      ",
        " to train in batches of 32: data ",
    ] {
        assert!(done.out.contains(part), "{part:?} is not in: {}", done.out);
    }

    fs::write(dir.path("set/dog/a.jpg"), "text").unwrap();
    fs::write(dir.path("set/dog/b.jpg"), "").unwrap();
    let done = dir.ddpm(&["data", "check", "set"]).fails(1, &[]);
    for part in ["unreadable  2 files", "a.jpg: is not an image", "b.jpg: is empty", "--on-bad-file skip"] {
        assert!(done.out.contains(part), "{part:?} is not in: {}", done.out);
    }
    let done = dir.ddpm(&["data", "check", "set", "--on-bad-file=skip"]).succeeds();
    assert!(done.out.contains("b.jpg: is empty") && done.out.contains("memory  "), "{}", done.out);

    // Reports the error that training would.
    image(&dir.path("set/dog/large.png"), 20, 12, 3);
    let done = dir.ddpm(&["data", "check", "set", "--on-bad-file=skip"]).fails(1, &[]);
    assert!(done.out.contains("refused     ") && done.out.contains("2 sizes"), "{}", done.out);
    dir.ddpm(&["data", "check", "set", "--on-bad-file=skip", "--size=16"]).succeeds();
    dir.ddpm(&["data", "check", "sat"]).fails(1, &["did you mean set?"]);
    let done = dir.ddpm(&["data", "check", "digits", "--set=data.digits_count=50"]).succeeds();
    assert!(done.out.contains("images      50"), "{}", done.out);
}

#[test]
fn show_draws_what_the_network_will_see() {
    let dir = TestDir::new();
    for i in 0..10u8 {
        image(&dir.path(format!("set/{i}.png")), 12, 20, 20 * i);
    }
    let show = |more: &[&str]| dir.ddpm(&[&["data", "show", "set", "--size=8"], more].concat()).succeeds();
    let done = show(&[]);
    assert!(done.err.contains("data.png: 10 of 10 images, 8x8 grey"), "{}", done.err);
    let grid = |name: &str| image::open(dir.path(name)).unwrap().to_luma8();
    // Five per row, enlarged 11 times, six pixels apart with a margin of twelve.
    assert_eq!(grid("data.png").dimensions(), (5 * 94 + 18, 2 * 94 + 18));
    show(&["-n", "3", "-o", "a.png", "--seed=1"]);
    show(&["-n", "3", "-o", "b.png", "--seed=1"]);
    show(&["-n", "3", "-o", "c.png", "--seed=2"]);
    assert_eq!(grid("a.png").dimensions(), (3 * 94 + 18, 94 + 18));
    assert_eq!(grid("a.png"), grid("b.png"));
    assert_ne!(grid("a.png"), grid("c.png"));
    let sampled = ["--set=data.random_crop_scale=0.2,0.5", "--set=data.horizontal_flip=true"];
    show(&[&["-n", "3", "-o", "d.png", "--seed=1"][..], &sampled].concat());
    assert_ne!(grid("a.png"), grid("d.png"));
    dir.ddpm(&["data", "show", "set", "-n", "0"]).fails(1, &["-n must be at least 1"]);
    dir.ddpm(&["data", "show", "set", "-o", "no/such.png", "--size=8"]).fails(1, &["no/such.png"]);
}

#[test]
fn a_csv_file_lists_the_images_wherever_the_run_is_resumed() {
    let dir = TestDir::new();
    for i in 0..4u8 {
        image(&dir.path(format!("hands/{}.png", 1377 + u32::from(i))), 12, 12, 60 * i);
    }
    let mut table = fs::File::create(dir.path("hands.csv")).unwrap();
    table.write_all(b"id,boneage,male\n1377,180,False\n1379,12,True\n").unwrap();
    let csv = "--set=data.csv=hands.csv";
    let done = train(&dir, &["--data=hands", csv, "--set=data.csv_label_column=male", "--name=r"]).succeeds();
    assert!(done.err.contains("2 images, 12x12 grey, 8 bit, 2 classes"), "{}", done.err);
    let elsewhere = dir.path("hands");
    let mut resume = dir.command(&["train", "--resume", "../runs/r", "--steps=4"]);
    let resumed: crate::support::Done = resume.current_dir(elsewhere).output().unwrap().into();
    resumed.succeeds();

    let id = "--set=data.csv_id_column=ids";
    train(&dir, &["--data=hands", csv, id])
        .fails(1, &["hands.csv", "no column \"ids\"", "did you mean \"id\"; the columns"]);
    table.write_all(b"2000,3,True\n").unwrap();
    train(&dir, &["--data=hands", csv]).fails(1, &["2000.png: does not exist (line 4 of hands.csv)"]);
    table.write_all(b"1377,3,True\n").unwrap();
    train(&dir, &["--data=hands", csv]).fails(1, &["an id is given more than once: 1377 (lines 2 and 5)"]);
}

#[test]
fn a_zip_is_trained_on_without_being_unpacked() {
    let dir = TestDir::new();
    let mut files = Vec::new();
    for i in 0..5u8 {
        let name = format!("{}/{i}.png", ["cat", "dog"][i as usize % 2]);
        image(&dir.path(format!("set/{name}")), 12, 12, 50 * i);
        files.push((name.clone(), fs::read(dir.path(format!("set/{name}"))).unwrap()));
    }
    let files: Vec<_> = files.iter().map(|(name, bytes)| (&**name, &bytes[..])).collect();
    zip(&dir.path("set.zip"), &files, None);
    let done = train(&dir, &["--data=set.zip", "--name=zip"]).succeeds();
    assert!(done.err.contains("5 images, 12x12 grey, 8 bit, 2 classes"), "{}", done.err);
    // The folder in the same order, and the zip with nothing cached in memory: the same losses.
    train(&dir, &["--data=set", "--name=folder"]).succeeds();
    train(&dir, &["--data=set.zip", "--name=outside", "--set=data.memory_mib=0"]).succeeds();
    for other in ["folder", "outside"] {
        assert_eq!(losses(&dir.path(format!("runs/{other}"))), losses(&dir.path("runs/zip")));
    }

    let escape = [files.clone(), vec![("../../evil.png", files[0].1)]].concat();
    zip(&dir.path("escape.zip"), &escape, None);
    train(&dir, &["--data=escape.zip"]).fails(1, &["evil.png: has a path that leads out of the archive"]);
    let done = train(&dir, &["--data=escape.zip", "--on-bad-file=skip"]).succeeds();
    assert!(done.err.contains("evil.png: has a path that leads out"), "{}", done.err);
    zip(&dir.path("bomb.zip"), &files, Some(500 << 20));
    train(&dir, &["--data=bomb.zip"]).fails(1, &["bomb.zip: it would unpack to 2 GiB", "like a zip bomb"]);
    zip(&dir.path("large.zip"), &files[..1], Some(u32::MAX - 1));
    train(&dir, &["--data=large.zip"]).fails(1, &["0.png: would unpack to 4095 MiB; at most 512 are read"]);
}

#[test]
fn odd_images_are_read_or_refused_by_name() {
    let dir = TestDir::new();
    image(&dir.path("set/plain.png"), 12, 12, 30);
    // A header of 60,000 x 60,000 on a 12 x 12 image.
    let mut huge = fs::read(dir.path("set/plain.png")).unwrap();
    huge[16..24].copy_from_slice(&[60_000u32.to_be_bytes(); 2].concat());
    let sum = crc(&huge[12..29]);
    huge[29..33].copy_from_slice(&[sum[3], sum[2], sum[1], sum[0]]);
    fs::write(dir.path("set/huge.png"), &huge).unwrap();
    image::GrayImage::from_pixel(1, 1, image::Luma([90])).save(dir.path("set/pixel.png")).unwrap();
    let deep = image::ImageBuffer::from_fn(12, 12, |x, y| image::Luma([(x * 5000 + y) as u16]));
    image::DynamicImage::ImageLuma16(deep).save(dir.path("set/deep.png")).unwrap();
    let mut gif = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut gif);
    for value in [20, 200] {
        let frame = image::RgbaImage::from_pixel(12, 12, image::Rgba([value, value, value, 255]));
        encoder.encode_frame(image::Frame::new(frame)).unwrap();
    }
    drop(encoder);
    fs::write(dir.path("set/two.gif"), gif).unwrap();

    train(&dir, &["--data=set"]).fails(
        1,
        &["1 file cannot be read as an image", "huge.png: is too large: over 32768 pixels per side"],
    );
    let done = dir.ddpm(&["data", "check", "set", "--size=12", "--on-bad-file=skip"]).succeeds();
    for part in
        ["images      4", "1x1 grey", "12x12 grey, 16 bits per sample", "trained as  12x12 grey, 16 bits"]
    {
        assert!(done.out.contains(part), "{part:?} is not in: {}", done.out);
    }
    train(&dir, &["--data=set", "--on-bad-file=skip"]).succeeds();
}

#[test]
fn images_that_break_during_training_are_named() {
    let dir = TestDir::new();
    for i in 0..6u8 {
        image(&dir.path(format!("set/{i}.png")), 12, 12, 40 * i);
    }
    train(&dir, &["--data=set", "--name=r", "--set=data.memory_mib=0"]).succeeds();
    // A file missing before a run is resumed is only a change of data; a broken one is an error.
    fs::write(dir.path("set/3.png"), "broken").unwrap();
    dir.ddpm(&["train", "--resume", "r", "--steps=9"])
        .fails(1, &["set/3.png: is not an image", "--on-bad-file skip"]);
}

#[test]
fn many_sizes_are_reported_as_a_range() {
    let dir = TestDir::new();
    for i in 0..40u32 {
        let path = dir.path(format!("set/{i:02}.png"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::GrayImage::new(20 + i, 12 + i % 7).save(path).unwrap();
    }
    image::RgbaImage::from_pixel(9, 8, image::Rgba([1, 2, 3, 4])).save(dir.path("set/x.png")).unwrap();
    fs::write(dir.path("set/notes.txt"), "x").unwrap();
    let done = dir.ddpm(&["data", "check", "set"]).fails(1, &[]);
    for part in [
        "formats           40  12 to 18 x 20 to 59 grey, 8 bits per sample: 40 sizes, ",
        "1  8x9 RGBA, 8 bits per sample",
        "(--all lists every size)",
        "notes       1 file ignored: no image extension",
        "41 sizes, 8 to 18 x 9 to 59 (height x width): ",
        " and 36 more; --size",
    ] {
        assert!(done.out.contains(part), "{part:?} is not in: {}", done.out);
    }
    let done = dir.ddpm(&["data", "check", "set", "--all"]).fails(1, &[]);
    assert_eq!(done.out.matches("bits per sample").count(), 41, "{}", done.out);
}

#[test]
fn a_resumed_run_keeps_its_order_of_classes() {
    let dir = TestDir::new();
    for (i, name) in ["1", "2", "10"].iter().enumerate() {
        for k in 0..2 {
            image(&dir.path(format!("set/{name}/{k}.png")), 12, 12, (60 * i + 9 * k) as u8);
        }
    }
    let more = ["--data=set", "--set=attention.num_class_embeds=3"];
    dir.train("whole", 6, 0, &more).succeeds();
    dir.train("part", 3, 0, &more).succeeds();
    dir.ddpm(&["train", "--resume", "part", "--steps=6"]).succeeds();
    assert_eq!(losses(&dir.path("runs/part")), losses(&dir.path("runs/whole")));
    let draw = |run: &str| {
        let done = dir.ddpm(&["sample", run, "-n1", "--class=10", "--steps=2"]).succeeds();
        (done.err.lines().next().unwrap().to_owned(), fs::read(dir.path(done.out.trim())).unwrap())
    };
    assert_eq!(draw("part"), draw("whole"));
    assert!(draw("whole").0.ends_with("10 (#2)"));
    // A class that the run was not trained on is rejected by name.
    fs::rename(dir.path("set/10"), dir.path("set/11")).unwrap();
    dir.ddpm(&["train", "--resume", "part", "--steps=8"]).fails(
        1,
        &["the images have the class \"11\", on which the run was not trained; it knows \"1\", \"2\", \"10\""],
    );
}
