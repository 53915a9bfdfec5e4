//! One file to one image: decoding under limits, then the least form that loses nothing that was asked for.

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};
use sha2::{Digest, Sha256};

use super::options::{Alpha, DataOptions};
use super::{Found, frames, jpeg};

/// Files longer than this are not read.
const MAX_FILE: u64 = 1 << 30;
/// Images wider or higher than this are not decoded.
const MAX_DECODED_SIDE: u32 = 32_768;
/// An image that takes more memory than this is not decoded.
const MAX_DECODED_BYTES: u64 = 512 << 20;

/// Samples as stored, row by row, the channels of a pixel together.
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

    /// Memory that the samples take.
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

    /// The image in [-1, 1] with `channels` channels; see [`write_unit`].
    pub fn write_unit(&self, channels: usize, out: &mut [f32]) {
        match &self.samples {
            Samples::U8(data) => write_unit(data, self.channels, channels, out),
            Samples::U16(data) => write_unit(data, self.channels, channels, out),
        }
    }
}

/// What was noticed on the way from a file to its [`Pixels`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Facts {
    /// The form of the file; `images` is 1.
    pub file: Found,
    /// The file has colour channels, every pixel is grey.
    pub grey_in_colour: bool,
    /// There is an alpha channel that is opaque everywhere.
    pub opaque_alpha: bool,
    /// Transparency was laid on a colour.
    pub composited: bool,
    /// The file says that the camera was turned.
    pub turned: bool,
    /// The file holds further pages or frames, which are not read.
    pub more_frames: bool,
}

