//! Operations that NVIDIA's libraries can perform in place of our kernels: convolutions by cuDNN, matrix products by cuBLASLt.
//!
//! `lower` describes the suitable library operations of a node and the kernels around them; where a library is available, the
//! executor times both when it is created and keeps the faster one.

use crate::launch::{Launch, WeightRepack};

/// Whether libraries are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Libraries {
    /// Only our kernels: their choice depends on nothing but the plan.
    #[default]
    Never,
    /// Whichever is faster in a timing run.
    Timed,
    /// Wherever possible, with the algorithm of this index (modulo their number); for tests.
    Forced(usize),
}

/// A library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// Convolutions. Images are NHWC, weights `[cout, kh, kw, cin]`.
    Cudnn,
    /// Matrix products: 1x1 convolutions with weights `[cin, cout]`.
    CublasLt,
}

/// The pass of the convolution `y = x * w`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConvPass {
    /// y from x and w.
    Forward,
    /// dx from dy and w.
    DataGrad,
    /// dw from x and dy.
    WeightGrad,
}

/// Precision of the operands; accumulation is in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MathMode {
    /// f32, stored in f32.
    F32,
    /// tf32, stored in f32.
    Tf32,
    /// bf16, stored in bf16.
    Bf16,
}

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Images.
    pub n: usize,
    /// Height and width of x.
    pub input: (usize, usize),
    /// Height and width of y.
    pub output: (usize, usize),
    /// Height and width of the kernel.
    pub kernel: (usize, usize),
    /// Stride.
    pub stride: (usize, usize),
    /// Zero padding on each side.
    pub pad: (usize, usize),
    /// Channels of x.
    pub cin: usize,
    /// Channels of y.
    pub cout: usize,
}

impl Geometry {
    /// Whether this is a plain matrix product `[rows, cin] [cin, cout]`.
    pub fn is_matmul(&self) -> bool {
        (self.kernel, self.stride, self.pad) == ((1, 1), (1, 1), (0, 0)) && self.input == self.output
    }

    /// Whether the padding is symmetric: the output size then follows from the other sizes as libraries compute it.
    pub fn has_symmetric_padding(&self) -> bool {
        let fits = |size: usize, kernel: usize, stride: usize, pad: usize, out: usize| {
            size + 2 * pad >= kernel && (size + 2 * pad - kernel) / stride + 1 == out
        };
        fits(self.input.0, self.kernel.0, self.stride.0, self.pad.0, self.output.0)
            && fits(self.input.1, self.kernel.1, self.stride.1, self.pad.1, self.output.1)
    }

    /// Rows of the matrix product.
    pub fn rows(&self) -> usize {
        self.n * self.input.0 * self.input.1
    }
}

/// A library operation. The format bit of its addresses is ignored; formats are fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LibraryOp<Addr> {
    /// The library.
    pub library: Library,
    /// Which pass.
    pub pass: ConvPass,
    /// Precision of the operands.
    pub math: MathMode,
    /// Whether the result, bias and residual are bf16; f32 otherwise.
    pub bf16_result: bool,
    /// Sizes.
    pub geometry: Geometry,
    /// x or dx.
    pub x: Addr,
    /// w or dw.
    pub w: Addr,
    /// y or dy.
    pub y: Addr,
    /// Per-channel bias added to the result.
    pub bias: Option<Addr>,
    /// Tensor of the result's shape to add.
    pub residual: Option<Addr>,
    /// Workspace of the library, shared by the calls of a stream, and its size in bytes.
    pub workspace: (Addr, usize),
}

impl<P: Copy> LibraryOp<P> {
    /// Maps every address.
    pub fn map_addrs<Q>(&self, f: impl Fn(P) -> Q) -> LibraryOp<Q> {
        LibraryOp {
            library: self.library,
            pass: self.pass,
            math: self.math,
            bf16_result: self.bf16_result,
            geometry: self.geometry,
            x: f(self.x),
            w: f(self.w),
            y: f(self.y),
            bias: self.bias.map(&f),
            residual: self.residual.map(&f),
            workspace: (f(self.workspace.0), self.workspace.1),
        }
    }
}

/// An algorithm of a library: its opaque description and workspace size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Algorithm {
    /// The library's own encoding.
    pub words: [u64; 8],
    /// Workspace in bytes.
    pub workspace: usize,
}

/// A call on a GPU stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Call<Addr> {
    /// A kernel launch.
    Launch(Launch<Addr>),
    /// A library operation.
    Library(Box<(LibraryOp<Addr>, Algorithm)>),
}

impl Call<usize> {
    /// Moves the workspace of a library operation by this many bytes.
    pub fn shift_workspace(&mut self, by: usize) {
        if let Self::Library(both) = self {
            both.0.workspace.0 += by;
        }
    }
}

impl<P> From<Launch<P>> for Call<P> {
    fn from(launch: Launch<P>) -> Self {
        Self::Launch(launch)
    }
}

/// An implementation of a node that uses a library.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative<Addr> {
    /// The weights it needs repacked.
    pub repacks: Vec<WeightRepack<Addr>>,
    /// The library operation.
    pub op: LibraryOp<Addr>,
    /// Launches after it.
    pub after: Vec<Launch<Addr>>,
}

impl<P: Copy> Alternative<P> {
    /// Maps every address.
    pub fn map_addrs<Q>(&self, f: impl Fn(P) -> Q + Copy) -> Alternative<Q> {
        Alternative {
            repacks: self.repacks.iter().map(|repack| repack.map_addrs(f)).collect(),
            op: self.op.map_addrs(f),
            after: self.after.iter().map(|launch| launch.map_addrs(f)).collect(),
        }
    }

    /// The calls, with this algorithm.
    pub fn calls(&self, algorithm: Algorithm) -> Vec<Call<P>> {
        let op = Call::Library(Box::new((self.op, algorithm)));
        [op].into_iter().chain(self.after.iter().cloned().map(Call::from)).collect()
    }
}
