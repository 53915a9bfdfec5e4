//! Archives of every kind: intact, damaged and hostile.

use super::super::super::test_util::{colour, grey, image, message, notes};
use super::super::super::{DataOptions, Dataset, OnBadFile, open as open_set, open_within};
use super::*;
use image::{DynamicImage, ImageFormat};
use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use tempfile::TempDir;
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn packed(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn saved(bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("set.zip");
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn opened(files: &[(&str, &[u8])], options: &DataOptions) -> Result<Box<dyn Dataset>> {
    let (_folder, path) = saved(&packed(files));
    open_set(&path, options)
}

/// The rejected files, each with the reason.
fn bad(files: &[(&str, &[u8])]) -> Vec<(String, String)> {
    match opened(files, &DataOptions::default()) {
        Err(Error::BadFiles { files }) => {
            let name = |p: PathBuf| p.to_string_lossy().rsplit_once("set.zip").unwrap().1[1..].to_owned();
            files.into_iter().map(|(path, reason)| (name(path), reason)).collect()
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn an_archive_is_read_like_a_folder_of_its_files() {
    let images = [png(colour(6, 6, 1)), png(colour(6, 6, 2)), png(colour(6, 6, 3))];
    let [one, two, three] = images.each_ref().map(|p| &p[..]);
    let names = ["dog/1.png", "cat/7.png", "cat/2.PNG"];
    let folder = TempDir::new().unwrap();
    for (name, bytes) in names.iter().zip(&images) {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let expected = open_set(folder.path(), &DataOptions::default()).unwrap();
    for wrap in ["", "all/", "data/train/"] {
        let inside = names.map(|name| format!("{wrap}{name}"));
        let other = [format!("{wrap}read me.txt"), format!("__MACOSX/{wrap}dog/._1.png")];
        let files = [
            (&*inside[0], one),
            (&*inside[1], two),
            (&*inside[2], three),
            (&*other[0], b"hello"),
            (&*other[1], b"x"),
        ];
        let set = opened(&files, &DataOptions::default()).unwrap();
        assert_eq!(set.classes(), ["cat", "dog"], "{wrap}");
        assert_eq!((0..3).map(|i| set.label(i)).collect::<Vec<_>>(), [Some(0), Some(0), Some(1)]);
        assert_eq!(set.summary().fingerprint, expected.summary().fingerprint);
        assert!(notes(&*set).contains("1 file ignored: no image extension"), "{}", notes(&*set));
        assert!((0..3).all(|i| image(&*set, i) == image(&*expected, i)));
    }
    // A flat folder packed as a whole, with mixed separators.
    let set = opened(&[("photos/b.png", one), ("photos\\a.png", two)], &DataOptions::default()).unwrap();
    assert_eq!((set.len(), set.classes().len()), (2, 0));
    assert!(notes(&*set).contains("everything in the archive is inside photos/"), "{}", notes(&*set));
    assert_eq!(image(&*set, 0), image(&*expected, 1));
}

#[test]
fn images_unpacked_on_every_read_equal_images_in_memory() {
    let images: Vec<_> = (0..5).map(|i| png(colour(9, 9, i * 30))).collect();
    let names: Vec<_> = (0..5).map(|i| format!("{i}.png")).collect();
    let files: Vec<_> = names.iter().map(|n| &**n).zip(images.iter().map(|p| &p[..])).collect();
    let (_folder, path) = saved(&packed(&files));
    let options = DataOptions::default();
    let (in_memory, on_disk) = (open_set(&path, &options).unwrap(), open_within(&path, &options, 0).unwrap());
    assert_eq!(on_disk.summary().memory_bytes, 0);
    // From several threads at once.
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                (0..5).for_each(|i| assert_eq!(image(&*in_memory, i), image(&*on_disk, i)));
            });
        }
    });
}

#[test]
fn paths_that_lead_out_of_the_archive_are_rejected() {
    let good = png(grey(4, 4, 0));
    let names = ["../out.png", "a/../../out.png", "/etc/out.png", "C:\\out.png", "..\\out.png", "../x.sh"];
    for name in names {
        let refused = bad(&[("good.png", &good), (name, &good)]);
        assert_eq!(refused.len(), 1, "{name}");
        let expected = if name.starts_with(['/', 'C']) { "absolute path" } else { "leads out of" };
        assert!(refused[0].1.contains(expected), "{name}: {}", refused[0].1);
        let skip = DataOptions { on_bad_file: OnBadFile::Skip, ..DataOptions::default() };
        let set = opened(&[("good.png", &good), (name, &good)], &skip).unwrap();
        assert_eq!((set.len(), set.summary().skipped.len()), (1, 1));
    }
    // Without other images, the bad entry is still reported.
    assert_eq!(bad(&[("../out.png", &good)]).len(), 1);
}

#[test]
fn deep_and_long_names_are_rejected() {
    let good = png(grey(4, 4, 0));
    let deep = format!("{}a.png", "a/".repeat(2_000));
    let refused = bad(&[("good.png", &good), (&deep, &good)]);
    assert!(refused[0].1.contains("is nested in 2000 folders"), "{}", refused[0].1);
    let long = format!("{}.png", "a".repeat(60_000));
    let refused = bad(&[("good.png", &good), (&long, &good)]);
    assert!(refused[0].1.contains("has a name of 60004 bytes"), "{}", refused[0].1);
}

/// An archive of one image, compressed with `method`.
fn one(method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("a.png", SimpleFileOptions::default().compression_method(method)).unwrap();
    zip.write_all(&png(colour(30, 20, 7))).unwrap();
    zip.finish().unwrap().into_inner()
}

/// An archive of one image whose headers declare `method`, with `content` as the raw data.
fn packed_as(method: u16, content: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file("a.png", options).unwrap();
    zip.write_all(content).unwrap();
    let mut bytes = zip.finish().unwrap().into_inner();
    let plain = png(colour(30, 20, 7));
    let mut sum = flate2::Crc::new();
    sum.update(&plain);
    let directory = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    for (at, length) in [(8, 22), (directory + 10, directory + 24)] {
        bytes[at..at + 2].copy_from_slice(&method.to_le_bytes());
        bytes[length - 8..length - 4].copy_from_slice(&sum.sum().to_le_bytes());
        bytes[length..length + 4].copy_from_slice(&(plain.len() as u32).to_le_bytes());
    }
    bytes
}

/// Archives made by tools/golden/zip.py.
fn golden() -> BTreeMap<String, Vec<u8>> {
    let golden: BTreeMap<String, String> =
        serde_json::from_str(include_str!("../../../tests/golden/zip.json")).unwrap();
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    };
    golden.into_iter().map(|(name, hex)| (name, bytes(&hex))).collect()
}

