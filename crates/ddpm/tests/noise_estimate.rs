//! The noise estimate on images of a data set.

use ddpm::data::digits::Digits;
use ddpm::data::{AugmentKey, Dataset};
use ddpm::edit::estimate;
use ddpm_rng::{Purpose, Stream};

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
fn noise_clipped_at_black_is_estimated_too() {
    const N: usize = 40;
    let digits = Digits::new(1, 28, N).unwrap();
    let shape = digits.shape();
    let estimate = |image: &[f32]| estimate(image, [shape.height, shape.width, shape.channels]);
    let mut image = vec![0.0; shape.num_elements()];
    for sigma in [0.05, 0.1, 0.2] {
        let (mut sum, mut squares) = (0.0, 0.0);
        for i in 0..N {
            digits.read(i, AugmentKey::default(), &mut image).unwrap();
            assert_eq!(estimate(&image).sigma, 0.0, "a clean digit has none");
            let z = normal(image.len(), 1 + i as u32);
            let noisy = |(x, z): (&f32, &f32)| eight_bits(f64::from(*x) + 2.0 * sigma * f64::from(*z));
            let noisy: Vec<f32> = image.iter().zip(&z).map(noisy).collect();
            let found = estimate(&noisy);
            assert!(!found.pattern, "{sigma}: {found:?}");
            let off = found.sigma / sigma - 1.0;
            (sum, squares) = (sum + off, squares + off * off);
        }
        let (mean, typical) = (sum / N as f64, (squares / N as f64).sqrt());
        println!("clipped, {sigma}: off by {mean:+.3} in the mean, {typical:.3} typically");
        // Of about 400 neighbours of black, half are clipped, plus or minus 5 %, which changes the
        // estimate by 17 %; edges add a little.
        assert!(mean.abs() < 0.08 && typical < 0.2, "{sigma}: {mean}, {typical}");
    }
}
