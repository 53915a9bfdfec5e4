//! Zip archives of images: entries are unpacked one at a time into memory, never to disk.
//!
//! The layout is that of a folder: flat, or one folder per class. Top-level folders that contain everything else, as in an
//! archive made from a folder, are descended into.

mod listing;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::super::unusable;
use super::folder::{Arranged, FolderListing, arrange};
use super::sniff::{SPLIT_ZIP, is_zip_part};
use super::{DataContent, Entry, Files, Store};
use crate::error::{Error, Result};
use ddpm_text::shown;
use listing::{Listing, duplicate_names};

/// Maximum declared size of an entry, in bytes.
const MAX_ENTRY: u64 = 512 << 20;
/// An archive that declares to unpack to more than this many times its size, and to more than `MIN_BOMB`, is rejected as a
/// zip bomb: photographs hardly compress, and drawings not by this much on average.
const MAX_RATIO: u64 = 100;
/// No archive that unpacks to fewer bytes is treated as a bomb.
const MIN_BOMB: u64 = 1 << 30;

/// Maximum dictionary size of an LZMA entry, in bytes.
const MAX_DICTIONARY: u32 = 256 << 20;

const ENCRYPTED: &str = "is encrypted; unpack the archive with its password and give the folder";

/// The error for an archive that cannot be read at all.
fn broken(path: &Path, e: &ZipError) -> Error {
    let reason = match e {
        ZipError::UnsupportedArchive(what) => {
            format!("it is an unsupported kind of zip archive: {what}")
        }
        e => format!("it is a damaged zip archive, or cut off: {e}"),
    };
    unusable(path, reason)
}

/// An open archive. Unpacking is fast compared to decoding, so one lock for all threads is enough.
pub(super) struct Archive(Mutex<ZipArchive<BufReader<File>>>);

impl Archive {
    /// Unpacks an entry; the error is a human-readable reason.
    pub fn read(&self, at: usize) -> Result<Vec<u8>, String> {
        // A panicking thread can only leave a wrong file position, and every read seeks first.
        let mut archive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut raw = archive.by_index_raw(at).map_err(reason)?;
        let declared = raw.size();
        if declared > MAX_ENTRY {
            return Err(too_long(declared));
        }
        let method = raw.compression();
        let damaged = |e: std::io::Error| format!("cannot be unpacked; it is damaged: {e}");
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
                return Err("cannot be unpacked; it is damaged: its checksum is wrong".into());
            }
        } else {
            if method == CompressionMethod::LZMA {
                // Two 16-bit integers, a byte of properties, then the dictionary size.
                let mut head = [0; 9];
                raw.read_exact(&mut head).map_err(damaged)?;
                let dictionary = u32::from_le_bytes([head[5], head[6], head[7], head[8]]);
                if dictionary > MAX_DICTIONARY {
                    return Err(format!(
                        "needs an LZMA dictionary of {} MiB; at most {} MiB are allowed",
                        dictionary >> 20,
                        MAX_DICTIONARY >> 20
                    ));
                }
            }
            drop(raw);
            let entry = archive.by_index(at).map_err(reason)?;
            // One byte more than declared: detects a longer entry, and makes the reader verify the checksum.
            entry.take(declared + 1).read_to_end(&mut bytes).map_err(damaged)?;
        }
        match bytes.len() as u64 {
            0 => Err("is empty".into()),
            n if n > declared => Err(format!(
                "unpacks to more than the declared {declared} bytes: it is damaged, or a zip bomb"
            )),
            n if n < declared => Err(format!("is cut off: {n} bytes of {declared}")),
            _ => Ok(bytes),
        }
    }
}

/// Unpacks the frames of a zstd entry, up to one byte more than declared.
fn unpack_zstd(mut packed: &[u8], declared: u64) -> Result<Vec<u8>, String> {
    let damaged = |e: &dyn std::fmt::Display| format!("cannot be unpacked; it is damaged: {e}");
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

/// Lists the images in the archive at `path`.
pub(super) fn open(path: &Path) -> Result<DataContent> {
    // The last part of a split archive has a directory that refers to the other files.
    if is_zip_part(path) {
        return Err(unusable(path, SPLIT_ZIP));
    }
    let file = File::open(path).map_err(Error::io(path, "open the archive"))?;
    let length = file.metadata().map_err(Error::io(path, "open the archive"))?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| broken(path, &e))?;
    let mut listing = Listing::default();
    // For duplicate names the reader keeps only the last entry.
    if archive.has_duplicate_names() {
        listing.duplicates = duplicate_names(path, archive.central_directory_start())
            .map_err(Error::io(path, "list the archive"))?;
    }
    for at in 0..archive.len() {
        // Raw access reads only headers: nothing is unpacked and no password is needed.
        let entry = archive.by_index_raw(at).map_err(|e| broken(path, &e))?;
        listing.add(path, at, &entry);
    }
    let declared = listing.declared;
    if declared > MIN_BOMB && declared / MAX_RATIO > length {
        return Err(unusable(
            path,
            format!(
                "it would unpack to {} GiB, {} times its size, like a zip bomb; if it is not one, unpack it and give the \
                 folder",
                declared >> 30,
                declared / length.max(1)
            ),
        ));
    }
    content(path, archive, listing)
}

/// The images in the same order as in a folder of the same files.
fn content(path: &Path, archive: ZipArchive<BufReader<File>>, listing: Listing) -> Result<DataContent> {
    let repeated = listing.note();
    let Listing { mut tree, positions, bad, .. } = listing;
    for names in tree.values_mut() {
        names.images.sort();
        names.folders.sort();
    }
    // macOS adds a metadata folder.
    let real =
        |names: &FolderListing| names.folders.iter().filter(|f| !f.ends_with("__MACOSX")).cloned().collect();
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
    // Nothing is listed from disk here, so only entries can be bad.
    let Arranged { entries, classes, mut notes, .. } = match arranged {
        // The bad entries are more informative than "no images".
        Err(_) if positions.is_empty() && !bad.is_empty() => return Err(Error::BadFiles { files: bad }),
        other => other?,
    };
    if !root.as_os_str().is_empty() {
        notes.push(format!("everything in the archive is inside {}/", shown(&root)));
    }
    notes.extend(repeated);
    let entries = entries
        .into_iter()
        .map(|entry| Entry { at: positions[&entry.path].0, path: path.join(&entry.path), ..entry })
        .collect();
    let store = Store::Zip(Archive(Mutex::new(archive)));
    Ok(DataContent { source: Box::new(Files { entries, store }), classes, sorted: true, notes, bad })
}

#[cfg(test)]
mod tests;
