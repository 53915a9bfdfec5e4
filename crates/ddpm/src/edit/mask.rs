//! Which part of an image is meant, from an image file.

use crate::data::{DataOptions, Mask, Single, open_mask};
use crate::error::{Error, Result};
use std::path::Path;

/// What is to be filled.
#[derive(Clone, Debug, PartialEq)]
pub struct Gap {
    /// Which of the image's values.
    pub unknown: Vec<bool>,
    /// What was taken for the mark and how much that is, in words.
    pub taken: String,
}

/// Which values of `image` are to be filled: those of the pixels that the image file `path` marks ([`open_mask`]), or those it
/// does not mark with `invert`. The mask has the size of the image's file and is resized as the image was.
///
/// # Errors
/// [`Error::Data`] for a mask of another size than the image's file, and as [`open_mask`].
pub fn gap(path: &Path, image: &Single, options: &DataOptions, invert: bool) -> Result<Gap> {
    let Mask { marked, found, taken } = open_mask(path, options, invert)?;
    let asked = image.found;
    if (found.height, found.width) != (asked.height, asked.width) {
        let reason = format!(
            "the mask is {}x{} and the image {}x{} (height x width); make the mask as large as the image's file",
            found.height, found.width, asked.height, asked.width
        );
        return Err(Error::Data { path: path.to_owned(), reason });
    }
    let part = marked.iter().filter(|&&m| m).count() as f64 / marked.len().max(1) as f64;
    let rest =
        if invert { "without --invert-mask the rest is" } else { "--invert-mask fills the rest instead" };
    let amount = match 100.0 * part {
        p if p >= 100.0 => {
            let kept = if invert { "white" } else { "black" };
            format!("all of the image: nothing is kept; what is to be kept must be {kept} in the mask")
        }
        p if p < 1.0 => format!("{p:.2} % of the image; {rest}"),
        p => format!("{:.0} % of the image; {rest}", p.min(99.0)),
    };
    let unknown = marked.iter().flat_map(|&m| std::iter::repeat_n(m, image.shape.channels)).collect();
    Ok(Gap { unknown, taken: format!("{taken} is filled, {amount}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::open_picture;
    use image::{GrayImage, ImageBuffer, Luma, Rgb, RgbImage, Rgba, RgbaImage};

    const OPTIONS: fn() -> DataOptions =
        || DataOptions { size: Some((2, 4)), channels: Some(3), ..DataOptions::default() };

    /// The marked pixels of a mask of 2x4, and what was taken; or why not.
    fn marked(save: impl FnOnce(&Path), invert: bool) -> std::result::Result<(Vec<usize>, String), String> {
        let folder = tempfile::tempdir().unwrap();
        let (image, mask) = (folder.path().join("image.png"), folder.path().join("mask.png"));
        RgbImage::from_pixel(4, 2, Rgb([9, 8, 7])).save(&image).unwrap();
        save(&mask);
        let image = open_picture(&image, &OPTIONS()).unwrap();
        let gap = gap(&mask, &image, &OPTIONS(), invert).map_err(|e| e.to_string())?;
        let pixels: Vec<&[bool]> = gap.unknown.chunks(3).collect();
        assert!(pixels.iter().all(|p| p[0] == p[1] && p[1] == p[2]), "all channels of a pixel alike");
        Ok(((0..pixels.len()).filter(|&i| pixels[i][0]).collect(), gap.taken))
    }

    fn grey(f: fn(u32, u32) -> u8) -> impl FnOnce(&Path) {
        move |path| GrayImage::from_fn(4, 2, |x, y| Luma([f(x, y)])).save(path).unwrap()
    }

    fn rgba(f: fn(u32, u32) -> [u8; 4]) -> impl FnOnce(&Path) {
        move |path| RgbaImage::from_fn(4, 2, |x, y| Rgba(f(x, y))).save(path).unwrap()
    }

    #[test]
    fn the_brighter_of_two_values_is_filled_be_they_0_and_1_and_it_is_said() {
        let (found, taken) = marked(grey(|x, _| if x < 1 { 255 } else { 0 }), false).unwrap();
        assert_eq!(
            (found, &*taken),
            (vec![0, 4], "white (255) is filled, 25 % of the image; --invert-mask fills the rest instead")
        );
        let (found, taken) = marked(grey(|x, _| u8::from(x < 1)), false).unwrap();
        assert_eq!(found, [0, 4]);
        assert!(taken.starts_with("the brighter of its two values, 0 and 1, is filled, 25 %"), "{taken}");
        // A red brush on black, whose grey is below a half.
        let red = |path: &Path| {
            RgbImage::from_fn(4, 2, |x, _| Rgb(if x < 1 { [255, 0, 0] } else { [0; 3] })).save(path).unwrap();
        };
        assert_eq!(marked(red, false).unwrap().0, [0, 4]);
        // 16 bits.
        let deep = |path: &Path| {
            let mask = ImageBuffer::<Luma<u16>, _>::from_fn(4, 2, |x, _| Luma([u16::from(x < 1)]));
            mask.save(path).unwrap();
        };
        assert_eq!(marked(deep, false).unwrap().0, [0, 4]);
        // Of more values those above a half.
        let (found, taken) = marked(grey(|x, _| [0, 100, 150, 255][x as usize]), false).unwrap();
        assert_eq!(found, [2, 3, 6, 7]);
        assert!(taken.starts_with("white (above 127) is filled, 50 %"), "{taken}");
    }

    #[test]
    fn a_mask_is_turned_round_on_demand() {
        let (found, taken) = marked(grey(|x, _| if x < 1 { 255 } else { 0 }), true).unwrap();
        assert_eq!(found, [1, 2, 3, 5, 6, 7]);
        assert!(
            taken.starts_with("black (0) is filled, 75 %") && taken.contains("without --invert-mask"),
            "{taken}"
        );
        let (found, taken) = marked(grey(|x, _| u8::from(x < 1)), true).unwrap();
        assert!(found.len() == 6 && taken.starts_with("the darker of its two values"), "{taken}");
        assert!(marked(grey(|_, _| 0), true).unwrap().1.contains("nothing is kept"));
    }

    #[test]
    fn masks_of_one_value_fill_all_or_are_refused_with_the_way_out() {
        for (value, invert, taken) in [
            (
                255,
                false,
                "white (255) is filled, all of the image: nothing is kept; what is to be kept must be black",
            ),
            (
                0,
                true,
                "black (0) is filled, all of the image: nothing is kept; what is to be kept must be white",
            ),
            (
                128,
                false,
                "the one grey of the mask, 128 of 255, counts as white: it is filled, all of the image",
            ),
            (
                127,
                true,
                "the one grey of the mask, 127 of 255, counts as black: it is filled, all of the image",
            ),
        ] {
            let save = |path: &Path| GrayImage::from_pixel(4, 2, Luma([value])).save(path).unwrap();
            let (found, told) = marked(save, invert).unwrap();
            assert!(found.len() == 8 && told.starts_with(taken), "{told}");
        }
        let ways = "to fill a part give it two values, as 0 and 255";
        for (value, invert, part) in [
            (
                0,
                false,
                "0 of 255 everywhere, which counts as black, and white is what is filled; with --invert-mask all",
            ),
            (1, false, "1 of 255 everywhere, which counts as black"),
            (127, false, "127 of 255 everywhere, which counts as black"),
            (
                128,
                true,
                "128 of 255 everywhere, which counts as white, and --invert-mask fills what is black; without it all",
            ),
            (
                255,
                true,
                "255 of 255 everywhere, which counts as white, and --invert-mask fills what is black",
            ),
        ] {
            let save = |path: &Path| GrayImage::from_pixel(4, 2, Luma([value])).save(path).unwrap();
            let error = marked(save, invert).unwrap_err();
            assert!(error.contains("mask.png: nothing is to be filled"), "{error}");
            assert!(error.contains(part) && error.contains(ways), "{error}");
        }
        // Labels of a segmentation.
        let error = marked(grey(|x, _| x as u8), false).unwrap_err();
        assert!(error.contains("several values from 0 to 3 of 255, all dark, and white is"), "{error}");
        assert_eq!(marked(grey(|x, _| x as u8), true).unwrap().0.len(), 8);
        let error = marked(grey(|x, _| 200 + x as u8), true).unwrap_err();
        assert!(
            error.contains("several values from 200 to 203 of 255, all bright, and --invert-mask"),
            "{error}"
        );
    }

    #[test]
    fn it_is_said_whether_alpha_or_colour_counts() {
        // Black strokes on a transparent ground: opaque is filled.
        let (found, taken) = marked(rgba(|x, _| [0, 0, 0, if x < 1 { 255 } else { 0 }]), false).unwrap();
        assert_eq!(found, [0, 4]);
        assert!(taken.starts_with("opaque (255) is filled, 25 %"), "{taken}");
        // A hole cut into white.
        let hole = rgba(|x, _| [255, 255, 255, if x < 1 { 0 } else { 255 }]);
        let (found, taken) = marked(hole, true).unwrap();
        assert!(found == [0, 4] && taken.starts_with("transparent (0) is filled"), "{taken}");
        // Where both vary, the colours count, transparent being black; where alpha is one, it does not count.
        let both = rgba(|x, y| [if x < 2 { 255 } else { 0 }, 255, 255, if y < 1 { 255 } else { 0 }]);
        assert!(marked(both, false).unwrap().0.iter().all(|&i| i < 4));
        let even = rgba(|x, _| if x < 1 { [255, 255, 255, 128] } else { [0, 0, 0, 128] });
        let (found, taken) = marked(even, false).unwrap();
        assert!(found == [0, 4] && taken.starts_with("white (255)"), "{taken}");
    }

    #[test]
    fn masks_are_resized_as_the_image_was_and_other_sizes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        RgbImage::from_pixel(4, 2, Rgb([9, 8, 7])).save(file("image.png")).unwrap();
        GrayImage::from_fn(4, 2, |x, y| Luma([if x == 1 && y == 1 { 200 } else { 100 }]))
            .save(file("mask.png"))
            .unwrap();
        GrayImage::from_pixel(2, 4, Luma([255])).save(file("turned.png")).unwrap();
        // The middle of a wide one.
        let half = DataOptions { size: Some((2, 2)), ..OPTIONS() };
        let image = open_picture(&file("image.png"), &half).unwrap();
        let filled = gap(&file("mask.png"), &image, &half, false).unwrap().unknown;
        assert!(filled.iter().enumerate().all(|(i, &f)| f == (6..9).contains(&i)), "{filled:?}");
        let error = gap(&file("turned.png"), &image, &half, false).unwrap_err().to_string();
        assert!(error.contains("the mask is 4x2 and the image 2x4 (height x width)"), "{error}");
        // A dot that is too small to be seen.
        GrayImage::from_fn(400, 200, |x, y| Luma([if x == 200 && y == 99 { 255 } else { 0 }]))
            .save(file("dot.png"))
            .unwrap();
        RgbImage::new(400, 200).save(file("large.png")).unwrap();
        let large = open_picture(&file("large.png"), &half).unwrap();
        let error = gap(&file("dot.png"), &large, &half, false).unwrap_err().to_string();
        assert!(error.contains("lost where the mask is brought from 200x400 to 2x2"), "{error}");
    }
}
