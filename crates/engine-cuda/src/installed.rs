//! The installed cuDNN and cuBLASLt: their versions, and whether they accept our descriptions. Needs no GPU.

use crate::ffi::libraries::{CublasLt, Cudnn};
use crate::library::{Library, LibraryOp};

/// cuDNN's version; or why it cannot be used.
///
/// # Errors
/// If it cannot be found, is too old, or lacks a function.
pub fn cudnn_version() -> Result<String, String> {
    Cudnn::version().map(|v| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100))
}

/// cuBLASLt's version; or why it cannot be used.
///
/// # Errors
/// As [`cudnn_version`].
pub fn cublaslt_version() -> Result<String, String> {
    CublasLt::version().map(|v| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100))
}

/// Whether any library is available.
pub fn any() -> bool {
    Cudnn::version().is_ok() || CublasLt::version().is_ok()
}

/// Describes an operation to its library as for a real call, and compares cuDNN's output size with ours.
///
/// # Errors
/// The library's error.
pub fn check_description(op: &LibraryOp<usize>) -> Result<(), String> {
    match op.library {
        Library::Cudnn => Cudnn::check_description(op),
        Library::CublasLt => CublasLt::check_description(op),
    }
}
