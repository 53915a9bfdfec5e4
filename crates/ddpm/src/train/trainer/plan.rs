//! The cost of training: memory and operations, known before the first step, and a quick measurement of the step time.

use super::{Prepared, Trainer};
use crate::config::Config;
use crate::data::ImageShape;
use crate::error::Result;
use ddpm_engine::{Executor, Footprint, RngKey, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The cost of training, known before the first step.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// Number of parameters of the network.
    pub parameters: usize,
    /// Bytes of the arena: weights, gradients, optimizer state, averages, activations.
    pub arena_bytes: u64,
    /// Bytes of the threads' scratch memory.
    pub scratch_bytes: u64,
    /// Bytes of the data set in memory and of the batches read ahead; 0 before the data set is open.
    pub data_bytes: u64,
    /// Bytes of one checkpoint on disk.
    pub checkpoint_bytes: u64,
    /// Floating-point operations of one step.
    pub flops: u64,
    /// Remaining steps; 0 before the data set is open.
    pub steps: u64,
    /// Description of the device.
    pub device: String,
}

impl TrainPlan {
    fn new(config: &Config, parameters: usize, footprint: Footprint, device: String) -> Self {
        let ema = &config.ema;
        let averages = ema.extra_decays.len() + ema.power_widths.len();
        let copies = if ema.decay > 0.0 { 4 } else { 3 } + averages;
        Self {
            parameters,
            arena_bytes: (footprint.arena_bytes + averages * parameters * 4) as u64,
            scratch_bytes: footprint.scratch_bytes as u64,
            data_bytes: 0,
            checkpoint_bytes: (copies * parameters * 4) as u64,
            flops: 2 * footprint.multiply_adds * config.train.accumulate as u64,
            steps: 0,
            device,
        }
    }
}

/// The cost of training with these settings, before the images are read; `None` if the image size or channels depend on
/// the data.
///
/// # Errors
/// As [`Trainer::new`].
pub fn outline(config: &Config) -> Result<Option<TrainPlan>> {
    let (Some(size), Some(channels)) = (config.image_size(), config.image_channels()) else {
        return Ok(None);
    };
    config.validate()?;
    let shape = ImageShape { height: size.height, width: size.width, channels };
    let Prepared { config, graph, options } = Prepared::of(config, shape, 1)?;
    let parameters = graph.graph.parameter_count();
    let footprint = config.compute.hardware().open()?.footprint(graph.graph, &options)?;
    Ok(Some(TrainPlan::new(&config, parameters, footprint, String::new())))
}

/// Floating-point operations up to which a full step is timed: at most about a second on a CPU.
const FULL_STEP_FLOPS: u64 = 10_000_000_000;

/// The time of one execution of a graph.
struct Timed {
    seconds: f64,
    /// Whether the execution completed; else the time is extrapolated from the fraction of operations done.
    complete: bool,
}

impl Trainer {
    /// The cost of training.
    pub fn plan(&self) -> TrainPlan {
        let parameters = self.graph.graph.parameter_count();
        let plan = TrainPlan::new(&self.config, parameters, self.exec.footprint(), self.exec.describe());
        let steps = self.steps().saturating_sub(self.step);
        TrainPlan { data_bytes: self.data_memory(), steps, ..plan }
    }

