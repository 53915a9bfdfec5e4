//! Convolutions, their transposes; asymmetric padding, and attention with dropout.

use super::{Case, check};
use ddpm_engine::ops::*;

#[test]
fn convolutions() {
    let cases: [Case; 12] = [
        ("conv 3x3", |b| {
            let x = b.p([2, 5, 7, 3]);
            b.conv(x, (3, 3), 5, 1, 1)
        }),
        ("conv 3x3, stride 2", |b| {
            let x = b.p([2, 6, 7, 3]);
            b.conv(x, (3, 3), 4, 2, 1)
        }),
        ("conv 4x4, stride 2, 17 to 33 channels", |b| {
            let x = b.p([1, 6, 4, 17]);
            b.conv(x, (4, 4), 33, 2, 1)
        }),
        ("conv 5x3, stride 2x1, no bias", |b| {
            let (x, w) = (b.p([1, 7, 6, 2]), b.p([5, 3, 2, 3]));
            b.add(Conv2d { stride: (2, 1), pad: (2, 1).into(), ..Conv2d::default() }, &[x, w])
        }),
        ("conv 1x1, stride 2: phases without taps", |b| {
            let x = b.p([2, 5, 4, 3]);
            b.conv(x, (1, 1), 2, 2, 0)
        }),
        ("conv 3x3, stride 2, no padding: a column is not read", |b| {
            let x = b.p([1, 6, 5, 2]);
            b.conv(x, (3, 3), 3, 2, 0)
        }),
        ("conv with everything", |b| {
            let (x, w, bias) = (b.p([3, 3, 4, 2]), b.p([3, 3, 2, 7]), b.p([7]));
            let (image, residual) = (b.p([3, 7]), b.p([3, 3, 4, 7]));
            let op = Conv2d { per_image_bias: true, residual: true, ..Conv2d::new(1, 1) };
            b.add(op, &[x, w, bias, image, residual])
        }),
        ("conv with per-image bias only", |b| {
            let (x, w, image) = (b.p([2, 3, 4, 2]), b.p([1, 1, 2, 3]), b.p([2, 3]));
            let op = Conv2d { bias: false, per_image_bias: true, ..Conv2d::new(1, 0) };
            b.add(op, &[x, w, image])
        }),
        ("conv whose residual is its own input", |b| {
            let (x, w) = (b.p([2, 3, 4, 5]), b.p([3, 3, 5, 5]));
            let x = b.add(Activate(Activation::Silu), &[x]);
            b.add(Conv2d { bias: false, residual: true, ..Conv2d::new(1, 1) }, &[x, w, x])
        }),
        ("conv of an input", |b| {
            let x = b.input([2, 5, 5, 3]);
            b.conv(x, (3, 3), 4, 1, 1)
        }),
        ("linear", |b| {
            let (x, w, bias) = (b.p([7, 5]), b.p([1, 1, 5, 9]), b.p([9]));
            b.add(Conv2d::linear(), &[x, w, bias])
        }),
        ("linear, three dimensions", |b| {
            let (x, w, bias) = (b.p([2, 3, 4]), b.p([1, 1, 4, 3]), b.p([3]));
            b.add(Conv2d::linear(), &[x, w, bias])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn transposed_convolutions() {
    let cases: [Case; 5] = [
        ("transposed conv 4x4, stride 2", |b| {
            let (x, w, bias) = (b.p([2, 3, 4, 5]), b.p([4, 4, 3, 5]), b.p([3]));
            let op = Conv2dTranspose {
                stride: (2, 2),
                pad: (1, 1).into(),
                size: (6, 8),
                like: None,
                gradient: false,
                bias: true,
            };
            b.add(op, &[x, w, bias])
        }),
        ("transposed conv 3x3, stride 2, no bias", |b| {
            let (x, w) = (b.p([1, 3, 2, 2]), b.p([3, 3, 4, 2]));
            let op = Conv2dTranspose {
                stride: (2, 2),
                pad: (1, 1).into(),
                size: (6, 3),
                like: None,
                gradient: false,
                bias: false,
            };
            b.add(op, &[x, w])
        }),
        ("transposed conv 5x3, stride 2x1", |b| {
            let (x, w, bias) = (b.p([1, 4, 6, 3]), b.p([5, 3, 2, 3]), b.p([2]));
            let op = Conv2dTranspose {
                stride: (2, 1),
                pad: (2, 1).into(),
                size: (7, 6),
                like: None,
                gradient: false,
                bias: true,
            };
            b.add(op, &[x, w, bias])
        }),
        ("transposed conv 1x1, stride 2: most pixels are the bias", |b| {
            let (x, w, bias) = (b.p([1, 2, 3, 3]), b.p([1, 1, 2, 3]), b.p([2]));
            let op = Conv2dTranspose {
                stride: (2, 2),
                pad: (0, 0).into(),
                size: (4, 5),
                like: None,
                gradient: false,
                bias: true,
            };
            b.add(op, &[x, w, bias])
        }),
        ("transposed conv of an input", |b| {
            let (x, w, bias) = (b.input([2, 2, 2, 3]), b.p([4, 4, 2, 3]), b.p([2]));
            let op = Conv2dTranspose {
                stride: (2, 2),
                pad: (1, 1).into(),
                size: (4, 4),
                like: None,
                gradient: false,
                bias: true,
            };
            b.add(op, &[x, w, bias])
        }),
    ];
    for case in cases {
        check(case);
    }
}

#[test]
fn asymmetric_padding_and_attention_with_dropout() {
    let cases: [Case; 3] = [
        ("padding below and right only", |b| {
            let (x, w) = (b.p([2, 6, 5, 3]), b.p([3, 3, 3, 4]));
            let pad = Padding { before: (0, 0), after: (1, 1) };
            b.add(Conv2d { stride: (2, 2), pad, ..Conv2d::default() }, &[x, w])
        }),
        ("attention with dropout", |b| {
            let qkv = b.p([2, 3, 5, 24]);
            b.add(Attention { heads: 2, dropout: Some(Dropout { p: 0.2, site: 3 }) }, &[qkv])
        }),
        ("attention with dropout over several blocks of keys", |b| {
            let qkv = b.p([2, 10, 13, 12]);
            b.add(Attention { heads: 1, dropout: Some(Dropout { p: 0.5, site: 3 }) }, &[qkv])
        }),
    ];
    for case in cases {
        check(case);
    }
}
