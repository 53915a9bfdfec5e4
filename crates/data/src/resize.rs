//! Resizing, cropping and mirroring of images.
//!
//! The filter is bilinear (triangle) with antialiasing, as in Pillow's `Image.resize` and torchvision's
//! `Resize(antialias=True)`; transparent images are resized with premultiplied alpha, as in Pillow, but in 16 bits:
//! Pillow's 8 bits lose up to two steps of colour.

use fast_image_resize::images::TypedImage;
use fast_image_resize::pixels::{Pixel, PixelComponent};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};

use super::decode::{Pixels, Samples};

/// Maximum number of samples of an image between resizing and cropping; only extremely thin images exceed it.
const MAX_INTERMEDIATE: usize = 1 << 28;

/// Resizes `pixels` to just cover `height` x `width`, then center crops.
pub(super) fn resize_and_crop(pixels: Pixels, height: usize, width: usize) -> Result<Pixels, String> {
    let (h, w) = covering(pixels.height, pixels.width, height, width);
    Ok(center_crop(resize(pixels, h, w)?, height, width))
}

/// Resizes the short side of `pixels` to `side`, keeping the aspect ratio: torchvision's `Resize(side)`.
pub(super) fn short_side(pixels: Pixels, side: usize) -> Result<Pixels, String> {
    let (h, w) = covering(pixels.height, pixels.width, side, side);
    resize(pixels, h, w)
}

/// The size with the aspect ratio of `h` x `w` that just covers `height` x `width`, rounded down as in torchvision.
pub(super) fn covering(h: usize, w: usize, height: usize, width: usize) -> (usize, usize) {
    let by_height = height as u128 * w as u128;
    let by_width = width as u128 * h as u128;
    if by_height >= by_width {
        (height, (by_height / h as u128) as usize)
    } else {
        ((by_width / w as u128) as usize, width)
    }
}

/// Offset of a center crop that removes `spare` pixels: half of them, ties to even, as in torchvision's `center_crop`.
fn center_offset(spare: usize) -> usize {
    let half = spare / 2;
    half + (spare & 1) * (half & 1)
}

/// Crops the center of `pixels`, which must be at least as large.
pub(super) fn center_crop(pixels: Pixels, height: usize, width: usize) -> Pixels {
    if (pixels.height, pixels.width) == (height, width) {
        return pixels;
    }
    crop(&pixels, center_offset(pixels.height - height), center_offset(pixels.width - width), height, width)
}

/// Crops `rows` x `columns` of `pixels`, starting at (`top`, `left`).
pub(super) fn crop(pixels: &Pixels, top: usize, left: usize, rows: usize, columns: usize) -> Pixels {
    fn cut<T: Copy>(data: &[T], stride: usize, top: usize, rows: usize, left: usize, row: usize) -> Vec<T> {
        data.chunks_exact(stride)
            .skip(top)
            .take(rows)
            .flat_map(|line| &line[left..left + row])
            .copied()
            .collect()
    }
    let c = pixels.channels;
    let samples = match &pixels.samples {
        Samples::U8(data) => Samples::U8(cut(data, pixels.width * c, top, rows, left * c, columns * c)),
        Samples::U16(data) => Samples::U16(cut(data, pixels.width * c, top, rows, left * c, columns * c)),
    };
    Pixels { height: rows, width: columns, channels: c, samples }
}

/// Mirrors `pixels` left to right.
pub(super) fn flip(pixels: &Pixels) -> Pixels {
    fn mirror<T: Copy>(data: &[T], stride: usize, channels: usize) -> Vec<T> {
        data.chunks_exact(stride)
            .flat_map(|line| line.chunks_exact(channels).rev())
            .flatten()
            .copied()
            .collect()
    }
    let stride = pixels.width * pixels.channels;
    let samples = match &pixels.samples {
        Samples::U8(data) => Samples::U8(mirror(data, stride, pixels.channels)),
        Samples::U16(data) => Samples::U16(mirror(data, stride, pixels.channels)),
    };
    Pixels { samples, ..*pixels }
}

/// Resizes `pixels` to `height` x `width`, ignoring the aspect ratio: torchvision's `Resize((height, width))`.
pub(super) fn resize(pixels: Pixels, height: usize, width: usize) -> Result<Pixels, String> {
    if (pixels.height, pixels.width) == (height, width) {
        return Ok(pixels);
    }
    if height
        .checked_mul(width)
        .and_then(|n| n.checked_mul(pixels.channels))
        .is_none_or(|n| n > MAX_INTERMEDIATE)
    {
        return Err(format!(
            "at {}x{} it is too long and thin to resize ({height}x{width} before the crop)",
            pixels.height, pixels.width
        ));
    }
    filtered(pixels, height, width)
}

