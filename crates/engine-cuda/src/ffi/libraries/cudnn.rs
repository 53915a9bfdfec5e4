//! cuDNN: convolutions.

use super::{Handle, Owned, address, functions, int, stream, text};
use crate::library::{Algorithm, Kind, Math, Product};
use cudarc::cudnn::sys as nn;
use cudarc::driver::CudaStream;
use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

functions!(CudnnFunctions of nn::culib {
    get_version "cudnnGetVersion" () -> usize;
    error_string "cudnnGetErrorString" (c_int) -> *const c_char;
    create "cudnnCreate" (*mut Handle);
    destroy "cudnnDestroy" (Handle);
    set_stream "cudnnSetStream" (Handle, Handle);
    create_tensor "cudnnCreateTensorDescriptor" (*mut Handle);
    set_tensor "cudnnSetTensor4dDescriptor" (Handle, c_int, c_int, c_int, c_int, c_int, c_int);
    destroy_tensor "cudnnDestroyTensorDescriptor" (Handle);
    create_filter "cudnnCreateFilterDescriptor" (*mut Handle);
    set_filter "cudnnSetFilter4dDescriptor" (Handle, c_int, c_int, c_int, c_int, c_int, c_int);
    destroy_filter "cudnnDestroyFilterDescriptor" (Handle);
    create_convolution "cudnnCreateConvolutionDescriptor" (*mut Handle);
    set_convolution "cudnnSetConvolution2dDescriptor"
        (Handle, c_int, c_int, c_int, c_int, c_int, c_int, c_int, c_int);
    set_math "cudnnSetConvolutionMathType" (Handle, c_int);
    destroy_convolution "cudnnDestroyConvolutionDescriptor" (Handle);
    create_activation "cudnnCreateActivationDescriptor" (*mut Handle);
    set_activation "cudnnSetActivationDescriptor" (Handle, c_int, c_int, f64);
    destroy_activation "cudnnDestroyActivationDescriptor" (Handle);
    output_size "cudnnGetConvolution2dForwardOutputDim"
        (Handle, Handle, Handle, *mut c_int, *mut c_int, *mut c_int, *mut c_int);
    forward_count "cudnnGetConvolutionForwardAlgorithmMaxCount" (Handle, *mut c_int);
    data_count "cudnnGetConvolutionBackwardDataAlgorithmMaxCount" (Handle, *mut c_int);
    filter_count "cudnnGetConvolutionBackwardFilterAlgorithmMaxCount" (Handle, *mut c_int);
    forward_algorithms "cudnnGetConvolutionForwardAlgorithm_v7"
        (Handle, Handle, Handle, Handle, Handle, c_int, *mut c_int, *mut Performance);
    data_algorithms "cudnnGetConvolutionBackwardDataAlgorithm_v7"
        (Handle, Handle, Handle, Handle, Handle, c_int, *mut c_int, *mut Performance);
    filter_algorithms "cudnnGetConvolutionBackwardFilterAlgorithm_v7"
        (Handle, Handle, Handle, Handle, Handle, c_int, *mut c_int, *mut Performance);
    forward "cudnnConvolutionForward"
        (Handle, *const f32, Handle, u64, Handle, u64, Handle, c_int, u64, usize, *const f32, Handle, u64);
    forward_with_bias "cudnnConvolutionBiasActivationForward"
        (Handle, *const f32, Handle, u64, Handle, u64, Handle, c_int, u64, usize, *const f32, Handle, u64, Handle, u64,
            Handle, Handle, u64);
    data_gradient "cudnnConvolutionBackwardData"
        (Handle, *const f32, Handle, u64, Handle, u64, Handle, c_int, u64, usize, *const f32, Handle, u64);
    filter_gradient "cudnnConvolutionBackwardFilter"
        (Handle, *const f32, Handle, u64, Handle, u64, Handle, c_int, u64, usize, *const f32, Handle, u64);
});

/// `cudnnConvolutionFwdAlgoPerf_t` and its two sisters.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Performance {
    algorithm: c_int,
    status: c_int,
    time: f32,
    memory: usize,
    determinism: c_int,
    math: c_int,
    reserved: [c_int; 3],
}

