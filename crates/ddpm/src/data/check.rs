//! Everything about the images at a path, before anything is trained on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::digits::Digits;
use super::form::tally;
use super::images::DatasetScan;
use super::options::{DataOptions, OnBadFile};
use super::{Dataset, Found, survey};
use crate::error::Result;

/// What [`check()`] found.
pub struct Check {
    /// The path, or what was drawn.
    pub source: String,
    /// How many images can be read.
    pub images: usize,
    /// The forms that they have, the most frequent first.
    pub found: Vec<Found>,
    /// The classes with the images that each has, by label; empty when there are no labels.
    pub classes: Vec<(String, usize)>,
    /// All files that cannot be read, with the reasons.
    pub unreadable: Vec<(PathBuf, String)>,
    /// The images that show the same, pixel by pixel, before they are resized; each group has at least two.
    pub duplicates: Vec<Vec<PathBuf>>,
    /// What a person should be told, whether or not a training would take the set; its own notes begin with these.
    pub notes: Vec<String>,
    /// Bytes of the images decoded, as they would be kept in memory.
    pub decoded_bytes: u64,
    /// The set as a training would open it without the unreadable files, or why it would not.
    pub set: Result<Box<dyn Dataset>>,
}

impl Check {
    fn new(survey: DatasetScan, options: &DataOptions) -> Self {
        let mut classes: Vec<_> = survey.classes.names.iter().map(|name| (name.clone(), 0)).collect();
        let mut same: BTreeMap<[u8; 32], Vec<usize>> = BTreeMap::new();
        for (i, image) in &survey.seen {
            if let Some(class) = survey.label(*i).and_then(|label| classes.get_mut(label as usize)) {
                class.1 += 1;
            }
            same.entry(image.content.unwrap_or_default()).or_default().push(*i);
        }
        let mut groups: Vec<_> = same.into_values().filter(|group| group.len() > 1).collect();
        groups.sort();
        let place = |i: usize| survey.source.place(i);
        Self {
            source: survey.name.clone(),
            images: survey.seen.len(),
            found: tally(&survey.seen),
            classes,
            unreadable: survey.bad.clone(),
            duplicates: groups.into_iter().map(|group| group.into_iter().map(place).collect()).collect(),
            notes: survey.notes.clone(),
            decoded_bytes: survey.bytes(),
            set: survey
                .into_set(&DataOptions { on_bad_file: OnBadFile::Skip, ..options.clone() })
                .map(|set| Box::new(set) as Box<dyn Dataset>),
        }
    }

    /// Looks at the built-in digits; the arguments are those of [`Digits::with_options`].
    ///
    /// # Errors
    /// As there.
    pub fn digits(seed: u64, size: usize, count: usize, options: &DataOptions) -> Result<Self> {
        Ok(Self::new(Digits::survey(seed, size, count, options, true)?, options))
    }
}

/// Looks at all images at `path`; `options` and `memory` are those of [`open_within`](super::open_within).
///
/// # Errors
/// When there are no images at all, or the options are out of range. That a training would refuse them is in
/// [`Check::set`] and [`Check::unreadable`].
pub fn check(path: &Path, options: &DataOptions, memory: u64) -> Result<Check> {
    Ok(Check::new(survey(path, options, memory, true)?, options))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, Luma, RgbImage};

    #[test]
    fn pages_and_ignored_files_are_told_although_the_set_is_refused() {
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
        assert!(notes.contains("1 of 2 images is of several pages or frames: the first is read"), "{notes}");
    }

    #[test]
    fn all_about_a_folder_is_told() {
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
        // The same pixels in another form of file.
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
        // Images are told apart by what they show, not by what is left of it at 4x4.
        assert_eq!(found.duplicates.len(), 2);
        let set = found.set.unwrap();
        assert_eq!((set.len(), set.summary().memory_bytes), (6, found.decoded_bytes));
        assert_eq!(found.decoded_bytes, 6 * 16);
    }
}
