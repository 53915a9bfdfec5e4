//! A data set that needs no files: handwritten-looking digits, generated procedurally.
//!
//! A digit consists of a few strokes, each a smooth (Catmull-Rom) curve through control points; most digits have several
//! variants. Each image jitters the points, slants, rotates, stretches, scales and places the glyph, and draws it with a
//! random pen width. It is a pure function of (seed, index) and identical on every platform: only IEEE arithmetic and
//! `libm` are used.

use std::path::Path;

use ddpm_rng::{Purpose, Stream};
use rayon::prelude::*;
use std::borrow::Cow;

use super::images::{DatasetScan, Images};
use super::source::DataContent;
use super::source::packed::Packed;
use super::{AugmentKey, DEFAULT_MEMORY, DataOptions, Dataset, Summary};
use crate::error::{Error, Result};

/// A control point of a stroke: x to the right, y down, the digit about 1 high; whether it is a sharp corner.
type Node = (f32, f32, bool);

const S: bool = false;
const SHARP: bool = true;

/// The variants of each digit: strokes of control points.
#[rustfmt::skip]
const GLYPHS: [&[&[&[Node]]]; 10] = [
    // 0
    &[
        &[&[(0.36, 0.01, S), (0.12, 0.16, S), (0.02, 0.50, S), (0.12, 0.86, S), (0.32, 0.99, S),
           (0.54, 0.84, S), (0.62, 0.48, S), (0.53, 0.14, S), (0.33, 0.02, S)]],
        &[&[(0.46, 0.06, S), (0.20, 0.10, S), (0.03, 0.48, S), (0.14, 0.90, S), (0.38, 0.96, S),
           (0.58, 0.62, S), (0.56, 0.20, S), (0.38, 0.02, S), (0.26, 0.10, S)]],
    ],
    // 1
    &[
        &[&[(0.30, 0.00, S), (0.30, 0.50, S), (0.29, 1.00, S)]],
        &[&[(0.12, 0.25, S), (0.34, 0.00, SHARP), (0.34, 0.50, S), (0.33, 1.00, S)]],
        &[&[(0.13, 0.23, S), (0.34, 0.00, SHARP), (0.34, 0.50, S), (0.34, 0.98, S)],
          &[(0.10, 0.99, S), (0.58, 0.98, S)]],
    ],
    // 2
    &[
        &[&[(0.05, 0.22, S), (0.26, 0.01, S), (0.54, 0.15, S), (0.50, 0.42, S), (0.26, 0.72, S),
           (0.02, 0.97, SHARP), (0.34, 0.95, S), (0.64, 0.96, S)]],
        &[&[(0.06, 0.20, S), (0.30, 0.00, S), (0.54, 0.20, S), (0.42, 0.56, S), (0.14, 0.92, S),
           (0.02, 0.86, S), (0.14, 0.76, S), (0.36, 0.92, S), (0.66, 0.94, S)]],
    ],
    // 3
    &[
        &[&[(0.06, 0.12, S), (0.30, 0.00, S), (0.54, 0.18, S), (0.44, 0.40, S), (0.20, 0.48, SHARP),
           (0.48, 0.56, S), (0.58, 0.76, S), (0.36, 0.98, S), (0.02, 0.88, S)]],
        &[&[(0.06, 0.03, S), (0.55, 0.02, SHARP), (0.26, 0.40, SHARP), (0.52, 0.52, S), (0.57, 0.78, S),
           (0.34, 0.99, S), (0.03, 0.88, S)]],
    ],
    // 4
    &[
        &[&[(0.12, 0.02, S), (0.07, 0.30, S), (0.05, 0.56, SHARP), (0.34, 0.55, S), (0.64, 0.52, S)],
          &[(0.50, 0.12, S), (0.48, 0.55, S), (0.46, 1.00, S)]],
        &[&[(0.44, 0.00, S), (0.24, 0.32, S), (0.00, 0.68, SHARP), (0.32, 0.66, S), (0.66, 0.65, S)],
          &[(0.44, 0.00, S), (0.44, 0.50, S), (0.43, 1.00, S)]],
    ],
    // 5
    &[
        &[&[(0.14, 0.03, S), (0.10, 0.42, SHARP), (0.34, 0.36, S), (0.57, 0.56, S), (0.52, 0.84, S),
           (0.28, 0.99, S), (0.02, 0.88, S)],
          &[(0.14, 0.03, S), (0.36, 0.03, S), (0.60, 0.01, S)]],
        &[&[(0.56, 0.02, S), (0.18, 0.03, SHARP), (0.10, 0.44, SHARP), (0.36, 0.40, S), (0.56, 0.62, S),
           (0.46, 0.90, S), (0.22, 0.99, S), (0.02, 0.90, S)]],
    ],
    // 6
    &[
        &[&[(0.48, 0.00, S), (0.20, 0.26, S), (0.04, 0.66, S), (0.18, 0.96, S), (0.42, 0.96, S),
           (0.54, 0.74, S), (0.40, 0.54, S), (0.18, 0.60, S), (0.07, 0.78, S)]],
        &[&[(0.38, 0.00, S), (0.13, 0.34, S), (0.04, 0.76, S), (0.24, 0.99, S), (0.50, 0.88, S),
           (0.48, 0.62, S), (0.26, 0.56, S), (0.08, 0.72, S)]],
    ],
    // 7
    &[
        &[&[(-0.08, -0.02, S), (0.30, 0.03, S), (0.67, 0.04, SHARP), (0.38, 0.48, S), (0.14, 1.00, S)]],
        &[&[(-0.06, -0.01, S), (0.30, 0.03, S), (0.66, 0.04, SHARP), (0.40, 0.46, S), (0.20, 1.00, S)],
          &[(0.16, 0.52, S), (0.58, 0.48, S)]],
        &[&[(-0.06, 0.12, S), (-0.08, -0.02, SHARP), (0.67, 0.04, SHARP), (0.38, 0.50, S), (0.16, 1.00, S)]],
    ],
    // 8
    &[
        &[&[(0.50, 0.13, S), (0.30, 0.00, S), (0.09, 0.18, S), (0.26, 0.44, S), (0.52, 0.72, S),
           (0.32, 1.00, S), (0.06, 0.78, S), (0.30, 0.46, S), (0.52, 0.22, S), (0.46, 0.08, S)]],
        &[&[(0.32, 0.45, S), (0.10, 0.24, S), (0.30, 0.00, S), (0.51, 0.22, S), (0.32, 0.45, S)],
          &[(0.32, 0.46, S), (0.04, 0.72, S), (0.30, 1.00, S), (0.57, 0.73, S), (0.32, 0.46, S)]],
    ],
    // 9
    &[
        &[&[(0.52, 0.14, S), (0.32, 0.00, S), (0.08, 0.16, S), (0.10, 0.42, S), (0.32, 0.50, S),
           (0.52, 0.30, S), (0.54, 0.10, SHARP), (0.50, 0.55, S), (0.44, 1.00, S)]],
        &[&[(0.53, 0.18, S), (0.34, 0.00, S), (0.08, 0.20, S), (0.20, 0.47, S), (0.46, 0.36, S),
           (0.54, 0.10, SHARP), (0.57, 0.52, S), (0.44, 0.90, S), (0.12, 0.95, S)]],
    ],
];

