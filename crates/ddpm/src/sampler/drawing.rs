//! What all samplers do: ask the network, hold the expected image within bounds, add vectors.

pub(crate) use super::vectors::{EPS, LEARNED, X, X_0, Z, own};
use super::vectors::{HostVectors, OUTPUT, Resident};
use super::{SampleStep, Seeds, Shown};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::process::{Prediction, no_signal};
use crate::schedule::Level;
use ddpm_engine::rng::Purpose;
use ddpm_engine::vectors::MOST_TERMS;
use ddpm_engine::{Draws, Vector, Vectors};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::cell::{LazyCell, RefCell};

/// Part of an image's numbers that [`Threshold::Dynamic`] leaves in their range (Saharia et al. 2022 have 0.995).
const DYNAMIC_PART: f64 = 0.995;

/// What is done about an expected image that leaves [-1, 1], where images live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Threshold {
    /// Nothing.
    None,
    /// Each number is held within, as Ho et al.'s program does.
    #[default]
    Clip,
    /// Dynamic thresholding: numbers are held within [-s, s] and divided by s, where s is such that 99.5 % of the image's
    /// numbers are within, and at least 1 (Saharia et al., "Photorealistic Text-to-Image Diffusion Models", 2022,
    /// section 2.3).
    Dynamic,
}

impl Threshold {
    /// Its name in the settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Clip => "clip",
            Self::Dynamic => "dynamic",
        }
    }

    /// Applies it to one image.
    pub(crate) fn apply(self, image: &mut [f32]) {
        if self != Self::None {
            hold(image, self.part());
        }
    }

    /// The part of an image's numbers that it leaves in their range, where it asks for one.
    fn part(self) -> Option<f64> {
        (self == Self::Dynamic).then_some(DYNAMIC_PART)
    }
}

/// Holds an image's numbers within [-s, s], and divides them by s: 1, or what `part` of them do not exceed, if that is more.
pub(super) fn hold(image: &mut [f32], part: Option<f64>) {
    let most = part.map_or(1.0, |part| quantile(image, part).max(1.0));
    image.iter_mut().for_each(|x| *x = x.clamp(-most, most) / most);
}

/// The size that a part of all numbers do not exceed, between two linearly.
fn quantile(numbers: &[f32], part: f64) -> f32 {
    let mut sizes: Vec<f32> = numbers.iter().map(|x| x.abs()).collect();
    sizes.sort_unstable_by(f32::total_cmp);
    let Some(last) = sizes.len().checked_sub(1) else { return 0.0 };
    let at = part * last as f64;
    let (low, high) = (sizes[at.floor() as usize], sizes[at.ceil() as usize]);
    low + (high - low) * at.fract() as f32
}

/// `x = keep x + sum of c y`, each number in f64 and rounded once.
pub(crate) fn blend<const N: usize>(x: &mut [f32], keep: f64, terms: [(f64, &[f32]); N]) {
    for (i, x) in x.iter_mut().enumerate() {
        let mut sum = keep * f64::from(*x);
        for (c, y) in terms {
            sum += c * f64::from(y[i]);
        }
        *x = sum as f32;
    }
}

/// Where a batch on its way is: with a network that is asked through the host's memory, or with one that has its own.
enum Place<'a> {
    Host(&'a mut dyn Denoiser, HostVectors),
    Device(&'a mut dyn Resident),
}

impl Place<'_> {
    fn vectors(&mut self) -> Result<&mut dyn Vectors> {
        match self {
            Self::Host(_, vectors) => Ok(vectors),
            Self::Device(network) => network.vectors(),
        }
    }
}

/// A batch on its way from noise to images: vectors with names ([`X`] and so on), and what samplers do with them.
pub(crate) struct Drawing<'a> {
    place: Place<'a>,
    on_step: &'a mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    prediction: Prediction,
    len: usize,
    seeds: Seeds,
    threshold: Threshold,
    steps: usize,
    done: usize,
}

