//! The plan: memory planning of a graph's tensors in one arena.
//!
//! Weights, their gradients and the optimizer's state each have a region that holds the parameters in order, so that the
//! optimizer reads memory sequentially. Every other tensor is allocated by its lifetime, from the step that computes it to the last
//! that reads it. Tensors are allocated from the largest to the smallest, each at the lowest offset that is free throughout its
//! lifetime. Inputs and states are live all the time. Scratch memory shared by the threads of a step is allocated in the same
//! way. A gradient occupies its part of the region from the step that computes it on; before that, tensors of the forward pass use the
//! memory. With a fused optimizer there is no gradient region: gradients are ordinary tensors, last read by the
//! update of their weight.

use crate::graph::{Graph, Tensor, TensorKind};
use crate::sampler_buffers::BufferSpec;
pub use ddpm_kernels::conv::MatmulDtype;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Elements of a cache line: every tensor is aligned to it.
pub const ALIGN: usize = 16;

/// Deferring all updates to the end of a run may grow the arena by one part in this many.
const DEFER_COST: usize = 20;

/// The approximations that executors may make relative to plain f32 arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeOptions {
    /// Whether convolutions of 3x3, and of 4x4 with stride 2, may use Winograd's algorithm where it is faster: a quarter, or two
    /// fifths, of the multiplications for three to five times the rounding error.
    pub winograd: bool,
    /// Precision of the matmul operands of convolutions, linear layers and attention; accumulation is in f32. With bf16, Winograd
    /// forward passes use 16-bit integers instead, or f32 on a machine without integer dot products. On the CPU, training plans
    /// then [store](crate::bf16_storage) in bf16 what norms and activations read again; on a GPU, all tensors between nodes.
    pub matmul_dtype: MatmulDtype,
}

impl Default for ComputeOptions {
    fn default() -> Self {
        Self { winograd: true, matmul_dtype: MatmulDtype::F32 }
    }
}

/// What a plan is built for.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// The parameters' gradients, as [`backward`](crate::autodiff::backward) returns them; `None` for inference.
    pub gradients: Option<Vec<Tensor>>,
    /// Whether gradients are accumulated over several runs per update.
    pub accumulate: bool,
    /// The loss, if the optimizer is fused into [training runs](crate::Executor::train): each weight is updated as soon as its gradient
    /// is computed and no later node reads the weight, so gradients have no memory of their own and cannot be read. A run
    /// updates nothing if the loss is not finite. Excludes `accumulate`. Executors may instead plan without fusion and update all
    /// weights after the last node of a training run.
    pub fuse_optimizer: Option<Tensor>,
    /// Whether fused updates are deferred until after the last node where that takes at most a twentieth more memory: a
    /// run can be [stopped](crate::Executor::set_stop) until the first update.
    pub defer_updates: bool,
    /// Maximum norm of the gradients in training runs; 0 disables clipping. Clipping needs all gradients at once, so the CPU does not
    /// fuse the optimizer then.
    pub clip_norm: f64,
    /// Whether to maintain a moving average of the weights.
    pub ema: bool,
    /// Tensors that the caller reads after a run.
    pub outputs: Vec<Tensor>,
    /// The approximations that the executor may make.
    pub compute: ComputeOptions,
    /// A tensor stays intact for this many nodes after its last use, so that nodes may run concurrently.
    pub liveness_slack: usize,
    /// Buffers for samplers; only executors that [compute on them](crate::Executor::sampler_buffers) allocate them.
    pub sampler_buffers: Option<BufferSpec>,
}

/// An array with one element for each element of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// The weights.
    Weights,
    /// The gradients of the last run.
    Gradients,
    /// The sum of the gradients of several runs.
    GradientSum,
    /// Adam's first moment.
    ExpAvg,
    /// Adam's second moment.
    ExpAvgSq,
    /// The moving average of the weights.
    Ema,
}

impl Region {
    const COUNT: usize = 6;
    /// In memory order. The gradients come last, since tensors share their memory.
    const ALL: [Region; Self::COUNT] =
        [Self::Weights, Self::GradientSum, Self::ExpAvg, Self::ExpAvgSq, Self::Ema, Self::Gradients];
}

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

/// An allocation: its size and the steps in which it is live.
struct Item {
    len: usize,
    live: Range<usize>,
    /// Its offset, if that is fixed.
    at: Option<usize>,
}

