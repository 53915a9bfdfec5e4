//! `manifest.json`: the contents of a checkpoint, with hashes to verify its integrity.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FILES, MANIFEST, MODEL, OPTIMIZER, average_of};
use crate::config::Config;
use crate::lr_schedule::Plateau;
use crate::storage;
use crate::{Error, Result};

/// The format version that is written, and the newest that can be read.
pub(super) const FORMAT: u32 = 1;
/// Maximum size of a manifest, in bytes.
const MAX_MANIFEST: u64 = 4 << 20;
/// Precedes the hash, which covers everything before it, this text included.
const SEAL: &str = ",\n  \"manifest_sha256\": \"";
/// Follows the hash.
const END: &str = "\"\n}\n";

/// Length and hash of one of a checkpoint's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

/// The contents of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the checkpoint format; [`save`](super::save) fills it in.
    pub format: u32,
    /// The library and version that wrote it; [`save`](super::save) fills it in.
    pub library: String,
    /// Training steps completed.
    pub step: u64,
    /// Random seed of the run.
    pub seed: u64,
    /// Number of parameters of the network.
    pub parameters: u64,
    /// Mean loss of the last steps, if finite.
    pub loss: Option<f64>,
    /// Last step whose loss is on another scale, because a setting such as `loss.name` changed; the mean covers only later
    /// steps. `None`: all steps are comparable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub losses_since: Option<u64>,
    /// State of the learning-rate schedule, if it depends on the losses (`lr_schedule.name = "plateau"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plateau: Option<Plateau>,
    /// Time of writing, in seconds since 1970, if the caller sets it; leave it unset for reproducible files.
    pub created: Option<u64>,
    /// Fingerprint of the training images ([`Summary`](crate::data::Summary)), if the caller sets it.
    pub data: Option<String>,
    /// Number of training images, if the caller sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<u64>,
    /// Id of the run it belongs to ([`RunRecord`](crate::run_folder::RunRecord)); `None` in checkpoints of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// What computed its last step, e.g. `avx2`: others round differently. `None` in checkpoints of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub computed_by: Option<String>,
    /// Class names by index, of a class-conditional network, if the caller sets them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// The run's settings, as TOML.
    pub config: String,
    /// Length and hash of each other file; [`save`](super::save) fills it in.
    pub files: BTreeMap<String, FileFacts>,
}

impl Manifest {
    /// A manifest without a time, for [`save`](super::save) to complete.
    pub fn new(step: u64, config: &Config, parameters: u64, loss: Option<f64>) -> Self {
        Self {
            format: FORMAT,
            library: format!("ddpm {}", env!("CARGO_PKG_VERSION")),
            step,
            seed: config.train.seed,
            parameters,
            loss: loss.filter(|l| l.is_finite()),
            losses_since: None,
            plateau: None,
            created: None,
            data: None,
            images: None,
            run: None,
            computed_by: None,
            classes: Vec::new(),
            config: config.to_toml_commented(),
            files: BTreeMap::new(),
        }
    }

    /// Whether `folder` has a manifest, and so is a checkpoint's.
    pub fn exists(folder: &Path) -> bool {
        folder.join(MANIFEST).is_file()
    }

    /// Reads the manifest of the checkpoint in `folder`, without checking the other files.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing, damaged, or of a newer version.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::read(folder).map_err(|reason| Error::Checkpoint { path: folder.to_owned(), reason })
    }

    /// The run's settings; `checkpoint` is the checkpoint's folder, for error messages.
    ///
    /// # Errors
    /// Settings that this version does not understand.
    pub fn config(&self, checkpoint: &Path) -> Result<Config> {
        Config::from_toml(&checkpoint.join(MANIFEST), &self.config)
    }

    /// Whether the checkpoint contains averaged weights.
    pub fn has_ema(&self) -> bool {
        self.files.contains_key(super::EMA)
    }

    /// The file's content: JSON whose last entry is the hash of everything before it.
    pub(super) fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let json = serde_json::to_string_pretty(self)?;
        let open = json.strip_suffix("\n}").unwrap_or(&json);
        let sealed = format!("{open}{SEAL}");
        let hash = sha256(sealed.as_bytes());
        Ok(format!("{sealed}{hash}{END}").into_bytes())
    }

    /// Reads the manifest of the checkpoint in `folder`; the error is only the reason.
    pub(crate) fn read(folder: &Path) -> Result<Self, String> {
        let bytes = storage::read(&folder.join(MANIFEST), "read it", MAX_MANIFEST).map_err(reason)?;
        let text = str::from_utf8(&bytes).map_err(|_| format!("{MANIFEST}: is damaged: not UTF-8"))?;
        // Check the version first: a newer format may be sealed differently.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        if let Ok(Version { format }) = serde_json::from_str(text)
            && format > FORMAT
        {
            return Err(format!(
                "has format {format}, but this program supports formats up to {FORMAT}; use a newer ddpm"
            ));
        }
        let seal = text.rfind(SEAL).map(|at| text.split_at(at + SEAL.len()));
        let intact =
            seal.is_some_and(|(sealed, rest)| rest.strip_suffix(END) == Some(&sha256(sealed.as_bytes())));
        if !intact {
            return Err(format!("{MANIFEST}: is damaged: hash mismatch"));
        }
        let manifest: Self = serde_json::from_str(text).map_err(|e| format!("{MANIFEST}: {e}"))?;
        if let Some(name) =
            manifest.files.keys().find(|name| !FILES.contains(&name.as_str()) && average_of(name).is_none())
        {
            return Err(format!("{MANIFEST}: lists an unknown file {name:?}"));
        }
        for name in [MODEL, OPTIMIZER] {
            if !manifest.files.contains_key(name) {
                return Err(format!("{MANIFEST}: does not list {name}"));
            }
        }
        Ok(manifest)
    }

    /// Reads the file `name` of the checkpoint in `folder`, verifying its hash while `parse` runs; the error is only the
    /// reason.
    pub(super) fn read_file<T: Send>(
        &self,
        folder: &Path,
        name: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, String> + Send,
    ) -> Result<T, String> {
        let facts = self.files.get(name).ok_or_else(|| format!("has no {name}"))?;
        let max_bytes = facts.bytes.min(super::MAX_WEIGHTS);
        let bytes = storage::read(&folder.join(name), "read it", max_bytes).map_err(reason)?;
        if bytes.len() as u64 != facts.bytes {
            return Err(format!("{name}: is damaged: {} bytes instead of {}", bytes.len(), facts.bytes));
        }
        let (hash, parsed) = rayon::join(|| sha256(&bytes), || parse(&bytes));
        if hash != facts.sha256 {
            return Err(format!("{name}: is damaged: hash mismatch"));
        }
        parsed.map_err(|reason| format!("{name}: {reason}"))
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The error with only the file's name instead of its full path: the enclosing error names the folder.
fn reason(error: Error) -> String {
    match error {
        Error::Io { path, source, .. } => {
            format!("{}: cannot be read: {source}", path.file_name().unwrap_or_default().to_string_lossy())
        }
        other => other.to_string(),
    }
}
