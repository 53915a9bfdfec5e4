//! Progress: a bar on a terminal, one line every ten seconds elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Interval between lines when stderr is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress of one task.
pub struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    last_line: Instant,
}

impl Progress {
    /// Progress of the task `what` with `steps` steps.
    pub fn new(what: &'static str, steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(steps).with_style(style).with_prefix(what)
        });
        Self { bar, what, last_line: Instant::now() }
    }

    /// Work of unknown length: a spinner with the elapsed time; nothing if stderr is not a terminal.
    pub fn waiting(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {spinner} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style).with_prefix(what);
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, what, last_line: Instant::now() }
    }

    /// Sets progress to `done` of `steps`. `message` is evaluated only if it is shown.
    pub fn set(&mut self, done: u64, steps: u64, message: impl FnOnce() -> String) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(steps);
                bar.set_position(done);
                bar.set_message(message());
            }
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                crate::status!("{} {done}/{steps} {}", self.what, message());
            }
            None => {}
        }
    }

    /// Prints a line above the bar.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::status!("{text}")),
            None => crate::status!("{text}"),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Human-readable duration.
pub fn human_time(time: Duration) -> String {
    match time.as_secs() {
        s if s < 60 => format!("{:.1} s", time.as_secs_f64()),
        s if s < 3600 => format!("{} min {:02} s", s / 60, s % 60),
        s if s < 48 * 3600 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        s => format!("{} days {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Human-readable byte count.
pub fn human_bytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib {
        m if m < 0.1 => format!("{:.1} KiB", m * 1024.0),
        m if m < 1024.0 => format!("{m:.1} MiB"),
        m => format!("{:.2} GiB", m / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_human_readable() {
        assert_eq!(human_bytes(512), "0.5 KiB");
        assert_eq!(human_bytes(3 << 30), "3.00 GiB");
        assert_eq!(human_time(Duration::from_secs(61)), "1 min 01 s");
        assert_eq!(human_time(Duration::from_secs(50 * 3600)), "2 days 2 h");
    }
}
