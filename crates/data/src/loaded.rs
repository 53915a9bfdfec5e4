//! A single image file, converted like the images of a data set.

use std::path::Path;

use super::decode::{decode, read_capped};
use super::options::DataOptions;
use super::transform::Transform;
use super::{FormatCount, ImageShape, channels_name, unusable};
use crate::error::Result;

/// An image read from a file.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadedImage {
    /// Values in [-1, 1], laid out as height, width, channels.
    pub values: Vec<f32>,
    /// The shape of `values`.
    pub shape: ImageShape,
    /// The format of the file, after EXIF rotation.
    pub found: FormatCount,
}

/// Reads an image file as a data set with these options would, without random crops and flips: resized, cropped, channels
/// converted, transparency composited.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) for a file that does not exist or is not an image,
/// [`Error::Option`](crate::Error::Option) for options out of range.
pub fn open_image(path: &Path, options: &DataOptions) -> Result<LoadedImage> {
    let options =
        DataOptions { random_crop_scale: None, horizontal_flip: false, csv: None, ..options.clone() };
    options.check()?;
    let wrong = |reason: String| unusable(path, reason);
    let bytes = read_capped(path).map_err(wrong)?;
    let (pixels, info) = decode(&bytes, &options).map_err(wrong)?;
    let pixels = Transform::new(&options).base(pixels).map_err(wrong)?;
    let channels = options.channels.unwrap_or(pixels.channels);
    let shape = ImageShape { height: pixels.height, width: pixels.width, channels };
    let mut values = vec![0.0; shape.num_elements()];
    pixels.write_unit(channels, &mut values);
    Ok(LoadedImage { values, shape, found: info.file })
}

impl LoadedImage {
    /// Human-readable description of how the image was converted; `None` if it already had the right format.
    pub fn changes(&self) -> Option<String> {
        let FormatCount { height, width, channels, .. } = self.found;
        let shape = self.shape;
        let resized = (height, width) != (shape.height, shape.width);
        let parts = [
            resized.then(|| format!("resized from {height}x{width} to {}x{}", shape.height, shape.width)),
            (channels != shape.channels).then(|| {
                format!("converted from {} to {}", channels_name(channels), channels_name(shape.channels))
            }),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_util::{colour, grey, image, save};
    use super::super::{Resize, open};
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn a_single_image_equals_the_same_image_in_a_data_set() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", colour(21, 13, 50));
        for resize in [Resize::ShortSide, Resize::Exact] {
            for channels in [1, 3, 4] {
                let (size, channels) = (Some((8, 10)), Some(channels));
                let plain = DataOptions { size, channels, resize, ..DataOptions::default() };
                let set = open(folder.path(), &plain).unwrap();
                let random =
                    DataOptions { random_crop_scale: Some([0.5, 0.6]), horizontal_flip: true, ..plain };
                let alone = open_image(&folder.path().join("a.png"), &random).unwrap();
                assert_eq!((alone.shape, &alone.values), (set.shape(), &image(&*set, 0)));
                assert!(alone.changes().unwrap().starts_with("resized from 21x13 to 8x10"));
            }
        }
        save(&folder, "b.png", grey(8, 8, 3));
        let options = DataOptions { size: Some((8, 8)), channels: Some(1), ..DataOptions::default() };
        assert_eq!(open_image(&folder.path().join("b.png"), &options).unwrap().changes(), None);
    }

    #[test]
    fn errors_name_the_file() {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("text.png"), "no image").unwrap();
        for (name, part) in [("text.png", "is not an image"), ("gone.png", "cannot be read"), ("", "regular")]
        {
            let path = folder.path().join(name);
            let error = open_image(&path, &DataOptions::default()).unwrap_err().to_string();
            assert!(error.starts_with(&path.display().to_string()) && error.contains(part), "{error}");
        }
    }
}
