//! `metrics.jsonl`: one JSON object a line, for every step that was made.
//!
//! `step` counts the steps that are done, from 1, as everything else does. Lines of format 1, which have no `"format"`, count from
//! 0; they are read as what they mean, and brought to this format when their run is taken up.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::train::disk::{self, RealDisk};
use crate::{Error, Result};

/// Largest file of metrics that is read, in bytes: some ten million lines.
const MAX_METRICS: u64 = 1 << 30;

/// The format of the lines that are written.
const FORMAT: u32 = 2;

/// What a step measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Steps done, this one included: the first step's is 1.
    pub step: u64,
    /// The step's loss; not-a-number is `null` in the file.
    pub loss: f64,
    /// Images trained on a second.
    pub images_per_second: f64,
    /// Learning rate of the step; not-a-number in the lines of older versions.
    pub learning_rate: f64,
    /// L2 norm of all gradients together, before clipping; not-a-number in the lines of older versions.
    pub grad_norm: f64,
    /// Seconds of training so far, those before a resume included.
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

/// What a line says; `None` for one that is none, as a killed process's torn last one.
pub(super) fn read_line(line: &[u8]) -> Option<Metrics> {
    let line: Line = serde_json::from_slice(line).ok()?;
    let Line { format, step, loss, images_per_second, learning_rate, grad_norm, seconds } = line;
    let step = if format < FORMAT { step.checked_add(1)? } else { step };
    Some(Metrics { step, loss, images_per_second, learning_rate, grad_norm, seconds })
}

/// The line, with its end.
fn write_line(metrics: &Metrics) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Line::from(metrics)).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

impl Metrics {
    /// What was measured, by name: the curves that TensorBoard shows.
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

/// The file of metrics of a run that is training.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
    length: u64,
}

impl MetricsLog {
    /// Opens the file at `path`, or makes it, to append. In a run that goes on after `done` steps, lines of later ones are dropped,
    /// as is a last line that a killed process left torn; lines of an earlier format are written in this one. Without `done` all whole
    /// lines stay.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, done: Option<u64>) -> Result<Self> {
        const DOING: &str = "open the metrics";
        if path.exists() {
            let old = disk::read(path, "read the metrics", MAX_METRICS)?;
            let whole = old.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"));
            let kept = whole.filter_map(read_line).filter(|m| done.is_none_or(|done| m.step <= done));
            let mut new = Vec::with_capacity(old.len());
            for metrics in kept {
                new.extend(write_line(&metrics).map_err(Error::io(path, DOING))?);
            }
            if new != old {
                disk::replace(&RealDisk, path, &new, "rewrite the metrics")?;
            }
        }
        let file = File::options().append(true).create(true).open(path).map_err(Error::io(path, DOING))?;
        let length = file.metadata().map_err(Error::io(path, DOING))?.len();
        Ok(Self { file, path: path.to_owned(), length })
    }

    /// Appends a line. It is with the operating system when this returns: killing the process does not lose it.
    ///
    /// # Errors
    /// [`Error::Io`]; the file ends with its last whole line then.
    pub fn append(&mut self, metrics: &Metrics) -> Result<()> {
        const DOING: &str = "write the metrics";
        let line = write_line(metrics).map_err(Error::io(&self.path, DOING))?;
        if let Err(e) = self.file.write_all(&line) {
            // Best effort: opening the file again drops a torn line too.
            let _ = self.file.set_len(self.length);
            return Err(Error::io(&self.path, DOING)(e));
        }
        self.length += line.len() as u64;
        // Systems go on writing to a file that has no name any more.
        match self.is_in_its_place() {
            Ok(true) => Ok(()),
            Ok(false) => {
                let reason =
                    "the file is gone: the run's folder was removed, moved or unmounted while it trained";
                Err(Error::io(&self.path, DOING)(io::Error::new(io::ErrorKind::NotFound, reason)))
            }
            Err(e) => Err(Error::io(&self.path, DOING)(e)),
        }
    }

    /// Whether the file of this name is still the one that is written to.
    fn is_in_its_place(&self) -> io::Result<bool> {
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

/// Reads the metrics at `path`, leaving out lines that are none, as a killed process's torn last one.
///
/// # Errors
/// [`Error::Io`].
pub fn read_metrics(path: &Path) -> Result<Vec<Metrics>> {
    let bytes = disk::read(path, "read the metrics", MAX_METRICS)?;
    Ok(bytes.split(|&b| b == b'\n').filter_map(read_line).collect())
}

/// Whether the metrics at `path` begin with lines of an earlier format, which count steps from 0.
pub(crate) fn count_from_zero(path: &Path) -> bool {
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

/// The last lines of the metrics at `path`, at most about `most`, without reading the whole file; none where it cannot be read.
pub(super) fn last_metrics(path: &Path, most: u64) -> Vec<Metrics> {
    // A line is about 170 bytes long.
    const LINE: u64 = 256;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(most * LINE)))?;
        let mut bytes = Vec::new();
        file.take(most * LINE).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    bytes.split(|&b| b == b'\n').filter_map(read_line).collect()
}

/// What is missing of the lines of steps 1 to `done`, as a sentence for a person; `None` if nothing is.
pub(crate) fn missing_metrics(metrics: &[Metrics], done: u64) -> Option<String> {
    let mut steps: Vec<u64> = metrics.iter().map(|m| m.step).filter(|s| (1..=done).contains(s)).collect();
    steps.sort_unstable();
    steps.dedup();
    let missing = done - steps.len() as u64;
    if missing == 0 {
        return None;
    }
    if steps.is_empty() {
        return Some(format!("metrics.jsonl has none of the {done} steps that were made"));
    }
    // The first gap.
    let first = (1..)
        .zip(&steps)
        .find(|(expected, step)| expected != *step)
        .map_or(steps.len() as u64 + 1, |(e, _)| e);
    let last = steps.iter().find(|&&s| s > first).map_or(done, |s| s - 1);
    let gap = if first == last { format!("step {first}") } else { format!("steps {first} to {last}") };
    Some(match missing == last - first + 1 {
        true => format!("metrics.jsonl lacks {gap} of the {done} that were made"),
        false => format!("metrics.jsonl lacks {missing} of the {done} steps that were made, {gap} first"),
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_gone_is_told_at_the_first_line_and_not_when_the_next_checkpoint_is_due() {
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
        let told = |log: &mut MetricsLog| {
            let message = log.append(&line(2)).unwrap_err().to_string();
            assert!(
                message.contains("metrics.jsonl: cannot write the metrics: the file is gone"),
                "{message}"
            );
        };
        let begin = || {
            std::fs::create_dir(&run).unwrap();
            let mut log = MetricsLog::open(&path, None).unwrap();
            log.append(&line(1)).unwrap();
            log
        };
        let mut log = begin();
        std::fs::remove_dir_all(&run).unwrap();
        told(&mut log);
        // Another took its place.
        let mut log = begin();
        std::fs::rename(&run, folder.path().join("moved")).unwrap();
        let mut other = begin();
        told(&mut log);
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
