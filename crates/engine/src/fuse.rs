//! Joins operations into one where a kernel does both in one pass over memory. Networks are written without it.
//!
//! - group norm, then SiLU: one normalisation;
//! - a convolution, then an addition of `[n, c]` (the time embedding) or of a tensor of its shape (the residual): the
//!   convolution's epilogue.
//!
//! Only where nothing else reads the tensor between the two, and before the backward pass is added.

use crate::error::Result;
use crate::graph::{Graph, Node, Tensor};
use crate::ops::{Activate, Activation, Op};
use std::collections::HashMap;

/// The graph with operations joined; tensors in `keep` go on existing.
pub fn fuse(mut graph: Graph, keep: &[Tensor]) -> Result<Graph> {
    let mut nodes = graph.nodes().to_vec();
    let mut readers: HashMap<Tensor, usize> = keep.iter().map(|&t| (t, 1)).collect();
    for t in nodes.iter().flat_map(|n| &n.inputs) {
        *readers.entry(*t).or_default() += 1;
    }
    let mut maker: HashMap<Tensor, usize> = HashMap::new();
    let mut gone = vec![false; nodes.len()];
    for i in 0..nodes.len() {
        // A joined node stands in the place of the later one, where all operands are known.
        for operand in 0..nodes[i].inputs.len() {
            let between = nodes[i].inputs[operand];
            let Some(&earlier) = maker.get(&between).filter(|_| readers[&between] == 1) else { continue };
            if let Some(joined) = join(&nodes[earlier], &nodes[i], operand) {
                gone[earlier] = true;
                nodes[i] = joined;
                break;
            }
        }
        maker.insert(nodes[i].outputs[0], i);
    }
    let mut kept = gone.iter();
    nodes.retain(|_| !kept.next().expect("one flag a node"));
    graph.set_nodes(nodes, None);
    Ok(graph)
}

/// One node for `earlier` and then `later`, whose operand `operand` is the earlier one's result.
fn join(earlier: &Node, later: &Node, operand: usize) -> Option<Node> {
    let (op, extra) = match (&earlier.op, &later.op) {
        (Op::GroupNorm(norm), Op::Activate(Activate(Activation::Silu))) if !norm.silu => {
            let mut norm = norm.clone();
            norm.silu = true;
            (norm.into(), None)
        }
        (Op::Conv2d(conv), Op::AddPerChannel(_))
            if operand == 0 && !conv.per_image_bias && !conv.residual =>
        {
            let mut conv = conv.clone();
            conv.per_image_bias = true;
            (conv.into(), Some(later.inputs[1]))
        }
        (Op::Conv2d(conv), Op::Add(_)) if !conv.residual => {
            let mut conv = conv.clone();
            conv.residual = true;
            (conv.into(), Some(later.inputs[1 - operand]))
        }
        _ => return None,
    };
    let inputs = earlier.inputs.iter().copied().chain(extra).collect();
    let outputs = later.outputs.iter().chain(&earlier.outputs[1..]).copied().collect();
    Some(Node { op, inputs, outputs, name: earlier.name.clone() })
}
