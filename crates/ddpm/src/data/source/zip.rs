//! Zip archives of images: entries are unpacked into memory one by one, never to disk.
//!
//! An archive is laid out as a folder would be: flat, or one folder per class. Folders that hold everything else, as
//! an archive made of a folder has, are looked through.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::super::unusable;
use super::folder::{Arranged, Names, arrange};
use super::{Content, Entry, Files, Store, is_image_name};
use crate::error::{Error, Result};
use crate::text::shown;

/// Entries that say they are longer are not unpacked.
const MAX_ENTRY: u64 = 512 << 20;
/// An archive that says it unpacks to more than this many times its length, and `MIN_BOMB`, is a bomb: photographs
/// hardly shrink, and drawings not by this much on the average.
const MAX_RATIO: u64 = 100;
/// No archive that unpacks to less is taken for a bomb, in bytes.
const MIN_BOMB: u64 = 1 << 30;
/// Longest name of an entry, in bytes, as a path on the disk may have it.
const MAX_NAME: usize = 4096;
/// Most folders inside one another. A name has up to 64 KiB, and each folder on its way takes memory.
const MAX_DEPTH: usize = 32;

/// Largest dictionary that an LZMA entry may ask memory for, in bytes.
const MAX_DICTIONARY: u32 = 256 << 20;
/// Longest end of an archive: the directory's end, and a comment.
const MAX_END: u64 = 22 + 0xFFFF;

/// The first `N` bytes of the file at `path`, if it has as many.
fn start<const N: usize>(path: &Path) -> Option<[u8; N]> {
    let mut start = [0; N];
    File::open(path).and_then(|mut file| file.read_exact(&mut start)).ok().map(|()| start)
}

const ENCRYPTED: &str = "is encrypted; unpack the archive with its password and give the folder";

/// Whether the file at `path` begins as a zip archive does, or as a part of one does.
pub(super) fn begins_as_zip(path: &Path) -> bool {
    // An archive without entries has only the end of its directory; one that could have been split begins with a mark.
    start(path).is_some_and(|start: [u8; 4]| {
        [b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK00"].contains(&&start)
    })
}

/// Whether the file at `path` ends as a zip archive does, whatever it begins with: a program that unpacks it, say.
pub(super) fn has_directory(path: &Path) -> bool {
    let end = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_END)))?;
        let mut end = Vec::new();
        file.take(MAX_END).read_to_end(&mut end)?;
        Ok(end)
    };
    let Ok(end) = end() else { return false };
    (0..end.len().saturating_sub(21)).rev().any(|at| {
        // Its comment reaches to the end of the file.
        let comment = usize::from(u16::from_le_bytes([end[at + 20], end[at + 21]]));
        end[at..].starts_with(b"PK\x05\x06") && at + 22 + comment == end.len()
    })
}

/// The archive of another kind that the file at `path` begins as.
pub(super) fn other_archive(path: &Path) -> Option<&'static str> {
    if start(path).is_some_and(|start: [u8; 262]| start.ends_with(b"ustar")) {
        return Some("a tar archive");
    }
    let kinds: [(&[u8], &'static str); 5] = [
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"BZh", "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    ];
    let start: [u8; 6] = start(path)?;
    kinds.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, kind)| *kind)
}

/// The name of a way to pack that is not read; nothing for those that are.
fn unread(method: CompressionMethod) -> Option<String> {
    #[expect(deprecated, reason = "there is no other way to the number of a method that is not known")]
    let CompressionMethod::Unsupported(number) = method else { return None };
    let name = match number {
        93 => return None,
        1 => "Shrink",
        2..=5 => "Reduce",
        6 | 10 => "Implode",
        20 => "an early zstd",
        95 => "XZ",
        96 => "WinZip's JPEG",
        97 => "WavPack",
        98 => "PPMd",
        99 => "AES",
        _ => return Some(format!("method {number}")),
    };
    Some(name.to_owned())
}

