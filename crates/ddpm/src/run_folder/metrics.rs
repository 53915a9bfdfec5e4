//! `metrics.jsonl`: one JSON object per line, for every completed step.
//!
//! `step` counts completed steps, from 1, as everywhere else. Lines of format 1, which have no `"format"`, count from 0; they
//! are converted when read, and rewritten in the current format when their run is resumed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::storage::{self, OsFileSystem};
use crate::{Error, Result};

/// Maximum size of a metrics file, in bytes; some ten million lines.
const MAX_METRICS: u64 = 1 << 30;

/// The format of written lines.
const FORMAT: u32 = 2;

/// The metrics of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Steps completed, including this one; 1 for the first step.
    pub step: u64,
    /// The step's loss; NaN is `null` in the file.
    pub loss: f64,
    /// Training images per second.
    pub images_per_second: f64,
    /// Learning rate of the step; NaN in lines of older versions.
    pub learning_rate: f64,
    /// L2 norm of all gradients together, before clipping; NaN in lines of older versions.
    pub grad_norm: f64,
    /// Training time so far in seconds, including the time before a resume.
    pub seconds: f64,
}

/// One line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(default)]
    format: u32,
    step: u64,
    #[serde(deserialize_with = "or_nan")]
    loss: f64,
    #[serde(deserialize_with = "or_nan")]
    images_per_second: f64,
    #[serde(default = "nan", deserialize_with = "or_nan")]
    learning_rate: f64,
    #[serde(default = "nan", deserialize_with = "or_nan")]
    grad_norm: f64,
    #[serde(deserialize_with = "or_nan")]
    seconds: f64,
}

impl From<&Metrics> for Line {
    fn from(m: &Metrics) -> Self {
        let &Metrics { step, loss, images_per_second, learning_rate, grad_norm, seconds } = m;
        Self { format: FORMAT, step, loss, images_per_second, learning_rate, grad_norm, seconds }
    }
}

/// Parses a line; `None` if it is invalid, such as a truncated last line after a crash.
pub(super) fn read_line(line: &[u8]) -> Option<Metrics> {
    let line: Line = serde_json::from_slice(line).ok()?;
    let Line { format, step, loss, images_per_second, learning_rate, grad_norm, seconds } = line;
    let step = if format < FORMAT { step.checked_add(1)? } else { step };
    Some(Metrics { step, loss, images_per_second, learning_rate, grad_norm, seconds })
}

/// The line, with its newline.
fn write_line(metrics: &Metrics) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Line::from(metrics)).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

impl Metrics {
    /// The scalars by name: the curves that TensorBoard shows.
    pub fn scalars(&self) -> impl IntoIterator<Item = (&'static str, f64)> {
        [
            ("loss", self.loss),
            ("images_per_second", self.images_per_second),
            ("learning_rate", self.learning_rate),
            ("grad_norm", self.grad_norm),
        ]
    }
}

fn or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn nan() -> f64 {
    f64::NAN
}

/// The metrics file of a run in training.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
    length: u64,
}

impl MetricsLog {
    /// Opens or creates the file at `path` for appending. In a run that continues after `done` steps, lines of later steps
    /// are dropped, as is a truncated last line; lines of an earlier format are converted. Without `done` all complete lines
    /// are kept.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, done: Option<u64>) -> Result<Self> {
        const DOING: &str = "open the metrics";
        if path.exists() {
            let old = storage::read(path, "read the metrics", MAX_METRICS)?;
            let complete = old.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"));
            let kept = complete.filter_map(read_line).filter(|m| done.is_none_or(|done| m.step <= done));
            let mut new = Vec::with_capacity(old.len());
            for metrics in kept {
                new.extend(write_line(&metrics).map_err(Error::io(path, DOING))?);
            }
            if new != old {
                storage::write_atomic(&OsFileSystem, path, &new, "rewrite the metrics")?;
            }
        }
        let file = File::options().append(true).create(true).open(path).map_err(Error::io(path, DOING))?;
        let length = file.metadata().map_err(Error::io(path, DOING))?.len();
        Ok(Self { file, path: path.to_owned(), length })
    }

    /// Appends a line. The operating system has it when this returns: killing the process does not lose it.
    ///
    /// # Errors
    /// [`Error::Io`]; the file then ends with its last complete line.
    pub fn append(&mut self, metrics: &Metrics) -> Result<()> {
        const DOING: &str = "write the metrics";
        let line = write_line(metrics).map_err(Error::io(&self.path, DOING))?;
        if let Err(e) = self.file.write_all(&line) {
            // Best effort: reopening the file drops a truncated line too.
            let _ = self.file.set_len(self.length);
            return Err(Error::io(&self.path, DOING)(e));
        }
        self.length += line.len() as u64;
        // Writing to a deleted file succeeds on many systems.
        match self.is_at_path() {
            Ok(true) => Ok(()),
            Ok(false) => {
                let reason =
                    "the file is gone: the run's folder was removed, moved or unmounted during training";
                Err(Error::io(&self.path, DOING)(io::Error::new(io::ErrorKind::NotFound, reason)))
            }
            Err(e) => Err(Error::io(&self.path, DOING)(e)),
        }
    }

    /// Whether the file at the path is still the open one.
    fn is_at_path(&self) -> io::Result<bool> {
        let named = match std::fs::metadata(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let open = self.file.metadata()?;
            Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
        }
        #[cfg(not(unix))]
        Ok(named.is_file())
    }
}

