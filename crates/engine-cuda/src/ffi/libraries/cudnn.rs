//! cuDNN: convolutions.

use super::{Handle, Owned, address, functions, int, stream, text};
use crate::library::{Algorithm, ConvPass, LibraryOp, MathMode};
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

/// `cudnnConvolutionFwdAlgoPerf_t` and its two counterparts.
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

/// The oldest supported version.
const MIN_CUDNN: usize = 90_000;

impl CudnnFunctions {
    /// The functions, looked up once.
    pub(super) fn find() -> Result<&'static Self, String> {
        static FOUND: OnceLock<Result<CudnnFunctions, String>> = OnceLock::new();
        let look = || {
            // SAFETY: loading runs the library's initialisers; a library of that name, if any, is NVIDIA's.
            if !unsafe { nn::is_culib_present() } {
                return Err("cannot find libcudnn.so.9".to_owned());
            }
            let functions = Self::load()?;
            // SAFETY: the function takes no arguments.
            let version = unsafe { (functions.get_version)() };
            if version < MIN_CUDNN {
                return Err(format!("version {version} is too old: install cuDNN 9"));
            }
            Ok(functions)
        };
        FOUND.get_or_init(look).as_ref().map_err(Clone::clone)
    }

    pub(super) fn ok(&self, what: &str, status: c_int) -> Result<(), String> {
        // SAFETY: the function accepts any status.
        let message = || text(unsafe { (self.error_string)(status) });
        if status == 0 { Ok(()) } else { Err(format!("cuDNN: {what}: {}", message())) }
    }
}

/// A convolution as described to cuDNN.
struct Convolution {
    x: Owned,
    w: Owned,
    y: Owned,
    convolution: Owned,
    /// Bias descriptor and activation, if there is a bias.
    bias: Option<(Owned, Owned)>,
}

impl Convolution {
    fn new(f: &CudnnFunctions, p: &LibraryOp<usize>, math: c_int) -> Result<Self, String> {
        let g = &p.geometry;
        let data_type = match p.math {
            MathMode::Bf16 => nn::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            MathMode::F32 | MathMode::Tf32 => nn::cudnnDataType_t::CUDNN_DATA_FLOAT,
        } as c_int;
        let nhwc = nn::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC as c_int;
        let tensor = |dims: [usize; 4]| -> Result<Owned, String> {
            // SAFETY: the function writes a handle through the pointer.
            let create = |to| unsafe { (f.create_tensor)(to) };
            let created = Owned::new(create, f.destroy_tensor, |s| f.ok("tensor descriptor", s))?;
            let [n, h, w, c] = dims.map(int);
            // SAFETY: the handle was created above; the other arguments are integers.
            f.ok("tensor descriptor", unsafe {
                (f.set_tensor)(created.handle, nhwc, data_type, n?, c?, h?, w?)
            })?;
            Ok(created)
        };
        let x = tensor([g.n, g.input.0, g.input.1, g.cin])?;
        let y = tensor([g.n, g.output.0, g.output.1, g.cout])?;
        // SAFETY: the function writes a handle through the pointer.
        let create = |to| unsafe { (f.create_filter)(to) };
        let w = Owned::new(create, f.destroy_filter, |s| f.ok("filter descriptor", s))?;
        let [k, c, kh, kw] = [g.cout, g.cin, g.kernel.0, g.kernel.1].map(int);
        // SAFETY: the handle was created above; the other arguments are integers.
        f.ok("filter descriptor", unsafe { (f.set_filter)(w.handle, data_type, nhwc, k?, c?, kh?, kw?) })?;
        // SAFETY: the function writes a handle through the pointer.
        let create = |to| unsafe { (f.create_convolution)(to) };
        let convolution = Owned::new(create, f.destroy_convolution, |s| f.ok("convolution descriptor", s))?;
        let [ph, pw, sy, sx] = [g.pad.0, g.pad.1, g.stride.0, g.stride.1].map(int);
        let mode = nn::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION as c_int;
        let sums = nn::cudnnDataType_t::CUDNN_DATA_FLOAT as c_int;
        // SAFETY: as above.
        let set = unsafe { (f.set_convolution)(convolution.handle, ph?, pw?, sy?, sx?, 1, 1, mode, sums) };
        f.ok("convolution descriptor", set)?;
        // SAFETY: as above.
        f.ok("math type", unsafe { (f.set_math)(convolution.handle, math) })?;
        let bias = match p.bias {
            None => None,
            Some(_) => {
                // SAFETY: the function writes a handle through the pointer.
                let create = |to| unsafe { (f.create_activation)(to) };
                let activation =
                    Owned::new(create, f.destroy_activation, |s| f.ok("activation descriptor", s))?;
                let identity = nn::cudnnActivationMode_t::CUDNN_ACTIVATION_IDENTITY as c_int;
                let nan = nn::cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN as c_int;
                // SAFETY: the handle was created above; the other arguments are numbers.
                let set = unsafe { (f.set_activation)(activation.handle, identity, nan, 0.0) };
                f.ok("activation descriptor", set)?;
                Some((tensor([1, 1, 1, g.cout])?, activation))
            }
        };
        let created = Self { x, w, y, convolution, bias };
        let mut got = [0; 4];
        let [n, c, h, w] = &mut got;
        // SAFETY: the handles were created above, and the function writes four ints through the pointers.
        let status = unsafe {
            (f.output_size)(created.convolution.handle, created.x.handle, created.w.handle, n, c, h, w)
        };
        f.ok("output size", status)?;
        let want = [g.n, g.cout, g.output.0, g.output.1];
        if got.iter().zip(want).any(|(&got, want)| usize::try_from(got) != Ok(want)) {
            return Err(format!("cuDNN: the result has shape {got:?} (NCHW), expected {want:?}"));
        }
        Ok(created)
    }
}

