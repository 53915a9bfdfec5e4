//! Zip archives of pictures: entries are unpacked into memory one by one, never to disk.
//!
//! An archive is laid out as a folder would be: flat, or one folder per class. Folders that hold everything else, as
//! an archive made of a folder has, are looked through.

mod listing;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::super::unusable;
use super::folder::{Arranged, Names, arrange};
use super::kinds::{PART, is_part_of_zip};
use super::{Content, Entry, Files, Store};
use crate::error::{Error, Result};
use crate::text::shown;
use listing::{Listing, names_of_several};

/// Entries that say they are longer are not unpacked.
const MAX_ENTRY: u64 = 512 << 20;
/// An archive that says it unpacks to more than this many times its length, and `MIN_BOMB`, is a bomb: photographs
/// hardly shrink, and drawings not by this much on the average.
const MAX_RATIO: u64 = 100;
/// No archive that unpacks to less is taken for a bomb, in bytes.
const MIN_BOMB: u64 = 1 << 30;

/// Largest dictionary that an LZMA entry may ask memory for, in bytes.
const MAX_DICTIONARY: u32 = 256 << 20;

const ENCRYPTED: &str = "is encrypted; unpack the archive with its password and give the folder";

/// Why an archive as a whole cannot be read.
fn broken(path: &Path, e: &ZipError) -> Error {
    let reason = match e {
        ZipError::UnsupportedArchive(what) => {
            format!("it is a zip archive of a kind that is not read: {what}")
        }
        e => format!("it is a damaged zip archive, or cut off: {e}"),
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

/// Lists the pictures in the archive at `path`.
pub(super) fn open(path: &Path) -> Result<Content> {
    // The last part of a split archive has a directory that names places in other files.
    if is_part_of_zip(path) {
        return Err(unusable(path, PART));
    }
    let file = File::open(path).map_err(Error::io(path, "open the archive"))?;
    let length = file.metadata().map_err(Error::io(path, "open the archive"))?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| broken(path, &e))?;
    let mut listing = Listing::default();
    // The reader has one entry for each name, the last.
    if archive.has_duplicate_names() {
        listing.twice = names_of_several(path, archive.central_directory_start())
            .map_err(Error::io(path, "list the archive"))?;
    }
    for at in 0..archive.len() {
        // The directory's copy: nothing is unpacked, nor is a password asked for.
        let entry = archive.by_index_raw(at).map_err(|e| broken(path, &e))?;
        listing.add(path, at, &entry);
    }
    let declared = listing.declared;
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
    content(path, archive, listing)
}

/// The pictures in the order that a folder of the same files would have.
fn content(path: &Path, archive: ZipArchive<BufReader<File>>, listing: Listing) -> Result<Content> {
    let repeated = listing.note();
    let Listing { mut tree, numbers, bad, .. } = listing;
    for names in tree.values_mut() {
        names.pictures.sort();
        names.folders.sort();
    }
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
    notes.extend(repeated);
    let entries = entries
        .into_iter()
        .map(|entry| Entry { at: numbers[&entry.path].0, path: path.join(&entry.path), ..entry })
        .collect();
    let store = Store::Zip(Archive(Mutex::new(archive)));
    Ok(Content { source: Box::new(Files { entries, store }), classes, sorted: true, notes, bad })
}

#[cfg(test)]
mod tests;