fn filtered(pixels: Pixels, height: usize, width: usize) -> Result<Pixels, String> {
    let (from, to, channels) = ((pixels.height, pixels.width), (height, width), pixels.channels);
    let samples = match (pixels.samples, channels) {
        (Samples::U8(data), 2 | 4) => {
            let samples = Samples::U16(data.into_iter().map(|v| u16::from(v) * 257).collect());
            match filtered(Pixels { samples, ..pixels }, height, width)?.samples {
                Samples::U16(data) => {
                    Samples::U8(data.into_iter().map(|v| ((u32::from(v) + 128) / 257) as u8).collect())
                }
                samples => samples,
            }
        }
        (Samples::U8(data), 1) => Samples::U8(packed::<u8, u8, 1>(&data, from, to, |p| p[0], |v| [v])?),
        (Samples::U8(data), _) => Samples::U8(packed::<[u8; 3], u8, 3>(&data, from, to, |p| p, |v| v)?),
        (Samples::U16(data), 1) => Samples::U16(packed::<u16, u16, 1>(&data, from, to, |p| p[0], |v| [v])?),
        (Samples::U16(data), 2) => Samples::U16(packed::<[u16; 2], u16, 2>(&data, from, to, |p| p, |v| v)?),
        (Samples::U16(data), 3) => Samples::U16(packed::<[u16; 3], u16, 3>(&data, from, to, |p| p, |v| v)?),
        (Samples::U16(data), _) => Samples::U16(packed::<[u16; 4], u16, 4>(&data, from, to, |p| p, |v| v)?),
    };
    Ok(Pixels { height, width, channels, samples })
}

