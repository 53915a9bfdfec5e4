//! Errors name their cause.

use super::*;

#[test]
fn shape_errors_name_the_node_the_operation_and_the_shapes() {
    type Bad =
        (&'static str, fn(&mut Graph, &mut dyn FnMut(&mut Graph, &[usize]) -> Tensor) -> Result<Tensor>);
    let bad: [Bad; 16] = [
        ("[2, 3] [3, 2]", |g, t| {
            let x = [t(g, &[2, 3]), t(g, &[3, 2])];
            g.add("the.node", Add, &x)
        }),
        ("[2, 3]", |g, t| {
            let x = [t(g, &[2, 3])];
            g.add("the.node", Add, &x)
        }),
        ("[2, 1, 1, 3] [1, 3]", |g, t| {
            let x = [t(g, &[2, 1, 1, 3]), t(g, &[1, 3])];
            g.add("the.node", AddPerChannel, &x)
        }),
        ("[6, 3] [2, 3]", |g, t| {
            let x = [t(g, &[6, 3]), t(g, &[2, 3])];
            g.add("the.node", AddPerChannel, &x)
        }),
        ("[2, 3] [3, 3]", |g, t| {
            let x = [t(g, &[2, 3]), t(g, &[3, 3])];
            g.add("the.node", Concat, &x)
        }),
        ("[2, 3]", |g, t| {
            let x = [t(g, &[2, 3])];
            g.add("the.node", Slice { from: 1, len: 3 }, &x)
        }),
        ("[1, 4, 4, 3] [3, 3, 4, 5] [5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 3]), t(g, &[3, 3, 4, 5]), t(g, &[5])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 2, 2, 3] [5, 5, 3, 5] [5]", |g, t| {
            let x = [t(g, &[1, 2, 2, 3]), t(g, &[5, 5, 3, 5]), t(g, &[5])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 4, 4, 3] [3, 3, 3, 5] [4]", |g, t| {
            let x = [t(g, &[1, 4, 4, 3]), t(g, &[3, 3, 3, 5]), t(g, &[4])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 4, 4, 3] [3, 3, 3, 5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 3]), t(g, &[3, 3, 3, 5])];
            g.add("the.node", Conv2d::new(0, 1), &x)
        }),
        ("[4, 3] [3, 3, 3, 5] [5]", |g, t| {
            let x = [t(g, &[4, 3]), t(g, &[3, 3, 3, 5]), t(g, &[5])];
            g.add("the.node", Conv2d::new(1, 1), &x)
        }),
        ("[1, 4, 4, 5] [4, 4, 3, 5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 5]), t(g, &[4, 4, 3, 5])];
            let op = Conv2dTranspose {
                stride: (2, 2),
                pad: (1, 1).into(),
                size: (9, 12),
                like: None,
                gradient: false,
                bias: false,
            };
            g.add("the.node", op, &x)
        }),
        ("[1, 4, 4, 6] [6] [6]", |g, t| {
            let x = [t(g, &[1, 4, 4, 6]), t(g, &[6]), t(g, &[6])];
            g.add("the.node", GroupNorm { groups: 4, eps: 1e-5, silu: true }, &x)
        }),
        ("[1, 4, 4, 6] [6] [5]", |g, t| {
            let x = [t(g, &[1, 4, 4, 6]), t(g, &[6]), t(g, &[5])];
            g.add("the.node", GroupNorm { groups: 2, eps: 1e-5, silu: true }, &x)
        }),
        ("[1, 4, 4, 15]", |g, t| {
            let x = [t(g, &[1, 4, 4, 15])];
            g.add("the.node", Attention { heads: 2, dropout: None }, &x)
        }),
        ("[2, 3] [2, 4]", |g, t| {
            let x = [t(g, &[2, 3]), t(g, &[2, 4])];
            g.add("the.node", Loss::Mse, &x)
        }),
    ];
    for (shapes, add) in bad {
        let mut g = Graph::new();
        let mut tensor = |g: &mut Graph, dims: &[usize]| g.input("x", Shape::new(dims));
        let error = add(&mut g, &mut tensor).expect_err("the shapes do not fit");
        let Error::Shape { node, operation, reason, .. } = &error else { panic!("{error}") };
        assert_eq!(node, "the.node");
        let text = error.to_string();
        let shapes = shapes.replace("] [", "], [");
        assert!(text.contains(*operation) && text.contains(&shapes) && !reason.is_empty(), "{text}");
        assert!(g.nodes().is_empty(), "{text}: the node was added");
    }
}

#[test]
fn wrong_lengths_and_missing_regions_are_reported_by_name() -> Result<()> {
    let mut g = Graph::new();
    let (x, p) = (g.input("image", [2, 3]), g.parameter("the.weight", [2, 3]));
    let y = g.add("y", Add, &[x, p])?;
    let options = PlanOptions { outputs: vec![y], ..PlanOptions::default() };
    let mut executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
    let error = executor.write(x, &[0.0; 5]).expect_err("too short").to_string();
    assert!(error.contains("image") && error.contains('5') && error.contains('6'), "{error}");
    let error = executor.read(y, &mut [0.0; 7]).expect_err("too long").to_string();
    assert!(error.contains('y') && error.contains('7'), "{error}");
    let error = executor.write_parameter(Region::Weights, 0, &[0.0; 1]).expect_err("too short").to_string();
    assert!(error.contains("the.weight"), "{error}");
    let error = executor.read_parameter(Region::Ema, 0, &mut [0.0; 6]).expect_err("no training").to_string();
    assert!(error.contains("Ema") && error.contains("training"), "{error}");
    let error = executor.update(&adam_step(1)).expect_err("no training").to_string();
    assert!(error.contains("training"), "{error}");
    let error = executor.gradient_norm().expect_err("no training").to_string();
    assert!(error.contains("training"), "{error}");
    assert!(executor.read_parameter(Region::Weights, 1, &mut [0.0; 6]).is_err(), "there is one parameter");
    Ok(())
}
