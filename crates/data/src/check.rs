//! A report on all images at a path, without training on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::digits::Digits;
use super::format::histogram;
use super::images::DatasetScan;
use super::options::{DataOptions, OnBadFile};
use super::{Dataset, FormatCount, scan};
use crate::error::Result;

/// The result of [`check()`].
pub struct Check {
    /// The path, or a description of the generated data.
    pub source: String,
    /// Number of readable images.
    pub images: usize,
    /// Their formats, most frequent first.
    pub found: Vec<FormatCount>,
    /// The classes with their image counts, by label; empty if there are no labels.
    pub classes: Vec<(String, usize)>,
    /// All unreadable files, with the reasons.
    pub unreadable: Vec<(PathBuf, String)>,
    /// Groups of at least two images whose pixels are identical before resizing.
    pub duplicates: Vec<Vec<PathBuf>>,
    /// Notes that apply whether or not the data set is usable for training; the notes of `set` begin with these.
    pub notes: Vec<String>,
    /// Bytes of the decoded images, as kept in memory.
    pub decoded_bytes: u64,
    /// The data set as training would open it without the unreadable files, or why training would reject it.
    pub set: Result<Box<dyn Dataset>>,
}

impl Check {
    fn new(scan: DatasetScan, options: &DataOptions) -> Self {
        let mut classes: Vec<_> = scan.classes.names.iter().map(|name| (name.clone(), 0)).collect();
        let mut same: BTreeMap<[u8; 32], Vec<usize>> = BTreeMap::new();
        for (i, image) in &scan.decoded {
            if let Some(class) = scan.label(*i).and_then(|label| classes.get_mut(label as usize)) {
                class.1 += 1;
            }
            same.entry(image.content.unwrap_or_default()).or_default().push(*i);
        }
        let mut groups: Vec<_> = same.into_values().filter(|group| group.len() > 1).collect();
        groups.sort();
        let location = |i: usize| scan.source.location(i);
        Self {
            source: scan.name.clone(),
            images: scan.decoded.len(),
            found: histogram(&scan.decoded),
            classes,
            unreadable: scan.bad.clone(),
            duplicates: groups.into_iter().map(|group| group.into_iter().map(location).collect()).collect(),
            notes: scan.notes.clone(),
            decoded_bytes: scan.bytes(),
            set: scan
                .into_set(&DataOptions { on_bad_file: OnBadFile::Skip, ..options.clone() })
                .map(|set| Box::new(set) as Box<dyn Dataset>),
        }
    }

    /// Checks the built-in digits; the arguments are those of [`Digits::with_options`].
    ///
    /// # Errors
    /// As [`Digits::with_options`].
    pub fn digits(seed: u64, size: usize, count: usize, options: &DataOptions) -> Result<Self> {
        Ok(Self::new(Digits::scan(seed, size, count, options, true)?, options))
    }
}

/// Checks all images at `path`; `options` and `memory` are those of [`open_within`](super::open_within).
///
/// # Errors
/// If there are no images at all, or the options are out of range. Problems that only prevent training are reported in
/// [`Check::set`] and [`Check::unreadable`].
pub fn check(path: &Path, options: &DataOptions, memory: u64) -> Result<Check> {
    Ok(Check::new(scan(path, options, memory, true)?, options))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, Luma, RgbImage};

    #[test]
    fn notes_are_reported_although_the_data_set_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        GrayImage::new(6, 6).save(folder.path().join("a.png")).unwrap();
        let mut gif = Vec::new();
        let mut encoder = image::codecs::gif::GifEncoder::new(&mut gif);
        for _ in 0..3 {
            encoder.encode_frame(image::Frame::new(image::RgbaImage::new(8, 8))).unwrap();
        }
        drop(encoder);
        std::fs::write(folder.path().join("b.gif"), gif).unwrap();
        std::fs::write(folder.path().join("notes.txt"), "x").unwrap();
        let found = check(folder.path(), &DataOptions::default(), 1 << 20).unwrap();
        assert!(found.set.is_err());
        let notes = found.notes.join("\n");
        assert!(notes.contains("1 file ignored"), "{notes}");
        assert!(
            notes.contains("1 of 2 images is multi-page or animated: only the first frame is read"),
            "{notes}"
        );
    }

    #[test]
    fn check_reports_everything_about_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let save = |name: &str, height, width, value: u8| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            GrayImage::from_fn(width, height, |x, y| Luma([value.wrapping_add((x * y) as u8)]))
                .save(path)
                .unwrap();
        };
        save("a/1.png", 6, 9, 1);
        save("a/2.png", 6, 9, 2);
        save("b/3.png", 6, 9, 1);
        save("b/4.png", 8, 8, 1);
        // The same pixels in another file format.
        let again = image::open(folder.path().join("a/2.png")).unwrap();
        again.save(folder.path().join("b/5.bmp")).unwrap();
        RgbImage::new(6, 9).save(folder.path().join("b/6.png")).unwrap();
        std::fs::write(folder.path().join("b/7.jpg"), "no image").unwrap();
        std::fs::write(folder.path().join("b/8.jpg"), "").unwrap();

        let found = check(folder.path(), &DataOptions::default(), 1 << 20).unwrap();
        assert_eq!(found.images, 6);
        assert_eq!(found.classes, [("a".to_owned(), 2), ("b".to_owned(), 4)]);
        assert_eq!((found.found[0].height, found.found[0].images), (6, 3));
        let names = |paths: &[PathBuf]| -> Vec<String> {
            paths
                .iter()
                .map(|p| p.strip_prefix(folder.path()).unwrap().to_string_lossy().replace('\\', "/"))
                .collect()
        };
        let unreadable: Vec<PathBuf> = found.unreadable.iter().map(|(p, _)| p.clone()).collect();
        assert_eq!(names(&unreadable), ["b/7.jpg", "b/8.jpg"]);
        let duplicates: Vec<_> = found.duplicates.iter().map(|group| names(group)).collect();
        assert_eq!(duplicates, [["a/1.png", "b/3.png"], ["a/2.png", "b/5.bmp"]]);
        assert!(found.set.err().unwrap().to_string().contains("3 sizes"));

        let sized = DataOptions { size: Some((4, 4)), ..DataOptions::default() };
        let found = check(folder.path(), &sized, 1 << 20).unwrap();
        // Duplicates are detected before resizing to 4x4.
        assert_eq!(found.duplicates.len(), 2);
        let set = found.set.unwrap();
        assert_eq!((set.len(), set.summary().memory_bytes), (6, found.decoded_bytes));
        assert_eq!(found.decoded_bytes, 6 * 16);
    }
}
