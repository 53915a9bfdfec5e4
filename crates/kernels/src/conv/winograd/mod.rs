//! Winograd convolutions: 3x3 with stride 1 by F(4x4, 3x3), with 36 products where direct convolution takes
//! 144, and 4x4 with stride 2 by F(4x4, 2x2), 25 instead of 64.
//!
//! The output is cut into tiles of 4x4. Each reads 6x6 inputs, whose values at 36 points ("frequencies") are
//! `V = B^T d B`; the values of the weights are `U = G g G^T`; their products `M = V U`, summed over the
//! channels, are 36 matrix products `[tiles, cin] [cin, cout]`; and the output is `A^T M A` (`transform.rs`).
//!
//! ```text
//! pack: U                                       tasks: panels of columns
//! for each block of tiles:                      as many as fit well into the last-level cache
//!     V of the block                            tasks: groups of tiles
//!     M = V U                                   tasks: frequencies
//!     output = A^T M A + epilogue               tasks: rows of tiles
//! ```
//!
//! The data gradient is the same with mirrored weights. The weight gradient is `G^T (V^T (A dy A^T)) G`,
//! where the sum over tiles is the matrix product ([`WinogradGrad`]).
//!
//! **Stride 2.** Every other row and column of the input, starting from the first or the second, makes four
//! images (*parts*), and every other tap makes four kernels of 2x2; the convolution is the sum of the four
//! stride-1 convolutions of each part with its kernel. In the forward pass the parts are concatenated along
//! the channels; in the data gradient each is a separate result.
//!
//! **Error.** Accumulation is in f32 as everywhere, but the terms are larger than the sum that remains of
//! them: for 3x3 the RMS and the maximum error are both about 5 times that of direct convolution (1.1e-6 and
//! 9e-6 of the typical output for 128 channels), for 4x4 about 3 times (1.3e-6 and 1.1e-5 for 128 channels,
//! where each point sums 4 times as many terms as for 3x3). The tests bound it against f64. With bf16
//! operands it is 1.2e-2, five times that of direct convolution with bf16: good enough for gradients, whose
//! minibatch noise is far larger. In the forward pass 16-bit operands are integers (`quantized.rs`), which
//! makes them as accurate here as bf16 is in direct convolution: 2.2e-3, for 4x4 1.1e-3.

mod per_thread;
mod phases;
mod plan;
mod points;
mod quantized;
mod serial;
mod transform;
mod weight_grad;

pub use plan::Winograd;
pub use weight_grad::{GradOperands, RunValues, WinogradGrad};

use super::ConvShape;
use crate::bf16::Packing;
use crate::tile::K_RUN;
use points::Window;
use pulp::Simd;

/// Outputs of a tile along each axis.
const M: usize = 4;
/// Length of the values and products of a block, in f32s: they are written once and read a few times, so they
/// should fit the last-level cache, while the weights should be reused for as many tiles as possible.
const BLOCK: usize = 2 << 20;

/// The supported convolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// 3x3 with stride 1.
    K3S1,
    /// 4x4 with stride 2.
    K4S2,
}

