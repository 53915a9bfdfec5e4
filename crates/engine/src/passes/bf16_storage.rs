//! Stores tensors in bf16 where matmul operands are bf16: half the memory, and half the memory traffic.
//!
//! On the CPU ([`keep_in_bf16`]) a tensor that is live between the passes is rounded right after its producer, and every operand that
//! accepts bf16 reads the rounded copy: norms and activations, in both passes, so that a gradient belongs to exactly the values that its
//! operation saw. The f32 original, which the rest of the forward pass reads (as a residual, for example), is short-lived.
//!
//! On a GPU, where everything but matrix products is memory-bound, tensors are in bf16 from the start ([`store_in_bf16`]): nodes round
//! what they write.

use super::recompute::MIN_LEN;
use crate::graph::{Graph, Node, Tensor, TensorKind};
use crate::ops::{Cast, Op};
use crate::shape::DType;
use std::collections::{HashMap, HashSet};

/// Keeps the tensors of a training graph in bf16, except those in `except`, where every backward node that reads them `accepts` bf16
/// for that operand; nodes of the forward pass that accept it read the rounded copy too. A graph without a backward pass is left unchanged.
pub fn keep_in_bf16(graph: &mut Graph, except: &[Tensor], accepts: impl Fn(&Node, usize) -> bool) {
    let Some(forward) = graph.backward_start() else { return };
    let nodes = graph.nodes().to_vec();
    let mut refused: HashSet<Tensor> = except.iter().copied().collect();
    let mut accepted = HashSet::new();
    for node in &nodes[forward..] {
        for (i, &t) in node.inputs.iter().enumerate() {
            let set = if accepts(node, i) { &mut accepted } else { &mut refused };
            set.insert(t);
        }
    }
    let mut rounded = HashMap::new();
    let mut new_nodes = Vec::with_capacity(nodes.len());
    let mut backward_start = forward;
    for (at, mut node) in nodes.into_iter().enumerate() {
        for i in 0..node.inputs.len() {
            if accepts(&node, i)
                && let Some(&copy) = rounded.get(&node.inputs[i])
            {
                node.inputs[i] = copy;
            }
        }
        let (outputs, name) = (node.outputs.clone(), node.name.clone());
        new_nodes.push(node);
        for t in outputs.into_iter().filter(|_| at < forward) {
            let info = graph.info(t);
            let large = info.ty.shape.len() >= MIN_LEN && info.ty.dtype == DType::F32;
            if info.kind == TensorKind::Computed && large && accepted.contains(&t) && !refused.contains(&t) {
                let copy = graph.new_like(t, DType::Bf16);
                rounded.insert(t, copy);
                backward_start += 1;
                let op = Op::from(Cast);
                new_nodes.push(Node { op, inputs: vec![t], outputs: vec![copy], name: name.clone() });
            }
        }
    }
    graph.set_nodes(new_nodes, Some(backward_start));
}

/// One of a node's tensors, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// An input.
    Input(usize),
    /// An output.
    Output(usize),
}

/// Changes computed tensors of at least `min_len` elements to bf16, except those in `except`, where the producer and every consumer
/// accept it.
pub fn store_in_bf16(
    graph: &mut Graph,
    except: &[Tensor],
    min_len: usize,
    accepts: impl Fn(&Graph, &Node, Operand) -> bool,
) {
    let mut refused: HashSet<Tensor> = except.iter().copied().collect();
    let mut candidates = Vec::new();
    for node in graph.nodes() {
        for (i, &t) in node.outputs.iter().enumerate() {
            let large = graph.shape(t).len() >= min_len && graph.ty(t).dtype == DType::F32;
            // The output of an in-place update of a state is that state.
            let state = node
                .op
                .operation()
                .in_place()
                .is_some_and(|k| i == 0 && graph.info(node.inputs[k]).kind == TensorKind::State);
            if large && !state && accepts(graph, node, Operand::Output(i)) {
                candidates.push(t);
            }
        }
        for (i, &t) in node.inputs.iter().enumerate() {
            if !accepts(graph, node, Operand::Input(i)) {
                refused.insert(t);
            }
        }
    }
    for t in candidates.into_iter().filter(|t| !refused.contains(t)) {
        graph.set_dtype(t, DType::Bf16);
    }
}
