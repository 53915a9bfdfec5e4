//! The crate's error type.

use std::error::Error as StdError;

/// An error; its message says what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option is out of range, or not supported by the sampler or the network.
    #[error("{option}: {reason}")]
    Option {
        /// The option's name, such as `steps`.
        option: String,
        /// Why, and what is valid.
        reason: String,
    },
    /// Interrupted on request.
    #[error("interrupted")]
    Interrupted,
    /// A denoiser or a callback failed.
    #[error(transparent)]
    Other(Box<dyn StdError + Send + Sync>),
}

/// The crate's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of a denoiser or a callback.
    pub fn other(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }

    /// The error for an invalid option.
    pub(crate) fn option(option: &str, reason: impl Into<String>) -> Self {
        Self::Option { option: option.to_owned(), reason: reason.into() }
    }
}
