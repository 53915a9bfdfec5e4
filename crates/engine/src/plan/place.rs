//! Placing items of known size and lifetime in one memory range.

use std::ops::Range;

/// Elements of a cache line: every tensor is aligned to it.
pub const ALIGN: usize = 16;

/// An allocation: its size and the steps in which it is live.
pub(super) struct Item {
    pub(super) len: usize,
    pub(super) live: Range<usize>,
    /// Its offset, if that is fixed.
    pub(super) at: Option<usize>,
}

impl Item {
    pub(super) fn new(len: usize, live: Range<usize>) -> Self {
        Self { len, live, at: None }
    }
}

/// Offsets for all items, and the total length. Larger items are placed first, either throughout or with the items that stay
/// live to the end last, whichever takes less memory.
pub(super) fn place(items: &[Item]) -> (Vec<usize>, usize) {
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
