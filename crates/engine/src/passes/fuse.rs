//! Operator fusion: merges operations that one kernel computes in one pass over memory. Networks are written unfused.
//!
//! - group norm, then SiLU: one normalisation;
//! - a convolution, then an addition of `[n, c]` (the time embedding) or of a tensor of its shape (the residual): the
//!   convolution's epilogue.
//!
//! Only where nothing else reads the intermediate tensor, and before the backward pass is added.

use crate::error::Result;
use crate::graph::{Graph, Node, Tensor};
use crate::ops::{Activate, Activation, Op};
use std::collections::HashMap;

/// The graph with operations fused; tensors in `outputs` are preserved.
pub fn fuse(mut graph: Graph, outputs: &[Tensor]) -> Result<Graph> {
    let mut nodes = graph.nodes().to_vec();
    let mut consumers: HashMap<Tensor, usize> = outputs.iter().map(|&t| (t, 1)).collect();
    for t in nodes.iter().flat_map(|n| &n.inputs) {
        *consumers.entry(*t).or_default() += 1;
    }
    let mut producer: HashMap<Tensor, usize> = HashMap::new();
    let mut removed = vec![false; nodes.len()];
    for i in 0..nodes.len() {
        // The fused node replaces the later one, where all operands are available.
        for operand in 0..nodes[i].inputs.len() {
            let between = nodes[i].inputs[operand];
            let Some(&earlier) = producer.get(&between).filter(|_| consumers[&between] == 1) else {
                continue;
            };
            if let Some(fused) = fuse_pair(&nodes[earlier], &nodes[i], operand) {
                removed[earlier] = true;
                nodes[i] = fused;
                break;
            }
        }
        producer.insert(nodes[i].outputs[0], i);
    }
    let mut flags = removed.iter();
    nodes.retain(|_| !flags.next().expect("one flag per node"));
    graph.set_nodes(nodes, None);
    Ok(graph)
}

/// One node for `earlier` followed by `later`, whose operand `operand` is the output of `earlier`.
fn fuse_pair(earlier: &Node, later: &Node, operand: usize) -> Option<Node> {
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
