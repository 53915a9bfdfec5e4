//! The library's one error type.

use crate::text::{LISTED, shown, thousands};
use std::path::{Path, PathBuf};

/// What went wrong, where, and (in the message) what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("{}: cannot {doing}: {source}", shown(path))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as "read the image", "write the checkpoint".
        doing: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The data set as a whole cannot be used.
    #[error("{}: {reason}", shown(path))]
    Data {
        /// The data set's path.
        path: PathBuf,
        /// Why, and the way out.
        reason: String,
    },
    /// Some images cannot be read; its text names the first of them.
    #[error("{}", bad_files(files))]
    BadFiles {
        /// Each file with its reason.
        files: Vec<(PathBuf, String)>,
    },
    /// A setting is wrong.
    #[error("{key}: {reason}")]
    Config {
        /// The setting's full name, as `train.batch_size`.
        key: String,
        /// Why, and what would be right.
        reason: String,
    },
    /// A file of settings cannot be understood.
    #[error("{}: {reason}", shown(path))]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Where in it and why.
        reason: String,
    },
    /// A checkpoint cannot be used.
    #[error("{}: {reason}", shown(path))]
    Checkpoint {
        /// The checkpoint's folder or file.
        path: PathBuf,
        /// What does not fit (the tensor and both shapes, where it is one) and the way out.
        reason: String,
    },
    /// The engine refused a graph or could not run it.
    #[error(transparent)]
    Engine(ddpm_engine::Error),
    /// Training left the finite numbers.
    #[error("step {step}: {what} is not a finite number; nothing of this step was kept. {advice}")]
    NotFinite {
        /// The step that was being made; the first is 1.
        step: u64,
        /// What was not finite: the loss, the gradients' norm, or a weight's name.
        what: String,
        /// Where to go on from, and how.
        advice: String,
    },
    /// A plot could not be drawn.
    #[error("cannot draw the plot: {reason}")]
    Plot {
        /// Why.
        reason: String,
    },
    /// There is something in the place of a result, which is not overwritten.
    #[error("{}: {reason}", path.display())]
    Taken {
        /// The file or folder.
        path: PathBuf,
        /// What is there, and the way out.
        reason: String,
    },
    /// It was asked to stop.
    #[error("stopped as asked")]
    Interrupted,
    /// A run folder cannot be used.
    #[error("{}: {reason}", shown(path))]
    Run {
        /// The run's folder.
        path: PathBuf,
        /// Why, and the way out.
        reason: String,
    },
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<ddpm_engine::Error> for Error {
    fn from(error: ddpm_engine::Error) -> Self {
        match error {
            ddpm_engine::Error::Interrupted => Self::Interrupted,
            other => Self::Engine(other),
        }
    }
}

impl Error {
    /// Adds the path and the attempt to an operating-system error: `.map_err(Error::io(path, "read the image"))`.
    pub fn io(path: impl AsRef<Path>, doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, doing, source }
    }
}

fn bad_files(files: &[(PathBuf, String)]) -> String {
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
    text + "\nrepair or remove them, or train without them: --on-bad-file skip"
}
