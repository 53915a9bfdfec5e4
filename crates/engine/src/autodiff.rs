//! Reverse mode: the backward pass as more nodes of the same graph.

use crate::error::{Error, Result};
use crate::graph::{Graph, Kind, Node, Tensor};
use crate::ops::{Add, Fill, Slice};
use std::collections::{HashMap, HashSet};

/// What an operation sees when it adds its backward nodes.
pub struct Backward<'a> {
    /// The graph, to add nodes to.
    pub graph: &'a mut Graph,
    /// The forward node.
    pub node: &'a Node,
    /// The gradient of the node's first result. (Further results are statistics that no gradient goes through.)
    pub dy: Tensor,
}

impl Backward<'_> {
    /// The node's operand `i`.
    pub fn input(&self, i: usize) -> Tensor {
        self.node.inputs[i]
    }

    /// The node's result `i`.
    pub fn output(&self, i: usize) -> Tensor {
        self.node.outputs[i]
    }

    /// Whether anything needs the gradient of operand `i`.
    pub fn wants(&self, i: usize) -> bool {
        self.graph.info(self.node.inputs[i]).differentiable
    }

    /// The name for backward nodes.
    pub fn name(&self) -> String {
        format!("{}.grad", self.node.name)
    }
}

/// Adds the backward pass of `loss` (one number) and returns the gradient of each parameter, in their order.
///
/// A parameter that the loss does not depend on gets a gradient of zeros.
pub fn backward(graph: &mut Graph, loss: Tensor) -> Result<Vec<Tensor>> {
    assert_eq!(graph.shape(loss).len(), 1, "the loss is one number");
    graph.begin_backward();
    let one = graph.add("loss.grad", Fill { ty: graph.ty(loss), value: 1.0 }, &[])?;
    backward_from(graph, loss, one)
}

/// As [`backward`], from any tensor `y` with its gradient `dy` given.
pub fn backward_from(graph: &mut Graph, y: Tensor, dy: Tensor) -> Result<Vec<Tensor>> {
    assert_eq!(graph.shape(y), graph.shape(dy), "a gradient has its tensor's shape");
    graph.begin_backward();
    let forward = graph.nodes().to_vec();
    let mut gradients = HashMap::from([(y, dy)]);
    for node in forward.iter().rev() {
        let Some(&dy) = gradients.get(&node.outputs[0]) else { continue };
        if !graph.info(node.outputs[0]).differentiable {
            continue;
        }
        let operation = node.op.operation();
        let shares = operation
            .backward(&mut Backward { graph, node, dy })?
            .ok_or_else(|| Error::NoGradient { node: node.name.clone(), operation: operation.name() })?;
        for (&input, share) in node.inputs.iter().zip(shares) {
            let Some(share) = share else { continue };
            let total = match gradients.get(&input) {
                None => share,
                Some(&before) => graph.add(&format!("{}.grad", node.name), Add, &[before, share])?,
            };
            gradients.insert(input, total);
        }
    }
    let mut taken = HashSet::new();
    let parameters = graph.parameters().to_vec();
    parameters
        .into_iter()
        .map(|p| {
            let (name, ty) = (format!("{}.grad", graph.info(p).name), graph.ty(p));
            match gradients.get(&p) {
                // The plan gives every gradient a place of its own, which a tensor that comes from elsewhere (or
                // stands for two parameters) cannot have.
                Some(&g) if graph.info(g).kind != Kind::Computed || !taken.insert(g) => {
                    graph.add(&name, Slice { from: 0, len: ty.shape.channels() }, &[g])
                }
                Some(&g) => Ok(g),
                None => graph.add(&name, Fill { ty, value: 0.0 }, &[]),
            }
        })
        .collect()
}
