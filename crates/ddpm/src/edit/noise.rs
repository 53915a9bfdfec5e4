//! How much noise there is in an image, and how sure that is.

use crate::data::PictureShape;
use std::f64::consts::SQRT_2;

/// The median of the size of a standard normal value, and its lower quartile.
const MEDIAN: f64 = 0.674_489_750_196_082;
const QUARTILE: f64 = 0.318_639_363_964_375;

/// Black and white.
const ENDS: [f64; 2] = [-1.0, 1.0];

/// Three of the steps of 8 bits, in [-1, 1]: below, few values are left whose spread could be looked at.
const COARSE: f64 = 3.0 / 127.5;

/// An impulse is further than this from what is around it, a quarter of the range, and than normal noise goes; what agrees
/// is nearer than this.
const FAR: f64 = 0.5;
const AGREE: f64 = 0.1;

/// Fewer pixels that stand out may be stars, or dust.
const FEWEST: usize = 3;

/// An estimate of the noise in an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Its standard deviation as a part of the range from black to white; 0 where none is found.
    pub sigma: f64,
    /// The standard error of `sigma`, of as many values as there are.
    pub error: f64,
    /// Whether what was measured is no noise: its sizes are too much alike, or neighbours go together, as in a pattern.
    pub pattern: bool,
    /// How many pixels stand out from all around them, as those of impulse noise do (salt and pepper), which `sigma`
    /// says nothing of; 0 where they are so few that they may be anything.
    pub impulses: usize,
}

/// Sizes of details, and what is known of them.
struct Details {
    deviation: f64,
    /// How many they are, counting those more that tell less.
    count: f64,
    pattern: bool,
}

/// The standard deviation of the noise in an image, in [-1, 1]. Alpha is not looked at.
///
/// That of independent normal noise in all pixels, from the median of the finest diagonal wavelet coefficients (Haar's), in
/// which images have little besides noise (Donoho, Johnstone, "Ideal Spatial Adaptation by Wavelet Shrinkage", 1994,
/// section 4.2): `median |d| / 0.6745` over blocks of four pixels `a b / c d` with `d = (a - b - c + d) / 2`. Its standard
/// error is `1.17 / sqrt(n)` of it. Fine texture is in them too, and counts as noise; a regular pattern is told from noise by its
/// sizes, which are nearly one (the lower quartile of normal ones is 0.47 of the median), and by neighbours that go together.
///
/// Noise upon black and white is cut off there, and a half of it is missing. Where a quarter of all values are black, or white,
/// those beside one that is are looked at instead: as many of them are off it by noise as are cut off, and the middle one of
/// these is off by 0.6745 of the deviation. Edges are further off, and where there is no noise there are too few.
pub fn estimate(image: &[f32], shape: PictureShape) -> Estimate {
    let colours = if shape.channels >= 3 { 3 } else { 1 };
    let many = |end: f64| {
        let pixels = image.chunks_exact(shape.channels);
        let at_end = pixels.flat_map(|p| &p[..colours]).filter(|&&v| f64::from(v) == end).count();
        4 * at_end >= shape.height * shape.width * colours
    };
    let details = match ENDS.into_iter().find(|&end| many(end)) {
        Some(end) => beside_end(image, shape, end),
        None => diagonal(image, shape),
    };
    // A half, because the range is 2.
    let sigma = 0.5 * details.deviation;
    Estimate {
        sigma,
        error: 1.17 * sigma / details.count.max(1.0).sqrt(),
        pattern: sigma > 0.0 && details.pattern,
        impulses: impulses(image, shape, FAR.max(6.0 * details.deviation)),
    }
}

/// Pixels further than `far` from the median of the eight around them, where nearly all of these agree; 0 below `FEWEST`.
fn impulses(image: &[f32], shape: PictureShape, far: f64) -> usize {
    let PictureShape { height, width, channels } = shape;
    let at = |y: usize, x: usize, c: usize| f64::from(image[(y * width + x) * channels + c]);
    let inner = places(shape).filter(|&(y, x, _)| y > 0 && y + 1 < height && x > 0 && x + 1 < width);
    let mut found: Vec<(usize, usize)> = inner
        .filter(|&(y, x, c)| {
            let mut around = [0.0; 8];
            let others = (0..9).filter(|&i| i != 4).map(|i| at(y + i / 3 - 1, x + i % 3 - 1, c));
            around.iter_mut().zip(others).for_each(|(a, v)| *a = v);
            let median = nth(&mut around, 4);
            let agree = around.iter().filter(|&&v| (v - median).abs() < AGREE).count();
            // A neighbour may be an impulse too.
            agree >= 7 && (at(y, x, c) - median).abs() > far
        })
        .map(|(y, x, _)| (y, x))
        .collect();
    // The channels of a pixel stand together.
    found.dedup();
    if found.len() < FEWEST { 0 } else { found.len() }
}

