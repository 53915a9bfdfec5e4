//! Dropout masks: identical on every instruction set and for every split, with the expected mean and
//! variance.

use crate::attention::{
    result_magnitudes, run_backward, run_backward_in_ranges, run_forward, score_magnitude, unit_of,
};
use crate::{Rng, Within, bits, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::attention::Saved;
use ddpm_kernels::conv::MatmulDtype;
use ddpm_kernels::random::{Dropout, dropout};
use ddpm_kernels::reference::{self, AttentionShape};

#[test]
fn masks_are_identical_on_every_isa() {
    let mut rng = Rng::new(90);
    let masks = Dropout::new(0.3, [5, 6, 7], [8, 9]).image(2);
    for n in (1..70).chain([127, 128, 129, 1000]) {
        let x = rng.vec(n);
        let want: Vec<f32> = x.iter().enumerate().map(|(i, x)| x * masks.factor(i)).collect();
        for isa in Isa::all() {
            let mut got = x.clone();
            dropout(isa, masks, 0, &mut got);
            assert_eq!(bits(&got), bits(&want), "{n} on {isa}");
            if n > 128 {
                let mut parts = x.clone();
                dropout(isa, masks, 0, &mut parts[..128]);
                dropout(isa, masks, 128, &mut parts[128..]);
                assert_eq!(bits(&parts), bits(&want), "{n} on {isa}, in parts");
            }
        }
    }
    let other = [masks.image(1), Dropout::new(0.3, [7, 6, 8], [8, 9]), Dropout::new(0.3, [7, 6, 7], [8, 8])];
    for other in other {
        assert!((0..64).any(|i| other.factor(i) != masks.factor(i)), "another image, purpose or seed");
    }
}

/// Ones dropped with p and scaled have mean 1 and variance `p / (1 - p)`. Over n elements the mean's standard
/// error is `sqrt(p / (1 - p) / n)`; five of them are allowed.
#[test]
fn mean_and_variance_are_as_expected() {
    let n = 1 << 18;
    for p in [0.1, 0.2, 0.5, 0.9] {
        let mut y = vec![1.0; n];
        dropout(Isa::all()[0], Dropout::new(p, [0, 0, 9], [1, 2]), 0, &mut y);
        let mean = y.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
        let variance = y.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
        let expected = p / (1.0 - p);
        assert!((mean - 1.0).abs() < 5.0 * (expected / n as f64).sqrt(), "p = {p}: mean {mean}");
        assert!((variance / expected - 1.0).abs() < 0.03, "p = {p}: variance {variance}, not {expected}");
        let masks = Dropout::new(p, [0, 0, 9], [1, 2]);
        let dropped = |head: usize, key: usize| {
            (0..4096).filter(|&query| masks.weight_factor(head, 4096, query, key) == 0.0).count() as f64
                / 4096.0
        };
        for (head, key) in [(0, 0), (1, 3), (3, 4095)] {
            let spread = 5.0 * (p * (1.0 - p) / 4096.0).sqrt();
            assert!((dropped(head, key) - p).abs() < spread, "p = {p}: {} dropped", dropped(head, key));
        }
    }
}

/// In the units of the attention tests without dropout, with the masks in the formulas.
#[test]
fn attention_with_dropout_agrees_with_the_oracle() {
    let mut rng = Rng::new(91);
    for (dtype, bound_of_gradients) in [(MatmulDtype::F32, 8.0), (MatmulDtype::Bf16, 4.0)] {
        let mut o_within = Within::new("attention with dropout, o", 4.0);
        let mut d_within = Within::new("attention with dropout, dqkv", bound_of_gradients);
        for (tokens, heads, width) in
            [(1, 2, 4), (15, 1, 3), (17, 2, 8), (33, 3, 4), (97, 2, 16), (130, 1, 33), (131, 2, 5)]
        {
            let shape = AttentionShape { tokens, channels: heads * width, heads };
            let qkv = rng.vec(tokens * 3 * shape.channels);
            let d_o = rng.vec(tokens * shape.channels);
            let masks = Dropout::new(0.25, [3, 1, 4], [1, 5]);
            let factor = |head: usize, query: usize, key: usize| {
                f64::from(masks.weight_factor(head, tokens, query, key))
            };
            let (o, _) = reference::attention(shape, &wide(&qkv), &factor);
            let dqkv = reference::attention_backward(shape, &wide(&qkv), &wide(&d_o), &factor);
            let (mut o_mag, mut d_mag) = result_magnitudes(shape, &qkv, &d_o, &factor);
            let unit = unit_of(dtype) * (1.0 + score_magnitude(shape, &qkv));
            o_mag.iter_mut().chain(&mut d_mag).for_each(|m| *m = unit * m.max(1e-9));
            for isa in Isa::all() {
                let (got, lse) = run_forward(isa, dtype, shape, &qkv, Some(masks), tokens);
                o_within.check(isa, &(dtype, shape), &got, &o, &o_mag);
                let saved = Saved { qkv: &qkv, o: &got, lse: &lse, d_o: &d_o, dropout: Some(masks) };
                let whole = run_backward(isa, dtype, shape, &saved);
                d_within.check(isa, &(dtype, shape), &whole, &dqkv, &d_mag);
                // A range of keys uses the masks of its own keys, not those of the first keys.
                for ranges in 1..=3 {
                    let got = run_backward_in_ranges(isa, dtype, shape, &saved, ranges, 40);
                    if ranges == 1 {
                        assert_eq!(bits(&got), bits(&whole), "{isa}, {dtype:?}, {shape:?}");
                    }
                    d_within.check(isa, &(dtype, shape, ranges), &got, &dqkv, &d_mag);
                }
            }
        }
    }
}
