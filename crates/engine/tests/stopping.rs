//! Runs that are asked to stop: they end early, and leave weights and the optimizer's state as they were.
#![allow(missing_docs, reason = "nothing here is for others")]

use ddpm_engine::autodiff::backward;
use ddpm_engine::ops::{Activate, Activation, Conv2d, Loss};
use ddpm_engine::{
    AdamStep, CpuExecutor, Draws, Error, Executor, Graph, PlanOptions, Region, Result, StepOutcome, Tensor,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const REGIONS: [Region; 4] = [Region::Weights, Region::ExpAvg, Region::ExpAvgSq, Region::Ema];
const CHANNELS: usize = 16;
const LAYERS: usize = 6;

fn values(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 31 + seed * 17) % 997) as f32 / 4985.0 - 0.1).collect()
}

/// Some convolutions one behind the other, on two images of that side, ready to train.
fn network(side: usize, late_updates: bool) -> Result<CpuExecutor> {
    let mut g = Graph::new();
    let [x, y] = ["x", "y"].map(|name| g.input(name, [2, side, side, CHANNELS]));
    let mut h = x;
    for _ in 0..LAYERS {
        let w = g.parameter("w", [3, 3, CHANNELS, CHANNELS]);
        h = g.add("conv", Conv2d { bias: false, ..Conv2d::new(1, 1) }, &[h, w])?;
        h = g.add("silu", Activate(Activation::Silu), &[h])?;
    }
    let loss = g.add("loss", Loss::Mse, &[h, y])?;
    let gradients = Some(backward(&mut g, loss)?);
    let (fuse_optimizer, keep) = (Some(loss), vec![loss]);
    let options =
        PlanOptions { gradients, fuse_optimizer, late_updates, keep, ema: true, ..PlanOptions::default() };
    let of_input = |t: Tensor, exec: &mut CpuExecutor| exec.write(t, &values(3, 2 * side * side * CHANNELS));
    let mut exec = CpuExecutor::new(g, &options, 2)?;
    of_input(x, &mut exec)?;
    of_input(y, &mut exec)?;
    for i in 0..LAYERS {
        for region in [Region::Weights, Region::Ema] {
            exec.write_parameter(region, i, &values(i, 9 * CHANNELS * CHANNELS))?;
        }
    }
    Ok(exec)
}

fn step(exec: &mut CpuExecutor, step: u64) -> Result<StepOutcome> {
    let adam = AdamStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        decoupled: false,
        step,
        ema_decay: 0.9,
        grad_scale: 1.0,
    };
    exec.train(Draws::default(), &adam)
}

/// The bits of weights, their average and the optimizer's state.
fn state(exec: &CpuExecutor) -> Vec<u32> {
    let mut all = Vec::new();
    for (region, i) in REGIONS.into_iter().flat_map(|region| (0..LAYERS).map(move |i| (region, i))) {
        let mut x = vec![0.0; 9 * CHANNELS * CHANNELS];
        exec.read_parameter(region, i, &mut x).expect("its length");
        all.extend(x.iter().map(|v| v.to_bits()));
    }
    all
}

fn is_late(exec: &CpuExecutor) -> bool {
    let behind = &exec.plan().updates().expect("asked for").behind;
    behind[..behind.len() - 1].iter().all(Vec::is_empty)
}

#[test]
fn a_run_that_is_asked_to_stop_changes_no_weight_and_a_later_one_gives_the_same_bits() -> Result<()> {
    for late in [true, false] {
        let mut whole = network(48, late)?;
        let start = state(&whole);
        let begun = Instant::now();
        step(&mut whole, 1)?;
        let took = begun.elapsed();
        let (first, mut interrupted) = (state(&whole), 0);
        step(&mut whole, 2)?;
        let second = state(&whole);
        assert!(is_late(&whole) == late && first != start && second != first);

        const MOMENTS: u32 = 12;
        for moment in 0..MOMENTS {
            let mut exec = network(48, late)?;
            let stop = Arc::new(AtomicBool::new(moment == 0));
            exec.set_stop(stop.clone());
            let made = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(took * moment / MOMENTS);
                    stop.store(true, Ordering::Relaxed);
                });
                step(&mut exec, 1)
            });
            stop.store(false, Ordering::Relaxed);
            match made {
                Err(Error::Interrupted) => {
                    interrupted += 1;
                    assert!(state(&exec) == start, "moment {moment}");
                    assert_eq!(step(&mut exec, 1)?, step(&mut network(48, late)?, 1)?);
                }
                other => assert!(matches!(other?, StepOutcome::Whole { .. })),
            }
            assert!(state(&exec) == first, "moment {moment}");
            step(&mut exec, 2)?;
            assert!(state(&exec) == second, "moment {moment}");
        }
        assert!(interrupted > 0);
    }
    Ok(())
}

#[test]
fn a_stop_is_obeyed_in_the_middle_of_a_node() -> Result<()> {
    // One node takes hundreds of milliseconds on one thread, all of them seconds.
    let mut exec = network(384, true)?;
    assert!(is_late(&exec));
    let stop = Arc::new(AtomicBool::new(false));
    exec.set_stop(stop.clone());
    for _ in 0..3 {
        let ended = std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(60));
                stop.store(true, Ordering::Relaxed);
                Instant::now()
            });
            assert!(matches!(step(&mut exec, 1), Err(Error::Interrupted)));
            Instant::now() - asked.join().expect("a thread that sleeps")
        });
        stop.store(false, Ordering::Relaxed);
        assert!(ended < Duration::from_millis(500), "{ended:?}");
    }
    Ok(())
}

#[test]
fn updates_behind_the_run_are_chosen_where_they_take_hardly_more_memory() -> Result<()> {
    // Large images: what the forward pass leaves makes room for all gradients. Images of a pixel: it does not.
    for (side, late) in [(48, true), (1, false)] {
        let (within, behind) = (network(side, false)?, network(side, true)?);
        assert_eq!(is_late(&behind), late, "side {side}");
        let [within, most] = [within, behind].map(|exec| exec.footprint().arena_bytes);
        assert!(most <= within + within / 20);
    }
    Ok(())
}
