//! Masks: image files that say which pixels are meant.

use std::path::Path;

use super::decode::{Pixels, Samples, decode, read_capped};
use super::options::{Alpha, DataOptions};
use super::transform::Transform;
use super::{Found, unusable};
use crate::error::Result;

/// What a mask's file marks, at the size of a data set's images.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// Whether each pixel is marked, row by row.
    pub marked: Vec<bool>,
    /// The form of the file, the image upright.
    pub found: Found,
    /// What of the file was taken for the mark, as "white (255)".
    pub taken: String,
}

/// What a file's pixels are as one value each, and what these are.
struct Values {
    /// 16 bits a pixel, whatever the file has.
    data: Vec<u16>,
    of_alpha: bool,
    /// The lowest and the highest value, and whether there is another.
    low: u16,
    high: u16,
    others: bool,
}

/// What values of 16 bits are called that a file has 8 of.
fn shown(value: u16, bits: u8) -> u16 {
    if bits == 8 { value / 257 } else { value }
}

/// Reads the mask in the file at `path`, brought to the size of a set with these options; with `invert` what is not marked counts
/// as marked.
///
/// Marked is the brighter of two values, be they 0 and 255 or 0 and 1; of more than two what is above a half. Where the colours
/// are all one and the transparency is not, opaque is marked; else transparency is laid on black.
///
/// # Errors
/// [`Error::Data`](crate::Error::Data) for a file that is no image, that marks nothing, or whose values are all dark and no two.
pub fn open_mask(path: &Path, options: &DataOptions, invert: bool) -> Result<Mask> {
    let own = DataOptions {
        channels: None,
        alpha: Some(Alpha::Keep),
        random_crop_scale: None,
        horizontal_flip: false,
        csv: None,
        ..options.clone()
    };
    own.check()?;
    let wrong = |reason: String| unusable(path, reason);
    let bytes = read_capped(path).map_err(wrong)?;
    let (pixels, facts) = decode(&bytes, &own).map_err(wrong)?;
    let (height, width, bits) = (pixels.height, pixels.width, pixels.bits());
    let mut values = values(&pixels);
    let taken = taken(&values, bits, invert).map_err(wrong)?;
    if !values.others {
        let threshold = if values.low == values.high { u16::MAX / 2 } else { values.low };
        values.data.iter_mut().for_each(|v| *v = if *v > threshold { u16::MAX } else { 0 });
    }
    let pixels = Pixels { height, width, channels: 1, samples: Samples::U16(values.data) };
    let pixels = Transform::new(&own).base(pixels).map_err(wrong)?;
    let mut unit = vec![0.0; pixels.height * pixels.width];
    pixels.write_unit(1, &mut unit);
    let marked: Vec<bool> = unit.iter().map(|&v| (v > 0.0) != invert).collect();
    if !marked.contains(&true) {
        let reason = format!(
            "nothing is to be filled: what it marks is lost where the mask is brought from {height}x{width} to {}x{}; mark more",
            pixels.height, pixels.width
        );
        return Err(wrong(reason));
    }
    Ok(Mask { marked, found: facts.file, taken })
}

/// One value for each pixel.
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
        // ITU-R 601-2, as images are made grey.
        _ => (299 * u32::from(pixel[0]) + 587 * u32::from(pixel[1]) + 114 * u32::from(pixel[2]) + 500) / 1000,
    };
    let one = |mut all: Box<dyn Iterator<Item = u32> + '_>| {
        let first = all.next();
        all.all(|v| Some(v) == first)
    };
    let alpha_is_one = one(Box::new(each().map(|p| u32::from(alpha(p)))));
    // Transparent pixels may have any colour.
    let grey_is_one = one(Box::new(each().filter(|p| alpha(p) > 0).map(grey)));
    let of_alpha = !alpha_is_one && grey_is_one;
    let max = u32::from(u16::MAX);
    let value = |pixel: &[u16]| -> u16 {
        match (of_alpha, alpha_is_one) {
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
    Values { data, of_alpha, low, high, others }
}

/// What is marked, in words; the error is the reason why nothing can be.
fn taken(values: &Values, bits: u8, invert: bool) -> Result<String, String> {
    let (low, high) = (shown(values.low, bits), shown(values.high, bits));
    let (most, half) = (shown(u16::MAX, bits), u16::MAX / 2);
    let one = values.low == values.high;
    let counts = if values.high <= half { "black" } else { "white" };
    let (filled, other) = match invert {
        true => ("--invert-mask fills what is black", "without it"),
        false => ("white is what is filled", "with --invert-mask"),
    };
    let parts = format!("give it two values, as 0 and {most}");
    if one && (values.high > half) == invert {
        return Err(format!(
            "nothing is to be filled: the mask is {low} of {most} everywhere, which counts as {counts}, and {filled}; {other} all of \
             the image is; to fill a part {parts}"
        ));
    }
    if values.others && ((values.high <= half && !invert) || (values.low > half && invert)) {
        let shade = if invert { "bright" } else { "dark" };
        return Err(format!(
            "nothing is marked plainly: the mask has several values from {low} to {high} of {most}, all {shade}, and {filled}; {parts}"
        ));
    }
    let (bright, dark) = if values.of_alpha { ("opaque", "transparent") } else { ("white", "black") };
    let name = if invert { dark } else { bright };
    let value = if invert { low } else { high };
    let whole = (low, high) == (0, most) || low == high;
    Ok(match (values.others, values.of_alpha) {
        (true, _) => format!("{name} ({} {})", if invert { "up to" } else { "above" }, most / 2),
        (false, true) => format!("{name} ({value})"),
        (false, false) if one && !matches!(values.high, 0 | u16::MAX) => {
            format!("the one grey of the mask, {value} of {most}, counts as {counts}: it")
        }
        (false, false) if whole => format!("{name} ({value})"),
        (false, false) => {
            let which = if invert { "darker" } else { "brighter" };
            format!("the {which} of its two values, {low} and {high},")
        }
    })
}