/// Evaluates an expression with the transforms of a [`Kind`].
macro_rules! with_maps {
    ($kind:expr, $maps:ident => $call:expr) => {
        match $kind {
            Kind::K3S1 => {
                let $maps = transform::F43;
                $call
            }
            Kind::K4S2 => {
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
            ((3, 3), (1, 1)) => Some(Self::K3S1),
            // Parts have the same size, and vectors of channels do not cross parts.
            ((4, 4), (2, 2)) if h % 2 == 0 && w % 2 == 0 && cin % K_RUN == 0 => Some(Self::K4S2),
            _ => None,
        }
    }

    fn stride(self) -> usize {
        match self {
            Self::K3S1 => 1,
            Self::K4S2 => 2,
        }
    }

    /// Taps of a part along each axis.
    fn taps(self) -> usize {
        match self {
            Self::K3S1 => 3,
            Self::K4S2 => 2,
        }
    }

    /// Number of points: products for each tile and pair of channels.
    fn points(self) -> usize {
        (M + self.taps() - 1).pow(2)
    }

    /// The first tap of each part, in row-major order.
    fn parts(self) -> impl Iterator<Item = (usize, usize)> {
        let stride = self.stride();
        (0..stride).flat_map(move |y| (0..stride).map(move |x| (y, x)))
    }
}

/// The tiling of a batch of images.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    n: usize,
    /// Height and width of the input.
    from: (usize, usize),
    /// Stride between the rows and columns of the input that a tile reads.
    step: usize,
    /// Height and width of the output, or of a part of it.
    to: (usize, usize),
    /// Rows and columns of tiles in an image.
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

    /// Tile `i`, if it exists.
    fn get(&self, i: usize) -> Option<Tile> {
        (i < self.count()).then(|| self.tile(i))
    }

    fn tile(&self, i: usize) -> Tile {
        let (row, column) = (i / self.grid.1, i % self.grid.1);
        Tile { image: row / self.grid.0, y: row % self.grid.0 * M, x: column * M }
    }

    /// Rows of pixels that a row of tiles covers.
    fn pixel_rows(&self, row: usize) -> usize {
        M.min(self.to.0 - row % self.grid.0 * M)
    }

    /// The window of a tile's inputs; `first` is the row and column where the inputs of the output's first
    /// pixel begin.
    fn window(&self, tile: Tile, first: (isize, isize)) -> Window {
        // Coordinates above or left of the image wrap around and fail the bounds check.
        let top = (self.step * tile.y).wrapping_add_signed(first.0);
        let left = (self.step * tile.x).wrapping_add_signed(first.1);
        Window { image: tile.image, top, left, size: self.from, step: self.step }
    }
}

/// Loads up to a vector of elements; zeros past the end.
#[inline(always)]
fn load<S: Simd>(s: S, x: &[f32]) -> S::f32s {
    if x.len() == S::F32_LANES { S::as_simd_f32s(x).0[0] } else { s.partial_load_f32s(x) }
}

/// Stores up to a vector of elements.
#[inline(always)]
fn store<S: Simd>(s: S, x: &mut [f32], v: S::f32s) {
    if x.len() == S::F32_LANES {
        S::as_mut_simd_f32s(x).0[0] = v;
    } else {
        s.partial_store_f32s(x, v);
    }
}

/// Rows of tiles in a block: `wanted` tiles in all (at least a row), or up to a quarter less if that fills
/// the last register tile of `mr` better.
fn rows_of_block(tiles: &Tiles, wanted: usize, mr: usize) -> usize {
    let rows = tiles.rows();
    let max = (wanted / tiles.grid.1).clamp(1, rows);
    if max == rows {
        return rows;
    }
    let waste = |rows: usize| {
        let tiles = rows * tiles.grid.1;
        (tiles.next_multiple_of(mr) - tiles) as f64 / tiles as f64
    };
    let min = (max * 3 / 4).max(1);
    (min..=max).rev().min_by(|&a, &b| waste(a).total_cmp(&waste(b))).unwrap_or(max)
}

/// Cost model: whether Winograd is faster than direct convolution, each with its own packing. `transformed`
/// is the number of channels transformed to or from the points, for each tile.
///
/// Costs are in fused multiply-adds of one lane, fitted to measurements: transforming an element costs 6 for
/// each point for inputs and outputs, 20 for weights, which exceed the caches (6 if they are cached across
/// passes and only read).
fn is_faster(
    [direct, winograd]: [Packing; 2],
    kept: bool,
    kind: Kind,
    shape: &ConvShape,
    tiles: usize,
    transformed: usize,
) -> bool {
    if shape.cin < 16 || shape.cout < 16 {
        return false;
    }
    let (count, pairs) = (tiles as f64, (kind.stride().pow(2) * shape.cin * shape.cout) as f64);
    let cost = |packing: Packing| if packing == Packing::Pairs { 0.65 } else { 1.15 };
    let direct = cost(direct) * shape.multiply_adds() as f64;
    let products = (cost(winograd) * count + if kept { 6.0 } else { 20.0 }) * pairs;
    let winograd = kind.points() as f64 * (products + 6.0 * count * transformed as f64);
    winograd < direct
}
