//! The three passes of Winograd convolutions, 3x3 with stride 1 and 4x4 with stride 2.

use crate::conv::{Case, shape};
use crate::{Rng, Within, bits, magnitudes, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::conv::winograd::{Winograd, WinogradGrad};
use ddpm_kernels::conv::{ConvShape, Epilogue, MatmulDtype};

/// All cases here are 3x3 with stride 1, or 4x4 with stride 2 and enough channels.
const SUPPORTED: &str = "supported by Winograd";
/// The values at the points are larger than the result of their sums, so the error is in units of the largest
/// `sum |a| |b|` of the entire result, not of each element's own.
const PRODUCT: f64 = 16.0;
/// Error of results with 16-bit operands, in units of the typical value.
const FORWARD_16: f64 = 3e-3;

fn run(conv: &Winograd, x: &[f32], w: &[f32], epilogue: Epilogue<'_>) -> Vec<f32> {
    let mut out = unwritten(conv.output_len());
    conv.run(x, w, epilogue, &mut out, &mut unwritten(conv.shared_len().iter().sum()));
    out
}

fn run_forward(case: &Case, isa: Isa, rows: usize, panels: usize) -> Vec<f32> {
    let conv = Winograd::forward(isa, case.dtype, case.shape).expect(SUPPORTED).with_blocks(rows, panels);
    run(&conv, &case.x, &case.w, case.epilogue())
}

fn run_data_grad(case: &Case, isa: Isa, rows: usize, panels: usize) -> Vec<f32> {
    let conv = Winograd::data_grad(isa, case.dtype, case.shape).expect(SUPPORTED).with_blocks(rows, panels);
    let epilogue = Epilogue { bias: case.input_bias.as_deref(), ..Epilogue::default() };
    run(&conv, &case.dy, &case.w, epilogue)
}

fn run_weight_grad(case: &Case, isa: Isa, runs: usize, groups: usize) -> Vec<f32> {
    let conv = WinogradGrad::new(isa, case.dtype, case.shape).expect(SUPPORTED).with_blocks(runs, groups);
    // With a single block, in ranges of 16 or 32 channels, or all at once.
    let conv = conv.with_ranges(16 * (1 + case.shape.cin / 16 % 3));
    let (mut dw, mut db) = (unwritten(case.shape.weights()), unwritten(case.shape.cout));
    conv.run(&case.x, &case.dy, &mut dw, &mut db, &mut unwritten(conv.shared_len().iter().sum()));
    dw.extend(db);
    dw
}

/// Images around the edges of tiles, with every padding.
fn images(c: (usize, usize)) -> Vec<ConvShape> {
    let images = [
        (1, (1, 1), (1, 1)),
        (1, (1, 1), (2, 2)),
        (2, (3, 5), (1, 1)),
        (1, (4, 4), (1, 1)),
        (3, (5, 8), (1, 1)),
        (2, (8, 9), (2, 0)),
        (1, (6, 6), (0, 0)),
        (1, (11, 7), (0, 1)),
        (2, (13, 12), (1, 2)),
        (1, (28, 17), (1, 1)),
    ];
    images.map(|(n, input, pad)| shape(n, input, (3, 3), (1, 1), pad, c)).into()
}

/// The same for stride 2.
fn halved(c: (usize, usize)) -> Vec<ConvShape> {
    let images = [
        (1, (2, 2), (1, 1)),
        (1, (2, 2), (2, 2)),
        (2, (4, 6), (1, 1)),
        (1, (8, 8), (1, 1)),
        (3, (10, 16), (1, 1)),
        (2, (16, 18), (2, 0)),
        (1, (12, 12), (0, 0)),
        (1, (22, 14), (0, 1)),
        (2, (18, 24), (1, 2)),
        (1, (30, 34), (1, 1)),
    ];
    images.map(|(n, input, pad)| shape(n, input, (4, 4), (2, 2), pad, c)).into()
}

fn check(name: &'static str, cases: Vec<(Case, usize, usize)>) {
    let mut within = Within::new(name, PRODUCT);
    let largest = |x: Vec<f64>| vec![x.iter().copied().fold(0.0, f64::max); x.len()];
    for (case, rows, panels) in cases {
        let [y, dx, dw] = [case.forward(wide), case.data_grad(wide), case.weight_grad(wide)];
        let [y_mag, dx_mag, dw_mag] =
            [case.forward(magnitudes), case.data_grad(magnitudes), case.weight_grad(magnitudes)].map(largest);
        for isa in Isa::all() {
            let what = |pass: &'static str| (pass, case.shape, rows, panels);
            within.check(isa, &what("forward"), &run_forward(&case, isa, rows, panels), &y, &y_mag);
            within.check(isa, &what("data gradient"), &run_data_grad(&case, isa, rows, panels), &dx, &dx_mag);
            within.check(
                isa,
                &what("weight gradient"),
                &run_weight_grad(&case, isa, panels, 1 + rows % 3),
                &dw,
                &dw_mag,
            );
        }
    }
}

#[test]
fn every_image_and_number_of_channels_agrees_with_the_oracle() {
    let channels = [1, 3, 8, 15, 16, 17, 32, 33, 48, 64, 70];
    let mut rng = Rng::new(1);
    let mut cases = Vec::new();
    for (i, &cin) in channels.iter().enumerate() {
        for (g, shape) in images((cin, 1)).into_iter().enumerate() {
            let shape = ConvShape { cout: channels[(3 * i + g) % channels.len()], ..shape };
            cases.push((Case::new(&mut rng, shape, (i + g) % 8), usize::MAX, usize::MAX));
        }
    }
    for (i, cin) in [16, 32, 48].into_iter().enumerate() {
        for (g, shape) in halved((cin, 1)).into_iter().enumerate() {
            let shape = ConvShape { cout: channels[(4 * i + g) % channels.len()], ..shape };
            cases.push((Case::new(&mut rng, shape, (i + g) % 8), usize::MAX, usize::MAX));
        }
    }
    check("Winograd", cases);
}

#[test]
fn blocks_and_groups_agree_with_the_oracle() {
    let mut rng = Rng::new(2);
    let mut cases = Vec::new();
    for (rows, panels) in [(1, 1), (2, 1), (3, 2), (5, 3), (usize::MAX, 1), (usize::MAX, 2)] {
        for c in [(16, 80), (33, 17), (70, 65)] {
            let shape = shape(3, (10, 15), (3, 3), (1, 1), (1, 1), c);
            cases.push((Case::new(&mut rng, shape, 7), rows, panels));
        }
        for c in [(16, 80), (80, 17)] {
            let shape = shape(3, (20, 30), (4, 4), (2, 2), (1, 1), c);
            cases.push((Case::new(&mut rng, shape, 7), rows, panels));
        }
    }
    check("Winograd, blocks", cases);
}

/// RMS error and maximum error, in units of the RMS of the expected values.
fn errors(got: &[f32], want: &[f64]) -> (f64, f64) {
    let mean = |x: &mut dyn Iterator<Item = f64>| (x.map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
    let typical = mean(&mut want.iter().copied());
    let errors: Vec<f64> = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w) / typical).collect();
    (mean(&mut errors.iter().copied()), errors.iter().fold(0.0, |a: f64, e| a.max(e.abs())))
}

