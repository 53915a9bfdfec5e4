//! One image file, brought to the form of a set's images.

use std::path::Path;

use super::decode::{decode, read_capped};
use super::options::DataOptions;
use super::transform::Transform;
use super::{Found, ImageShape, channels_name, unusable};
use crate::error::Result;

/// An image of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Single {
    /// Its numbers in [-1, 1]: height, width, channels.
    pub numbers: Vec<f32>,
    /// Its shape.
    pub shape: ImageShape,
    /// The form of the file, the image upright.
    pub found: Found,
}

/// Reads an image file as a data set with these options would, but for random crops and flips: resized and cropped, its
/// channels converted, transparency laid on a ground.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) for a file that is not there or no image, [`Error::Config`](crate::Error::Config) for
/// options out of range.
pub fn open_image(path: &Path, options: &DataOptions) -> Result<Single> {
    let options =
        DataOptions { random_crop_scale: None, horizontal_flip: false, csv: None, ..options.clone() };
    options.check()?;
    let wrong = |reason: String| unusable(path, reason);
    let bytes = read_capped(path).map_err(wrong)?;
    let (pixels, facts) = decode(&bytes, &options).map_err(wrong)?;
    let pixels = Transform::new(&options).base(pixels).map_err(wrong)?;
    let channels = options.channels.unwrap_or(pixels.channels);
    let shape = ImageShape { height: pixels.height, width: pixels.width, channels };
    let mut numbers = vec![0.0; shape.values()];
    pixels.write_unit(channels, &mut numbers);
    Ok(Single { numbers, shape, found: facts.file })
}

impl Single {
    /// What was done to the file's image, in words; nothing where it has the form already.
    pub fn changes(&self) -> Option<String> {
        let Found { height, width, channels, .. } = self.found;
        let shape = self.shape;
        let resized = (height, width) != (shape.height, shape.width);
        let parts = [
            resized.then(|| format!("brought from {height}x{width} to {}x{}", shape.height, shape.width)),
            (channels != shape.channels)
                .then(|| format!("made {} from {}", channels_name(shape.channels), channels_name(channels))),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::support::{colour, grey, image, save};
    use super::super::{Resize, open};
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn an_image_alone_is_what_it_is_in_a_set() {
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
                assert_eq!((alone.shape, &alone.numbers), (set.shape(), &image(&*set, 0)));
                assert!(alone.changes().unwrap().starts_with("brought from 21x13 to 8x10"));
            }
        }
        save(&folder, "b.png", grey(8, 8, 3));
        let options = DataOptions { size: Some((8, 8)), channels: Some(1), ..DataOptions::default() };
        assert_eq!(open_image(&folder.path().join("b.png"), &options).unwrap().changes(), None);
    }

    #[test]
    fn what_is_no_image_is_named() {
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