/// Reads the metrics at `path`, skipping invalid lines, such as a truncated last line after a crash.
///
/// # Errors
/// [`Error::Io`].
pub fn read_metrics(path: &Path) -> Result<Vec<Metrics>> {
    let bytes = storage::read(path, "read the metrics", MAX_METRICS)?;
    Ok(bytes.split(|&b| b == b'\n').filter_map(read_line).collect())
}

/// Whether the metrics at `path` start with a line of an earlier format, which counts steps from 0.
pub(crate) fn counts_from_zero(path: &Path) -> bool {
    let first = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(4096).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = first().unwrap_or_default();
    let line: Option<Line> =
        bytes.split(|&b| b == b'\n').next().and_then(|line| serde_json::from_slice(line).ok());
    line.is_some_and(|line| line.format < FORMAT)
}

/// The last lines of the metrics at `path`, about `max_lines` at most, without reading the whole file; empty if unreadable.
pub(super) fn last_metrics(path: &Path, max_lines: u64) -> Vec<Metrics> {
    // A line is about 170 bytes long.
    const LINE: u64 = 256;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(max_lines * LINE)))?;
        let mut bytes = Vec::new();
        file.take(max_lines * LINE).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    bytes.split(|&b| b == b'\n').filter_map(read_line).collect()
}

/// A sentence about missing lines of steps 1 to `done`; `None` if none are missing.
pub(crate) fn missing_metrics(metrics: &[Metrics], done: u64) -> Option<String> {
    let mut steps: Vec<u64> = metrics.iter().map(|m| m.step).filter(|s| (1..=done).contains(s)).collect();
    steps.sort_unstable();
    steps.dedup();
    let missing = done - steps.len() as u64;
    if missing == 0 {
        return None;
    }
    if steps.is_empty() {
        return Some(format!("metrics.jsonl has none of the {done} completed steps"));
    }
    // The first gap.
    let first = (1..)
        .zip(&steps)
        .find(|(expected, step)| expected != *step)
        .map_or(steps.len() as u64 + 1, |(e, _)| e);
    let last = steps.iter().find(|&&s| s > first).map_or(done, |s| s - 1);
    let gap = if first == last { format!("step {first}") } else { format!("steps {first} to {last}") };
    Some(if missing == last - first + 1 {
        format!("metrics.jsonl lacks {gap} of the {done} completed steps")
    } else {
        format!("metrics.jsonl lacks {missing} of the {done} completed steps, starting with {gap}")
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_file_is_reported_at_the_next_line_and_not_only_at_the_next_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let path = run.join("metrics.jsonl");
        let line = |step| Metrics {
            step,
            loss: 1.0,
            images_per_second: 1.0,
            learning_rate: 1.0,
            grad_norm: 1.0,
            seconds: 1.0,
        };
        let assert_gone = |log: &mut MetricsLog| {
            let message = log.append(&line(2)).unwrap_err().to_string();
            assert!(
                message.contains("metrics.jsonl: cannot write the metrics: the file is gone"),
                "{message}"
            );
        };
        let start = || {
            std::fs::create_dir(&run).unwrap();
            let mut log = MetricsLog::open(&path, None).unwrap();
            log.append(&line(1)).unwrap();
            log
        };
        let mut log = start();
        std::fs::remove_dir_all(&run).unwrap();
        assert_gone(&mut log);
        // Another file replaced it.
        let mut log = start();
        std::fs::rename(&run, folder.path().join("moved")).unwrap();
        let mut other = start();
        assert_gone(&mut log);
        other.append(&line(2)).unwrap();
    }

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let path = PathBuf::from("/dev/full");
        let file = File::options().append(true).open(&path).unwrap();
        let mut log = MetricsLog { file, path, length: 0 };
        let line = Metrics {
            step: 0,
            loss: 1.0,
            images_per_second: 1.0,
            learning_rate: 1.0,
            grad_norm: 1.0,
            seconds: 1.0,
        };
        let message = log.append(&line).unwrap_err().to_string();
        assert!(message.starts_with("/dev/full: cannot write the metrics: No space left"), "{message}");
        assert_eq!(log.length, 0);
    }
}
