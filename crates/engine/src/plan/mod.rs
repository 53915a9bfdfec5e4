//! The plan: memory planning of a graph's tensors in one arena.
//!
//! Weights, their gradients and the optimizer's state each have a region that holds the parameters in order, so that the
//! optimizer reads memory sequentially. Every other tensor is allocated by its lifetime, from the step that computes it to the last
//! that reads it. Tensors are allocated from the largest to the smallest, each at the lowest offset that is free throughout its
//! lifetime. Inputs and states are live all the time. Scratch memory shared by the threads of a step is allocated in the same
//! way. A gradient occupies its part of the region from the step that computes it on; before that, tensors of the forward pass use the
//! memory. With a fused optimizer there is no gradient region: gradients are ordinary tensors, last read by the
//! update of their weight.

mod lifetimes;
mod options;
mod place;

use crate::graph::{Graph, Tensor};
use lifetimes::{in_place_roots, lifetimes, pin_gradients};
pub use options::{ComputeOptions, MatmulDtype, PlanOptions, Region};
pub use place::ALIGN;
use place::{Item, place};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Deferring all updates to the end of a run may grow the arena by one part in this many.
const DEFER_COST: usize = 20;

/// The memory layout of a graph.
#[derive(Clone, Debug)]
pub struct Plan {
    graph: Graph,
    tensors: Vec<Range<usize>>,
    /// Each parameter's range within a region.
    parameters: Vec<Range<usize>>,
    regions: [Range<usize>; Region::COUNT],
    scratch: Vec<Range<usize>>,
    cached: Vec<Range<usize>>,
    updates: Option<Updates>,
    len: usize,
}

/// The updates of a fused optimizer.
#[derive(Clone, Debug)]
pub struct Updates {
    /// Must be finite before the first update.
    pub loss: Tensor,
    /// The gradient of each parameter.
    pub gradients: Vec<Tensor>,
    /// For each node, the parameters that are updated after it.
    pub after_node: Vec<Vec<usize>>,
}

impl Updates {
    /// A parameter is updated after its gradient is computed, its last consumer has run and the loss is known; with `deferred`,
    /// all are updated after the last node.
    fn new(graph: &Graph, gradients: &[Tensor], loss: Tensor, deferred: bool) -> Self {
        let mut producers = vec![0; graph.tensor_count()];
        let mut last_consumers = producers.clone();
        for (i, node) in graph.nodes().iter().enumerate() {
            node.outputs.iter().for_each(|t| producers[t.index()] = i);
            node.inputs.iter().for_each(|t| last_consumers[t.index()] = i);
        }
        let mut after_node = vec![Vec::new(); graph.nodes().len()];
        let last = graph.nodes().len().saturating_sub(1);
        for (i, (&p, &g)) in graph.parameters().iter().zip(gradients).enumerate() {
            let node = producers[g.index()].max(last_consumers[p.index()]).max(producers[loss.index()]);
            after_node[if deferred { last } else { node }].push(i);
        }
        Self { loss, gradients: gradients.to_vec(), after_node }
    }
}

/// Memory that a node needs besides its tensors, in f32 elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// Scratch memory, while it runs.
    pub scratch: usize,
    /// Memory that persists from run to run: data derived from constant weights.
    pub cached: usize,
}

impl Plan {
    /// Lays out `graph`; `workspaces` is what each node needs besides its tensors.
    pub fn new(graph: Graph, options: &PlanOptions, workspaces: &[Workspace]) -> Self {
        let defer = options.defer_updates && options.fuse_optimizer.is_some() && options.clip_norm == 0.0;
        let deferred = defer.then(|| Self::lay_out(graph.clone(), options, workspaces, true));
        let plan = Self::lay_out(graph, options, workspaces, false);
        deferred.filter(|d| d.len - plan.len.min(d.len) <= plan.len / DEFER_COST).unwrap_or(plan)
    }

