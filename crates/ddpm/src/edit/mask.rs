//! Which part of a picture is meant, from a picture file.

use crate::data::{Alpha, DataOptions, Single, open_picture};
use crate::error::{Error, Result};
use std::path::Path;

/// Which numbers of `picture` are to be filled: those of the pixels at which the picture file `path` is white, by more than a
/// half. The mask has the size of the picture's file and is resized as the picture was; transparent is black.
///
/// # Errors
/// [`Error::Data`] for a mask of another size than the picture's file, or without white, and as [`open_picture`].
pub fn open_mask(path: &Path, picture: &Single, options: &DataOptions) -> Result<Vec<bool>> {
    let grey = DataOptions { channels: Some(1), alpha: Some(Alpha::Black), ..options.clone() };
    let mask = open_picture(path, &grey)?;
    let wrong = |reason: String| Error::Data { path: path.to_owned(), reason };
    let (own, asked) = (mask.found, picture.found);
    if (own.height, own.width) != (asked.height, asked.width) {
        return Err(wrong(format!(
            "the mask is {}x{} and the picture {}x{} (height x width); make the mask as large as the picture's file",
            own.height, own.width, asked.height, asked.width
        )));
    }
    let channels = picture.shape.channels;
    let filled: Vec<bool> =
        mask.numbers.iter().flat_map(|&m| std::iter::repeat_n(m > 0.0, channels)).collect();
    if !filled.contains(&true) {
        let reason = "nothing is to be filled: the mask is black, and white is what is filled";
        return Err(wrong(reason.to_owned()));
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, Luma, Rgb, RgbImage};

    #[test]
    fn white_is_filled_in_all_channels_and_other_masks_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        RgbImage::from_pixel(4, 2, Rgb([9, 8, 7])).save(file("picture.png")).unwrap();
        let mask = |name: &str, width, height, f: fn(u32, u32) -> u8| {
            GrayImage::from_fn(width, height, |x, y| Luma([f(x, y)])).save(file(name)).unwrap();
        };
        mask("mask.png", 4, 2, |x, y| if x == 1 && y == 1 { 200 } else { 100 });
        mask("black.png", 4, 2, |_, _| 0);
        mask("turned.png", 2, 4, |_, _| 255);
        let options = DataOptions { size: Some((2, 4)), channels: Some(3), ..DataOptions::default() };
        let picture = open_picture(&file("picture.png"), &options).unwrap();
        let filled = open_mask(&file("mask.png"), &picture, &options).unwrap();
        assert_eq!(filled.len(), 24);
        assert!(filled.iter().enumerate().all(|(i, &f)| f == (15..18).contains(&i)), "{filled:?}");
        let refused = |name: &str, part: &str| {
            let error = open_mask(&file(name), &picture, &options).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(part), "{error}");
        };
        refused("black.png", "white is what is filled");
        refused("turned.png", "the mask is 4x2 and the picture 2x4 (height x width)");
        // Resized as the picture was: the middle of a wide one.
        let half = DataOptions { size: Some((2, 2)), ..options.clone() };
        let picture = open_picture(&file("picture.png"), &half).unwrap();
        let filled = open_mask(&file("mask.png"), &picture, &half).unwrap();
        assert!(filled.iter().enumerate().all(|(i, &f)| f == (6..9).contains(&i)), "{filled:?}");
    }
}
