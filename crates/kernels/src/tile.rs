//! Register tiles of matrix products: the inner loops of everything expensive.
//!
//! A tile holds `MR` rows of `NV` vectors of C in registers and iterates along `k`:
//!
//! ```text
//! for k:  b[0..NV] = vectors of B's row k
//!         for r in 0..MR:  c[r][..] += splat(a[r, k]) * b[..]
//! ```
//!
//! B comes in panels `[k][NV vectors]`. A comes in one of these panel layouts, all read sequentially with
//! constant strides, so that one base register addresses all rows:
//!
//! - *blocked*, `[k / 16][MR][16]`: packed from rows that are contiguous along k (the channels of pixels) by
//!   copying runs of 16;
//! - *columns*, `[k][MR]`: packed from rows that are contiguous along MR (the weight gradient's channels), or
//!   runs `[k][16]` of which `MR` are used (Winograd's weight gradient).

use pulp::Simd;

/// Length along `k` that packing copies at once into a blocked A panel.
pub const K_RUN: usize = 16;

/// Rows and vectors of a register tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// Rows of C.
    pub mr: usize,
    /// Vectors of C in each row.
    pub nv: usize,
}

impl TileShape {
    /// The shape for `n` columns and vectors of `lanes` elements: among the shapes that fit the register
    /// file, the one that pads `n` least, and of those the widest.
    pub fn pick(lanes: usize, n: usize) -> Self {
        let shapes: &[(usize, usize)] = match lanes {
            16 => &[(8, 2), (16, 1)],
            8 => &[(6, 2), (12, 1)],
            4 => &[(8, 2)],
            _ => &[(4, 8)],
        };
        let padded = |nv: usize| n.div_ceil(nv * lanes) * nv * lanes;
        let (mr, nv) =
            shapes.iter().copied().min_by_key(|&(_, nv)| padded(nv)).expect("every list has a shape");
        Self { mr, nv }
    }

    /// The shape for `n` columns and at most 4 rows.
    pub fn pick_few_rows(lanes: usize, n: usize, rows: usize) -> Self {
        match (lanes, Self::pick(lanes, n)) {
            (16, Self { nv: 2, .. }) => Self { mr: if rows > 2 { 4 } else { 2 }, nv: 2 },
            (_, shape) => shape,
        }
    }

    /// The shape for A in column runs of [`K_RUN`], a multiple of its rows. Few vectors, since such products
    /// read many panels from the L2 cache.
    pub fn for_runs(lanes: usize) -> Self {
        let (mr, nv) = match lanes {
            16 => (16, 1),
            8 => (4, 2),
            4 => (8, 2),
            _ => (4, 8),
        };
        Self { mr, nv }
    }
}

/// Calls `$f::<S, MR, NV>($args)` with the constants of a [`TileShape`].
macro_rules! with_tile {
    ($shape:expr, $f:ident::<$s:ident>($($arg:expr),* $(,)?)) => {
        match ($shape.mr, $shape.nv) {
            (8, 2) => $f::<$s, 8, 2>($($arg),*),
            (16, 1) => $f::<$s, 16, 1>($($arg),*),
            (6, 2) => $f::<$s, 6, 2>($($arg),*),
            (12, 1) => $f::<$s, 12, 1>($($arg),*),
            (4, 2) => $f::<$s, 4, 2>($($arg),*),
            (2, 2) => $f::<$s, 2, 2>($($arg),*),
            (4, 8) => $f::<$s, 4, 8>($($arg),*),
            other => unreachable!("no tile {other:?}"),
        }
    };
}
pub(crate) use with_tile;

/// The accumulators of a tile.
pub type Acc<S, const MR: usize, const NV: usize> = [[<S as Simd>::f32s; NV]; MR];

/// Accumulators at zero.
#[inline(always)]
pub fn zero<S: Simd, const MR: usize, const NV: usize>(s: S) -> Acc<S, MR, NV> {
    [[s.splat_f32s(0.0); NV]; MR]
}

/// The first `NV` vectors of a slice.
#[inline(always)]
pub fn vectors<S: Simd, const NV: usize>(b: &[S::f32s]) -> [S::f32s; NV] {
    let mut row = [b[0]; NV];
    row.copy_from_slice(&b[..NV]);
    row
}

/// How words of A and B panels are packed and multiplied. A separate type for each variant, because the
/// compiler keeps accumulators in registers only if nothing else in the same function takes their address.
pub trait DotKernel: Copy {
    /// Elements a word.
    const ELEMS_PER_WORD: usize;

    /// `acc += a b` for a word of A and a row of B.
    #[inline(always)]
    fn multiply<S: Simd, const NV: usize>(self, s: S, a: f32, b: [S::f32s; NV], acc: &mut [S::f32s; NV]) {
        self.multiply_vectors(s, s.splat_f32s(a), b, acc);
    }

    /// `acc += a b` lane by lane, for a vector of words of A.
    fn multiply_vectors<S: Simd, const NV: usize>(
        self,
        s: S,
        a: S::f32s,
        b: [S::f32s; NV],
        acc: &mut [S::f32s; NV],
    );

    /// Packs two neighbouring rows lane by lane if a word has two elements; else returns the first.
    fn pair<S: Simd>(self, s: S, even: S::f32s, odd: S::f32s) -> S::f32s;

    /// Whether words are pairs of int16 and accumulators hold i32, whatever their Rust type says.
    const IS_INT: bool = false;

    /// Converts accumulators to f32.
    #[inline(always)]
    fn sums<S: Simd>(self, _: S, acc: S::f32s) -> S::f32s {
        acc
    }
}

