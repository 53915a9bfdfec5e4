//! The plan: the order of the steps, and a place in one arena for every tensor.
//!
//! Weights, their gradients and the optimizer's state each have a region in which parameters stand in their order, so
//! that the optimizer walks over memory once. Every other tensor gets a place by its lifetime: from the step that
//! makes it to the last that reads it. Tensors are placed from the largest to the smallest, each at the lowest place
//! that nothing else holds meanwhile. Inputs and states have theirs to themselves all the time. Scratch memory that a step
//! shares between threads is placed in the same way. A gradient holds its part of the region from the step that makes it on:
//! before that, tensors of the forward pass have places there. Where weights are updated within the runs, there is no region
//! of gradients: each is a tensor like others, which the update of its weight is the last to read.

use crate::graph::{Graph, Kind, Tensor};
use crate::vectors::BufferSpec;
pub use ddpm_kernels::conv::MatmulDtype;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// Numbers of a cache line: every tensor begins at a multiple.
pub(crate) const ALIGN: usize = 16;

/// By one part in so many an arena may be larger for updates that are all made behind the last node.
const LATE_SHARE: usize = 20;

/// How executors may compute what f32 sums define.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeOptions {
    /// Convolutions of 3x3, and of 4x4 with stride 2, may go through Winograd's tiles where that is faster: a quarter of the
    /// products, or two fifths, for three to five times the rounding error.
    pub winograd: bool,
    /// What the factors of convolutions, linear layers and attention are rounded to; sums are of f32. Forward through Winograd's
    /// tiles it is whole numbers of 16 bits instead of bf16, or nothing on a machine without such products. On the CPU plans
    /// for training [keep](crate::keep) in bf16 what norms and activations read again; on a GPU all that nodes hand on is.
    pub factors: MatmulDtype,
}

impl Default for ComputeOptions {
    fn default() -> Self {
        Self { winograd: true, factors: MatmulDtype::F32 }
    }
}

/// What a plan is made for.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// The parameters' gradients, as [`backward`](crate::autodiff::backward) returns them; none: no training.
    pub gradients: Option<Vec<Tensor>>,
    /// Whether the gradients of several runs are added up for an update.
    pub accumulate: bool,
    /// Whether weights are updated within [training runs](crate::Executor::train), each as soon as its gradient is made and no
    /// later node reads the weight: no memory for all gradients is taken, and none can be read. The tensor is the loss: a run
    /// updates nothing where it is not finite. Not together with `accumulate`. Executors may plan as without, and update all weights
    /// behind the nodes of a training run.
    pub fuse_optimizer: Option<Tensor>,
    /// Whether the updates within a run are all made behind its last node where that takes hardly more memory (a twentieth at most):
    /// until then a run can be [stopped](crate::Executor::set_stop).
    pub late_updates: bool,
    /// Gradients longer than this are shortened in training runs; 0: none are. The CPU, which needs all gradients at once for
    /// that, does not update within its runs then.
    pub clip_norm: f64,
    /// Whether a moving average of the weights is kept.
    pub ema: bool,
    /// Tensors that are read after a run.
    pub keep: Vec<Tensor>,
    /// How the executor may compute.
    pub arithmetic: ComputeOptions,
    /// For so many nodes behind the last that needs it nothing is written over a tensor, so that nodes may run side by side.
    pub liveness_slack: usize,
    /// Vectors that are wanted beside the plan; only executors that [compute with them](crate::Executor::vectors) take memory.
    pub vectors: Option<BufferSpec>,
}

/// A group of numbers, one for each number of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// The weights.
    Weights,
    /// Their gradients, as the last run left them.
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
    /// In the order in which they lie, the gradients last: where tensors begin.
    const ALL: [Region; Self::COUNT] =
        [Self::Weights, Self::GradientSum, Self::ExpAvg, Self::ExpAvgSq, Self::Ema, Self::Gradients];
}

/// Where everything is.
#[derive(Clone, Debug)]
pub struct Plan {
    graph: Graph,
    places: Vec<Range<usize>>,
    /// Each parameter's place within a region.
    parameters: Vec<Range<usize>>,
    regions: [Range<usize>; Region::COUNT],
    scratch: Vec<Range<usize>>,
    kept: Vec<Range<usize>>,
    updates: Option<Updates>,
    len: usize,
}

