//! Noise estimation, with its standard error.

use std::f64::consts::SQRT_2;

/// The median and the lower quartile of |z| for standard normal z.
const MEDIAN: f64 = 0.674_489_750_196_082;
const QUARTILE: f64 = 0.318_639_363_964_375;

/// The values of black and white.
const BLACK_WHITE: [f64; 2] = [-1.0, 1.0];

/// Three 8-bit quantization steps, in [-1, 1]: below this there are too few distinct values to judge their
/// spread.
const COARSE: f64 = 3.0 / 127.5;

/// An impulse differs from its neighbours by more than `IMPULSE_DISTANCE`, a quarter of the range, and more than normal
/// noise does; neighbours agree if they differ by less than `NEIGHBOUR_TOLERANCE`.
const IMPULSE_DISTANCE: f64 = 0.5;
const NEIGHBOUR_TOLERANCE: f64 = 0.1;

/// Fewer outlier pixels may be stars or dust.
const MIN_IMPULSES: usize = 3;

/// An estimate of the noise in an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The standard deviation as a fraction of the range from black to white; 0 if none is found.
    pub sigma: f64,
    /// The standard error of `sigma`.
    pub error: f64,
    /// Whether the details are a pattern rather than noise: their magnitudes are too uniform, or neighbours
    /// are correlated.
    pub pattern: bool,
    /// Number of pixels that stand out from all their neighbours, as in impulse (salt-and-pepper) noise,
    /// which `sigma` does not cover; 0 if there are too few to tell.
    pub impulses: usize,
}

/// Statistics of detail magnitudes.
struct Details {
    deviation: f64,
    /// The effective sample size.
    count: f64,
    pattern: bool,
}

/// Estimates the noise in an image with values in [-1, 1]. Alpha is ignored.
///
/// Assumes independent normal noise in all pixels and uses the median of the finest diagonal Haar wavelet
/// coefficients, in which images contain little but noise (Donoho, Johnstone, "Ideal Spatial Adaptation by
/// Wavelet Shrinkage", 1994, section 4.2): `median |d| / 0.6745` over blocks of four pixels `a b / c d` with
/// `d = (a - b - c + d) / 2`. The relative standard error is `1.17 / sqrt(n)`. Fine texture counts as noise;
/// a regular pattern is distinguished by nearly uniform magnitudes (for normal noise the lower quartile is
/// 0.47 of the median) and by correlated neighbours.
///
/// On black and white, noise is clipped and half of it is missing. If a quarter of all values are black, or
/// white, the neighbours of such values are used instead: noise moves as many of them off the extreme as it
/// clips, and their median distance is 0.6745 of the standard deviation. Edges are further off, and an image
/// without noise has too few such neighbours.
///
/// # Panics
/// If `image` does not have `height * width * channels` values.
pub fn estimate(image: &[f32], [height, width, channels]: [usize; 3]) -> Estimate {
    assert_eq!(image.len(), height * width * channels, "the length of the image");
    estimate_in(image, Dimensions { height, width, channels })
}

/// Of an image, channels last.
#[derive(Clone, Copy)]
struct Dimensions {
    height: usize,
    width: usize,
    channels: usize,
}

fn estimate_in(image: &[f32], shape: Dimensions) -> Estimate {
    let colours = if shape.channels >= 3 { 3 } else { 1 };
    let is_common = |end: f64| {
        let pixels = image.chunks_exact(shape.channels);
        let at_end = pixels.flat_map(|p| &p[..colours]).filter(|&&v| f64::from(v) == end).count();
        4 * at_end >= shape.height * shape.width * colours
    };
    let details = match BLACK_WHITE.into_iter().find(|&end| is_common(end)) {
        Some(end) => beside_extreme(image, shape, end),
        None => diagonal(image, shape),
    };
    // One half, because the range is 2.
    let sigma = 0.5 * details.deviation;
    Estimate {
        sigma,
        error: 1.17 * sigma / details.count.max(1.0).sqrt(),
        pattern: sigma > 0.0 && details.pattern,
        impulses: impulses(image, shape, IMPULSE_DISTANCE.max(6.0 * details.deviation)),
    }
}

