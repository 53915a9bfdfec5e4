//! The decay of the averaged weights.

use crate::config::{EmaConfig, EmaKind};

/// Maximum half-life as a fraction of the images seen so far (`ema_rampup_ratio` in the code of Karras et al. 2022).
const RAMP_UP: f64 = 0.05;

/// The decay of the average in step `step`, counted from 0, of `images` images.
pub(super) fn decay(ema: &EmaConfig, step: u64, images: usize) -> f64 {
    decay_of(ema, ema.decay, step, images)
}

/// The same with `decay` instead of `ema.decay`.
pub(super) fn decay_of(ema: &EmaConfig, decay: f64, step: u64, images: usize) -> f64 {
    match ema.schedule {
        EmaKind::Fixed => decay,
        // Starts low, so that early samples do not show the initial weights.
        EmaKind::WarmUp => decay.min((1.0 + step as f64) / (10.0 + step as f64)),
        EmaKind::HalfLife => {
            let images = images as f64;
            let half_life = ema.half_life.min(step as f64 * images * RAMP_UP);
            0.5f64.powf(images / half_life.max(1e-8))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decay_follows_the_settings() {
        let with = |schedule| EmaConfig { schedule, decay: 0.99, half_life: 1000.0, ..EmaConfig::default() };
        let fixed = with(EmaKind::Fixed);
        assert_eq!((decay(&fixed, 0, 64), decay(&fixed, 10_000, 64)), (0.99, 0.99));
        let warm = with(EmaKind::WarmUp);
        assert_eq!((decay(&warm, 0, 64), decay(&warm, 90, 64), decay(&warm, 10_000, 64)), (0.1, 0.91, 0.99));
        let half = with(EmaKind::HalfLife);
        // The first step copies the weights; from 20,000 images on, the half-life is 1000 images.
        assert_eq!(decay(&half, 0, 50), 0.0);
        let kept: f64 = (400..420).map(|step| decay(&half, step, 50)).product();
        assert!((kept - 0.5).abs() < 1e-12, "{kept}");
        // After 2000 images the half-life is 100 images.
        assert_eq!(decay(&half, 40, 50), 0.5f64.sqrt());
    }
}
