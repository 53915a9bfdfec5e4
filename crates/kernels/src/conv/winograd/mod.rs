//! Convolutions of 3x3 with stride 1 by Winograd's F(4x4, 3x3): 36 products where the plain way takes 144.
//!
//! The output is cut into tiles of 4x4. Each takes from 6x6 inputs, whose values at 36 points ("frequencies") are
//! `V = B^T d B`; the weights' values there are `U = G g G^T`; their products `M = V U`, summed over the channels, are
//! 36 matrix products `[tiles, cin] [cin, cout]`; and the output is `A^T M A` (`transform.rs`).
//!
//! ```text
//! pack: U                                       tasks: panels of columns
//! for each block of tiles:                      as much as the last-level cache holds well
//!     V of the block                            tasks: groups of tiles
//!     M = V U                                   tasks: frequencies
//!     output = A^T M A + epilogue               tasks: rows of tiles
//! ```
//!
//! The data gradient is the same with the weights turned round. The weight gradient is `G^T (V^T (A dy A^T)) G`, the
//! sum over tiles being the matrix product ([`WinogradGrad`]).
//!
//! **Error.** The sums are of f32 as everywhere, but their terms are larger than what is left of them: the root mean
//! square error is about 5 times, the largest about 5 times that of the plain sum (1.1e-6 and 7e-6 of the typical
//! output for 128 channels). The tests bound it against f64. With bf16 factors it is 1.2e-2, five times that of the plain way
//! with such factors: good enough for gradients, whose noise from the choice of the batch is far larger, and not for the
//! forward pass.

mod product;
mod transform;
mod weight_grad;

pub use product::Winograd;
pub use weight_grad::WinogradGrad;

use super::ConvShape;
use crate::bf16::{self, Words};
use crate::tile::Product;
use pulp::Simd;

/// Outputs of a tile in each direction.
const M: usize = 4;
/// Inputs of a tile in each direction.
const D: usize = 6;
/// Numbers of values and products of a block: they are written once and read a few times, so they should stay in the
/// last-level cache, while the weights should be read for as many tiles as possible.
const BLOCK: usize = 2 << 20;
/// Points: products of a tile and a pair of channels.
const POINTS: usize = D * D;
/// Numbers between what belongs to different points, so that they do not all lie in the same set of a cache.
const APART: usize = 16;

/// Whether this convolution is one of 3x3 with stride 1.
fn fits(shape: &ConvShape) -> bool {
    shape.kernel == (3, 3) && shape.stride == (1, 1) && shape.pad.0 <= 2 && shape.pad.1 <= 2
}

/// Where the tiles of a batch of pictures lie.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    n: usize,
    from: (usize, usize),
    to: (usize, usize),
    pad: (usize, usize),
    /// Rows and columns of tiles of a picture.
    grid: (usize, usize),
}

/// A tile: its picture, and the first row and column of its outputs.
#[derive(Clone, Copy, Debug)]
struct Tile {
    picture: usize,
    y: usize,
    x: usize,
}

impl Tiles {
    fn new(n: usize, from: (usize, usize), to: (usize, usize), pad: (usize, usize)) -> Self {
        Self { n, from, to, pad, grid: (to.0.div_ceil(M), to.1.div_ceil(M)) }
    }

    /// Rows of tiles in all pictures.
    fn rows(&self) -> usize {
        self.n * self.grid.0
    }

    fn count(&self) -> usize {
        self.rows() * self.grid.1
    }

    /// Tile `i`, if there are as many.
    fn get(&self, i: usize) -> Option<Tile> {
        (i < self.count()).then(|| self.tile(i))
    }

    fn tile(&self, i: usize) -> Tile {
        let (row, column) = (i / self.grid.1, i % self.grid.1);
        Tile { picture: row / self.grid.0, y: row % self.grid.0 * M, x: column * M }
    }

    /// Rows of pixels that a row of tiles makes.
    fn pixel_rows(&self, row: usize) -> usize {
        M.min(self.to.0 - row % self.grid.0 * M)
    }

