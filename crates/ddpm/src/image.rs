//! 8-bit images: grids, PNG and GIF.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::data::ImageShape;
use crate::error::{Error, Result};
use crate::text::capped;

/// The marker in PNGs, GIFs and weights.
pub(crate) const SOFTWARE: &str = concat!("ddpm ", env!("CARGO_PKG_VERSION"));

/// An image of 8-bit samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1: grey, 2: grey and alpha, 3: RGB, 4: RGBA.
    pub channels: usize,
    /// Samples in row-major order, channels last.
    pub data: Vec<u8>,
}

impl Image {
    /// An image of zeros: black, and transparent if it has alpha.
    pub fn black(shape: ImageShape) -> Self {
        let ImageShape { height, width, channels } = shape;
        Self { height, width, channels, data: vec![0; shape.num_elements()] }
    }

    /// Converts values in [-1, 1] (height, width, channels) to 8 bits: `(x + 1) / 2 * 255 + 0.5`, clamped and truncated like
    /// torchvision's `save_image`. NaN becomes 0.
    ///
    /// # Panics
    /// If the length of `values` does not match `shape`.
    pub fn from_unit(values: &[f32], shape: ImageShape) -> Self {
        assert_eq!(values.len(), shape.num_elements(), "{shape} does not match {} values", values.len());
        let data = values.iter().map(|x| ((x + 1.0) / 2.0 * 255.0 + 0.5).clamp(0.0, 255.0) as u8).collect();
        Self { height: shape.height, width: shape.width, channels: shape.channels, data }
    }

    /// Height, width and channels.
    pub fn shape(&self) -> ImageShape {
        ImageShape { height: self.height, width: self.width, channels: self.channels }
    }

    /// Writes the image as a PNG with its channels, atomically.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; [`Error::Data`] for an image without pixels, or a name of another image format.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let format = image::ImageFormat::from_path(path).unwrap_or(image::ImageFormat::Png);
        if format != image::ImageFormat::Png {
            let reason = "images are written as PNG; give a name that ends in .png".to_owned();
            return Err(Error::Data { path: path.to_owned(), reason });
        }
        write_atomically(path, &png(self, path)?)
    }

    /// Enlarges by repeating every pixel `factor` x `factor` times.
    ///
    /// # Panics
    /// If `factor` is 0.
    pub fn enlarge(&self, factor: usize) -> Self {
        assert!(factor > 0, "an image cannot be enlarged by 0");
        let mut data = Vec::with_capacity(self.data.len() * factor * factor);
        for row in self.data.chunks_exact((self.width * self.channels).max(1)) {
            let start = data.len();
            for pixel in row.chunks_exact(self.channels) {
                data.extend(pixel.iter().cycle().take(factor * self.channels));
            }
            let end = data.len();
            for _ in 1..factor {
                data.extend_from_within(start..end);
            }
        }
        Self { height: self.height * factor, width: self.width * factor, channels: self.channels, data }
    }

    /// Copies `other` with its upper left corner at (`top`, `left`).
    pub(crate) fn paste(&mut self, other: &Image, top: usize, left: usize) {
        let row = other.width * other.channels;
        for (y, line) in other.data.chunks_exact(row.max(1)).enumerate() {
            let start = ((top + y) * self.width + left) * self.channels;
            self.data[start..start + row].copy_from_slice(line);
        }
    }
}

/// Lays out images in rows of `per_row` with `padding` black pixels around and between them, like torchvision's `make_grid`;
/// as there, a single image is returned unchanged. Grey stays grey, while torchvision converts it to RGB.
///
/// # Panics
/// If there are no images or their shapes differ.
pub fn grid(images: &[Image], per_row: usize, padding: usize) -> Image {
    let shape = images.first().expect("a grid needs an image").shape();
    assert!(images.iter().all(|p| p.shape() == shape), "the images of a grid have one shape");
    if let [image] = images {
        return image.clone();
    }
    let columns = per_row.clamp(1, images.len());
    let rows = images.len().div_ceil(columns);
    let (height, width) = (shape.height + padding, shape.width + padding);
    let mut canvas = Image::black(ImageShape {
        height: rows * height + padding,
        width: columns * width + padding,
        channels: shape.channels,
    });
    for (i, image) in images.iter().enumerate() {
        canvas.paste(image, i / columns * height + padding, i % columns * width + padding);
    }
    canvas
}