/// Why an archive as a whole cannot be read.
fn broken(path: &Path, e: &ZipError) -> Error {
    let reason = match e {
        ZipError::UnsupportedArchive(what) if what.contains("multi-disk") => {
            "it is a part of a split zip archive; join the parts (zip -s 0 PART.zip --out WHOLE.zip) and give the whole".into()
        }
        ZipError::UnsupportedArchive(what) => format!("it is a zip archive of a kind that is not read: {what}"),
        e => format!("it is a damaged zip archive, cut off, or a part of a split one: {e}"),
    };
    unusable(path, reason)
}

/// An open archive. Unpacking is short beside decoding, so that one lock for all threads does.
pub(super) struct Archive(Mutex<ZipArchive<BufReader<File>>>);

impl Archive {
    /// The content of an entry; the error is the reason, for a person.
    pub fn read(&self, at: usize) -> Result<Vec<u8>, String> {
        // What a panicking thread left is only a place in the file, which every reading sets anew.
        let mut archive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut raw = archive.by_index_raw(at).map_err(reason)?;
        let declared = raw.size();
        if declared > MAX_ENTRY {
            return Err(too_long(declared));
        }
        let method = raw.compression();
        let damaged = |e: std::io::Error| format!("cannot be unpacked, it is damaged: {e}");
        let mut bytes = Vec::new();
        if method == CompressionMethod::ZSTD {
            let mut packed = Vec::new();
            raw.by_ref().take(MAX_ENTRY).read_to_end(&mut packed).map_err(damaged)?;
            let expected = raw.crc32();
            drop(raw);
            drop(archive);
            bytes = unpack_zstd(&packed, declared)?;
            let mut sum = flate2::Crc::new();
            sum.update(&bytes);
            if sum.sum() != expected && bytes.len() as u64 == declared {
                return Err("cannot be unpacked, it is damaged: its checksum is wrong".into());
            }
        } else {
            if method == CompressionMethod::LZMA {
                // Two numbers of two bytes, a byte of settings, then the size of the dictionary.
                let mut head = [0; 9];
                raw.read_exact(&mut head).map_err(damaged)?;
                let dictionary = u32::from_le_bytes([head[5], head[6], head[7], head[8]]);
                if dictionary > MAX_DICTIONARY {
                    return Err(format!(
                        "asks for a dictionary of {} MiB to be unpacked; at most {} are given",
                        dictionary >> 20,
                        MAX_DICTIONARY >> 20
                    ));
                }
            }
            drop(raw);
            let entry = archive.by_index(at).map_err(reason)?;
            // One more byte than it may have: enough to see that it is longer, and to have its checksum compared.
            entry.take(declared + 1).read_to_end(&mut bytes).map_err(damaged)?;
        }
        match bytes.len() as u64 {
            0 => Err("is empty".into()),
            n if n > declared => Err(format!(
                "unpacks to more than the {declared} bytes that the archive says: it is damaged, or a zip bomb"
            )),
            n if n < declared => Err(format!("is cut off: {n} bytes of {declared}")),
            _ => Ok(bytes),
        }
    }
}

/// Unpacks the frames of a zstd entry, up to one byte more than it says to have.
fn unpack_zstd(mut packed: &[u8], declared: u64) -> Result<Vec<u8>, String> {
    let damaged = |e: &dyn std::fmt::Display| format!("cannot be unpacked, it is damaged: {e}");
    let mut bytes = Vec::new();
    while !packed.is_empty() && bytes.len() as u64 <= declared {
        let before = packed.len();
        let mut frame = ruzstd::decoding::StreamingDecoder::new(&mut packed).map_err(|e| damaged(&e))?;
        let room = declared + 1 - bytes.len() as u64;
        frame.by_ref().take(room).read_to_end(&mut bytes).map_err(|e| damaged(&e))?;
        drop(frame);
        if packed.len() == before {
            break;
        }
    }
    Ok(bytes)
}

