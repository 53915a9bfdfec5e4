//! Decodes one file into one image, under limits, then drops channels that carry no requested information.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use sha2::{Digest, Sha256};

use super::options::{Alpha, DataOptions};
use super::{FormatCount, frames, jpeg};

/// Maximum file size in bytes.
const MAX_FILE: u64 = 1 << 30;
/// Maximum width and height of a decoded image.
const MAX_DECODED_SIDE: u32 = 32_768;
/// Maximum memory for a decoded image.
const MAX_DECODED_BYTES: u64 = 512 << 20;

/// Samples as stored, row by row, with interleaved channels.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Samples {
    U8(Vec<u8>),
    U16(Vec<u16>),
}

/// A decoded image.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pixels {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub samples: Samples,
}

impl Pixels {
    pub fn bits(&self) -> u8 {
        match self.samples {
            Samples::U8(_) => 8,
            Samples::U16(_) => 16,
        }
    }

    /// Memory used by the samples.
    pub fn bytes(&self) -> u64 {
        (self.height * self.width * self.channels) as u64 * u64::from(self.bits() / 8)
    }

    /// SHA-256 of the shape and the samples.
    pub fn digest(&self) -> [u8; 32] {
        let mut sha = Sha256::new();
        for n in [self.height, self.width, self.channels, self.bits().into()] {
            sha.update((n as u64).to_le_bytes());
        }
        match &self.samples {
            Samples::U8(data) => sha.update(data),
            Samples::U16(data) => data.iter().for_each(|v| sha.update(v.to_le_bytes())),
        }
        sha.finalize().into()
    }

    /// Writes the image in [-1, 1] with `channels` channels; see [`write_unit`].
    pub fn write_unit(&self, channels: usize, out: &mut [f32]) {
        match &self.samples {
            Samples::U8(data) => write_unit(data, self.channels, channels, out),
            Samples::U16(data) => write_unit(data, self.channels, channels, out),
        }
    }
}

/// Facts about a file and its conversion to [`Pixels`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct DecodeInfo {
    /// The format of the file; `images` is 1.
    pub file: FormatCount,
    /// The file has colour channels, but every pixel is grey.
    pub grey_in_colour: bool,
    /// The file has an alpha channel that is fully opaque.
    pub opaque_alpha: bool,
    /// Transparency was composited on a colour.
    pub composited: bool,
    /// The image was rotated or mirrored according to its EXIF orientation.
    pub reoriented: bool,
    /// The file has more pages or frames, which are not read.
    pub more_frames: bool,
}

/// u8 or u16.
pub(super) trait Sample: Copy + PartialEq {
    const MAX: u32;
    fn wide(self) -> u32;
    /// From a value not above `MAX`.
    fn narrow(wide: u64) -> Self;
}

impl Sample for u8 {
    const MAX: u32 = 255;
    fn wide(self) -> u32 {
        self.into()
    }
    fn narrow(wide: u64) -> Self {
        wide as u8
    }
}

impl Sample for u16 {
    const MAX: u32 = 65_535;
    fn wide(self) -> u32 {
        self.into()
    }
    fn narrow(wide: u64) -> Self {
        wide as u16
    }
}

/// Writes samples with `stored` channels as values in [-1, 1] with `wanted` channels: grey is repeated for colour, alpha is
/// dropped or added as opaque.
pub(super) fn write_unit<T: Sample>(data: &[T], stored: usize, wanted: usize, out: &mut [f32]) {
    let unit = |v: T| v.wide() as f32 / T::MAX as f32 * 2.0 - 1.0;
    if stored == wanted {
        assert_eq!(data.len(), out.len());
        out.iter_mut().zip(data).for_each(|(o, &v)| *o = unit(v));
        return;
    }
    assert_eq!(data.len() / stored * wanted, out.len());
    for (pixel, out) in data.chunks_exact(stored).zip(out.chunks_exact_mut(wanted)) {
        let colours = if wanted >= 3 { 3 } else { 1 };
        for c in 0..colours {
            out[c] = unit(pixel[if stored >= 3 { c } else { 0 }]);
        }
        if wanted > colours {
            out[colours] = if stored.is_multiple_of(2) { unit(pixel[stored - 1]) } else { 1.0 };
        }
    }
}

