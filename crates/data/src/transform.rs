//! From a decoded image to the network's input: resizing, crops and flips.
//!
//! The deterministic part yields the *base* image, which a data set keeps in memory; the random part is applied to the
//! base on every read.

use std::borrow::Cow;

use super::decode::Pixels;
use super::options::{DataOptions, Resize};
use super::order::AugmentKey;
use super::resize::{center_crop, covering, crop, flip, resize, resize_and_crop, short_side};

/// Minimum and maximum aspect ratio (width / height) of a random crop; torchvision's default.
const ASPECT: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// Attempts to sample a random crop that fits into the image; torchvision's value.
const ATTEMPTS: usize = 10;

/// The transforms applied to every image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Transform {
    size: Option<(usize, usize)>,
    resize: Resize,
    side: Option<usize>,
    crop_scale: Option<[f64; 2]>,
    flip: bool,
}

impl Transform {
    pub fn new(options: &DataOptions) -> Self {
        Self {
            size: options.size,
            resize: options.resize,
            side: options.resize_side,
            crop_scale: options.random_crop_scale,
            flip: options.horizontal_flip,
        }
    }

    /// Whether the base has the size of the network's input, rather than being cropped on every read.
    pub fn is_final(&self) -> bool {
        self.crop_scale.is_none()
    }

    /// Human-readable description of the random transforms.
    pub fn random_parts(&self) -> Option<String> {
        let crops = self.crop_scale.map(|[low, high]| {
            format!("a random crop of {:.0} to {:.0} % of the area", low * 100.0, high * 100.0)
        });
        let parts: Vec<_> = crops.into_iter().chain(self.flip.then(|| "a random flip".to_owned())).collect();
        (!parts.is_empty()).then(|| parts.join(" and "))
    }

    /// Applies the deterministic transforms.
    pub fn base(&self, pixels: Pixels) -> Result<Pixels, String> {
        let Some((height, width)) = self.size else { return Ok(pixels) };
        match (self.resize, self.side, self.is_final()) {
            (Resize::Exact, ..) => resize(pixels, height, width),
            (Resize::ShortSide, None, true) => resize_and_crop(pixels, height, width),
            (Resize::ShortSide, None, false) => Ok(pixels),
            (Resize::ShortSide, Some(side), true) => {
                Ok(center_crop(short_side(pixels, side)?, height, width))
            }
            (Resize::ShortSide, Some(side), false) => short_side(pixels, side),
        }
    }

    /// Applies the random transforms for image `index` to `base`; the result is `height` x `width`.
    pub fn augment<'a>(
        &self,
        base: &'a Pixels,
        (height, width): (usize, usize),
        key: AugmentKey,
        index: usize,
    ) -> Result<Cow<'a, Pixels>, String> {
        let mut pixels = Cow::Borrowed(base);
        let mut uniforms = key.stream(index).uniforms();
        // Sampled first, so that it does not depend on the number of crop attempts.
        let mirrored = uniforms.next().is_some_and(|u| u < 0.5);
        if let Some(scale) = self.crop_scale {
            let (top, left, rows, columns) = random_crop(base.height, base.width, scale, &mut uniforms);
            pixels = Cow::Owned(resize(crop(base, top, left, rows, columns), height, width)?);
        }
        if self.flip && mirrored {
            pixels = Cow::Owned(flip(&pixels));
        }
        Ok(pixels)
    }
}

/// Whether resizing enlarges an image of `height` x `width`.
pub(super) fn enlarges(height: usize, width: usize, options: &DataOptions) -> bool {
    options.size.is_some_and(|(h, w)| match options.resize {
        Resize::Exact => h > height || w > width,
        Resize::ShortSide => match options.resize_side {
            Some(side) => side > height.min(width),
            None => covering(height, width, h, w).0 > height,
        },
    })
}

/// Samples a crop with an area fraction between `low` and `high`: top, left, rows and columns, as in torchvision's
/// `RandomResizedCrop.get_params`.
fn random_crop(
    height: usize,
    width: usize,
    [low, high]: [f64; 2],
    uniforms: &mut impl Iterator<Item = f64>,
) -> (usize, usize, usize, usize) {
    let mut between = |low: f64, high: f64| low + (high - low) * uniforms.next().unwrap_or(0.5);
    let area = (height * width) as f64;
    let logs = ASPECT.map(libm::log);
    for _ in 0..ATTEMPTS {
        let (part, aspect) = (area * between(low, high), libm::exp(between(logs[0], logs[1])));
        let columns = (part * aspect).sqrt().round_ties_even() as usize;
        let rows = (part / aspect).sqrt().round_ties_even() as usize;
        if (1..=height).contains(&rows) && (1..=width).contains(&columns) {
            let mut start = |spare: usize| (between(0.0, (spare + 1) as f64) as usize).min(spare);
            let (top, left) = (start(height - rows), start(width - columns));
            return (top, left, rows, columns);
        }
    }
    // Fallback: the largest center crop with an allowed aspect ratio.
    let aspect = width as f64 / height as f64;
    let (rows, columns) = if aspect < ASPECT[0] {
        ((width as f64 / ASPECT[0]).round_ties_even() as usize, width)
    } else if aspect > ASPECT[1] {
        (height, (height as f64 * ASPECT[1]).round_ties_even() as usize)
    } else {
        (height, width)
    };
    let (rows, columns) = (rows.clamp(1, height), columns.clamp(1, width));
    ((height - rows) / 2, (width - columns) / 2, rows, columns)
}

#[cfg(test)]
mod tests {
    use super::super::decode::Samples;
    use super::*;

