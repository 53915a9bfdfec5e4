//! Which image is read when, and which random transforms it gets: functions of (seed, epoch, index).

use ddpm_engine::rng::{Purpose, Stream, permutation};

/// What the random transforms of a reading depend on besides the image's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draw {
    /// The seed of the run.
    pub seed: u64,
    /// How often the whole set was gone through before.
    pub epoch: u32,
}

impl Draw {
    /// The random numbers for the transforms of image `index`.
    pub fn stream(&self, index: usize) -> Stream {
        Stream::new(self.seed, Purpose::Augment, self.epoch, index as u32)
    }
}

/// An image's turn in a training run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// How often the whole set was gone through before.
    pub epoch: u32,
    /// The image's number.
    pub index: usize,
}

impl Turn {
    /// What its random transforms depend on, in a run of this seed.
    pub fn draw(&self, seed: u64) -> Draw {
        Draw { seed, epoch: self.epoch }
    }
}

/// Which image is the g-th of a training run: epoch `g / n` goes through all `n` in its own shuffled order, so a
/// batch may span two epochs and none is ever cut short.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    n: usize,
    epoch: Option<u32>,
    permutation: Vec<u32>,
}

impl Order {
    /// The order of `n` images under `seed`.
    ///
    /// # Panics
    /// If `n` is 0 or not below 2^32; [`open`](super::open) returns no such set.
    pub fn new(seed: u64, n: usize) -> Self {
        assert!(n > 0 && u32::try_from(n).is_ok(), "{n} images cannot be ordered");
        Self { seed, n, epoch: None, permutation: Vec::new() }
    }

    /// Whose turn it is at `position`, counted from the start of the run. Going forward is fast: the current
    /// epoch's order is kept.
    pub fn turn(&mut self, position: u64) -> Turn {
        let (epoch, place) = ((position / self.n as u64) as u32, position % self.n as u64);
        if self.epoch != Some(epoch) {
            self.permutation = permutation(self.seed, epoch, self.n);
            self.epoch = Some(epoch);
        }
        Turn { epoch, index: self.permutation[place as usize] as usize }
    }

    /// The images of the batch of this number: positions `number * batch_size` and on.
    pub fn batch(&mut self, number: u64, batch_size: usize) -> Vec<Turn> {
        let first = number * batch_size as u64;
        (first..first + batch_size as u64).map(|position| self.turn(position)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_goes_through_every_epoch_once_and_batches_run_on_into_the_next() {
        let mut order = Order::new(5, 7);
        let seen: Vec<_> = (0..21).map(|g| order.turn(g)).collect();
        for (epoch, part) in seen.chunks(7).enumerate() {
            let expected = permutation(5, epoch as u32, 7);
            assert_eq!(part.iter().map(|t| t.index as u32).collect::<Vec<_>>(), expected);
            assert!(part.iter().all(|t| t.epoch == epoch as u32));
        }
        let batches: Vec<_> = (0..5).flat_map(|number| order.batch(number, 4)).collect();
        assert_eq!(batches, seen[..20]);
        // A position's image does not depend on what was asked before.
        assert_eq!(order.turn(3), seen[3]);
        assert_eq!(Order::new(5, 7).batch(2, 4), seen[8..12]);
    }

    #[test]
    fn transforms_differ_by_seed_epoch_and_image() {
        let word = |seed, epoch, index| Draw { seed, epoch }.stream(index).word(0);
        let words = [word(0, 0, 0), word(1, 0, 0), word(0, 1, 0), word(0, 0, 1)];
        let distinct: std::collections::HashSet<_> = words.iter().collect();
        assert_eq!(distinct.len(), 4);
        assert_eq!(word(0, 0, 0), words[0]);
    }
}
