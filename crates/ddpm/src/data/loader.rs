//! Reading ahead: the coming batches are prepared beside the training, on threads of their own.
//!
//! What is in a batch is a function of the set, the seed and the batch's number; the threads only decide when it is
//! ready. Thread `k` of `n` prepares the batches `first + k`, `first + k + n` and so on, each into its own short queue,
//! so that batches come in their order without any being waited for twice.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Dataset, Order};
use crate::error::{Error, Result};
use crate::memory;

/// Batches that a thread prepares ahead, besides the one it is at.
const AHEAD: usize = 2;
/// Most threads: decoding for one network needs no more, and each holds batches.
const MAX_THREADS: usize = 8;
/// Time between two looks at whether a batch is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Images for one run of the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The batch's number, counted from the start of the training.
    pub number: u64,
    /// The images one after the other (batch, height, width, channels), in [-1, 1].
    pub images: Vec<f32>,
    /// Their classes; empty when the set has none.
    pub labels: Vec<u32>,
}

/// Prepares the batches of a training.
pub struct Loader {
    data: Arc<dyn Dataset>,
    seed: u64,
    batch_size: usize,
    threads: usize,
    running: Option<Running>,
    stop: Arc<AtomicBool>,
}

/// The threads that prepare batches, and the number of the next batch that is handed out.
struct Running {
    next: u64,
    stop: Arc<AtomicBool>,
    workers: Vec<(Receiver<Result<Batch>>, JoinHandle<()>)>,
}

impl Loader {
    /// Batches of `batch_size` images of `data` in the [`Order`] of `seed`. Nothing is read before the first
    /// [`batch`](Self::batch).
    pub fn new(data: Arc<dyn Dataset>, seed: u64, batch_size: usize) -> Self {
        // What is in memory needs no more than a crop; decoding takes what the machine has.
        let threads = match data.summary().memory_bytes > 0 {
            true => 2,
            false => thread::available_parallelism().map_or(1, usize::from),
        };
        let threads = threads.min(MAX_THREADS);
        Self { data, seed, batch_size, threads, running: None, stop: Arc::default() }
    }

    /// A flag that ends the waiting for a batch, with [`Error::Interrupted`].
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// With another number of threads, which changes no batch.
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads: threads.clamp(1, MAX_THREADS), ..self }
    }

    /// Bytes that prepared batches take.
    pub fn memory(&self) -> u64 {
        let batch = self.batch_size * self.data.shape().values() * size_of::<f32>();
        (self.threads * (AHEAD + 1) * batch) as u64
    }

    /// The batch of this number. The numbers after it are prepared meanwhile; asking for any other is right too, and
    /// waits.
    ///
    /// # Errors
    /// The error of the first image of the batch that cannot be read; [`Error::Interrupted`] where it was asked to stop.
    ///
    /// # Panics
    /// If the data set does.
    pub fn batch(&mut self, number: u64) -> Result<Batch> {
        let mut running = match self.running.take() {
            Some(running) if running.next == number => running,
            _ => self.start(number)?,
        };
        // The thread whose turn it is stands in front.
        let received = loop {
            match running.workers[0].0.recv_timeout(LOOK_EVERY) {
                Err(RecvTimeoutError::Timeout) if self.stop.load(Ordering::Relaxed) => {
                    return Err(Error::Interrupted);
                }
                Err(RecvTimeoutError::Timeout) => {}
                received => break received,
            }
        };
        match received {
            Ok(Ok(batch)) => {
                running.workers.rotate_left(1);
                running.next += 1;
                debug_assert_eq!(batch.number, number);
                self.running = Some(running);
                Ok(batch)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => match running.workers.swap_remove(0).1.join() {
                Err(panic) => resume_unwind(panic),
                // It ends only when it is told to, or after an error that was handed out.
                Ok(()) => Err(Error::Interrupted),
            },
        }
    }

    fn start(&self, first: u64) -> Result<Running> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Running { next: first, stop: stop.clone(), workers: Vec::new() };
        for k in 0..self.threads as u64 {
            let (sender, receiver) = sync_channel(AHEAD);
            let worker = Worker {
                data: self.data.clone(),
                order: Order::new(self.seed, self.data.len()),
                seed: self.seed,
                batch_size: self.batch_size,
                stop: stop.clone(),
            };
            let step = self.threads as u64;
            let handle = thread::Builder::new()
                .name(format!("loader-{k}"))
                .spawn(move || worker.work(first + k, step, &sender))
                .map_err(Error::io(&self.data.summary().source, "start a thread that reads the images"))?;
            running.workers.push((receiver, handle));
        }
        Ok(running)
    }
}

impl Drop for Running {
    /// The threads end at their next image. They are not waited for: a slow disk must not hold up the end.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    data: Arc<dyn Dataset>,
    order: Order,
    seed: u64,
    batch_size: usize,
    stop: Arc<AtomicBool>,
}