/// Number of pixels further than `far` from the median of their eight neighbours, nearly all of which agree;
/// 0 below `MIN_IMPULSES`.
fn impulses(image: &[f32], shape: Dimensions, far: f64) -> usize {
    let Dimensions { height, width, channels } = shape;
    let at = |y: usize, x: usize, c: usize| f64::from(image[(y * width + x) * channels + c]);
    let inner = positions(shape).filter(|&(y, x, _)| y > 0 && y + 1 < height && x > 0 && x + 1 < width);
    let mut found: Vec<(usize, usize)> = inner
        .filter(|&(y, x, c)| {
            let mut around = [0.0; 8];
            let others = (0..9).filter(|&i| i != 4).map(|i| at(y + i / 3 - 1, x + i % 3 - 1, c));
            around.iter_mut().zip(others).for_each(|(a, v)| *a = v);
            let median = nth(&mut around, 4);
            let agree = around.iter().filter(|&&v| (v - median).abs() < NEIGHBOUR_TOLERANCE).count();
            // A neighbour may be an impulse too.
            agree >= 7 && (at(y, x, c) - median).abs() > far
        })
        .map(|(y, x, _)| (y, x))
        .collect();
    // Several channels of a pixel are adjacent.
    found.dedup();
    if found.len() < MIN_IMPULSES { 0 } else { found.len() }
}

/// All elements of an image as (row, column, channel), without alpha.
fn positions(shape: Dimensions) -> impl Iterator<Item = (usize, usize, usize)> {
    let Dimensions { height, width, channels } = shape;
    let colours = if channels >= 3 { 3 } else { 1 };
    (0..height).flat_map(move |y| (0..width).flat_map(move |x| (0..colours).map(move |c| (y, x, c))))
}

/// Details from the neighbours of black, or white, values.
fn beside_extreme(image: &[f32], shape: Dimensions, end: f64) -> Details {
    let Dimensions { height, width, channels } = shape;
    let at = |y: usize, x: usize, c: usize| f64::from(image[(y * width + x) * channels + c]);
    let mut off = Vec::new();
    for (y, x, c) in positions(shape).filter(|&(y, x, c)| at(y, x, c) == end) {
        off.extend((x + 1 < width).then(|| (at(y, x + 1, c) - end).abs()));
        off.extend((y + 1 < height).then(|| (at(y + 1, x, c) - end).abs()));
    }
    let clipped = off.iter().filter(|&&d| d == 0.0).count();
    let mut above: Vec<f64> = off.iter().copied().filter(|&d| d > 0.0).collect();
    // Noise would be clipped for half of them.
    let none_clipped = above.len() >= 16 && 4 * clipped < above.len();
    let least = above.iter().copied().fold(f64::INFINITY, f64::min);
    // The clipped fraction of the noise: one half, plus what 8-bit quantization rounds to the extreme.
    let (mut part, mut deviation) = (0.5, 0.0);
    for _ in 0..4 {
        deviation = nth(&mut off, (0.75 * clipped as f64 / part) as usize) / MEDIAN;
        part = 0.5 * libm::erfc(-0.5 * least / deviation / SQRT_2);
    }
    // Noise accounts for as many of the distances as are clipped: the smallest ones.
    above.sort_unstable_by(f64::total_cmp);
    above.truncate(clipped.max(1));
    // The median's rank is itself estimated, from the number of clipped values.
    Details { deviation, count: above.len() as f64 / 2.5, pattern: none_clipped || too_uniform(&mut above) }
}

