//! The crate's error type.

use ddpm_text::{LISTED, shown, thousands};
use std::path::{Path, PathBuf};

/// An error; its message says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operating system error.
    #[error("{}: cannot {doing}: {source}", shown(path))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The attempted action, such as "read the image".
        doing: &'static str,
        /// The underlying error.
        source: std::io::Error,
    },
    /// A data set is unusable.
    #[error("{}: {reason}", shown(path))]
    Data {
        /// The data set's path.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Some images cannot be read; the message lists the first of them.
    #[error("{}", bad_files(files))]
    BadFiles {
        /// The files and reasons.
        files: Vec<(PathBuf, String)>,
    },
    /// An option is out of range.
    #[error("{option}: {reason}")]
    Option {
        /// The option's name, such as `data.size`.
        option: String,
        /// Why, and what is valid.
        reason: String,
    },
    /// There is too little memory.
    #[error("{0}")]
    Memory(String),
    /// Interrupted on request.
    #[error("interrupted")]
    Interrupted,
}

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Adds the path and the attempted action to an I/O error: `.map_err(Error::io(path, "read the image"))`.
    pub(crate) fn io(path: impl AsRef<Path>, doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, doing, source }
    }
}

/// The message for files that cannot be read.
pub fn bad_files(files: &[(PathBuf, String)]) -> String {
    let mut text = match files.len() {
        1 => "1 file cannot be read as an image:".to_owned(),
        n => format!("{} files cannot be read as images:", thousands(n)),
    };
    for (path, reason) in files.iter().take(LISTED) {
        text.push_str(&format!("\n  {}: {reason}", shown(path)));
    }
    if files.len() > LISTED {
        text.push_str(&format!("\n  and {} more", thousands(files.len() - LISTED)));
    }
    text + "\nfix or remove them, or train without them: --on-bad-file skip"
}