/// The updates within a run.
#[derive(Clone, Debug)]
pub struct Updates {
    /// Must be finite before the first.
    pub loss: Tensor,
    /// The gradient of each parameter.
    pub gradients: Vec<Tensor>,
    /// For each node the parameters that are updated behind it.
    pub behind: Vec<Vec<usize>>,
}

impl Updates {
    /// A parameter is updated once its gradient is made and the last node has read it, never before there is a loss; `late`, all
    /// are updated behind the last node.
    fn new(graph: &Graph, gradients: &[Tensor], loss: Tensor, late: bool) -> Self {
        let mut makers = vec![0; graph.tensor_count()];
        let mut readers = makers.clone();
        for (i, node) in graph.nodes().iter().enumerate() {
            node.outputs.iter().for_each(|t| makers[t.index()] = i);
            node.inputs.iter().for_each(|t| readers[t.index()] = i);
        }
        let mut behind = vec![Vec::new(); graph.nodes().len()];
        let last = graph.nodes().len().saturating_sub(1);
        for (i, (&p, &g)) in graph.parameters().iter().zip(gradients).enumerate() {
            let node = makers[g.index()].max(readers[p.index()]).max(makers[loss.index()]);
            behind[if late { last } else { node }].push(i);
        }
        Self { loss, gradients: gradients.to_vec(), behind }
    }
}

/// Numbers that a node needs besides its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// While it runs.
    pub scratch: usize,
    /// From run to run: what it makes of weights that do not change.
    pub kept: usize,
}

/// Something to be placed: its size and the steps that need it.
struct Item {
    len: usize,
    live: Range<usize>,
    /// Its place, if it has one.
    at: Option<usize>,
}

impl Item {
    fn new(len: usize, live: Range<usize>) -> Self {
        Self { len, live, at: None }
    }
}

impl Plan {
    /// Lays out `graph`; `workspaces` has what each node needs besides its tensors.
    pub fn new(graph: Graph, options: &PlanOptions, workspaces: &[Workspace]) -> Self {
        let late = options.late_updates && options.fuse_optimizer.is_some() && options.clip_norm == 0.0;
        let late = late.then(|| Self::laid_out(graph.clone(), options, workspaces, true));
        let plan = Self::laid_out(graph, options, workspaces, false);
        late.filter(|late| late.len - plan.len.min(late.len) <= plan.len / LATE_SHARE).unwrap_or(plan)
    }