    /// The time of a step, measured within about `limit`; changes no state. If a step takes too long, steps with fewer images
    /// are timed, or a part of one. `None` if not enough could be measured.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn time_step(&mut self, limit: Duration) -> Result<Option<Duration>> {
        let own_memory = self.config.compute.hardware().open()?.has_own_memory();
        let seconds = if own_memory || 2 * self.exec.footprint().multiply_adds < FULL_STEP_FLOPS {
            self.time_full_batch(limit)?
        } else {
            self.time_smaller_batches(limit)?
        };
        let seconds = seconds.map(|s| s * self.config.train.accumulate as f64);
        Ok(seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()))
    }

    /// Times a step of the full batch.
    fn time_full_batch(&mut self, limit: Duration) -> Result<Option<f64>> {
        self.exec.snapshot_states()?;
        let times = best_of_two(&mut *self.exec, self.graph.loss, self.config.train.seed, limit);
        self.exec.set_stop(self.stop.clone());
        self.exec.restore_states()?;
        Ok(times?.map(|timed| timed.seconds))
    }

    /// Times steps of fewer images: the time grows linearly with their number.
    fn time_smaller_batches(&mut self, limit: Duration) -> Result<Option<f64>> {
        let (batch, begun) = (self.config.train.batch_size, Instant::now());
        let mut times: Vec<(f64, f64)> = Vec::new();
        let mut images = 1;
        loop {
            let built = self.with_batch_size(images);
            let Ok((mut exec, loss)) = built else {
                // With one image, batch normalization may fail; with more, memory may run out.
                if images > 1 || batch == 1 {
                    break;
                }
                images = 2;
                continue;
            };
            let timed =
                best_of_two(&mut *exec, loss, self.config.train.seed, limit.saturating_sub(begun.elapsed()))?;
            let Some(Timed { seconds, complete }) = timed.filter(|t| t.complete || times.is_empty()) else {
                break;
            };
            times.push((images as f64, seconds));
            let left = limit.saturating_sub(begun.elapsed()).as_secs_f64();
            // Two executions, and some time to build the plan.
            let next = ((left / (2.5 * seconds / images as f64)) as usize).min(batch);
            if !complete || times.len() == 2 || next < 2 * images.min(batch) {
                break;
            }
            images = next;
        }
        Ok(extrapolate(&times, batch as f64))
    }

    /// An executor for a step of that many images, with zero weights, and its loss tensor.
    fn with_batch_size(&self, images: usize) -> Result<(Box<dyn Executor>, Tensor)> {
        let mut config = self.config.clone();
        (config.train.batch_size, config.train.accumulate) = (images, 1);
        let Prepared { config, graph, options } = Prepared::of(&config, self.data.shape(), self.data.len())?;
        let exec = config.compute.hardware().open()?.executor(graph.graph, &options)?;
        Ok((exec, graph.loss))
    }
}

/// Extrapolates the time of a step of `batch` images from those of one or two smaller batches.
fn extrapolate(times: &[(f64, f64)], batch: f64) -> Option<f64> {
    match *times {
        [(n, seconds), (m, more)] if m > n => {
            // Bounded against timing noise.
            let slope = ((more - seconds) / (m - n)).clamp(0.5 * more / m, more / m);
            Some(more + slope * (batch - m))
        }
        [(n, seconds), ..] => Some(seconds * batch / n),
        [] => None,
    }
}

/// The better time of two executions, the first of which warms up memory and threads; within about `limit`.
fn best_of_two(exec: &mut dyn Executor, loss: Tensor, seed: u64, limit: Duration) -> Result<Option<Timed>> {
    let begun = Instant::now();
    let first = timed(exec, loss, seed, limit)?;
    let Some(first) = first else { return Ok(None) };
    if !first.complete || begun.elapsed().as_secs_f64() + first.seconds > limit.as_secs_f64() {
        return Ok(Some(first));
    }
    match timed(exec, loss, seed, limit.saturating_sub(begun.elapsed()))? {
        Some(again) if again.complete && again.seconds < first.seconds => Ok(Some(again)),
        _ => Ok(Some(first)),
    }
}