    fn image(height: usize, width: usize) -> Pixels {
        let data = (0..height * width).map(|v| (v * 37 % 251) as u8).collect();
        Pixels { height, width, channels: 1, samples: Samples::U8(data) }
    }

    fn options() -> DataOptions {
        DataOptions { size: Some((8, 8)), ..DataOptions::default() }
    }

    fn uniforms(seed: u64) -> impl Iterator<Item = f64> {
        AugmentKey { seed, epoch: 0 }.stream(0).uniforms()
    }

    #[test]
    fn the_base_has_the_size_of_the_pipeline() {
        let size = |options: &DataOptions, height, width| {
            let base = Transform::new(options).base(image(height, width)).unwrap();
            (base.height, base.width)
        };
        assert_eq!(size(&DataOptions::default(), 20, 33), (20, 33));
        assert_eq!(size(&options(), 20, 33), (8, 8));
        assert_eq!(size(&DataOptions { resize: Resize::Exact, ..options() }, 20, 33), (8, 8));
        assert_eq!(size(&DataOptions { resize_side: Some(10), ..options() }, 20, 33), (8, 8));
        let crops = DataOptions { random_crop_scale: Some([0.8, 1.0]), ..options() };
        assert_eq!(size(&crops, 20, 33), (20, 33));
        assert_eq!(size(&DataOptions { resize_side: Some(10), ..crops.clone() }, 20, 33), (10, 16));
        assert_eq!(size(&DataOptions { resize: Resize::Exact, ..crops }, 20, 33), (8, 8));
        assert_eq!(size(&options(), 1, 1), (8, 8));
    }

    #[test]
    fn random_crops_fit_and_have_the_requested_areas_and_aspects() {
        for (height, width) in [(40, 60), (300, 200), (64, 64), (1, 1), (1, 50), (50, 1), (3, 2)] {
            for seed in 0..200 {
                let (top, left, rows, columns) = random_crop(height, width, [0.25, 0.5], &mut uniforms(seed));
                assert!(rows >= 1 && top + rows <= height, "{height}x{width}");
                assert!(columns >= 1 && left + columns <= width, "{height}x{width}");
                if height.min(width) >= 40 {
                    // Rounding changes each side by at most one half.
                    let part = (rows * columns) as f64 / (height * width) as f64;
                    assert!((0.23..0.52).contains(&part), "{part}");
                    assert!((0.7..1.43).contains(&(columns as f64 / rows as f64)), "{rows}x{columns}");
                }
            }
        }
    }

    #[test]
    fn random_crops_are_spread_over_the_image() {
        let n = 2000;
        let (mut tops, mut samples, mut area) = ([0; 4], 0, 0.0);
        for seed in 0..n {
            let (top, _, rows, columns) = random_crop(100, 100, [0.25, 1.0], &mut uniforms(seed));
            area += (rows * columns) as f64 / 1e4 / n as f64;
            if rows <= 80 {
                samples += 1;
                tops[top * 4 / (101 - rows)] += 1;
            }
        }
        // The expectation is a quarter each; the tolerance is four standard errors.
        let error = 4.0 * (0.25 * 0.75 / f64::from(samples)).sqrt();
        for n in tops {
            assert!((f64::from(n) / f64::from(samples) - 0.25).abs() < error, "{tops:?}");
        }
        // Large areas fit less often, so the mean is below the middle of the range, 0.625.
        assert!((0.5..0.625).contains(&area), "{area}");
    }

    #[test]
    fn augmentation_is_a_function_of_seed_epoch_and_image() {
        let options = DataOptions { random_crop_scale: Some([0.3, 1.0]), horizontal_flip: true, ..options() };
        let transform = Transform::new(&options);
        let base = image(20, 20);
        let read = |seed, epoch, index| {
            transform.augment(&base, (8, 8), AugmentKey { seed, epoch }, index).unwrap().into_owned()
        };
        assert_eq!(read(1, 2, 3), read(1, 2, 3));
        for other in [read(2, 2, 3), read(1, 3, 3), read(1, 2, 4)] {
            assert_ne!(read(1, 2, 3), other);
        }
    }

    #[test]
    fn half_of_the_images_are_flipped() {
        let transform = Transform::new(&DataOptions { horizontal_flip: true, ..options() });
        let base = image(8, 8);
        let mirrored = flip(&base);
        let n = 1000;
        let flipped = (0..n)
            .filter(|&index| {
                let augmented = transform.augment(&base, (8, 8), AugmentKey::default(), index).unwrap();
                assert!(*augmented == base || *augmented == mirrored);
                *augmented == mirrored
            })
            .count();
        // Four standard deviations of 16.
        assert!(flipped.abs_diff(n / 2) < 64, "{flipped}");
        // Off by default.
        let plain = Transform::new(&options());
        assert!((0..50).all(|i| *plain.augment(&base, (8, 8), AugmentKey::default(), i).unwrap() == base));
    }

    #[test]
    fn enlarging_is_detected() {
        let side = DataOptions { resize_side: Some(10), ..options() };
        let exact = DataOptions { resize: Resize::Exact, ..options() };
        for (height, width, options, expected) in [
            (8, 8, &options(), false),
            (8, 7, &options(), true),
            (100, 7, &options(), true),
            (9, 9, &side, true),
            (10, 12, &side, false),
            (7, 100, &exact, true),
            (1, 1, &DataOptions::default(), false),
        ] {
            assert_eq!(enlarges(height, width, options), expected, "{height}x{width} {options:?}");
        }
    }
}