fn read(bytes: &[u8]) -> Result<Vec<f32>> {
    let (_folder, path) = saved(bytes);
    open_set(&path, &DataOptions::default()).map(|set| image(&*set, 0))
}

#[test]
fn compression_methods_are_read_or_rejected_by_name() {
    let expected = read(&one(CompressionMethod::Stored)).unwrap();
    for method in [CompressionMethod::Deflated, CompressionMethod::Bzip2] {
        assert_eq!(read(&one(method)).unwrap(), expected, "{method}");
    }
    for (name, bytes) in golden() {
        let values: Vec<_> =
            read(&bytes).unwrap().iter().map(|v| ((v + 1.0) * 127.5).round() as u32).collect();
        let expected: Vec<_> = (0..600).map(|i| (7 * (i % 30) + 5 * (i / 30)) % 256).collect();
        assert_eq!(values, expected, "{name}");
    }
    let plain = png(colour(30, 20, 7));
    // Deflate and deflate64 differ only in matches of 258 bytes, which uncompressed blocks do not have.
    let mut deflated = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::none());
    deflated.write_all(&plain).unwrap();
    assert_eq!(read(&packed_as(9, &deflated.finish().unwrap())).unwrap(), expected);
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = ruzstd::encoding::compress_to_vec(&plain[..], level);
    assert_eq!(read(&packed_as(93, &zstd)).unwrap(), expected);
    // Every kind of damage.
    for (content, reason) in [
        (zstd[..zstd.len() / 2].to_vec(), "damaged"),
        (plain.clone(), "damaged"),
        (ruzstd::encoding::compress_to_vec(&plain[..50], level), "is cut off: 50 bytes"),
        (ruzstd::encoding::compress_to_vec(&[&plain[..], &[0]].concat()[..], level), "unpacks to more"),
        (ruzstd::encoding::compress_to_vec(&vec![0; plain.len()][..], level), "checksum is wrong"),
    ] {
        let text = read(&packed_as(93, &content)).unwrap_err().to_string();
        assert!(text.contains(reason), "{reason}: {text}");
    }
    for (method, name) in [(98, "PPMd"), (95, "XZ"), (1, "Shrink"), (6, "Implode"), (1234, "method 1234")] {
        let text = read(&packed_as(method, &plain)).unwrap_err().to_string();
        let expected = format!(
            "a.png: is compressed with {name}, which is not supported; unpack the archive and give the folder"
        );
        assert!(text.contains(&expected) && !text.contains("damaged"), "{text}");
    }
}