fn too_long(declared: u64) -> String {
    format!("would unpack to {} MiB; at most {} are read", declared >> 20, MAX_ENTRY >> 20)
}

fn reason(e: ZipError) -> String {
    match e {
        ZipError::UnsupportedArchive(ZipError::PASSWORD_REQUIRED) => ENCRYPTED.into(),
        e => format!("cannot be unpacked: {e}"),
    }
}

/// The parts of an entry's name, or why it cannot be one of an image here.
fn parts(name: &str) -> Result<Vec<&str>, String> {
    if name.len() > MAX_NAME {
        return Err(format!("has a name of {} bytes; at most {MAX_NAME} are read", name.len()));
    }
    // Some programs write backslashes.
    let split: Vec<_> = name.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".").collect();
    let drive = split.first().is_some_and(|first| first.ends_with(':'));
    if name.starts_with(['/', '\\']) || drive {
        return Err("has an absolute path; an image's path is inside the archive".into());
    }
    if split.contains(&"..") {
        return Err("has a path that climbs out of the archive (..)".into());
    }
    if split.is_empty() || name.contains('\0') {
        return Err("has a name that is none".into());
    }
    if split.len() > MAX_DEPTH {
        return Err(format!("is inside of {} folders; at most {MAX_DEPTH} are looked into", split.len() - 1));
    }
    Ok(split)
}

/// Lists the images in the archive at `path`.
pub(super) fn open(path: &Path) -> Result<Content> {
    let file = File::open(path).map_err(Error::io(path, "open the archive"))?;
    let length = file.metadata().map_err(Error::io(path, "open the archive"))?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| broken(path, &e))?;
    let mut tree: BTreeMap<PathBuf, Names> = BTreeMap::from([(PathBuf::new(), Names::default())]);
    let mut numbers: BTreeMap<PathBuf, usize> = BTreeMap::new();
    let (mut bad, mut declared) = (Vec::new(), 0u64);
    for at in 0..archive.len() {
        // The directory's copy: nothing is unpacked, nor is a password asked for.
        let entry = archive.by_index_raw(at).map_err(|e| broken(path, &e))?;
        let name = match entry.name() {
            Ok(name) => name.into_owned(),
            Err(_) => String::from_utf8_lossy(entry.name_raw()).into_owned(),
        };
        let mut refuse = |reason: String| bad.push((path.join(name.trim_start_matches(['/', '\\'])), reason));
        let parts = match parts(&name) {
            Ok(parts) => parts,
            Err(reason) => {
                refuse(reason);
                continue;
            }
        };
        if entry.is_dir() {
            continue;
        }
        let inside: PathBuf = parts.iter().collect();
        // Every folder on the way is known to the one above it.
        let mut folder = PathBuf::new();
        for part in &parts[..parts.len() - 1] {
            let next = folder.join(part);
            if !tree.contains_key(&next) {
                tree.entry(folder).or_default().folders.push(next.clone());
                tree.insert(next.clone(), Names::default());
            }
            folder = next;
        }
        let names = tree.entry(folder).or_default();
        if parts.iter().any(|part| part.starts_with('.') || *part == "__MACOSX") {
            names.hidden += 1;
        } else if !is_image_name(&inside) {
            names.other += 1;
        } else if entry.is_symlink() {
            refuse("is a link; put the image itself into the archive".into());
        } else if entry.encrypted() {
            refuse(ENCRYPTED.into());
        } else if let Some(method) = unread(entry.compression()) {
            refuse(format!(
                "is packed with {method}, which is not read; unpack the archive and give the folder, or pack it again with \
                 deflate, as zip does by default"
            ));
        } else if entry.size() > MAX_ENTRY {
            refuse(too_long(entry.size()));
        } else {
            declared = declared.saturating_add(entry.size());
            // Of two spellings of one path the later one counts, as when they are unpacked.
            if numbers.insert(inside.clone(), at).is_none() {
                names.images.push(inside);
            }
        }
    }
    if declared > MIN_BOMB && declared / MAX_RATIO > length {
        return Err(unusable(
            path,
            format!(
                "it would unpack to {} GiB, {} times its length, as zip bombs do; if it is none, unpack it and give the \
                 folder",
                declared >> 30,
                declared / length.max(1)
            ),
        ));
    }
    for names in tree.values_mut() {
        names.images.sort();
        names.folders.sort();
    }
    content(path, archive, tree, &numbers, bad)
}