/// Resizes `data` with `N` samples per pixel.
fn packed<T, C, const N: usize>(
    data: &[C],
    from: (usize, usize),
    to: (usize, usize),
    pack: fn([C; N]) -> T,
    unpack: fn(T) -> [C; N],
) -> Result<Vec<C>, String>
where
    T: Copy + PartialEq + Default + 'static,
    C: PixelComponent,
    Pixel<T, C, N>: PixelTrait,
{
    let side = |n: usize| u32::try_from(n).map_err(|_| "it is too large to resize".to_owned());
    let (h, w, height, width) = (side(from.0)?, side(from.1)?, side(to.0)?, side(to.1)?);
    let (pixels, _) = data.as_chunks::<N>();
    let source = pixels.iter().map(|&p| Pixel::new(pack(p))).collect();
    let source = TypedImage::from_pixels(w, h, source).map_err(|e| e.to_string())?;
    let mut resized = TypedImage::<Pixel<T, C, N>>::new(width, height);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    Resizer::new().resize_typed(&source, &mut resized, &options).map_err(|e| e.to_string())?;
    Ok(resized.pixels().iter().flat_map(|p| unpack(p.0)).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Made by `tools/golden/resize.py`.
    pub(crate) const GOLDEN: &str = include_str!("../tests/golden/resize.json");

    /// The same function as in `tools/golden/resize.py`.
    pub(crate) fn sample(height: usize, width: usize, channels: usize, top: u32, low: u32) -> Vec<u32> {
        let mut out = Vec::new();
        for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
            for c in 0..channels {
                let scramble = ((y * 7919 + x * 104_729 + c * 1_299_709 + x * y * 31) % 1009) as f64 / 1008.0;
                let edge = if (x + 2 * y) % 11 < 5 { 1.0 } else { 0.0 };
                let value = 0.4 * scramble + 0.3 * (x as f64 / width as f64) + 0.3 * edge;
                out.push(low + (value * f64::from(top - low)).floor() as u32);
            }
        }
        out
    }

    fn usizes(value: &serde_json::Value) -> Vec<usize> {
        value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
    }

    #[test]
    fn resizing_agrees_with_torchvision() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let cases = golden["resize"].as_array().unwrap();
        assert_eq!(cases.len(), 8);
        for case in cases {
            let (from, to) = (usizes(&case["from_size"]), usizes(&case["size"]));
            let channels = case["channels"].as_u64().unwrap() as usize;
            let low = if channels.is_multiple_of(2) { 120 } else { 0 };
            let (samples, tolerance) = match case["bits"].as_u64().unwrap() {
                8 => {
                    let data = sample(from[0], from[1], channels, 255, low);
                    (Samples::U8(data.into_iter().map(|v| v as u8).collect()), 1)
                }
                _ => {
                    let data = sample(from[0], from[1], channels, 65_535, 0);
                    (Samples::U16(data.into_iter().map(|v| v as u16).collect()), 4)
                }
            };
            let pixels = Pixels { height: from[0], width: from[1], channels, samples };
            let made = resize_and_crop(pixels, to[0], to[1]).unwrap();
            assert_eq!((made.height, made.width, made.channels), (to[0], to[1], channels));
            let made: Vec<usize> = match made.samples {
                Samples::U8(data) => data.into_iter().map(usize::from).collect(),
                Samples::U16(data) => data.into_iter().map(usize::from).collect(),
            };
            let expected = usizes(&case["samples"]);
            assert_eq!(made.len(), expected.len());
            let worst = made.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert!(worst <= tolerance, "{from:?} {channels} -> {to:?}: {worst}");
        }
    }

    /// One step of 8 bits: rounding differs from Pillow's only for ties.
    const STEP: usize = 1;

    #[test]
    fn crop_and_flip_pipelines_agree_with_torchvision() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        let cases = golden["steps"].as_array().unwrap();
        assert_eq!(cases.len(), 7);
        for case in cases {
            let (from, n) = (usizes(&case["from_size"]), usizes(&case["numbers"]));
            let data = sample(from[0], from[1], 3, 255, 0).into_iter().map(|v| v as u8).collect();
            let pixels = Pixels { height: from[0], width: from[1], channels: 3, samples: Samples::U8(data) };
            let (kind, tolerance) = (case["kind"].as_str().unwrap(), STEP);
            let (made, tolerance) = match kind {
                "exact" => (resize(pixels, n[0], n[1]).unwrap(), tolerance),
                "side" => (center_crop(short_side(pixels, n[0]).unwrap(), n[1], n[2]), tolerance),
                "crop" => (resize(crop(&pixels, n[0], n[1], n[2], n[3]), n[4], n[5]).unwrap(), tolerance),
                _ => (flip(&pixels), 0),
            };
            let Samples::U8(made) = made.samples else { panic!("16 bits") };
            let expected = usizes(&case["samples"]);
            assert_eq!(made.len(), expected.len());
            let worst = made.iter().zip(&expected).map(|(&a, &b)| usize::from(a).abs_diff(b)).max().unwrap();
            assert!(worst <= tolerance, "{kind} {from:?} {n:?}: {worst}");
        }
    }

    #[test]
    fn center_crop_matches_torchvision() {
        // Python's round(spare / 2).
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(center_offset), [0, 0, 1, 2, 2, 2, 3, 4]);
        assert_eq!(covering(100, 300, 32, 32), (32, 96));
        assert_eq!(covering(300, 101, 32, 32), (95, 32));
        assert_eq!(covering(10, 10, 20, 30), (30, 30));
    }

    #[test]
    fn the_right_size_is_unchanged_and_extremely_thin_images_are_rejected() {
        let pixels = |height, width| Pixels {
            height,
            width,
            channels: 1,
            samples: Samples::U8((0..height * width).map(|v| v as u8).collect()),
        };
        assert_eq!(resize_and_crop(pixels(5, 7), 5, 7).unwrap(), pixels(5, 7));
        assert_eq!(short_side(pixels(5, 7), 5).unwrap(), pixels(5, 7));
        assert!(resize_and_crop(pixels(1, 30_000), 512, 512).unwrap_err().contains("too long and thin"));
    }

    #[test]
    fn crops_and_flips_move_whole_pixels() {
        let samples = Samples::U16((0..2 * 3 * 2).collect());
        let pixels = Pixels { height: 2, width: 3, channels: 2, samples };
        let flipped = flip(&pixels);
        assert_eq!(flipped.samples, Samples::U16(vec![4, 5, 2, 3, 0, 1, 10, 11, 8, 9, 6, 7]));
        assert_eq!(flip(&flipped), pixels);
        let cut = crop(&pixels, 1, 1, 1, 2);
        assert_eq!((cut.height, cut.width), (1, 2));
        assert_eq!(cut.samples, Samples::U16(vec![8, 9, 10, 11]));
        assert_eq!(center_crop(pixels.clone(), 2, 1).samples, Samples::U16(vec![2, 3, 8, 9]));
    }
}