/// The finest diagonal wavelet details.
fn diagonal(image: &[f32], shape: Dimensions) -> Details {
    let Dimensions { height, width, channels } = shape;
    let at = |y: usize, x: usize, c: usize| f64::from(image[(y * width + x) * channels + c]);
    let detail = |y: usize, x: usize, c: usize| -> Option<f64> {
        if y + 1 >= height || x + 1 >= width {
            return None;
        }
        let block = [at(y, x, c), at(y, x + 1, c), at(y + 1, x, c), at(y + 1, x + 1, c)];
        let unclipped = block.iter().all(|v| !BLACK_WHITE.contains(v));
        unclipped.then(|| 0.5 * (block[0] - block[1] - block[2] + block[3]))
    };
    let corners = || positions(shape).filter(|(y, x, _)| y % 2 == 0 && x % 2 == 0);
    let mut details: Vec<f64> = corners().filter_map(|(y, x, c)| detail(y, x, c)).map(f64::abs).collect();
    let middle = details.len() / 2;
    let deviation = nth(&mut details, middle) / MEDIAN;
    // Clip to three standard deviations, so that a few edges do not dominate.
    let clip = |v: f64| v.clamp(-3.0 * deviation, 3.0 * deviation);
    let (mut right, mut down, mut square, mut pairs) = (0.0, 0.0, 0.0, 0usize);
    for (y, x, c) in corners() {
        let (Some(centre), Some(beside), Some(below)) =
            (detail(y, x, c), detail(y, x + 2, c), detail(y + 2, x, c))
        else {
            continue;
        };
        right += clip(centre) * clip(beside);
        down += clip(centre) * clip(below);
        square += clip(centre) * clip(centre);
        pairs += 1;
    }
    let limit = 0.35f64.max(5.0 / (pairs.max(1) as f64).sqrt()) * square;
    let correlated = pairs >= 16 && deviation > COARSE && (right.abs() > limit || down.abs() > limit);
    Details { deviation, count: details.len() as f64, pattern: correlated || too_uniform(&mut details) }
}

/// Whether magnitudes are more uniform than those of normal values.
fn too_uniform(magnitudes: &mut [f64]) -> bool {
    let n = magnitudes.len();
    let (quartile, median) = (nth(magnitudes, n / 4), nth(magnitudes, n / 2));
    // Five standard errors of the quotient, found by simulation.
    let limit = QUARTILE / MEDIAN + 0.2f64.max(5.0 * 0.8 / (n.max(1) as f64).sqrt());
    let upper = nth(magnitudes, 3 * n / 4);
    // For few values the quartile is imprecise, but half of normal values are never this close together.
    n >= 16 && median > COARSE && (quartile > limit * median || upper < 1.15 * quartile)
}

