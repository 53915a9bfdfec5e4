//! The order in which images are read, and the RNG keys of their augmentation: functions of (seed, epoch, index).

use ddpm_rng::{Purpose, Stream, permutation};

/// What augmentation depends on besides the image's index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AugmentKey {
    /// The seed of the run.
    pub seed: u64,
    /// The epoch, from 0.
    pub epoch: u32,
}

impl AugmentKey {
    /// The random stream for the transforms of image `index`.
    pub fn stream(&self, index: usize) -> Stream {
        Stream::new(self.seed, Purpose::Augment, self.epoch, index as u32)
    }
}

/// One position in the training order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleIndex {
    /// The epoch, from 0.
    pub epoch: u32,
    /// The image's index in the data set.
    pub index: usize,
}

impl SampleIndex {
    /// The augmentation key in a run with this seed.
    pub fn augment_key(&self, seed: u64) -> AugmentKey {
        AugmentKey { seed, epoch: self.epoch }
    }
}

/// The training order: position `g` belongs to epoch `g / n`, and each epoch visits all `n` images in its own shuffled
/// order. A batch may span two epochs, so all batches are full.
#[derive(Clone, Debug)]
pub struct ShuffledSampler {
    seed: u64,
    n: usize,
    epoch: Option<u32>,
    permutation: Vec<u32>,
}

impl ShuffledSampler {
    /// The order of `n` images for `seed`.
    ///
    /// # Panics
    /// If `n` is 0 or not below 2^32; [`open`](super::open) never returns such a data set.
    pub fn new(seed: u64, n: usize) -> Self {
        assert!(n > 0 && u32::try_from(n).is_ok(), "cannot shuffle {n} images");
        Self { seed, n, epoch: None, permutation: Vec::new() }
    }

    /// The sample at `position`, counted from the start of the run. Sequential access is fast: the permutation of the
    /// current epoch is cached.
    pub fn sample_at(&mut self, position: u64) -> SampleIndex {
        let (epoch, offset) = ((position / self.n as u64) as u32, position % self.n as u64);
        if self.epoch != Some(epoch) {
            self.permutation = permutation(self.seed, epoch, self.n);
            self.epoch = Some(epoch);
        }
        SampleIndex { epoch, index: self.permutation[offset as usize] as usize }
    }

    /// The samples of batch `number`: `batch_size` positions starting at `number * batch_size`.
    pub fn batch(&mut self, number: u64, batch_size: usize) -> Vec<SampleIndex> {
        let first = number * batch_size as u64;
        (first..first + batch_size as u64).map(|position| self.sample_at(position)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_each_image_once_and_batches_span_epochs() {
        let mut sampler = ShuffledSampler::new(5, 7);
        let seen: Vec<_> = (0..21).map(|g| sampler.sample_at(g)).collect();
        for (epoch, part) in seen.chunks(7).enumerate() {
            let expected = permutation(5, epoch as u32, 7);
            assert_eq!(part.iter().map(|t| t.index as u32).collect::<Vec<_>>(), expected);
            assert!(part.iter().all(|t| t.epoch == epoch as u32));
        }
        let batches: Vec<_> = (0..5).flat_map(|number| sampler.batch(number, 4)).collect();
        assert_eq!(batches, seen[..20]);
        // Random access does not depend on earlier calls.
        assert_eq!(sampler.sample_at(3), seen[3]);
        assert_eq!(ShuffledSampler::new(5, 7).batch(2, 4), seen[8..12]);
    }

    #[test]
    fn transforms_differ_by_seed_epoch_and_image() {
        let word = |seed, epoch, index| AugmentKey { seed, epoch }.stream(index).word(0);
        let words = [word(0, 0, 0), word(1, 0, 0), word(0, 1, 0), word(0, 0, 1)];
        let distinct: std::collections::HashSet<_> = words.iter().collect();
        assert_eq!(distinct.len(), 4);
        assert_eq!(word(0, 0, 0), words[0]);
    }
}