/// All places of an image: row, column, channel; without alpha.
fn places(shape: PictureShape) -> impl Iterator<Item = (usize, usize, usize)> {
    let PictureShape { height, width, channels } = shape;
    let colours = if channels >= 3 { 3 } else { 1 };
    (0..height).flat_map(move |y| (0..width).flat_map(move |x| (0..colours).map(move |c| (y, x, c))))
}

/// Values beside black, or white.
fn beside_end(image: &[f32], shape: PictureShape, end: f64) -> Details {
    let PictureShape { height, width, channels } = shape;
    let at = |y: usize, x: usize, c: usize| f64::from(image[(y * width + x) * channels + c]);
    let mut off = Vec::new();
    for (y, x, c) in places(shape).filter(|&(y, x, c)| at(y, x, c) == end) {
        off.extend((x + 1 < width).then(|| (at(y, x + 1, c) - end).abs()));
        off.extend((y + 1 < height).then(|| (at(y + 1, x, c) - end).abs()));
    }
    let cut_off = off.iter().filter(|&&d| d == 0.0).count();
    let mut above: Vec<f64> = off.iter().copied().filter(|&d| d > 0.0).collect();
    // Of noise a half is cut off.
    let none_cut_off = above.len() >= 16 && 4 * cut_off < above.len();
    let least = above.iter().copied().fold(f64::INFINITY, f64::min);
    // The part of the noise that is cut off: a half, and with the steps of 8 bits what is less than half a step off.
    let (mut part, mut deviation) = (0.5, 0.0);
    for _ in 0..4 {
        deviation = nth(&mut off, (0.75 * cut_off as f64 / part) as usize) / MEDIAN;
        part = 0.5 * libm::erfc(-0.5 * least / deviation / SQRT_2);
    }
    // Of those that are off, as many as are cut off are so by noise: the nearest.
    above.sort_unstable_by(f64::total_cmp);
    above.truncate(cut_off.max(1));
    // The place of the middle one is itself estimated, from how many are cut off.
    Details { deviation, count: above.len() as f64 / 2.5, pattern: none_cut_off || alike(&mut above) }
}

/// The finest diagonal details.
fn diagonal(image: &[f32], shape: PictureShape) -> Details {
    let PictureShape { height, width, channels } = shape;
    let at = |y: usize, x: usize, c: usize| f64::from(image[(y * width + x) * channels + c]);
    let detail = |y: usize, x: usize, c: usize| -> Option<f64> {
        if y + 1 >= height || x + 1 >= width {
            return None;
        }
        let block = [at(y, x, c), at(y, x + 1, c), at(y + 1, x, c), at(y + 1, x + 1, c)];
        let whole = block.iter().all(|v| !ENDS.contains(v));
        whole.then(|| 0.5 * (block[0] - block[1] - block[2] + block[3]))
    };
    let corners = || places(shape).filter(|(y, x, _)| y % 2 == 0 && x % 2 == 0);
    let mut details: Vec<f64> = corners().filter_map(|(y, x, c)| detail(y, x, c)).map(f64::abs).collect();
    let middle = details.len() / 2;
    let deviation = nth(&mut details, middle) / MEDIAN;
    // Edges are held within three deviations, lest few of them decide.
    let held = |v: f64| v.clamp(-3.0 * deviation, 3.0 * deviation);
    let (mut right, mut down, mut square, mut pairs) = (0.0, 0.0, 0.0, 0usize);
    for (y, x, c) in corners() {
        let (Some(own), Some(beside), Some(below)) =
            (detail(y, x, c), detail(y, x + 2, c), detail(y + 2, x, c))
        else {
            continue;
        };
        right += held(own) * held(beside);
        down += held(own) * held(below);
        square += held(own) * held(own);
        pairs += 1;
    }
    let most = 0.35f64.max(5.0 / (pairs.max(1) as f64).sqrt()) * square;
    let together = pairs >= 16 && deviation > COARSE && (right.abs() > most || down.abs() > most);
    Details { deviation, count: details.len() as f64, pattern: together || alike(&mut details) }
}

