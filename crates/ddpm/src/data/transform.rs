//! From a decoded image to the one that the network sees: resizing, crops and flips.
//!
//! The part that is the same at each reading makes the *base*, which is what a set keeps in memory; the random part
//! is drawn from the base at each reading.

use std::borrow::Cow;

use super::decode::Pixels;
use super::options::{DataOptions, Resize};
use super::order::Draw;
use super::resize::{covering, crop, crop_middle, flip, resize, resize_and_crop, short_side};

/// Least and greatest width of a random crop, in heights; torchvision's default.
const ASPECT: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// How often a random crop is drawn that must fit into the image.
const ATTEMPTS: usize = 10;

/// What is done to every image.
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

    /// Whether a base has the size that the network sees, rather than being cropped at each reading.
    pub fn is_final(&self) -> bool {
        self.crop_scale.is_none()
    }

    /// What happens at each reading, for a person.
    pub fn random_parts(&self) -> Option<String> {
        let crops = self.crop_scale.map(|[low, high]| {
            format!("a random crop of {:.0} to {:.0} % of the area", low * 100.0, high * 100.0)
        });
        let parts: Vec<_> = crops.into_iter().chain(self.flip.then(|| "a random flip".to_owned())).collect();
        (!parts.is_empty()).then(|| parts.join(" and "))
    }

    /// What is the same at each reading.
    pub fn base(&self, pixels: Pixels) -> Result<Pixels, String> {
        let Some((height, width)) = self.size else { return Ok(pixels) };
        match (self.resize, self.side, self.is_final()) {
            (Resize::Exact, ..) => resize(pixels, height, width),
            (Resize::ShortSide, None, true) => resize_and_crop(pixels, height, width),
            (Resize::ShortSide, None, false) => Ok(pixels),
            (Resize::ShortSide, Some(side), true) => {
                Ok(crop_middle(short_side(pixels, side)?, height, width))
            }
            (Resize::ShortSide, Some(side), false) => short_side(pixels, side),
        }
    }

    /// `base` at `height` x `width` with what is random drawn for this reading of image `index`.
    pub fn draw<'a>(
        &self,
        base: &'a Pixels,
        (height, width): (usize, usize),
        draw: Draw,
        index: usize,
    ) -> Result<Cow<'a, Pixels>, String> {
        let mut pixels = Cow::Borrowed(base);
        let mut uniforms = draw.stream(index).uniforms();
        // Drawn first, so that it does not depend on how many crops were tried.
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

/// The size that an image of `height` x `width` must not fall short of lest it be enlarged.
pub(super) fn enlarges(height: usize, width: usize, options: &DataOptions) -> bool {
    options.size.is_some_and(|(h, w)| match options.resize {
        Resize::Exact => h > height || w > width,
        Resize::ShortSide => match options.resize_side {
            Some(side) => side > height.min(width),
            None => covering(height, width, h, w).0 > height,
        },
    })
}

/// Top, left, rows and columns of a crop of a part of the area drawn from `scale`, as torchvision's
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
    // The largest of a fitting aspect, from the middle.
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
        Draw { seed, epoch: 0 }.stream(0).uniforms()
    }

    #[test]
    fn the_base_has_the_size_that_the_pipeline_says() {
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
    fn random_crops_fit_and_have_the_areas_and_aspects_asked_for() {
        for (height, width) in [(40, 60), (300, 200), (64, 64), (1, 1), (1, 50), (50, 1), (3, 2)] {
            for seed in 0..200 {
                let (top, left, rows, columns) = random_crop(height, width, [0.25, 0.5], &mut uniforms(seed));
                assert!(rows >= 1 && top + rows <= height, "{height}x{width}");
                assert!(columns >= 1 && left + columns <= width, "{height}x{width}");
                if height.min(width) >= 40 {
                    // Rounding moves each side by at most a half.
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
        let (mut tops, mut whole, mut area) = ([0; 4], 0, 0.0);
        for seed in 0..n {
            let (top, _, rows, columns) = random_crop(100, 100, [0.25, 1.0], &mut uniforms(seed));
            area += (rows * columns) as f64 / 1e4 / n as f64;
            if rows <= 80 {
                whole += 1;
                tops[top * 4 / (101 - rows)] += 1;
            }
        }
        // A quarter each; four standard errors.
        let error = 4.0 * (0.25 * 0.75 / f64::from(whole)).sqrt();
        for n in tops {
            assert!((f64::from(n) / f64::from(whole) - 0.25).abs() < error, "{tops:?}");
        }
        // Large areas fit less often, so the mean is below the middle of the range, 0.625.
        assert!((0.5..0.625).contains(&area), "{area}");
    }

    #[test]
    fn a_reading_is_a_function_of_seed_epoch_and_image() {
        let asked = DataOptions { random_crop_scale: Some([0.3, 1.0]), horizontal_flip: true, ..options() };
        let transform = Transform::new(&asked);
        let base = image(20, 20);
        let read = |seed, epoch, index| {
            transform.draw(&base, (8, 8), Draw { seed, epoch }, index).unwrap().into_owned()
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
                let drawn = transform.draw(&base, (8, 8), Draw::default(), index).unwrap();
                assert!(*drawn == base || *drawn == mirrored);
                *drawn == mirrored
            })
            .count();
        // Four standard errors of 16.
        assert!(flipped.abs_diff(n / 2) < 64, "{flipped}");
        // Without being asked nothing is.
        let plain = Transform::new(&options());
        assert!((0..50).all(|i| *plain.draw(&base, (8, 8), Draw::default(), i).unwrap() == base));
    }

    #[test]
    fn enlarging_is_noticed() {
        let side = DataOptions { resize_side: Some(10), ..options() };
        let exact = DataOptions { resize: Resize::Exact, ..options() };
        for (height, width, asked, expected) in [
            (8, 8, &options(), false),
            (8, 7, &options(), true),
            (100, 7, &options(), true),
            (9, 9, &side, true),
            (10, 12, &side, false),
            (7, 100, &exact, true),
            (1, 1, &DataOptions::default(), false),
        ] {
            assert_eq!(enlarges(height, width, asked), expected, "{height}x{width} {asked:?}");
        }
    }
}