impl Item {
    fn new(len: usize, live: Range<usize>) -> Self {
        Self { len, live, at: None }
    }
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
        let (parameters, region_len) = parameter_ranges(&graph);
        let fused_loss = options.fuse_optimizer.filter(|_| options.clip_norm == 0.0);
        let updates = fused_loss.zip(options.gradients.as_ref());
        let updates = updates.map(|(loss, gradients)| Updates::new(&graph, gradients, loss, deferred));
        assert!(updates.is_none() || !options.accumulate, "a fused optimizer cannot accumulate gradients");
        let (regions, end) = region_ranges(options, updates.is_some(), region_len);

        let mut tensors = vec![0..0; graph.tensor_count()];
        let shift = |r: &Range<usize>, by: usize| r.start + by..r.end + by;
        let mut fixed = HashSet::new();
        for (i, &p) in graph.parameters().iter().enumerate() {
            tensors[p.index()] = shift(&parameters[i], regions[Region::Weights as usize].start);
            fixed.insert(p);
        }
        let in_region = || options.gradients.iter().flatten().filter(|_| updates.is_none());
        for (i, &g) in in_region().enumerate() {
            tensors[g.index()] = shift(&parameters[i], regions[Region::Gradients as usize].start);
            fixed.insert(g);
        }

        let outputs: Vec<Tensor> = options.outputs.iter().copied().chain(options.fuse_optimizer).collect();
        let mut live = lifetimes(&graph, &outputs);
        let pinned = updates.as_ref().map_or_else(HashSet::new, |updates| pin_gradients(&mut live, updates));
        let roots = in_place_roots(&graph, &live, &fixed, &pinned);
        let mut items: Vec<Item> = Vec::new();
        // Tensors and scratch memory stay intact for a while after their last use.
        let extended =
            |live: Range<usize>| live.start..(live.end + options.liveness_slack).min(graph.nodes().len() + 2);
        let (always, begin) = (0..graph.nodes().len() + 2, regions[Region::Gradients as usize].start);
        for (range, g) in parameters.iter().zip(in_region()) {
            let lifetime = live[g.index()].start..always.end;
            items.push(Item { len: range.len(), live: lifetime, at: Some(range.start) });
            // The padding after it stays zero: the optimizer reads it.
            let padding = range.len().next_multiple_of(ALIGN) - range.len();
            items.push(Item { len: padding, live: always.clone(), at: Some(range.end) });
        }
        let mut item_of: HashMap<usize, usize> = HashMap::new();
        for t in (0..graph.tensor_count()).filter(|&t| !fixed.contains(&Tensor(t as u32))) {
            let root = roots[t];
            let item = *item_of.entry(root).or_insert_with(|| {
                items.push(Item::new(graph.ty(Tensor(root as u32)).words(), extended(live[root].clone())));
                items.len() - 1
            });
            let union = &mut items[item].live;
            *union = union.start.min(live[t].start)..union.end.max(extended(live[t].clone()).end);
        }
        let first_scratch = items.len();
        items
            .extend(workspaces.iter().enumerate().map(|(i, w)| Item::new(w.scratch, extended(i + 1..i + 2))));
        let first_cached = items.len();
        items.extend(workspaces.iter().map(|w| Item::new(w.cached, always.clone())));

