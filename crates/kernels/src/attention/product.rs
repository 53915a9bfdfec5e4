//! The products of a tile with a strided operand, and the loops over rows of results.

use crate::tile::Acc;
use pulp::Simd;

/// The first `NV` vectors of a slice.
#[inline(always)]
pub(super) fn row<S: Simd, const NV: usize>(x: &[S::f32s]) -> [S::f32s; NV] {
    let mut row = [x[0]; NV];
    row.copy_from_slice(&x[..NV]);
    row
}

/// `MR` rows of `NV` vectors, `stride` vectors apart.
#[inline(always)]
pub(super) fn load<S: Simd, const MR: usize, const NV: usize>(
    x: &[S::f32s],
    stride: usize,
) -> Acc<S, MR, NV> {
    // One check for all rows.
    let x = &x[..(MR - 1) * stride + NV];
    let mut acc = [[x[0]; NV]; MR];
    for r in 0..MR {
        acc[r] = row::<S, NV>(&x[r * stride..]);
    }
    acc
}

/// The counterpart of [`load`].
#[inline(always)]
pub(super) fn store<S: Simd, const MR: usize, const NV: usize>(
    acc: &Acc<S, MR, NV>,
    x: &mut [S::f32s],
    stride: usize,
) {
    let x = &mut x[..(MR - 1) * stride + NV];
    for r in 0..MR {
        x[r * stride..][..NV].copy_from_slice(&acc[r]);
    }
}

/// `acc[r] += sum over d of a[r][d] b[d]` with A's rows of D numbers one behind the other; all of B is in registers.
#[inline(always)]
pub(super) fn short_rows<S: Simd, const MR: usize, const NV: usize, const D: usize>(
    s: S,
    a: &[f32],
    b: &Acc<S, D, NV>,
    acc: &mut Acc<S, MR, NV>,
) {
    let a = &a[..MR * D];
    for d in 0..D {
        for r in 0..MR {
            let x = s.splat_f32s(a[r * D + d]);
            for v in 0..NV {
                acc[r][v] = s.mul_add_e_f32s(x, b[d][v], acc[r][v]);
            }
        }
    }
}

/// `acc[r] += sum over k of a[k][r] b[k]` with rows of A `a_stride` numbers apart, of B `b_stride` vectors.
#[inline(always)]
pub(super) fn columns<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    a: &[f32],
    a_stride: usize,
    b: &[S::f32s],
    b_stride: usize,
    count: usize,
    acc: &mut Acc<S, MR, NV>,
) {
    for (a, b) in a.chunks(a_stride).zip(b.chunks(b_stride)).take(count) {
        let (a, b) = (&a[..MR], row::<S, NV>(b));
        for r in 0..MR {
            let x = s.splat_f32s(a[r]);
            for v in 0..NV {
                acc[r][v] = s.mul_add_e_f32s(x, b[v], acc[r][v]);
            }
        }
    }
}

/// Calls `$f::<S, rows, NV>($i, ..)` for the rows `$i` of `$count`: so many at a time that the tile fills the registers,
/// then the rest with ever smaller tiles.
macro_rules! in_rows {
    ($s:ident, [$($size:tt),+], $count:expr, $most:expr, $f:ident($i:ident $(, $arg:expr)* $(,)?)) => {{
        let mut $i = 0;
        let count = $count;
        if $most >= 8 {
            while $i + 8 <= count {
                $f::<$s, 8, $($size),+>($($arg),*);
                $i += 8;
            }
        }
        if $most >= 4 {
            while $i + 4 <= count {
                $f::<$s, 4, $($size),+>($($arg),*);
                $i += 4;
            }
        }
        if $most == 2 {
            while $i + 2 <= count {
                $f::<$s, 2, $($size),+>($($arg),*);
                $i += 2;
            }
        }
        while $i < count {
            $f::<$s, 1, $($size),+>($($arg),*);
            $i += 1;
        }
    }};
}
pub(super) use in_rows;
