//! Folders of image files, flat or one folder per class.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::{shorten, unusable};
use super::{DataContent, EXTENSIONS, Entry, Files, Store, cifar, file_name_bytes, idx, is_image_name};
use crate::error::{Error, Result};
use ddpm_text::{counted, shown};

/// The names in one folder, sorted bytewise.
#[derive(Default)]
pub(super) struct FolderListing {
    pub images: Vec<PathBuf>,
    pub folders: Vec<PathBuf>,
    pub idx: Vec<PathBuf>,
    pub cifar: Vec<PathBuf>,
    pub hidden: usize,
    pub other: usize,
}

/// Images in order, with their classes.
pub(super) struct Arranged {
    pub entries: Vec<Entry>,
    pub classes: Vec<String>,
    pub notes: Vec<String>,
    /// Folders that could not be listed, with the reasons.
    pub bad: Vec<(PathBuf, String)>,
}

fn list(folder: &Path) -> Result<FolderListing> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list the folder"))? {
        paths.push(entry.map_err(Error::io(folder, "list the folder"))?.path());
    }
    paths.sort_by(|a, b| file_name_bytes(a).cmp(file_name_bytes(b)));
    let mut names = FolderListing::default();
    for path in paths {
        // Follows links. A dangling link with an image's name is reported as an unreadable file.
        let is_folder = fs::metadata(&path).is_ok_and(|m| m.is_dir());
        if file_name_bytes(&path).starts_with(b".") {
            names.hidden += 1;
        } else if is_folder {
            names.folders.push(path);
        } else if is_image_name(&path) {
            names.images.push(path);
        } else if idx::is_images_name(&path) {
            names.idx.push(path);
        } else if cifar::is_batch_name(&path) {
            names.cifar.push(path);
        } else {
            names.other += 1;
        }
    }
    Ok(names)
}

/// Detects the format of the folder at `path`.
pub(super) fn find(path: &Path, memory: u64) -> Result<DataContent> {
    let top = list(path)?;
    let kinds = [("IDX files", top.idx.len()), ("CIFAR batches", top.cifar.len())];
    if let Some((kind, _)) = kinds.into_iter().find(|(_, n)| *n > 0) {
        if !top.images.is_empty() || kinds.iter().all(|(_, n)| *n > 0) {
            let others = match top.images.len() {
                0 => "CIFAR batches".to_owned(),
                n => counted(n, "image"),
            };
            return Err(unusable(
                path,
                format!(
                    "it contains {kind} and {others}; give the path of one file, or move them to separate folders"
                ),
            ));
        }
        if top.cifar.is_empty() {
            let (images, notes) = idx::choose(path, &top.idx)?;
            return idx::read_set(&images, notes, memory);
        }
        let (batches, notes) = cifar::choose(path, &top.cifar)?;
        return cifar::read(path, &batches, notes, memory);
    }
    let Arranged { entries, classes, notes, bad } = arrange(path, top, &mut list)?;
    let source = Box::new(Files { entries, store: Store::Disk });
    Ok(DataContent { source, classes, sorted: true, notes, bad })
}

/// What is inside the folders at the top level, and what is not used.
#[derive(Default)]
struct Inside {
    /// Folders with images, and the images.
    classes: Vec<(PathBuf, Vec<PathBuf>)>,
    /// The names of folders without images.
    without_images: Vec<String>,
    /// The first folder without images but with IDX files or CIFAR batches.
    with_samples: Option<PathBuf>,
    /// Numbers of hidden names, other files and folders further down.
    hidden: usize,
    other: usize,
    deeper: usize,
    /// Folders that cannot be listed.
    bad: Vec<(PathBuf, String)>,
}