/// Line segments per curve between two points.
const SEGMENTS: usize = 6;

/// Minimum pen radius in pixels, so that thin lines do not break up.
const MIN_RADIUS: f32 = 0.6;

/// Supported image sizes.
const SIZES: std::ops::RangeInclusive<usize> = 12..=64;

/// White digits on black in square grey images, labelled 0 to 9.
pub struct Digits(Images);

impl Digits {
    /// Draws `count` images of `size` x `size` (12 to 64). Image `index` shows the digit `index % 10` and depends only on
    /// `seed` and `index`.
    ///
    /// # Errors
    /// [`Error::Option`] if `size` or `count` is out of range.
    pub fn new(seed: u64, size: usize, count: usize) -> Result<Self> {
        Self::with_options(seed, size, count, &DataOptions::default())
    }

    /// [`new`](Self::new) followed by the transforms of `options`, such as crops and flips.
    ///
    /// # Errors
    /// As [`new`](Self::new), and for options out of range.
    pub fn with_options(seed: u64, size: usize, count: usize, options: &DataOptions) -> Result<Self> {
        Self::scan(seed, size, count, options, false)?.into_set(options).map(Self)
    }

    pub(super) fn scan(
        seed: u64,
        size: usize,
        count: usize,
        options: &DataOptions,
        contents: bool,
    ) -> Result<DatasetScan> {
        options.check()?;
        if !SIZES.contains(&size) {
            let reason =
                format!("digits can be {} to {} pixels per side, not {size}", SIZES.start(), SIZES.end());
            return Err(Error::Option { option: "data.size".into(), reason });
        }
        let max = DEFAULT_MEMORY as usize / (size * size);
        if !(1..=max).contains(&count) {
            let reason = format!("{count} is out of range; give 1 to {max} for digits of {size}x{size}");
            return Err(Error::Option { option: "data.digits_count".into(), reason });
        }
        let mut data = vec![0; count * size * size];
        data.par_chunks_exact_mut(size * size)
            .enumerate()
            .for_each(|(index, out)| draw(seed, index as u32, size, out));
        let labels = (0..count as u32).map(|i| i % 10).collect();
        let source = Packed { height: size, width: size, channels: 1, data, labels, files: Vec::new() };
        let classes = (0..10).map(|digit| digit.to_string()).collect();
        let (source, sorted, notes) = (Box::new(source), false, Vec::new());
        let content = DataContent { source, classes, sorted, notes, bad: Vec::new() };
        let name = format!("built-in digits, seed {seed}");
        DatasetScan::new(Path::new("digits"), name, content, options, DEFAULT_MEMORY, contents)
    }
}