impl<'a> Drawing<'a> {
    /// A batch for so many steps: one that is given, or else pure noise.
    ///
    /// # Panics
    /// If `start` has another length than the denoiser's batches.
    pub fn new(
        start: Option<&[f32]>,
        denoiser: &'a mut dyn Denoiser,
        seeds: Seeds,
        threshold: Threshold,
        steps: usize,
        on_step: &'a mut dyn FnMut(SampleStep<'_>) -> Result<()>,
    ) -> Result<Self> {
        let (batch, image) = (denoiser.batch(), denoiser.image_len());
        let (prediction, len) = (denoiser.prediction(), batch * image);
        let place = match denoiser.resident().is_some() {
            true => Place::Device(denoiser.resident().expect("a denoiser stays where it is")),
            false => Place::Host(denoiser, HostVectors::new(batch, image)),
        };
        let mut d = Self { place, on_step, prediction, len, seeds, threshold, steps, done: 0 };
        match start {
            Some(start) => {
                assert_eq!(start.len(), len, "a batch of another length");
                d.place.vectors()?.write(X, start)?;
            }
            None => d.draw(X, Purpose::SampleStart, 0)?,
        }
        Ok(d)
    }

    /// Asks the network what it expects of [`X`] at a level: makes [`X_0`].
    pub fn denoise(&mut self, level: Level) -> Result<()> {
        if self.prediction == Prediction::Eps && level.alpha == 0.0 {
            return Err(no_signal(level.t));
        }
        match &mut self.place {
            Place::Host(denoiser, vectors) => {
                vectors.change(OUTPUT, |output, all| denoiser.predict(all.numbers(X), level.t, output))?;
            }
            Place::Device(network) => network.predict_vector(X, level.t, OUTPUT)?,
        }
        self.meant(X_0, self.prediction.terms_of_x_0(level.alpha, level.sigma))?;
        if self.threshold != Threshold::None {
            self.place.vectors()?.threshold(X_0, self.threshold.part())?;
        }
        Ok(())
    }

    /// Makes [`EPS`] the noise that the network expected when it was asked, at this level; [`X`] is still what it was.
    pub fn predict_eps(&mut self, level: Level) -> Result<()> {
        self.meant(EPS, self.prediction.terms_of_eps(level.alpha, level.sigma))
    }

    /// What x and the network's output mean, by the terms of [`Prediction`]. A term of factor 0 is left out: at the ends of
    /// the schedule (`alpha` or `sigma` 0) v is the other one's alone, with its own factor, as `x_0 = -v` where `alpha` is 0.
    fn meant(&mut self, to: Vector, [of_x, of_output, divisor]: [f64; 3]) -> Result<()> {
        let vectors = self.place.vectors()?;
        let made = if of_x == 0.0 {
            vectors.mix(to, &[(of_output, OUTPUT)], divisor)
        } else if of_output == 0.0 {
            vectors.mix(to, &[(of_x, X)], divisor)
        } else {
            vectors.mix(to, &[(of_x, X), (of_output, OUTPUT)], divisor)
        };
        Ok(made?)
    }

    /// Makes [`EPS`] what is left of [`X`] beside [`X_0`], which a threshold may have changed.
    pub fn noise_beside_image(&mut self, level: Level) -> Result<()> {
        Ok(self.place.vectors()?.mix(EPS, &[(1.0, X), (-level.alpha, X_0)], level.sigma)?)
    }

    /// `to = keep to + sum of c y`, each number in f64 and rounded once.
    pub fn blend<const N: usize>(&mut self, to: Vector, keep: f64, terms: [(f64, Vector); N]) -> Result<()> {
        const { assert!(N < MOST_TERMS, "and `to` itself") };
        let mut all = [(keep, to); MOST_TERMS];
        all[1..=N].copy_from_slice(&terms);
        Ok(self.place.vectors()?.mix(to, &all[..=N], 1.0)?)
    }

    /// `to = from`.
    pub fn copy(&mut self, to: Vector, from: Vector) -> Result<()> {
        Ok(self.place.vectors()?.copy(to, from)?)
    }

    /// `to = 0`.
    pub fn clear(&mut self, to: Vector) -> Result<()> {
        Ok(self.place.vectors()?.mix(to, &[], 1.0)?)
    }

    /// Draws standard normal numbers, those of [`Seeds::fill`].
    pub fn draw(&mut self, to: Vector, purpose: Purpose, step: u32) -> Result<()> {
        let draws = Draws { seed: self.seeds.seed, step, first_index: self.seeds.first };
        Ok(self.place.vectors()?.normal(to, draws, purpose)?)
    }

    /// Draws [`Z`] for the step that is being made.
    pub fn draw_noise(&mut self) -> Result<()> {
        self.draw(Z, Purpose::SampleNoise, (self.steps - self.done - 1) as u32)
    }

    /// Makes [`LEARNED`] the noise [`Z`] with the variance that the network told when it was asked last, between two given ones
    /// (Nichol, Dhariwal 2021, eq. 15); whether it told any.
    pub fn learned_noise(&mut self, small: f64, large: f64) -> Result<bool> {
        let told = match &mut self.place {
            Place::Device(network) => network.bring_variance(LEARNED)?,
            Place::Host(denoiser, vectors) => match denoiser.variance() {
                Some(variance) => vectors.write(LEARNED, variance).map(|()| true)?,
                None => false,
            },
        };
        if told {
            self.place.vectors()?.apply_learned_std(LEARNED, Z, [small.ln(), large.ln()])?;
        }
        Ok(told)
    }

    /// The numbers of a vector.
    pub fn numbers(&mut self, v: Vector) -> Result<Cow<'_, [f32]>> {
        match &mut self.place {
            Place::Host(_, vectors) => Ok(Cow::Borrowed(vectors.numbers(v))),
            Place::Device(network) => {
                let mut numbers = vec![0.0; self.len];
                network.vectors()?.read(v, &mut numbers)?;
                Ok(Cow::Owned(numbers))
            }
        }
    }

    /// Changes [`X`] on the host, with another vector at hand.
    pub fn change_x(&mut self, beside: Vector, change: impl FnOnce(&mut [f32], &[f32])) -> Result<()> {
        if let Place::Host(_, vectors) = &mut self.place {
            vectors.change(X, |x, all| change(x, all.numbers(beside)));
            return Ok(());
        }
        let (mut x, beside) = (self.numbers(X)?.into_owned(), self.numbers(beside)?.into_owned());
        change(&mut x, &beside);
        Ok(self.place.vectors()?.write(X, &x)?)
    }

    /// Ends a step that began at a level.
    pub fn step(&mut self, from: Level) -> Result<()> {
        self.done += 1;
        let (t, done, steps, len) = (from.t, self.done, self.steps, self.len);
        let network = match &mut self.place {
            Place::Host(_, vectors) => {
                let (x, x_0) = (vectors.numbers(X), vectors.numbers(X_0));
                return (self.on_step)(SampleStep { t, done, steps, x: Shown(&x), x_0: Shown(&x_0) });
            }
            Place::Device(network) => network,
        };
        network.vectors()?.pace()?;
        let (network, failed) = (RefCell::new(network), RefCell::new(None));
        let read = |v: Vector| {
            let mut numbers = vec![0.0; len];
            let read = network.borrow_mut().vectors().and_then(|all| Ok(all.read(v, &mut numbers)?));
            read.unwrap_or_else(|error| *failed.borrow_mut() = Some(error));
            numbers
        };
        let (x, x_0) = (LazyCell::new(|| read(X)), LazyCell::new(|| read(X_0)));
        let told = (self.on_step)(SampleStep { t, done, steps, x: Shown(&x), x_0: Shown(&x_0) });
        // What was shown is worth nothing then.
        failed.take().map_or(told, Err)
    }

    /// The batch, at the end.
    pub fn finish(self) -> Result<Vec<f32>> {
        match self.place {
            Place::Host(_, vectors) => Ok(vectors.into_numbers(X)),
            Place::Device(network) => {
                let mut x = vec![0.0; self.len];
                network.vectors()?.read(X, &mut x)?;
                Ok(x)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_thresholds_follow_the_image() {
        let image: Vec<f32> = (0..201).map(|i| (i as f32 - 100.0) / 50.0).collect();
        let with = |threshold: Threshold| {
            let mut p = image.clone();
            threshold.apply(&mut p);
            p
        };
        assert_eq!(with(Threshold::None), image);
        assert_eq!(with(Threshold::Clip)[..3], [-1.0; 3]);
        // The sizes are 0, then each of 1/50 .. 100/50 twice; 0.995 of the way from the first to the last of 201 is
        // number 199, and that is 2.
        assert_eq!(with(Threshold::Dynamic)[25], image[25] / 2.0);
        let mut small = [0.25, -0.5];
        Threshold::Dynamic.apply(&mut small);
        assert_eq!(small, [0.25, -0.5], "nothing is enlarged");
        assert_eq!(quantile(&[4.0, -1.0, 2.0], 0.75), 3.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    /// Says the same of every image.
    struct Says(Prediction, f32);

    impl Denoiser for Says {
        fn batch(&self) -> usize {
            1
        }

        fn image_len(&self) -> usize {
            1
        }

        fn prediction(&self) -> Prediction {
            self.0
        }

        fn predict(&mut self, _: &[f32], _: f64, output: &mut [f32]) -> Result<()> {
            output.fill(self.1);
            Ok(())
        }
    }

    #[test]
    fn at_both_ends_of_the_schedule_outputs_mean_what_the_equations_say() {
        let noise = Level { t: 9.0, alpha: 0.0, sigma: 1.0 };
        let (x, said) = (0.75f32, 0.3f32);
        let meant = |prediction, level: Level| {
            let (mut says, seeds) = (Says(prediction, said), Seeds { seed: 0, first: 0 });
            let mut on_step = |_: SampleStep<'_>| Ok(());
            let mut d = Drawing::new(Some(&[x]), &mut says, seeds, Threshold::None, 1, &mut on_step)?;
            d.denoise(level)?;
            d.predict_eps(level)?;
            Ok::<_, crate::Error>([X_0, EPS].map(|v| d.numbers(v).unwrap()[0]))
        };
        // x_0 = alpha x - sigma v, eps = sigma x + alpha v.
        assert_eq!(meant(Prediction::V, noise).unwrap(), [-said, x]);
        assert_eq!(meant(Prediction::V, Level::CLEAN).unwrap(), [x, said]);
        // eps = (x - alpha x_0) / sigma.
        assert_eq!(meant(Prediction::X0, noise).unwrap(), [said, x]);
        assert_eq!(meant(Prediction::X0, Level::CLEAN).unwrap()[0], said);
        // x_0 = (x - sigma eps) / alpha, of which nothing is known where there is no signal.
        assert_eq!(meant(Prediction::Eps, Level::CLEAN).unwrap(), [x, said]);
        assert!(meant(Prediction::Eps, noise).unwrap_err().to_string().contains("says nothing"));
        // By all that convert.
        for prediction in [Prediction::X0, Prediction::V] {
            let (of_x, of_output) = prediction.to_x_0(noise);
            let by_factors = of_x * f64::from(x) + of_output * f64::from(said);
            assert_eq!(by_factors, prediction.x_0(noise, f64::from(x), f64::from(said)));
            assert_eq!(by_factors as f32, meant(prediction, noise).unwrap()[0]);
        }
    }

    #[test]
    fn blending_keeps_and_adds() {
        let mut x = [1.0, 2.0];
        blend(&mut x, 0.5, [(2.0, &[1.0, 0.0]), (-1.0, &[0.0, 4.0])]);
        assert_eq!(x, [2.5, -3.0]);
    }
}
