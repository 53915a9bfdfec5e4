//! Reverse-mode differentiation: appends the backward pass to the same graph.

use crate::error::{Error, Result};
use crate::graph::{Graph, Tensor, TensorKind};
use crate::ops::{Add, Backward, Fill, Slice};
use std::collections::{HashMap, HashSet};

/// Adds the backward pass of `loss`, a scalar, and returns the gradient of each parameter, in their order.
///
/// A parameter that the loss does not depend on gets a gradient of zeros.
pub fn backward(graph: &mut Graph, loss: Tensor) -> Result<Vec<Tensor>> {
    assert_eq!(graph.shape(loss).len(), 1, "the loss is a scalar");
    graph.begin_backward();
    let one = graph.add("loss.grad", Fill { ty: graph.ty(loss), value: 1.0 }, &[])?;
    backward_from(graph, loss, one)
}

/// Like [`backward`], from any tensor `y` with its gradient `dy` given.
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
        let grads = operation
            .backward(&mut Backward { graph, node, dy })?
            .ok_or_else(|| Error::NoGradient { node: node.name.clone(), operation: operation.name() })?;
        for (&input, grad) in node.inputs.iter().zip(grads) {
            let Some(grad) = grad else { continue };
            let total = match gradients.get(&input) {
                None => grad,
                Some(&sum) => graph.add(&format!("{}.grad", node.name), Add, &[sum, grad])?,
            };
            gradients.insert(input, total);
        }
    }
    let mut used = HashSet::new();
    let parameters = graph.parameters().to_vec();
    parameters
        .into_iter()
        .map(|p| {
            let (name, ty) = (format!("{}.grad", graph.info(p).name), graph.ty(p));
            match gradients.get(&p) {
                // The plan gives every gradient its own range of the gradient region, so a tensor that is not
                // computed, or is the gradient of two parameters, is copied.
                Some(&g) if graph.info(g).kind != TensorKind::Computed || !used.insert(g) => {
                    graph.add(&name, Slice { from: 0, len: ty.shape.channels() }, &[g])
                }
                Some(&g) => Ok(g),
                None => graph.add(&name, Fill { ty, value: 0.0 }, &[]),
            }
        })
        .collect()
}