/// Packing of elements that are contiguous.
pub trait PackLanes: DotKernel {
    /// Packs neighbouring lanes of two vectors if a word has two elements; else returns the first vector.
    fn pair_vectors<S: Simd>(self, s: S, first: S::f32s, second: S::f32s) -> S::f32s;

    /// Packs neighbouring lanes.
    fn pair_lanes<S: Simd>(self, s: S, from: &[f32], to: &mut [f32]);
}

/// One f32 a word.
#[derive(Clone, Copy)]
pub struct F32;

impl DotKernel for F32 {
    const ELEMS_PER_WORD: usize = 1;

    #[inline(always)]
    fn multiply_vectors<S: Simd, const NV: usize>(
        self,
        s: S,
        a: S::f32s,
        b: [S::f32s; NV],
        acc: &mut [S::f32s; NV],
    ) {
        for v in 0..NV {
            acc[v] = s.mul_add_e_f32s(a, b[v], acc[v]);
        }
    }

    #[inline(always)]
    fn pair<S: Simd>(self, _: S, even: S::f32s, _: S::f32s) -> S::f32s {
        even
    }
}

impl PackLanes for F32 {
    #[inline(always)]
    fn pair_vectors<S: Simd>(self, _: S, first: S::f32s, _: S::f32s) -> S::f32s {
        first
    }

    #[inline(always)]
    fn pair_lanes<S: Simd>(self, _: S, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

/// `acc += A B` with a blocked A panel `[k / 16][MR][16]` and a B panel `[k][NV]`; `k` is `b.len() / NV`, a multiple
/// of 16.
#[inline(always)]
pub fn blocked<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl DotKernel,
    a: &[f32],
    b: &[S::f32s],
    acc: &mut Acc<S, MR, NV>,
) {
    debug_assert_eq!(a.len() * NV, b.len() * MR);
    let (a, b) = (a.as_chunks::<K_RUN>().0, b.as_chunks::<NV>().0);
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(K_RUN)) {
        for k in 0..K_RUN {
            for r in 0..MR {
                dot.multiply(s, a[r][k], b[k], &mut acc[r]);
            }
        }
    }
}

/// `acc += A B` with a column A panel `[k][MR]` and a B panel `[k][NV]`.
#[inline(always)]
pub fn columns<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl DotKernel,
    a: &[f32],
    b: &[S::f32s],
    acc: &mut Acc<S, MR, NV>,
) {
    debug_assert_eq!(a.len() * NV, b.len() * MR);
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NV)) {
        let row = vectors::<S, NV>(b);
        for r in 0..MR {
            dot.multiply(s, a[r], row, &mut acc[r]);
        }
    }
}

/// Like [`columns`], with the columns of the A panel [`K_RUN`] elements apart.
#[inline(always)]
pub fn columns_strided<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    dot: impl DotKernel,
    a: &[f32],
    b: &[S::f32s],
    acc: &mut Acc<S, MR, NV>,
) {
    if MR == K_RUN {
        return columns(s, dot, a, b, acc);
    }
    for (a, b) in a.chunks(K_RUN).zip(b.chunks_exact(NV)) {
        let row = vectors::<S, NV>(b);
        let a = &a[..MR];
        for r in 0..MR {
            dot.multiply(s, a[r], row, &mut acc[r]);
        }
    }
}

/// Accumulators of the largest tile, in f32s.
pub const MAX_TILE_ELEMS: usize = 256;

/// Spills the accumulators of a tile to a nearby buffer, `[MR][NV]`, to be post-processed row by row: the
/// compiler keeps them in registers in the calling function only if they are used as simply as this.
#[inline(always)]
pub fn store_acc<S: Simd, const MR: usize, const NV: usize>(
    acc: &Acc<S, MR, NV>,
    sums: &mut [f32; MAX_TILE_ELEMS],
) {
    const { assert!(MR * NV <= MAX_TILE_ELEMS) };
    let sums = &mut S::as_mut_simd_f32s(sums).0[..MR * NV];
    for r in 0..MR {
        for v in 0..NV {
            sums[r * NV + v] = acc[r][v];
        }
    }
}

/// The counterpart of [`store_acc`].
#[inline(always)]
pub fn load_acc<S: Simd, const MR: usize, const NV: usize>(sums: &[f32], acc: &mut Acc<S, MR, NV>) {
    let sums = &S::as_simd_f32s(sums).0[..MR * NV];
    for r in 0..MR {
        for v in 0..NV {
            acc[r][v] = sums[r * NV + v];
        }
    }
}

/// Stores the first `row.len()` columns of one accumulator row into `row`, adding if `add`.
#[inline(always)]
pub fn store_row<S: Simd, const NV: usize>(s: S, acc: &[S::f32s; NV], row: &mut [f32], add: bool) {
    if row.len() == NV * S::F32_LANES {
        let row = &mut S::as_mut_simd_f32s(row).0[..NV];
        for v in 0..NV {
            row[v] = if add { s.add_f32s(acc[v], row[v]) } else { acc[v] };
        }
        return;
    }
    for (v, part) in row.chunks_mut(S::F32_LANES).enumerate() {
        let mut x = acc[v];
        if part.len() == S::F32_LANES {
            let full = &mut S::as_mut_simd_f32s(part).0[0];
            if add {
                x = s.add_f32s(x, *full);
            }
            *full = x;
        } else {
            if add {
                x = s.add_f32s(x, s.partial_load_f32s(part));
            }
            s.partial_store_f32s(part, x);
        }
    }
}
