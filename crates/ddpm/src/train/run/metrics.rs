//! `metrics.jsonl`: one JSON object a line, for every step that was measured.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::train::disk::{self, RealDisk};
use crate::{Error, Result};

/// Largest file of metrics that is read, in bytes: some ten million lines.
const MAX_METRICS: u64 = 1 << 30;

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// The training step, counted from 0.
    pub step: u64,
    /// The step's loss; not-a-number is `null` in the file.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Pictures trained on a second since the last line.
    #[serde(deserialize_with = "or_nan")]
    pub images_per_second: f64,
    /// Learning rate of the step; not-a-number in the lines of older versions.
    #[serde(default = "nan", deserialize_with = "or_nan")]
    pub learning_rate: f64,
    /// L2 norm of all gradients together, before clipping; not-a-number in the lines of older versions.
    #[serde(default = "nan", deserialize_with = "or_nan")]
    pub grad_norm: f64,
    /// Seconds of training so far, those before a resume included.
    #[serde(deserialize_with = "or_nan")]
    pub seconds: f64,
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
    /// Opens the file at `path`, or makes it, to append. `resume_step` is the step that is run next: lines of it and
    /// later ones are dropped, as is a last line that a killed process left torn. Without it all whole lines stay.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, resume_step: Option<u64>) -> Result<Self> {
        const DOING: &str = "open the metrics";
        if path.exists() {
            let old = disk::read(path, "read the metrics", MAX_METRICS)?;
            let keep = |line: &&[u8]| {
                line.ends_with(b"\n")
                    && serde_json::from_slice::<Metrics>(line)
                        .is_ok_and(|m| resume_step.is_none_or(|s| m.step < s))
            };
            let new: Vec<u8> = old.split_inclusive(|&b| b == b'\n').filter(keep).flatten().copied().collect();
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
        let mut line = serde_json::to_vec(metrics)
            .map_err(io::Error::other)
            .map_err(Error::io(&self.path, "write the metrics"))?;
        line.push(b'\n');
        if let Err(e) = self.file.write_all(&line) {
            // Best effort: opening the file again drops a torn line too.
            let _ = self.file.set_len(self.length);
            return Err(Error::io(&self.path, "write the metrics")(e));
        }
        self.length += line.len() as u64;
        Ok(())
    }
}

/// Reads the metrics at `path`, leaving out lines that are none, as a killed process's torn last one.
///
/// # Errors
/// [`Error::Io`].
pub fn read_metrics(path: &Path) -> Result<Vec<Metrics>> {
    let bytes = disk::read(path, "read the metrics", MAX_METRICS)?;
    Ok(bytes.split(|&b| b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

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
