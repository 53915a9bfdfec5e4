//! Helpers shared by the data set tests.

use std::fs;

use image::{DynamicImage, GrayImage, Luma, Rgb, RgbImage};
use tempfile::TempDir;

use super::{AugmentKey, DataOptions, Dataset, open};
use crate::error::Result;

/// Saves an image in `folder`.
pub(super) fn save(folder: &TempDir, name: &str, image: impl Into<DynamicImage>) {
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    image.into().save(path).unwrap();
}

pub(super) fn grey(height: u32, width: u32, value: u8) -> GrayImage {
    GrayImage::from_fn(width, height, |x, y| Luma([value.wrapping_add((x + 3 * y) as u8)]))
}

pub(super) fn colour(height: u32, width: u32, value: u8) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([value, (x * 9) as u8, (y * 9) as u8]))
}

pub(super) fn open_default(folder: &TempDir) -> Result<Box<dyn Dataset>> {
    open(folder.path(), &DataOptions::default())
}

pub(super) fn message(result: Result<Box<dyn Dataset>>) -> String {
    result.err().expect("an error").to_string()
}

pub(super) fn image(set: &dyn Dataset, index: usize) -> Vec<f32> {
    let mut out = vec![9.0; set.shape().num_elements()];
    set.read(index, AugmentKey::default(), &mut out).unwrap();
    out
}

pub(super) fn notes(set: &dyn Dataset) -> String {
    set.summary().notes.join("\n")
}
