//! `run.json`: which run a folder is, and how it last ended.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Result;
use crate::train::config::Config;
use crate::train::disk::{self, RealDisk};

/// The file's name in the run's folder.
pub(crate) const RECORD: &str = "run.json";
/// Largest file that is read, in bytes.
const MAX_RECORD: u64 = 1 << 16;
/// Longest reason that is kept, in characters.
const LONGEST: usize = 2000;

/// How a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// It has not, or the process was killed.
    Running,
    /// All steps were made.
    Finished,
    /// All steps were made, and the training had diverged.
    Diverged,
    /// It was asked to stop.
    Stopped,
    /// With an error.
    Failed,
}

/// What `run.json` says. Runs of earlier versions have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run's own mark, which its checkpoints have too, so that one of another run is known. Two runs of the same settings, data
    /// and first weights have the same: their checkpoints are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How its last training ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
    /// Why, where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// SHA-256 of the model cards that were written last, at most two: any other content is a person's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cards: Vec<String>,
}

impl RunRecord {
    /// The mark of a run that begins with these settings, this data ([`Summary::fingerprint`](crate::data::Summary)) and weights
    /// that were `given` (their bytes; empty for drawn ones).
    pub fn new_id(config: &Config, data: &str, given: &[u8]) -> String {
        let mut hash = Sha256::new();
        for part in [config.to_toml_commented().as_bytes(), data.as_bytes(), given] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect()
    }

    /// That of the run in `folder`; empty where there is none that can be understood.
    pub fn read(folder: &Path) -> Self {
        let bytes = disk::read(&folder.join(RECORD), "read the run's record", MAX_RECORD);
        bytes.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
    }

    /// Puts it into the run's `folder`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn write(&self, folder: &Path) -> Result<()> {
        let error = self.error.as_ref().map(|e| e.chars().take(LONGEST).collect());
        let mut bytes = serde_json::to_vec_pretty(&Self { error, ..self.clone() }).unwrap_or_default();
        bytes.push(b'\n');
        disk::replace(&RealDisk, &folder.join(RECORD), &bytes, "write the run's record")
    }
}