/// Lists the folders at the top level. One that cannot be listed counts as bad, like an unreadable file.
fn look_inside(
    folders: Vec<PathBuf>,
    list: &mut dyn FnMut(&Path) -> Result<FolderListing>,
) -> Result<Inside> {
    let mut found = Inside::default();
    for folder in folders {
        let inside = match list(&folder) {
            Ok(inside) => inside,
            Err(Error::Io { doing, source, .. }) => {
                found.bad.push((folder, format!("cannot {doing}: {source}")));
                continue;
            }
            Err(error) => return Err(error),
        };
        if inside.images.is_empty() {
            found.without_images.push(shown(folder.file_name().unwrap_or_default()));
            if !inside.idx.is_empty() || !inside.cifar.is_empty() {
                found.with_samples.get_or_insert(folder);
            }
            continue;
        }
        found.hidden += inside.hidden;
        found.other += inside.other + inside.idx.len() + inside.cifar.len();
        found.deeper += inside.folders.len();
        found.classes.push((folder, inside.images));
    }
    Ok(found)
}

impl Inside {
    /// The error for a folder without any images, neither at its top level nor inside.
    fn no_images(self, path: &Path) -> Error {
        // The bad entries are more informative than "no images".
        if !self.bad.is_empty() {
            return Error::BadFiles { files: self.bad };
        }
        let counts = [
            (self.other, "other file"),
            (self.hidden, "hidden name"),
            (self.without_images.len(), "folder without images"),
        ];
        let found = counts
            .into_iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, what)| match what {
                "folder without images" if n > 1 => format!("{n} folders without images"),
                _ => counted(n, what),
            })
            .collect::<Vec<_>>()
            .join(", ");
        let found = if found.is_empty() { "it is empty".to_owned() } else { format!("it contains {found}") };
        let hint = match self.with_samples {
            Some(folder) => {
                format!("; IDX files or CIFAR batches are in {}: give that path", shown(&folder))
            }
            None => String::new(),
        };
        let reason = format!(
            "no images here ({found}); searched for .{} files here and in folders one level down (one per class), for \
             IDX files such as train-images-idx3-ubyte.gz and for CIFAR batches such as data_batch_1.bin{hint}",
            EXTENSIONS.join(" .")
        );
        unusable(path, reason)
    }

    /// What is not used.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.other > 0 {
            notes.push(format!("{} ignored: no image extension", counted(self.other, "file")));
        }
        if self.hidden > 0 {
            notes.push(format!("{} ignored", counted(self.hidden, "hidden name")));
        }
        if !self.without_images.is_empty() {
            notes.push(format!("ignored, no images inside: {}", shorten(&self.without_images)));
        }
        if self.deeper > 0 {
            notes.push(format!(
                "{} inside class folders ignored: only one level is searched",
                counted(self.deeper, "folder")
            ));
        }
        notes
    }
}

/// Arranges the names at the top level of `path` and those one level down, which `list` lists.
pub(super) fn arrange(
    path: &Path,
    top: FolderListing,
    list: &mut dyn FnMut(&Path) -> Result<FolderListing>,
) -> Result<Arranged> {
    let mut inside = look_inside(top.folders, list)?;
    inside.hidden += top.hidden;
    inside.other += top.other;
    if top.images.is_empty() && inside.classes.is_empty() {
        return Err(inside.no_images(path));
    }
    if !top.images.is_empty() && !inside.classes.is_empty() {
        return Err(unusable(
            path,
            format!(
                "it contains both {} and {} with images (such as {}); a data set has either no class folders or all of its \
                 images in class folders: move one or the other elsewhere",
                counted(top.images.len(), "image"),
                counted(inside.classes.len(), "folder"),
                shown(&inside.classes[0].0)
            ),
        ));
    }
    let notes = inside.notes();
    let mut entries = Vec::new();
    for path in top.images {
        entries.push(Entry { name: file_name_bytes(&path).to_vec(), path, label: None, at: 0 });
    }
    let mut names = Vec::new();
    for (label, (folder, images)) in inside.classes.into_iter().enumerate() {
        names.push(String::from_utf8_lossy(file_name_bytes(&folder)).into_owned());
        for path in images {
            let name = [file_name_bytes(&folder), b"/", file_name_bytes(&path)].concat();
            entries.push(Entry { path, name, label: Some(label as u32), at: 0 });
        }
    }
    Ok(Arranged { entries, classes: names, notes, bad: inside.bad })
}