const _: () = {
    assert!(size_of::<Performance>() == size_of::<nn::cudnnConvolutionFwdAlgoPerf_t>());
    assert!(size_of::<Performance>() == size_of::<nn::cudnnConvolutionBwdDataAlgoPerf_t>());
    assert!(size_of::<Performance>() == size_of::<nn::cudnnConvolutionBwdFilterAlgoPerf_t>());
};

/// The oldest version that is taken.
const OLDEST_CUDNN: usize = 90_000;

impl CudnnFunctions {
    /// Looked for once.
    pub(super) fn find() -> Result<&'static Self, String> {
        static FOUND: OnceLock<Result<CudnnFunctions, String>> = OnceLock::new();
        let look = || {
            // SAFETY: loading runs the library's initialisers; it is NVIDIA's library, or nothing of that name is there.
            if !unsafe { nn::is_culib_present() } {
                return Err("libcudnn.so.9 cannot be found".to_owned());
            }
            let functions = Self::load()?;
            // SAFETY: the function takes nothing.
            let version = unsafe { (functions.get_version)() };
            if version < OLDEST_CUDNN {
                return Err(format!("version {version} is too old: take cuDNN 9"));
            }
            Ok(functions)
        };
        FOUND.get_or_init(look).as_ref().map_err(Clone::clone)
    }

    pub(super) fn ok(&self, what: &str, status: c_int) -> Result<(), String> {
        // SAFETY: the function takes any number.
        let words = || text(unsafe { (self.error_string)(status) });
        if status == 0 { Ok(()) } else { Err(format!("cuDNN: {what}: {}", words())) }
    }
}

/// A convolution as cuDNN is told of it.
struct Convolution {
    x: Owned,
    w: Owned,
    y: Owned,
    convolution: Owned,
    /// Bias and activation, where there is a bias.
    bias: Option<(Owned, Owned)>,
}

impl Convolution {
    fn new(f: &CudnnFunctions, p: &Product<usize>, math: c_int) -> Result<Self, String> {
        let g = &p.geometry;
        let kind = match p.math {
            Math::Bf16 => nn::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            Math::F32 | Math::Tf32 => nn::cudnnDataType_t::CUDNN_DATA_FLOAT,
        } as c_int;
        let nhwc = nn::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC as c_int;
        let tensor = |dims: [usize; 4]| -> Result<Owned, String> {
            // SAFETY: the function writes a handle to where it is told.
            let create = |to| unsafe { (f.create_tensor)(to) };
            let made = Owned::new(create, f.destroy_tensor, |s| f.ok("a tensor", s))?;
            let [n, h, w, c] = dims.map(int);
            // SAFETY: the handle was made above; the rest are numbers.
            f.ok("a tensor", unsafe { (f.set_tensor)(made.handle, nhwc, kind, n?, c?, h?, w?) })?;
            Ok(made)
        };
        let x = tensor([g.n, g.input.0, g.input.1, g.cin])?;
        let y = tensor([g.n, g.output.0, g.output.1, g.cout])?;
        // SAFETY: the function writes a handle to where it is told.
        let create = |to| unsafe { (f.create_filter)(to) };
        let w = Owned::new(create, f.destroy_filter, |s| f.ok("weights", s))?;
        let [k, c, kh, kw] = [g.cout, g.cin, g.kernel.0, g.kernel.1].map(int);
        // SAFETY: the handle was made above; the rest are numbers.
        f.ok("weights", unsafe { (f.set_filter)(w.handle, kind, nhwc, k?, c?, kh?, kw?) })?;
        // SAFETY: the function writes a handle to where it is told.
        let create = |to| unsafe { (f.create_convolution)(to) };
        let convolution = Owned::new(create, f.destroy_convolution, |s| f.ok("a convolution", s))?;
        let [ph, pw, sy, sx] = [g.pad.0, g.pad.1, g.stride.0, g.stride.1].map(int);
        let mode = nn::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION as c_int;
        let sums = nn::cudnnDataType_t::CUDNN_DATA_FLOAT as c_int;
        // SAFETY: as above.
        let set = unsafe { (f.set_convolution)(convolution.handle, ph?, pw?, sy?, sx?, 1, 1, mode, sums) };
        f.ok("a convolution", set)?;
        // SAFETY: as above.
        f.ok("its arithmetic", unsafe { (f.set_math)(convolution.handle, math) })?;
        let bias = match p.bias {
            None => None,
            Some(_) => {
                // SAFETY: the function writes a handle to where it is told.
                let create = |to| unsafe { (f.create_activation)(to) };
                let activation = Owned::new(create, f.destroy_activation, |s| f.ok("an activation", s))?;
                let identity = nn::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY as c_int;
                let nan = nn::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN as c_int;
                // SAFETY: the handle was made above; the rest are numbers.
                let set = unsafe { (f.set_activation)(activation.handle, identity, nan, 0.0) };
                f.ok("an activation", set)?;
                Some((tensor([1, 1, 1, g.cout])?, activation))
            }
        };
        let made = Self { x, w, y, convolution, bias };
        let mut got = [0; 4];
        let [n, c, h, w] = &mut got;
        // SAFETY: the handles were made above, and the function writes four ints to where it is told.
        let status =
            unsafe { (f.output_size)(made.convolution.handle, made.x.handle, made.w.handle, n, c, h, w) };
        f.ok("the result's size", status)?;
        let want = [g.n, g.cout, g.output.0, g.output.1];
        match got.iter().zip(want).all(|(&got, want)| usize::try_from(got) == Ok(want)) {
            true => Ok(made),
            false => Err(format!("cuDNN: the result would be {got:?} (NCHW), not {want:?}")),
        }
    }
}

