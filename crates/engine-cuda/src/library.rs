//! Products that NVIDIA's libraries can make in place of our kernels: convolutions by cuDNN, plain matrix products by
//! cuBLASLt.
//!
//! `translate` says of a node which products would do and which of our kernels stand around them; where a library is there,
//! the executor times both when a plan is made, and takes what is faster.

use crate::ffi::libraries::{CublasLt, Cudnn};
use crate::gpu::Launch;
use crate::translate::Rows;

/// Whether libraries make products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Libraries {
    /// Our kernels make all: which are taken depends on nothing but the plan.
    #[default]
    Never,
    /// What is faster, by the clock.
    Timed,
    /// Wherever one can, by the algorithm of this number (counted round), for tests.
    Forced(usize),
}

/// A library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// Convolutions. Images are NHWC, weights `[cout, kh, kw, cin]`.
    Cudnn,
    /// Products of matrices: convolutions of 1x1, with weights `[cin, cout]`.
    CublasLt,
}

/// What is made of what, for the convolution `y = x * w`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// y of x and w.
    Forward,
    /// The gradient of x, of that of y and w.
    DataGrad,
    /// The gradient of w, of x and that of y.
    WeightGrad,
}

/// What factors are rounded to; sums are of f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Math {
    /// Nothing; factors are stored in f32.
    F32,
    /// tf32; factors are stored in f32.
    Tf32,
    /// bf16, in which factors are stored.
    Bf16,
}

/// A convolution's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Images.
    pub n: usize,
    /// Height and width of x.
    pub input: (usize, usize),
    /// Height and width of y.
    pub output: (usize, usize),
    /// The kernel's.
    pub kernel: (usize, usize),
    /// Steps.
    pub stride: (usize, usize),
    /// Zeros on each side.
    pub pad: (usize, usize),
    /// Channels of x.
    pub cin: usize,
    /// Channels of y.
    pub cout: usize,
}

impl Geometry {
    /// Whether this is a plain product of matrices `[rows, cin] [cin, cout]`.
    pub fn is_plain(&self) -> bool {
        (self.kernel, self.stride, self.pad) == ((1, 1), (1, 1), (0, 0)) && self.input == self.output
    }

    /// Whether the output's size follows from the rest as libraries reckon it, with as many zeros on each side.
    pub fn is_even(&self) -> bool {
        let fits = |size: usize, kernel: usize, stride: usize, pad: usize, out: usize| {
            size + 2 * pad >= kernel && (size + 2 * pad - kernel) / stride + 1 == out
        };
        fits(self.input.0, self.kernel.0, self.stride.0, self.pad.0, self.output.0)
            && fits(self.input.1, self.kernel.1, self.stride.1, self.pad.1, self.output.1)
    }

    /// Rows of a plain product.
    pub fn rows(&self) -> usize {
        self.n * self.input.0 * self.input.1
    }
}

/// One product. The lowest bit of its places means nothing: the formats stand here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product<Place> {
    /// Who makes it.
    pub library: Library,
    /// What is made.
    pub kind: Kind,
    /// The factors' format.
    pub math: Math,
    /// Whether the result is of bf16, as are bias and residual then; else f32.
    pub half_result: bool,
    /// Sizes.
    pub geometry: Geometry,
    /// x or its gradient.
    pub x: Place,
    /// w or its gradient.
    pub w: Place,
    /// y or its gradient.
    pub y: Place,
    /// Added to every pixel of the result.
    pub bias: Option<Place>,
    /// Of the result's shape, added to it.
    pub residual: Option<Place>,
    /// Memory for the library, which calls of one stream share, and its bytes.
    pub workspace: (Place, usize),
}

impl<P: Copy> Product<P> {
    /// The same with every place replaced.
    pub fn placed<Q>(&self, place: impl Fn(P) -> Q) -> Product<Q> {
        Product {
            library: self.library,
            kind: self.kind,
            math: self.math,
            half_result: self.half_result,
            geometry: self.geometry,
            x: place(self.x),
            w: place(self.w),
            y: place(self.y),
            bias: self.bias.map(&place),
            residual: self.residual.map(&place),
            workspace: (place(self.workspace.0), self.workspace.1),
        }
    }
}

/// How a library makes a product: its own words, and the bytes of the workspace that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Algorithm {
    /// What the library calls it.
    pub words: [u64; 8],
    /// Bytes.
    pub workspace: usize,
}

/// A call on a stream of the GPU.
#[derive(Clone, Debug, PartialEq)]
pub enum Call<Place> {
    /// Of a kernel.
    Launch(Launch<Place>),
    /// Of a library.
    Product(Box<(Product<Place>, Algorithm)>),
}

impl Call<usize> {
    /// Lets a library's product have its workspace so many bytes behind.
    pub fn shift_workspace(&mut self, by: usize) {
        if let Self::Product(both) = self {
            both.0.workspace.0 += by;
        }
    }
}

impl<P> From<Launch<P>> for Call<P> {
    fn from(launch: Launch<P>) -> Self {
        Self::Launch(launch)
    }
}

/// A way to make a node with a library's product.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative<Place> {
    /// What is kept of weights.
    pub rows: Vec<Rows<Place>>,
    /// The product.
    pub product: Product<Place>,
    /// The calls behind it.
    pub after: Vec<Launch<Place>>,
}

impl<P: Copy> Alternative<P> {
    /// The same with every place replaced.
    pub fn placed<Q>(&self, place: impl Fn(P) -> Q + Copy) -> Alternative<Q> {
        Alternative {
            rows: self.rows.iter().map(|rows| rows.placed(place)).collect(),
            product: self.product.placed(place),
            after: self.after.iter().map(|launch| launch.placed(place)).collect(),
        }
    }

    /// The calls with an algorithm.
    pub fn calls(&self, algorithm: Algorithm) -> Vec<Call<P>> {
        let product = Call::Product(Box::new((self.product, algorithm)));
        [product].into_iter().chain(self.after.iter().cloned().map(Call::from)).collect()
    }
}

/// cuDNN's version; or why it cannot be used.
///
/// # Errors
/// That it cannot be found, is too old, or lacks a function.
pub fn cudnn_version() -> Result<String, String> {
    Cudnn::version().map(|v| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100))
}

/// cuBLASLt's version; or why it cannot be used.
///
/// # Errors
/// As [`cudnn_version`].
pub fn cublaslt_version() -> Result<String, String> {
    CublasLt::version().map(|v| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100))
}

/// Whether any library is there.
pub fn any() -> bool {
    Cudnn::version().is_ok() || CublasLt::version().is_ok()
}

/// Describes a product to its library as is done before it is made, and compares the sizes that cuDNN gets for the result.
/// Needs no GPU.
///
/// # Errors
/// What the library says.
pub fn check_description(product: &Product<usize>) -> Result<(), String> {
    match product.library {
        Library::Cudnn => Cudnn::check_description(product),
        Library::CublasLt => CublasLt::check_description(product),
    }
}