#[test]
fn bf16_error_is_a_small_part_of_the_typical_value() {
    // The values at the points are rounded: the error is 1.2e-2 for gradients with many channels, a sixth of
    // that for int16 results. A missing channel or tap would be 6e-2 or more.
    let mut rng = Rng::new(6);
    let mut worst = [0.0f64; 3];
    for (i, &cin) in [1, 15, 16, 17, 31, 32, 33, 48, 64, 65].iter().enumerate() {
        let halved = if cin % 16 == 0 { halved((cin, 1)) } else { Vec::new() };
        for (g, shape) in images((cin, 1)).into_iter().chain(halved).enumerate() {
            let shape = ConvShape { cout: [1, 8, 16, 33, 40][(i + g) % 5], ..shape };
            if shape.input.0 < 3 {
                continue; // too few values for a typical one
            }
            let case = Case::new(&mut rng, shape, 0).in_bf16();
            let (y, dx, dw) = (case.forward(wide), case.data_grad(wide), case.weight_grad(wide));
            for isa in Isa::all() {
                for (rows, panels) in [(usize::MAX, usize::MAX), (2, 1)] {
                    let passes = [
                        ("forward", run_forward(&case, isa, rows, panels), &y),
                        ("data gradient", run_data_grad(&case, isa, rows, panels), &dx),
                        ("weight gradient", run_weight_grad(&case, isa, panels, 1 + rows % 3), &dw),
                    ];
                    for ((pass, got, want), worst) in passes.into_iter().zip(&mut worst) {
                        let (rms, _) = errors(&got, want);
                        *worst = worst.max(rms);
                        let limit = if pass == "forward" { FORWARD_16 } else { 4e-2 };
                        assert!(rms < limit, "{pass} on {isa}: {rms:.2e}, {shape:?}, {rows}, {panels}");
                    }
                }
            }
        }
    }
    println!("Winograd, bf16: worst {worst:?}");
}

