//! Training: threads, memory reuse, gradient accumulation, updates and the fused optimizer.

use super::*;

#[test]
fn training_gives_the_same_bits_on_any_number_of_threads() -> Result<()> {
    let network = network()?;
    for isa in Isa::all() {
        let run = |threads| network.train(&mut network.executor(threads, isa, vec![network.loss])?, 2);
        let one = run(1)?;
        assert_ne!(one[0], one[one.len() / 2], "{isa}: training has no effect");
        for threads in [2, 3] {
            assert!(run(threads)? == one, "{isa}: {threads} threads differ from 1");
        }
    }
    Ok(())
}

#[test]
fn memory_reuse_and_stale_values_do_not_change_results() -> Result<()> {
    let network = network()?;
    let isa = Isa::best();
    let mut tight = network.executor(2, isa, vec![network.loss])?;
    let mut loose = network.executor(2, isa, computed(&network.graph))?;
    let (small, large) = (tight.footprint().arena_bytes, loose.footprint().arena_bytes);
    // Both include scratch memory.
    let all: usize = computed(&network.graph).iter().map(|&t| 4 * network.graph.shape(t).len()).sum();
    assert!(2 * (large - small) > all, "{small} of {large} bytes, {all} of tensors: no memory is reused");
    let expected = network.train(&mut loose, 2)?;
    assert!(network.train(&mut tight, 2)? == expected, "reuse changes results");

    let mut poisoned = network.executor(2, isa, vec![network.loss])?;
    for t in computed(&network.graph) {
        poisoned.write(t, &vec![f32::NAN; network.graph.shape(t).len()])?;
    }
    assert!(network.train(&mut poisoned, 2)? == expected, "a node reads uninitialized memory");
    Ok(())
}

#[test]
fn a_run_depends_on_its_rng_key_alone() -> Result<()> {
    let network = network()?;
    for isa in Isa::all() {
        let mut executor = network.executor(2, isa, vec![network.loss])?;
        let mut run = |step| -> Result<Vec<u32>> {
            executor.run(RngKey { seed: 7, step, first_index: 0 })?;
            let mut seen = vec![f32::NAN];
            executor.read(network.loss, &mut seen)?;
            for (i, &p) in network.graph.parameters().iter().enumerate() {
                let mut gradient = vec![f32::NAN; network.graph.shape(p).len()];
                executor.read_parameter(Region::Gradients, i, &mut gradient)?;
                seen.extend(gradient);
            }
            Ok(bits(&seen))
        };
        let (first, other, repeated) = (run(1)?, run(2)?, run(1)?);
        assert!(first == repeated, "{isa}: two runs differ");
        assert!(first != other, "{isa}: two steps have the same random numbers");
    }
    Ok(())
}

#[test]
fn every_tensor_of_the_network_agrees_with_f64() -> Result<()> {
    let network = network()?;
    let outputs = computed(&network.forward);
    for isa in Isa::all() {
        let mut executor = network.executor(2, isa, outputs.clone())?;
        executor.run(RngKey { seed: 7, step: 3, first_index: 0 })?;
        let read = |t: Tensor| -> Result<Vec<f64>> {
            let mut x = vec![f32::NAN; network.graph.shape(t).len()];
            executor.read(t, &mut x)?;
            Ok(x.into_iter().map(f64::from).collect())
        };
        let mut values = Values::new();
        let random = network
            .forward
            .nodes()
            .iter()
            .filter(|n| matches!(n.op, Op::RandomNormal(_) | Op::RandomTimestep(_)));
        let random = random.map(|n| n.outputs[0]);
        for t in random.chain([network.x0]).chain(network.forward.parameters().iter().copied()) {
            values.insert(t, read(t)?);
        }
        evaluate(&network.forward, &mut values);
        for node in network.forward.nodes() {
            for &t in &node.outputs {
                let (got, want) = (read(t)?, &values[&t]);
                let scale = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                let error = got.iter().zip(want).fold(0.0f64, |m, (g, w)| m.max((g - w).abs()));
                assert!(error <= 1e-5 * scale, "{} on {isa}: {error:.1e} of {scale}", node.name);
            }
        }
    }
    Ok(())
}

