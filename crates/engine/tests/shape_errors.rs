//! Operands that do not fit are rejected when a node is added.
#![allow(missing_docs, reason = "tests")]

use ddpm_engine::ops::{
    Add, AddPerChannel, Attention, Concat, Conv2d, Conv2dTranspose, GroupNorm, Loss, Slice,
};
use ddpm_engine::{Error, Graph, Result, Shape, Tensor};

/// The operands' shapes, as errors print them, and a node that does not accept them.
type Bad = (&'static str, fn(&mut Graph, &mut dyn FnMut(&mut Graph, &[usize]) -> Tensor) -> Result<Tensor>);

const BAD: [Bad; 16] = [
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

#[test]
fn shape_errors_name_the_node_the_operation_and_the_shapes() {
    for (shapes, add) in BAD {
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
