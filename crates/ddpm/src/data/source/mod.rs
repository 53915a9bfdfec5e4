//! Where pictures come from: a path is looked at, and becomes a list of named pictures that can be decoded one by one.
//!
//! A format is a file here that makes a [`Content`], and a line in [`find`]. Pictures in files of their own are
//! [`Files`]; formats that hold plain samples are [`Packed`].

pub(super) mod cifar;
mod csv;
mod folder;
pub(super) mod idx;
mod kinds;
pub(super) mod packed;
mod zip;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::decode::{Facts, Pixels, decode, read_capped};
use super::options::DataOptions;
use super::unusable;
use crate::error::{Error, Result};
use crate::text::shown;

/// The file names that are taken for pictures, without regard to case.
const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"];

/// Pictures by number, not yet brought to one form.
pub(super) trait Source: Send + Sync {
    /// How many there are.
    fn len(&self) -> usize;

    /// Where picture `i` is, for messages.
    fn place(&self, i: usize) -> PathBuf;

    /// The name of picture `i` inside the data set, the parts joined by '/'; empty where pictures have none.
    fn name(&self, i: usize) -> &[u8];

    /// The class of picture `i`.
    fn label(&self, i: usize) -> Option<u32>;

    /// Reads and decodes picture `i`; the error is the reason, for a person.
    fn picture(&self, i: usize, options: &DataOptions) -> Result<(Pixels, Facts), String>;

    /// Bytes that the source itself holds in memory.
    fn memory(&self) -> u64 {
        0
    }
}

/// What a path holds.
pub(super) struct Content {
    pub source: Box<dyn Source>,
    /// The names of the classes, by the source's own numbers; some may have no images.
    pub classes: Vec<String>,
    /// Whether the classes have no order but that of their names.
    pub sorted: bool,
    /// What to tell about it.
    pub notes: Vec<String>,
    /// What belongs to the set and cannot be read, known before anything is decoded.
    pub bad: Vec<(PathBuf, String)>,
}

/// Finds out what `path` holds; files of plain samples are read up to `memory` bytes.
pub(super) fn find(path: &Path, options: &DataOptions, memory: u64) -> Result<Content> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(missing(path)),
        Err(e) => return Err(Error::io(path, "look at the data set")(e)),
    };
    if let Some(table) = &options.csv {
        return match kind.is_dir() {
            true => csv::read(path, table),
            false => {
                Err(unusable(path, "data.csv names pictures in a folder; give the folder, not a file in it"))
            }
        };
    }
    if kind.is_dir() {
        folder::find(path, memory)
    } else if !kind.is_file() {
        // Opening a named pipe would wait for ever.
        Err(unusable(path, "it is not a regular file; give a folder or a zip of images"))
    } else if kinds::begins_as_zip(path) {
        zip::open(path)
    } else if is_picture_name(path) {
        let entry = Entry { path: path.to_owned(), name: file_name_bytes(path).to_vec(), label: None, at: 0 };
        let source = Box::new(Files { entries: vec![entry], store: Store::Disk });
        Ok(Content { source, classes: Vec::new(), sorted: false, notes: Vec::new(), bad: Vec::new() })
    } else if cifar::is_batch_name(path) {
        cifar::read(path, &[path.to_owned()], Vec::new(), memory)
    } else if kinds::has_zip_directory(path) {
        zip::open(path)
    } else if let Some(reason) = kinds::not_read(path) {
        Err(unusable(path, reason))
    } else {
        idx::read_set(path, Vec::new(), memory)
    }
}

/// The error for a path that is not there, with the nearest name that is.
fn missing(path: &Path) -> Error {
    // The first part that is missing is the one that is misspelt.
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
        reason += &format!(" ({} is missing already)", shown(part));
    }
    let wanted = part.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let close = std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        let distance = strsim::damerau_levenshtein(&wanted, &name.to_string_lossy().to_lowercase());
        (distance <= 1.max(wanted.chars().count() / 3)).then_some((distance, name))
    });
    match close.min() {
        Some((_, name)) => reason += &format!("; did you mean {}?", shown(part.with_file_name(name))),
        None => reason += "; --data FOLDER (data.path) says where the pictures are",
    }
    unusable(path, reason)
}

/// One picture in a file of its own.
struct Entry {
    /// The file; in an archive, the archive's path with the entry's name after it.
    path: PathBuf,
    /// Relative to the data set, the parts joined by '/'.
    name: Vec<u8>,
    label: Option<u32>,
    /// The entry's number in its archive.
    at: usize,
}

/// Where the bytes of files are.
enum Store {
    Disk,
    Zip(zip::Archive),
}

/// Pictures in files.
struct Files {
    entries: Vec<Entry>,
    store: Store,
}

impl Source for Files {
    fn len(&self) -> usize {
        self.entries.len()
    }

    fn place(&self, i: usize) -> PathBuf {
        self.entries[i].path.clone()
    }

    fn name(&self, i: usize) -> &[u8] {
        &self.entries[i].name
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.entries[i].label
    }

    fn picture(&self, i: usize, options: &DataOptions) -> Result<(Pixels, Facts), String> {
        let entry = &self.entries[i];
        let bytes = match &self.store {
            Store::Disk => read_capped(&entry.path)?,
            // What unpacks is tested on hostile archives, yet a panic of its must not take a whole run down.
            Store::Zip(archive) => catch_unwind(AssertUnwindSafe(|| archive.read(entry.at)))
                .unwrap_or_else(|_| Err("cannot be unpacked; it is probably damaged".into()))?,
        };
        decode(&bytes, options)
    }
}

fn file_name_bytes(path: &Path) -> &[u8] {
    path.file_name().unwrap_or_default().as_encoded_bytes()
}

fn is_picture_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    EXTENSIONS.contains(&extension.as_str())
}

#[cfg(test)]
mod tests {
    use super::super::open;
    use super::*;

    #[test]
    fn a_missing_path_names_the_nearest_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("flowers")).unwrap();
        std::fs::create_dir(folder.path().join("birds")).unwrap();
        let text = |name: &str| {
            open(&folder.path().join(name), &DataOptions::default()).err().expect("it is missing").to_string()
        };
        assert!(
            text("Flower").ends_with(&format!("did you mean {}?", folder.path().join("flowers").display()))
        );
        assert!(text("flwoers/red").contains("flwoers is missing already); did you mean"));
        assert!(!text("xyz").contains("did you mean"));
    }
}
