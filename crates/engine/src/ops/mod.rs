//! The operations: a closed set, one file a family. Each has its shape rule, its gradient and its CPU arithmetic there.
//!
//! To add one: write its file, and add its name to the list below.

mod attention;
mod batch_norm;
mod concat;
mod conv;
mod diffusion;
mod dropout;
mod embedding;
mod kept;
mod layer_norm;
mod lookup;
mod loss;
mod norm;
mod pointwise;
mod resample;
mod sum;
mod variational_bound;
mod weighted_loss;
mod winograd;

pub use attention::{Attention, AttentionGrad};
pub use batch_norm::{BatchNorm, BatchNormGrad, BatchNormInference, RunningAverage};
pub use concat::{Concat, Slice};
pub use conv::{Conv2d, Conv2dTranspose, Conv2dWeightGrad, Padding};
pub use diffusion::{DrawTimestep, QSample, RandomNormal};
pub use dropout::Dropout;
pub use embedding::SinusoidalEmbedding;
pub use kept::Cast;
pub use layer_norm::{LayerNorm, LayerNormGrad};
pub use lookup::{Embedding, LookupGrad};
pub use loss::{Loss, LossGrad};
pub use norm::{GroupNorm, GroupNormGrad};
pub use pointwise::{
    Activate, ActivateGrad, Activation, Add, AddPerChannel, Affine, Fill, Modulate, Multiply,
};
pub use resample::{MaxPool, MaxPoolGrad, Resample, Taps};
pub use sum::{ReduceSpatial, SumRows};
pub use variational_bound::{BoundStep, VariationalBound, VariationalBoundGrad, kl, log_likelihood};
pub use weighted_loss::{WeightedLoss, WeightedLossGrad};

use crate::autodiff::Backward;
use crate::cpu::{Cpu, Kernel};
use crate::error::Result;
use crate::graph::Tensor;
use crate::shape::TensorType;

/// What every operation knows about itself.
pub trait Operation {
    /// Its name in errors and reports.
    fn name(&self) -> &'static str;

    /// The types of its results, or what is wrong with the operands.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String>;

    /// Adds the nodes of its gradient; one gradient for each operand that wants one. None: it has no gradient.
    fn backward(&self, _: &mut Backward<'_>) -> Result<Option<Vec<Option<Tensor>>>> {
        Ok(None)
    }

    /// The operand whose values stand in the first result when the operation starts: the plan lets the two share
    /// memory where nobody else reads the operand, and the executor copies where somebody does.
    fn in_place(&self) -> Option<usize> {
        None
    }

    /// Whether its result may be made again for the backward pass rather than kept: it takes about as long as reading and
    /// writing it, and its gradient reads its only large operand or nothing.
    fn recomputable(&self) -> bool {
        false
    }

    /// Whether an operand may be of bf16; the results are of f32 then as well.
    fn takes_bf16(&self, _operand: usize) -> bool {
        false
    }

    /// Multiply-adds of matrix products and convolutions.
    fn multiply_adds(&self, _inputs: &[TensorType], _outputs: &[TensorType]) -> u64 {
        0
    }

    /// Its arithmetic on the CPU, prepared for these types.
    fn cpu(&self, cpu: &Cpu, inputs: &[TensorType], outputs: &[TensorType]) -> Kernel;
}

macro_rules! operations {
    ($($name:ident),* $(,)?) => {
        /// Any operation, with its settings.
        #[derive(Clone, Debug)]
        #[allow(missing_docs, reason = "each variant is the documented type of the same name")]
        pub enum Op { $($name($name)),* }

        impl Op {
            /// What the operation knows about itself.
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
    Concat, Conv2d, Conv2dTranspose, Conv2dWeightGrad, RandomNormal, DrawTimestep, Dropout, Fill, GroupNorm, GroupNormGrad,
    LayerNorm, LayerNormGrad, Loss, LossGrad, Embedding, LookupGrad, MaxPool, MaxPoolGrad, Multiply, QSample, Resample,
    RunningAverage, Modulate, SinusoidalEmbedding, Slice, ReduceSpatial, SumRows, Cast,
    VariationalBound, VariationalBoundGrad, WeightedLoss, WeightedLossGrad,
}

/// Checks the number of operands.
pub(crate) fn operands<const N: usize>(inputs: &[TensorType]) -> Result<[TensorType; N], String> {
    inputs.try_into().map_err(|_| format!("takes {N} operands, not {}", inputs.len()))
}

/// Checks that two operands have one type.
pub(crate) fn same(a: TensorType, b: TensorType) -> Result<(), String> {
    if a == b { Ok(()) } else { Err("its operands must have the same shape and format".to_owned()) }
}
