//! The engine's one error type.

use crate::shape::Shape;

/// What went wrong, with the node and the shapes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation does not take tensors of these shapes.
    #[error("{node} ({operation}): {reason}; it was given {shapes:?}")]
    Shape {
        /// The node's name.
        node: String,
        /// The operation's name.
        operation: &'static str,
        /// What it needs.
        reason: String,
        /// What it was given.
        shapes: Vec<Shape>,
    },
    /// An operation has no gradient, but a parameter's gradient goes through it.
    #[error("{node} ({operation}) has no gradient")]
    NoGradient {
        /// The node's name.
        node: String,
        /// The operation's name.
        operation: &'static str,
    },
    /// An executor has no arithmetic for a number format.
    #[error("{node}: the {executor} executor has no {dtype} arithmetic")]
    DType {
        /// The node's name.
        node: String,
        /// The executor's name.
        executor: &'static str,
        /// The number format.
        dtype: crate::shape::DType,
    },
    /// An executor has no arithmetic for an operation, or not for these sizes.
    #[error("{node} ({operation}): the {executor} executor does not take it: {reason}")]
    Unsupported {
        /// The node's name.
        node: String,
        /// The operation's name.
        operation: &'static str,
        /// The executor's name.
        executor: &'static str,
        /// Why, and what to do.
        reason: String,
    },
    /// Data of the wrong length was written to or read from a tensor.
    #[error("{tensor}: {given} numbers for a tensor of shape {shape} ({expected} numbers)")]
    Length {
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        shape: Shape,
        /// Numbers of the shape.
        expected: usize,
        /// Numbers that were given.
        given: usize,
    },
    /// The forced instruction set is not there.
    #[error(transparent)]
    Isa(#[from] ddpm_kernels::IsaError),
    /// The memory or threads that the plan needs cannot be had.
    #[error("{0}")]
    Resources(String),
    /// A run was [asked to stop](crate::Executor::set_stop).
    #[error("stopped as asked")]
    Interrupted,
    /// A device is not there, cannot be used or was lost.
    #[error("{device}: {reason}")]
    Device {
        /// The device, as a setting names it.
        device: String,
        /// What is wrong, and what to do.
        reason: String,
    },
}

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
