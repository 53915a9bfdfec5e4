//! What an operation sees when it adds its gradient to a graph.

use crate::graph::{Graph, Node, Tensor};

/// What an operation sees when it adds its backward nodes.
pub struct Backward<'a> {
    /// The graph, to add nodes to.
    pub graph: &'a mut Graph,
    /// The forward node.
    pub node: &'a Node,
    /// The gradient of the node's first output. (Further outputs are statistics without a gradient.)
    pub dy: Tensor,
}

impl Backward<'_> {
    /// The node's operand `i`.
    pub fn input(&self, i: usize) -> Tensor {
        self.node.inputs[i]
    }

    /// The node's output `i`.
    pub fn output(&self, i: usize) -> Tensor {
        self.node.outputs[i]
    }

    /// Whether the gradient of operand `i` is needed.
    pub fn needs_grad(&self, i: usize) -> bool {
        self.graph.info(self.node.inputs[i]).differentiable
    }

    /// The name for backward nodes.
    pub fn name(&self) -> String {
        format!("{}.grad", self.node.name)
    }
}
