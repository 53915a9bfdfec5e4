//! Convolution, its data gradient and its weight gradient, as matrix products over gathered pixels ("implicit
//! GEMM").
//!
//! This is the direct algorithm; 3x3 convolutions, and 4x4 with stride 2, also have a [`winograd`] one.
//! Forward and data gradient are one algorithm, [`ImplicitGemm`]. Every output pixel is a sum over *taps*:
//! input pixels at fixed offsets, each times its own matrix `[cin][cout]`. For the convolution the taps are
//! the positions of the kernel. For the data gradient they are the same positions mirrored; with a stride,
//! output pixels of different remainders have different taps, which makes `stride_y * stride_x` *phases*. A
//! transposed convolution is the data gradient of the convolution with its weights, so it needs no code of
//! its own.
//!
//! ```text
//! for each block of output pixels (a task), for each phase:
//!     for each block of k = (tap, channel):
//!         copy the pixels' inputs into A panels ("virtual im2col": never more than one block exists)
//!         for each B panel (packed weights), for each A panel: a register tile
//! ```
//!
//! [`WeightGrad`] is the product of the gathered inputs and the output gradient over pixels. Its sums are
//! split into a fixed number of pixel groups, added in order: the result does not depend on the number of
//! threads.

mod epilogue;
mod implicit_gemm;
mod row;
mod weight_grad;
pub mod winograd;

pub use epilogue::{Epilogue, Operands};
pub use implicit_gemm::ImplicitGemm;
pub use weight_grad::WeightGrad;

pub use crate::bf16::MatmulDtype;

/// The sizes of a convolution `[n, h, w, cin] -> [n, oh, ow, cout]` with weights `[kh, kw, cin, cout]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Images.
    pub n: usize,
    /// Input height and width.
    pub input: (usize, usize),
    /// Output height and width.
    pub output: (usize, usize),
    /// Input channels.
    pub cin: usize,
    /// Output channels.
    pub cout: usize,
    /// Kernel height and width.
    pub kernel: (usize, usize),
    /// Vertical and horizontal stride.
    pub stride: (usize, usize),
    /// Zero rows above and zero columns to the left. Below and to the right, padding is implied by the output
    /// size.
    pub pad: (usize, usize),
}

impl ConvShape {
    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.kernel.0 * self.kernel.1 * self.cin * self.cout
    }

    /// Multiply-adds of one pass (forward, data gradient or weight gradient), including padding.
    pub fn multiply_adds(&self) -> usize {
        self.n * self.output.0 * self.output.1 * self.weights()
    }
}

/// Padding in f32s between scratch parts that are used together, so that they do not all map to the same
/// cache set.
const CACHE_SET_PAD: usize = 16;

/// Columns of the widest panel of any tile shape.
const MAX_PANEL_COLUMNS: usize = 32;

/// Iterates over the pixels of a batch of images; dividing the index for each would take as long as the work
/// of a narrow layer.
#[derive(Clone, Copy)]
struct PixelCursor {
    image: usize,
    y: usize,
    x: usize,
    size: (usize, usize),
}

impl PixelCursor {
    /// Pixel `i` of images of height and width `size`.
    fn new(i: usize, size: (usize, usize)) -> Self {
        let row = i / size.1;
        Self { image: row / size.0, y: row % size.0, x: i % size.1, size }
    }

    /// Moves to the next pixel.
    #[inline(always)]
    fn advance(&mut self) {
        self.x += 1;
        if self.x == self.size.1 {
            (self.x, self.y) = (0, self.y + 1);
            if self.y == self.size.0 {
                (self.y, self.image) = (0, self.image + 1);
            }
        }
    }
}

/// `copy_from_slice` for short slices, without the call.
#[inline(always)]
fn copy_short(to: &mut [f32], from: &[f32]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = *f;
    }
}
