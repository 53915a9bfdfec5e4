//! What an archive holds, entry by entry.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use zip::CompressionMethod;
use zip::read::ZipFile;

use super::super::super::shorten;
use super::super::folder::Names;
use super::super::is_picture_name;
use super::{ENCRYPTED, MAX_ENTRY, too_long};
use crate::text::shown;

/// Longest name of an entry, in bytes, as a path on the disk may have it.
const MAX_NAME: usize = 4096;
/// Most folders inside one another. A name has up to 64 KiB, and each folder on its way takes memory.
const MAX_DEPTH: usize = 32;

/// The entries of an archive, arranged as the folder of its files.
#[derive(Default)]
pub(super) struct Listing {
    /// The names that several entries have.
    pub twice: BTreeSet<Vec<u8>>,
    pub tree: BTreeMap<PathBuf, Names>,
    /// Each image's number, and where its entry stands in the directory.
    pub numbers: BTreeMap<PathBuf, (usize, u64)>,
    repeated: BTreeSet<String>,
    pub bad: Vec<(PathBuf, String)>,
    /// Bytes that the images say they unpack to.
    pub declared: u64,
}

impl Listing {
    /// Adds entry `at` of the archive at `path`.
    pub fn add(&mut self, path: &Path, at: usize, entry: &ZipFile<'_, BufReader<File>>) {
        let name = match entry.name() {
            Ok(name) => name.into_owned(),
            Err(_) => String::from_utf8_lossy(entry.name_raw()).into_owned(),
        };
        let place = || path.join(name.trim_start_matches(['/', '\\']));
        let parts = match parts(&name) {
            Ok(parts) => parts,
            Err(reason) => return self.bad.push((place(), reason)),
        };
        if entry.is_dir() {
            return;
        }
        let inside: PathBuf = parts.iter().collect();
        let names = self.folder(&parts[..parts.len() - 1]);
        if parts.iter().any(|part| part.starts_with('.') || *part == "__MACOSX") {
            names.hidden += 1;
        } else if !is_picture_name(&inside) {
            names.other += 1;
        } else if let Some(reason) = refusal(entry) {
            self.bad.push((place(), reason));
        } else {
            // Of several entries of one path, however it is spelt, the last counts, as when they are unpacked.
            let number = (at, entry.central_header_start());
            let before = self.numbers.get(&inside).copied();
            if before.is_none() {
                self.folder(&parts[..parts.len() - 1]).pictures.push(inside.clone());
            }
            self.declared = self.declared.saturating_add(entry.size());
            if before.is_some() || self.twice.contains(entry.name_raw()) {
                self.repeated.insert(shown(&inside));
            }
            if before.is_none_or(|(_, start)| start < number.1) {
                self.numbers.insert(inside, number);
            }
        }
    }

    /// The names in a folder; every folder on the way is known to the one above it.
    fn folder(&mut self, parts: &[&str]) -> &mut Names {
        let mut folder = PathBuf::new();
        for part in parts {
            let next = folder.join(part);
            if !self.tree.contains_key(&next) {
                self.tree.entry(folder).or_default().folders.push(next.clone());
                self.tree.insert(next.clone(), Names::default());
            }
            folder = next;
        }
        self.tree.entry(folder).or_default()
    }

    /// What to tell of names that several entries have.
    pub fn note(&self) -> Option<String> {
        let names: Vec<String> = self.repeated.iter().cloned().collect();
        let shortened = shorten(&names);
        match names.len() {
            0 => None,
            1 => Some(format!(
                "one name stands in the archive more than once ({shortened}): the last of its entries is read"
            )),
            n => Some(format!(
                "{n} names stand in the archive more than once ({shortened}): of each the last entry is read"
            )),
        }
    }
}

/// Why an entry that is named as an image is not read.
fn refusal(entry: &ZipFile<'_, BufReader<File>>) -> Option<String> {
    if entry.is_symlink() {
        Some("is a link; put the picture itself into the archive".into())
    } else if entry.encrypted() {
        Some(ENCRYPTED.into())
    } else if let Some(method) = unread(entry.compression()) {
        Some(format!(
            "is packed with {method}, which is not read; unpack the archive and give the folder, or pack it again with \
             deflate, as zip does by default"
        ))
    } else {
        (entry.size() > MAX_ENTRY).then(|| too_long(entry.size()))
    }
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

/// The names that several entries have in the directory that is at `start` of the archive.
pub(super) fn names_of_several(path: &Path, start: u64) -> std::io::Result<BTreeSet<Vec<u8>>> {
    let mut file = BufReader::new(File::open(path)?);
    file.seek(SeekFrom::Start(start))?;
    let (mut all, mut several) = (BTreeSet::new(), BTreeSet::new());
    loop {
        // The end of the directory is shorter than an entry, and comes last.
        let mut entry = [0; 46];
        file.read_exact(&mut entry[..4])?;
        if &entry[..4] != b"PK\x01\x02" {
            return Ok(several);
        }
        file.read_exact(&mut entry[4..])?;
        let length = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let mut name = vec![0; length(28).into()];
        file.read_exact(&mut name)?;
        file.seek_relative(i64::from(length(30)) + i64::from(length(32)))?;
        if !all.insert(name.clone()) {
            several.insert(name);
        }
    }
}
