//! Masks: image files that mark pixels.

use std::path::Path;

use super::decode::{Pixels, Samples, decode, read_capped};
use super::options::{Alpha, DataOptions};
use super::transform::Transform;
use super::{FormatCount, unusable};
use crate::error::Result;

/// The pixels marked by a mask file, at the size of the data set's images.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// Whether each pixel is marked, row by row.
    pub marked: Vec<bool>,
    /// The format of the file, after EXIF rotation.
    pub found: FormatCount,
    /// Which pixel values of the file counted as marked, such as "white (255)".
    pub taken: String,
}

/// A mask file reduced to one value per pixel.
struct Values {
    /// Scaled to 16 bits, whatever the file has.
    data: Vec<u16>,
    from_alpha: bool,
    /// The lowest and the highest value, and whether there are others in between.
    low: u16,
    high: u16,
    others: bool,
}

/// A 16-bit value in the bit depth of the file.
fn shown(value: u16, bits: u8) -> u16 {
    if bits == 8 { value / 257 } else { value }
}

/// Reads the mask at `path` and resizes it like a data set with these options; `invert` marks the other pixels instead.
///
/// In a mask with two values, be they 0 and 255 or 0 and 1, the brighter one is marked; with more values, those above one half.
/// If all pixels have the same colour but differ in alpha, opaque pixels are marked; otherwise transparency is composited on
/// black.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) for a file that is not an image, that marks nothing, or that has several values, all of
/// them on the unmarked side of one half.
pub fn open_mask(path: &Path, options: &DataOptions, invert: bool) -> Result<Mask> {
    let mask_options = DataOptions {
        channels: None,
        alpha: Some(Alpha::Keep),
        random_crop_scale: None,
        horizontal_flip: false,
        csv: None,
        ..options.clone()
    };
    mask_options.check()?;
    let wrong = |reason: String| unusable(path, reason);
    let bytes = read_capped(path).map_err(wrong)?;
    let (pixels, info) = decode(&bytes, &mask_options).map_err(wrong)?;
    let (height, width, bits) = (pixels.height, pixels.width, pixels.bits());
    let mut values = values(&pixels);
    let taken = taken(&values, bits, invert).map_err(wrong)?;
    if !values.others {
        let threshold = if values.low == values.high { u16::MAX / 2 } else { values.low };
        values.data.iter_mut().for_each(|v| *v = if *v > threshold { u16::MAX } else { 0 });
    }
    let pixels = Pixels { height, width, channels: 1, samples: Samples::U16(values.data) };
    let pixels = Transform::new(&mask_options).base(pixels).map_err(wrong)?;
    let mut unit = vec![0.0; pixels.height * pixels.width];
    pixels.write_unit(1, &mut unit);
    let marked: Vec<bool> = unit.iter().map(|&v| (v > 0.0) != invert).collect();
    if !marked.contains(&true) {
        let reason = format!(
            "nothing to fill: the marked area is lost when the mask is resized from {height}x{width} to {}x{}; mark a larger area",
            pixels.height, pixels.width
        );
        return Err(wrong(reason));
    }
    Ok(Mask { marked, found: info.file, taken })
}

/// Reduces the image to one value per pixel.
fn values(pixels: &Pixels) -> Values {
    let channels = pixels.channels;
    let wide: Vec<u16> = match &pixels.samples {
        Samples::U8(data) => data.iter().map(|&v| u16::from(v) * 257).collect(),
        Samples::U16(data) => data.clone(),
    };
    let each = || wide.chunks_exact(channels.max(1));
    let has_alpha = channels.is_multiple_of(2);
    let colours = if has_alpha { channels - 1 } else { channels };
    let alpha = |pixel: &[u16]| if has_alpha { pixel[channels - 1] } else { u16::MAX };
    let grey = |pixel: &[u16]| match colours {
        1 => u32::from(pixel[0]),
        // ITU-R 601-2 luma.
        _ => (299 * u32::from(pixel[0]) + 587 * u32::from(pixel[1]) + 114 * u32::from(pixel[2]) + 500) / 1000,
    };
    let is_constant = |mut all: Box<dyn Iterator<Item = u32> + '_>| {
        let first = all.next();
        all.all(|v| Some(v) == first)
    };
    let constant_alpha = is_constant(Box::new(each().map(|p| u32::from(alpha(p)))));
    // Transparent pixels may have any colour.
    let constant_grey = is_constant(Box::new(each().filter(|p| alpha(p) > 0).map(grey)));
    let from_alpha = !constant_alpha && constant_grey;
    let max = u32::from(u16::MAX);
    let value = |pixel: &[u16]| -> u16 {
        match (from_alpha, constant_alpha) {
            (true, _) => alpha(pixel),
            (false, true) => grey(pixel) as u16,
            (false, false) => {
                let product = u64::from(grey(pixel)) * u64::from(alpha(pixel));
                ((product + u64::from(max) / 2) / u64::from(max)) as u16
            }
        }
    };
    let data: Vec<u16> = each().map(value).collect();
    let (low, high) = data.iter().fold((u16::MAX, 0), |(low, high), &v| (low.min(v), high.max(v)));
    let others = data.iter().any(|&v| v != low && v != high);
    Values { data, from_alpha, low, high, others }
}

/// Human-readable description of the marked values, or the reason why nothing can be marked.
fn taken(values: &Values, bits: u8, invert: bool) -> Result<String, String> {
    let (low, high) = (shown(values.low, bits), shown(values.high, bits));
    let (max, half) = (shown(u16::MAX, bits), u16::MAX / 2);
    let constant = values.low == values.high;
    let counts = if values.high <= half { "black" } else { "white" };
    let (filled, other) = if invert {
        ("--invert-mask fills black", "without it")
    } else {
        ("white is filled", "with --invert-mask")
    };
    let remedy = format!("use two values such as 0 and {max}");
    if constant && (values.high > half) == invert {
        return Err(format!(
            "nothing to fill: the mask is {low} of {max} everywhere, which counts as {counts}, and {filled}; {other} the whole \
             image is filled; to fill a part {remedy}"
        ));
    }
    if values.others && ((values.high <= half && !invert) || (values.low > half && invert)) {
        let shade = if invert { "bright" } else { "dark" };
        return Err(format!(
            "the mask is ambiguous: it has several values from {low} to {high} of {max}, all {shade}, and {filled}; {remedy}"
        ));
    }
    let (bright, dark) = if values.from_alpha { ("opaque", "transparent") } else { ("white", "black") };
    let name = if invert { dark } else { bright };
    let value = if invert { low } else { high };
    let full_range = (low, high) == (0, max) || low == high;
    Ok(match (values.others, values.from_alpha) {
        (true, _) => format!("{name} ({} {})", if invert { "up to" } else { "above" }, max / 2),
        (false, true) => format!("{name} ({value})"),
        (false, false) if constant && !matches!(values.high, 0 | u16::MAX) => {
            format!("the only value of the mask, {value} of {max}, counts as {counts}: it")
        }
        (false, false) if full_range => format!("{name} ({value})"),
        (false, false) => {
            let which = if invert { "darker" } else { "brighter" };
            format!("the {which} of its two values, {low} and {high},")
        }
    })
}
