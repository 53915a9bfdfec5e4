//! The operations: a closed set, one file per family, with the shape rule and the gradient of each. How an operation is computed is known to
//! the executors, which lower it to kernels by an exhaustive match on [`Op`].
//!
//! To add one, write its file and add its name to the list below; the compiler then names every executor that lacks it.

mod attention;
mod backward;
mod batch_norm;
mod cast;
mod concat;
mod conv;
mod diffusion;
mod dropout;
mod embedding;
mod layer_norm;
mod loss;
mod norm;
mod pointwise;
mod resample;
mod sinusoidal_embedding;
mod sum;
mod variational_bound;
mod weighted_loss;

pub use attention::{Attention, AttentionGrad};
pub use backward::Backward;
pub use batch_norm::{BatchNorm, BatchNormGrad, BatchNormInference, RunningAverage};
pub use cast::Cast;
pub use concat::{Concat, Slice};
pub use conv::{Conv2d, Conv2dTranspose, Conv2dWeightGrad, Padding};
pub use diffusion::{QSample, RandomNormal, RandomTimestep};
pub use dropout::Dropout;
pub use embedding::{Embedding, EmbeddingGrad};
pub use layer_norm::{LayerNorm, LayerNormGrad};
pub use loss::{Loss, LossGrad};
pub use norm::{GroupNorm, GroupNormGrad};
pub use pointwise::{
    Activate, ActivateGrad, Activation, Add, AddPerChannel, Affine, Fill, Modulate, Multiply,
};
pub use resample::{MaxPool, MaxPoolGrad, Resample, Taps};
pub use sinusoidal_embedding::SinusoidalEmbedding;
pub use sum::{ReduceSpatial, SumRows};
pub use variational_bound::{BoundStep, VariationalBound, VariationalBoundGrad, kl, log_likelihood};
pub use weighted_loss::{WeightedLoss, WeightedLossGrad};

use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;

/// Shape rule and gradient of an operation.
pub trait Operation {
    /// Its name in errors and reports.
    fn name(&self) -> &'static str;

    /// The types of its outputs, or what is wrong with the operands.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String>;

    /// Adds the nodes of its gradient and returns the gradient of each operand that needs one. `None` if it has no gradient.
    fn backward(&self, _: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(None)
    }

    /// The operand whose values the first output holds when the kernel starts. The plan makes the two share memory if the operand
    /// has no later consumer; otherwise the executor copies the operand.
    fn in_place(&self) -> Option<usize> {
        None
    }

    /// Whether its output may be recomputed for the backward pass instead of kept: the operation is memory-bound, and its gradient
    /// reads its only large operand or nothing.
    fn recomputable(&self) -> bool {
        false
    }

    /// Multiply-adds of matrix products and convolutions.
    fn multiply_adds(&self, _inputs: &[TensorType], _outputs: &[TensorType]) -> u64 {
        0
    }
}

macro_rules! operations {
    ($($name:ident),* $(,)?) => {
        /// Any operation, with its settings.
        #[derive(Clone, Debug)]
        #[allow(missing_docs, reason = "each variant is the documented type of the same name")]
        pub enum Op { $($name($name)),* }

        impl Op {
            /// The operation behind the variant.
            pub fn operation(&self) -> &dyn Operation {
                match self { $(Op::$name(op) => op),* }
            }
        }

        $(impl From<$name> for Op {
            fn from(op: $name) -> Op { Op::$name(op) }
        })*
    };
}

operations! {
    Activate, ActivateGrad, Add, AddPerChannel, Affine, Attention, AttentionGrad, BatchNorm, BatchNormInference, BatchNormGrad,
    Concat, Conv2d, Conv2dTranspose, Conv2dWeightGrad, RandomNormal, RandomTimestep, Dropout, Fill, GroupNorm, GroupNormGrad,
    LayerNorm, LayerNormGrad, Loss, LossGrad, Embedding, EmbeddingGrad, MaxPool, MaxPoolGrad, Multiply, QSample, Resample,
    RunningAverage, Modulate, SinusoidalEmbedding, Slice, ReduceSpatial, SumRows, Cast,
    VariationalBound, VariationalBoundGrad, WeightedLoss, WeightedLossGrad,
}

/// Checks the number of operands.
pub(crate) fn operands<const N: usize>(inputs: &[TensorType]) -> Result<[TensorType; N], String> {
    inputs.try_into().map_err(|_| format!("expected {N} operands, got {}", inputs.len()))
}

/// Checks that two operands have the same type.
pub(crate) fn same(a: TensorType, b: TensorType) -> Result<(), String> {
    if a == b { Ok(()) } else { Err("its operands must have the same shape and data type".to_owned()) }
}
