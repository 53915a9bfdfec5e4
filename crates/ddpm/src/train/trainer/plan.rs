//! What training takes: what is known before the first step, and the time of a step from a few seconds of work.

use super::{Prepared, Trainer};
use crate::data::ImageShape;
use crate::error::Result;
use crate::model::device;
use crate::train::config::Config;
use ddpm_engine::{Draws, Executor, Footprint, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// What training will take, known before a step is made.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// Elements of the network's parameters.
    pub parameters: usize,
    /// Bytes of the arena: weights, gradients, optimizer, average, activations.
    pub arena_bytes: u64,
    /// Bytes of the threads' scratch memory.
    pub scratch_bytes: u64,
    /// Bytes of the data set in memory and of the batches read ahead; 0 before the data set is open.
    pub data_bytes: u64,
    /// Bytes of one checkpoint on disk.
    pub checkpoint_bytes: u64,
    /// Floating-point operations of one step.
    pub flops: u64,
    /// Steps still to make; 0 before the data set is open.
    pub steps: u64,
    /// What the steps run on.
    pub device: String,
}

impl TrainPlan {
    fn new(config: &Config, parameters: usize, footprint: Footprint, device: String) -> Self {
        let t = &config.train;
        let averages = t.ema_decays.len() + t.power_ema.len();
        let copies = if t.ema_decay > 0.0 { 4 } else { 3 } + averages;
        Self {
            parameters,
            arena_bytes: (footprint.arena_bytes + averages * parameters * 4) as u64,
            scratch_bytes: footprint.scratch_bytes as u64,
            data_bytes: 0,
            checkpoint_bytes: (copies * parameters * 4) as u64,
            flops: 2 * footprint.multiply_adds * t.accumulate as u64,
            steps: 0,
            device,
        }
    }
}

/// What training with these settings will take, before the images are read; `None` where the settings leave the images' size or
/// channels to the data.
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
    let footprint = device(config.train.hardware())?.footprint(graph.graph, &options)?;
    Ok(Some(TrainPlan::new(&config, parameters, footprint, String::new())))
}

/// Floating-point operations up to which a whole step is timed as it is: they take a processor a second at most.
const SMALL: u64 = 10_000_000_000;

/// The time of a run of a graph.
struct Timed {
    seconds: f64,
    /// Whether it is of a whole run; else of a part, the rest being guessed from the number of operations.
    whole: bool,
}

impl Trainer {
    /// What training will take.
    pub fn plan(&self) -> TrainPlan {
        let parameters = self.graph.graph.parameter_count();
        let plan = TrainPlan::new(&self.config, parameters, self.exec.footprint(), self.exec.describe());
        let steps = self.steps().saturating_sub(self.step);
        TrainPlan { data_bytes: self.data_memory(), steps, ..plan }
    }

    /// The time that a step takes, measured in about `limit`; changes nothing. Where a step takes too long, steps of fewer images are
    /// timed, and a part of one where that takes too long as well. `None` where too little can be done to tell.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn time_step(&mut self, limit: Duration) -> Result<Option<Duration>> {
        let apart = device(self.config.train.hardware())?.has_own_memory();
        let seconds = match apart || 2 * self.exec.footprint().multiply_adds < SMALL {
            true => self.time_whole(limit)?,
            false => self.time_smaller(limit)?,
        };
        let seconds = seconds.map(|s| s * self.config.train.accumulate as f64);
        Ok(seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()))
    }

    /// Times the plan itself.
    fn time_whole(&mut self, limit: Duration) -> Result<Option<f64>> {
        self.exec.snapshot_states()?;
        let times = best(&mut *self.exec, self.graph.loss, self.config.train.seed, limit);
        self.exec.set_stop(self.stop.clone());
        self.exec.restore_states()?;
        Ok(times?.map(|timed| timed.seconds))
    }

    /// Times plans of fewer images: a step's time grows linearly with them.
    fn time_smaller(&mut self, limit: Duration) -> Result<Option<f64>> {
        let (batch, begun) = (self.config.train.batch_size, Instant::now());
        let mut times: Vec<(f64, f64)> = Vec::new();
        let mut images = 1;
        loop {
            let made = self.smaller(images);
            let Ok((mut exec, loss)) = made else {
                // Of one image batch normalization may have nothing to norm; later it is the memory.
                if images > 1 || batch == 1 {
                    break;
                }
                images = 2;
                continue;
            };
            let timed =
                best(&mut *exec, loss, self.config.train.seed, limit.saturating_sub(begun.elapsed()))?;
            let Some(Timed { seconds, whole }) = timed.filter(|t| t.whole || times.is_empty()) else { break };
            times.push((images as f64, seconds));
            let left = limit.saturating_sub(begun.elapsed()).as_secs_f64();
            // Two runs, and some time for making the plan.
            let next = ((left / (2.5 * seconds / images as f64)) as usize).min(batch);
            if !whole || times.len() == 2 || next < 2 * images.min(batch) {
                break;
            }
            images = next;
        }
        Ok(grown(&times, batch as f64))
    }

    /// An executor of a step of that many images, with weights of zero, and its loss.
    fn smaller(&self, images: usize) -> Result<(Box<dyn Executor>, Tensor)> {
        let mut config = self.config.clone();
        (config.train.batch_size, config.train.accumulate) = (images, 1);
        let Prepared { config, graph, options } = Prepared::of(&config, self.data.shape(), self.data.len())?;
        let exec = device(config.train.hardware())?.executor(graph.graph, &options)?;
        Ok((exec, graph.loss))
    }
}

