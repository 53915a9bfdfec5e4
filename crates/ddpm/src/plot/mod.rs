//! Plots: functions from plain values to an [`Image`]; nothing here reads files or depends on runs.
//!
//! Charts have titled axes with ticks and a legend; sheets are grids of labelled images. Plots are drawn with
//! plotters at twice the size and averaged down for antialiasing. The font (DejaVu Sans) is built in, so plots look
//! the same on every machine.

mod axis;
mod bound;
mod chart;
mod distances;
mod heat_map;
mod loss;
mod schedules;
pub mod sheet;
mod strips;

use crate::error::{Error, Result};
use crate::image::Image;
use ab_glyph::{Font, FontRef};
use ddpm_data::memory;
use plotters::coord::Shift;
use plotters::prelude::{BitMapBackend, DrawingArea, IntoDrawingArea, RGBColor, WHITE};
use plotters::style::{FontStyle, IntoFont, TextStyle, register_font};
use std::sync::LazyLock;

pub use bound::bound;
pub use distances::distances;
pub use heat_map::{Columns, Row, heat_map};
pub use loss::LossCurve;
pub use schedules::schedules;
pub use sheet::Sheet;
pub use strips::{Strip, strips};

/// Supersampling factor.
const SCALE: u32 = 2;
/// Maximum pixels of a plot; drawing takes twelve bytes of memory per pixel.
const MAX_PIXELS: u64 = 50_000_000;
/// Bytes needed for drawing besides the images.
const WORKING_MEMORY: usize = 4 << 20;
/// The font's name in plotters.
const FONT: &str = "ddpm sans";
/// Font sizes of titles and of other text, in pixels.
const TITLE: u32 = 18;
const TEXT: u32 = 15;
/// Colours of text and axes, and of grid lines.
const INK: RGBColor = RGBColor(45, 45, 45);
const GRID: RGBColor = RGBColor(225, 225, 225);
/// Line colours, distinguishable with colour blindness (Okabe and Ito, "Color Universal Design", 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
/// Result of drawing; plotters has a different error type for every coordinate system.
type PlotResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Draws on a white background. `width` and `height` are in pixels; `draw` gets an area [`SCALE`] times as large.
fn render(width: u32, height: u32, draw: impl FnOnce(&Area<'_>) -> PlotResult) -> Result<Image> {
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        let reason = format!("it would have {width} x {height} pixels; show fewer or smaller images");
        return Err(Error::Plot { reason });
    }
    let (wide, high) = (width * SCALE, height * SCALE);
    // The supersampled image, the result and its encoding, plus memory for fonts and lines.
    let bytes = wide as usize * high as usize * 3;
    memory::check_available(2 * bytes + WORKING_MEMORY).map_err(|reason| Error::Plot { reason })?;
    let mut large = vec![0; bytes];
    let drawn = || -> PlotResult {
        let area = BitMapBackend::with_buffer(&mut large, (wide, high)).into_drawing_area();
        area.fill(&WHITE)?;
        draw(&area)?;
        Ok(area.present()?)
    };
    drawn().map_err(|e| Error::Plot { reason: e.to_string() })?;
    Ok(halved(&large, width as usize, height as usize))
}

/// The mean of every [`SCALE`] x [`SCALE`] pixels of an RGB image.
fn halved(large: &[u8], width: usize, height: usize) -> Image {
    let scale = SCALE as usize;
    let mut data = Vec::with_capacity(width * height * 3);
    for (y, x, c) in (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| (y, x, c)))) {
        let pixel = |i: usize| {
            let (dy, dx) = (i / scale, i % scale);
            u32::from(large[((y * scale + dy) * width * scale + x * scale + dx) * 3 + c])
        };
        let sum: u32 = (0..scale * scale).map(pixel).sum();
        data.push(((sum + SCALE * SCALE / 2) / (SCALE * SCALE)) as u8);
    }
    Image { height, width, channels: 3, data }
}

/// A lighter shade, for what is drawn under a line of the full colour.
fn lighten(colour: RGBColor) -> RGBColor {
    let mix = |c: u8| (f64::from(c) * 0.35 + 255.0 * 0.65) as u8;
    RGBColor(mix(colour.0), mix(colour.1), mix(colour.2))
}

/// Text style; `size` is in pixels of the finished plot.
fn text(size: u32) -> TextStyle<'static> {
    static REGISTERED: LazyLock<()> = LazyLock::new(|| {
        // If this fails, drawing text returns an error.
        let _ = register_font(FONT, FontStyle::Normal, dejavu::sans::regular());
    });
    *REGISTERED;
    (FONT, size * SCALE).into_font().color(&INK)
}

/// Whether the built-in font has a glyph for every character of `words`; missing ones are drawn as boxes.
pub fn can_write(words: &str) -> bool {
    static SANS: LazyLock<Option<FontRef<'static>>> =
        LazyLock::new(|| FontRef::try_from_slice(dejavu::sans::regular()).ok());
    SANS.as_ref().is_none_or(|font| words.chars().all(|c| font.glyph_id(c).0 != 0))
}

/// Width of `words` in pixels of the finished plot.
fn text_width(words: &str, size: u32) -> usize {
    let ((left, _), (right, _)) = text(size).font.layout_box(words).unwrap_or_default();
    ((right - left).max(0) as u32).div_ceil(SCALE) as usize
}