/// Encodes an image as PNG with its channels; `path` is for error messages.
pub(crate) fn png(image: &Image, path: &Path) -> Result<Vec<u8>> {
    use png::ColorType::{Grayscale, GrayscaleAlpha, Rgb, Rgba};
    check(image, path)?;
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width as u32, image.height as u32);
    encoder.set_color(match image.channels {
        1 => Grayscale,
        2 => GrayscaleAlpha,
        3 => Rgb,
        _ => Rgba,
    });
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let written = encoder
        .add_text_chunk("Software".to_owned(), SOFTWARE.to_owned())
        .and_then(|()| encoder.write_header())
        .and_then(|mut writer| writer.write_image_data(&image.data).and_then(|()| writer.finish()));
    written.map_err(|e| encoding(path, e))?;
    Ok(bytes)
}

/// Reads an image with 8 bits per sample, as written by [`Image::save`], with its channels.
///
/// # Errors
/// [`Error::Data`] for a file that is missing, damaged, or in another pixel format.
pub fn read_png(path: &Path) -> Result<Image> {
    use image::ColorType::{L8, La8, Rgb8, Rgba8};
    let invalid = |reason: String| Error::Data { path: path.to_owned(), reason };
    let read = image::open(path).map_err(|e| invalid(format!("cannot be read as an image: {e}")))?;
    let (height, width) = (read.height() as usize, read.width() as usize);
    let channels = match read.color() {
        L8 => 1,
        La8 => 2,
        Rgb8 => 3,
        Rgba8 => 4,
        other => {
            return Err(invalid(format!("has the pixel format {other:?}; 8 bits per sample are required")));
        }
    };
    Ok(Image { height, width, channels, data: read.into_bytes() })
}

/// Writes `frames` as a looping GIF, each shown for `delay_ms` and the last for `last_ms` milliseconds (rounded down
/// to hundredths of a second, at least two, as viewers slow down shorter delays). Greys are exact, colours are
/// reduced to 256 per frame, transparency is composited on black.
///
/// # Errors
/// [`Error::Io`] with the path; [`Error::Data`] without frames, or for frames of different shapes or too large for GIF.
pub fn save_gif(frames: &[Image], delay_ms: u16, last_ms: u16, path: &Path) -> Result<()> {
    let invalid = |reason: String| Error::Data { path: path.to_owned(), reason };
    let first = frames.first().ok_or_else(|| invalid("a GIF needs a frame".into()))?;
    if let Some(other) = frames.iter().find(|f| f.shape() != first.shape()) {
        return Err(invalid(format!(
            "the frames of a GIF must have one shape, not {} and {}",
            first.shape(),
            other.shape()
        )));
    }
    check(first, path)?;
    let (Ok(width), Ok(height)) = (u16::try_from(first.width), u16::try_from(first.height)) else {
        return Err(invalid(format!(
            "{} is too large for a GIF (at most 65535 pixels per side)",
            first.shape()
        )));
    };
    let greys: Vec<u8> = (0..=255).flat_map(|v| [v; 3]).collect();
    let palette = if first.channels <= 2 { &greys[..] } else { &[] };
    // The palette is computed from every pixel of small images, and from every tenth of large ones.
    let sampling = (first.height * first.width / 20_000).clamp(1, 10) as i32;
    let mut bytes = Vec::new();
    let mut encoder = gif::Encoder::new(&mut bytes, width, height, palette).map_err(|e| encoding(path, e))?;
    encoder.set_repeat(gif::Repeat::Infinite).map_err(|e| encoding(path, e))?;
    let comment = encoder.write_raw_extension(gif::Extension::Comment.into(), &[SOFTWARE.as_bytes()]);
    comment.map_err(|e| encoding(path, e))?;
    for (i, image) in frames.iter().enumerate() {
        let data = on_black(image);
        let mut frame = match image.channels {
            1 | 2 => gif::Frame::from_indexed_pixels(width, height, data, None),
            _ => gif::Frame::from_rgb_speed(width, height, &data, sampling),
        };
        let ms = if i + 1 == frames.len() { last_ms } else { delay_ms };
        frame.delay = (ms / 10).max(2);
        encoder.write_frame(&frame).map_err(|e| encoding(path, e))?;
    }
    drop(encoder);
    write_atomically(path, &bytes)
}

/// The samples composited on black, without alpha.
fn on_black(image: &Image) -> Vec<u8> {
    let channels = image.channels;
    if channels % 2 == 1 {
        return image.data.clone();
    }
    let composite = |pixel: &[u8]| {
        let alpha = u32::from(pixel[channels - 1]);
        pixel[..channels - 1].iter().map(|&v| ((u32::from(v) * alpha + 127) / 255) as u8).collect::<Vec<_>>()
    };
    image.data.chunks_exact(channels).flat_map(composite).collect()
}