/// Decodes the `bytes` of a file. Grey is not expanded to colour and no opaque alpha channel is added yet: whether that is needed
/// depends on the other images.
///
/// The error is a human-readable reason.
pub(super) fn decode(bytes: &[u8], options: &DataOptions) -> Result<(Pixels, DecodeInfo), String> {
    // The decoders are tested on hostile files, but a panic in one must not end a run.
    catch_unwind(AssertUnwindSafe(|| decode_reduced(bytes, options)))
        .unwrap_or_else(|_| Err("the decoder failed on it; it is probably damaged".into()))
}

/// Reads the file at `path`, which must not be empty or larger than [`MAX_FILE`].
pub(super) fn read_capped(path: &Path) -> Result<Vec<u8>, String> {
    let text = |e: std::io::Error| format!("cannot be read: {e}");
    // Checked before opening: opening a named pipe would block forever.
    let metadata = std::fs::metadata(path).map_err(text)?;
    if !metadata.is_file() {
        return Err("is not a regular file".into());
    }
    let mut bytes = Vec::new();
    File::open(path).map_err(text)?.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(text)?;
    match bytes.len() as u64 {
        0 => Err("is empty".into()),
        n if n > MAX_FILE => Err(format!("is longer than {} MiB", MAX_FILE >> 20)),
        _ => Ok(bytes),
    }
}

fn decode_reduced(bytes: &[u8], options: &DataOptions) -> Result<(Pixels, DecodeInfo), String> {
    let (image, reoriented) = decode_upright(bytes)?;
    let (height, width) = (image.height() as usize, image.width() as usize);
    let channels = image.color().channel_count() as usize;
    let samples = match image {
        DynamicImage::ImageLuma8(p) => Samples::U8(p.into_raw()),
        DynamicImage::ImageLumaA8(p) => Samples::U8(p.into_raw()),
        DynamicImage::ImageRgb8(p) => Samples::U8(p.into_raw()),
        DynamicImage::ImageRgba8(p) => Samples::U8(p.into_raw()),
        DynamicImage::ImageLuma16(p) => Samples::U16(p.into_raw()),
        DynamicImage::ImageLumaA16(p) => Samples::U16(p.into_raw()),
        DynamicImage::ImageRgb16(p) => Samples::U16(p.into_raw()),
        DynamicImage::ImageRgba16(p) => Samples::U16(p.into_raw()),
        _ => return Err("has floating-point pixels; save it with 8 or 16 bits per sample".into()),
    };
    let (pixels, info) = reduced(Pixels { height, width, channels, samples }, options);
    Ok((pixels, DecodeInfo { reoriented, more_frames: frames::count(bytes) > 1, ..info }))
}

/// Drops channels that carry no information or were not requested.
pub(super) fn reduced(pixels: Pixels, options: &DataOptions) -> (Pixels, DecodeInfo) {
    let Pixels { height, width, channels: stored, samples } = pixels;
    let bits = if matches!(samples, Samples::U8(_)) { 8 } else { 16 };
    let mut info = DecodeInfo {
        file: FormatCount { height, width, channels: stored, bits, images: 1 },
        grey_in_colour: false,
        opaque_alpha: false,
        composited: false,
        reoriented: false,
        more_frames: false,
    };
    let (channels, samples) = match samples {
        Samples::U8(data) => {
            let (channels, data) = reduce(data, stored, options, &mut info);
            (channels, Samples::U8(data))
        }
        Samples::U16(data) => {
            let (channels, data) = reduce(data, stored, options, &mut info);
            (channels, Samples::U16(data))
        }
    };
    (Pixels { height, width, channels, samples }, info)
}