/// u8 or u16.
pub(super) trait Sample: Copy + PartialEq {
    const MAX: u32;
    fn wide(self) -> u32;
    /// From a number not above `MAX`.
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

/// Writes samples with `own` channels as numbers in [-1, 1] with `wanted` channels: grey is repeated for colour,
/// alpha is dropped or added as opaque.
pub(super) fn write_unit<T: Sample>(data: &[T], own: usize, wanted: usize, out: &mut [f32]) {
    let unit = |v: T| v.wide() as f32 / T::MAX as f32 * 2.0 - 1.0;
    if own == wanted {
        assert_eq!(data.len(), out.len());
        out.iter_mut().zip(data).for_each(|(o, &v)| *o = unit(v));
        return;
    }
    assert_eq!(data.len() / own * wanted, out.len());
    for (pixel, out) in data.chunks_exact(own).zip(out.chunks_exact_mut(wanted)) {
        let colours = if wanted >= 3 { 3 } else { 1 };
        for c in 0..colours {
            out[c] = unit(pixel[if own >= 3 { c } else { 0 }]);
        }
        if wanted > colours {
            out[colours] = if own.is_multiple_of(2) { unit(pixel[own - 1]) } else { 1.0 };
        }
    }
}

/// Decodes a file's `bytes`. What is left to do to bring it to the channels asked for is to repeat grey as colour and
/// to add an opaque alpha channel, for which the other images must be known.
///
/// The error is the reason, for a person.
pub(super) fn decode(bytes: &[u8], options: &DataOptions) -> Result<(Pixels, Facts), String> {
    // Decoders are tested on hostile files, yet one that panics must not take a whole run down.
    catch_unwind(AssertUnwindSafe(|| decode_reduced(bytes, options)))
        .unwrap_or_else(|_| Err("the decoder failed on it; it is probably damaged".into()))
}

/// The content of the file at `path`, which is not empty.
pub(super) fn read_capped(path: &Path) -> Result<Vec<u8>, String> {
    let text = |e: std::io::Error| format!("cannot be read: {e}");
    // Asked before opening: opening a named pipe would wait for ever.
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

fn decode_reduced(bytes: &[u8], options: &DataOptions) -> Result<(Pixels, Facts), String> {
    let (image, turned) = decode_upright(bytes)?;
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
        _ => return Err("has floating-point pixels; save it with 8 or 16 bits a sample".into()),
    };
    let (pixels, facts) = reduced(Pixels { height, width, channels, samples }, options);
    Ok((pixels, Facts { turned, more_frames: frames::count(bytes) > 1, ..facts }))
}

/// Drops channels that say nothing and those that were not asked for.
pub(super) fn reduced(pixels: Pixels, options: &DataOptions) -> (Pixels, Facts) {
    let Pixels { height, width, channels: stored, samples } = pixels;
    let bits = if matches!(samples, Samples::U8(_)) { 8 } else { 16 };
    let mut facts = Facts {
        file: Found { height, width, channels: stored, bits, images: 1 },
        grey_in_colour: false,
        opaque_alpha: false,
        composited: false,
        turned: false,
        more_frames: false,
    };
    let (channels, samples) = match samples {
        Samples::U8(data) => {
            let (channels, data) = reduce(data, stored, options, &mut facts);
            (channels, Samples::U8(data))
        }
        Samples::U16(data) => {
            let (channels, data) = reduce(data, stored, options, &mut facts);
            (channels, Samples::U16(data))
        }
    };
    (Pixels { height, width, channels, samples }, facts)
}

/// Decodes under limits and turns the image as its EXIF orientation says; the flag tells whether that did anything.
fn decode_upright(bytes: &[u8]) -> Result<(DynamicImage, bool), String> {
    // By content: a wrong extension is common and harmless.
    let format = image::guess_format(bytes)
        .map_err(|_| "is not an image: its content is of no known image format".to_owned())?;
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
    // A broken EXIF block is no reason to refuse the image.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(reason)?;
    image.apply_orientation(orientation);
    Ok((image, orientation != Orientation::NoTransforms))
}

fn reason(e: ImageError) -> String {
    match e {
        ImageError::Limits(_) => format!(
            "is too large: over {MAX_DECODED_SIDE} pixels a side or {} MiB decoded",
            MAX_DECODED_BYTES >> 20
        ),
        ImageError::Unsupported(e) => format!("is of a form that is not supported: {e}"),
        e => format!("is damaged or cut off: {e}"),
    }
}

/// The channels that are left, and their samples; notes in `facts` what was done.
fn reduce<T: Sample>(
    mut data: Vec<T>,
    stored: usize,
    options: &DataOptions,
    facts: &mut Facts,
) -> (usize, Vec<T>) {
    let asked = options.channels;
    let mut channels = stored;
    if channels.is_multiple_of(2) {
        let kept = match asked {
            Some(2 | 4) => true,
            Some(_) => false,
            None => options.alpha == Some(Alpha::Keep),
        };
        facts.opaque_alpha = data.chunks_exact(channels).all(|p| p[channels - 1].wide() == T::MAX);
        if facts.opaque_alpha {
            data =
                map_pixels(&data, channels, channels - 1, |p, out| out.copy_from_slice(&p[..channels - 1]));
            channels -= 1;
        } else if !kept {
            facts.composited = true;
            let max = u64::from(T::MAX);
            let ground = if options.alpha == Some(Alpha::White) { max } else { 0 };
            data = map_pixels(&data, channels, channels - 1, |p, out| {
                let alpha = u64::from(p[channels - 1].wide());
                for (o, v) in out.iter_mut().zip(p) {
                    let mixed = u64::from(v.wide()) * alpha + ground * (max - alpha);
                    *o = T::narrow((mixed + max / 2) / max);
                }
            });
            channels -= 1;
        }
    }
    if channels >= 3 {
        facts.grey_in_colour = data.chunks_exact(channels).all(|p| p[0] == p[1] && p[1] == p[2]);
        if facts.grey_in_colour || matches!(asked, Some(1 | 2)) {
            // Of three equal samples the luma is that sample.
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

/// ITU-R 601-2 luma in Pillow's fixed point (`convert('L')`): the weights are of 65536 and sum to it.
fn luma<T: Sample>(r: T, g: T, b: T) -> T {
    let [r, g, b] = [r, g, b].map(|v| u64::from(v.wide()));
    T::narrow((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16)
}

#[cfg(test)]
mod tests {
    use super::super::resize::resize_and_crop;
    use super::super::resize::tests::{GOLDEN, sample};
    use super::*;
    use image::codecs::png::PngEncoder;
    use image::{ExtendedColorType, ImageBuffer, ImageEncoder, Luma, Rgb, RgbImage, Rgba};

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn asked(channels: usize) -> DataOptions {
        DataOptions { channels: Some(channels), ..DataOptions::default() }
    }

    fn colours(height: u32, width: u32) -> DynamicImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x * 20) as u8, (y * 20) as u8, 90])).into()
    }

    fn u8s(pixels: &Pixels) -> &[u8] {
        match &pixels.samples {
            Samples::U8(data) => data,
            Samples::U16(_) => panic!("16 bits"),
        }
    }