    /// `B^T d B` of a vector of channels from `c` of a tile's inputs; zero outside of the picture, without a tile, and for
    /// channels that are not there.
    #[inline(always)]
    fn values<S: Simd>(
        &self,
        s: S,
        tile: Option<Tile>,
        input: &[f32],
        cin: usize,
        c: usize,
    ) -> [[S::f32s; D]; D] {
        let Some(tile) = tile.filter(|_| c < cin) else {
            return [[s.splat_f32s(0.0); D]; D];
        };
        let (h, w) = self.from;
        let mut d = [[s.splat_f32s(0.0); D]; D];
        let lanes = S::F32_LANES.min(cin - c);
        if tile.y >= self.pad.0
            && tile.x >= self.pad.1
            && tile.y + D <= h + self.pad.0
            && tile.x + D <= w + self.pad.1
            && lanes == S::F32_LANES
        {
            let first = ((tile.picture * h + tile.y - self.pad.0) * w + tile.x - self.pad.1) * cin + c;
            for i in 0..D {
                let row = &input[first + i * w * cin..][..(D - 1) * cin + lanes];
                for j in 0..D {
                    d[i][j] = S::as_simd_f32s(&row[j * cin..][..S::F32_LANES]).0[0];
                }
            }
        } else {
            for i in 0..D {
                // Above or left of the picture wraps around to beyond its other end.
                let y = (tile.y + i).wrapping_sub(self.pad.0);
                for j in 0..D {
                    let x = (tile.x + j).wrapping_sub(self.pad.1);
                    if y < h && x < w {
                        let at = ((tile.picture * h + y) * w + x) * cin + c;
                        d[i][j] = load(s, &input[at..at + lanes]);
                    }
                }
            }
        }
        transform::input(s, d)
    }
}

/// Up to a vector of numbers; zeros behind.
#[inline(always)]
fn load<S: Simd>(s: S, x: &[f32]) -> S::f32s {
    if x.len() == S::F32_LANES { S::as_simd_f32s(x).0[0] } else { s.partial_load_f32s(x) }
}

/// Puts up to a vector of numbers.
#[inline(always)]
fn store<S: Simd>(s: S, x: &mut [f32], v: S::f32s) {
    if x.len() == S::F32_LANES {
        S::as_mut_simd_f32s(x).0[0] = v;
    } else {
        s.partial_store_f32s(x, v);
    }
}

/// The words of values, and of the other values that share the words if they are pairs.
#[inline(always)]
fn words_of<S: Simd, P: Product>(
    s: S,
    product: P,
    words: Words,
    mut values: [[S::f32s; D]; D],
    other: impl FnOnce() -> [[S::f32s; D]; D],
) -> [[S::f32s; D]; D] {
    if P::PER_WORD == 1 && words != Words::Rounded {
        return values;
    }
    let odd = if P::PER_WORD == 1 { values } else { other() };
    for i in 0..D {
        for j in 0..D {
            values[i][j] = match P::PER_WORD {
                1 => bf16::round_vector(s, values[i][j]),
                _ => product.pair(s, values[i][j], odd[i][j]),
            };
        }
    }
    values
}

/// Rows of tiles in a block: `wanted` tiles in all (a row at least), or up to a quarter less if that fills the last
/// register tile of `mr` better.
fn rows_of_block(tiles: &Tiles, wanted: usize, mr: usize) -> usize {
    let rows = tiles.rows();
    let most = (wanted / tiles.grid.1).clamp(1, rows);
    if most == rows {
        return rows;
    }
    let waste = |rows: usize| {
        let tiles = rows * tiles.grid.1;
        (tiles.next_multiple_of(mr) - tiles) as f64 / tiles as f64
    };
    let least = (most * 3 / 4).max(1);
    (least..=most).rev().min_by(|&a, &b| waste(a).total_cmp(&waste(b))).unwrap_or(most)
}

/// Whether the way through Winograd's tiles takes less time than the plain one, by counting; each with its own factors.
///
/// Costs are in fused multiply-adds of one lane, fitted to measurements: bringing a number to or from its points costs
/// 6 for each point for inputs and outputs, 20 for weights, which are more than the caches hold (6 where they are kept and
/// only read).
fn pays([plain, own]: [Words; 2], kept: bool, tiles: &Tiles, cin: usize, cout: usize) -> bool {
    if cin < 16 || cout < 16 {
        return false;
    }
    let (cin, cout, count) = (cin as f64, cout as f64, tiles.count() as f64);
    let pixels = (tiles.n * tiles.to.0 * tiles.to.1) as f64;
    let cost = |words: Words| if words == Words::Pairs { 0.65 } else { 1.15 };
    let plain = cost(plain) * 9.0 * pixels * cin * cout;
    let products = (cost(own) * count + if kept { 6.0 } else { 20.0 }) * cin * cout;
    let winograd = POINTS as f64 * (products + 6.0 * count * (cin + cout));
    winograd < plain
}
