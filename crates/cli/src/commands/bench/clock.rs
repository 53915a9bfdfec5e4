//! When steps are made, and how long they take.

use std::io::{BufRead, Write};
use std::time::Duration;

/// When the next step is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// At once, for one step that is not counted and then so many that are.
    Runs(usize),
    /// At once, until the program is stopped.
    Endless,
    /// When a line comes on standard input, until that ends: two programs take turns so.
    Lines,
}

/// Lets steps go and collects their times; tells each at once, unless there is only a number of them to make.
pub struct Clock {
    part: &'static str,
    pace: Pace,
    json: bool,
    begun: usize,
    seconds: Vec<f64>,
}

impl Clock {
    /// For steps of `part`.
    pub fn new(part: &'static str, pace: Pace, json: bool) -> Self {
        Self { part, pace, json, begun: 0, seconds: Vec::new() }
    }

    /// Waits until the next step's turn; false: there is none.
    pub fn next(&mut self) -> anyhow::Result<bool> {
        self.begun += 1;
        Ok(match self.pace {
            Pace::Runs(runs) => self.begun <= 1 + runs,
            Pace::Endless => true,
            Pace::Lines => std::io::stdin().lock().read_line(&mut String::new())? > 0,
        })
    }

    /// Takes a step's time; whether it was the first, which is to warm up only and not counted.
    pub fn took(&mut self, time: Duration) -> anyhow::Result<bool> {
        let (seconds, warmed_up) = (time.as_secs_f64(), self.begun == 1);
        if !warmed_up {
            self.seconds.push(seconds);
        }
        if !matches!(self.pace, Pace::Runs(_)) {
            let mut out = std::io::stdout();
            match self.json {
                true => writeln!(
                    out,
                    "{}",
                    serde_json::json!({ "part": self.part, "seconds": seconds, "resident_bytes": peak_resident() })
                )?,
                false => writeln!(out, "{} {seconds:.4} s", self.part)?,
            }
            out.flush()?;
        }
        Ok(warmed_up)
    }

    /// The times of all counted steps, rising; not a number if there was none.
    pub fn finish(mut self) -> Vec<f64> {
        self.seconds.sort_by(f64::total_cmp);
        if self.seconds.is_empty() {
            self.seconds.push(f64::NAN);
        }
        self.seconds
    }
}

/// Most memory that the process held so far, in bytes, where the system tells it (Linux).
pub fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Lets [`peak_resident`] begin anew, where the system can; else it goes on counting from the program's start.
pub fn forget_peak_resident() {
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
            assert_eq!(clock.took(Duration::from_secs(time)).unwrap(), time == 9);
        }
        assert!(!clock.next().unwrap());
        assert_eq!(clock.finish(), [1.0, 2.0]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_was_taken_is_seen() {
        let memory = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_resident().unwrap() >= memory.len() as u64);
    }
}