/// The images in the order that a folder of the same files would have.
fn content(
    path: &Path,
    archive: ZipArchive<BufReader<File>>,
    mut tree: BTreeMap<PathBuf, Names>,
    numbers: &BTreeMap<PathBuf, usize>,
    bad: Vec<(PathBuf, String)>,
) -> Result<Content> {
    // Mac OS adds a folder of its own.
    let real = |names: &Names| names.folders.iter().filter(|f| !f.ends_with("__MACOSX")).cloned().collect();
    let mut root = PathBuf::new();
    let mut top = tree.remove(&root).unwrap_or_default();
    loop {
        let folders: Vec<PathBuf> = real(&top);
        match &folders[..] {
            [only] if top.images.is_empty() => {
                root = only.clone();
                top = tree.remove(&root).unwrap_or_default();
            }
            _ => {
                top.folders = folders;
                break;
            }
        }
    }
    let arranged = arrange(path, top, &mut |folder| Ok(tree.remove(folder).unwrap_or_default()));
    // Nothing is listed from the disk here: only entries are bad.
    let Arranged { entries, classes, mut notes, .. } = match arranged {
        // What is bad says more than that there is nothing else.
        Err(_) if numbers.is_empty() && !bad.is_empty() => return Err(Error::BadFiles { files: bad }),
        other => other?,
    };
    if !root.as_os_str().is_empty() {
        notes.push(format!("in the archive everything is inside {}/", shown(&root)));
    }
    let entries = entries
        .into_iter()
        .map(|entry| Entry { at: numbers[&entry.path], path: path.join(&entry.path), ..entry })
        .collect();
    let store = Store::Zip(Archive(Mutex::new(archive)));
    Ok(Content { source: Box::new(Files { entries, store }), classes, sorted: true, notes, bad })
}

#[cfg(test)]
mod tests {
    use super::super::super::support::{colour, grey, image, message, notes};
    use super::super::super::{DataOptions, Dataset, OnBadFile, open as open_set, open_within};
    use super::*;
    use image::{DynamicImage, ImageFormat};
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