/// cuDNN.
pub struct Cudnn {
    functions: &'static CudnnFunctions,
    handle: Owned,
}

// SAFETY: cuDNN wants calls with one handle to be made one after the other, from whatever thread: what holds it is not
// `Sync` (its pointers are not), so no two threads have it at once.
unsafe impl Send for Cudnn {}

impl Cudnn {
    /// 10000 major + 100 minor + patch; or why it cannot be used.
    pub fn version() -> Result<usize, String> {
        // SAFETY: the function takes nothing.
        CudnnFunctions::find().map(|f| unsafe { (f.get_version)() })
    }

    /// A context must be current, here and in all calls.
    pub fn new() -> Result<Self, String> {
        let f = CudnnFunctions::find()?;
        // SAFETY: the function writes a handle to where it is told.
        let create = |to| unsafe { (f.create)(to) };
        Ok(Self { functions: f, handle: Owned::new(create, f.destroy, |s| f.ok("a start", s))? })
    }

    pub fn check_description(p: &Product<usize>) -> Result<(), String> {
        let math = nn::cudnnMathType_t::CUDNN_DEFAULT_MATH as c_int;
        Convolution::new(CudnnFunctions::find()?, p, math).map(|_| ())
    }

    /// The algorithms that can make a product within its workspace, the likely fastest first; none whose sums are in no fixed
    /// order.
    pub fn algorithms(&self, p: &Product<usize>) -> Result<Vec<Algorithm>, String> {
        let (f, handle) = (self.functions, self.handle.handle);
        let asked = match p.math {
            Math::F32 => nn::cudnnMathType_t::CUDNN_FMA_MATH,
            Math::Tf32 => nn::cudnnMathType_t::CUDNN_DEFAULT_MATH,
            Math::Bf16 => nn::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        } as c_int;
        let c = Convolution::new(f, p, asked)?;
        let [x, w, y, convolution] = [&c.x, &c.w, &c.y, &c.convolution].map(|owned| owned.handle);
        let (count_of, list, operands) = match p.kind {
            Kind::Forward => (f.forward_count, f.forward_algorithms, [x, w, convolution, y]),
            Kind::DataGrad => (f.data_count, f.data_algorithms, [w, y, convolution, x]),
            Kind::WeightGrad => (f.filter_count, f.filter_algorithms, [x, y, convolution, w]),
        };
        let mut most = 0;
        // SAFETY: the handle is alive, and the function writes an int to where it is told.
        f.ok("counting algorithms", unsafe { count_of(handle, &mut most) })?;
        let mut all = vec![Performance::default(); usize::try_from(most).unwrap_or(0).min(64)];
        let (room, mut count) = (int(all.len())?, 0);
        let [a, b, c_, d] = operands;
        // SAFETY: the handles are alive and stand in the order of the function; it writes at most `room` elements, and their
        // number.
        let status = unsafe { list(handle, a, b, c_, d, room, &mut count, all.as_mut_ptr()) };
        f.ok("listing algorithms", status)?;
        all.truncate(usize::try_from(count).unwrap_or(0));
        let fixed_order = nn::cudnnDeterminism_t::CUDNN_DETERMINISTIC as c_int;
        let only =
            p.bias.map(|_| nn::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM);
        let rounding = [
            nn::cudnnMathType_t::CUDNN_TENSOR_OP_MATH as c_int,
            nn::cudnnMathType_t::CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION as c_int,
        ];
        let wanted = |a: &&Performance| {
            a.status == 0
                && a.memory <= p.workspace.1
                && a.determinism == fixed_order
                && only.is_none_or(|only| a.algorithm == only as c_int)
                && (p.math != Math::F32 || !rounding.contains(&a.math))
        };
        let algorithm = |a: &Performance| {
            // What rounds nothing is asked for by name, for the default may round.
            let math = if p.math == Math::F32 { asked } else { a.math };
            let mut words = [0; 8];
            words[0] = a.algorithm as u64;
            words[1] = math as u64;
            Algorithm { words, workspace: a.memory }
        };
        Ok(all.iter().filter(wanted).map(algorithm).collect())
    }