#[cfg(test)]
mod tests {
    use super::super::super::test_util::{grey, image, message, notes, open_default, save};
    use super::super::super::{DataOptions, FormatCount, ImageShape, OnBadFile};
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn class_folders_are_sorted_numerically_but_images_bytewise() {
        let folder = TempDir::new().unwrap();
        for n in [1u8, 2, 3, 10, 12] {
            save(&folder, &format!("{n}/a.png"), grey(3, 4, n));
        }
        let set = open_default(&folder).unwrap();
        assert_eq!(set.classes(), ["1", "2", "3", "10", "12"]);
        let of = |set: &dyn super::super::super::Dataset| -> Vec<(u8, u32)> {
            let value = |i| ((image(set, i)[0] + 1.0) * 127.5).round() as u8;
            (0..set.len()).map(|i| (value(i), set.label(i).unwrap())).collect()
        };
        // The image order, by the bytes of the paths, must never change: resumed runs are bit-exact.
        assert_eq!(of(&*set), [(1, 0), (10, 3), (12, 4), (2, 1), (3, 2)]);
    }

    #[test]
    fn a_class_whose_files_are_all_skipped_is_dropped() {
        let folder = TempDir::new().unwrap();
        for name in ["cat/1.png", "dog/1.png"] {
            save(&folder, name, grey(3, 4, 1));
        }
        fs::create_dir(folder.path().join("cow")).unwrap();
        fs::write(folder.path().join("cow/1.png"), "no image").unwrap();
        let skip = DataOptions { on_bad_file: OnBadFile::Skip, ..DataOptions::default() };
        let set = super::super::super::open(folder.path(), &skip).unwrap();
        assert_eq!((set.classes(), set.summary().classes), (&["cat".to_owned(), "dog".to_owned()][..], 2));
        assert_eq!([set.label(0), set.label(1)], [Some(0), Some(1)]);
        let notes = notes(&*set);
        assert!(notes.contains("1 class without images omitted (cow): 2 of 3 remain"), "{notes}");
    }

