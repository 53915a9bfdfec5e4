//! Rematerialization: the backward pass recomputes normalisations, activations and other cheap operations from tensors that it
//! reads anyway, so that their results need not stay alive through the forward pass.
//!
//! A convolution's weight gradient reads the convolution's input, usually a norm or an activation of a tensor that the gradient of that
//! norm or activation reads too; keeping one of the two is enough. The same holds for the concatenation of a skip connection, which is
//! kept for other gradients, with the upsampled tensor. Recomputed tensors have the same bits.

use crate::graph::{Graph, Node, Tensor};
use std::collections::{HashMap, HashSet};

/// Tensors with fewer elements are kept: recomputing them gains nothing.
pub(crate) const MIN_LEN: usize = 1 << 12;

/// Makes the backward nodes of `graph` read recomputed copies of the outputs of
/// [recomputable](crate::ops::Operation::recomputable) nodes, each computed just before it is first read. A graph without a backward
/// pass is left unchanged.
pub fn recompute(graph: &mut Graph) {
    let Some(forward) = graph.backward_start() else { return };
    let nodes = graph.nodes().to_vec();
    let read = nodes[forward..].iter().flat_map(|n| n.inputs.iter().copied()).collect();
    let mut producers = HashMap::new();
    for (i, node) in nodes[..forward].iter().enumerate() {
        producers.extend(node.outputs.iter().map(|&t| (t, i)));
    }
    let (copies, backward) = (HashMap::new(), Vec::new());
    let mut rematerializer = Rematerializer { graph, nodes: &nodes, producers, read, copies, backward };
    for node in &nodes[forward..] {
        let inputs = node.inputs.iter().map(|&t| rematerializer.tensor(t)).collect();
        rematerializer.backward.push(Node { inputs, ..node.clone() });
    }
    let backward = rematerializer.backward;
    let all = nodes[..forward].iter().cloned().chain(backward).collect();
    graph.set_nodes(all, Some(forward));
}

struct Rematerializer<'a> {
    graph: &'a mut Graph,
    nodes: &'a [Node],
    /// The forward node that computes a tensor.
    producers: HashMap<Tensor, usize>,
    /// The operands of the original backward nodes.
    read: HashSet<Tensor>,
    /// The recomputed copy of a tensor.
    copies: HashMap<Tensor, Tensor>,
    /// Backward nodes and recomputed forward nodes.
    backward: Vec<Node>,
}

impl Rematerializer<'_> {
    /// What a backward node reads in place of `t`.
    fn tensor(&mut self, t: Tensor) -> Tensor {
        if let Some(&copy) = self.copies.get(&t) {
            return copy;
        }
        let Some(&producer) = self.producers.get(&t) else { return t };
        let node = &self.nodes[producer];
        // Further outputs are statistics, which are kept.
        let len = |t: Tensor| self.graph.shape(t).len();
        let is_candidate = t == node.outputs[0] && len(t) >= MIN_LEN;
        if !is_candidate || !node.op.operation().recomputable() {
            return t;
        }
        // With several large operands, recomputing pays only if one of them is kept anyway.
        let mut operands = node.inputs.iter().filter(|&&operand| 8 * len(operand) >= len(t));
        if operands.clone().count() > 1 && !operands.any(|t| self.read.contains(t)) {
            return t;
        }
        let inputs = node.inputs.iter().map(|&t| self.tensor(t)).collect();
        let mut new_like = |&t: &Tensor| self.graph.new_like(t, self.graph.ty(t).dtype);
        let outputs: Vec<Tensor> = node.outputs.iter().map(&mut new_like).collect();
        let copy = outputs[0];
        self.copies.insert(t, copy);
        let name = format!("{}.again", node.name);
        self.backward.push(Node { op: node.op.clone(), inputs, outputs, name });
        copy
    }
}