/// Approximately normal values.
fn normal(rng: &mut Rng, x: &mut [f32]) {
    let uniform: Vec<Vec<f32>> = (0..6).map(|_| rng.vec(x.len())).collect();
    x.iter_mut().enumerate().for_each(|(i, x)| *x = uniform.iter().map(|u| u[i]).sum());
}

#[test]
fn int16_is_as_accurate_as_direct_convolution_in_bf16() {
    let mut rng = Rng::new(8);
    for channels in [16, 128, 700] {
        let k3s1 = shape(1, (16, 16), (3, 3), (1, 1), (1, 1), (channels, 33));
        let k4s2 = shape(1, (16, 16), (4, 4), (2, 2), (1, 1), (channels / 16 * 16, 33));
        for shape in [k3s1, k4s2] {
            let mut case = Case { dtype: MatmulDtype::Bf16, ..Case::new(&mut rng, shape, 0) };
            normal(&mut rng, &mut case.x);
            normal(&mut rng, &mut case.w);
            // Inputs that follow an activation are mostly positive.
            case.x.iter_mut().for_each(|x| *x = x.max(0.1 * *x));
            let want = case.forward(wide);
            for isa in Isa::all() {
                let (rms, largest) = errors(&run_forward(&case, isa, 9, 9), &want);
                let (direct_rms, direct_largest) =
                    errors(&case.run_forward(isa, crate::conv::ALL_PIXELS), &want);
                println!(
                    "{:?} of {channels} on {isa}: {rms:.1e}, at most {largest:.1e}; direct in bf16: {direct_rms:.1e}, {direct_largest:.1e}",
                    shape.kernel
                );
                assert!(rms < direct_rms && largest < 1.5 * direct_largest, "{isa}, {channels}");
            }
        }
    }
}

