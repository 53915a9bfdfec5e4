//! Operand packing, products of a tile with a strided operand, and loops over rows of results.
//!
//! Operands are packed into the words of the [`DotKernel`](crate::tile::DotKernel): one element, or two
//! neighbours along the summed dimension.

use super::LINE;
use crate::bf16;
use crate::tile::{self, Acc, PackLanes};
use crate::vector;
use pulp::Simd;

/// Tokens of a panel.
pub(super) const PANEL: usize = 8;

/// Packs two neighbours into a word.
#[inline(always)]
fn word<P: PackLanes>(even: f32, odd: Option<f32>) -> f32 {
    if P::ELEMS_PER_WORD == 1 { even } else { bf16::pair(even, odd.unwrap_or(0.0)) }
}

/// A head's part of some tokens: `width` elements from offset `at` on, `stride` between tokens.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub x: &'a [f32],
    pub stride: usize,
    pub at: usize,
    pub width: usize,
}

impl<'a> Rows<'a> {
    /// Number of tokens.
    #[inline(always)]
    pub fn count(&self) -> usize {
        self.x.len() / self.stride
    }

    #[inline(always)]
    pub fn row(&self, token: usize) -> &'a [f32] {
        &self.x[token * self.stride + self.at..][..self.width]
    }

    /// At most `count` tokens from `first` on.
    #[inline(always)]
    pub fn part(&self, first: usize, count: usize) -> Self {
        let end = self.count().min(first + count);
        Self { x: &self.x[first * self.stride..end * self.stride], ..*self }
    }

    /// Touches the rows, so that their cache misses overlap; packing then finds them cached.
    #[inline(always)]
    pub fn prefetch_rows(&self) {
        let rows = self.x[self.at..].chunks(self.stride);
        std::hint::black_box(rows.fold(0, |bits, row| {
            row[..self.width.min(row.len())].iter().step_by(LINE).fold(bits, |bits, x| bits | x.to_bits())
        }));
    }

    /// Packs panels of tokens across the columns, `[tokens / 8][words of the width][8]`; zeros past the last.
    #[inline(always)]
    pub fn pack_panels<P: PackLanes>(&self, out: &mut [f32]) {
        let words = self.width.div_ceil(P::ELEMS_PER_WORD);
        for (panel, out) in out.chunks_exact_mut(words * PANEL).enumerate() {
            self.pack_columns::<P>(panel * PANEL, PANEL, 1.0, out);
        }
    }

    /// Packs the `columns` tokens from `first` on as columns, `[words of the width][columns]`, times `scale`;
    /// zeros past the last.
    #[inline(always)]
    pub fn pack_columns<P: PackLanes>(&self, first: usize, columns: usize, scale: f32, out: &mut [f32]) {
        #[inline(always)]
        fn pack<P: PackLanes, const WIDTH: usize>(
            rows: Rows<'_>,
            columns: usize,
            scale: f32,
            out: &mut [f32],
        ) {
            let out = &mut out[..WIDTH / P::ELEMS_PER_WORD * columns];
            for q in 0..columns.min(rows.count()) {
                let row = &rows.row(q)[..WIDTH];
                for w in 0..WIDTH / P::ELEMS_PER_WORD {
                    let at = w * P::ELEMS_PER_WORD;
                    out[w * columns + q] =
                        word::<P>(row[at] * scale, Some(row[at + P::ELEMS_PER_WORD - 1] * scale));
                }
            }
        }
        let rows = self.part(first.min(self.count()), columns);
        if rows.count() < columns {
            out.fill(0.0);
        }
        // Constant loop lengths avoid bounds checks.
        match self.width {
            4 => return pack::<P, 4>(rows, columns, scale, out),
            8 => return pack::<P, 8>(rows, columns, scale, out),
            16 => return pack::<P, 16>(rows, columns, scale, out),
            32 => return pack::<P, 32>(rows, columns, scale, out),
            _ => {}
        }
        for q in 0..rows.count() {
            let row = rows.row(q).chunks(P::ELEMS_PER_WORD);
            for (row, out) in row.zip(out.chunks_exact_mut(columns)) {
                out[q] = word::<P>(row[0] * scale, row.get(1).map(|x| x * scale));
            }
        }
    }

    /// Packs tokens as rows of `columns` elements, `[words of the tokens][columns]`; zeros past the width and
    /// past the last token.
    #[inline(always)]
    pub fn pack_rows<P: PackLanes>(&self, columns: usize, out: &mut [f32]) {
        #[inline(always)]
        fn pack<P: PackLanes>(rows: &Rows<'_>, width: usize, columns: usize, out: &mut [f32]) {
            for (i, out) in out.chunks_exact_mut(columns).enumerate() {
                let token = i * P::ELEMS_PER_WORD;
                if token >= rows.count() {
                    out.fill(0.0);
                    continue;
                }
                let (out, rest) = out.split_at_mut(width);
                rest.fill(0.0);
                let even = &rows.row(token)[..width];
                if P::ELEMS_PER_WORD == 1 {
                    out.copy_from_slice(even);
                } else if token + 1 < rows.count() {
                    bf16::pair_rows(even, &rows.row(token + 1)[..width], out);
                } else {
                    even.iter().zip(out).for_each(|(even, out)| *out = bf16::pair(*even, 0.0));
                }
            }
        }
        // A copy of constant length is inlined.
        match self.width {
            4 => pack::<P>(self, 4, columns, out),
            8 => pack::<P>(self, 8, columns, out),
            16 => pack::<P>(self, 16, columns, out),
            width => pack::<P>(self, width, columns, out),
        }
    }

    /// The largest norm of a row.
    #[inline(always)]
    pub fn max_row_norm<S: Simd>(&self, s: S) -> f32 {
        let mut max_square = 0.0_f32;
        for token in 0..self.count() {
            let (full, rest) = S::as_simd_f32s(self.row(token));
            let rest = s.partial_load_f32s(rest);
            let mut squares = s.mul_f32s(rest, rest);
            for v in full {
                squares = s.mul_add_e_f32s(*v, *v, squares);
            }
            let square = s.reduce_sum_f32s(squares);
            max_square = if square > max_square { square } else { max_square };
        }
        max_square.sqrt()
    }
}

