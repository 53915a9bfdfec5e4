//! Grids of images with labelled rows and columns.

use super::sheet::Sheet;
use crate::error::{Error, Result};
use crate::image::Image;

/// One row.
#[derive(Clone, Debug)]
pub struct Strip {
    /// Its label on the left.
    pub label: String,
    /// Its images, of the same shape in all rows.
    pub images: Vec<Image>,
}

/// Lays out rows of images as a [`Sheet`], without their alpha.
///
/// # Errors
/// [`Error::Plot`]; also if a row does not have an image per column, or shapes differ.
pub fn strips(title: &str, columns: &[String], rows: &[Strip]) -> Result<Image> {
    if rows.iter().any(|r| r.images.len() != columns.len()) {
        return Err(Error::Plot { reason: "a row has too few or too many images".to_owned() });
    }
    let sheet = Sheet {
        title: title.to_owned(),
        columns: columns.len(),
        column_labels: columns.to_vec(),
        row_labels: rows.iter().map(|r| r.label.clone()).collect(),
        captions: Vec::new(),
        images: rows.iter().flat_map(|r| &r.images).map(opaque).collect(),
    };
    sheet.draw()
}

/// The image without its alpha channel.
fn opaque(image: &Image) -> Image {
    let channels = image.channels - (image.channels + 1) % 2;
    let colours = image.data.chunks_exact(image.channels).flat_map(|pixel| &pixel[..channels]);
    Image { channels, data: colours.copied().collect(), ..*image }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: usize, channels: usize, value: u8) -> Image {
        Image { height: 2, width, channels, data: vec![value; 2 * width * channels] }
    }

    fn strip(images: Vec<Image>) -> Strip {
        Strip { label: "a schedule".to_owned(), images }
    }

    #[test]
    fn images_are_enlarged_in_their_rows_and_columns() {
        for channels in 1..=4 {
            let row = |first: u8| strip(vec![image(10, channels, first), image(10, channels, first + 1)]);
            let columns = ["t = 0".to_owned(), "t = 1000".to_owned()];
            let made = strips("title", &columns, &[row(100), row(110)]).unwrap();
            let count = |v: u8| made.data.chunks(3).filter(|p| **p == [v; 3]).count();
            // Nine times 10 pixels is the first multiple above 84.
            for value in [100, 101, 110, 111] {
                assert!(count(value) >= 2 * 10 * 81, "{value}: {}", count(value));
            }
            let right_of = |a: u8, b: u8| {
                let place = |v: u8| made.data.chunks(3).position(|p| *p == [v; 3]).unwrap() % made.width;
                place(a) < place(b)
            };
            assert!(right_of(100, 101) && right_of(110, 111));
        }
    }

    #[test]
    fn mismatched_rows_are_rejected() {
        let columns = ["a".to_owned()];
        assert!(strips("", &columns, &[]).is_err());
        assert!(strips("", &columns, &[strip(vec![])]).is_err());
        assert!(strips("", &columns, &[strip(vec![image(1, 1, 0), image(1, 1, 0)])]).is_err());
        let rows = [strip(vec![image(1, 1, 0)]), strip(vec![image(2, 1, 0)])];
        assert!(strips("", &columns, &rows).is_err());
        assert!(strips("", &columns, &rows[..1]).is_ok());
        let large = strip(vec![image(100_000_000, 1, 0)]);
        assert!(matches!(strips("", &columns, &[large]), Err(Error::Plot { .. })));
    }
}
