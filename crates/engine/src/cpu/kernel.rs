//! The CPU kernels of operations: what they are specialized for, their arguments and their scratch memory.

use crate::executor::RngKey;
use crate::plan::{ComputeOptions, Workspace};
use crate::scratch::Scratch;
use ddpm_kernels::Isa;

/// What kernels are specialized for, besides shapes.
#[derive(Clone, Copy, Debug)]
pub struct CpuContext {
    pub(super) isa: Isa,
    pub(super) compute: ComputeOptions,
    pub(super) fixed_weights: bool,
}

impl CpuContext {
    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The approximations that are allowed.
    pub fn compute(&self) -> ComputeOptions {
        self.compute
    }

    /// Whether the node's weights (its second operand) are parameters of an inference plan, so that data derived from them may
    /// be [cached](KernelArgs::cached).
    pub fn fixed_weights(&self) -> bool {
        self.fixed_weights
    }
}

/// The arguments of a kernel call.
pub struct KernelArgs<'a> {
    /// The node's operands; one that shares memory with an output is empty.
    pub inputs: &'a [&'a [f32]],
    /// The node's outputs.
    pub outputs: &'a mut [&'a mut [f32]],
    /// Scratch memory shared by all threads.
    pub shared: &'a mut [f32],
    /// Memory that persists from run to run, private to the node.
    pub cached: &'a mut [f32],
    /// Whether weights were written since the last run: cached data must be recomputed.
    pub new_weights: bool,
    /// Per-thread scratch memory.
    pub scratch: &'a Scratch,
    /// Key of the random numbers.
    pub rng: RngKey,
}

/// An operation's CPU implementation, specialized for its shapes.
pub struct Kernel {
    pub(super) run: Box<dyn Fn(&mut KernelArgs<'_>) + Send + Sync>,
    pub(super) workspace: Workspace,
    pub(super) per_thread: usize,
}

impl Kernel {
    /// A kernel without scratch memory.
    pub fn new(run: impl Fn(&mut KernelArgs<'_>) + Send + Sync + 'static) -> Self {
        Self { run: Box::new(run), workspace: Workspace::default(), per_thread: 0 }
    }

    /// Requests scratch memory shared by all threads.
    pub fn shared(mut self, shared: usize) -> Self {
        self.workspace.scratch = shared;
        self
    }

    /// Requests memory that persists from run to run.
    pub fn cached(mut self, cached: usize) -> Self {
        self.workspace.cached = cached;
        self
    }

    /// Requests scratch memory for each thread.
    pub fn per_thread(self, per_thread: usize) -> Self {
        Self { per_thread, ..self }
    }
}