#[test]
fn a_huge_lzma_dictionary_is_rejected() {
    let mut bytes = golden().remove("lzma").unwrap();
    let content = 30 + usize::from(bytes[26]) + usize::from(bytes[28]);
    bytes[content + 5..content + 9].copy_from_slice(&u32::MAX.to_le_bytes());
    let text = read(&bytes).unwrap_err().to_string();
    assert!(text.contains("needs an LZMA dictionary of 4095 MiB"), "{text}");
}

#[test]
fn self_extracting_and_zip64_archives_are_read() {
    let plain = one(CompressionMethod::Deflated);
    let expected = read(&plain).unwrap();
    for prefix in [&b"MZ a program that unpacks itself"[..], &[0; 100_000], b"#!/bin/sh\nexit\n"] {
        assert_eq!(read(&[prefix, &plain].concat()).unwrap(), expected);
    }
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let large = SimpleFileOptions::default().large_file(true).compression_method(CompressionMethod::Deflated);
    zip.start_file("a.png", large).unwrap();
    zip.write_all(&png(colour(30, 20, 7))).unwrap();
    assert_eq!(read(&zip.finish().unwrap().into_inner()).unwrap(), expected);
    // With a comment that looks like a signature.
    let mut zip = ZipWriter::new_append(Cursor::new(plain.clone())).unwrap();
    zip.set_comment("made by hand PK").unwrap();
    let commented = zip.finish().unwrap().into_inner();
    assert_eq!(read(&[b"prefix", &commented[..]].concat()).unwrap(), expected);
}

/// A tar archive of one text file, with or without the POSIX signature.
fn tar(posix: bool) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..9].copy_from_slice(b"cat/1.png");
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(b"00000000005\0");
    block[148..156].fill(b' ');
    if posix {
        block[257..265].copy_from_slice(b"ustar\x0000");
    }
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.extend(b"hello");
    block.resize(2048, 0);
    block
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn unsupported_archives_are_rejected_by_name() {
    for (bytes, name) in [
        (tar(true), "it is a tar archive, which is not supported; unpack it and give the folder"),
        (tar(false), "it is a tar archive, which is not supported"),
        (b"7z\xbc\xaf\x27\x1c rest".to_vec(), "a 7z archive"),
        (b"Rar!\x1a\x07\x01\0rest".to_vec(), "a RAR archive"),
        (
            gzip(&tar(true)),
            "it is a tar archive compressed with gzip, which is not supported; unpack it (tar -xzf)",
        ),
        (gzip(&tar(false)), "it is a tar archive compressed with gzip"),
        (
            gzip(&tar(true)).split_last_chunk::<9>().unwrap().0.to_vec(),
            "it is a tar archive compressed with gzip",
        ),
        (
            gzip(&packed(&[("a.png", b"x")])),
            "it is a zip archive compressed with gzip, which is not supported; unpack",
        ),
        (gzip(&png(grey(4, 4, 0))), "it is a PNG image compressed with gzip"),
        (gzip(&gzip(b"hello, hello")), "it is compressed with gzip twice"),
        (gzip(b"hello, hello"), "it is not an IDX file: unpacked, it starts with [68, 65, 6c, 6c]"),
        (gzip(b"hello, hello\n".repeat(99).as_slice()), "it is not an IDX file"),
    ] {
        let text = read(&bytes).unwrap_err().to_string();
        assert!(text.contains(name), "{name}: {text}");
    }
    let folder = TempDir::new().unwrap();
    let named = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).unwrap();
        message(open_set(&folder.path().join(name), &DataOptions::default()))
    };
    let text = named("photo", &png(grey(4, 4, 0)));
    assert!(
        text.contains("it is a PNG image without an image extension; rename it to end in .png"),
        "{text}"
    );
    // In place of an MNIST file.
    let text = named("train-images-idx3-ubyte.gz", &gzip(&tar(true)));
    assert!(text.contains("it is a tar archive compressed with gzip"), "{text}");
}