/// Decodes under limits and applies the EXIF orientation; the flag is true if that changed the image.
fn decode_upright(bytes: &[u8]) -> Result<(DynamicImage, bool), String> {
    // Detected by content: a wrong extension is common and harmless.
    let format = image::guess_format(bytes)
        .map_err(|_| "is not an image: its content matches no known image format".to_owned())?;
    if format == ImageFormat::Jpeg {
        jpeg::check(bytes)?;
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_DECODED_SIDE);
    limits.max_image_height = Some(MAX_DECODED_SIDE);
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(reason)?;
    limits.reserve(decoder.total_bytes()).map_err(reason)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err("has no pixels".into());
    }
    // A broken EXIF block is no reason to reject the image.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(reason)?;
    image.apply_orientation(orientation);
    Ok((image, orientation != Orientation::NoTransforms))
}

fn reason(e: ImageError) -> String {
    match e {
        ImageError::Limits(_) => format!(
            "is too large: over {MAX_DECODED_SIDE} pixels per side or {} MiB decoded",
            MAX_DECODED_BYTES >> 20
        ),
        ImageError::Unsupported(e) => format!("has an unsupported format: {e}"),
        e => format!("is damaged or cut off: {e}"),
    }
}

/// The remaining channels and their samples; records the conversion in `info`.
fn reduce<T: Sample>(
    mut data: Vec<T>,
    stored: usize,
    options: &DataOptions,
    info: &mut DecodeInfo,
) -> (usize, Vec<T>) {
    let requested = options.channels;
    let mut channels = stored;
    if channels.is_multiple_of(2) {
        let keep_alpha = match requested {
            Some(2 | 4) => true,
            Some(_) => false,
            None => options.alpha == Some(Alpha::Keep),
        };
        info.opaque_alpha = data.chunks_exact(channels).all(|p| p[channels - 1].wide() == T::MAX);
        if info.opaque_alpha {
            data =
                map_pixels(&data, channels, channels - 1, |p, out| out.copy_from_slice(&p[..channels - 1]));
            channels -= 1;
        } else if !keep_alpha {
            info.composited = true;
            let max = u64::from(T::MAX);
            let background = if options.alpha == Some(Alpha::White) { max } else { 0 };
            data = map_pixels(&data, channels, channels - 1, |p, out| {
                let alpha = u64::from(p[channels - 1].wide());
                for (o, v) in out.iter_mut().zip(p) {
                    let mixed = u64::from(v.wide()) * alpha + background * (max - alpha);
                    *o = T::narrow((mixed + max / 2) / max);
                }
            });
            channels -= 1;
        }
    }
    if channels >= 3 {
        info.grey_in_colour = data.chunks_exact(channels).all(|p| p[0] == p[1] && p[1] == p[2]);
        if info.grey_in_colour || matches!(requested, Some(1 | 2)) {
            // The luma of three equal samples is that sample.
            data = map_pixels(&data, channels, channels - 2, |p, out| {
                out[0] = luma(p[0], p[1], p[2]);
                out[1..].copy_from_slice(&p[3..]);
            });
            channels -= 2;
        }
    }
    (channels, data)
}

fn map_pixels<T: Sample>(data: &[T], from: usize, to: usize, write: impl Fn(&[T], &mut [T])) -> Vec<T> {
    let mut out = vec![T::narrow(0); data.len() / from * to];
    for (pixel, out) in data.chunks_exact(from).zip(out.chunks_exact_mut(to)) {
        write(pixel, out);
    }
    out
}

/// ITU-R 601-2 luma in Pillow's fixed point (`convert('L')`): the weights are in units of 1/65536 and sum to 1.
fn luma<T: Sample>(r: T, g: T, b: T) -> T {
    let [r, g, b] = [r, g, b].map(|v| u64::from(v.wide()));
    T::narrow((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16)
}

#[cfg(test)]
mod tests;