    fn lay_out(graph: Graph, options: &PlanOptions, workspaces: &[Workspace], deferred: bool) -> Self {
        let updates = fused_updates(&graph, options, deferred);
        // With a fused optimizer, gradients are ordinary tensors.
        let gradients = options.gradients.as_deref().filter(|_| updates.is_none()).unwrap_or_default();
        let (parameters, region_len) = parameter_ranges(&graph);
        let (regions, end) = region_ranges(options, updates.is_some(), region_len);
        let fixed = tensors_in_regions(&graph, gradients, &parameters, &regions);

        let outputs: Vec<Tensor> = options.outputs.iter().copied().chain(options.fuse_optimizer).collect();
        let mut live = lifetimes(&graph, &outputs);
        let pinned = updates.as_ref().map_or_else(HashSet::new, |updates| pin_gradients(&mut live, updates));
        let roots = in_place_roots(&graph, &live, &fixed, &pinned);

        let steps = graph.nodes().len() + 2;
        let mut memory = Memory { items: Vec::new(), steps, slack: options.liveness_slack };
        for (range, g) in parameters.iter().zip(gradients) {
            memory.add_gradient(range, live[g.index()].start);
        }
        let item_of = memory.add_tensors(&graph, &fixed, &live, &roots);
        let [scratch, cached] = memory.add_workspaces(workspaces);

        let begin = regions[Region::Gradients as usize].start;
        let (offsets, len) = place(&memory.items);
        let tensors = item_of.iter().enumerate().map(|(t, item)| {
            let t = Tensor(t as u32);
            item.map_or_else(
                || fixed[&t].clone(),
                |item| begin + offsets[item]..begin + offsets[item] + graph.ty(t).words(),
            )
        });
        let tensors = tensors.collect();
        let [scratch, cached] = [scratch, cached].map(|items| {
            items.map(|i| begin + offsets[i]..begin + offsets[i] + memory.items[i].len).collect()
        });
        Self { graph, tensors, parameters, regions, scratch, cached, updates, len: end.max(begin + len) }
    }

    /// The planned graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Length of the arena, in f32 elements.
    pub fn arena_len(&self) -> usize {
        self.len
    }

    /// The memory of a tensor.
    pub fn range(&self, t: Tensor) -> Range<usize> {
        self.tensors[t.index()].clone()
    }

    /// The range of a node's scratch memory.
    pub fn scratch(&self, node: usize) -> Range<usize> {
        self.scratch[node].clone()
    }

    /// The range of a node's cached data.
    pub fn cached(&self, node: usize) -> Range<usize> {
        self.cached[node].clone()
    }

    /// The updates of a fused optimizer; `None` if the optimizer is not fused.
    pub fn updates(&self) -> Option<&Updates> {
        self.updates.as_ref()
    }

    /// A region of the arena; empty if the plan has none.
    pub fn region(&self, region: Region) -> Range<usize> {
        self.regions[region as usize].clone()
    }

    /// The range of parameter `i` in a region; `None` if the plan has no such region.
    pub fn parameter(&self, region: Region, i: usize) -> Option<Range<usize>> {
        let all = self.region(region);
        let range = self.parameters.get(i)?;
        (all.len() >= range.end).then(|| all.start + range.start..all.start + range.end)
    }
}

/// The range of each parameter within a region, and the length of a region.
fn parameter_ranges(graph: &Graph) -> (Vec<Range<usize>>, usize) {
    let mut at = 0;
    let range = |&p: &Tensor| {
        let len = graph.shape(p).len();
        let range = at..at + len;
        at += len.next_multiple_of(ALIGN);
        range
    };
    let parameters = graph.parameters().iter().map(range).collect();
    (parameters, at)
}

/// The ranges of all regions, and the end of the last.
fn region_ranges(
    options: &PlanOptions,
    fused: bool,
    region_len: usize,
) -> ([Range<usize>; Region::COUNT], usize) {
    let (mut end, mut regions) = (0, std::array::from_fn(|_| 0..0));
    for region in Region::ALL {
        let exists = match region {
            Region::Weights => true,
            Region::Ema => options.ema && options.gradients.is_some(),
            Region::GradientSum => options.accumulate && options.gradients.is_some(),
            Region::Gradients => options.gradients.is_some() && !fused,
            _ => options.gradients.is_some(),
        };
        let start = end;
        end += if exists { region_len } else { 0 };
        regions[region as usize] = start..end;
    }
    (regions, end)
}

