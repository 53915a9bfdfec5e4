//! `run.json`: the identity of a run, and how its training last ended.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Result;
use crate::config::Config;
use crate::storage::{self, OsFileSystem};

/// The file's name in the run's folder.
pub(crate) const RECORD: &str = "run.json";
/// Maximum size of the file, in bytes.
const MAX_RECORD: u64 = 1 << 16;
/// Maximum length of the saved error message, in characters.
const MAX_ERROR: usize = 2000;

/// How a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// Still running, or the process was killed.
    Running,
    /// All steps were completed.
    Finished,
    /// All steps were completed, but the training had diverged.
    Diverged,
    /// Stopped on request.
    Stopped,
    /// Failed with an error.
    Failed,
}

/// The contents of `run.json`. Runs of earlier versions have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run's id, also recorded in its checkpoints to detect those of other runs. Two runs with the same settings, data
    /// and initial weights have the same id, because their checkpoints are equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How its last training ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
    /// The error message, if it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// SHA-256 of the last model cards written, at most two; any other content was written by the user.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cards: Vec<String>,
}

impl RunRecord {
    /// The id of a run that starts with these settings, this data ([`Summary::fingerprint`](crate::data::Summary)) and
    /// `given` weights (their bytes; empty for random ones).
    pub fn new_id(config: &Config, data: &str, given: &[u8]) -> String {
        let mut hash = Sha256::new();
        for part in [config.to_toml_commented().as_bytes(), data.as_bytes(), given] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Reads the record of the run in `folder`; empty if there is no readable one.
    pub fn read(folder: &Path) -> Self {
        let bytes = storage::read(&folder.join(RECORD), "read the run's record", MAX_RECORD);
        bytes.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
    }

    /// Writes it to the run's `folder`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn write(&self, folder: &Path) -> Result<()> {
        let error = self.error.as_ref().map(|e| e.chars().take(MAX_ERROR).collect());
        let mut bytes = serde_json::to_vec_pretty(&Self { error, ..self.clone() }).unwrap_or_default();
        bytes.push(b'\n');
        storage::write_atomic(&OsFileSystem, &folder.join(RECORD), &bytes, "write the run's record")
    }
}
