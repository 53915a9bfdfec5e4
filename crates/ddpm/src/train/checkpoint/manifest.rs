//! `manifest.json`: what a checkpoint holds, and the hashes that show it is whole.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{FILES, MANIFEST, MODEL, OPTIMIZER, average_of};
use crate::train::config::Config;
use crate::train::disk;
use crate::train::rate::Plateau;
use crate::{Error, Result};

/// The format this library writes, and the newest it reads.
pub(super) const FORMAT: u32 = 1;
/// Largest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = 4 << 20;
/// What stands before the hash of everything before the hash.
const SEAL: &str = ",\n  \"manifest_sha256\": \"";
/// What stands after it.
const END: &str = "\"\n}\n";

/// Length and hash of one of a checkpoint's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the checkpoint format; [`save`](super::save) fills it in.
    pub format: u32,
    /// The library and version that wrote it; [`save`](super::save) fills it in.
    pub library: String,
    /// Training steps done.
    pub step: u64,
    /// Seed of the run's random numbers.
    pub seed: u64,
    /// Number of parameters of the network.
    pub parameters: u64,
    /// Mean loss of the last steps, where there is a finite one.
    pub loss: Option<f64>,
    /// Steps after which losses are measured as they are now (`train.loss`, what is predicted): of those behind them is the mean; none:
    /// of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub losses_since: Option<u64>,
    /// State of the learning rate, where it depends on the losses so far (`train.lr_schedule = "plateau"`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plateau: Option<Plateau>,
    /// When it was written, in seconds since 1970, where the caller says; leave it out for files equal to the bit.
    pub created: Option<u64>,
    /// Fingerprint of the images it was trained on ([`Summary`](crate::data::Summary)), where the caller says.
    pub data: Option<String>,
    /// How many images that are, where the caller says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<u64>,
    /// The run that it belongs to ([`RunRecord`](crate::train::run::RunRecord)); none in those of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// What computed its last step, as `avx2`: others round differently. None in those of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub computed_by: Option<String>,
    /// Names of the classes, of a network that takes them, where the caller says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// The run's settings, as TOML.
    pub config: String,
    /// Length and hash of each other file; [`save`](super::save) fills it in.
    pub files: BTreeMap<String, FileFacts>,
}

impl Manifest {
    /// A manifest for [`save`](super::save) to complete, without a time.
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

    /// That of the checkpoint in `folder`, without a look at its other files.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing, damaged, or of a newer version.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::read(folder).map_err(|reason| Error::Checkpoint { path: folder.to_owned(), reason })
    }

    /// The run's settings; `checkpoint` is the checkpoint's folder, for messages.
    ///
    /// # Errors
    /// Settings this version does not understand.
    pub fn config(&self, checkpoint: &Path) -> Result<Config> {
        Config::from_toml(&checkpoint.join(MANIFEST), &self.config)
    }

    /// Whether the checkpoint holds averaged weights.
    pub fn has_ema(&self) -> bool {
        self.files.contains_key(super::EMA)
    }

    /// The file's content: JSON whose last entry is the hash of all before it.
    pub(super) fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let json = serde_json::to_string_pretty(self)?;
        let open = json.strip_suffix("\n}").unwrap_or(&json);
        let sealed = format!("{open}{SEAL}");
        let hash = sha256(sealed.as_bytes());
        Ok(format!("{sealed}{hash}{END}").into_bytes())
    }

    /// Reads the manifest of the checkpoint in `folder`; the error is the reason alone.
    pub(crate) fn read(folder: &Path) -> Result<Self, String> {
        let bytes = disk::read(&folder.join(MANIFEST), "read it", MAX_MANIFEST).map_err(reason)?;
        let text = str::from_utf8(&bytes).map_err(|_| format!("{MANIFEST}: is damaged: not UTF-8"))?;
        // The version comes first: a newer format may seal itself in another way.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        if let Ok(Version { format }) = serde_json::from_str(text)
            && format > FORMAT
        {
            return Err(format!(
                "is of format {format}, and this program reads up to {FORMAT}; use a newer ddpm"
            ));
        }
        let seal = text.rfind(SEAL).map(|at| text.split_at(at + SEAL.len()));
        let whole =
            seal.is_some_and(|(sealed, rest)| rest.strip_suffix(END) == Some(&sha256(sealed.as_bytes())));
        if !whole {
            return Err(format!("{MANIFEST}: is damaged: its hash is wrong"));
        }
        let manifest: Self = serde_json::from_str(text).map_err(|e| format!("{MANIFEST}: {e}"))?;
        if let Some(name) =
            manifest.files.keys().find(|name| !FILES.contains(&name.as_str()) && average_of(name).is_none())
        {
            return Err(format!("{MANIFEST}: lists a file {name:?} that no checkpoint has"));
        }
        for name in [MODEL, OPTIMIZER] {
            if !manifest.files.contains_key(name) {
                return Err(format!("{MANIFEST}: does not list {name}"));
            }
        }
        Ok(manifest)
    }

    /// Reads the file `name` of the checkpoint in `folder` and checks it, while `parse` makes something of it; the error is the
    /// reason alone.
    pub(super) fn read_file<T: Send>(
        &self,
        folder: &Path,
        name: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, String> + Send,
    ) -> Result<T, String> {
        let facts = self.files.get(name).ok_or_else(|| format!("has no {name}"))?;
        let most = facts.bytes.min(super::MAX_WEIGHTS);
        let bytes = disk::read(&folder.join(name), "read it", most).map_err(reason)?;
        if bytes.len() as u64 != facts.bytes {
            return Err(format!("{name}: is damaged: {} bytes of {}", bytes.len(), facts.bytes));
        }
        let (hash, parsed) = rayon::join(|| sha256(&bytes), || parse(&bytes));
        if hash != facts.sha256 {
            return Err(format!("{name}: is damaged: its hash is wrong"));
        }
        parsed.map_err(|reason| format!("{name}: {reason}"))
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The error with the file's name for its whole path: the folder is named by the error around it.
fn reason(error: Error) -> String {
    match error {
        Error::Io { path, source, .. } => {
            format!("{}: cannot be read: {source}", path.file_name().unwrap_or_default().to_string_lossy())
        }
        other => other.to_string(),
    }
}
