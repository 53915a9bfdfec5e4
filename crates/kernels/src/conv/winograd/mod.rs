//! Convolutions by Winograd's tiles: of 3x3 with stride 1 by F(4x4, 3x3), 36 products where the plain way takes 144, and of
//! 4x4 with stride 2 by F(4x4, 2x2), 25 for 64.
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
//! **Stride 2.** Every other row and column of the input, from the first or the second on, makes four images (*parts*), and
//! every other tap four kernels of 2x2; the convolution is the sum of the four plain ones of part with part. Forward the
//! parts stand beside each other as four times as many channels; in the data gradient each is a result of its own.
//!
//! **Error.** The sums are of f32 as everywhere, but their terms are larger than what is left of them: the root mean
//! square error of 3x3 is about 5 times, the largest about 5 times that of the plain sum (1.1e-6 and 9e-6 of the typical
//! output for 128 channels), of 4x4 about 3 times (1.3e-6 and 1.1e-5 for 128 channels, which are 4 times as many terms as
//! make a point of 3x3). The tests bound it against f64. With bf16 factors it is 1.2e-2, five times that of the plain way
//! with such factors: good enough for gradients, whose noise from the choice of the batch is far larger. In the forward pass
//! 16-bit factors are whole numbers (`whole.rs`), which are as exact here as bf16 is the plain way: 2.2e-3, of 4x4 1.1e-3.

mod own;
mod phases;
mod points;
mod product;
mod serial;
mod transform;
mod weight_grad;
mod whole;

pub use product::Winograd;
pub use weight_grad::WinogradGrad;

use super::ConvShape;
use crate::bf16::Words;
use crate::tile::K_RUN;
use points::Window;
use pulp::Simd;

/// Outputs of a tile in each direction.
const M: usize = 4;
/// Numbers of values and products of a block: they are written once and read a few times, so they should stay in the
/// last-level cache, while the weights should be read for as many tiles as possible.
const BLOCK: usize = 2 << 20;

/// Which convolutions there is a way for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// 3x3 with stride 1.
    Three,
    /// 4x4 with stride 2.
    Four,
}

/// Calls with the maps of a [`Kind`].
macro_rules! with_maps {
    ($kind:expr, $maps:ident => $call:expr) => {
        match $kind {
            Kind::Three => {
                let $maps = transform::F43;
                $call
            }
            Kind::Four => {
                let $maps = transform::F42;
                $call
            }
        }
    };
}
use with_maps;

impl Kind {
    fn of(shape: &ConvShape) -> Option<Self> {
        let ConvShape { input: (h, w), kernel, stride, pad, cin, .. } = *shape;
        if pad.0 > 2 || pad.1 > 2 {
            return None;
        }
        match (kernel, stride) {
            ((3, 3), (1, 1)) => Some(Self::Three),
            // Parts of the same size, in each of which vectors of channels end with it.
            ((4, 4), (2, 2)) if h % 2 == 0 && w % 2 == 0 && cin % K_RUN == 0 => Some(Self::Four),
            _ => None,
        }
    }

    fn stride(self) -> usize {
        match self {
            Self::Three => 1,
            Self::Four => 2,
        }
    }

    /// Weights of a part in each direction.
    fn taps(self) -> usize {
        match self {
            Self::Three => 3,
            Self::Four => 2,
        }
    }

    /// Points: products of a tile and a pair of channels.
    fn points(self) -> usize {
        (M + self.taps() - 1).pow(2)
    }

    /// The first tap of each part, by rows and columns.
    fn parts(self) -> impl Iterator<Item = (usize, usize)> {
        let stride = self.stride();
        (0..stride).flat_map(move |y| (0..stride).map(move |x| (y, x)))
    }
}

/// Where the tiles of a batch of images lie.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    n: usize,
    /// Height and width of the input.
    from: (usize, usize),
    /// Rows and columns of the input between those that a tile takes.
    step: usize,
    /// Height and width of the output, or of a part of it.
    to: (usize, usize),
    /// Rows and columns of tiles of an image.
    grid: (usize, usize),
}

/// A tile: its image, and the first row and column of its outputs.
#[derive(Clone, Copy, Debug)]
struct Tile {
    image: usize,
    y: usize,
    x: usize,
}

impl Tiles {
    fn new(n: usize, from: (usize, usize), step: usize, to: (usize, usize)) -> Self {
        Self { n, from, step, to, grid: (to.0.div_ceil(M), to.1.div_ceil(M)) }
    }

    /// The tiles of a convolution's output.
    fn of_output(kind: Kind, shape: &ConvShape) -> Self {
        Self::new(shape.n, shape.input, kind.stride(), shape.output)
    }

    /// Rows of tiles in all images.
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
        Tile { image: row / self.grid.0, y: row % self.grid.0 * M, x: column * M }
    }

    /// Rows of pixels that a row of tiles makes.
    fn pixel_rows(&self, row: usize) -> usize {
        M.min(self.to.0 - row % self.grid.0 * M)
    }

    /// Where a tile's inputs are, of which those of the output's first pixel begin at the row and column `first`.
    fn window(&self, tile: Tile, first: (isize, isize)) -> Window {
        // Above or left of the image wraps around to beyond its other end.
        let top = (self.step * tile.y).wrapping_add_signed(first.0);
        let left = (self.step * tile.x).wrapping_add_signed(first.1);
        Window { image: tile.image, top, left, size: self.from, step: self.step }
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
/// `brought` are the channels that are brought to the points or from them, for each tile.
///
/// Costs are in fused multiply-adds of one lane, fitted to measurements: bringing a number to or from its points costs
/// 6 for each point for inputs and outputs, 20 for weights, which are more than the caches hold (6 where they are kept and
/// only read).
fn is_faster(
    [plain, own]: [Words; 2],
    kept: bool,
    kind: Kind,
    shape: &ConvShape,
    tiles: usize,
    brought: usize,
) -> bool {
    if shape.cin < 16 || shape.cout < 16 {
        return false;
    }
    let (count, pairs) = (tiles as f64, (kind.stride().pow(2) * shape.cin * shape.cout) as f64);
    let cost = |words: Words| if words == Words::Pairs { 0.65 } else { 1.15 };
    let plain = cost(plain) * shape.multiply_adds() as f64;
    let products = (cost(own) * count + if kept { 6.0 } else { 20.0 }) * pairs;
    let winograd = kind.points() as f64 * (products + 6.0 * count * brought as f64);
    winograd < plain
}
