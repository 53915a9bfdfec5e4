//! Zip archives of pictures: entries are unpacked into memory one by one, never to disk.
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
use super::{Content, Entry, Files, Store, is_picture_name};
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

/// The parts of an entry's name, or why it cannot be one of a picture here.
fn parts(name: &str) -> Result<Vec<&str>, String> {
    if name.len() > MAX_NAME {
        return Err(format!("has a name of {} bytes; at most {MAX_NAME} are read", name.len()));
    }
    // Some programs write backslashes.
    let split: Vec<_> = name.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".").collect();
    let drive = split.first().is_some_and(|first| first.ends_with(':'));
    if name.starts_with(['/', '\\']) || drive {
        return Err("has an absolute path; a picture's path is inside the archive".into());
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

/// Lists the pictures in the archive at `path`.
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
        } else if !is_picture_name(&inside) {
            names.other += 1;
        } else if entry.is_symlink() {
            refuse("is a link; put the picture itself into the archive".into());
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
                names.pictures.push(inside);
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
        names.pictures.sort();
        names.folders.sort();
    }
    content(path, archive, tree, &numbers, bad)
}

/// The pictures in the order that a folder of the same files would have.
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
            [only] if top.pictures.is_empty() => {
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
mod tests;
