//! Lists the entries of an archive.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use zip::CompressionMethod;
use zip::read::ZipFile;

use super::super::super::shorten;
use super::super::folder::FolderListing;
use super::super::is_image_name;
use super::{ENCRYPTED, MAX_ENTRY, too_long};
use ddpm_text::shown;

/// Maximum length of an entry's name, in bytes: the limit for paths on disk.
const MAX_NAME: usize = 4096;
/// Maximum nesting of folders. A name can have 64 KiB, and every folder in it takes memory.
const MAX_DEPTH: usize = 32;

/// The entries of an archive, arranged like a folder of the files.
#[derive(Default)]
pub(super) struct Listing {
    /// Names shared by several entries.
    pub duplicates: BTreeSet<Vec<u8>>,
    pub tree: BTreeMap<PathBuf, FolderListing>,
    /// The entry index of each image, and the position of the entry in the directory.
    pub positions: BTreeMap<PathBuf, (usize, u64)>,
    repeated: BTreeSet<String>,
    pub bad: Vec<(PathBuf, String)>,
    /// Total declared size of the images, in bytes.
    pub declared: u64,
}

impl Listing {
    /// Adds entry `at` of the archive at `path`.
    pub fn add(&mut self, path: &Path, at: usize, entry: &ZipFile<'_, BufReader<File>>) {
        let name = match entry.name() {
            Ok(name) => name.into_owned(),
            Err(_) => String::from_utf8_lossy(entry.name_raw()).into_owned(),
        };
        let location = || path.join(name.trim_start_matches(['/', '\\']));
        let parts = match parts(&name) {
            Ok(parts) => parts,
            Err(reason) => return self.bad.push((location(), reason)),
        };
        if entry.is_dir() {
            return;
        }
        let inside: PathBuf = parts.iter().collect();
        let names = self.folder(&parts[..parts.len() - 1]);
        if parts.iter().any(|part| part.starts_with('.') || *part == "__MACOSX") {
            names.hidden += 1;
        } else if !is_image_name(&inside) {
            names.other += 1;
        } else if let Some(reason) = refusal(entry) {
            self.bad.push((location(), reason));
        } else {
            // Of several entries with the same normalized path the last one counts, as when unpacking.
            let position = (at, entry.central_header_start());
            let before = self.positions.get(&inside).copied();
            if before.is_none() {
                self.folder(&parts[..parts.len() - 1]).images.push(inside.clone());
            }
            self.declared = self.declared.saturating_add(entry.size());
            if before.is_some() || self.duplicates.contains(entry.name_raw()) {
                self.repeated.insert(shown(&inside));
            }
            if before.is_none_or(|(_, start)| start < position.1) {
                self.positions.insert(inside, position);
            }
        }
    }

    /// The listing of a folder; creates missing folders and registers them with their parents.
    fn folder(&mut self, parts: &[&str]) -> &mut FolderListing {
        let mut folder = PathBuf::new();
        for part in parts {
            let next = folder.join(part);
            if !self.tree.contains_key(&next) {
                self.tree.entry(folder).or_default().folders.push(next.clone());
                self.tree.insert(next.clone(), FolderListing::default());
            }
            folder = next;
        }
        self.tree.entry(folder).or_default()
    }

    /// A note about names shared by several entries.
    pub fn note(&self) -> Option<String> {
        let names: Vec<String> = self.repeated.iter().cloned().collect();
        let shortened = shorten(&names);
        match names.len() {
            0 => None,
            1 => Some(format!(
                "one name occurs more than once in the archive ({shortened}): its last entry is read"
            )),
            n => Some(format!(
                "{n} names occur more than once in the archive ({shortened}): the last entry of each is read"
            )),
        }
    }
}

/// Why an entry with an image's name cannot be read, if so.
fn refusal(entry: &ZipFile<'_, BufReader<File>>) -> Option<String> {
    if entry.is_symlink() {
        Some("is a symbolic link; put the image itself into the archive".into())
    } else if entry.encrypted() {
        Some(ENCRYPTED.into())
    } else if let Some(method) = unsupported_method(entry.compression()) {
        Some(format!(
            "is compressed with {method}, which is not supported; unpack the archive and give the folder, or repack it with \
             deflate, zip's default"
        ))
    } else {
        (entry.size() > MAX_ENTRY).then(|| too_long(entry.size()))
    }
}

/// The name of an unsupported compression method; `None` for supported ones.
fn unsupported_method(method: CompressionMethod) -> Option<String> {
    #[expect(deprecated, reason = "the only access to the number of an unknown method")]
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

/// The components of an entry's name, or why the name is invalid.
fn parts(name: &str) -> Result<Vec<&str>, String> {
    if name.len() > MAX_NAME {
        return Err(format!("has a name of {} bytes; at most {MAX_NAME} are supported", name.len()));
    }
    // Some archivers write backslashes.
    let split: Vec<_> = name.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".").collect();
    let drive = split.first().is_some_and(|first| first.ends_with(':'));
    if name.starts_with(['/', '\\']) || drive {
        return Err("has an absolute path; paths must be relative to the archive".into());
    }
    if split.contains(&"..") {
        return Err("has a path that leads out of the archive (..)".into());
    }
    if split.is_empty() || name.contains('\0') {
        return Err("has an empty or invalid name".into());
    }
    if split.len() > MAX_DEPTH {
        return Err(format!("is nested in {} folders; at most {MAX_DEPTH} are supported", split.len() - 1));
    }
    Ok(split)
}

/// The names shared by several entries of the central directory at offset `start` of the archive.
pub(super) fn duplicate_names(path: &Path, start: u64) -> std::io::Result<BTreeSet<Vec<u8>>> {
    let mut file = BufReader::new(File::open(path)?);
    file.seek(SeekFrom::Start(start))?;
    let (mut all, mut duplicates) = (BTreeSet::new(), BTreeSet::new());
    loop {
        // The directory ends with another, shorter record.
        let mut entry = [0; 46];
        file.read_exact(&mut entry[..4])?;
        if &entry[..4] != b"PK\x01\x02" {
            return Ok(duplicates);
        }
        file.read_exact(&mut entry[4..])?;
        let length = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let mut name = vec![0; length(28).into()];
        file.read_exact(&mut name)?;
        file.seek_relative(i64::from(length(30)) + i64::from(length(32)))?;
        if !all.insert(name.clone()) {
            duplicates.insert(name);
        }
    }
}