    #[test]
    fn a_class_folder_that_cannot_be_listed_is_reported_like_a_bad_file() {
        let folder = TempDir::new().unwrap();
        for name in ["cat/1.png", "dog/1.png", "dog/2.png"] {
            save(&folder, name, grey(3, 4, 1));
        }
        // The error is simulated because tests may run as root.
        let denied = |path: &Path| {
            if path.ends_with("cat") {
                Err(Error::io(path, "list the folder")(std::io::ErrorKind::PermissionDenied.into()))
            } else {
                list(path)
            }
        };
        let found = arrange(folder.path(), list(folder.path()).unwrap(), &mut denied.clone()).unwrap();
        assert_eq!((found.classes, found.entries.len()), (vec!["dog".to_owned()], 2));
        assert_eq!(
            found.bad,
            [(folder.path().join("cat"), "cannot list the folder: permission denied".to_owned())]
        );
        // Without other images, the listing error is returned.
        fs::remove_dir_all(folder.path().join("dog")).unwrap();
        let error = arrange(folder.path(), list(folder.path()).unwrap(), &mut denied.clone()).err().unwrap();
        assert!(error.to_string().contains("cat: cannot list the folder"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn control_characters_in_names_are_escaped_in_messages() {
        let folder = TempDir::new().unwrap();
        let name = "a\x1b[31m\n\u{202e}gnp";
        save(&folder, "cat/1.png", grey(3, 4, 1));
        fs::create_dir(folder.path().join(name)).unwrap();
        let text = notes(&*open_default(&folder).unwrap());
        assert!(text.contains("no images inside: a\\x1b[31m\\n\\u{202e}gnp"), "{text:?}");
        fs::write(folder.path().join(format!("cat/{name}.png")), "x").unwrap();
        let text = message(open_default(&folder));
        assert!(text.contains("cat/a\\x1b[31m\\n\\u{202e}gnp.png: is not an image"), "{text:?}");
        assert!(!text.contains('\x1b') && text.lines().count() == 3, "{text:?}");
    }

    #[test]
    fn a_flat_folder_is_read_in_name_order() {
        let folder = TempDir::new().unwrap();
        for (name, value) in [("b.png", 1), ("a.png", 2), ("10.png", 3), ("9.png", 4), ("B.PNG", 5)] {
            save(&folder, name, grey(3, 4, value));
        }
        fs::write(folder.path().join("readme.txt"), "hello").unwrap();
        fs::write(folder.path().join(".hidden.png"), "hello").unwrap();
        let set = open_default(&folder).unwrap();
        assert_eq!((set.len(), set.shape()), (5, ImageShape { height: 3, width: 4, channels: 1 }));
        // Bytewise: 10.png, 9.png, B.PNG, a.png, b.png.
        let firsts: Vec<_> = (0..5).map(|i| ((image(&*set, i)[0] + 1.0) * 127.5).round() as u8).collect();
        assert_eq!(firsts, [3, 4, 5, 2, 1]);
        assert!(set.classes().is_empty());
        assert_eq!(set.label(0), None);
        let notes = notes(&*set);
        assert!(
            notes.contains("1 file ignored: no image extension") && notes.contains("1 hidden name ignored")
        );
        assert_eq!(set.summary().memory_bytes, 60);
        assert_eq!(
            set.summary().found,
            [FormatCount { height: 3, width: 4, channels: 1, bits: 8, images: 5 }]
        );
        let expected: Vec<f32> =
            grey(3, 4, 3).as_raw().iter().map(|&v| f32::from(v) / 255.0 * 2.0 - 1.0).collect();
        assert_eq!(image(&*set, 0), expected);
    }

    #[test]
    fn folders_are_classes_in_name_order() {
        let folder = TempDir::new().unwrap();
        for name in ["dog/1.png", "cat/7.png", "cat/2.png", "cat/deeper/3.png"] {
            save(&folder, name, grey(4, 4, 0));
        }
        fs::create_dir(folder.path().join("bird")).unwrap();
        let set = open_default(&folder).unwrap();
        assert_eq!(set.classes(), ["cat", "dog"]);
        assert_eq!((0..3).map(|i| set.label(i)).collect::<Vec<_>>(), [Some(0), Some(0), Some(1)]);
        assert_eq!((set.len(), set.summary().classes), (3, 2));
        let notes = notes(&*set);
        assert!(notes.contains("no images inside: bird"), "{notes}");
        assert!(notes.contains("1 folder inside class folders ignored"), "{notes}");
    }

    #[cfg(unix)]
    #[test]
    fn cyclic_links_terminate() {
        let folder = TempDir::new().unwrap();
        save(&folder, "cat/1.png", grey(4, 4, 0));
        std::os::unix::fs::symlink(folder.path(), folder.path().join("cat/up")).unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("again")).unwrap();
        assert_eq!(open_default(&folder).unwrap().classes(), ["cat"]);
    }

    #[test]
    fn images_next_to_class_folders_are_rejected() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", grey(4, 4, 0));
        save(&folder, "cat/1.png", grey(4, 4, 0));
        assert!(message(open_default(&folder)).contains("both 1 image and 1 folder with images"));
    }

    #[test]
    fn the_error_for_an_empty_folder_lists_the_supported_formats() {
        let folder = TempDir::new().unwrap();
        let text = message(open_default(&folder));
        assert!(
            text.contains("it is empty") && text.contains(".png .jpg .jpeg .webp .bmp .tif .tiff .gif"),
            "{text}"
        );
        fs::write(folder.path().join("notes.txt"), "x").unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        assert!(
            message(open_default(&folder)).contains("it contains 1 other file, 2 folders without images")
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_dangling_link_is_a_bad_file() {
        let folder = TempDir::new().unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("a.png")).unwrap();
        assert!(message(open_default(&folder)).contains("a.png: cannot be read"));
    }
}
