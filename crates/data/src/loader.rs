//! Prefetching: worker threads prepare the next batches while training runs.
//!
//! A batch is a function of the data set, the seed and the batch number; the threads only affect when it is ready.
//! Thread `k` of `n` prepares batches `first + k`, `first + k + n` and so on into its own short queue, so batches arrive
//! in order without a shared queue.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Dataset, ShuffledSampler};
use crate::error::{Error, Result};
use crate::memory;

/// Finished batches queued per thread, besides the one being prepared.
const PREFETCH: usize = 2;
/// Decoding for one network needs no more threads, and each one holds batches in memory.
const MAX_THREADS: usize = 8;
/// How often the stop flag is checked while waiting for a batch.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Images for one forward pass of the network.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The batch number, counted from the start of training.
    pub number: u64,
    /// The images (batch, height, width, channels), in [-1, 1].
    pub images: Vec<f32>,
    /// Their labels; empty if the data set has none.
    pub labels: Vec<u32>,
}

/// Prepares the training batches.
pub struct Loader {
    data: Arc<dyn Dataset>,
    seed: u64,
    batch_size: usize,
    threads: usize,
    running: Option<Running>,
    stop: Arc<AtomicBool>,
}

/// The worker threads, and the number of the next batch to return.
struct Running {
    next: u64,
    stop: Arc<AtomicBool>,
    workers: Vec<(Receiver<Result<Batch>>, JoinHandle<()>)>,
}

impl Loader {
    /// Batches of `batch_size` images of `data` in the order of a [`ShuffledSampler`] with `seed`. Nothing is read before
    /// the first call of [`batch`](Self::batch).
    pub fn new(data: Arc<dyn Dataset>, seed: u64, batch_size: usize) -> Self {
        // Images in memory are at most cropped; decoding from disk can use every core.
        let threads = if data.summary().memory_bytes > 0 {
            2
        } else {
            thread::available_parallelism().map_or(1, usize::from)
        };
        let threads = threads.min(MAX_THREADS);
        Self { data, seed, batch_size, threads, running: None, stop: Arc::default() }
    }

    /// Sets a flag that makes a waiting [`batch`](Self::batch) return [`Error::Interrupted`].
    pub fn set_stop(&mut self, stop: Arc<AtomicBool>) {
        self.stop = stop;
    }

    /// Sets the number of threads, which does not affect the contents of batches.
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads: threads.clamp(1, MAX_THREADS), ..self }
    }

    /// Bytes used by prefetched batches.
    pub fn memory(&self) -> u64 {
        let batch = self.batch_size * self.data.shape().num_elements() * size_of::<f32>();
        (self.threads * (PREFETCH + 1) * batch) as u64
    }

    /// Returns batch `number` and prefetches the ones after it. Requesting any other number next is allowed, but restarts
    /// the workers.
    ///
    /// # Errors
    /// The error of the first image of the batch that cannot be read; [`Error::Interrupted`] if the stop flag was set.
    ///
    /// # Panics
    /// If the data set panics.
    pub fn batch(&mut self, number: u64) -> Result<Batch> {
        let mut running = match self.running.take() {
            Some(running) if running.next == number => running,
            _ => self.start(number)?,
        };
        // The worker of the next batch is always the first.
        let received = loop {
            match running.workers[0].0.recv_timeout(POLL_INTERVAL) {
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
                // A worker ends only when asked to stop, or after sending an error.
                Ok(()) => Err(Error::Interrupted),
            },
        }
    }

    fn start(&self, first: u64) -> Result<Running> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = Running { next: first, stop: stop.clone(), workers: Vec::new() };
        for k in 0..self.threads as u64 {
            let (sender, receiver) = sync_channel(PREFETCH);
            let worker = Worker {
                data: self.data.clone(),
                sampler: ShuffledSampler::new(self.seed, self.data.len()),
                seed: self.seed,
                batch_size: self.batch_size,
                stop: stop.clone(),
            };
            let step = self.threads as u64;
            let handle = thread::Builder::new()
                .name(format!("loader-{k}"))
                .spawn(move || worker.work(first + k, step, &sender))
                .map_err(Error::io(&self.data.summary().source, "start a data loader thread"))?;
            running.workers.push((receiver, handle));
        }
        Ok(running)
    }
}

