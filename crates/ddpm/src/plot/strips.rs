//! Rows of pictures with a label each, under columns with a label each.

use super::{Drawn, SCALE, TEXT, TITLE, render, text, text_width};
use crate::data::PictureShape;
use crate::error::{Error, Result};
use crate::picture::Picture;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Pixels between pictures, around everything, and between text and what it belongs to.
const GAP: usize = 3;
const MARGIN: usize = 14;
const SPACE: usize = 8;
/// Pictures narrower than this are enlarged, so that the columns' labels have room.
const LEAST_WIDTH: usize = 84;
/// Heights of the title's line and of the columns' labels, in pixels.
const LINES: (usize, usize) = (30, 24);

/// One row.
#[derive(Clone, Debug)]
pub struct Strip {
    /// What stands left of it.
    pub label: String,
    /// Its pictures, all of one shape with those of the other rows.
    pub pictures: Vec<Picture>,
}

/// Lays out rows of pictures. Small pictures are enlarged by a whole factor, alpha is left out.
///
/// # Errors
/// [`Error::Plot`]; also if rows have not a picture for every column, or pictures differ in shape.
pub fn strips(title: &str, columns: &[String], rows: &[Strip]) -> Result<Picture> {
    let unfit = |reason: &str| Error::Plot { reason: reason.to_owned() };
    let shape =
        rows.first().and_then(|r| r.pictures.first()).ok_or_else(|| unfit("there are no pictures"))?.shape();
    if rows.iter().any(|r| r.pictures.len() != columns.len() || r.pictures.iter().any(|p| p.shape() != shape))
    {
        return Err(unfit("a row has too few or too many pictures, or of another shape"));
    }
    let factor = LEAST_WIDTH.div_ceil(shape.width.max(1));
    let (height, width) = (shape.height * factor + GAP, shape.width * factor + GAP);
    let label_width = rows.iter().map(|r| text_width(&r.label, TEXT)).max().unwrap_or(0);
    let left = MARGIN + label_width + SPACE;
    let top = MARGIN + LINES.0 + LINES.1;
    let inside = (columns.len() * width).max(text_width(title, TITLE));
    let whole = (left + inside + MARGIN, top + rows.len() * height + MARGIN);
    let (Ok(wide), Ok(high)) = (u32::try_from(whole.0), u32::try_from(whole.1)) else {
        return Err(unfit("the pictures are too large for a strip"));
    };
    let at = |x: usize, y: usize| (x as i32 * SCALE as i32, y as i32 * SCALE as i32);
    let mut picture = render(wide, high, |area| {
        let put = |words: &str, size, horizontal, vertical, place| -> Drawn {
            Ok(area.draw_text(words, &text(size).pos(Pos::new(horizontal, vertical)), place)?)
        };
        put(title, TITLE, HPos::Left, VPos::Top, at(left, MARGIN))?;
        for (i, column) in columns.iter().enumerate() {
            let middle = left + i * width + (width - GAP) / 2;
            put(column, TEXT, HPos::Center, VPos::Bottom, at(middle, top - SPACE / 2))?;
        }
        for (i, row) in rows.iter().enumerate() {
            let middle = top + i * height + (height - GAP) / 2;
            put(&row.label, TEXT, HPos::Right, VPos::Center, at(left - SPACE, middle))?;
        }
        Ok(())
    })?;
    for (i, row) in rows.iter().enumerate() {
        for (j, p) in row.pictures.iter().enumerate() {
            picture.paste(&rgb(p).enlarge(factor), top + i * height, left + j * width);
        }
    }
    Ok(picture)
}

/// A picture's colours without its alpha.
fn rgb(picture: &Picture) -> Picture {
    let colours = |pixel: &[u8]| if pixel.len() < 3 { [pixel[0]; 3] } else { [pixel[0], pixel[1], pixel[2]] };
    let data = picture.data.chunks_exact(picture.channels).flat_map(colours).collect();
    let PictureShape { height, width, .. } = picture.shape();
    Picture { height, width, channels: 3, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: usize, channels: usize, value: u8) -> Picture {
        Picture { height: 2, width, channels, data: vec![value; 2 * width * channels] }
    }

    fn strip(pictures: Vec<Picture>) -> Strip {
        Strip { label: "a schedule".to_owned(), pictures }
    }

    #[test]
    fn pictures_stand_in_their_rows_and_columns_enlarged() {
        for channels in 1..=4 {
            let row = |first: u8| strip(vec![picture(10, channels, first), picture(10, channels, first + 1)]);
            let columns = ["t = 0".to_owned(), "t = 1000".to_owned()];
            let made = strips("title", &columns, &[row(100), row(110)]).unwrap();
            let count = |v: u8| made.data.chunks(3).filter(|p| **p == [v; 3]).count();
            // Nine times as wide as 10 pixels is more than 84.
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
    fn rows_that_do_not_fit_are_refused() {
        let columns = ["a".to_owned()];
        assert!(strips("", &columns, &[]).is_err());
        assert!(strips("", &columns, &[strip(vec![])]).is_err());
        assert!(strips("", &columns, &[strip(vec![picture(1, 1, 0), picture(1, 1, 0)])]).is_err());
        let rows = [strip(vec![picture(1, 1, 0)]), strip(vec![picture(2, 1, 0)])];
        assert!(strips("", &columns, &rows).is_err());
        assert!(strips("", &columns, &rows[..1]).is_ok());
        let large = strip(vec![picture(100_000_000, 1, 0)]);
        assert!(matches!(strips("", &columns, &[large]), Err(Error::Plot { .. })));
    }
}
