//! Stop requests: runs end early, and leave weights and the optimizer's state unchanged.
#![allow(missing_docs, reason = "tests")]

use ddpm_engine::ops::{Activate, Activation, Conv2d, Loss};
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::{
    AdamStep, Error, Executor, Graph, PlanOptions, Region, Result, RngKey, StepOutcome, Tensor,
};
use ddpm_engine_cpu::CpuExecutor;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const REGIONS: [Region; 4] = [Region::Weights, Region::ExpAvg, Region::ExpAvgSq, Region::Ema];
const CHANNELS: usize = 16;
const LAYERS: usize = 6;

fn values(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 31 + seed * 17) % 997) as f32 / 4985.0 - 0.1).collect()
}

/// A stack of convolutions on two images of `side` x `side`, ready to train.
fn network(side: usize, defer_updates: bool) -> Result<CpuExecutor> {
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
    let (fuse_optimizer, outputs) = (Some(loss), vec![loss]);
    let options = PlanOptions {
        gradients,
        fuse_optimizer,
        defer_updates,
        outputs,
        ema: true,
        ..PlanOptions::default()
    };
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
    exec.train(RngKey::default(), &adam)
}

/// The bits of the weights, their average and the optimizer's state.
fn state(exec: &CpuExecutor) -> Vec<u32> {
    let mut all = Vec::new();
    for (region, i) in REGIONS.into_iter().flat_map(|region| (0..LAYERS).map(move |i| (region, i))) {
        let mut x = vec![0.0; 9 * CHANNELS * CHANNELS];
        exec.read_parameter(region, i, &mut x).expect("its length");
        all.extend(x.iter().map(|v| v.to_bits()));
    }
    all
}

fn is_deferred(exec: &CpuExecutor) -> bool {
    let after_node = &exec.plan().updates().expect("a fused optimizer").after_node;
    after_node[..after_node.len() - 1].iter().all(Vec::is_empty)
}

#[test]
fn a_stopped_run_changes_no_weights_and_a_later_run_gives_the_same_bits() -> Result<()> {
    for deferred in [true, false] {
        let mut reference = network(48, deferred)?;
        let start = state(&reference);
        let started = Instant::now();
        step(&mut reference, 1)?;
        let duration = started.elapsed();
        let (first, mut interrupted) = (state(&reference), 0);
        step(&mut reference, 2)?;
        let second = state(&reference);
        assert!(is_deferred(&reference) == deferred && first != start && second != first);

        const DELAYS: u32 = 12;
        for delay in 0..DELAYS {
            let mut exec = network(48, deferred)?;
            let stop = Arc::new(AtomicBool::new(delay == 0));
            exec.set_stop(stop.clone());
            let result = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(duration * delay / DELAYS);
                    stop.store(true, Ordering::Relaxed);
                });
                step(&mut exec, 1)
            });
            stop.store(false, Ordering::Relaxed);
            match result {
                Err(Error::Interrupted) => {
                    interrupted += 1;
                    assert!(state(&exec) == start, "delay {delay}");
                    assert_eq!(step(&mut exec, 1)?, step(&mut network(48, deferred)?, 1)?);
                }
                other => assert!(matches!(other?, StepOutcome::Applied { .. })),
            }
            assert!(state(&exec) == first, "delay {delay}");
            step(&mut exec, 2)?;
            assert!(state(&exec) == second, "delay {delay}");
        }
        assert!(interrupted > 0);
    }
    Ok(())
}

#[test]
fn a_stop_request_interrupts_a_node() -> Result<()> {
    // On one thread a node takes hundreds of milliseconds, and the run takes seconds.
    let mut exec = network(384, true)?;
    assert!(is_deferred(&exec));
    let stop = Arc::new(AtomicBool::new(false));
    exec.set_stop(stop.clone());
    for _ in 0..3 {
        let ended = std::thread::scope(|scope| {
            let stopper = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(60));
                stop.store(true, Ordering::Relaxed);
                Instant::now()
            });
            assert!(matches!(step(&mut exec, 1), Err(Error::Interrupted)));
            Instant::now() - stopper.join().expect("the thread does not panic")
        });
        stop.store(false, Ordering::Relaxed);
        assert!(ended < Duration::from_millis(500), "{ended:?}");
    }
    Ok(())
}

#[test]
fn updates_are_deferred_where_that_takes_little_more_memory() -> Result<()> {
    // With large images the memory of the forward pass has room for all gradients; with images of one pixel it has not.
    for (side, deferred) in [(48, true), (1, false)] {
        let (immediate, maybe_deferred) = (network(side, false)?, network(side, true)?);
        assert_eq!(is_deferred(&maybe_deferred), deferred, "side {side}");
        let [immediate, maybe_deferred] =
            [immediate, maybe_deferred].map(|exec| exec.footprint().arena_bytes);
        assert!(maybe_deferred <= immediate + immediate / 20);
    }
    Ok(())
}