    #[test]
    fn every_byte_and_word_becomes_the_number_of_the_formula() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut out = vec![0.0; 256];
        write_unit(&bytes, 1, 1, &mut out);
        assert!(out.iter().zip(0..=255u8).all(|(o, v)| *o == f32::from(v) / 255.0 * 2.0 - 1.0));
        assert_eq!((out[0], out[255]), (-1.0, 1.0));
        let mut deep = vec![0.0; 256];
        write_unit(&bytes.iter().map(|&v| u16::from(v) * 257).collect::<Vec<_>>(), 1, 1, &mut deep);
        assert_eq!(out, deep, "a byte repeated is the same brightness");
        write_unit(&[40_000u16], 1, 1, &mut deep[..1]);
        assert_eq!(deep[0], 40_000.0 / 65_535.0 * 2.0 - 1.0);
    }

    #[test]
    fn grey_is_repeated_and_alpha_added_or_kept() {
        let mut out = [9.0; 4];
        write_unit(&[255u8], 1, 3, &mut out[..3]);
        assert_eq!(out[..3], [1.0; 3]);
        write_unit(&[0u8], 1, 4, &mut out);
        assert_eq!(out, [-1.0, -1.0, -1.0, 1.0]);
        write_unit(&[255u8, 0], 2, 4, &mut out);
        assert_eq!(out, [1.0, 1.0, 1.0, -1.0]);
        write_unit(&[0u8, 255, 0], 3, 4, &mut out);
        assert_eq!(out, [-1.0, 1.0, -1.0, 1.0]);
        write_unit(&[255u8], 1, 2, &mut out[..2]);
        assert_eq!(out[..2], [1.0; 2]);
    }

    #[test]
    fn every_format_is_decoded() {
        use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
        let image = colours(6, 9);
        for format in [Png, Bmp, Tiff, WebP, Gif, Jpeg] {
            let source = if format == Gif { image.to_rgba8().into() } else { image.clone() };
            let (pixels, facts) = decode(&encoded(&source, format), &DataOptions::default()).unwrap();
            assert_eq!((pixels.height, pixels.width, pixels.channels), (6, 9, 3), "{format:?}");
            assert!(!facts.grey_in_colour && !facts.composited && !facts.turned);
            let tolerance = if format == Jpeg { 30 } else { 0 };
            let worst = u8s(&pixels).iter().zip(image.as_bytes()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(worst.unwrap() <= tolerance, "{format:?}: {worst:?}");
        }
    }

    #[test]
    fn colour_files_with_grey_pixels_are_grey() {
        let image = RgbImage::from_fn(3, 2, |x, y| Rgb([(x + 3 * y) as u8; 3]));
        let (pixels, facts) =
            decode(&encoded(&image.into(), ImageFormat::Png), &DataOptions::default()).unwrap();
        assert!(facts.grey_in_colour);
        assert_eq!((pixels.channels, facts.file.channels), (1, 3));
        assert_eq!(u8s(&pixels), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn an_opaque_alpha_channel_is_dropped_and_a_real_one_laid_on_black_or_kept() {
        let image = |alpha: u8| {
            let all =
                ImageBuffer::from_fn(2, 1, |x, _| Rgba([200, 100, 50, if x == 0 { 255 } else { alpha }]));
            encoded(&DynamicImage::ImageRgba8(all), ImageFormat::Png)
        };
        let (pixels, facts) = decode(&image(255), &DataOptions::default()).unwrap();
        assert!(facts.opaque_alpha && !facts.composited);
        assert_eq!(u8s(&pixels), [200, 100, 50, 200, 100, 50]);
        let (pixels, facts) = decode(&image(51), &DataOptions::default()).unwrap();
        assert!(facts.composited && !facts.opaque_alpha);
        assert_eq!(u8s(&pixels), [200, 100, 50, 40, 20, 10]);
        let (pixels, facts) = decode(&image(51), &asked(4)).unwrap();
        assert!(!facts.composited);
        assert_eq!(u8s(&pixels), [200, 100, 50, 255, 200, 100, 50, 51]);
        // Grey with alpha: luma of the colour, alpha as it is.
        let (pixels, _) = decode(&image(51), &asked(2)).unwrap();
        assert_eq!(u8s(&pixels), [124, 255, 124, 51]);
        let (pixels, _) = decode(&image(51), &asked(1)).unwrap();
        assert_eq!(u8s(&pixels), [124, 25]);
    }

    #[test]
    fn grey_from_colour_is_pillows_luma() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let expected: Vec<u8> =
            golden["luma"]["samples"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u8).collect();
        let data = sample(6, 9, 3, 255, 0).into_iter().map(|v| v as u8).collect();
        let (pixels, facts) =
            reduced(Pixels { height: 6, width: 9, channels: 3, samples: Samples::U8(data) }, &asked(1));
        assert_eq!(u8s(&pixels), expected);
        assert!(!facts.grey_in_colour);
        assert_eq!(luma(65_535u16, 65_535, 65_535), 65_535);
    }

    #[test]
    fn sixteen_bits_stay_sixteen() {
        let words = [0u16, 1, 300, 65_535];
        let image = ImageBuffer::<Luma<u16>, _>::from_raw(2, 2, words.to_vec()).unwrap();
        let bytes = encoded(&DynamicImage::ImageLuma16(image), ImageFormat::Png);
        let (pixels, facts) = decode(&bytes, &DataOptions::default()).unwrap();
        assert_eq!(pixels.samples, Samples::U16(words.to_vec()));
        assert_eq!((pixels.bits(), facts.file.bits, pixels.bytes()), (16, 16, 8));
        // Resizing keeps what 8 bits could not hold.
        let pixels = resize_and_crop(pixels, 1, 1).unwrap();
        // The mean is 16459; 8 bits have 16448 and 16705.
        assert!(matches!(&pixels.samples, Samples::U16(mean) if mean[0].abs_diff(16_459) <= 1), "{pixels:?}");
    }

    #[test]
    fn a_turned_camera_gives_an_upright_image() {
        let image = colours(2, 3);
        // A TIFF header and one entry: tag 0x0112 (orientation), a short, 6: turn by 90 degrees clockwise.
        let mut exif = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0".to_vec();
        exif.extend([0; 4]);
        let mut bytes = Vec::new();
        let mut encoder = PngEncoder::new(&mut bytes);
        encoder.set_exif_metadata(exif).unwrap();
        encoder.write_image(image.as_bytes(), 3, 2, ExtendedColorType::Rgb8).unwrap();
        let (pixels, facts) = decode(&bytes, &DataOptions::default()).unwrap();
        assert!(facts.turned);
        assert_eq!((pixels.height, pixels.width, facts.file.height, facts.file.width), (3, 2, 3, 2));
        assert_eq!(u8s(&pixels), image.rotate90().as_bytes());
    }

    #[test]
    fn cut_off_files_of_every_format_are_refused() {
        use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
        let image: DynamicImage =
            RgbImage::from_fn(40, 40, |x, y| Rgb([(x * y * 7) as u8, (x * 91) as u8, y as u8])).into();
        for format in [Png, Bmp, Tiff, WebP, Gif, Jpeg] {
            let source = if format == Gif { image.to_rgba8().into() } else { image.clone() };
            let bytes = encoded(&source, format);
            for kept in [3, 12, bytes.len() / 3, bytes.len() * 2 / 3] {
                let result = decode(&bytes[..kept], &DataOptions::default());
                assert!(result.is_err(), "{format:?} of {} bytes after {kept}", bytes.len());
            }
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_the_reason() {
        let refused = |bytes: &[u8]| decode(bytes, &DataOptions::default()).unwrap_err();
        assert!(refused(b"dear diary").contains("is not an image"));
        let float = ImageBuffer::from_pixel(2, 2, Rgb([0.5f32, 0.5, 0.5]));
        let float = encoded(&DynamicImage::ImageRgb32F(float), ImageFormat::Tiff);
        assert!(refused(&float).contains("floating-point"));
        // Twenty pixels that say they are 60000 x 60000 or 30000 x 30000; the checksum of the header is mended.
        for side in [60_000u32, 30_000] {
            let mut bomb = encoded(&colours(4, 5), ImageFormat::Png);
            bomb[16..20].copy_from_slice(&side.to_be_bytes());
            bomb[20..24].copy_from_slice(&side.to_be_bytes());
            let mut crc = flate2::Crc::new();
            crc.update(&bomb[12..29]);
            bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
            let reason = refused(&bomb);
            assert!(reason.contains("too large"), "{side}: {reason}");
        }
        // A JPEG's header has its sides after the marker of the frame; a BMP's are at fixed places.
        let mut jpeg = encoded(&colours(4, 5), ImageFormat::Jpeg);
        let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xEA, 0x60, 0xEA, 0x60]);
        assert!(refused(&jpeg).contains("too large"));
        let mut bmp = encoded(&colours(4, 5), ImageFormat::Bmp);
        bmp[18..22].copy_from_slice(&60_000u32.to_le_bytes());
        bmp[22..26].copy_from_slice(&60_000u32.to_le_bytes());
        assert!(refused(&bmp).contains("too large"));
    }

    #[test]
    fn files_that_cannot_be_read_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let reason = |path: &Path| read_capped(path).unwrap_err();
        std::fs::write(folder.path().join("b.png"), b"").unwrap();
        assert_eq!(reason(&folder.path().join("b.png")), "is empty");
        assert!(reason(folder.path()).contains("not a regular file"));
        assert!(reason(&folder.path().join("gone.png")).contains("cannot be read"));
    }

    #[test]
    fn one_pixel_is_a_image() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Bmp] {
            let (pixels, _) = decode(&encoded(&colours(1, 1), format), &DataOptions::default()).unwrap();
            assert_eq!((pixels.height, pixels.width, pixels.channels), (1, 1, 3), "{format:?}");
            let large = resize_and_crop(pixels.clone(), 16, 12).unwrap();
            assert!(u8s(&large).chunks(3).all(|p| p == u8s(&pixels)), "{format:?}");
        }
    }

    #[test]
    fn of_an_animated_gif_the_first_frame_is_taken() {
        let frame = |value: u8| {
            image::Frame::new(ImageBuffer::from_fn(5, 4, |x, _| Rgba([value, (x * 40) as u8, 7, 255])))
        };
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
        encoder.encode_frames([frame(30), frame(200), frame(90)]).unwrap();
        drop(encoder);
        let (pixels, facts) = decode(&bytes, &DataOptions::default()).unwrap();
        assert_eq!((pixels.height, pixels.width, facts.file.images), (4, 5, 1));
        assert!(u8s(&pixels).chunks(3).enumerate().all(|(i, p)| p == [30, (i % 5 * 40) as u8, 7]));
    }

    #[test]
    fn print_colours_become_screen_colours_as_by_pillow() {
        // Made by tools/golden/resize.py; Photoshop's files are inverted, which Pillow's encoder does too.
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let numbers = |key: &str| -> Vec<u8> {
            golden["cmyk"][key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u8).collect()
        };
        let (pixels, facts) = decode(&numbers("jpeg"), &DataOptions::default()).unwrap();
        assert_eq!((pixels.height, pixels.width, pixels.channels), (8, 8, 3));
        assert_eq!((facts.file.channels, facts.file.bits), (3, 8));
        // Decoders round the cosine transform by up to a step, which is rounded once more.
        let worst = u8s(&pixels).iter().zip(numbers("rgb")).map(|(a, b)| a.abs_diff(b)).max().unwrap();
        assert!(worst <= 3, "{worst}");
    }

    #[test]
    fn transparency_is_laid_on_white_or_kept_without_a_number_of_channels() {
        let all = ImageBuffer::from_fn(2, 1, |x, _| Rgba([200, 100, 50, if x == 0 { 255 } else { 51 }]));
        let bytes = encoded(&DynamicImage::ImageRgba8(all), ImageFormat::Png);
        let with = |alpha| DataOptions { alpha: Some(alpha), ..DataOptions::default() };
        let (pixels, facts) = decode(&bytes, &with(Alpha::White)).unwrap();
        assert!(facts.composited);
        // 255 + 0.2 (v - 255)
        assert_eq!(u8s(&pixels), [200, 100, 50, 244, 224, 214]);
        let (pixels, facts) = decode(&bytes, &with(Alpha::Keep)).unwrap();
        assert!(!facts.composited);
        assert_eq!(u8s(&pixels), [200, 100, 50, 255, 200, 100, 50, 51]);
    }

    #[test]
    fn the_extension_does_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        std::fs::write(&path, encoded(&colours(2, 2), ImageFormat::Png)).unwrap();
        let bytes = read_capped(&path).unwrap();
        assert_eq!(decode(&bytes, &DataOptions::default()).unwrap().0.channels, 3);
    }
}