        let (offsets, len) = place(&items);
        for t in (0..graph.tensor_count()).filter(|&t| !fixed.contains(&Tensor(t as u32))) {
            let at = begin + offsets[item_of[&roots[t]]];
            tensors[t] = at..at + graph.ty(Tensor(t as u32)).words();
        }
        let ranges_of = |range: Range<usize>| {
            range.map(|i| begin + offsets[i]..begin + offsets[i] + items[i].len).collect::<Vec<_>>()
        };
        let (scratch, cached) =
            (ranges_of(first_scratch..first_cached), ranges_of(first_cached..items.len()));
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

/// Extends the lifetimes of the gradients to their updates; returns the gradients.
fn pin_gradients(live: &mut [Range<usize>], updates: &Updates) -> HashSet<Tensor> {
    for (node, parameters) in updates.after_node.iter().enumerate() {
        for &i in parameters {
            let end = &mut live[updates.gradients[i].index()].end;
            *end = (*end).max(node + 2);
        }
    }
    updates.gradients.iter().copied().collect()
}

/// The steps in which each tensor is live. Step 0 precedes the first node; node i runs in step i + 1.
fn lifetimes(graph: &Graph, outputs: &[Tensor]) -> Vec<Range<usize>> {
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
fn in_place_roots(
    graph: &Graph,
    live: &[Range<usize>],
    fixed: &HashSet<Tensor>,
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
        let reserved = fixed.contains(&from) || fixed.contains(&to) || pinned.contains(&from);
        let same_dtype = graph.ty(from).dtype == graph.ty(to).dtype;
        if once && is_last_use && computed && !reserved && same_dtype {
            root[to.index()] = root[from.index()];
        }
    }
    root
}

/// Offsets for all items, and the total length. Larger items are placed first, either throughout or with the items that stay
/// live to the end last, whichever takes less memory.
fn place(items: &[Item]) -> (Vec<usize>, usize) {
    let end = items.iter().map(|item| item.live.end).max().unwrap_or(0);
    let attempt = |long_lived_last: bool| {
        let mut order: Vec<usize> = (0..items.len()).filter(|&i| items[i].len > 0).collect();
        order.sort_by_key(|&i| {
            let long_lived = long_lived_last && items[i].live.end == end;
            (items[i].at.is_none(), long_lived, std::cmp::Reverse(items[i].len), i)
        });
        place_in(items, order)
    };
    let (by_size, long_lived_last) = (attempt(false), attempt(true));
    if long_lived_last.1 < by_size.1 { long_lived_last } else { by_size }
}

/// Places items in order, each at the lowest free offset.
fn place_in(items: &[Item], order: Vec<usize>) -> (Vec<usize>, usize) {
    let mut offsets = vec![0; items.len()];
    let mut placed: Vec<usize> = Vec::new(); // by offset
    let mut total = 0;
    for i in order {
        let item = &items[i];
        let mut at = item.at.unwrap_or(0);
        for &other in placed.iter().filter(|_| item.at.is_none()) {
            let overlaps = items[other].live.start < item.live.end && item.live.start < items[other].live.end;
            if overlaps {
                if offsets[other] >= at + item.len {
                    break;
                }
                at = at.max((offsets[other] + items[other].len).next_multiple_of(ALIGN));
            }
        }
        offsets[i] = at;
        total = total.max(at + item.len);
        let rank = placed.partition_point(|&p| offsets[p] <= at);
        placed.insert(rank, i);
    }
    (offsets, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm_rng::{Purpose, Stream, below};

    #[test]
    fn items_live_at_the_same_time_never_overlap() {
        let mut words = Stream::new(1, Purpose::Test, 0, 0).words();
        let mut draw = |n| below(words.next().expect("endless"), n) as usize;
        for _ in 0..50 {
            let items: Vec<Item> = (0..60)
                .map(|_| {
                    let start = draw(40);
                    Item::new(draw(200), start..start + 1 + draw(12))
                })
                .collect();
            let (offsets, total) = place(&items);
            let max_live = (0..60)
                .map(|step| items.iter().filter(|i| i.live.contains(&step)).map(|i| i.len).sum::<usize>())
                .max()
                .unwrap_or(0);
            assert!(total >= max_live);
            for (i, a) in items.iter().enumerate() {
                assert_eq!(offsets[i] % ALIGN, 0);
                assert!(offsets[i] + a.len <= total);
                for (j, b) in items.iter().enumerate().skip(i + 1) {
                    let together = a.live.start < b.live.end && b.live.start < a.live.end;
                    let apart = offsets[i] + a.len <= offsets[j] || offsets[j] + b.len <= offsets[i];
                    assert!(!together || apart, "{i} and {j}");
                }
            }
        }
    }

    #[test]
    fn memory_of_an_item_with_a_fixed_offset_is_used_before_its_lifetime() {
        // Live from step 5, like a gradient; the second lies after it.
        let gradients = [(0, 160), (160, 40)].map(|(at, len)| Item { len, live: 5..9, at: Some(at) });
        let early = [Item::new(200, 1..3), Item::new(100, 2..5)];
        let late = [Item::new(30, 4..6)];
        let items: Vec<Item> = gradients.into_iter().chain(early).chain(late).collect();
        let (offsets, total) = place(&items);
        assert_eq!(offsets, [0, 160, 0, 208, 208 + 112]);
        assert_eq!(total, 208 + 112 + 30);
    }

    #[test]
    fn memory_is_reused_once_free() {
        let items: Vec<Item> = (0..10).map(|i| Item::new(160, i..i + 2)).collect();
        assert_eq!(place(&items).1, 320);
    }
}