/// The n-th smallest value, from 0; 0 if there are fewer.
fn nth(values: &mut [f64], n: usize) -> f64 {
    if n < values.len() { *values.select_nth_unstable_by(n, f64::total_cmp).1 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm_rng::{Purpose, Stream};

    impl Dimensions {
        fn len(self) -> usize {
            self.height * self.width * self.channels
        }
    }

    fn normal(n: usize, index: u32) -> Vec<f32> {
        let mut z = vec![0.0; n];
        Stream::new(6, Purpose::Test, 0, index).fill_normal(&mut z);
        z
    }

    /// Quantizes to 8 bits, like a PNG.
    fn eight_bits(x: f64) -> f32 {
        (((x + 1.0) / 2.0 * 255.0).round().clamp(0.0, 255.0) / 255.0 * 2.0 - 1.0) as f32
    }

    #[test]
    fn the_noise_of_an_image_is_estimated() {
        // Grey waves and an edge, away from black and white.
        let shape = Dimensions { height: 64, width: 64, channels: 3 };
        let clean = |i: usize| {
            let (y, x) = ((i / 192) as f64, (i / 3 % 64) as f64);
            0.3 * (x / 9.0).sin() * (y / 7.0).cos() + if x > 40.0 { 0.2 } else { -0.2 }
        };
        for sigma in [0.02, 0.05, 0.1] {
            let z = normal(shape.len(), 0);
            let noisy = |i: usize| eight_bits(clean(i) + 2.0 * sigma * f64::from(z[i]));
            let image: Vec<f32> = (0..shape.len()).map(noisy).collect();
            let Estimate { sigma: found, error, pattern, impulses } = estimate_in(&image, shape);
            println!("{sigma}: {found:.4} +- {error:.4}");
            assert_eq!(impulses, 0, "{sigma}");
            assert!(!pattern && (0.01..0.04).contains(&(error / sigma)), "{error}");
            // The median of 3072 values has a standard error of 2.1 %; four of these, plus the waves'
            // contribution.
            assert!((found / sigma - 1.0).abs() < 0.1, "{found} for {sigma}");
        }
        let image: Vec<f32> = (0..shape.len()).map(|i| clean(i) as f32).collect();
        assert!(estimate_in(&image, shape).sigma < 0.002);
    }

    #[test]
    fn patterns_and_noise_are_distinguished() {
        let shape = |channels| Dimensions { height: 32, width: 32, channels };
        let draw = |channels: usize, f: &dyn Fn(usize, usize) -> f64| -> Estimate {
            let at = |i: usize| f(i / channels / 32, i / channels % 32);
            let image: Vec<f32> = (0..1024 * channels).map(|i| eight_bits(at(i))).collect();
            estimate_in(&image, shape(channels))
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
        // Noise of any strength is not a pattern; 200 trials of each would reveal one in 200.
        for trial in 0..200 {
            let z = normal(3 * 1024, 500 + trial);
            for (side, channels) in [(8, 1), (16, 1), (32, 1), (32, 3)] {
                for (sigma, slope) in [(0.02, 0.0), (0.1, 0.02), (0.25, 0.01)] {
                    let shape = Dimensions { height: side, width: side, channels };
                    let clean = |i: usize| slope * ((i / channels % side) as f64 - side as f64 / 2.0);
                    let noisy = |i: usize| eight_bits(clean(i) + 2.0 * sigma * f64::from(z[i]));
                    let image: Vec<f32> = (0..shape.len()).map(noisy).collect();
                    let found = estimate_in(&image, shape);
                    assert!(!found.pattern, "{side}x{side}x{channels}, {sigma}: {found:?}");
                    assert_eq!(found.impulses, 0, "{side}x{side}x{channels}, {sigma}");
                }
            }
        }
    }

    #[test]
    fn impulses_are_counted_even_without_normal_noise() {
        for channels in [1, 3] {
            let shape = Dimensions { height: 32, width: 32, channels };
            let clean = |i: usize| 0.2 * ((i / channels % 32) as f64 / 9.0).sin();
            let mut image: Vec<f32> = (0..shape.len()).map(|i| eight_bits(clean(i))).collect();
            let before = estimate_in(&image, shape);
            assert_eq!(before.impulses, 0);
            for (i, (y, x)) in [(3, 4), (10, 20), (25, 7), (29, 29), (16, 15)].into_iter().enumerate() {
                assert_eq!(estimate_in(&image, shape).impulses, if i < 3 { 0 } else { i });
                // Salt and pepper.
                image[(y * 32 + x) * channels..][..channels].fill(if i % 2 == 0 { 1.0 } else { -1.0 });
            }
            let found = estimate_in(&image, shape);
            assert_eq!(found.impulses, 5);
            assert!((found.sigma - before.sigma).abs() < 0.001, "{before:?}, {found:?}");
        }
        // Lines, edges and blots are not impulses.
        let shape = Dimensions { height: 32, width: 32, channels: 1 };
        let drawn = |i: usize| match (i / 32, i % 32) {
            (5, _) | (_, 9) | (20.., 20..) => 1.0,
            (12..14, 24..26) => 0.7,
            _ => -0.3,
        };
        let image: Vec<f32> = (0..1024).map(drawn).collect();
        assert_eq!(estimate_in(&image, shape).impulses, 0);
        for (height, width) in [(1, 1), (1, 9), (2, 2)] {
            let shape = Dimensions { height, width, channels: 1 };
            assert_eq!(estimate_in(&vec![0.3; height * width], shape).impulses, 0);
        }
    }
}
