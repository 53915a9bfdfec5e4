//! Speed of attention on one thread, shape by shape, against the multiply-adds that this core can do.
//!
//! `cargo run --release -p ddpm-kernels --example attention_speed [SECONDS [SHAPE]]`: each number is the best of all the
//! calls in so many seconds (default 0.2), because whatever else the machine does makes it slower; `SHAPE` is a part of
//! the names of the shapes to measure. `DDPM_ISA` chooses the instruction set.

use ddpm_kernels::attention::{Attention, Saved};
use ddpm_kernels::{Isa, elementwise};
use std::time::Instant;

/// (tokens, heads, width of a head)
const SHAPES: [(usize, usize, usize); 12] = [
    (784, 4, 4),
    (784, 4, 8),
    (784, 4, 16),
    (784, 4, 32),
    (784, 4, 5),
    (196, 4, 16),
    (49, 4, 16),
    (4096, 1, 8),
    (4096, 1, 16),
    (256, 1, 64),
    (256, 1, 256),
    (64, 1, 256),
];

/// Seconds of the fastest call, of at least three.
fn best(seconds: f64, mut call: impl FnMut()) -> f64 {
    let (start, mut calls, mut best) = (Instant::now(), 0, f64::INFINITY);
    while calls < 3 || start.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        call();
        best = start.elapsed().as_secs_f64().min(best);
        calls += 1;
    }
    best
}

/// Numbers in [-1, 1) without pattern.
fn numbers(n: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let next = |state: &mut u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state as i64 as f64 / -(i64::MIN as f64)) as f32
    };
    (0..n).map(|_| next(&mut state)).collect()
}

/// `len` numbers of the slice from a cache line's beginning on, as the engine gives them; it must be 16 longer.
fn aligned(x: &mut [f32], len: usize) -> &mut [f32] {
    let start = x.as_ptr().align_offset(64).min(16);
    &mut x[start..][..len]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let isa = Isa::from_env()?;
    let mut args = std::env::args().skip(1);
    let seconds = args.next().map_or(Ok(0.2), |s| s.parse())?;
    let wanted = args.next().unwrap_or_default();
    let mut flops = 0;
    let time =
        best(seconds, || flops = elementwise::multiply_add_rounds(isa, 1_000_000 / isa.lanes() as u64));
    let peak = flops as f64 / time;
    println!("{isa}, peak {:.1} GFLOP/s on one thread", peak / 1e9);
    // A vector of cells is one key and as many queries as there are lanes.
    println!(
        "{:>24} {:>9} {:>8} {:>8} {:>8} {:>15}",
        "", "ms", "GFLOP/s", "of peak", "Gexp/s", "FMA times/cell"
    );
    for (tokens, heads, width) in SHAPES {
        let shape = format!("{tokens} {heads}x{width}");
        if !shape.contains(&wanted) {
            continue;
        }
        let channels = heads * width;
        let tiles = Attention::new(isa, tokens, channels, heads);
        let (qkv, d_o) = (numbers(tokens * 3 * channels), numbers(tokens * channels));
        let (mut o, mut lse) = (vec![0.0; tokens * channels], vec![0.0; tokens * heads]);
        let mut dqkv = vec![0.0; qkv.len()];
        let scratch_len = tiles.scratch_len().max(tiles.backward_scratch_len());
        let mut memory = vec![0.0; scratch_len + 16];
        let scratch = aligned(&mut memory, scratch_len);
        let task = tiles.task_queries();
        let forward = best(seconds, || {
            let parts = o.chunks_mut(task * channels).zip(lse.chunks_mut(task * heads));
            for (i, (o, lse)) in parts.enumerate() {
                tiles.forward(&qkv, i * task, None, o, lse, scratch);
            }
        });
        let saved = Saved { qkv: &qkv, o: &o, lse: &lse, d_o: &d_o, dropout: None };
        let backward = best(seconds, || tiles.backward(&saved, &mut dqkv, scratch));
        let cells = (heads * tokens * tokens) as f64;
        for (name, time, products) in [("forward", forward, 2), ("backward", backward, 5)] {
            let flops = cells * (2 * products * width) as f64;
            println!(
                "{name:>8} {shape:>15} {:9.3} {:8.1} {:7.1}% {:8.2} {:15.1}",
                time * 1e3,
                flops / time / 1e9,
                100.0 * flops / time / peak,
                cells / time / 1e9,
                time * peak / 2.0 / cells
            );
        }
    }
    Ok(())
}