#[test]
fn an_update_matches_the_reference_optimizer_in_every_region() -> Result<()> {
    let mut g = Graph::new();
    // Not a multiple of a cache line: there is padding between the parameters.
    let (x, p, q) = (g.input("x", [3, 5]), g.parameter("p", [3, 5]), g.parameter("q", [3, 5]));
    let y = g.add("y", Add, &[p, x])?;
    let y = g.add("z", Add, &[y, q])?;
    let loss = g.add("loss", Loss::Mse, &[y, x])?;
    let gradients = backward(&mut g, loss)?;
    for ema in [true, false] {
        let options = PlanOptions { gradients: Some(gradients.clone()), ema, ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(g.clone(), &options, 2, Isa::best())?;
        executor.write(x, &normal(4, 0, 15))?;
        let regions = if ema { &REGIONS[..] } else { &REGIONS[..4] };
        for (r, &region) in regions.iter().enumerate() {
            for i in 0..2 {
                let start: Vec<f32> = normal(4, 1 + 2 * r + i, 15).iter().map(|v| v.abs()).collect();
                executor.write_parameter(region, i, &start)?;
            }
        }
        executor.run(RngKey::default())?;
        let read = |executor: &CpuExecutor, region, i| -> Result<Vec<f32>> {
            let mut values = vec![f32::NAN; 15];
            executor.read_parameter(region, i, &mut values)?;
            Ok(values)
        };
        let all = |executor: &CpuExecutor| -> Result<Vec<Vec<Vec<f32>>>> {
            let of = |&region| (0..2).map(|i| read(executor, region, i)).collect::<Result<Vec<_>>>();
            regions.iter().map(of).collect()
        };
        let before = all(&executor)?;
        executor.update(&adam_step(3))?;
        let after = all(&executor)?;
        for (i, at) in (0..2).flat_map(|i| (0..15).map(move |at| (i, at))) {
            let old = |r: usize| before.get(r).map_or(0.0, |region| f64::from(region[i][at]));
            let state = Trained { weight: old(0), exp_avg: old(2), exp_avg_sq: old(3), ema: old(4) };
            let new = reference::adam(&adam_step(3), old(1), state);
            let want = [new.weight, old(1), new.exp_avg, new.exp_avg_sq, new.ema];
            for (r, region) in regions.iter().enumerate() {
                let got = f64::from(after[r][i][at]);
                let error = (got - want[r]).abs();
                assert!(error <= 1e-6 * want[r].abs(), "{region:?} of {i}[{at}]: {got}, not {}", want[r]);
            }
        }
    }
    Ok(())
}

#[test]
fn accumulated_gradients_are_summed_measured_and_applied() -> Result<()> {
    let network = network()?;
    let parameters = network.graph.parameters();
    let mut norms = Vec::new();
    for threads in [1, 2, 5] {
        let gradients = Some(network.gradients.clone());
        let options = PlanOptions { gradients, accumulate: true, ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(network.graph.clone(), &options, threads, Isa::best())?;
        executor.write(network.x0, &normal(1, 999, network.graph.shape(network.x0).len()))?;
        for (i, weights) in network.weights().iter().enumerate() {
            executor.write_parameter(Region::Weights, i, weights)?;
        }
        let read = |executor: &CpuExecutor, region| -> Result<Vec<Vec<f32>>> {
            let one = |(i, &p): (usize, &Tensor)| {
                let mut values = vec![f32::NAN; network.graph.shape(p).len()];
                executor.read_parameter(region, i, &mut values).map(|()| values)
            };
            parameters.iter().enumerate().map(one).collect()
        };
        let mut want: Vec<Vec<f32>> = parameters.iter().map(|_| Vec::new()).collect();
        // The second run starts a new sum, so the first is discarded.
        for step in 0..4 {
            executor.run(RngKey { seed: 7, step, first_index: 0 })?;
            executor.accumulate(step <= 1)?;
            let last = read(&executor, Region::Gradients)?;
            for (sum, last) in want.iter_mut().zip(last) {
                match step {
                    0 | 1 => *sum = last,
                    _ => sum.iter_mut().zip(last).for_each(|(sum, g)| *sum += g),
                }
            }
        }
        assert_eq!(read(&executor, Region::GradientSum)?, want, "{threads} threads");
        let norm = executor.gradient_norm()?;
        let exact = want.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!((norm / exact - 1.0).abs() <= 1e-6, "{norm}, not {exact}");
        norms.push(norm.to_bits());

        executor.update(&AdamStep { grad_scale: 0.25, ..adam_step(1) })?;
        for (sum, exp_avg) in want.iter().zip(read(&executor, Region::ExpAvg)?) {
            for (sum, got) in sum.iter().zip(exp_avg) {
                // The first moment starts at zero: (1 - beta1) of the scaled sum.
                let want = 0.1 * 0.25 * f64::from(*sum);
                assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs(), "{got}, not {want}");
            }
        }
    }
    assert!(norms.iter().all(|n| *n == norms[0]), "the norm depends on the number of threads");

    // Without accumulation the norm is the last run's, and accumulate fails.
    let mut executor = network.executor(2, Isa::best(), vec![network.loss])?;
    assert_eq!(executor.gradient_norm()?, 0.0);
    executor.run(RngKey { seed: 7, step: 1, first_index: 0 })?;
    assert!(executor.gradient_norm()? > 0.0);
    let error = executor.accumulate(true).expect_err("no sum").to_string();
    assert!(error.contains("gradient accumulation"), "{error}");
    Ok(())
}

/// Trains and returns, as bits, the loss and gradient norm of each step, then all regions except the gradients.
fn trained(
    graph: &Graph,
    options: PlanOptions,
    loss: Tensor,
    given: &[(Tensor, Vec<f32>)],
    threads: usize,
) -> Result<Vec<Vec<u64>>> {
    let options = PlanOptions { ema: true, ..options };
    let mut executor = CpuExecutor::with_isa(graph.clone(), &options, threads, Isa::best())?;
    for t in computed(graph) {
        executor.write(t, &vec![f32::NAN; graph.shape(t).len()])?;
    }
    for (t, x) in given {
        executor.write(*t, x)?;
    }
    let mut seen = Vec::new();
    for step in 1..=3u32 {
        let (rng, adam) = (RngKey { seed: 7, step, first_index: 0 }, adam_step(u64::from(step)));
        let norm = if executor.plan().updates().is_some() {
            // run alone updates nothing.
            executor.run(rng)?;
            match executor.train(rng, &adam)? {
                StepOutcome::Applied { gradient_norm, .. } => gradient_norm,
                stopped => panic!("{stopped:?} in step {step}"),
            }
        } else {
            executor.run(rng)?;
            let norm = executor.gradient_norm()?;
            executor.update(&adam)?;
            norm
        };
        let mut last = [f32::NAN];
        executor.read(loss, &mut last)?;
        seen.push(vec![u64::from(last[0].to_bits()), norm.to_bits()]);
    }
    for region in REGIONS.into_iter().filter(|&r| r != Region::Gradients) {
        for (i, &p) in graph.parameters().iter().enumerate() {
            let mut values = vec![f32::NAN; graph.shape(p).len()];
            executor.read_parameter(region, i, &mut values)?;
            seen.push(values.iter().map(|v| u64::from(v.to_bits())).collect());
        }
    }
    Ok(seen)
}

#[test]
fn a_fused_optimizer_gives_the_same_bits() -> Result<()> {
    let network = network()?;
    let mut start_values: Vec<_> =
        network.graph.parameters().iter().copied().zip(network.weights()).collect();
    start_values.push((network.x0, normal(1, 999, network.graph.shape(network.x0).len())));
    let mut recomputed = network.graph.clone();
    recompute(&mut recomputed);
    let (gradients, outputs) = (Some(network.gradients.clone()), vec![network.loss]);
    let separate = PlanOptions { gradients, outputs, ..PlanOptions::default() };
    let fused = PlanOptions { fuse_optimizer: Some(network.loss), ..separate.clone() };
    let deferred = PlanOptions { defer_updates: true, ..fused.clone() };
    for graph in [&network.graph, &recomputed] {
        let run = |options: &PlanOptions, threads| {
            trained(graph, options.clone(), network.loss, &start_values, threads)
        };
        let want = run(&separate, 1)?;
        for threads in [1, 2, 5] {
            assert!(run(&fused, threads)? == want, "{threads} threads");
            assert!(run(&deferred, threads)? == want, "{threads} threads, deferred");
        }
        let bytes = |options| CpuExecutor::new(graph.clone(), options, 1).map(|e| e.footprint().arena_bytes);
        assert!(bytes(&fused)? < bytes(&separate)?);
        assert!(bytes(&deferred)? <= bytes(&fused)? * 21 / 20);
    }

    // Gradients with other consumers, weights with many consumers, updates in any order.
    let mut read_after_gradient = 0;
    for seed in 0..300 {
        let (mut graph, loss) = random_graph(seed)?;
        let gradients = Some(backward(&mut graph, loss)?);
        let separate = PlanOptions { gradients, outputs: vec![loss], ..PlanOptions::default() };
        let fused = PlanOptions { fuse_optimizer: Some(loss), ..separate.clone() };
        let start = given(&graph);
        let run = |options| trained(&graph, options, loss, &start, 1);
        let want = run(separate)?;
        assert!(run(fused.clone())? == want, "seed {seed}");
        assert!(run(PlanOptions { defer_updates: true, ..fused.clone() })? == want, "seed {seed}, deferred");
        let executor = CpuExecutor::with_isa(graph.clone(), &fused, 1, Isa::best())?;
        let updates = executor.plan().updates().expect("a fused optimizer");
        for (i, node) in
            updates.after_node.iter().zip(graph.nodes()).flat_map(|(all, n)| all.iter().map(move |i| (*i, n)))
        {
            read_after_gradient += usize::from(!node.outputs.contains(&updates.gradients[i]));
        }
    }
    assert!(read_after_gradient > 50, "too few weights are read after their gradient: {read_after_gradient}");
    Ok(())
}

#[test]
fn nothing_is_updated_after_the_first_nonfinite_value() -> Result<()> {
    // The gradient of q is computed before that of p.
    let mut g = Graph::new();
    let [x, y] = ["x", "y"].map(|name| g.input(name, [4, 2]));
    let [p, q] = ["p", "q"].map(|name| g.parameter(name, [1, 1, 2, 2]));
    let linear = Conv2d { bias: false, ..Conv2d::linear() };
    let h = g.add("h", linear.clone(), &[x, p])?;
    let z = g.add("z", linear, &[h, q])?;
    let loss = g.add("loss", Loss::L1, &[z, y])?;
    let gradients = Some(backward(&mut g, loss)?);
    let options =
        PlanOptions { gradients, fuse_optimizer: Some(loss), outputs: vec![loss], ..PlanOptions::default() };
    // (x, p, q), and how many parameters are updated; None: all.
    let cases = [
        ([1.0, 1.0, 1.0], None),
        ([1.0, 1.0, f32::NAN], Some(0)),
        ([1.0, 1.0, f32::MAX], Some(0)),
        // Overflow in the squares of q's gradient, in those of p's, and in p's gradient itself.
        ([1e25, 1.0, 1.0], Some(0)),
        ([1.0, 1e-30, 1e25], Some(1)),
        ([1e5, 1e-30, 1e35], Some(1)),
    ];
    for ([at_x, at_p, at_q], want) in cases {
        let mut executor = CpuExecutor::new(g.clone(), &options, 2)?;
        for (t, value) in [(x, at_x), (y, 0.5), (p, at_p), (q, at_q)] {
            executor.write(t, &vec![value; g.shape(t).len()])?;
        }
        let got = executor.train(RngKey::default(), &adam_step(1))?;
        let moved = [0, 1].map(|i| {
            let (mut weights, mut moments) = ([0.0; 4], [0.0; 4]);
            executor.read_parameter(Region::Weights, i, &mut weights).expect("weights");
            executor.read_parameter(Region::ExpAvg, i, &mut moments).expect("moments");
            let moved = moments.iter().all(|m| *m != 0.0);
            assert!(moved || weights.iter().all(|w| w.to_bits() == [at_p, at_q][i].to_bits()), "{got:?}");
            moved
        });
        match want {
            None => {
                assert!(
                    matches!(got, StepOutcome::Applied { gradient_norm, .. } if gradient_norm > 0.0),
                    "{got:?}"
                )
            }
            Some(updated) => {
                assert_eq!(got, StepOutcome::NonFinite { updated }, "x {at_x}, p {at_p}, q {at_q}")
            }
        }
        assert_eq!(moved, [want.is_none(), want != Some(0)]);
    }

    // The plan has no gradients to read.
    let mut executor = CpuExecutor::new(g.clone(), &options, 1)?;
    let errors = [
        executor.update(&adam_step(1)).expect_err("no gradients"),
        executor.gradient_norm().expect_err("no gradients"),
        executor.accumulate(true).expect_err("no gradients"),
        executor.read_parameter(Region::Gradients, 0, &mut [0.0; 4]).expect_err("no gradients"),
    ];
    for (error, part) in
        errors.iter().zip(["fused optimizer", "fused optimizer", "gradient accumulation", "Gradients"])
    {
        assert!(error.to_string().contains(part), "{error}");
    }
    let mut executor = CpuExecutor::new(g, &PlanOptions { fuse_optimizer: None, ..options }, 1)?;
    let error = executor.train(RngKey::default(), &adam_step(1)).expect_err("not fused").to_string();
    assert!(error.contains("fused optimizer"), "{error}");
    Ok(())
}