impl Drop for Running {
    /// The threads end at their next image. They are not joined: a slow disk must not delay shutdown.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    data: Arc<dyn Dataset>,
    sampler: ShuffledSampler,
    seed: u64,
    batch_size: usize,
    stop: Arc<AtomicBool>,
}

impl Worker {
    /// Prepares batches `first`, `first + step` and so on until an error occurs or the receiver is dropped.
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

    /// Prepares one batch; `None` if asked to stop.
    fn prepare(&mut self, number: u64) -> Result<Option<Batch>> {
        let values = self.data.shape().num_elements();
        let mut images = memory::try_zeros(self.batch_size * values, "a batch of images")?;
        let mut labels = Vec::new();
        let samples = self.sampler.batch(number, self.batch_size);
        for (sample, out) in samples.into_iter().zip(images.chunks_exact_mut(values)) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.data.read(sample.index, sample.augment_key(self.seed), out)?;
            labels.extend(self.data.label(sample.index));
        }
        Ok(Some(Batch { number, images, labels }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::digits::Digits;
    use super::super::{AugmentKey, DataOptions, ImageShape, open_within};
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

    /// Batches read on the current thread.
    fn read_directly(data: &dyn Dataset, seed: u64, size: usize, range: std::ops::Range<u64>) -> Vec<Batch> {
        let mut sampler = ShuffledSampler::new(seed, data.len());
        let one = |number| {
            let mut batch = Batch { number, images: Vec::new(), labels: Vec::new() };
            for sample in sampler.batch(number, size) {
                let mut out = vec![0.0; data.shape().num_elements()];
                data.read(sample.index, sample.augment_key(seed), &mut out).unwrap();
                batch.images.extend(out);
                batch.labels.extend(data.label(sample.index));
            }
            batch
        };
        range.map(one).collect()
    }

    #[test]
    fn batches_do_not_depend_on_the_number_of_threads() {
        // Twenty images in batches of seven: epochs end inside batches.
        let data: Arc<dyn Dataset> = Arc::new(Digits::with_options(0, 16, 20, &augmented()).unwrap());
        let expected = read_directly(&*data, 5, 7, 0..12);
        assert!(expected.iter().all(|b| b.labels.len() == 7));
        for threads in [1, 2, 3, 8] {
            let mut loader = Loader::new(data.clone(), 5, 7).with_threads(threads);
            for batch in &expected {
                assert_eq!(loader.batch(batch.number).unwrap(), *batch, "{threads} threads");
            }
            // Jumps forward and back.
            for number in [9, 10, 3, 4, 3] {
                assert_eq!(loader.batch(number).unwrap(), expected[number as usize]);
            }
        }
    }

    #[test]
    fn a_deleted_image_is_reported_only_by_the_batch_that_needs_it() {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..6u8 {
            let image = GrayImage::from_fn(8, 8, |x, y| Luma([i * 40 + (x * y) as u8]));
            image.save(folder.path().join(format!("{i}.png"))).unwrap();
        }
        // A limit of 0: nothing is kept in memory.
        let data: Arc<dyn Dataset> =
            Arc::from(open_within(folder.path(), &DataOptions::default(), 0).unwrap());
        let expected = read_directly(&*data, 1, 2, 0..3);
        let lost = ShuffledSampler::new(1, 6).batch(1, 2)[1].index;
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

    /// Panics on read, as a user's own data set may.
    struct Panicking;

    impl Dataset for Panicking {
        fn dims(&self) -> [usize; 4] {
            [130, 16, 16, 1]
        }
        fn read(&self, index: usize, _: AugmentKey, _: &mut [f32]) -> Result<()> {
            // Not one of those that the summary reads.
            assert!(index != 1, "broken on purpose");
            Ok(())
        }
    }

    #[test]
    fn a_panic_of_the_data_set_propagates_to_the_caller() {
        let data = Panicking;
        assert_eq!(data.shape(), ImageShape { height: 16, width: 16, channels: 1 });
        let mut loader = Loader::new(Arc::new(data), 0, 2);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..65).try_for_each(|number| loader.batch(number).map(drop))
        }));
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"broken on purpose"));
    }
}
