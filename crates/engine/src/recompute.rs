//! Forgets what is quickly made again: the backward pass computes normalisations, activations and the like a second time,
//! from what it reads anyway, instead of keeping their results through the whole forward pass.
//!
//! A convolution's weight gradient reads the convolution's input, which is mostly a norm or an activation of a tensor that
//! their own gradients read too. Then one of the two is enough. The second time gives the same bits as the first.

use crate::graph::{Graph, Node, Tensor};
use std::collections::HashMap;

/// Tensors of fewer numbers are kept: there is nothing to gain.
const SMALL: usize = 1 << 12;

/// Makes the backward nodes of `graph`, those from number `forward` on, read second results of
/// [recomputable](crate::ops::Operation::recomputable) nodes, made just before they are first read.
pub fn recompute(graph: &mut Graph, forward: usize) {
    let nodes = graph.nodes().to_vec();
    let mut maker = HashMap::new();
    for (i, node) in nodes[..forward].iter().enumerate() {
        maker.extend(node.outputs.iter().map(|&t| (t, i)));
    }
    let mut again = Again { graph, nodes: &nodes, maker, second: HashMap::new(), made: Vec::new() };
    for node in &nodes[forward..] {
        let inputs = node.inputs.iter().map(|&t| again.tensor(t)).collect();
        again.made.push(Node { inputs, ..node.clone() });
    }
    let backward = again.made;
    let all = nodes[..forward].iter().cloned().chain(backward).collect();
    graph.set_nodes(all);
}

struct Again<'a> {
    graph: &'a mut Graph,
    nodes: &'a [Node],
    /// The forward node that makes a tensor.
    maker: HashMap<Tensor, usize>,
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
        let first = t == node.outputs[0] && self.graph.shape(t).len() >= SMALL;
        if !first || !node.op.operation().recomputable() {
            return t;
        }
        let inputs = node.inputs.iter().map(|&t| self.tensor(t)).collect();
        let outputs: Vec<Tensor> = node.outputs.iter().map(|&t| self.graph.twin(t)).collect();
        let second = outputs[0];
        self.second.insert(t, second);
        let name = format!("{}.again", node.name);
        self.made.push(Node { op: node.op.clone(), inputs, outputs, name });
        second
    }
}
