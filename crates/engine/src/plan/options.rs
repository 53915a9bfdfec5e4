//! What a plan is built for.

use crate::graph::Tensor;
use crate::plan_buffers::BufferSpec;
pub use ddpm_kernels::conv::MatmulDtype;

/// The approximations that executors may make relative to plain f32 arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeOptions {
    /// Whether convolutions of 3x3, and of 4x4 with stride 2, may use Winograd's algorithm where it is faster: a quarter, or two
    /// fifths, of the multiplications for three to five times the rounding error.
    pub winograd: bool,
    /// Precision of the matmul operands of convolutions, linear layers and attention; accumulation is in f32. With bf16, Winograd
    /// forward passes use 16-bit integers instead, or f32 on a machine without integer dot products. On the CPU, training plans
    /// then [store](crate::passes::bf16_storage) in bf16 what norms and activations read again; on a GPU, all tensors between nodes.
    pub matmul_dtype: MatmulDtype,
}

impl Default for ComputeOptions {
    fn default() -> Self {
        Self { winograd: true, matmul_dtype: MatmulDtype::F32 }
    }
}

/// What a plan is built for.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// The parameters' gradients, as [`backward`](crate::passes::autodiff::backward) returns them; `None` for inference.
    pub gradients: Option<Vec<Tensor>>,
    /// Whether gradients are accumulated over several runs per update.
    pub accumulate: bool,
    /// The loss, if the optimizer is fused into [training runs](crate::Executor::train): each weight is updated as soon as its gradient
    /// is computed and no later node reads the weight, so gradients have no memory of their own and cannot be read. A run
    /// updates nothing if the loss is not finite. Excludes `accumulate`. Executors may instead plan without fusion and update all
    /// weights after the last node of a training run.
    pub fuse_optimizer: Option<Tensor>,
    /// Whether fused updates are deferred until after the last node where that takes at most a twentieth more memory: a
    /// run can be [stopped](crate::Executor::set_stop) until the first update.
    pub defer_updates: bool,
    /// Maximum norm of the gradients in training runs; 0 disables clipping. Clipping needs all gradients at once, so the CPU does not
    /// fuse the optimizer then.
    pub clip_norm: f64,
    /// Whether to maintain a moving average of the weights.
    pub ema: bool,
    /// Tensors that the caller reads after a run.
    pub outputs: Vec<Tensor>,
    /// The approximations that the executor may make.
    pub compute: ComputeOptions,
    /// A tensor stays intact for this many nodes after its last use, so that nodes may run concurrently.
    pub liveness_slack: usize,
    /// Buffers for samplers; only executors that [compute on them](crate::Executor::sampler_buffers) allocate them.
    pub sampler_buffers: Option<BufferSpec>,
}

/// An array with one element for each element of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// The weights.
    Weights,
    /// The gradients of the last run.
    Gradients,
    /// The sum of the gradients of several runs.
    GradientSum,
    /// Adam's first moment.
    ExpAvg,
    /// Adam's second moment.
    ExpAvgSq,
    /// The moving average of the weights.
    Ema,
}

impl Region {
    pub(super) const COUNT: usize = 6;
    /// In memory order. The gradients come last, since tensors share their memory.
    pub(super) const ALL: [Region; Self::COUNT] =
        [Self::Weights, Self::GradientSum, Self::ExpAvg, Self::ExpAvgSq, Self::Ema, Self::Gradients];
}
