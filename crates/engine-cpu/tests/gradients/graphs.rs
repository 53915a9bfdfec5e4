//! Graphs of several operations, as networks have them.

use super::{Case, check};
use ddpm_engine::ops::*;
use std::sync::Arc;

#[test]
fn composite_graphs() {
    let cases: [Case; 5] = [
        ("a parameter used by two convolutions", |b| {
            let (x, w) = (b.p([1, 4, 3, 5]), b.p([3, 3, 5, 5]));
            let op = Conv2d { bias: false, ..Conv2d::new(1, 1) };
            let y = b.add(op.clone(), &[x, w]);
            let y = b.add(Activate(Activation::Silu), &[y]);
            b.add(op, &[y, w])
        }),
        ("a tensor read by four operations", |b| {
            let x = b.p([2, 3, 3, 4]);
            let x = b.norm(x, 2, true);
            let a = b.conv(x, (3, 3), 4, 1, 1);
            let c = b.add(Activate(Activation::Silu), &[x]);
            let d = b.add(Add, &[a, x]);
            let e = b.add(Concat, &[d, c]);
            b.conv(e, (1, 1), 3, 1, 0)
        }),
        ("a residual block with a time embedding", |b| {
            let (x, t) = (b.p([2, 4, 4, 6]), b.input([2]));
            let e = b.add(SinusoidalEmbedding { dim: 8, shift: 0.0, cosines_first: false }, &[t]);
            let e = b.conv(e, (1, 1), 12, 1, 0);
            let e = b.add(Activate(Activation::Silu), &[e]);
            let e = b.conv(e, (1, 1), 10, 1, 0);
            let h = b.norm(x, 3, true);
            let (w, bias) = (b.p([3, 3, 6, 10]), b.p([10]));
            let h = b.add(Conv2d { per_image_bias: true, ..Conv2d::new(1, 1) }, &[h, w, bias, e]);
            let h = b.norm(h, 5, true);
            let skip = b.conv(x, (1, 1), 10, 1, 0);
            let (w, bias) = (b.p([3, 3, 10, 10]), b.p([10]));
            b.add(Conv2d { residual: true, ..Conv2d::new(1, 1) }, &[h, w, bias, skip])
        }),
        ("an attention block", |b| {
            let x = b.p([2, 3, 4, 6]);
            let h = b.norm(x, 2, false);
            let qkv = b.conv(h, (1, 1), 18, 1, 0);
            let o = b.add(Attention { heads: 2, dropout: None }, &[qkv]);
            let (w, bias) = (b.p([1, 1, 6, 6]), b.p([6]));
            b.add(Conv2d { residual: true, ..Conv2d::linear() }, &[o, w, bias, x])
        }),
        ("a small U-Net on a diffused image", |b| {
            let (x0, eps, t) = (b.input([2, 4, 6, 3]), b.input([2, 4, 6, 3]), b.input([2]));
            let table = |f: fn(f32) -> f32| (0..20).map(|t| f(1.0 - t as f32 / 20.0)).collect::<Arc<[f32]>>();
            let q = QSample {
                sqrt_alpha_bar: table(f32::sqrt),
                sqrt_one_minus_alpha_bar: table(|a| (1.0 - a).sqrt()),
            };
            let x = b.add(q, &[x0, eps, t]);
            let x = b.conv(x, (3, 3), 6, 1, 1);
            let e = b.add(SinusoidalEmbedding { dim: 4, shift: 0.0, cosines_first: false }, &[t]);
            let e = b.conv(e, (1, 1), 6, 1, 0);
            let x = b.add(AddPerChannel, &[x, e]);
            let down = b.conv(x, (3, 3), 8, 2, 1);
            let down = b.norm(down, 2, true);
            let (w, bias) = (b.p([4, 4, 6, 8]), b.p([6]));
            let up = Conv2dTranspose::new(2, (1, 1), (4, 6));
            let up = b.add(up, &[down, w, bias]);
            let x = b.add(Concat, &[up, x]);
            let x = b.norm(x, 4, true);
            b.conv(x, (3, 3), 3, 1, 1)
        }),
    ];
    for case in cases {
        check(case);
    }
}