#[inline(always)]
pub(super) fn inner_product<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let mut sum = s.mul_f32s(s.partial_load_f32s(a_rest), s.partial_load_f32s(b_rest));
    for (a, b) in a.iter().zip(b) {
        sum = s.mul_add_e_f32s(*a, *b, sum);
    }
    s.reduce_sum_f32s(sum)
}

/// Tokens packed as columns, `[width][columns]`, of which the first `count` exist.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    pub x: &'a [f32],
    pub width: usize,
    pub columns: usize,
    pub count: usize,
}

impl Columns<'_> {
    /// Inverse of [`Rows::pack_columns`] for f32: writes the tokens, times `scale`, into rows that begin at
    /// `at` and are `stride` apart.
    #[inline(always)]
    pub fn unpack(self, scale: f32, to: &mut [f32], at: usize, stride: usize) {
        // Constant loop lengths.
        match self.width {
            4 => self.put(4, scale, to, at, stride),
            8 => self.put(8, scale, to, at, stride),
            16 => self.put(16, scale, to, at, stride),
            32 => self.put(32, scale, to, at, stride),
            width => self.put(width, scale, to, at, stride),
        }
    }

    #[inline(always)]
    fn put(self, width: usize, scale: f32, to: &mut [f32], at: usize, stride: usize) {
        let x = &self.x[..width * self.columns];
        for q in 0..self.count.min(self.columns) {
            let row = &mut to[at + q * stride..][..width];
            for d in 0..width {
                row[d] = x[d * self.columns + q] * scale;
            }
        }
    }
}

/// Packs neighbouring rows, `[rows / 2][columns]`, if words have two elements; else returns the rows
/// unchanged.
#[inline(always)]
pub(super) fn pair_rows<'a, S: Simd, P: PackLanes>(
    s: S,
    dot: P,
    rows: &'a [S::f32s],
    columns: usize,
    words: &'a mut [S::f32s],
) -> &'a [S::f32s] {
    if P::ELEMS_PER_WORD == 1 {
        return rows;
    }
    for (rows, words) in rows.chunks(2 * columns).zip(words.chunks_exact_mut(columns)) {
        let (even, odd) = rows.split_at(columns);
        if odd.len() == columns {
            for v in 0..columns {
                words[v] = dot.pair(s, even[v], odd[v]);
            }
        } else {
            for v in 0..columns {
                words[v] = dot.pair(s, even[v], s.splat_f32s(0.0));
            }
        }
    }
    words
}

/// `2^x` to the precision of the packing, for x known to be at least -125.
#[inline(always)]
pub(super) fn exp2_bounded<S: Simd, P: PackLanes>(s: S, x: S::f32s) -> S::f32s {
    if P::ELEMS_PER_WORD == 1 { vector::exp2_unclamped(s, x) } else { vector::exp2_unclamped_fast(s, x) }
}

