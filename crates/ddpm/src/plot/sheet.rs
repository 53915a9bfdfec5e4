//! Grids of labelled images, enlarged by an integer factor.

use super::{GRID, PlotResult, SCALE, TEXT, TITLE, render, text, text_width};
use crate::data::ImageShape;
use crate::error::{Error, Result};
use crate::image::Image;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Pixels between cells, around the sheet, and between row labels and images.
const GAP: usize = 6;
const MARGIN: usize = 12;
const SPACE: usize = 8;
/// Images narrower or lower than this are enlarged, for visibility and to make room for labels ...
const MIN_SIZE: (usize, usize) = (84, 48);
/// ... but at most to this size.
const MAX_ENLARGED: usize = 256;
/// Maximum side of a sheet of enlarged images.
const MAX_SIDE: usize = 4096;
/// Maximum widths of labels above or below narrower images, and of row labels; longer ones are truncated.
const MAX_LABEL_WIDTH: usize = 140;
const MAX_ROW_LABEL_WIDTH: usize = 260;
/// Line heights of the title and of labels.
const TITLE_LINE: usize = 28;
const LINE: usize = 20;
/// Maximum pixels of a sheet, at three bytes each.
const MAX_PIXELS: usize = 100_000_000;

/// A grid of images with optional labels; empty labels take no space.
#[derive(Clone, Debug, Default)]
pub struct Sheet {
    /// Title at the top.
    pub title: String,
    /// Images per row.
    pub columns: usize,
    /// Labels above the columns.
    pub column_labels: Vec<String>,
    /// Labels left of the rows.
    pub row_labels: Vec<String>,
    /// Captions below the images.
    pub captions: Vec<String>,
    /// The images in row-major order, of equal shape; the last row may be shorter. Transparency is composited on white.
    pub images: Vec<Image>,
}

/// Layout of a sheet, in pixels.
struct Layout {
    scale_factor: usize,
    /// Width and height of an image, and of a cell with its caption.
    image: (usize, usize),
    cell: (usize, usize),
    /// Left and upper edge of the cells.
    left: usize,
    top: usize,
    /// Width and height of the sheet.
    size: (usize, usize),
}

/// The number of columns for a nearly square sheet of `count` images, preferring one that fills the last row if that is not
/// much wider.
pub fn columns(count: usize, shape: ImageShape) -> usize {
    let ImageShape { height, width, .. } = shape;
    let square = (count as f64 * height.max(1) as f64 / width.max(1) as f64).sqrt();
    let min = (square.ceil() as usize).clamp(1, count.max(1));
    let max = ((2.0 * square) as usize).min(count);
    (min..=max).find(|&columns| count.is_multiple_of(columns)).unwrap_or(min)
}

/// The factor by which an image of this shape is enlarged.
pub fn scale_factor(shape: ImageShape) -> usize {
    let ImageShape { height, width, .. } = shape;
    let wanted = MIN_SIZE.0.div_ceil(width.max(1)).max(MIN_SIZE.1.div_ceil(height.max(1)));
    wanted.min(MAX_ENLARGED / height.max(width).max(1)).max(1)
}

/// The number of images of this shape that always fit on a sheet.
pub fn max_images(shape: ImageShape) -> usize {
    let cell = (shape.height + GAP + LINE).saturating_mul(shape.width.max(MAX_LABEL_WIDTH) + GAP);
    (MAX_PIXELS / 2 / cell.max(1)).max(1)
}

impl Sheet {
    /// Draws the sheet, in RGB.
    ///
    /// # Errors
    /// [`Error::Plot`] without images, for images of different shapes, and for too many.
    pub fn draw(&self) -> Result<Image> {
        let invalid = |reason: &str| Error::Plot { reason: reason.to_owned() };
        let shape = self.images.first().ok_or_else(|| invalid("there are no images"))?.shape();
        if self.images.iter().any(|image| image.shape() != shape) {
            return Err(invalid("the images of a sheet must have the same shape"));
        }
        let layout = self.layout(shape);
        let (width, height) = layout.size;
        if width.checked_mul(height).is_none_or(|pixels| pixels > MAX_PIXELS) {
            let reason = format!("it would have {width} x {height} pixels; show fewer or smaller images");
            return Err(Error::Plot { reason });
        }
        let mut sheet = Image { height, width, channels: 3, data: vec![255; height * width * 3] };
        let cell_origin = |i: usize| {
            let (row, column) = (i / self.columns(), i % self.columns());
            let left = layout.left + column * (layout.cell.0 + GAP);
            let top = layout.top + row * (layout.cell.1 + GAP);
            (left, left + (layout.cell.0 - layout.image.0) / 2, top)
        };
        for (i, image) in self.images.iter().enumerate() {
            let (_, left, top) = cell_origin(i);
            frame(&mut sheet, (left - 1, top - 1), (layout.image.0 + 2, layout.image.1 + 2));
            sheet.paste(&on_white(image).enlarge(layout.scale_factor), top, left);
        }
        let centre = HPos::Center;
        for (i, caption) in self.captions.iter().enumerate().take(self.images.len()) {
            let (left, _, top) = cell_origin(i);
            draw_label(
                &mut sheet,
                caption,
                TEXT,
                centre,
                (left, top + layout.image.1 + 1),
                (layout.cell.0, LINE),
            )?;
        }
        for (i, label) in self.column_labels.iter().enumerate().take(self.columns()) {
            let (left, _, top) = cell_origin(i);
            draw_label(&mut sheet, label, TEXT, centre, (left, top - LINE - 1), (layout.cell.0, LINE))?;
        }
        for (i, label) in self.row_labels.iter().enumerate().take(self.rows()) {
            let (_, _, top) = cell_origin(i * self.columns());
            let middle = top + (layout.image.1.max(LINE) - LINE) / 2;
            draw_label(
                &mut sheet,
                label,
                TEXT,
                HPos::Right,
                (MARGIN, middle),
                (layout.left - SPACE - MARGIN, LINE),
            )?;
        }
        let inside = width - layout.left - MARGIN;
        draw_label(&mut sheet, &self.title, TITLE, HPos::Left, (layout.left, MARGIN), (inside, TITLE_LINE))?;
        Ok(sheet)
    }

