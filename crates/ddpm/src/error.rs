//! The library's error type.

use crate::text::shown;
use std::path::{Path, PathBuf};

/// An error; its message says what went wrong, where, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operating system error.
    #[error("{}: cannot {doing}: {source}", shown(path))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The attempted action, such as "read the image" or "write the checkpoint".
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
    #[error("{}", ddpm_data::bad_files(files))]
    BadFiles {
        /// The files and reasons.
        files: Vec<(PathBuf, String)>,
    },
    /// A setting is invalid.
    #[error("{key}: {reason}")]
    Config {
        /// The setting's full name, such as `train.batch_size`.
        key: String,
        /// Why, and what is valid.
        reason: String,
    },
    /// A settings file is invalid.
    #[error("{}: {reason}", shown(path))]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Where in it and why.
        reason: String,
    },
    /// A checkpoint is unusable.
    #[error("{}: {reason}", shown(path))]
    Checkpoint {
        /// The checkpoint's folder or file.
        path: PathBuf,
        /// What does not match (for a tensor, its name and both shapes), and what to do.
        reason: String,
    },
    /// The engine rejected a graph or could not run it.
    #[error(transparent)]
    Engine(ddpm_engine::Error),
    /// Training diverged: a value is infinite or NaN.
    #[error("step {step}: {what} is not finite; the step was discarded. {advice}")]
    NotFinite {
        /// The failed step, counting from 1.
        step: u64,
        /// What is not finite: the loss, the gradient norm, or a weight by name.
        what: String,
        /// How to resume, and from which checkpoint.
        advice: String,
    },
    /// A plot could not be drawn.
    #[error("cannot draw the plot: {reason}")]
    Plot {
        /// Why.
        reason: String,
    },
    /// The output path is taken, and is not overwritten.
    #[error("{}: {reason}", path.display())]
    Taken {
        /// The file or folder.
        path: PathBuf,
        /// What exists there, and what to do.
        reason: String,
    },
    /// A denoiser of the caller failed.
    #[error(transparent)]
    Denoiser(Box<dyn std::error::Error + Send + Sync>),
    /// Interrupted on request.
    #[error("interrupted")]
    Interrupted,
    /// A run folder is unusable.
    #[error("{}: {reason}", shown(path))]
    Run {
        /// The run's folder.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
}

/// The library's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<ddpm_engine::Error> for Error {
    fn from(error: ddpm_engine::Error) -> Self {
        match error {
            ddpm_engine::Error::Interrupted => Self::Interrupted,
            other => Self::Engine(other),
        }
    }
}

impl From<ddpm_data::Error> for Error {
    fn from(error: ddpm_data::Error) -> Self {
        use ddpm_data::Error as E;
        match error {
            E::Io { path, doing, source } => Self::Io { path, doing, source },
            E::Data { path, reason } => Self::Data { path, reason },
            E::BadFiles { files } => Self::BadFiles { files },
            E::Option { option, reason } => Self::Config { key: option, reason },
            E::Interrupted => Self::Interrupted,
            other => Self::Engine(ddpm_engine::Error::Resources(other.to_string())),
        }
    }
}

impl From<ddpm_diffusion::Error> for Error {
    fn from(error: ddpm_diffusion::Error) -> Self {
        match error {
            ddpm_diffusion::Error::Option { option, reason } => Self::Config { key: option, reason },
            ddpm_diffusion::Error::Interrupted => Self::Interrupted,
            ddpm_diffusion::Error::Other(other) => match other.downcast::<Self>() {
                Ok(own) => *own,
                Err(other) => Self::Denoiser(other),
            },
            other => Self::Denoiser(Box::new(other)),
        }
    }
}

/// For networks and callbacks of this crate that samplers call.
impl From<Error> for ddpm_diffusion::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Config { key: option, reason } => Self::Option { option, reason },
            Error::Interrupted => Self::Interrupted,
            other => Self::other(other),
        }
    }
}

impl Error {
    /// Adds the path and the attempted action to an I/O error: `.map_err(Error::io(path, "read the image"))`.
    pub fn io(path: impl AsRef<Path>, doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, doing, source }
    }
}
