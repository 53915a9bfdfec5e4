//! Stream assignment: which nodes wait for which, and on which stream each runs, so that a captured graph has only the edges that
//! memory dependencies require.
//!
//! The plan reuses memory of tensors with disjoint lifetimes, so dependencies are between memory ranges, not tensors: a node waits
//! for earlier writers of what it reads, and for earlier readers and writers of what it writes. Weight gradients, time embeddings
//! and both operands of a sum then run beside a network's layers where those do not fill the GPU.

use std::ops::Range;

/// The memory ranges that a node reads and writes, in elements.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Ranges that are only read.
    pub reads: Vec<Range<usize>>,
    /// Ranges that are written, and possibly read.
    pub writes: Vec<Range<usize>>,
}

impl Access {
    /// Whether the two must run in order.
    fn conflicts_with(&self, other: &Self) -> bool {
        let overlap = |a: &[Range<usize>], b: &[Range<usize>]| {
            a.iter().any(|a| b.iter().any(|b| a.start < b.end && b.start < a.end))
        };
        overlap(&self.writes, &other.writes)
            || overlap(&self.writes, &other.reads)
            || overlap(&self.reads, &other.writes)
    }
}

/// When a node runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StreamSlot {
    /// The stream; nodes of one stream run in order.
    pub stream: usize,
    /// Nodes of other streams to wait for.
    pub waits: Vec<usize>,
}

/// A bit set of nodes.
#[derive(Clone)]
struct NodeSet(Vec<u64>);

impl NodeSet {
    fn has(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 == 1
    }

    fn add(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }

    fn add_all(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }
}

/// Assigns nodes, listed in execution order, to at most `streams` streams. Nodes of one stream run in order.
pub fn assign_streams(nodes: &[Access], streams: usize) -> Vec<StreamSlot> {
    let mut slots: Vec<StreamSlot> = Vec::with_capacity(nodes.len());
    // Nodes known to have finished when a node starts.
    let mut before: Vec<NodeSet> = Vec::with_capacity(nodes.len());
    let mut last: Vec<usize> = Vec::new(); // node of each stream
    for (i, node) in nodes.iter().enumerate() {
        let mut done = NodeSet(vec![0; nodes.len().div_ceil(64)]);
        let mut depends_on = Vec::new();
        for j in (0..i).rev().filter(|&j| node.conflicts_with(&nodes[j])) {
            if !done.has(j) {
                depends_on.push(j);
                done.add(j);
                done.add_all(&before[j]);
            }
        }
        // The stream of the latest dependency; else an idle one; else a new one.
        let follows = depends_on.iter().find_map(|j| last.iter().position(|l| l == j));
        let idle = || last.iter().position(|&l| done.has(l));
        let stream = follows.or_else(idle).unwrap_or_else(|| {
            let may_add = last.len() < streams.max(1);
            if may_add { last.len() } else { (0..last.len()).min_by_key(|&s| last[s]).unwrap_or(0) }
        });
        if stream == last.len() {
            last.push(i);
        } else {
            done.add(last[stream]);
            done.add_all(&before[last[stream]].clone());
        }
        let waits = depends_on.into_iter().filter(|&j| slots[j].stream != stream).collect();
        last[stream] = i;
        slots.push(StreamSlot { stream, waits });
        before.push(done);
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm_rng::{Purpose, Stream, below};

    /// From `(start, end)` pairs.
    fn access(reads: &[(usize, usize)], writes: &[(usize, usize)]) -> Access {
        let ranges = |all: &[(usize, usize)]| all.iter().map(|&(from, to)| from..to).collect();
        Access { reads: ranges(reads), writes: ranges(writes) }
    }

    #[test]
    fn independent_nodes_run_concurrently() {
        // 0 writes a; 1 and 2 read it; 3 needs both; 4 overwrites a after 1 and 2; 5 is independent.
        let nodes = [
            access(&[], &[(0, 10)]),
            access(&[(0, 10)], &[(10, 20)]),
            access(&[(0, 10)], &[(20, 30)]),
            access(&[(10, 30)], &[(30, 40)]),
            access(&[], &[(5, 6)]),
            access(&[], &[(50, 60)]),
        ];
        let slots = assign_streams(&nodes, 8);
        let stream: Vec<usize> = slots.iter().map(|t| t.stream).collect();
        assert_eq!((stream[0], stream[1]), (0, 0));
        assert_eq!((stream[2], &slots[2].waits[..]), (1, &[0][..]));
        assert_eq!((stream[3], &slots[3].waits[..]), (1, &[1][..]));
        // Both readers are done: one precedes it on its stream, the other is waited for.
        assert!(slots[4].waits.contains(&if stream[4] == 0 { 2 } else { 1 }), "{slots:?}");
        assert!(slots[5].waits.is_empty());
        assert!(assign_streams(&nodes, 1).iter().all(|t| *t == StreamSlot::default()));
    }

    /// For random accesses, streams and waits order all conflicting nodes.
    #[test]
    fn conflicting_nodes_are_ordered() {
        let mut words = Stream::new(1, Purpose::Test, 0, 0).words();
        let mut random = |n: u32| below(words.next().expect("endless"), n) as usize;
        for round in 0..60 {
            let mut ranges = |max: u32| -> Vec<Range<usize>> {
                (0..random(max))
                    .map(|_| random(60))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|at| at..at + 1 + at % 7)
                    .collect()
            };
            let nodes: Vec<Access> =
                (0..80).map(|_| Access { reads: ranges(4), writes: ranges(3) }).collect();
            let slots = assign_streams(&nodes, 1 + round % 5);
            assert!(slots.iter().all(|t| t.stream < 1 + round % 5));
            // Predecessors of each node by streams and waits alone.
            let mut before: Vec<Vec<bool>> = Vec::new();
            for (i, slot) in slots.iter().enumerate() {
                let mut mine = vec![false; nodes.len()];
                let on_stream = (0..i).filter(|&j| slots[j].stream == slot.stream);
                for j in on_stream.chain(slot.waits.iter().copied()) {
                    assert!(j < i);
                    mine[j] = true;
                    for k in 0..j {
                        mine[k] |= before[j][k];
                    }
                }
                for j in (0..i).filter(|&j| nodes[i].conflicts_with(&nodes[j])) {
                    assert!(mine[j], "{i} conflicts with {j} but does not wait");
                }
                before.push(mine);
            }
        }
    }
}