/// The updates of a fused optimizer. Clipping needs all gradients at once, so the optimizer is not fused then.
fn fused_updates(graph: &Graph, options: &PlanOptions, deferred: bool) -> Option<Updates> {
    let loss = options.fuse_optimizer.filter(|_| options.clip_norm == 0.0);
    let (loss, gradients) = loss.zip(options.gradients.as_ref())?;
    assert!(!options.accumulate, "a fused optimizer cannot accumulate gradients");
    Some(Updates::new(graph, gradients, loss, deferred))
}

/// The ranges of the tensors that lie in regions: the parameters, and their `gradients`.
fn tensors_in_regions(
    graph: &Graph,
    gradients: &[Tensor],
    parameters: &[Range<usize>],
    regions: &[Range<usize>; Region::COUNT],
) -> HashMap<Tensor, Range<usize>> {
    let mut ranges = HashMap::new();
    for (region, tensors) in [(Region::Weights, graph.parameters()), (Region::Gradients, gradients)] {
        let start = regions[region as usize].start;
        let shifted = parameters.iter().map(|range| start + range.start..start + range.end);
        ranges.extend(tensors.iter().copied().zip(shifted));
    }
    ranges
}

/// The items to be placed, beginning with the region of gradients.
struct Memory {
    items: Vec<Item>,
    /// The steps of a run: one before the first node, one for each node, and one after the last.
    steps: usize,
    /// Steps for which memory stays intact after its last use.
    slack: usize,
}

impl Memory {
    fn extended(&self, live: &Range<usize>) -> Range<usize> {
        live.start..(live.end + self.slack).min(self.steps)
    }

    /// A gradient at its place in the region, from the step that computes it on.
    fn add_gradient(&mut self, range: &Range<usize>, from: usize) {
        self.items.push(Item { len: range.len(), live: from..self.steps, at: Some(range.start) });
        // The padding after it stays zero: the optimizer reads it.
        let padding = range.len().next_multiple_of(ALIGN) - range.len();
        self.items.push(Item { len: padding, live: 0..self.steps, at: Some(range.end) });
    }

    /// The tensors outside the regions, an item for each group that shares memory; returns each tensor's item.
    fn add_tensors(
        &mut self,
        graph: &Graph,
        fixed: &HashMap<Tensor, Range<usize>>,
        live: &[Range<usize>],
        roots: &[usize],
    ) -> Vec<Option<usize>> {
        let mut item_of_root: HashMap<usize, usize> = HashMap::new();
        let mut item_of = vec![None; graph.tensor_count()];
        for t in (0..graph.tensor_count()).filter(|&t| !fixed.contains_key(&Tensor(t as u32))) {
            let root = roots[t];
            let item = *item_of_root.entry(root).or_insert_with(|| {
                let len = graph.ty(Tensor(root as u32)).words();
                self.items.push(Item::new(len, self.extended(&live[root])));
                self.items.len() - 1
            });
            let end = self.extended(&live[t]).end;
            let union = &mut self.items[item].live;
            *union = union.start.min(live[t].start)..union.end.max(end);
            item_of[t] = Some(item);
        }
        item_of
    }

    /// Scratch memory, live in its node's step, then cached data, live all the time; returns the ranges of their items.
    fn add_workspaces(&mut self, workspaces: &[Workspace]) -> [Range<usize>; 2] {
        let first_scratch = self.items.len();
        for (i, workspace) in workspaces.iter().enumerate() {
            self.items.push(Item::new(workspace.scratch, self.extended(&(i + 1..i + 2))));
        }
        let first_cached = self.items.len();
        self.items.extend(workspaces.iter().map(|w| Item::new(w.cached, 0..self.steps)));
        [first_scratch..first_cached, first_cached..self.items.len()]
    }
}
