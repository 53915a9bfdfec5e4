//! Resampling and pooling.

use crate::{Rng, Within, magnitudes, unwritten, wide};
use ddpm_kernels::Isa;
use ddpm_kernels::pool::{max_pool_row, max_pool_row_backward};
use ddpm_kernels::reference;
use ddpm_kernels::resample::{Taps, resample_row};

/// Sums of a few products, in units of the sum of their absolute values.
const SUM: f64 = 4.0;

const CHANNELS: [usize; 9] = [1, 3, 4, 8, 15, 16, 17, 33, 64];

#[test]
fn resampling_and_its_transpose_agree_with_the_oracle() {
    let mut rng = Rng::new(70);
    let mut within = Within::new("resample", SUM);
    for make in [Taps::nearest_double, Taps::linear_double, Taps::mean_half] {
        for (h, w) in [(1, 1), (1, 4), (2, 3), (5, 4), (7, 7)] {
            for channels in CHANNELS {
                let (rows, columns) = (make(h), make(w));
                for (rows, columns) in [(rows.transposed(), columns.transposed()), (rows, columns)] {
                    let x = rng.vec(rows.inputs() * columns.inputs() * channels);
                    let want = reference::resample(&rows, &columns, channels, &wide(&x));
                    let size = reference::resample(&rows, &columns, channels, &magnitudes(&x));
                    for isa in Isa::all() {
                        let mut got = unwritten(want.len());
                        for (row, y) in got.chunks_mut((columns.outputs() * channels).max(1)).enumerate() {
                            resample_row(isa, &rows, &columns, channels, &x, row, y);
                        }
                        within.check(isa, &(h, w, channels), &got, &want, &size);
                    }
                }
            }
        }
    }
}

#[test]
fn weights_match_their_definitions() {
    let taps = |t: &Taps| (0..t.outputs()).map(|o| t.of(o).to_vec()).collect::<Vec<_>>();
    assert_eq!(taps(&Taps::nearest_double(2)), [[(0, 1.0)], [(0, 1.0)], [(1, 1.0)], [(1, 1.0)]]);
    assert_eq!(taps(&Taps::mean_half(5)), [[(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]]);
    // Corners stay in place: positions 0, 1/3, 2/3, 1.
    let linear = taps(&Taps::linear_double(2));
    assert_eq!((&linear[0][0], &linear[3]), (&(0, 1.0), &vec![(1, 1.0)]));
    assert!((linear[1][1].1 - 1.0 / 3.0).abs() < 1e-7 && (linear[2][1].1 - 2.0 / 3.0).abs() < 1e-7);
    for make in [Taps::nearest_double, Taps::linear_double] {
        for n in 1..9 {
            let t = make(n);
            assert_eq!((t.inputs(), t.outputs()), (n, 2 * n));
            for o in 0..2 * n {
                let sum: f32 = t.of(o).iter().map(|tap| tap.1).sum();
                assert!((sum - 1.0).abs() < 1e-6);
            }
            assert_eq!(t.transposed().transposed(), t);
        }
    }
}

#[test]
fn max_pool_routes_the_gradient_to_the_first_maximum() {
    let mut rng = Rng::new(71);
    for (h, w) in [(2, 2), (2, 5), (5, 2), (6, 8), (7, 3)] {
        for channels in CHANNELS {
            // Few distinct values, so that many blocks have ties.
            let x: Vec<f32> = rng.vec(h * w * channels).iter().map(|v| (v * 2.0).round()).collect();
            let (want, places) = reference::max_pool(h, w, channels, &wide(&x));
            let dy = rng.vec(want.len());
            let mut want_dx = vec![0.0; x.len()];
            for (at, dy) in places.iter().zip(&dy) {
                want_dx[*at] = *dy;
            }
            let row = w * channels;
            for isa in Isa::all() {
                let (mut y, mut dx) = (unwritten(want.len()), vec![0.0; x.len()]);
                for (i, y) in y.chunks_mut(w / 2 * channels).enumerate() {
                    let (top, bottom) = x[2 * i * row..][..2 * row].split_at(row);
                    max_pool_row(isa, channels, top, bottom, y);
                    let dx = &mut dx[2 * i * row..][..2 * row];
                    dx.fill(f32::NAN);
                    let (d_top, d_bottom) = dx.split_at_mut(row);
                    let dy = &dy[i * (w / 2) * channels..][..w / 2 * channels];
                    max_pool_row_backward(isa, channels, top, bottom, dy, d_top, d_bottom);
                }
                assert_eq!(wide(&y), want, "{isa}, {h}x{w}, {channels}");
                assert_eq!(dx, want_dx, "{isa}, {h}x{w}, {channels}");
            }
        }
    }
}

#[test]
fn max_pool_propagates_nan() {
    for isa in Isa::all() {
        for at in 0..4 {
            let mut x = [1.0, 3.0, 2.0, 0.0];
            x[at] = f32::NAN;
            let mut y = unwritten(1);
            y[0] = 0.0;
            max_pool_row(isa, 1, &x[..2], &x[2..], &mut y);
            assert!(y[0].is_nan(), "{isa}, {at}");
        }
    }
}