impl Dataset for Digits {
    fn dims(&self) -> [usize; 4] {
        self.0.dims()
    }

    fn classes(&self) -> &[String] {
        self.0.classes()
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.0.label(index)
    }

    fn read(&self, index: usize, key: AugmentKey, out: &mut [f32]) -> Result<()> {
        self.0.read(index, key, out)
    }

    fn summary(&self) -> Cow<'_, Summary> {
        self.0.summary()
    }
}

/// The uniform random values of one image.
struct Draws<I>(I);

impl<I: Iterator<Item = f64>> Draws<I> {
    /// Uniform in [`low`, `high`).
    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.0.next().unwrap_or(0.5) as f32
    }

    /// Triangular around 0, at most `reach` away.
    fn around(&mut self, reach: f32) -> f32 {
        self.between(-0.5, 0.5) * reach + self.between(-0.5, 0.5) * reach
    }
}

/// A point in pixel coordinates, and the pen radius there.
#[derive(Clone, Copy)]
struct Dot {
    x: f32,
    y: f32,
    radius: f32,
}

fn draw(seed: u64, index: u32, size: usize, out: &mut [u8]) {
    let mut draws = Draws(Stream::new(seed, Purpose::Digits, 0, index).uniforms());
    let variants = GLYPHS[index as usize % 10];
    let glyph = variants[(draws.between(0.0, variants.len() as f32) as usize).min(variants.len() - 1)];

    // Glyph transform: x is stretched, tapered towards the top or the bottom and slanted, then the glyph is rotated.
    let stretch = draws.between(0.80, 1.22);
    let taper = draws.around(0.20);
    let slant = 0.16 + draws.around(0.30);
    let (sin, cos) = libm::sincosf(draws.around(0.22));
    let jitter = draws.between(0.025, 0.095);
    let mut strokes: Vec<Vec<(f32, f32, bool)>> = Vec::with_capacity(glyph.len());
    let (mut low, mut high) = ((f32::MAX, f32::MAX), (f32::MIN, f32::MIN));
    for stroke in glyph {
        let place = |&(x, y, sharp): &Node| {
            let (x, y) = (x - 0.31 + draws.around(jitter), y - 0.5 + draws.around(jitter));
            let x = x * stretch * (1.0 + taper * y) - slant * y;
            let (x, y) = (x * cos - y * sin, x * sin + y * cos);
            low = (low.0.min(x), low.1.min(y));
            high = (high.0.max(x), high.1.max(y));
            (x, y, sharp)
        };
        strokes.push(stroke.iter().map(place).collect());
    }

    // The pen pressure varies along the stroke.
    let swell = draws.between(0.0, 0.28);
    let mut phase = draws.between(0.0, std::f32::consts::TAU);
    let pace = draws.between(0.3, 0.9);

    // Scale and position: the control points stay clear of the border.
    let side = size as f32;
    let radius = (side * draws.between(0.030, 0.066)).max(MIN_RADIUS);
    let (wide, tall) = (high.0 - low.0, high.1 - low.1);
    let room = side - 2.0 * radius * (1.0 + swell) - 2.6;
    let scale = (side * draws.between(0.58, 0.76) / tall.max(0.5)).min(room / tall).min(room / wide.max(0.1));
    let free = |used: f32| ((room - used * scale) * 0.5).min(side * 0.09);
    let middle_x = side * 0.5 + draws.around(1.0) * free(wide) - (low.0 + high.0) * 0.5 * scale;
    let middle_y = side * 0.5 + draws.around(1.0) * free(tall) - (low.1 + high.1) * 0.5 * scale;

    let mut ink = vec![0f32; size * size];
    for stroke in &strokes {
        let at = |i: usize, phase: f32| Dot {
            x: stroke[i].0 * scale + middle_x,
            y: stroke[i].1 * scale + middle_y,
            radius: (radius * (1.0 + swell * libm::sinf(phase))).max(MIN_RADIUS),
        };
        let last = stroke.len() - 1;
        for i in 0..last {
            let (a, b) = (at(i, phase), at(i + 1, phase + pace));
            phase += pace;
            // At an end or a corner the tangent comes from this side only.
            let before = if i == 0 || stroke[i].2 { a } else { at(i - 1, 0.0) };
            let after = if i + 1 == last || stroke[i + 1].2 { b } else { at(i + 2, 0.0) };
            let mut from = a;
            for segment in 1..=SEGMENTS {
                let to = on_curve(before, a, b, after, segment as f32 / SEGMENTS as f32);
                add_line(&mut ink, size, from, to);
                from = to;
            }
        }
    }
    for (o, i) in out.iter_mut().zip(ink) {
        *o = (i * 255.0 + 0.5) as u8;
    }
}