    /// Starts a product on a stream, whose context must be current; places are offsets from `base`.
    pub fn product(
        &self,
        on: &CudaStream,
        base: u64,
        p: &Product<usize>,
        algorithm: &Algorithm,
    ) -> Result<(), String> {
        let (f, handle) = (self.functions, self.handle.handle);
        // SAFETY: the handle and the stream are alive.
        f.ok("a stream", unsafe { (f.set_stream)(handle, stream(on)) })?;
        let [number, math] = [0, 1].map(|i| c_int::try_from(algorithm.words[i]).unwrap_or(-1));
        let c = Convolution::new(f, p, math)?;
        let convolution = c.convolution.handle;
        let [x, w, y] = [(&c.x, p.x), (&c.w, p.w), (&c.y, p.y)].map(|(d, at)| (d.handle, address(base, at)));
        let (workspace, bytes) = (address(base, p.workspace.0), algorithm.workspace);
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the handles are alive. The places lie in the GPU's one piece of memory, which outlives the stream, and are as
        // large as the descriptors say, as these are made of the plan's sizes; the workspace has at least the bytes that the
        // algorithm asked for, and calls on the one stream use it one after the other. The factors are read before the call
        // returns.
        let status = unsafe {
            match (p.kind, p.bias.zip(c.bias.as_ref())) {
                (Kind::Forward, Some((bias, (like, activation)))) => {
                    let (factor, residual) = match p.residual {
                        Some(residual) => (one, address(base, residual)),
                        None => (zero, y.1),
                    };
                    (f.forward_with_bias)(
                        handle,
                        &one,
                        x.0,
                        x.1,
                        w.0,
                        w.1,
                        convolution,
                        number,
                        workspace,
                        bytes,
                        &factor,
                        y.0,
                        residual,
                        like.handle,
                        address(base, bias),
                        activation.handle,
                        y.0,
                        y.1,
                    )
                }
                // The others take two factors and a result, and differ in what these are.
                (kind, _) => {
                    let (make, left, right, to) = match kind {
                        Kind::Forward => (f.forward, x, w, y),
                        Kind::DataGrad => (f.data_gradient, w, y, x),
                        Kind::WeightGrad => (f.filter_gradient, x, y, w),
                    };
                    make(
                        handle,
                        &one,
                        left.0,
                        left.1,
                        right.0,
                        right.1,
                        convolution,
                        number,
                        workspace,
                        bytes,
                        &zero,
                        to.0,
                        to.1,
                    )
                }
            }
        };
        f.ok("a convolution", status)
    }
}