    fn columns(&self) -> usize {
        self.columns.clamp(1, self.images.len().max(1))
    }

    fn rows(&self) -> usize {
        self.images.len().div_ceil(self.columns())
    }

    fn layout(&self, shape: ImageShape) -> Layout {
        let widest =
            |labels: &[String], size| labels.iter().map(|l| text_width(&replace_control(l), size)).max();
        let label = widest(&self.captions, TEXT).max(widest(&self.column_labels, TEXT));
        let label = label.map_or(0, |width| (width + 2).min(MAX_LABEL_WIDTH));
        let rows =
            widest(&self.row_labels, TEXT).map_or(0, |width| width.min(MAX_ROW_LABEL_WIDTH) + 2 + SPACE);
        let caption = if self.captions.is_empty() { 0 } else { LINE + 2 };
        let title = if self.title.is_empty() { 0 } else { TITLE_LINE };
        let top = MARGIN + title + if self.column_labels.is_empty() { 0 } else { LINE };
        let left = MARGIN + rows;
        let of = |scale_factor: usize| {
            let image = (shape.width.saturating_mul(scale_factor), shape.height.saturating_mul(scale_factor));
            let cell = (image.0.max(label), image.1.saturating_add(caption));
            let wide = (cell.0 + GAP).saturating_mul(self.columns()) - GAP;
            let wide = wide.max(widest(std::slice::from_ref(&self.title), TITLE).unwrap_or(0) + 2);
            let high = (cell.1 + GAP).saturating_mul(self.rows()) - GAP;
            let size = (wide.saturating_add(left + MARGIN), high.saturating_add(top + MARGIN));
            Layout { scale_factor, image, cell, left, top, size }
        };
        let fits = |layout: &Layout| layout.scale_factor == 1 || layout.size.0.max(layout.size.1) <= MAX_SIDE;
        (1..=scale_factor(shape)).rev().map(of).find(fits).unwrap_or_else(|| of(1))
    }
}

/// Draws a thin frame at (left, top), so that white images stand out on the sheet.
fn frame(sheet: &mut Image, (left, top): (usize, usize), (width, height): (usize, usize)) {
    let shape = ImageShape { height, width, channels: 3 };
    let line = [GRID.0, GRID.1, GRID.2].repeat(width * height);
    sheet.paste(&Image { data: line, ..Image::black(shape) }, top, left);
}

/// Draws `words` within a box at (left, top), truncated to its width.
fn draw_label(
    sheet: &mut Image,
    words: &str,
    size: u32,
    at: HPos,
    (left, top): (usize, usize),
    (width, height): (usize, usize),
) -> Result<()> {
    let words = truncate_to_width(&replace_control(words), size, width);
    if words.is_empty() {
        return Ok(());
    }
    let (wide, high) = ((width as u32 * SCALE) as i32, (height as u32 * SCALE) as i32);
    let x = match at {
        HPos::Left => 0,
        HPos::Center => wide / 2,
        HPos::Right => wide,
    };
    let label = render(width as u32, height as u32, |area| -> PlotResult {
        let style = text(size).pos(Pos::new(at, VPos::Center));
        Ok(area.draw_text(&words, &style, (x, high / 2))?)
    })?;
    sheet.paste(&label, top, left);
    Ok(())
}

/// Truncates text to a width, with an ellipsis.
fn truncate_to_width(words: &str, size: u32, width: usize) -> String {
    if text_width(words, size) <= width {
        return words.to_owned();
    }
    let letters: Vec<char> = words.chars().collect();
    let cut = |n: usize| format!("{}…", letters[..n].iter().collect::<String>());
    let fits = |n: &usize| text_width(&cut(*n), size) <= width;
    (0..letters.len()).rev().find(fits).map_or(String::new(), cut)
}

