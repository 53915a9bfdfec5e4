//! Pacing and timing of steps.

use std::io::{BufRead, Write};
use std::time::Duration;

/// When the next step runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// At once: one warm-up step, then this many counted ones.
    Runs(usize),
    /// At once, until the program is interrupted.
    Endless,
    /// On each line of standard input, until it ends, so that two programs can alternate.
    Lines,
}

/// Paces steps and collects their times; prints each time unless the number of steps is fixed.
pub struct Clock {
    part: &'static str,
    pace: Pace,
    json: bool,
    started: usize,
    seconds: Vec<f64>,
}

impl Clock {
    /// A clock for steps of `part`.
    pub fn new(part: &'static str, pace: Pace, json: bool) -> Self {
        Self { part, pace, json, started: 0, seconds: Vec::new() }
    }

    /// Waits for the next step; false after the last.
    pub fn next(&mut self) -> anyhow::Result<bool> {
        self.started += 1;
        Ok(match self.pace {
            Pace::Runs(runs) => self.started <= 1 + runs,
            Pace::Endless => true,
            Pace::Lines => std::io::stdin().lock().read_line(&mut String::new())? > 0,
        })
    }

    /// Records a step's time; true for the first step, a warm-up that is not counted.
    pub fn record(&mut self, time: Duration) -> anyhow::Result<bool> {
        let (seconds, warmed_up) = (time.as_secs_f64(), self.started == 1);
        if !warmed_up {
            self.seconds.push(seconds);
        }
        if !matches!(self.pace, Pace::Runs(_)) {
            let mut out = std::io::stdout();
            if self.json {
                writeln!(
                    out,
                    "{}",
                    serde_json::json!({ "part": self.part, "seconds": seconds, "resident_bytes": peak_resident() })
                )?
            } else {
                writeln!(out, "{} {seconds:.4} s", self.part)?
            }
            out.flush()?;
        }
        Ok(warmed_up)
    }

    /// The times of all counted steps, ascending; a single NaN if there were none.
    pub fn finish(mut self) -> Vec<f64> {
        self.seconds.sort_by(f64::total_cmp);
        if self.seconds.is_empty() {
            self.seconds.push(f64::NAN);
        }
        self.seconds
    }
}

/// Peak resident memory of the process in bytes (Linux).
pub fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Resets [`peak_resident`] where the system allows; otherwise it keeps counting from the program's start.
pub fn reset_peak_resident() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_not_counted() {
        let mut clock = Clock::new("train", Pace::Runs(2), false);
        for time in [9, 2, 1] {
            assert!(clock.next().unwrap());
            assert_eq!(clock.record(Duration::from_secs(time)).unwrap(), time == 9);
        }
        assert!(!clock.next().unwrap());
        assert_eq!(clock.finish(), [1.0, 2.0]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn allocated_memory_is_counted() {
        let memory = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_resident().unwrap() >= memory.len() as u64);
    }
}