/// The time of a step of `batch` images from those of one or two smaller numbers.
fn grown(times: &[(f64, f64)], batch: f64) -> Option<f64> {
    match *times {
        [(n, seconds), (m, more)] if m > n => {
            // The clock's noise must not make it nonsense.
            let slope = ((more - seconds) / (m - n)).clamp(0.5 * more / m, more / m);
            Some(more + slope * (batch - m))
        }
        [(n, seconds), ..] => Some(seconds * batch / n),
        [] => None,
    }
}

/// The better time of two runs, the first of which also brings memory and threads up; within about `limit`.
fn best(exec: &mut dyn Executor, loss: Tensor, seed: u64, limit: Duration) -> Result<Option<Timed>> {
    let begun = Instant::now();
    let first = timed(exec, loss, seed, limit)?;
    let Some(first) = first else { return Ok(None) };
    if !first.whole || begun.elapsed().as_secs_f64() + first.seconds > limit.as_secs_f64() {
        return Ok(Some(first));
    }
    match timed(exec, loss, seed, limit.saturating_sub(begun.elapsed()))? {
        Some(again) if again.whole && again.seconds < first.seconds => Ok(Some(again)),
        _ => Ok(Some(first)),
    }
}

/// Times one run, which is ended after `limit`.
fn timed(exec: &mut dyn Executor, loss: Tensor, seed: u64, limit: Duration) -> Result<Option<Timed>> {
    let Some(deadline) = Deadline::after(limit) else { return Ok(None) };
    exec.set_stop(deadline.over.clone());
    // Where that costs nothing: it tells of runs that were ended how far they had come.
    let profiled = !exec.profiling_slows();
    exec.set_profiling(profiled);
    let start = Instant::now();
    // A run may go on when its call is back: a value that is read waits for it.
    let run = exec.run(Draws { seed, step: u32::MAX, first_index: 0 });
    let run = run.and_then(|()| exec.read(loss, &mut [0.0]));
    let seconds = start.elapsed().as_secs_f64();
    exec.set_profiling(false);
    match run {
        Ok(()) => return Ok(Some(Timed { seconds, whole: true })),
        Err(ddpm_engine::Error::Interrupted) => {}
        Err(error) => return Err(error.into()),
    }
    let nodes = exec.profile();
    let [mut all, mut done, mut seconds] = [0.0; 3];
    for node in &nodes {
        all += node.multiply_adds as f64;
        if node.runs > 0 {
            done += node.multiply_adds as f64;
            seconds += node.time.as_secs_f64();
        }
    }
    Ok((done > 0.0).then(|| Timed { seconds: seconds * all / done, whole: false }))
}

/// Sets a flag when a time is over, unless it is dropped before.
struct Deadline {
    over: Arc<AtomicBool>,
    _alive: Sender<()>,
}

impl Deadline {
    /// `None` where no thread can be started for it.
    fn after(limit: Duration) -> Option<Self> {
        let (alive, dropped) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let flag = over.clone();
        let wait = move || {
            if dropped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                flag.store(true, Ordering::Relaxed);
            }
        };
        thread::Builder::new().name("deadline".to_owned()).spawn(wait).ok()?;
        Some(Self { over, _alive: alive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits::Digits;

    #[test]
    fn the_time_of_many_images_grows_linearly_from_that_of_few() {
        assert_eq!(grown(&[], 8.0), None);
        assert_eq!(grown(&[(1.0, 0.5)], 8.0), Some(4.0));
        // A fourth of a second for the weights, half of one for each image.
        assert_eq!(grown(&[(1.0, 0.75), (2.0, 1.25)], 10.0), Some(5.25));
        // Noise of the clock: no less than half of what each image took.
        assert_eq!(grown(&[(1.0, 1.0), (2.0, 1.0)], 10.0), Some(3.0));
        assert_eq!(grown(&[(1.0, 0.1), (2.0, 2.0)], 4.0), Some(4.0));
    }

    #[test]
    fn a_step_of_minutes_is_timed_within_the_limit_and_nothing_has_changed() {
        // About 4e12 operations a step.
        let settings = [
            ("network.name", "simple"),
            ("data.size", "64"),
            ("data.channels", "1"),
            ("train.batch_size", "128"),
            ("train.threads", "2"),
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
        let time = trainer.time_step(limit).unwrap().expect("something was done");
        // What making the smaller plans takes is not in the limit.
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        // Between 1e9 and 1e13 operations a second.
        assert!(
            time.as_secs_f64() > plan.flops as f64 / 1e13 && time.as_secs_f64() < plan.flops as f64 / 1e9
        );
        assert!(trainer.tensors(ddpm_engine::Region::Weights).unwrap() == weights);
    }
}