/// Replaces control characters, which names of files and classes may contain.
fn replace_control(words: &str) -> String {
    words.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The image as RGB, composited on white.
fn on_white(image: &Image) -> Image {
    let composite = |pixel: &[u8]| {
        let (colours, alpha) = match pixel.len() {
            1 | 3 => (pixel, 255),
            n => (&pixel[..n - 1], u32::from(pixel[n - 1])),
        };
        let on = |v: u8| ((u32::from(v) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
        if colours.len() < 3 { [on(colours[0]); 3] } else { [on(colours[0]), on(colours[1]), on(colours[2])] }
    };
    let data = image.data.chunks_exact(image.channels).flat_map(composite).collect();
    Image { channels: 3, data, ..*image }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(height: usize, width: usize, channels: usize, value: u8) -> Image {
        Image { height, width, channels, data: vec![value; height * width * channels] }
    }

    fn labels(n: usize) -> Vec<String> {
        (0..n).map(|i| format!("label {i}")).collect()
    }

    #[test]
    fn small_images_are_enlarged_exactly_and_large_ones_are_not() {
        for (side, scale_factor) in [(1, 84), (12, 7), (16, 6), (28, 3), (32, 3), (64, 2), (84, 1), (500, 1)]
        {
            let data: Vec<u8> = (0..side * side).map(|i| (i * 7) as u8).collect();
            let image = Image { height: side, width: side, channels: 1, data };
            let sheet = Sheet { columns: 1, images: vec![image.clone()], ..Sheet::default() }.draw().unwrap();
            let large = image.enlarge(scale_factor);
            assert_eq!((sheet.height, sheet.width), (large.height + 2 * MARGIN, large.width + 2 * MARGIN));
            for (y, row) in large.data.chunks(large.width).enumerate() {
                let at = ((MARGIN + y) * sheet.width + MARGIN) * 3;
                let shown = sheet.data[at..at + 3 * large.width].chunks(3);
                assert!(shown.zip(row).all(|(shown, &v)| shown == [v; 3]), "{side}, row {y}");
            }
        }
    }

    #[test]
    fn labels_do_not_overlap_images() {
        let images: Vec<Image> = (0..6).map(|i| image(16, 16, 3, 10 * i + 40)).collect();
        let bare = Sheet { columns: 3, images, ..Sheet::default() };
        let with = Sheet {
            title: "a title".into(),
            column_labels: labels(3),
            row_labels: labels(2),
            captions: labels(6),
            ..bare.clone()
        };
        let (bare, with) = (bare.draw().unwrap(), with.draw().unwrap());
        assert!(with.width > bare.width && with.height > bare.height + TITLE_LINE + 2 * LINE);
        let count = |sheet: &Image, v: u8| sheet.data.chunks(3).filter(|p| **p == [v; 3]).count();
        for i in 0..6 {
            let v = 10 * i + 40;
            // Antialiased text may have any grey.
            assert!(count(&bare, v) == 96 * 96 && count(&with, v) >= 96 * 96, "{v}");
        }
        let dark = |sheet: &Image| sheet.data.chunks(3).filter(|p| p[0] < 100).count();
        assert!(dark(&with) > dark(&bare) + 300);
        // Long labels and control characters do not widen the sheet.
        let long = |text: &str| Sheet {
            columns: 1,
            captions: vec![text.into()],
            images: vec![image(16, 16, 1, 0)],
            ..Sheet::default()
        };
        let wide = long(&"W".repeat(500)).draw().unwrap().width;
        assert!(
            wide <= MAX_LABEL_WIDTH + 2 * MARGIN
                && wide == long(&"\u{1b}[2J\n\0".repeat(900)).draw().unwrap().width
        );
    }

    #[test]
    fn sheets_are_nearly_square_and_prefer_full_rows() {
        let square = ImageShape { height: 16, width: 16, channels: 1 };
        let found = [1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 50, 64, 97, 100, 5000].map(|n| columns(n, square));
        assert_eq!(found, [1, 2, 3, 2, 3, 3, 4, 5, 4, 4, 10, 8, 10, 10, 100]);
        assert!(columns(100, ImageShape { height: 10, width: 40, channels: 1 }) == 5);
        assert_eq!(columns(0, square), 1);
    }

    #[test]
    fn invalid_sheets_are_rejected_and_many_images_are_enlarged_less() {
        assert!(Sheet::default().draw().is_err());
        let mixed = vec![image(2, 2, 1, 0), image(2, 3, 1, 0)];
        assert!(Sheet { columns: 2, images: mixed, ..Sheet::default() }.draw().is_err());
        let many = Sheet { columns: 100, images: vec![image(8, 8, 1, 7); 1000], ..Sheet::default() };
        let sheet = many.draw().unwrap();
        assert!(sheet.width <= MAX_SIDE && sheet.width > 2000, "{}", sheet.width);
        let shape = ImageShape { height: 3000, width: 4000, channels: 3 };
        assert!(
            (1..=9).contains(&max_images(shape))
                && max_images(ImageShape { height: 16, width: 16, channels: 1 }) > 5000
        );
        // Transparency is composited on white.
        assert_eq!(on_white(&image(1, 1, 4, 51)).data, [214; 3]);
        assert_eq!(on_white(&image(1, 1, 2, 255)).data, [255; 3]);
    }
}