impl Worker {
    /// Prepares the batches `first`, `first + step` and so on until nobody wants them any more.
    fn work(mut self, first: u64, step: u64, out: &SyncSender<Result<Batch>>) {
        for number in (first..).step_by(step as usize) {
            let batch = match self.prepare(number) {
                Ok(None) => return,
                Ok(Some(batch)) => Ok(batch),
                Err(error) => Err(error),
            };
            let last = batch.is_err();
            if out.send(batch).is_err() || last {
                return;
            }
        }
    }

    /// The batch, unless it is told to stop.
    fn prepare(&mut self, number: u64) -> Result<Option<Batch>> {
        let values = self.data.shape().values();
        let mut images = memory::zeros(self.batch_size * values, "a batch of images")?;
        let mut labels = Vec::new();
        let turns = self.order.batch(number, self.batch_size);
        for (turn, out) in turns.into_iter().zip(images.chunks_exact_mut(values)) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.data.read(turn.index, turn.draw(self.seed), out)?;
            labels.extend(self.data.label(turn.index));
        }
        Ok(Some(Batch { number, images, labels }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::digits::Digits;
    use super::super::{DataOptions, Draw, ImageShape, Summary, open_within};
    use super::*;
    use image::{GrayImage, Luma};

    fn augmented() -> DataOptions {
        DataOptions {
            size: Some((16, 16)),
            random_crop_scale: Some([0.5, 1.0]),
            horizontal_flip: true,
            ..DataOptions::default()
        }
    }

    /// Batches read one by one, on this thread.
    fn plainly(data: &dyn Dataset, seed: u64, size: usize, numbers: std::ops::Range<u64>) -> Vec<Batch> {
        let mut order = Order::new(seed, data.len());
        let one = |number| {
            let mut batch = Batch { number, images: Vec::new(), labels: Vec::new() };
            for turn in order.batch(number, size) {
                let mut out = vec![0.0; data.shape().values()];
                data.read(turn.index, turn.draw(seed), &mut out).unwrap();
                batch.images.extend(out);
                batch.labels.extend(data.label(turn.index));
            }
            batch
        };
        numbers.map(one).collect()
    }

    #[test]
    fn the_batches_are_those_that_are_read_one_by_one_whatever_the_threads() {
        // Twenty images in batches of seven: epochs end within batches.
        let data: Arc<dyn Dataset> = Arc::new(Digits::with_options(0, 16, 20, &augmented()).unwrap());
        let expected = plainly(&*data, 5, 7, 0..12);
        assert!(expected.iter().all(|b| b.labels.len() == 7));
        for threads in [1, 2, 3, 8] {
            let mut loader = Loader::new(data.clone(), 5, 7).with_threads(threads);
            for batch in &expected {
                assert_eq!(loader.batch(batch.number).unwrap(), *batch, "{threads} threads");
            }
            // Taken up elsewhere, and back.
            for number in [9, 10, 3, 4, 3] {
                assert_eq!(loader.batch(number).unwrap(), expected[number as usize]);
            }
        }
    }

    #[test]
    fn an_image_that_goes_is_named_at_the_batch_that_needs_it_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..6u8 {
            let image = GrayImage::from_fn(8, 8, |x, y| Luma([i * 40 + (x * y) as u8]));
            image.save(folder.path().join(format!("{i}.png"))).unwrap();
        }
        // Nothing is kept in memory.
        let data: Arc<dyn Dataset> =
            Arc::from(open_within(folder.path(), &DataOptions::default(), 0).unwrap());
        let expected = plainly(&*data, 1, 2, 0..3);
        let lost = Order::new(1, 6).batch(1, 2)[1].index;
        std::fs::remove_file(folder.path().join(format!("{lost}.png"))).unwrap();
        for threads in [1, 2, 4] {
            let mut loader = Loader::new(data.clone(), 1, 2).with_threads(threads);
            assert_eq!(loader.batch(0).unwrap(), expected[0]);
            for _ in 0..2 {
                let text = loader.batch(1).unwrap_err().to_string();
                assert!(
                    text.contains(&format!("{lost}.png")) && text.contains("has changed since"),
                    "{text}"
                );
            }
            assert_eq!(loader.batch(2).unwrap(), expected[2]);
            assert!(loader.batch(2).unwrap().labels.is_empty());
        }
    }

    /// Fails by panicking, as a data set of a user's own may.
    struct Broken(Summary);

    impl Dataset for Broken {
        fn classes(&self) -> &[String] {
            &[]
        }
        fn label(&self, _: usize) -> Option<u32> {
            None
        }
        fn read(&self, _: usize, _: Draw, _: &mut [f32]) -> Result<()> {
            panic!("broken on purpose")
        }
        fn summary(&self) -> &Summary {
            &self.0
        }
    }

    #[test]
    fn a_panic_of_the_data_set_is_the_caller_s() {
        let digits = Digits::new(0, 16, 3).unwrap();
        let data = Broken(digits.summary().clone());
        assert_eq!(data.shape(), ImageShape { height: 16, width: 16, channels: 1 });
        let mut loader = Loader::new(Arc::new(data), 0, 2);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| loader.batch(0)));
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"broken on purpose"));
    }
}