#[test]
fn int16_sums_never_overflow() {
    // Sums as large as possible: an overflow of 32 bits would change the sign.
    let mut rng = Rng::new(9);
    for (channels, signs) in [(16, 0), (64, 0), (300, 0), (300, 1), (300, 2)] {
        for stride in [1, 2] {
            let shape = match stride {
                1 => shape(2, (9, 9), (3, 3), (1, 1), (1, 1), (channels, 20)),
                _ => shape(2, (18, 18), (4, 4), (2, 2), (1, 1), (channels / 16 * 16, 20)),
            };
            for (x, w) in [(1.0, 1.0), (1e-20, 3e19), (3e-30, 2e5), (1e25, 1e-30)] {
                let mut case = Case { dtype: MatmulDtype::Bf16, ..Case::new(&mut rng, shape, 0) };
                // Constant; every other channel negative in both; or random signs with weights in only one
                // channel.
                let sign =
                    |i: usize, channels: usize| if signs == 1 && i % channels % 2 == 1 { -1.0 } else { 1.0 };
                for (i, v) in case.x.iter_mut().enumerate() {
                    *v = sign(i, shape.cin) * x * if signs == 2 { v.signum() } else { 1.0 };
                }
                for (i, v) in case.w.iter_mut().enumerate() {
                    let channel = i / shape.cout % shape.cin;
                    let there = signs != 2 || channel == 5;
                    *v = if there { sign(channel, shape.cin) * w } else { 0.0 };
                }
                let want = case.forward(wide);
                for isa in Isa::all() {
                    let (rms, largest) = errors(&run_forward(&case, isa, 9, 9), &want);
                    let at = format!("{isa}: {rms:.1e}, {largest:.1e}, {channels}, {signs}, {stride}, {x:e}");
                    assert!(rms < FORWARD_16 && largest < 5e-2, "{at}");
                }
            }
        }
    }
}

#[test]
fn typical_error_is_as_documented() {
    // Normal weights and images; the error against f64 in units of the typical output.
    let mut rng = Rng::new(3);
    let k3s1 = shape(1, (16, 16), (3, 3), (1, 1), (1, 1), (128, 64));
    let k4s2 = shape(1, (16, 16), (4, 4), (2, 2), (1, 1), (128, 64));
    for shape in [k3s1, k4s2] {
        typical_error(Case::new(&mut rng, shape, 0), &mut rng);
    }
}

fn typical_error(mut case: Case, rng: &mut Rng) {
    for x in [&mut case.x, &mut case.w, &mut case.dy] {
        normal(rng, x);
    }
    for isa in Isa::all() {
        for (name, got, want) in [
            ("forward", run_forward(&case, isa, 9, 9), case.forward(wide)),
            ("data gradient", run_data_grad(&case, isa, 9, 9), case.data_grad(wide)),
            ("weight gradient", run_weight_grad(&case, isa, 9, 2), case.weight_grad(wide)),
        ] {
            let (rms, largest) = errors(&got, &want);
            println!(
                "Winograd {:?} {name} on {isa}: error {rms:.2e} of the typical value, at most {largest:.2e}",
                case.shape.kernel
            );
            assert!(rms < 2e-6 && largest < 1.5e-5, "{name} on {isa}: {rms:.2e}, {largest:.2e}");
        }
    }
}

#[test]
fn blocks_are_bit_exact() {
    let mut rng = Rng::new(4);
    let k3s1 = shape(2, (14, 13), (3, 3), (1, 1), (1, 1), (24, 40));
    let k4s2 = shape(2, (28, 26), (4, 4), (2, 2), (1, 1), (32, 40));
    for (shape, isa) in [k3s1, k4s2].into_iter().flat_map(|s| Isa::all().into_iter().map(move |isa| (s, isa)))
    {
        for dtype in [MatmulDtype::F32, MatmulDtype::Bf16] {
            let case = Case { dtype, ..Case::new(&mut rng, shape, 7) };
            let (y, dx) = (run_forward(&case, isa, 99, 99), run_data_grad(&case, isa, 99, 99));
            for (rows, panels) in [(1, 1), (3, 1), (99, 1), (99, 2)] {
                assert_eq!(bits(&run_forward(&case, isa, rows, panels)), bits(&y), "{isa}");
                assert_eq!(bits(&run_data_grad(&case, isa, rows, panels)), bits(&dx), "{isa}");
            }
            let dx_epilogue = Epilogue { bias: case.input_bias.as_deref(), ..Epilogue::default() };
            for rows in [1, 3, 99] {
                let conv =
                    Winograd::forward(isa, case.dtype, shape).expect(SUPPORTED).with_per_thread_blocks(rows);
                assert_eq!(bits(&run(&conv, &case.x, &case.w, case.epilogue())), bits(&y), "{isa}");
                let conv = Winograd::data_grad(isa, case.dtype, shape)
                    .expect(SUPPORTED)
                    .with_per_thread_blocks(rows);
                assert_eq!(bits(&run(&conv, &case.dy, &case.w, dx_epilogue)), bits(&dx), "{isa}");
            }
        }
    }
}