/// `2^x` to the precision of the packing, clamped to 2^-125 from below.
#[inline(always)]
pub(super) fn exp2_clamped<S: Simd, P: PackLanes>(s: S, x: S::f32s) -> S::f32s {
    exp2_bounded::<S, P>(s, vector::clamp_min(s, -125.0, x))
}

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
    // One bounds check for all rows.
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

/// `acc[r] += sum over w of a[w][r] b[w]` with rows of A [`PANEL`] words apart; B is entirely in registers.
#[inline(always)]
pub(super) fn short_rows<S: Simd, P: PackLanes, const MR: usize, const NV: usize, const W: usize>(
    s: S,
    dot: P,
    a: &[f32],
    b: &Acc<S, W, NV>,
    acc: &mut Acc<S, MR, NV>,
) {
    let a = &a[..(W - 1) * PANEL + MR];
    for w in 0..W {
        for r in 0..MR {
            dot.multiply(s, a[w * PANEL + r], b[w], &mut acc[r]);
        }
    }
}

/// Rows of words or of vectors, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a, T> {
    pub x: &'a [T],
    pub stride: usize,
}

/// `acc[r] += sum over the first count w of a[w][r] b[w]`.
#[inline(always)]
pub(super) fn columns<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
    s: S,
    dot: P,
    a: Strided<'_, f32>,
    b: Strided<'_, S::f32s>,
    count: usize,
    acc: &mut Acc<S, MR, NV>,
) {
    for (a, b) in a.x.chunks(a.stride).zip(b.x.chunks(b.stride)).take(count) {
        let (a, b) = (&a[..MR], row::<S, NV>(b));
        for r in 0..MR {
            dot.multiply(s, a[r], b, &mut acc[r]);
        }
    }
}

/// Part of a product of tokens in panels and a query tile: the tokens of a panel from `row` on, and the tile's
/// vectors from `v` on.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Words of the width.
    pub words: usize,
    pub row: usize,
    pub v: usize,
}

/// `acc[r] += sum over w of a[w][r] b[w]` for a part of a panel of A and of B. The strides of the loop are
/// constants.
#[inline(always)]
pub(super) fn panel_columns<S: Simd, P: PackLanes, const MR: usize, const NV: usize>(
    s: S,
    dot: P,
    a: &[f32],
    b: Strided<'_, S::f32s>,
    Part { words, row, v }: Part,
    acc: &mut Acc<S, MR, NV>,
) {
    let a = &a.as_chunks::<PANEL>().0[..words];
    for (a, b) in a.iter().zip(b.x.chunks_exact(b.stride)) {
        let (a, b) = (&a[row..][..MR], tile::vectors::<S, NV>(&b[v..]));
        for r in 0..MR {
            dot.multiply(s, a[r], b, &mut acc[r]);
        }
    }
}

/// Rows of a tile that fills the register file.
#[inline(always)]
pub(super) fn max_tile_rows<S: Simd>() -> usize {
    match S::F32_LANES {
        16 | 4 => 8,
        _ => 4,
    }
}

/// Offset of token `i` in panels of `words` words.
#[inline(always)]
pub(super) fn panel_at(i: usize, words: usize) -> usize {
    i / PANEL * PANEL * words + i % PANEL
}

/// Calls `$f::<S, P, rows, ..>($i, ..)` for the rows `$i` of `$count`: tiles of `$most` rows first, then ever
/// smaller ones for the rest; each begins at a multiple of its rows.
macro_rules! in_rows {
    ($s:ident, $p:ident, [$($size:tt),+], $count:expr, $max_square:expr, $f:ident($i:ident $(, $arg:expr)* $(,)?)) => {{
        let mut $i = 0;
        let count = $count;
        if $max_square >= 8 {
            while $i + 8 <= count {
                $f::<$s, $p, 8, $($size),+>($($arg),*);
                $i += 8;
            }
        }
        if $max_square >= 4 {
            while $i + 4 <= count {
                $f::<$s, $p, 4, $($size),+>($($arg),*);
                $i += 4;
            }
        }
        while $i + 2 <= count {
            $f::<$s, $p, 2, $($size),+>($($arg),*);
            $i += 2;
        }
        if $i < count {
            $f::<$s, $p, 1, $($size),+>($($arg),*);
        }
    }};
}
pub(super) use in_rows;
