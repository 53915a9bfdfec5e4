//! The engine's one error type.

use crate::shape::Shape;

/// Why a graph, plan or run failed, with the node and the shapes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation does not accept operands of these shapes.
    #[error("{node} ({operation}): {reason}; got {shapes:?}")]
    Shape {
        /// The node's name.
        node: String,
        /// The operation's name.
        operation: &'static str,
        /// What it requires.
        reason: String,
        /// The operands' shapes.
        shapes: Vec<Shape>,
    },
    /// An operation without a gradient lies between a parameter and the loss.
    #[error("{node} ({operation}) has no gradient")]
    NoGradient {
        /// The node's name.
        node: String,
        /// The operation's name.
        operation: &'static str,
    },
    /// An executor does not support a data type.
    #[error("{node}: the {executor} executor does not support {dtype} here")]
    DType {
        /// The node's name.
        node: String,
        /// The executor's name.
        executor: &'static str,
        /// The data type.
        dtype: crate::shape::DType,
    },
    /// An executor does not support an operation, or not with these sizes.
    #[error("{node} ({operation}): not supported by the {executor} executor: {reason}")]
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
    #[error("{tensor}: got {given} elements for a tensor of shape {shape} ({expected} elements)")]
    Length {
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        shape: Shape,
        /// Elements of the shape.
        expected: usize,
        /// Elements given.
        given: usize,
    },
    /// The memory, threads or instruction set that the plan needs are not available, or the plan lacks what a call needs.
    #[error("{0}")]
    Resources(String),
    /// A run ended early because of a [stop request](crate::Executor::set_stop).
    #[error("interrupted by a stop request")]
    Interrupted,
    /// A device is missing, unusable or lost.
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