fn check(image: &Image, path: &Path) -> Result<()> {
    let shape = image.shape();
    let valid = image.data.len() == shape.num_elements() && !image.data.is_empty() && shape.channels <= 4;
    if valid && u32::try_from(shape.height).is_ok() && u32::try_from(shape.width).is_ok() {
        return Ok(());
    }
    let reason = format!("an image of {shape} with {} samples cannot be written", image.data.len());
    Err(Error::Data { path: path.to_owned(), reason })
}

fn encoding(path: &Path, e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::io(path, "encode the image")(std::io::Error::other(e))
}

/// Writes to a temporary sibling of `path`, then renames it.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| Error::Data { path: path.to_owned(), reason: "is not a file name".into() })?;
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    // The name may have the maximum length, and the suffix needs room.
    let name = name.to_string_lossy();
    let temporary = format!(".{}.{}-{number}.tmp", capped(&name, 100), std::process::id());
    let temporary = path.with_file_name(temporary);
    let done = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    done.map_err(|e| {
        // Best effort: report the first error.
        let _ = fs::remove_file(&temporary);
        Error::io(path, "write the image")(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(height: usize, width: usize, channels: usize, first: u8) -> Image {
        let data = (0..height * width * channels).map(|i| first.wrapping_add((i * 37) as u8)).collect();
        Image { height, width, channels, data }
    }

    #[test]
    fn values_convert_to_bytes_as_in_torchvision_and_bytes_round_trip() {
        let shape = |width| ImageShape { height: 1, width, channels: 1 };
        let unit: Vec<f32> = (0..=255u8).map(|v| f32::from(v) / 255.0 * 2.0 - 1.0).collect();
        assert_eq!(Image::from_unit(&unit, shape(256)).data, (0..=255).collect::<Vec<u8>>());
        let odd = [-7.0, 7.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
        assert_eq!(Image::from_unit(&odd, shape(6)).data, [0, 255, 0, 255, 0, 128]);
    }

    #[test]
    fn grids_agree_with_torchvision() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../data/tests/golden/resize.json")).unwrap();
        let cases = golden["grid"].as_array().unwrap();
        assert_eq!(cases.len(), 3);
        for case in cases {
            let number = |key: &str| case[key].as_u64().unwrap() as usize;
            let list = |key: &str| case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap());
            let values: Vec<f32> = list("values").map(|v| v as f32).collect();
            let shape = ImageShape { height: 3, width: 4, channels: 1 };
            let images: Vec<_> = values.chunks(12).map(|v| Image::from_unit(v, shape)).collect();
            assert_eq!(images.len(), number("images"));
            let made = grid(&images, number("per_row"), number("padding"));
            assert_eq!((made.height, made.width), (number("height"), number("width")));
            assert_eq!(made.data, list("samples").map(|v| v as u8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_colour_grid_has_each_image_in_its_cell() {
        let images: Vec<_> = (0..5).map(|i| image(2, 3, 3, i * 50)).collect();
        let made = grid(&images, 2, 1);
        // Three rows of two: 3 * (2 + 1) + 1 by 2 * (3 + 1) + 1.
        assert_eq!((made.height, made.width, made.channels), (10, 9, 3));
        let pixel = |y: usize, x: usize| &made.data[(y * 9 + x) * 3..][..3];
        assert_eq!(pixel(7, 1), &images[4].data[..3]);
        assert_eq!(pixel(5, 7), &images[3].data[15..18]);
        assert_eq!(pixel(7, 5), [0; 3], "the sixth cell is empty");
        assert_eq!(pixel(3, 4), [0; 3], "padding");
    }

    #[test]
    fn enlarging_repeats_pixels() {
        let small = Image { height: 2, width: 2, channels: 3, data: (0..12).collect() };
        let large = small.enlarge(3);
        assert_eq!((large.height, large.width), (6, 6));
        for (y, x, c) in (0..6).flat_map(|y| (0..6).flat_map(move |x| (0..3).map(move |c| (y, x, c)))) {
            assert_eq!(large.data[(y * 6 + x) * 3 + c], small.data[(y / 3 * 2 + x / 3) * 3 + c]);
        }
        assert_eq!(small.enlarge(1), small);
    }

    #[test]
    fn pngs_round_trip_and_leave_no_temporary_files() {
        use image::ColorType::{L8, La8, Rgb8, Rgba8};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for (channels, colour) in [(1, L8), (2, La8), (3, Rgb8), (4, Rgba8)] {
            let image = image(5, 7, channels, 3);
            image.save(&path).unwrap();
            let read = image::open(&path).unwrap();
            assert_eq!((read.color(), read.width(), read.height()), (colour, 7, 5));
            assert_eq!(read.as_bytes(), image.data);
            assert_eq!(read_png(&path).unwrap(), image);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = image(5, 7, 1, 3).save(folder.path().join("a.jpg")).unwrap_err().to_string();
        assert!(error.contains("a.jpg: images are written as PNG"), "{error}");
    }

    #[test]
    fn write_errors_name_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("missing").join("a.png");
        let e = image(2, 2, 1, 0).save(&nowhere).unwrap_err();
        assert!(matches!(&e, Error::Io { path, .. } if *path == nowhere), "{e}");
        // A folder blocks the path: the temporary file must be removed.
        let taken = folder.path().join("b.png");
        fs::create_dir(&taken).unwrap();
        assert!(image(2, 2, 1, 0).save(&taken).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let broken = Image { data: vec![0; 3], ..image(2, 2, 1, 0) };
        assert!(matches!(broken.save(&nowhere), Err(Error::Data { .. })));
    }

    /// The frames of a GIF as RGBA, with their delays in hundredths of a second, and its repeat count.
    fn read_gif(path: &Path) -> (Vec<(Vec<u8>, u16)>, gif::Repeat) {
        let mut options = gif::DecodeOptions::new();
        options.set_color_output(gif::ColorOutput::RGBA);
        let mut decoder = options.read_info(fs::File::open(path).unwrap()).unwrap();
        let mut frames = Vec::new();
        while let Some(frame) = decoder.read_next_frame().unwrap() {
            frames.push((frame.buffer.to_vec(), frame.delay));
        }
        (frames, decoder.repeat())
    }

    #[test]
    fn a_grey_gif_is_exact_loops_and_holds_its_last_frame() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gif");
        let all = Image { height: 16, width: 16, channels: 1, data: (0..=255).collect() };
        let frames = [all.clone(), image(16, 16, 1, 9), all];
        save_gif(&frames, 50, 1500, &path).unwrap();
        let (read, repeat) = read_gif(&path);
        assert_eq!(repeat, gif::Repeat::Infinite);
        assert_eq!(read.iter().map(|f| f.1).collect::<Vec<_>>(), [5, 5, 150]);
        for ((data, _), frame) in read.iter().zip(&frames) {
            assert_eq!(*data, frame.data.iter().flat_map(|&v| [v, v, v, 255]).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_colour_gif_is_exact_up_to_256_colours_and_close_beyond() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gif");
        for (side, tolerance) in [(12, 0), (40, 32)] {
            let data = (0..side * side).flat_map(|i| [i % side * 6, i / side * 6, (i % side + i / side) * 3]);
            let data = data.map(|v| v as u8);
            let frame = Image { height: side, width: side, channels: 3, data: data.collect() };
            save_gif(&[frame.clone(), frame.clone()], 5, 5, &path).unwrap();
            let (read, _) = read_gif(&path);
            assert_eq!(read[0].1, 2, "the shortest delay that viewers honour");
            for (made, wanted) in read[1].0.chunks(4).zip(frame.data.chunks(3)) {
                assert!((0..3).all(|c| made[c].abs_diff(wanted[c]) <= tolerance), "{made:?} {wanted:?}");
            }
        }
    }

    #[test]
    fn a_gif_composites_transparency_on_black() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gif");
        save_gif(&[Image { height: 1, width: 2, channels: 2, data: vec![200, 255, 200, 51] }], 50, 50, &path)
            .unwrap();
        assert_eq!(read_gif(&path).0[0].0, [200, 200, 200, 255, 40, 40, 40, 255]);
    }

    #[test]
    fn no_frames_or_frames_of_different_shapes_are_rejected() {
        let path = Path::new("never-written.gif");
        assert!(matches!(save_gif(&[], 50, 50, path), Err(Error::Data { .. })));
        let frames = [image(2, 2, 1, 0), image(2, 3, 1, 0)];
        assert!(save_gif(&frames, 50, 50, path).unwrap_err().to_string().contains("2x2 grey and 2x3 grey"));
        assert!(!path.exists());
    }
}
