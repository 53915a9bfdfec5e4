//! Which nodes wait for which, and on which stream each runs: a graph of launches has the edges that memory asks for, and no others.
//!
//! The plan gives the same memory to tensors that do not live together, so that what may run side by side is told by places, not by
//! tensors: a node waits for whoever wrote what it reads, and for whoever read or wrote where it writes. Weight gradients, time
//! embeddings and the two sides of a sum then run beside the chain of a network's layers where these do not fill the GPU.

use std::ops::Range;

/// What a node reads and writes; places are numbers of one memory.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Read, and not written.
    pub reads: Vec<Range<usize>>,
    /// Written, and perhaps read.
    pub writes: Vec<Range<usize>>,
}

impl Access {
    /// Whether the order of the two matters.
    fn meets(&self, other: &Self) -> bool {
        let meet = |a: &[Range<usize>], b: &[Range<usize>]| {
            a.iter().any(|a| b.iter().any(|b| a.start < b.end && b.start < a.end))
        };
        meet(&self.writes, &other.writes)
            || meet(&self.writes, &other.reads)
            || meet(&self.reads, &other.writes)
    }
}

/// When a node runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Turn {
    /// On which stream, behind the earlier nodes there.
    pub stream: usize,
    /// Behind which nodes of other streams.
    pub waits: Vec<usize>,
}

/// A set of nodes.
#[derive(Clone)]
struct Set(Vec<u64>);

impl Set {
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

/// Turns for nodes whose order is that of the list, on so many streams at most. Nodes of one stream run in order.
pub fn schedule(nodes: &[Access], streams: usize) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::with_capacity(nodes.len());
    // Nodes that are done when a node begins.
    let mut before: Vec<Set> = Vec::with_capacity(nodes.len());
    let mut last: Vec<usize> = Vec::new(); // of each stream
    for (i, node) in nodes.iter().enumerate() {
        let mut done = Set(vec![0; nodes.len().div_ceil(64)]);
        let mut behind = Vec::new();
        for j in (0..i).rev().filter(|&j| node.meets(&nodes[j])) {
            if !done.has(j) {
                behind.push(j);
                done.add(j);
                done.add_all(&before[j]);
            }
        }
        // The stream of what it waits for longest; else one that has nothing to do; else a new one.
        let follows = behind.iter().find_map(|j| last.iter().position(|l| l == j));
        let idle = || last.iter().position(|&l| done.has(l));
        let stream = follows.or_else(idle).unwrap_or_else(|| match last.len() < streams.max(1) {
            true => last.len(),
            false => (0..last.len()).min_by_key(|&s| last[s]).unwrap_or(0),
        });
        if stream == last.len() {
            last.push(i);
        } else {
            done.add(last[stream]);
            done.add_all(&before[last[stream]].clone());
        }
        let waits = behind.into_iter().filter(|&j| turns[j].stream != stream).collect();
        last[stream] = i;
        turns.push(Turn { stream, waits });
        before.push(done);
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm_engine::rng::{Purpose, Stream, below};

    /// Of places `(from, to)`.
    fn access(reads: &[(usize, usize)], writes: &[(usize, usize)]) -> Access {
        let ranges = |all: &[(usize, usize)]| all.iter().map(|&(from, to)| from..to).collect();
        Access { reads: ranges(reads), writes: ranges(writes) }
    }

    #[test]
    fn what_does_not_meet_runs_side_by_side() {
        // 0 makes a; 1 and 2 read it; 3 needs both; 4 writes over a, which 1 and 2 have read; 5 is on its own.
        let nodes = [
            access(&[], &[(0, 10)]),
            access(&[(0, 10)], &[(10, 20)]),
            access(&[(0, 10)], &[(20, 30)]),
            access(&[(10, 30)], &[(30, 40)]),
            access(&[], &[(5, 6)]),
            access(&[], &[(50, 60)]),
        ];
        let turns = schedule(&nodes, 8);
        let stream: Vec<usize> = turns.iter().map(|t| t.stream).collect();
        assert_eq!((stream[0], stream[1]), (0, 0));
        assert_eq!((stream[2], &turns[2].waits[..]), (1, &[0][..]));
        assert_eq!((stream[3], &turns[3].waits[..]), (1, &[1][..]));
        // Both readers are over: one is before it on its stream, or is waited for.
        assert!(turns[4].waits.contains(&if stream[4] == 0 { 2 } else { 1 }), "{turns:?}");
        assert!(turns[5].waits.is_empty());
        assert!(schedule(&nodes, 1).iter().all(|t| *t == Turn::default()));
    }

    /// Whatever the accesses, streams and waits put all that meet in order.
    #[test]
    fn all_that_meet_are_in_order() {
        let mut words = Stream::new(1, Purpose::Test, 0, 0).words();
        let mut draw = |n: u32| below(words.next().expect("endless"), n) as usize;
        for round in 0..60 {
            let mut ranges = |most: u32| -> Vec<Range<usize>> {
                (0..draw(most))
                    .map(|_| draw(60))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|at| at..at + 1 + at % 7)
                    .collect()
            };
            let nodes: Vec<Access> =
                (0..80).map(|_| Access { reads: ranges(4), writes: ranges(3) }).collect();
            let turns = schedule(&nodes, 1 + round % 5);
            assert!(turns.iter().all(|t| t.stream < 1 + round % 5));
            // What is before each node by streams and waits alone.
            let mut before: Vec<Vec<bool>> = Vec::new();
            for (i, turn) in turns.iter().enumerate() {
                let mut mine = vec![false; nodes.len()];
                let on_stream = (0..i).filter(|&j| turns[j].stream == turn.stream);
                for j in on_stream.chain(turn.waits.iter().copied()) {
                    assert!(j < i);
                    mine[j] = true;
                    for k in 0..j {
                        mine[k] |= before[j][k];
                    }
                }
                for j in (0..i).filter(|&j| nodes[i].meets(&nodes[j])) {
                    assert!(mine[j], "{i} meets {j} and does not wait");
                }
                before.push(mine);
            }
        }
    }
}
