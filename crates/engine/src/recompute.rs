//! Forgets what is quickly made again: the backward pass computes normalisations, activations and the like a second time,
//! from what it reads anyway, instead of keeping their results through the whole forward pass.
//!
//! A convolution's weight gradient reads the convolution's input, which is mostly a norm or an activation of a tensor that
//! their own gradients read too. Then one of the two is enough. So it is with a skip connection joined to what came back up:
//! the former is kept for other gradients. The second time gives the same bits as the first.

use crate::graph::{Graph, Node, Tensor};
use std::collections::{HashMap, HashSet};

/// Tensors of fewer numbers are left as they are: there is nothing to gain.
pub(crate) const SMALL: usize = 1 << 12;

/// Makes the backward nodes of `graph` read second results of [recomputable](crate::ops::Operation::recomputable) nodes, made
/// just before they are first read. A graph without a backward pass stays as it is.
pub fn recompute(graph: &mut Graph) {
    let Some(forward) = graph.backward_begins() else { return };
    let nodes = graph.nodes().to_vec();
    let read = nodes[forward..].iter().flat_map(|n| n.inputs.iter().copied()).collect();
    let mut maker = HashMap::new();
    for (i, node) in nodes[..forward].iter().enumerate() {
        maker.extend(node.outputs.iter().map(|&t| (t, i)));
    }
    let mut again = Again { graph, nodes: &nodes, maker, read, second: HashMap::new(), made: Vec::new() };
    for node in &nodes[forward..] {
        let inputs = node.inputs.iter().map(|&t| again.tensor(t)).collect();
        again.made.push(Node { inputs, ..node.clone() });
    }
    let backward = again.made;
    let all = nodes[..forward].iter().cloned().chain(backward).collect();
    graph.set_nodes(all, Some(forward));
}

struct Again<'a> {
    graph: &'a mut Graph,
    nodes: &'a [Node],
    /// The forward node that makes a tensor.
    maker: HashMap<Tensor, usize>,
    /// What the backward pass read at first.
    read: HashSet<Tensor>,
    /// The second result that stands for a tensor.
    second: HashMap<Tensor, Tensor>,
    /// Backward nodes and second forward nodes.
    made: Vec<Node>,
}

impl Again<'_> {
    /// What a backward node reads in the place of `t`.
    fn tensor(&mut self, t: Tensor) -> Tensor {
        if let Some(&second) = self.second.get(&t) {
            return second;
        }
        let Some(&maker) = self.maker.get(&t) else { return t };
        let node = &self.nodes[maker];
        // Further results are statistics, which stay.
        let len = |t: Tensor| self.graph.shape(t).len();
        let first = t == node.outputs[0] && len(t) >= SMALL;
        if !first || !node.op.operation().recomputable() {
            return t;
        }
        // Of several large operands one is kept anyway, or nothing is gained.
        let mut operands = node.inputs.iter().filter(|&&operand| 8 * len(operand) >= len(t));
        if operands.clone().count() > 1 && !operands.any(|t| self.read.contains(t)) {
            return t;
        }
        let inputs = node.inputs.iter().map(|&t| self.tensor(t)).collect();
        let mut twin = |&t: &Tensor| self.graph.twin(t, self.graph.ty(t).dtype);
        let outputs: Vec<Tensor> = node.outputs.iter().map(&mut twin).collect();
        let second = outputs[0];
        self.second.insert(t, second);
        let name = format!("{}.again", node.name);
        self.made.push(Node { op: node.op.clone(), inputs, outputs, name });
        second
    }
}
