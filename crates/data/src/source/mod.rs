//! Data set formats: turns a path into a list of named images that can be decoded one by one.
//!
//! Each format is a module that returns a [`DataContent`], and a branch in [`find`]. Image files are [`Files`]; formats
//! that store raw samples are [`Packed`].

pub(super) mod cifar;
mod csv;
mod folder;
pub(super) mod idx;
pub(super) mod packed;
mod sniff;
mod zip;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::decode::{DecodeInfo, Pixels, decode, read_capped};
use super::options::DataOptions;
use super::unusable;
use crate::error::{Error, Result};
use ddpm_text::shown;

/// Extensions of image files, case-insensitive.
const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"];

/// Images by index, before conversion to a common format.
pub(super) trait ImageSource: Send + Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// The location of image `i`, for messages.
    fn location(&self, i: usize) -> PathBuf;

    /// The name of image `i` relative to the data set, separated by '/'; empty if images have no names.
    fn name(&self, i: usize) -> &[u8];

    /// The class number of image `i`.
    fn label(&self, i: usize) -> Option<u32>;

    /// Reads and decodes image `i`; the error is a human-readable reason.
    fn image(&self, i: usize, options: &DataOptions) -> Result<(Pixels, DecodeInfo), String>;

    /// Bytes that the source itself keeps in memory.
    fn memory(&self) -> u64 {
        0
    }
}

/// The contents of a data set path.
pub(super) struct DataContent {
    pub source: Box<dyn ImageSource>,
    /// Class names, by the source's class numbers; some may have no images.
    pub classes: Vec<String>,
    /// Whether classes are to be sorted by name, rather than kept in the source's order.
    pub sorted: bool,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// Unreadable entries that were found before decoding, with the reasons.
    pub bad: Vec<(PathBuf, String)>,
}

/// Detects the format of `path`; files of raw samples are read up to `memory` bytes.
pub(super) fn find(path: &Path, options: &DataOptions, memory: u64) -> Result<DataContent> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing(path)),
        Err(e) => return Err(Error::io(path, "inspect the data set")(e)),
    };
    if let Some(table) = &options.csv {
        return if kind.is_dir() {
            csv::read(path, table)
        } else {
            Err(unusable(path, "data.csv lists images in a folder; give the folder, not a file in it"))
        };
    }
    if kind.is_dir() {
        folder::find(path, memory)
    } else if !kind.is_file() {
        // Opening a named pipe would block forever.
        Err(unusable(path, "it is not a regular file; give a folder or a zip of images"))
    } else if sniff::starts_as_zip(path) {
        zip::open(path)
    } else if is_image_name(path) {
        let entry = Entry { path: path.to_owned(), name: file_name_bytes(path).to_vec(), label: None, at: 0 };
        let source = Box::new(Files { entries: vec![entry], store: Store::Disk });
        Ok(DataContent { source, classes: Vec::new(), sorted: false, notes: Vec::new(), bad: Vec::new() })
    } else if cifar::is_batch_name(path) {
        cifar::read(path, &[path.to_owned()], Vec::new(), memory)
    } else if sniff::has_zip_directory(path) {
        zip::open(path)
    } else if let Some(reason) = sniff::unsupported(path) {
        Err(unusable(path, reason))
    } else {
        idx::read_set(path, Vec::new(), memory)
    }
}

/// The error for a path that does not exist, with the most similar name that does.
fn missing(path: &Path) -> Error {
    // The first missing component is the misspelt one.
    let mut part = path;
    while let Some(parent) = part.parent().filter(|p| !p.as_os_str().is_empty() && !p.exists()) {
        part = parent;
    }
    let folder = match part.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut reason = String::from("there is no such file or folder");
    if part != path {
        reason += &format!(" ({} does not exist)", shown(part));
    }
    let wanted = part.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let close = std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        let distance = strsim::damerau_levenshtein(&wanted, &name.to_string_lossy().to_lowercase());
        (distance <= 1.max(wanted.chars().count() / 3)).then_some((distance, name))
    });
    match close.min() {
        Some((_, name)) => reason += &format!("; did you mean {}?", shown(part.with_file_name(name))),
        None => reason += "; set --data FOLDER (data.path) to the folder of the images",
    }
    unusable(path, reason)
}

/// One image file.
struct Entry {
    /// The file; in an archive, the archive's path joined with the entry's name.
    path: PathBuf,
    /// Relative to the data set, separated by '/'.
    name: Vec<u8>,
    label: Option<u32>,
    /// The index of the entry in its archive.
    at: usize,
}

/// Where the files are stored.
enum Store {
    Disk,
    Zip(zip::Archive),
}

/// A list of image files.
struct Files {
    entries: Vec<Entry>,
    store: Store,
}

impl ImageSource for Files {
    fn len(&self) -> usize {
        self.entries.len()
    }

    fn location(&self, i: usize) -> PathBuf {
        self.entries[i].path.clone()
    }

    fn name(&self, i: usize) -> &[u8] {
        &self.entries[i].name
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.entries[i].label
    }

    fn image(&self, i: usize, options: &DataOptions) -> Result<(Pixels, DecodeInfo), String> {
        let entry = &self.entries[i];
        let bytes = match &self.store {
            Store::Disk => read_capped(&entry.path)?,
            // The unpackers are tested on hostile archives, but a panic in one must not end a run.
            Store::Zip(archive) => catch_unwind(AssertUnwindSafe(|| archive.read(entry.at)))
                .unwrap_or_else(|_| Err("cannot be unpacked; it is probably damaged".into()))?,
        };
        decode(&bytes, options)
    }
}

fn file_name_bytes(path: &Path) -> &[u8] {
    path.file_name().unwrap_or_default().as_encoded_bytes()
}

fn is_image_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    EXTENSIONS.contains(&extension.as_str())
}

#[cfg(test)]
mod tests {
    use super::super::open;
    use super::*;

    #[test]
    fn a_missing_path_suggests_the_most_similar_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("flowers")).unwrap();
        std::fs::create_dir(folder.path().join("birds")).unwrap();
        let text = |name: &str| {
            open(&folder.path().join(name), &DataOptions::default()).err().expect("it is missing").to_string()
        };
        assert!(
            text("Flower").ends_with(&format!("did you mean {}?", folder.path().join("flowers").display()))
        );
        assert!(text("flwoers/red").contains("flwoers does not exist); did you mean"));
        assert!(!text("xyz").contains("did you mean"));
    }
}