    /// The files that are refused, each with its reason.
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
    fn an_archive_is_read_as_the_folder_of_its_files() {
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
            assert!(notes(&*set).contains("1 file ignored: not named as images"), "{}", notes(&*set));
            assert!((0..3).all(|i| image(&*set, i) == image(&*expected, i)));
        }
        // A folder packed as it is, flat; and Windows' separators.
        let set = opened(&[("photos/b.png", one), ("photos\\a.png", two)], &DataOptions::default()).unwrap();
        assert_eq!((set.len(), set.classes().len()), (2, 0));
        assert!(notes(&*set).contains("everything is inside photos/"), "{}", notes(&*set));
        assert_eq!(image(&*set, 0), image(&*expected, 1));
    }

    #[test]
    fn what_does_not_fit_in_memory_is_unpacked_at_each_reading() {
        let images: Vec<_> = (0..5).map(|i| png(colour(9, 9, i * 30))).collect();
        let names: Vec<_> = (0..5).map(|i| format!("{i}.png")).collect();
        let files: Vec<_> = names.iter().map(|n| &**n).zip(images.iter().map(|p| &p[..])).collect();
        let (_folder, path) = saved(&packed(&files));
        let options = DataOptions::default();
        let (inside, outside) =
            (open_set(&path, &options).unwrap(), open_within(&path, &options, 0).unwrap());
        assert_eq!(outside.summary().memory_bytes, 0);
        // From several threads at once.
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    (0..5).for_each(|i| assert_eq!(image(&*inside, i), image(&*outside, i)));
                });
            }
        });
    }

    #[test]
    fn paths_that_climb_out_are_refused_by_name() {
        let good = png(grey(4, 4, 0));
        let names =
            ["../out.png", "a/../../out.png", "/etc/out.png", "C:\\out.png", "..\\out.png", "../x.sh"];
        for name in names {
            let refused = bad(&[("good.png", &good), (name, &good)]);
            assert_eq!(refused.len(), 1, "{name}");
            let expected = if name.starts_with(['/', 'C']) { "absolute path" } else { "climbs out" };
            assert!(refused[0].1.contains(expected), "{name}: {}", refused[0].1);
            let skip = DataOptions { on_bad_file: OnBadFile::Skip, ..DataOptions::default() };
            let set = opened(&[("good.png", &good), (name, &good)], &skip).unwrap();
            assert_eq!((set.len(), set.summary().skipped.len()), (1, 1));
        }
        // Where nothing else is there, that is still what is told.
        assert_eq!(bad(&[("../out.png", &good)]).len(), 1);
    }

    #[test]
    fn names_that_are_all_folders_are_refused() {
        let good = png(grey(4, 4, 0));
        let deep = format!("{}a.png", "a/".repeat(2_000));
        let refused = bad(&[("good.png", &good), (&deep, &good)]);
        assert!(refused[0].1.contains("is inside of 2000 folders"), "{}", refused[0].1);
        let long = format!("{}.png", "a".repeat(60_000));
        let refused = bad(&[("good.png", &good), (&long, &good)]);
        assert!(refused[0].1.contains("has a name of 60004 bytes"), "{}", refused[0].1);
    }

    /// An archive of one image, packed so.
    fn one(method: CompressionMethod) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.start_file("a.png", SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(&png(colour(30, 20, 7))).unwrap();
        zip.finish().unwrap().into_inner()
    }

    /// The archive with another method in the headers of its one entry, and other bytes for its content.
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

    /// Archives that were made by tools/golden/zip.py.
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
    fn archives_are_read_however_they_are_packed_or_told_truly() {
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
        // Without repetitions of 258 bytes, which they write in different ways, deflate is deflate64.
        let mut deflated = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::none());
        deflated.write_all(&plain).unwrap();
        assert_eq!(read(&packed_as(9, &deflated.finish().unwrap())).unwrap(), expected);
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let zstd = ruzstd::encoding::compress_to_vec(&plain[..], level);
        assert_eq!(read(&packed_as(93, &zstd)).unwrap(), expected);
        // Damaged in each way that it can be.
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
        for (method, name) in [(98, "PPMd"), (95, "XZ"), (1, "Shrink"), (6, "Implode"), (1234, "method 1234")]
        {
            let text = read(&packed_as(method, &plain)).unwrap_err().to_string();
            let expected = format!(
                "a.png: is packed with {name}, which is not read; unpack the archive and give the folder"
            );
            assert!(text.contains(&expected) && !text.contains("damaged"), "{text}");
        }
    }

    #[test]
    fn an_lzma_entry_does_not_ask_for_gigabytes() {
        let mut bytes = golden().remove("lzma").unwrap();
        let content = 30 + usize::from(bytes[26]) + usize::from(bytes[28]);
        bytes[content + 5..content + 9].copy_from_slice(&u32::MAX.to_le_bytes());
        let text = read(&bytes).unwrap_err().to_string();
        assert!(text.contains("asks for a dictionary of 4095 MiB"), "{text}");
    }

    #[test]
    fn an_archive_behind_a_program_and_one_of_64_bits_are_read() {
        let plain = one(CompressionMethod::Deflated);
        let expected = read(&plain).unwrap();
        for prefix in [&b"MZ a program that unpacks itself"[..], &[0; 100_000], b"#!/bin/sh\nexit\n"] {
            assert_eq!(read(&[prefix, &plain].concat()).unwrap(), expected);
        }
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let large =
            SimpleFileOptions::default().large_file(true).compression_method(CompressionMethod::Deflated);
        zip.start_file("a.png", large).unwrap();
        zip.write_all(&png(colour(30, 20, 7))).unwrap();
        assert_eq!(read(&zip.finish().unwrap().into_inner()).unwrap(), expected);
        // With a comment, and one whose bytes look like an end.
        let mut zip = ZipWriter::new_append(Cursor::new(plain.clone())).unwrap();
        zip.set_comment("made by hand PK").unwrap();
        let commented = zip.finish().unwrap().into_inner();
        assert_eq!(read(&[b"prefix", &commented[..]].concat()).unwrap(), expected);
    }

    #[test]
    fn other_archives_are_named() {
        let mut tar = vec![0; 600];
        tar[257..262].copy_from_slice(b"ustar");
        for (bytes, name) in [
            (tar, "it is a tar archive, which is not read"),
            (b"7z\xbc\xaf\x27\x1c rest".to_vec(), "a 7z archive"),
            (b"Rar!\x1a\x07\x01\0rest".to_vec(), "a RAR archive"),
            (b"PK\x07\x08PK\x03\x04 a part".to_vec(), "or a part of a split one"),
        ] {
            let text = read(&bytes).unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn links_and_encrypted_entries_are_refused() {
        let good = png(grey(4, 4, 0));
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        zip.start_file("a.png", SimpleFileOptions::default()).unwrap();
        zip.write_all(&good).unwrap();
        zip.add_symlink("link.png", "/etc/passwd", SimpleFileOptions::default()).unwrap();
        let mut bytes = zip.finish().unwrap().into_inner();
        let (_folder, path) = saved(&bytes);
        let text = message(open_set(&path, &DataOptions::default()));
        assert!(text.contains("1 file cannot") && text.contains("link.png: is a link"), "{text}");

        // Bit 0 of the flags, in the entry's own header and in the directory's.
        bytes[6] |= 1;
        let directory = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        bytes[directory + 8] |= 1;
        let (_folder, path) = saved(&bytes);
        let text = message(open_set(&path, &DataOptions::default()));
        assert!(text.contains("a.png: is encrypted"), "{text}");
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        // Many entries that share one small body cannot be made here; what they say is what is looked at.
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
        assert!(!text.contains("zip bombs do"), "512 MiB twice is a GiB and no more: {text}");

        let three = [("a.png", &b"x"[..]), ("b.png", b"x"), ("c.png", b"x")];
        let mut bytes = packed(&three);
        let marks: Vec<_> =
            bytes.windows(4).enumerate().filter(|(_, w)| *w == b"PK\x01\x02").map(|(i, _)| i).collect();
        for mark in marks {
            bytes[mark + 24..mark + 28].copy_from_slice(&(500u32 << 20).to_le_bytes());
        }
        let (_folder, path) = saved(&bytes);
        let text = message(open_set(&path, &DataOptions::default()));
        assert!(text.contains("it would unpack to 1 GiB") && text.contains("zip bombs do"), "{text}");

        // Ten megabytes of zeros in a few kilobytes that say that they are a hundred bytes.
        let mut bytes = packed(&[("a.png", &vec![0; 10 << 20])]);
        let mark = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        bytes[mark + 24..mark + 28].copy_from_slice(&100u32.to_le_bytes());
        let (_folder, path) = saved(&bytes);
        let text = message(open_set(&path, &DataOptions::default()));
        assert!(text.contains("more than the 100 bytes") || text.contains("damaged"), "{text}");
    }

    #[test]
    fn damaged_archives_are_refused_with_the_reason() {
        let good = packed(&[("a.png", &png(colour(30, 30, 0)))]);
        let (_folder, path) = saved(&good[..good.len() / 2]);
        let text = message(open_set(&path, &DataOptions::default()));
        assert!(text.contains("set.zip: it is a damaged zip archive"), "{text}");
        // A flipped bit in the body: the checksum tells.
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
}