/// The Catmull-Rom curve from `a` to `b` at `t`.
fn on_curve(before: Dot, a: Dot, b: Dot, after: Dot, t: f32) -> Dot {
    let value = |p: f32, q: f32, r: f32, s: f32| {
        let (from, to) = ((r - p) * 0.5, (s - q) * 0.5);
        let (t2, t3) = (t * t, t * t * t);
        q * (2.0 * t3 - 3.0 * t2 + 1.0)
            + from * (t3 - 2.0 * t2 + t)
            + r * (3.0 * t2 - 2.0 * t3)
            + to * (t3 - t2)
    };
    Dot {
        x: value(before.x, a.x, b.x, after.x),
        y: value(before.y, a.y, b.y, after.y),
        radius: a.radius + (b.radius - a.radius) * t,
    }
}

/// Draws a line segment: full ink within the pen radius, fading out over one pixel.
fn add_line(ink: &mut [f32], size: usize, a: Dot, b: Dot) {
    let reach = a.radius.max(b.radius) + 0.5;
    let clip = |v: f32| v.clamp(0.0, size as f32) as usize;
    let (left, right) = (clip(a.x.min(b.x) - reach), clip(a.x.max(b.x) + reach + 1.0));
    let (top, bottom) = (clip(a.y.min(b.y) - reach), clip(a.y.max(b.y) + reach + 1.0));
    let (dx, dy) = (b.x - a.x, b.y - a.y);
    let length2 = (dx * dx + dy * dy).max(1e-12);
    for y in top..bottom {
        for x in left..right {
            // From the pixel centre to the nearest point of the segment.
            let (px, py) = (x as f32 + 0.5 - a.x, y as f32 + 0.5 - a.y);
            let along = ((px * dx + py * dy) / length2).clamp(0.0, 1.0);
            let (ex, ey) = (px - along * dx, py - along * dy);
            let radius = a.radius + (b.radius - a.radius) * along;
            let covered = (radius + 0.5 - (ex * ex + ey * ey).sqrt()).clamp(0.0, 1.0);
            let pixel = &mut ink[y * size + x];
            *pixel = pixel.max(covered);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::decode::Samples;
    use super::*;
    use sha2::{Digest, Sha256};

    fn bytes(digits: &Digits, index: usize) -> &[u8] {
        match &digits.0.base(index).samples {
            Samples::U8(data) => data,
            Samples::U16(_) => panic!("16 bits"),
        }
    }

    #[test]
    fn digits_match_their_checksums() {
        // A change here changes the data of existing runs.
        for (size, expected) in [
            (16, "e17258f4a96d9c43753ff54bce13cb1aea95dbefa4d1d3adc0ad3c5befbaea9c"),
            (28, "b609630358c654bb84754c9eddc67a843eb0fb16f990c7f1e6484f88a4923906"),
        ] {
            let digits = Digits::new(7, size, 1000).unwrap();
            let data: Vec<u8> = (0..1000).flat_map(|i| bytes(&digits, i)).copied().collect();
            assert_eq!(super::super::hex(&Sha256::digest(&data)), expected, "{size}");
        }
    }

    #[test]
    fn an_image_depends_only_on_seed_and_index() {
        let (few, many, other) = (
            Digits::new(3, 20, 11).unwrap(),
            Digits::new(3, 20, 500).unwrap(),
            Digits::new(4, 20, 11).unwrap(),
        );
        for i in 0..11 {
            assert_eq!(bytes(&few, i), bytes(&many, i));
            assert_ne!(bytes(&few, i), bytes(&other, i));
        }
        assert_ne!(few.summary().fingerprint, other.summary().fingerprint);
        assert_eq!(few.summary().fingerprint, Digits::new(3, 20, 11).unwrap().summary().fingerprint);
        // Images 0 and 10 show the same digit, drawn differently.
        assert_eq!(few.label(10), few.label(0));
        assert_ne!(bytes(&few, 10), bytes(&few, 0));
    }

    #[test]
    fn digits_are_balanced_and_images_distinct() {
        let digits = Digits::new(0, 16, 2000).unwrap();
        let mut counts = [0; 10];
        (0..digits.len()).for_each(|i| counts[digits.label(i).unwrap() as usize] += 1);
        assert_eq!(counts, [200; 10]);
        let distinct: std::collections::HashSet<_> = (0..2000).map(|i| bytes(&digits, i)).collect();
        assert_eq!(distinct.len(), 2000);
        assert_eq!(digits.classes().join(" "), "0 1 2 3 4 5 6 7 8 9");
    }

    #[test]
    fn the_amount_of_ink_is_bounded_and_the_border_is_clear() {
        for size in [12, 16, 28, 64] {
            let digits = Digits::new(1, size, 1000).unwrap();
            for i in 0..digits.len() {
                let image = bytes(&digits, i);
                let ink = image.iter().map(|&v| f64::from(v)).sum::<f64>() / 255.0 / (size * size) as f64;
                assert!((0.02..0.42).contains(&ink), "{size}, {i}: {ink}");
                assert!(*image.iter().max().unwrap() > 150, "{size}, {i}: faint");
            }
            // Control points stay clear of the border; a curve may overshoot them slightly.
            let border = |i: usize| {
                let at = |y: usize, x: usize| u32::from(bytes(&digits, i)[y * size + x]);
                (0..size).map(|k| at(0, k) + at(size - 1, k) + at(k, 0) + at(k, size - 1)).sum::<u32>()
            };
            let touching = (0..digits.len()).filter(|&i| border(i) > 0).count();
            assert!(touching < 20, "{size}: {touching} of 1000 touch the border");
        }
    }

    #[test]
    fn read_returns_values_in_minus_one_to_one() {
        let digits = Digits::new(0, 16, 3).unwrap();
        let mut out = vec![9.0; 256];
        digits.read(2, AugmentKey::default(), &mut out).unwrap();
        for (value, &byte) in out.iter().zip(bytes(&digits, 2)) {
            assert_eq!(*value, f32::from(byte) / 255.0 * 2.0 - 1.0);
        }
        assert_eq!(out[0], -1.0);
    }

    #[test]
    fn digits_can_be_cropped_and_flipped() {
        let options = DataOptions {
            size: Some((16, 16)),
            random_crop_scale: Some([0.5, 0.9]),
            horizontal_flip: true,
            ..DataOptions::default()
        };
        let (plain, augmented) =
            (Digits::new(0, 16, 3).unwrap(), Digits::with_options(0, 16, 3, &options).unwrap());
        let read = |digits: &Digits, epoch| {
            let mut out = vec![9.0; 256];
            digits.read(2, AugmentKey { seed: 0, epoch }, &mut out).unwrap();
            out
        };
        assert_eq!(read(&plain, 0), read(&plain, 1));
        assert_ne!(read(&augmented, 0), read(&augmented, 1));
        assert_eq!(read(&augmented, 1), read(&augmented, 1));
    }

    #[test]
    fn sizes_and_counts_out_of_range_are_rejected() {
        for (size, count) in [(11, 5), (65, 5), (16, 0), (16, usize::MAX)] {
            assert!(matches!(Digits::new(0, size, count), Err(Error::Option { .. })), "{size} {count}");
        }
    }
}
