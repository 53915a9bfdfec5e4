//! In-place and fused operations.

use super::*;

#[test]
fn in_place_operations_preserve_tensors_that_are_read_later() -> Result<()> {
    let mut g = Graph::new();
    let (x, y) = (g.input("x", [2, 5]), g.input("y", [2, 5]));
    let a = g.add("a", Activate(Activation::Silu), &[x])?;
    let b = g.add("b", Add, &[a, y])?; // d also reads a: not in place
    let c = g.add("c", Add, &[b, y])?; // the last consumer of b: in place
    let d = g.add("d", Add, &[a, c])?;
    let e = g.add("e", Add, &[x, d])?; // an input is never overwritten
    let f = g.add("f", Add, &[e, e])?;
    let want = in_f64(&g);
    for outputs in [vec![f], vec![b, f], vec![a, c, f], vec![a, b, c, d, e, f]] {
        for (t, got) in outputs.iter().zip(run(&g, None, &outputs, &outputs)?) {
            assert_close(&got, &want[t], &g.info(*t).name);
        }
    }
    let options = PlanOptions { outputs: vec![f], ..PlanOptions::default() };
    let executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
    let plan = executor.plan();
    assert_eq!(plan.range(b), plan.range(c), "the last consumer works in place");
    assert_ne!(plan.range(a), plan.range(b));
    Ok(())
}

#[test]
fn random_graphs_agree_with_f64_for_any_outputs() -> Result<()> {
    let mut shared = 0;
    for seed in 0..300 {
        let (mut g, loss) = random_graph(seed)?;
        let forward = g.clone();
        let want = in_f64(&forward);
        let all = computed(&forward);
        for (t, got) in all.iter().zip(run(&forward, None, &all, &all)?) {
            assert_close(&got, &want[t], &format!("seed {seed}, {}", g.info(*t).name));
        }
        let gradients = backward(&mut g, loss)?;
        let tight = run(&g, Some(&gradients), &[loss], &[loss])?;
        let loose = run(&g, Some(&gradients), &computed(&g), &[loss])?;
        assert_eq!(tight, loose, "seed {seed}");
        assert_close(&tight[0], &want[&loss], &format!("seed {seed}, loss"));
        let options =
            PlanOptions { gradients: Some(gradients), outputs: vec![loss], ..PlanOptions::default() };
        let executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
        let plan = executor.plan();
        let in_place = |n: &&ddpm_engine::graph::Node| {
            n.op.operation().in_place().is_some_and(|i| plan.range(n.inputs[i]) == plan.range(n.outputs[0]))
        };
        shared += plan.graph().nodes().iter().filter(in_place).count();
    }
    assert!(shared > 300, "too few in-place operations: {shared}");
    Ok(())
}

#[test]
fn fused_operations_compute_the_same() -> Result<()> {
    let mut fused_away = 0;
    for seed in 0..300 {
        let (g, loss) = random_graph(seed)?;
        let want = in_f64(&g);
        let output = computed(&g)[seed as usize % 3];
        let mut fused = fuse(g.clone(), &[loss, output])?;
        let got = in_f64(&fused);
        for t in computed(&fused) {
            assert_eq!(got[&t], want[&t], "seed {seed}, {}", g.info(t).name);
        }
        assert!(got.contains_key(&loss) && got.contains_key(&output), "seed {seed}: an output was removed");
        fused_away += g.nodes().len() - fused.nodes().len();

        let gradients = backward(&mut fused, loss)?;
        let mut plain = g;
        let plain_gradients = backward(&mut plain, loss)?;
        let got = run(&fused, Some(&gradients), &[loss], &[loss])?;
        let want = run(&plain, Some(&plain_gradients), &[loss], &[loss])?;
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let want: Vec<f64> = want.iter().map(|&v| f64::from(v)).collect();
            assert_close(got, &want, &format!("seed {seed}, result {i}"));
        }
    }
    assert!(fused_away > 50, "too few operations were fused: {fused_away}");
    Ok(())
}

#[test]
fn a_fused_network_has_the_same_loss_and_fewer_nodes() -> Result<()> {
    let network = network()?;
    let fused = fuse(network.forward.clone(), &[network.loss])?;
    let names: Vec<&str> = fused.nodes().iter().map(|n| n.op.operation().name()).collect();
    let unfused = ["add", "add_per_channel", "group_norm"];
    assert!(names.iter().all(|n| !unfused.contains(n)), "{names:?}");
    let run = |graph: &Graph| -> Result<f32> {
        let options = PlanOptions { outputs: vec![network.loss], ..PlanOptions::default() };
        let mut executor = CpuExecutor::with_isa(graph.clone(), &options, 2, Isa::best())?;
        executor.write(network.x0, &normal(1, 999, graph.shape(network.x0).len()))?;
        for (i, weights) in network.weights().iter().enumerate() {
            executor.write_parameter(Region::Weights, i, weights)?;
        }
        executor.run(RngKey { seed: 1, step: 2, first_index: 3 })?;
        let mut loss = [f32::NAN];
        executor.read(network.loss, &mut loss)?;
        Ok(loss[0])
    };
    let (plain, fused) = (run(&network.forward)?, run(&fused)?);
    assert!((plain - fused).abs() <= 1e-5 * plain.abs(), "{plain} {fused}");
    Ok(())
}