/// cuDNN.
pub struct Cudnn {
    functions: &'static CudnnFunctions,
    handle: Owned,
}

// SAFETY: cuDNN allows calls with one handle from any thread if they do not overlap: the owner of a handle is not `Sync` (its
// pointers are not), so no two threads use it at once.
unsafe impl Send for Cudnn {}

impl Cudnn {
    /// 10000 major + 100 minor + patch; or why it cannot be used.
    pub fn version() -> Result<usize, String> {
        // SAFETY: the function takes no arguments.
        CudnnFunctions::find().map(|f| unsafe { (f.get_version)() })
    }

    /// A CUDA context must be current, here and in all calls.
    pub fn new() -> Result<Self, String> {
        let f = CudnnFunctions::find()?;
        // SAFETY: the function writes a handle through the pointer.
        let create = |to| unsafe { (f.create)(to) };
        Ok(Self { functions: f, handle: Owned::new(create, f.destroy, |s| f.ok("initialisation", s))? })
    }

    pub fn check_description(p: &LibraryOp<usize>) -> Result<(), String> {
        let math = nn::cudnnMathType_t::CUDNN_DEFAULT_MATH as c_int;
        Convolution::new(CudnnFunctions::find()?, p, math).map(|_| ())
    }

    /// Algorithms for an operation that fit its workspace, expected fastest first; only those with a deterministic summation order.
    pub fn algorithms(&self, p: &LibraryOp<usize>) -> Result<Vec<Algorithm>, String> {
        let (f, handle) = (self.functions, self.handle.handle);
        let requested = match p.math {
            MathMode::F32 => nn::cudnnMathType_t::CUDNN_FMA_MATH,
            MathMode::Tf32 => nn::cudnnMathType_t::CUDNN_DEFAULT_MATH,
            MathMode::Bf16 => nn::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        } as c_int;
        let c = Convolution::new(f, p, requested)?;
        let [x, w, y, convolution] = [&c.x, &c.w, &c.y, &c.convolution].map(|owned| owned.handle);
        let (count_of, list, operands) = match p.pass {
            ConvPass::Forward => (f.forward_count, f.forward_algorithms, [x, w, convolution, y]),
            ConvPass::DataGrad => (f.data_count, f.data_algorithms, [w, y, convolution, x]),
            ConvPass::WeightGrad => (f.filter_count, f.filter_algorithms, [x, y, convolution, w]),
        };
        let mut max_count = 0;
        // SAFETY: the handle is alive, and the function writes an int through the pointer.
        f.ok("counting algorithms", unsafe { count_of(handle, &mut max_count) })?;
        let mut all = vec![Performance::default(); usize::try_from(max_count).unwrap_or(0).min(64)];
        let (room, mut count) = (int(all.len())?, 0);
        let [a, b, c_, d] = operands;
        // SAFETY: the handles are alive and in the order that the function expects; it writes at most `room` elements, and their
        // count.
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
                && (p.math != MathMode::F32 || !rounding.contains(&a.math))
        };
        let algorithm = |a: &Performance| {
            // Request unrounded operands explicitly, as the default math may round.
            let math = if p.math == MathMode::F32 { requested } else { a.math };
            let mut words = [0; 8];
            words[0] = a.algorithm as u64;
            words[1] = math as u64;
            Algorithm { words, workspace: a.memory }
        };
        Ok(all.iter().filter(wanted).map(algorithm).collect())
    }

    /// Starts an operation on a stream, whose context must be current; addresses are offsets from `base`.
    pub fn run(
        &self,
        on: &CudaStream,
        base: u64,
        p: &LibraryOp<usize>,
        algorithm: &Algorithm,
    ) -> Result<(), String> {
        let (f, handle) = (self.functions, self.handle.handle);
        // SAFETY: the handle and the stream are alive.
        f.ok("setting the stream", unsafe { (f.set_stream)(handle, stream(on)) })?;
        let [algorithm_index, math] = [0, 1].map(|i| c_int::try_from(algorithm.words[i]).unwrap_or(-1));
        let c = Convolution::new(f, p, math)?;
        let convolution = c.convolution.handle;
        let [x, w, y] = [(&c.x, p.x), (&c.w, p.w), (&c.y, p.y)].map(|(d, at)| (d.handle, address(base, at)));
        let (workspace, bytes) = (address(base, p.workspace.0), algorithm.workspace);
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the handles are alive. The addresses lie in the GPU's single allocation, which outlives the stream, and the
        // memory behind them is as large as the descriptors state, as both follow from the plan's sizes; the workspace has at
        // least the bytes that the algorithm requires, and calls on one stream use it one after another. The scalars are read
        // before the call returns.
        let status = unsafe {
            match (p.pass, p.bias.zip(c.bias.as_ref())) {
                (ConvPass::Forward, Some((bias, (like, activation)))) => {
                    let (beta, residual) = match p.residual {
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
                        algorithm_index,
                        workspace,
                        bytes,
                        &beta,
                        y.0,
                        residual,
                        like.handle,
                        address(base, bias),
                        activation.handle,
                        y.0,
                        y.1,
                    )
                }
                // The other functions take two operands and a result, and differ in what these are.
                (pass, _) => {
                    let (make, left, right, to) = match pass {
                        ConvPass::Forward => (f.forward, x, w, y),
                        ConvPass::DataGrad => (f.data_gradient, w, y, x),
                        ConvPass::WeightGrad => (f.filter_gradient, x, y, w),
                    };
                    make(
                        handle,
                        &one,
                        left.0,
                        left.1,
                        right.0,
                        right.1,
                        convolution,
                        algorithm_index,
                        workspace,
                        bytes,
                        &zero,
                        to.0,
                        to.1,
                    )
                }
            }
        };
        f.ok("convolution", status)
    }
}