    fn laid_out(graph: Graph, options: &PlanOptions, workspaces: &[Workspace], late: bool) -> Self {
        let mut at = 0;
        let parameters: Vec<Range<usize>> = graph
            .parameters()
            .iter()
            .map(|&p| {
                let len = graph.shape(p).len();
                let place = at..at + len;
                at += len.next_multiple_of(ALIGN);
                place
            })
            .collect();
        let region_len = at;
        let in_runs = options.fuse_optimizer.filter(|_| options.clip_norm == 0.0);
        let updates = in_runs.zip(options.gradients.as_ref());
        let updates = updates.map(|(loss, gradients)| Updates::new(&graph, gradients, loss, late));
        assert!(updates.is_none() || !options.accumulate, "sums of gradients are not updated within runs");
        let (mut end, mut regions) = (0, std::array::from_fn(|_| 0..0));
        for region in Region::ALL {
            let there = match region {
                Region::Weights => true,
                Region::Ema => options.ema && options.gradients.is_some(),
                Region::GradientSum => options.accumulate && options.gradients.is_some(),
                Region::Gradients => options.gradients.is_some() && updates.is_none(),
                _ => options.gradients.is_some(),
            };
            let start = end;
            end += if there { region_len } else { 0 };
            regions[region as usize] = start..end;
        }

        let mut places = vec![0..0; graph.tensor_count()];
        let shift = |r: &Range<usize>, by: usize| r.start + by..r.end + by;
        let mut fixed = HashSet::new();
        for (i, &p) in graph.parameters().iter().enumerate() {
            places[p.index()] = shift(&parameters[i], regions[Region::Weights as usize].start);
            fixed.insert(p);
        }
        let in_region = || options.gradients.iter().flatten().filter(|_| updates.is_none());
        for (i, &g) in in_region().enumerate() {
            places[g.index()] = shift(&parameters[i], regions[Region::Gradients as usize].start);
            fixed.insert(g);
        }

        let keep: Vec<Tensor> = options.keep.iter().copied().chain(options.fuse_optimizer).collect();
        let mut live = lifetimes(&graph, &keep);
        let mut followed = HashSet::new();
        if let Some(Updates { gradients, behind, .. }) = &updates {
            for (node, &i) in
                behind.iter().enumerate().flat_map(|(node, all)| all.iter().map(move |i| (node, i)))
            {
                let end = &mut live[gradients[i].index()].end;
                *end = (*end).max(node + 2);
            }
            followed.extend(gradients);
        }
        let shares = shared_places(&graph, &live, &fixed, &followed);
        let mut items: Vec<Item> = Vec::new();
        // Tensors and scratch memory that are not needed any more, and not written over yet.
        let held =
            |live: Range<usize>| live.start..(live.end + options.liveness_slack).min(graph.nodes().len() + 2);
        let (always, begin) = (0..graph.nodes().len() + 2, regions[Region::Gradients as usize].start);
        for (place, g) in parameters.iter().zip(in_region()) {
            let made = live[g.index()].start..always.end;
            items.push(Item { len: place.len(), live: made, at: Some(place.start) });
            // What is behind it stays zero: the optimizer walks over it.
            let behind = place.len().next_multiple_of(ALIGN) - place.len();
            items.push(Item { len: behind, live: always.clone(), at: Some(place.end) });
        }
        let mut item_of: HashMap<usize, usize> = HashMap::new();
        for t in (0..graph.tensor_count()).filter(|&t| !fixed.contains(&Tensor(t as u32))) {
            let root = shares[t];
            let item = *item_of.entry(root).or_insert_with(|| {
                items.push(Item::new(graph.ty(Tensor(root as u32)).words(), held(live[root].clone())));
                items.len() - 1
            });
            let both = &mut items[item].live;
            *both = both.start.min(live[t].start)..both.end.max(held(live[t].clone()).end);
        }
        let first_scratch = items.len();
        items.extend(workspaces.iter().enumerate().map(|(i, w)| Item::new(w.scratch, held(i + 1..i + 2))));
        let first_kept = items.len();
        items.extend(workspaces.iter().map(|w| Item::new(w.kept, always.clone())));

        let (offsets, len) = place(&items);
        for t in (0..graph.tensor_count()).filter(|&t| !fixed.contains(&Tensor(t as u32))) {
            let at = begin + offsets[item_of[&shares[t]]];
            places[t] = at..at + graph.ty(Tensor(t as u32)).words();
        }
        let places_of = |items_: Range<usize>| {
            items_.map(|i| begin + offsets[i]..begin + offsets[i] + items[i].len).collect::<Vec<_>>()
        };
        let (scratch, kept) = (places_of(first_scratch..first_kept), places_of(first_kept..items.len()));
        Self { graph, places, parameters, regions, scratch, kept, updates, len: end.max(begin + len) }
    }

    /// The planned graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Numbers of the arena.
    pub fn arena_len(&self) -> usize {
        self.len
    }

    /// Where a tensor is.
    pub fn place(&self, t: Tensor) -> Range<usize> {
        self.places[t.index()].clone()
    }

    /// Where a node's scratch memory is.
    pub fn scratch(&self, node: usize) -> Range<usize> {
        self.scratch[node].clone()
    }

    /// Where a node's memory from run to run is.
    pub fn kept(&self, node: usize) -> Range<usize> {
        self.kept[node].clone()
    }

    /// The updates within a run; none if all weights are updated together, behind it.
    pub fn updates(&self) -> Option<&Updates> {
        self.updates.as_ref()
    }

    /// A region of the arena; empty if the plan has none.
    pub fn region(&self, region: Region) -> Range<usize> {
        self.regions[region as usize].clone()
    }

    /// Where parameter `i` is in a region; `None` if the plan has no such region.
    pub fn parameter(&self, region: Region, i: usize) -> Option<Range<usize>> {
        let all = self.region(region);
        let place = self.parameters.get(i)?;
        (all.len() >= place.end).then(|| all.start + place.start..all.start + place.end)
    }
}

