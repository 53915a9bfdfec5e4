//! When tensors are live, and which share memory.

use super::Updates;
use crate::graph::{Graph, Tensor, TensorKind};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Extends the lifetimes of the gradients to their updates; returns the gradients.
pub(super) fn pin_gradients(live: &mut [Range<usize>], updates: &Updates) -> HashSet<Tensor> {
    for (node, parameters) in updates.after_node.iter().enumerate() {
        for &i in parameters {
            let end = &mut live[updates.gradients[i].index()].end;
            *end = (*end).max(node + 2);
        }
    }
    updates.gradients.iter().copied().collect()
}

/// The steps in which each tensor is live. Step 0 precedes the first node; node i runs in step i + 1.
pub(super) fn lifetimes(graph: &Graph, outputs: &[Tensor]) -> Vec<Range<usize>> {
    let end = graph.nodes().len() + 2;
    let mut live = vec![0..0; graph.tensor_count()];
    for (i, node) in graph.nodes().iter().enumerate() {
        for t in &node.outputs {
            live[t.index()] = i + 1..i + 2;
        }
        for t in &node.inputs {
            live[t.index()].end = live[t.index()].end.max(i + 2);
        }
    }
    for (t, live) in live.iter_mut().enumerate() {
        let t = Tensor(t as u32);
        if matches!(graph.info(t).kind, TensorKind::Input | TensorKind::State) {
            *live = 0..end;
        } else if outputs.contains(&t) {
            live.end = end;
        }
    }
    live
}

/// For each tensor the one whose memory it uses: itself, or the first tensor of its chain of in-place operations. Tensors in
/// `pinned`, gradients that an update reads after their last consumer, are never overwritten.
pub(super) fn in_place_roots(
    graph: &Graph,
    live: &[Range<usize>],
    fixed: &HashMap<Tensor, Range<usize>>,
    pinned: &HashSet<Tensor>,
) -> Vec<usize> {
    let mut root: Vec<usize> = (0..graph.tensor_count()).collect();
    for (i, node) in graph.nodes().iter().enumerate() {
        let Some(operand) = node.op.operation().in_place() else { continue };
        let (from, to) = (node.inputs[operand], node.outputs[0]);
        let once = node.inputs.iter().filter(|&&t| t == from).count() == 1;
        let is_last_use = live[from.index()].end == i + 2;
        if graph.info(from).kind == TensorKind::State {
            let consumers = graph.nodes().iter().filter(|n| n.inputs.contains(&from)).count();
            assert!(once && consumers == 1, "{}: an updated state must have no other consumer", node.name);
            root[to.index()] = root[from.index()];
            continue;
        }
        let computed = graph.info(from).kind == TensorKind::Computed;
        let reserved = fixed.contains_key(&from) || fixed.contains_key(&to) || pinned.contains(&from);
        let same_dtype = graph.ty(from).dtype == graph.ty(to).dtype;
        if once && is_last_use && computed && !reserved && same_dtype {
            root[to.index()] = root[from.index()];
        }
    }
    root
}