/// Times one execution, which is stopped after `limit`.
fn timed(exec: &mut dyn Executor, loss: Tensor, seed: u64, limit: Duration) -> Result<Option<Timed>> {
    let Some(deadline) = Deadline::after(limit) else { return Ok(None) };
    exec.set_stop(deadline.expired.clone());
    // If profiling is free: it shows how far a stopped execution had come.
    let profiled = !exec.profiling_slows();
    exec.set_profiling(profiled);
    let start = Instant::now();
    // Execution may be asynchronous; reading a value waits for it.
    let run = exec.run(RngKey { seed, step: u32::MAX, first_index: 0 });
    let run = run.and_then(|()| exec.read(loss, &mut [0.0]));
    let seconds = start.elapsed().as_secs_f64();
    exec.set_profiling(false);
    match run {
        Ok(()) => return Ok(Some(Timed { seconds, complete: true })),
        Err(ddpm_engine::Error::Interrupted) => {}
        Err(error) => return Err(error.into()),
    }
    let nodes = exec.profile();
    let [mut total, mut done, mut seconds] = [0.0; 3];
    for node in &nodes {
        total += node.multiply_adds as f64;
        if node.runs > 0 {
            done += node.multiply_adds as f64;
            seconds += node.time.as_secs_f64();
        }
    }
    Ok((done > 0.0).then(|| Timed { seconds: seconds * total / done, complete: false }))
}

/// Sets a flag after a time limit, unless dropped before.
struct Deadline {
    expired: Arc<AtomicBool>,
    _alive: Sender<()>,
}

impl Deadline {
    /// `None` if no thread can be started.
    fn after(limit: Duration) -> Option<Self> {
        let (alive, dropped) = channel();
        let expired = Arc::new(AtomicBool::new(false));
        let flag = expired.clone();
        let wait = move || {
            if dropped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::Relaxed);
            }
        };
        thread::Builder::new().name("deadline".to_owned()).spawn(wait).ok()?;
        Some(Self { expired, _alive: alive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits::Digits;

    #[test]
    fn the_time_is_extrapolated_linearly_from_few_images() {
        assert_eq!(extrapolate(&[], 8.0), None);
        assert_eq!(extrapolate(&[(1.0, 0.5)], 8.0), Some(4.0));
        // A quarter of a second for the weights, half a second per image.
        assert_eq!(extrapolate(&[(1.0, 0.75), (2.0, 1.25)], 10.0), Some(5.25));
        // Timing noise: at least half of the time per image.
        assert_eq!(extrapolate(&[(1.0, 1.0), (2.0, 1.0)], 10.0), Some(3.0));
        assert_eq!(extrapolate(&[(1.0, 0.1), (2.0, 2.0)], 4.0), Some(4.0));
    }

    #[test]
    fn timing_a_slow_step_respects_the_limit_and_changes_nothing() {
        // About 4e12 operations per step.
        let settings = [
            ("network.name", "simple"),
            ("data.size", "64"),
            ("data.channels", "1"),
            ("train.batch_size", "128"),
            ("compute.threads", "2"),
        ];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let config = Config::load(Some("digits"), None, &settings).unwrap();
        let early = outline(&config).unwrap().unwrap();
        let mut trainer = Trainer::new(&config, Box::new(Digits::new(0, 64, 4).unwrap())).unwrap();
        let plan = trainer.plan();
        assert_eq!(
            (early.parameters, early.arena_bytes, early.scratch_bytes, early.checkpoint_bytes, early.flops),
            (plan.parameters, plan.arena_bytes, plan.scratch_bytes, plan.checkpoint_bytes, plan.flops)
        );
        assert!(plan.flops > 2_000_000_000_000, "{}", plan.flops);
        let weights = trainer.tensors(ddpm_engine::Region::Weights).unwrap();
        let (limit, begun) = (Duration::from_secs(1), Instant::now());
        let time = trainer.time_step(limit).unwrap().expect("a time");
        // Building the smaller plans is not part of the limit.
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        // Between 1e9 and 1e13 operations per second.
        assert!(
            time.as_secs_f64() > plan.flops as f64 / 1e13 && time.as_secs_f64() < plan.flops as f64 / 1e9
        );
        assert!(trainer.tensors(ddpm_engine::Region::Weights).unwrap() == weights);
    }
}