#[test]
fn parts_of_a_split_archive_are_rejected() {
    let archive = packed(&[("a.png", &png(colour(30, 30, 0)))]);
    let cut = archive.len() / 2;
    // The directory end has the number of the last part.
    let mut last = archive[cut..].to_vec();
    let end = last.windows(4).position(|w| w == b"PK\x05\x06").unwrap();
    last[end + 4] = 2;
    last[end + 6] = 2;
    let folder = TempDir::new().unwrap();
    let first = [b"PK\x07\x08", &archive[..cut]].concat();
    for (name, bytes) in [
        ("set.z01", &first[..]),
        ("first.zip", &first),
        ("set.z02", &archive[cut..cut + 9]),
        ("set.zip", &last),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let text = message(open_set(&path, &DataOptions::default()));
        assert!(
            text.contains(&format!("{name}: it is a part of a split zip archive"))
                && text.contains("zip -s 0"),
            "{name}: {text}"
        );
    }
    // An archive that could have been split but was not starts with the same signature.
    let unsplit = [&b"PK\x07\x08"[..], &archive].concat();
    assert_eq!(read(&unsplit).unwrap(), read(&archive).unwrap());
    // Half an archive is not a part of a split one.
    let text = read(&archive[..cut]).unwrap_err().to_string();
    assert!(text.contains("it is a damaged zip archive, or cut off") && !text.contains("split"), "{text}");
}

#[test]
fn of_entries_with_the_same_name_the_last_is_read() {
    let images = [1, 2, 3, 4].map(|i| png(colour(6, 6, i)));
    let [one, two, three, other] = images.each_ref().map(|p| &p[..]);
    let alone = |image: &[u8]| read(&packed(&[("a.png", image)])).unwrap();
    let all = [
        (["x/a.png", "x/a.png", "x/a.png"], three),
        (["x/a.png", "./x/a.png", "x\\a.png"], three),
        (["x/a.png", "x//a.png", "x/a.png"], three),
        (["x/a.png", "x/a.png", "x/./a.png"], three),
    ];
    for (names, expected) in all {
        // The writer rejects duplicate names, so a name of the same length is patched in afterwards.
        let placeholders = [0, 1, 2].map(|i| format!("{i}{}", &names[i][1..]));
        let files = [
            (&*placeholders[0], one),
            (&*placeholders[1], two),
            (&*placeholders[2], three),
            ("x/b.png", other),
        ];
        let mut bytes = packed(&files);
        for (placeholder, name) in placeholders.iter().zip(names) {
            while let Some(at) = bytes.windows(placeholder.len()).position(|w| w == placeholder.as_bytes()) {
                bytes[at..at + placeholder.len()].copy_from_slice(name.as_bytes());
            }
        }
        for prefix in [&b""[..], b"#!/bin/sh\nexit\n"] {
            let (_folder, path) = saved(&[prefix, &bytes].concat());
            let set = open_set(&path, &DataOptions::default()).unwrap();
            assert_eq!(set.len(), 2, "{names:?}");
            assert_eq!((image(&*set, 0), image(&*set, 1)), (alone(expected), alone(other)), "{names:?}");
            let note = "one name occurs more than once in the archive (x/a.png): its last entry is read";
            assert!(notes(&*set).contains(note), "{names:?}: {}", notes(&*set));
        }
    }
    // No note for different names.
    let set = opened(&[("x/a.png", one), ("y/a.png", two)], &DataOptions::default()).unwrap();
    assert!(!notes(&*set).contains("more than once"), "{}", notes(&*set));
}