#[test]
fn per_thread_panels_are_bit_exact() {
    let mut rng = Rng::new(6);
    // Channels that make several parts of k, one, and less than one; more and fewer panels than are computed
    // together; one, two, three and more tiles.
    for (channels, n, size) in
        [((304, 40), 2, 7), ((16, 70), 2, 9), ((64, 16), 2, 4), ((48, 290), 1, 4), ((33, 40), 3, 4)]
    {
        let k3s1 = shape(n, (size, size), (3, 3), (1, 1), (1, 1), channels);
        let channels = (channels.0 / 16 * 16, channels.1);
        let k4s2 = shape(n, (2 * size, 2 * size), (4, 4), (2, 2), (1, 1), channels);
        for (shape, isa) in
            [k3s1, k4s2].into_iter().flat_map(|s| Isa::all().into_iter().map(move |isa| (s, isa)))
        {
            for dtype in [MatmulDtype::F32, MatmulDtype::Bf16] {
                let case = Case { dtype, ..Case::new(&mut rng, shape, 7) };
                let (y, dx) = (run_forward(&case, isa, 99, 99), run_data_grad(&case, isa, 99, 99));
                let conv =
                    Winograd::forward(isa, case.dtype, shape).expect(SUPPORTED).with_per_thread_panels();
                assert_eq!(bits(&run(&conv, &case.x, &case.w, case.epilogue())), bits(&y), "{isa}");
                let conv =
                    Winograd::data_grad(isa, case.dtype, shape).expect(SUPPORTED).with_per_thread_panels();
                let epilogue = Epilogue { bias: case.input_bias.as_deref(), ..Epilogue::default() };
                assert_eq!(bits(&run(&conv, &case.dy, &case.w, epilogue)), bits(&dx), "{isa}");
            }
        }
    }
}

#[test]
fn nan_propagates_to_dependents() {
    // And more: the entire tile, because all outputs of a tile come from the same values.
    let mut rng = Rng::new(5);
    let k3s1 = shape(2, (9, 7), (3, 3), (1, 1), (1, 1), (17, 33));
    let k4s2 = shape(2, (18, 14), (4, 4), (2, 2), (1, 1), (16, 33));
    for (shape, isa) in [k3s1, k4s2].into_iter().flat_map(|s| Isa::all().into_iter().map(move |isa| (s, isa)))
    {
        for (dtype, wrong) in
            [(MatmulDtype::F32, f32::NAN), (MatmulDtype::Bf16, f32::NAN), (MatmulDtype::Bf16, f32::INFINITY)]
        {
            let mut case = Case { dtype, ..Case::new(&mut rng, shape, 0) };
            let at = rng.below(case.x.len());
            case.x[at] = wrong;
            let lost = |x: Vec<f64>| x.iter().map(|v| !v.is_finite()).collect::<Vec<_>>();
            let want = lost(case.forward(wide));
            let got = lost(wide(&run_forward(&case, isa, 9, 9)));
            assert!(want.iter().zip(&got).all(|(w, g)| !w || *g), "{isa}: a {wrong} was lost");
            let image = got.len() / 2;
            let other = if at < case.x.len() / 2 { &got[image..] } else { &got[..image] };
            assert!(other.iter().all(|nan| !nan), "{isa}: a {wrong} went to another image");
            let mut case = Case { dtype, ..Case::new(&mut rng, shape, 0) };
            let column = rng.below(shape.cout);
            case.w[column] = wrong;
            let got = lost(wide(&run_forward(&case, isa, 9, 9)));
            let all = got.iter().skip(column).step_by(shape.cout).all(|lost| *lost);
            assert!(all, "{isa}: a {wrong} among the weights was lost");
        }
    }
}