/// The steps in which each tensor is needed. Step 0 is before the first node; node i runs in step i + 1.
fn lifetimes(graph: &Graph, keep: &[Tensor]) -> Vec<Range<usize>> {
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
        if matches!(graph.info(t).kind, Kind::Input | Kind::State) {
            *live = 0..end;
        } else if keep.contains(&t) {
            live.end = end;
        }
    }
    live
}

/// For each tensor the one whose memory it lives in: its own, or, down a chain of in-place operations, the first's. Nothing is
/// written over `followed`, gradients that an update reads behind the last node that does.
fn shared_places(
    graph: &Graph,
    live: &[Range<usize>],
    fixed: &HashSet<Tensor>,
    followed: &HashSet<Tensor>,
) -> Vec<usize> {
    let mut root: Vec<usize> = (0..graph.tensor_count()).collect();
    for (i, node) in graph.nodes().iter().enumerate() {
        let Some(operand) = node.op.operation().in_place() else { continue };
        let (from, to) = (node.inputs[operand], node.outputs[0]);
        let once = node.inputs.iter().filter(|&&t| t == from).count() == 1;
        let last_use = live[from.index()].end == i + 2;
        if graph.info(from).kind == Kind::State {
            let readers = graph.nodes().iter().filter(|n| n.inputs.contains(&from)).count();
            assert!(once && readers == 1, "{}: a state that changes is read by nothing else", node.name);
            root[to.index()] = root[from.index()];
            continue;
        }
        let computed = graph.info(from).kind == Kind::Computed;
        let held = fixed.contains(&from) || fixed.contains(&to) || followed.contains(&from);
        let alike = graph.ty(from).dtype == graph.ty(to).dtype;
        if once && last_use && computed && !held && alike {
            root[to.index()] = root[from.index()];
        }
    }
    root
}

/// Offsets for all items, and the length of the whole: the largest are placed first, or before those that are held to the end, whichever
/// takes less.
fn place(items: &[Item]) -> (Vec<usize>, usize) {
    let end = items.iter().map(|item| item.live.end).max().unwrap_or(0);
    let of = |held_last: bool| {
        let mut order: Vec<usize> = (0..items.len()).filter(|&i| items[i].len > 0).collect();
        order.sort_by_key(|&i| {
            let held = held_last && items[i].live.end == end;
            (items[i].at.is_none(), held, std::cmp::Reverse(items[i].len), i)
        });
        place_in(items, order)
    };
    let (plain, other) = (of(false), of(true));
    if other.1 < plain.1 { other } else { plain }
}

/// Places items one behind the other, each as low as it can lie.
fn place_in(items: &[Item], order: Vec<usize>) -> (Vec<usize>, usize) {
    let mut offsets = vec![0; items.len()];
    let mut placed: Vec<usize> = Vec::new(); // by offset
    let mut total = 0;
    for i in order {
        let item = &items[i];
        let mut at = item.at.unwrap_or(0);
        for &other in placed.iter().filter(|_| item.at.is_none()) {
            let meets = items[other].live.start < item.live.end && item.live.start < items[other].live.end;
            if meets {
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
    use crate::rng::{Purpose, Stream, below};

    #[test]
    fn items_that_live_together_never_overlap() {
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
            let most = (0..60)
                .map(|step| items.iter().filter(|i| i.live.contains(&step)).map(|i| i.len).sum::<usize>())
                .max()
                .unwrap_or(0);
            assert!(total >= most);
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
    fn before_something_has_its_place_others_are_there() {
        // Made in step 5, as a gradient is; the second lies behind it.
        let gradients = [(0, 160), (160, 40)].map(|(at, len)| Item { len, live: 5..9, at: Some(at) });
        let early = [Item::new(200, 1..3), Item::new(100, 2..5)];
        let late = [Item::new(30, 4..6)];
        let items: Vec<Item> = gradients.into_iter().chain(early).chain(late).collect();
        let (offsets, total) = place(&items);
        assert_eq!(offsets, [0, 160, 0, 208, 208 + 112]);
        assert_eq!(total, 208 + 112 + 30);
    }

    #[test]
    fn places_are_reused_once_free() {
        let items: Vec<Item> = (0..10).map(|i| Item::new(160, i..i + 2)).collect();
        assert_eq!(place(&items).1, 320);
    }
}