/// Whether sizes are nearer to one another than those of normal values are.
fn alike(sizes: &mut [f64]) -> bool {
    let n = sizes.len();
    let (quartile, median) = (nth(sizes, n / 4), nth(sizes, n / 2));
    // Five standard errors of the quotient, which were found by drawing.
    let most = QUARTILE / MEDIAN + 0.2f64.max(5.0 * 0.8 / (n.max(1) as f64).sqrt());
    let upper = nth(sizes, 3 * n / 4);
    // Of few the quartile tells little, but half of them are never this near to one another.
    n >= 16 && median > COARSE && (quartile > most * median || upper < 1.15 * quartile)
}

/// The n-th of the values by size, from 0; 0 where there are fewer.
fn nth(values: &mut [f64], n: usize) -> f64 {
    if n < values.len() { *values.select_nth_unstable_by(n, f64::total_cmp).1 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits::Digits;
    use crate::data::{Dataset, Draw};
    use ddpm_engine::rng::{Purpose, Stream};

    fn normal(n: usize, index: u32) -> Vec<f32> {
        let mut z = vec![0.0; n];
        Stream::new(6, Purpose::Test, 0, index).fill_normal(&mut z);
        z
    }

    /// As a PNG has it.
    fn eight_bits(x: f64) -> f32 {
        (((x + 1.0) / 2.0 * 255.0).round().clamp(0.0, 255.0) / 255.0 * 2.0 - 1.0) as f32
    }

    #[test]
    fn the_noise_of_a_picture_is_estimated() {
        // Grey waves and an edge, off the ends.
        let shape = PictureShape { height: 64, width: 64, channels: 3 };
        let clean = |i: usize| {
            let (y, x) = ((i / 192) as f64, (i / 3 % 64) as f64);
            0.3 * (x / 9.0).sin() * (y / 7.0).cos() + if x > 40.0 { 0.2 } else { -0.2 }
        };
        for sigma in [0.02, 0.05, 0.1] {
            let z = normal(shape.values(), 0);
            let noisy = |i: usize| eight_bits(clean(i) + 2.0 * sigma * f64::from(z[i]));
            let picture: Vec<f32> = (0..shape.values()).map(noisy).collect();
            let Estimate { sigma: found, error, pattern, impulses } = estimate(&picture, shape);
            println!("{sigma}: {found:.4} +- {error:.4}");
            assert_eq!(impulses, 0, "{sigma}");
            assert!(!pattern && (0.01..0.04).contains(&(error / sigma)), "{error}");
            // The median of 3072 has a standard error of 2.1 %; four of these, and what the waves add.
            assert!((found / sigma - 1.0).abs() < 0.1, "{found} for {sigma}");
        }
        let picture: Vec<f32> = (0..shape.values()).map(|i| clean(i) as f32).collect();
        assert!(estimate(&picture, shape).sigma < 0.002);
    }

    #[test]
    fn noise_that_is_cut_off_at_black_is_estimated_too() {
        const N: usize = 40;
        let digits = Digits::new(1, 28, N).unwrap();
        let shape = digits.shape();
        let mut picture = vec![0.0; shape.values()];
        for sigma in [0.05, 0.1, 0.2] {
            let (mut sum, mut squares) = (0.0, 0.0);
            for i in 0..N {
                digits.read(i, Draw::default(), &mut picture).unwrap();
                assert_eq!(estimate(&picture, shape).sigma, 0.0, "a clean digit has none");
                let z = normal(picture.len(), 1 + i as u32);
                let noisy = |(x, z): (&f32, &f32)| eight_bits(f64::from(*x) + 2.0 * sigma * f64::from(*z));
                let noisy: Vec<f32> = picture.iter().zip(&z).map(noisy).collect();
                let found = estimate(&noisy, shape);
                assert!(!found.pattern, "{sigma}: {found:?}");
                let off = found.sigma / sigma - 1.0;
                (sum, squares) = (sum + off, squares + off * off);
            }
            let (mean, typical) = (sum / N as f64, (squares / N as f64).sqrt());
            println!("cut off, {sigma}: off by {mean:+.3} in the mean, {typical:.3} typically");
            // Of about 400 numbers beside black half are cut off, give or take 5 %, which moves the estimate by 17 %; edges
            // add a little.
            assert!(mean.abs() < 0.08 && typical < 0.2, "{sigma}: {mean}, {typical}");
        }
    }

    #[test]
    fn patterns_are_told_from_noise_and_noise_from_patterns() {
        let shape = |channels| PictureShape { height: 32, width: 32, channels };
        let draw = |channels: usize, f: &dyn Fn(usize, usize) -> f64| -> Estimate {
            let at = |i: usize| f(i / channels / 32, i / channels % 32);
            let image: Vec<f32> = (0..1024 * channels).map(|i| eight_bits(at(i))).collect();
            estimate(&image, shape(channels))
        };
        let odd = |n: usize| n % 2 == 1;
        type Of<'a> = &'a dyn Fn(usize, usize) -> f64;
        let patterns: [(&str, Of<'_>); 6] = [
            ("checks", &|y, x| if odd(y + x) { 0.5 } else { -0.5 }),
            ("black and white checks", &|y, x| if odd(y + x) { 1.0 } else { -1.0 }),
            ("checks of black and grey", &|y, x| if odd(y + x) { 0.2 } else { -1.0 }),
            ("dots", &|y, x| if odd(y) && odd(x) { 0.6 } else { -0.2 }),
            ("dots on black", &|y, x| if odd(y) && odd(x) { 0.6 } else { -1.0 }),
            ("a fabric", &|y, x| 0.4 * (1.3 * y as f64).sin() * (1.3 * x as f64).sin()),
        ];
        for (name, pattern) in patterns {
            for channels in [1, 3] {
                let found = draw(channels, pattern);
                assert!(found.pattern || found.sigma < 0.005, "{name} in {channels}: {found:?}");
            }
        }
        // Noise of any amount and kind of image is none; 200 of each, so that one in 200 would be seen.
        for trial in 0..200 {
            let z = normal(3 * 1024, 500 + trial);
            for (side, channels) in [(8, 1), (16, 1), (32, 1), (32, 3)] {
                for (sigma, slope) in [(0.02, 0.0), (0.1, 0.02), (0.25, 0.01)] {
                    let shape = PictureShape { height: side, width: side, channels };
                    let clean = |i: usize| slope * ((i / channels % side) as f64 - side as f64 / 2.0);
                    let noisy = |i: usize| eight_bits(clean(i) + 2.0 * sigma * f64::from(z[i]));
                    let image: Vec<f32> = (0..shape.values()).map(noisy).collect();
                    let found = estimate(&image, shape);
                    assert!(!found.pattern, "{side}x{side}x{channels}, {sigma}: {found:?}");
                    assert_eq!(found.impulses, 0, "{side}x{side}x{channels}, {sigma}");
                }
            }
        }
    }
    #[test]
    fn impulses_are_counted_where_the_estimate_sees_no_noise() {
        for channels in [1, 3] {
            let shape = PictureShape { height: 32, width: 32, channels };
            let clean = |i: usize| 0.2 * ((i / channels % 32) as f64 / 9.0).sin();
            let mut image: Vec<f32> = (0..shape.values()).map(|i| eight_bits(clean(i))).collect();
            let before = estimate(&image, shape);
            assert_eq!(before.impulses, 0);
            for (i, (y, x)) in [(3, 4), (10, 20), (25, 7), (29, 29), (16, 15)].into_iter().enumerate() {
                assert_eq!(estimate(&image, shape).impulses, if i < 3 { 0 } else { i });
                // Salt and pepper.
                image[(y * 32 + x) * channels..][..channels].fill(if i % 2 == 0 { 1.0 } else { -1.0 });
            }
            let found = estimate(&image, shape);
            assert_eq!(found.impulses, 5);
            assert!((found.sigma - before.sigma).abs() < 0.001, "{before:?}, {found:?}");
        }
        // Lines, edges and blots are none.
        let shape = PictureShape { height: 32, width: 32, channels: 1 };
        let drawn = |i: usize| match (i / 32, i % 32) {
            (5, _) | (_, 9) | (20.., 20..) => 1.0,
            (12..14, 24..26) => 0.7,
            _ => -0.3,
        };
        let image: Vec<f32> = (0..1024).map(drawn).collect();
        assert_eq!(estimate(&image, shape).impulses, 0);
        for (height, width) in [(1, 1), (1, 9), (2, 2)] {
            let shape = PictureShape { height, width, channels: 1 };
            assert_eq!(estimate(&vec![0.3; height * width], shape).impulses, 0);
        }
    }
}
