//! Files of every format, complete and truncated, and channel conversions.

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

fn with_channels(channels: usize) -> DataOptions {
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
fn samples_map_to_minus_one_to_one() {
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
        let (pixels, info) = decode(&encoded(&source, format), &DataOptions::default()).unwrap();
        assert_eq!((pixels.height, pixels.width, pixels.channels), (6, 9, 3), "{format:?}");
        assert!(!info.grey_in_colour && !info.composited && !info.reoriented);
        let tolerance = if format == Jpeg { 30 } else { 0 };
        let worst = u8s(&pixels).iter().zip(image.as_bytes()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst.unwrap() <= tolerance, "{format:?}: {worst:?}");
    }
}

#[test]
fn colour_files_with_grey_pixels_are_grey() {
    let image = RgbImage::from_fn(3, 2, |x, y| Rgb([(x + 3 * y) as u8; 3]));
    let (pixels, info) = decode(&encoded(&image.into(), ImageFormat::Png), &DataOptions::default()).unwrap();
    assert!(info.grey_in_colour);
    assert_eq!((pixels.channels, info.file.channels), (1, 3));
    assert_eq!(u8s(&pixels), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn opaque_alpha_is_dropped_and_transparency_composited_on_black_or_kept() {
    let image = |alpha: u8| {
        let all = ImageBuffer::from_fn(2, 1, |x, _| Rgba([200, 100, 50, if x == 0 { 255 } else { alpha }]));
        encoded(&DynamicImage::ImageRgba8(all), ImageFormat::Png)
    };
    let (pixels, info) = decode(&image(255), &DataOptions::default()).unwrap();
    assert!(info.opaque_alpha && !info.composited);
    assert_eq!(u8s(&pixels), [200, 100, 50, 200, 100, 50]);
    let (pixels, info) = decode(&image(51), &DataOptions::default()).unwrap();
    assert!(info.composited && !info.opaque_alpha);
    assert_eq!(u8s(&pixels), [200, 100, 50, 40, 20, 10]);
    let (pixels, info) = decode(&image(51), &with_channels(4)).unwrap();
    assert!(!info.composited);
    assert_eq!(u8s(&pixels), [200, 100, 50, 255, 200, 100, 50, 51]);
    // Grey with alpha: luma of the colour, alpha unchanged.
    let (pixels, _) = decode(&image(51), &with_channels(2)).unwrap();
    assert_eq!(u8s(&pixels), [124, 255, 124, 51]);
    let (pixels, _) = decode(&image(51), &with_channels(1)).unwrap();
    assert_eq!(u8s(&pixels), [124, 25]);
}

#[test]
fn grey_from_colour_matches_pillows_luma() {
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    let expected: Vec<u8> =
        golden["luma"]["samples"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u8).collect();
    let data = sample(6, 9, 3, 255, 0).into_iter().map(|v| v as u8).collect();
    let (pixels, info) =
        reduced(Pixels { height: 6, width: 9, channels: 3, samples: Samples::U8(data) }, &with_channels(1));
    assert_eq!(u8s(&pixels), expected);
    assert!(!info.grey_in_colour);
    assert_eq!(luma(65_535u16, 65_535, 65_535), 65_535);
}

#[test]
fn sixteen_bits_stay_sixteen() {
    let words = [0u16, 1, 300, 65_535];
    let image = ImageBuffer::<Luma<u16>, _>::from_raw(2, 2, words.to_vec()).unwrap();
    let bytes = encoded(&DynamicImage::ImageLuma16(image), ImageFormat::Png);
    let (pixels, info) = decode(&bytes, &DataOptions::default()).unwrap();
    assert_eq!(pixels.samples, Samples::U16(words.to_vec()));
    assert_eq!((pixels.bits(), info.file.bits, pixels.bytes()), (16, 16, 8));
    let pixels = resize_and_crop(pixels, 1, 1).unwrap();
    // The mean is 16459; the nearest values of 8 bits are 16448 and 16705.
    assert!(matches!(&pixels.samples, Samples::U16(mean) if mean[0].abs_diff(16_459) <= 1), "{pixels:?}");
}

#[test]
fn the_exif_orientation_is_applied() {
    let image = colours(2, 3);
    // A TIFF header and one entry: tag 0x0112 (orientation), a short, 6: turn by 90 degrees clockwise.
    let mut exif = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0".to_vec();
    exif.extend([0; 4]);
    let mut bytes = Vec::new();
    let mut encoder = PngEncoder::new(&mut bytes);
    encoder.set_exif_metadata(exif).unwrap();
    encoder.write_image(image.as_bytes(), 3, 2, ExtendedColorType::Rgb8).unwrap();
    let (pixels, info) = decode(&bytes, &DataOptions::default()).unwrap();
    assert!(info.reoriented);
    assert_eq!((pixels.height, pixels.width, info.file.height, info.file.width), (3, 2, 3, 2));
    assert_eq!(u8s(&pixels), image.rotate90().as_bytes());
}

#[test]
fn truncated_files_of_every_format_are_rejected() {
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
fn a_jpeg_without_end_marker_is_decoded_like_one_with_it() {
    let golden: std::collections::BTreeMap<String, String> =
        serde_json::from_str(include_str!("../../tests/golden/jpeg.json")).unwrap();
    for (name, hex) in golden {
        let byte = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
        let complete: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        let (expected, _) = decode(&complete, &DataOptions::default()).unwrap();
        for tail in [&b""[..], b"\n", b"\r\n", &[0; 300], b"saved by the camera of 1999\n"] {
            let bytes = [&complete[..complete.len() - 2], tail].concat();
            let (pixels, _) = decode(&bytes, &DataOptions::default()).unwrap();
            assert!(pixels == expected, "{name} and {tail:?}");
            // The same tails after two thirds of the file.
            let cut = [&complete[..complete.len() * 2 / 3], tail].concat();
            let reason = decode(&cut, &DataOptions::default()).unwrap_err();
            assert!(
                reason.contains("cut off") || reason.contains("damaged"),
                "{name} and {tail:?}: {reason}"
            );
        }
    }
}

#[test]
fn non_images_are_rejected_with_the_reason() {
    let refused = |bytes: &[u8]| decode(bytes, &DataOptions::default()).unwrap_err();
    assert!(refused(b"dear diary").contains("is not an image"));
    let float = ImageBuffer::from_pixel(2, 2, Rgb([0.5f32, 0.5, 0.5]));
    let float = encoded(&DynamicImage::ImageRgb32F(float), ImageFormat::Tiff);
    assert!(refused(&float).contains("floating-point"));
    // Twenty pixels declared as 60000 x 60000 or 30000 x 30000; the header checksum is fixed up.
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
    // A JPEG's size is in its frame header; a BMP's is at a fixed offset.
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
fn unreadable_files_are_rejected_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let reason = |path: &Path| read_capped(path).unwrap_err();
    std::fs::write(folder.path().join("b.png"), b"").unwrap();
    assert_eq!(reason(&folder.path().join("b.png")), "is empty");
    assert!(reason(folder.path()).contains("not a regular file"));
    assert!(reason(&folder.path().join("gone.png")).contains("cannot be read"));
}

#[test]
fn a_single_pixel_is_an_image() {
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Bmp] {
        let (pixels, _) = decode(&encoded(&colours(1, 1), format), &DataOptions::default()).unwrap();
        assert_eq!((pixels.height, pixels.width, pixels.channels), (1, 1, 3), "{format:?}");
        let large = resize_and_crop(pixels.clone(), 16, 12).unwrap();
        assert!(u8s(&large).chunks(3).all(|p| p == u8s(&pixels)), "{format:?}");
    }
}

#[test]
fn the_first_frame_of_an_animated_gif_is_read() {
    let frame = |value: u8| {
        image::Frame::new(ImageBuffer::from_fn(5, 4, |x, _| Rgba([value, (x * 40) as u8, 7, 255])))
    };
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
    encoder.encode_frames([frame(30), frame(200), frame(90)]).unwrap();
    drop(encoder);
    let (pixels, info) = decode(&bytes, &DataOptions::default()).unwrap();
    assert_eq!((pixels.height, pixels.width, info.file.images), (4, 5, 1));
    assert!(u8s(&pixels).chunks(3).enumerate().all(|(i, p)| p == [30, (i % 5 * 40) as u8, 7]));
}

#[test]
fn cmyk_is_converted_like_pillow() {
    // Made by tools/golden/resize.py; Photoshop inverts CMYK, and so does Pillow's encoder.
    let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
    let bytes = |key: &str| -> Vec<u8> {
        golden["cmyk"][key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u8).collect()
    };
    let (pixels, info) = decode(&bytes("jpeg"), &DataOptions::default()).unwrap();
    assert_eq!((pixels.height, pixels.width, pixels.channels), (8, 8, 3));
    assert_eq!((info.file.channels, info.file.bits), (3, 8));
    // Decoders may differ by one step in the cosine transform, and the conversion rounds again.
    let worst = u8s(&pixels).iter().zip(bytes("rgb")).map(|(a, b)| a.abs_diff(b)).max().unwrap();
    assert!(worst <= 3, "{worst}");
}

#[test]
fn transparency_is_composited_on_white_or_kept_without_a_channel_count() {
    let all = ImageBuffer::from_fn(2, 1, |x, _| Rgba([200, 100, 50, if x == 0 { 255 } else { 51 }]));
    let bytes = encoded(&DynamicImage::ImageRgba8(all), ImageFormat::Png);
    let with = |alpha| DataOptions { alpha: Some(alpha), ..DataOptions::default() };
    let (pixels, info) = decode(&bytes, &with(Alpha::White)).unwrap();
    assert!(info.composited);
    // 255 + 0.2 (v - 255)
    assert_eq!(u8s(&pixels), [200, 100, 50, 244, 224, 214]);
    let (pixels, info) = decode(&bytes, &with(Alpha::Keep)).unwrap();
    assert!(!info.composited);
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
