//! Keeps in bf16 what the backward pass reads again, where factors are bf16: half the memory, and half of what is read.
//!
//! On the CPU ([`keep_in_bf16`]) a tensor between the passes is rounded behind the node that makes it, and everything that can read bf16 reads that: norms
//! and activations, in both passes, so that a gradient belongs to the very numbers that its operation saw. What the forward pass
//! alone reads in f32, as a residual, has a short life.
//!
//! On a GPU, where memory is the bound of all but the products, tensors are in bf16 from the start ([`store_in_bf16`]): nodes round
//! what they write.

use crate::graph::{Graph, Kind, Node, Tensor};
use crate::ops::{Cast, Op};
use crate::recompute::SMALL;
use crate::shape::DType;
use std::collections::{HashMap, HashSet};

/// Makes a training graph keep tensors in bf16, but for those in `but`, where every node of the backward pass that reads them
/// [takes](crate::ops::Operation::takes_bf16) them so. A graph without a backward pass stays as it is.
pub fn keep_in_bf16(graph: &mut Graph, but: &[Tensor]) {
    let Some(forward) = graph.backward_begins() else { return };
    let nodes = graph.nodes().to_vec();
    let takes = |node: &Node, i: usize| node.op.operation().takes_bf16(i);
    let mut refused: HashSet<Tensor> = but.iter().copied().collect();
    let mut wanted = HashSet::new();
    for node in &nodes[forward..] {
        for (i, &t) in node.inputs.iter().enumerate() {
            let read = if takes(node, i) { &mut wanted } else { &mut refused };
            read.insert(t);
        }
    }
    let mut kept = HashMap::new();
    let mut made = Vec::with_capacity(nodes.len());
    let mut begins = forward;
    for (at, mut node) in nodes.into_iter().enumerate() {
        for i in 0..node.inputs.len() {
            if takes(&node, i)
                && let Some(&half) = kept.get(&node.inputs[i])
            {
                node.inputs[i] = half;
            }
        }
        let (outputs, name) = (node.outputs.clone(), node.name.clone());
        made.push(node);
        for t in outputs.into_iter().filter(|_| at < forward) {
            let info = graph.info(t);
            let large = info.ty.shape.len() >= SMALL && info.ty.dtype == DType::F32;
            if info.kind == Kind::Computed && large && wanted.contains(&t) && !refused.contains(&t) {
                let half = graph.twin(t, DType::Bf16);
                kept.insert(t, half);
                begins += 1;
                let op = Op::from(Cast);
                made.push(Node { op, inputs: vec![t], outputs: vec![half], name: name.clone() });
            }
        }
    }
    graph.set_nodes(made, Some(begins));
}

/// One of a node's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// The operand of this number.
    Input(usize),
    /// The result of this number.
    Output(usize),
}

/// Makes computed tensors of `least` or more numbers those of bf16, but for those in `but`, where the node that makes one and
/// every one that reads it take it so.
pub fn store_in_bf16(
    graph: &mut Graph,
    but: &[Tensor],
    least: usize,
    takes: impl Fn(&Graph, &Node, Operand) -> bool,
) {
    let mut refused: HashSet<Tensor> = but.iter().copied().collect();
    let mut made = Vec::new();
    for node in graph.nodes() {
        for (i, &t) in node.outputs.iter().enumerate() {
            let large = graph.shape(t).len() >= least && graph.ty(t).dtype == DType::F32;
            // A state that changes is no new tensor.
            let state = node
                .op
                .operation()
                .in_place()
                .is_some_and(|k| i == 0 && graph.info(node.inputs[k]).kind == Kind::State);
            if large && !state && takes(graph, node, Operand::Output(i)) {
                made.push(t);
            }
        }
        for (i, &t) in node.inputs.iter().enumerate() {
            if !takes(graph, node, Operand::Input(i)) {
                refused.insert(t);
            }
        }
    }
    for t in made.into_iter().filter(|t| !refused.contains(t)) {
        graph.set_dtype(t, DType::Bf16);
    }
}
