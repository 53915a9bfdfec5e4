//! A CPU kernel of a node: its arguments, and the memory it needs besides the node's tensors.

use crate::scratch::Scratch;
use ddpm_engine::RngKey;
use ddpm_engine::plan::Workspace;

/// Elements per task of elementwise operations.
pub(crate) const CHUNK: usize = 1 << 15;

/// The arguments of a kernel call.
pub(crate) struct KernelArgs<'a> {
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

/// An operation's kernel, specialized for its shapes. All sizes are in f32 elements.
pub(crate) struct Kernel {
    pub run: Box<dyn Fn(&mut KernelArgs<'_>) + Send + Sync>,
    pub workspace: Workspace,
    pub per_thread: usize,
}

impl Kernel {
    /// A kernel without scratch memory.
    pub(crate) fn new(run: impl Fn(&mut KernelArgs<'_>) + Send + Sync + 'static) -> Self {
        Self { run: Box::new(run), workspace: Workspace::default(), per_thread: 0 }
    }

    /// Requests scratch memory shared by all threads.
    pub(crate) fn shared(mut self, shared: usize) -> Self {
        self.workspace.scratch = shared;
        self
    }

    /// Requests memory that persists from run to run.
    pub(crate) fn cached(mut self, cached: usize) -> Self {
        self.workspace.cached = cached;
        self
    }

    /// Requests scratch memory for each thread.
    pub(crate) fn per_thread(self, per_thread: usize) -> Self {
        Self { per_thread, ..self }
    }
}