#[test]
fn links_and_encrypted_entries_are_rejected() {
    let good = png(grey(4, 4, 0));
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("a.png", SimpleFileOptions::default()).unwrap();
    zip.write_all(&good).unwrap();
    zip.add_symlink("link.png", "/etc/passwd", SimpleFileOptions::default()).unwrap();
    let mut bytes = zip.finish().unwrap().into_inner();
    let (_folder, path) = saved(&bytes);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("1 file cannot") && text.contains("link.png: is a symbolic link"), "{text}");

    // Bit 0 of the flags, in the local header and in the central directory.
    bytes[6] |= 1;
    let directory = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    bytes[directory + 8] |= 1;
    let (_folder, path) = saved(&bytes);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("a.png: is encrypted"), "{text}");
}

#[test]
fn a_zip_bomb_is_rejected_before_unpacking() {
    // Only the declared sizes are patched, because that is what is checked.
    let small = packed(&[("a.png", &png(grey(4, 4, 0))), ("b.png", &png(grey(4, 4, 0)))]);
    let with_size = |size: u32| {
        let mut bytes = small.clone();
        let marks: Vec<_> =
            bytes.windows(4).enumerate().filter(|(_, w)| *w == b"PK\x01\x02").map(|(i, _)| i).collect();
        for mark in marks {
            bytes[mark + 24..mark + 28].copy_from_slice(&size.to_le_bytes());
        }
        saved(&bytes)
    };
    let (_folder, path) = with_size(520 << 20);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("a.png: would unpack to 520 MiB; at most 512 are read"), "{text}");
    let (_folder, path) = with_size(512 << 20);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(!text.contains("like a zip bomb"), "twice 512 MiB is not more than 1 GiB: {text}");

    let three = [("a.png", &b"x"[..]), ("b.png", b"x"), ("c.png", b"x")];
    let mut bytes = packed(&three);
    let marks: Vec<_> =
        bytes.windows(4).enumerate().filter(|(_, w)| *w == b"PK\x01\x02").map(|(i, _)| i).collect();
    for mark in marks {
        bytes[mark + 24..mark + 28].copy_from_slice(&(500u32 << 20).to_le_bytes());
    }
    let (_folder, path) = saved(&bytes);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("it would unpack to 1 GiB") && text.contains("like a zip bomb"), "{text}");

    // Ten megabytes of zeros in a few kilobytes, declared as 100 bytes.
    let mut bytes = packed(&[("a.png", &vec![0; 10 << 20])]);
    let mark = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    bytes[mark + 24..mark + 28].copy_from_slice(&100u32.to_le_bytes());
    let (_folder, path) = saved(&bytes);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("more than the declared 100 bytes") || text.contains("damaged"), "{text}");
}

#[test]
fn damaged_archives_are_rejected_with_the_reason() {
    let good = packed(&[("a.png", &png(colour(30, 30, 0)))]);
    let (_folder, path) = saved(&good[..good.len() / 2]);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("set.zip: it is a damaged zip archive"), "{text}");
    // A flipped bit in the data: caught by the checksum.
    let mut flipped = good.clone();
    flipped[60] ^= 4;
    let (_folder, path) = saved(&flipped);
    let text = message(open_set(&path, &DataOptions::default()));
    assert!(text.contains("a.png") && text.contains("damaged"), "{text}");
    for files in [&[][..], &[("notes.txt", &b"x"[..])]] {
        let text = message(opened(files, &DataOptions::default()));
        assert!(text.contains("no images here"), "{text}");
    }
    assert_eq!(bad(&[("a.png", b""), ("b.png", b"text")]).len(), 2);
}
