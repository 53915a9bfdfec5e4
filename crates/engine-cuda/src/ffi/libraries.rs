//! cuDNN and cuBLASLt. Types and constants are cudarc's. The functions are looked up here, all of a library at once, so that
//! a missing library or function is an answer and no panic; and what they return are numbers here, as a newer library may have
//! codes that cudarc's types do not know.

use crate::library::{Algorithm, Kind, Math, Product};
use cudarc::cublaslt::sys as lt;
use cudarc::cudnn::sys as nn;
use cudarc::driver::CudaStream;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// An object of a library.
type Handle = *mut c_void;
/// What ends one.
type Destroy = unsafe extern "C" fn(Handle) -> c_int;

/// A library's functions. Each returns a status unless it says something else; 0 is success.
macro_rules! functions {
    ($name:ident of $library:path { $($field:ident $symbol:literal ($($arg:ty),*) $(-> $out:ty)?;)* }) => {
        struct $name {
            $($field: unsafe extern "C" fn($($arg),*) -> functions!(@ $($out)?),)*
        }

        impl $name {
            /// Looks all of them up. The library must be there.
            fn load() -> Result<Self, String> {
                // SAFETY: loading runs the library's initialisers; it is NVIDIA's library.
                let library = unsafe { $library() };
                Ok(Self {
                    // SAFETY: the signature is that of NVIDIA's header, as in cudarc's bindings, with numbers for its
                    // enumerations; the library is never unloaded.
                    $($field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }
                        .map_err(|_| format!("it has no function {}", $symbol))?,)*
                })
            }
        }
    };
    (@) => { c_int };
    (@ $out:ty) => { $out };
}

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

functions!(LtFunctions of lt::culib {
    get_version "cublasLtGetVersion" () -> usize;
    status_string "cublasLtGetStatusString" (c_int) -> *const c_char;
    create "cublasLtCreate" (*mut Handle);
    destroy "cublasLtDestroy" (Handle);
    create_product "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int);
    set_product "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize);
    destroy_product "cublasLtMatmulDescDestroy" (Handle);
    create_layout "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64);
    destroy_layout "cublasLtMatrixLayoutDestroy" (Handle);
    create_preference "cublasLtMatmulPreferenceCreate" (*mut Handle);
    set_preference "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize);
    destroy_preference "cublasLtMatmulPreferenceDestroy" (Handle);
    algorithms "cublasLtMatmulAlgoGetHeuristic"
        (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int);
    product "cublasLtMatmul"
        (Handle, Handle, *const f32, u64, Handle, u64, Handle, *const f32, u64, Handle, u64, Handle, *const [u64; 8], u64,
            usize, Handle);
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

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    status: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = {
    assert!(size_of::<Performance>() == size_of::<nn::cudnnConvolutionFwdAlgoPerf_t>());
    assert!(size_of::<Performance>() == size_of::<nn::cudnnConvolutionBwdDataAlgoPerf_t>());
    assert!(size_of::<Performance>() == size_of::<nn::cudnnConvolutionBwdFilterAlgoPerf_t>());
    assert!(size_of::<Heuristic>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>());
};

/// Words of a library, which must have some.
fn text(words: *const c_char) -> String {
    if words.is_null() {
        return "an unknown error".to_owned();
    }
    // SAFETY: the libraries give constant strings that end with a zero.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

/// An object that is destroyed when it goes.
struct Owned {
    handle: Handle,
    destroy: Destroy,
}

impl Owned {
    /// What `create` writes to where it is told.
    fn new(
        create: impl FnOnce(*mut Handle) -> c_int,
        destroy: Destroy,
        ok: impl FnOnce(c_int) -> Result<(), String>,
    ) -> Result<Self, String> {
        let mut handle = std::ptr::null_mut();
        ok(create(&mut handle))?;
        Ok(Self { handle, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the library made the object, `destroy` is its function for this, and nobody else calls it. An error leaves
        // nothing to do.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

/// The stream as libraries take it.
fn stream(stream: &CudaStream) -> Handle {
    stream.cu_stream().cast()
}

/// An address, without the bit that tells a format to kernels.
fn address(base: u64, place: usize) -> u64 {
    base + (place as u64 & !1)
}

/// A size as an int.
fn int(v: usize) -> Result<c_int, String> {
    c_int::try_from(v).map_err(|_| format!("{v} is more than the library counts to"))
}

// --------------------------------------------------------------------------------------------------------------- cuDNN

/// The oldest version that is taken.
const OLDEST_CUDNN: usize = 90_000;

impl CudnnFunctions {
    /// Looked for once.
    fn find() -> Result<&'static Self, String> {
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

    fn ok(&self, what: &str, status: c_int) -> Result<(), String> {
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
                (Kind::Forward, None) => (f.forward)(
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
                    &zero,
                    y.0,
                    y.1,
                ),
                (Kind::DataGrad, _) => (f.data_gradient)(
                    handle,
                    &one,
                    w.0,
                    w.1,
                    y.0,
                    y.1,
                    convolution,
                    number,
                    workspace,
                    bytes,
                    &zero,
                    x.0,
                    x.1,
                ),
                (Kind::WeightGrad, _) => (f.filter_gradient)(
                    handle,
                    &one,
                    x.0,
                    x.1,
                    y.0,
                    y.1,
                    convolution,
                    number,
                    workspace,
                    bytes,
                    &zero,
                    w.0,
                    w.1,
                ),
            }
        };
        f.ok("a convolution", status)
    }
}

// ------------------------------------------------------------------------------------------------------------ cuBLASLt

/// The oldest version that is taken.
const OLDEST_CUBLAS: usize = 120_000;
/// Algorithms that are asked for.
const MOST_ALGORITHMS: usize = 8;
/// Every tensor begins at a multiple of so many bytes.
const ALIGNMENT: u32 = 64;

impl LtFunctions {
    /// Looked for once.
    fn find() -> Result<&'static Self, String> {
        static FOUND: OnceLock<Result<LtFunctions, String>> = OnceLock::new();
        let look = || {
            // SAFETY: loading runs the library's initialisers; it is NVIDIA's library, or nothing of that name is there.
            if !unsafe { lt::is_culib_present() } {
                return Err("libcublasLt.so.13 (or .12) cannot be found".to_owned());
            }
            let functions = Self::load()?;
            // SAFETY: the function takes nothing.
            let version = unsafe { (functions.get_version)() };
            if version < OLDEST_CUBLAS {
                return Err(format!("version {version} is too old: take that of CUDA 12 or 13"));
            }
            Ok(functions)
        };
        FOUND.get_or_init(look).as_ref().map_err(Clone::clone)
    }

    fn ok(&self, what: &str, status: c_int) -> Result<(), String> {
        // SAFETY: the function takes any number.
        let words = || text(unsafe { (self.status_string)(status) });
        if status == 0 { Ok(()) } else { Err(format!("cuBLASLt: {what}: {}", words())) }
    }

    /// Sets an attribute of an object, which must be what `set` is for.
    fn set<T: bytemuck::NoUninit>(
        &self,
        set: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
        object: &Owned,
        attribute: c_int,
        value: T,
    ) -> Result<(), String> {
        // SAFETY: the object is alive, and as many bytes are read as the value has.
        let status = unsafe { set(object.handle, attribute, (&raw const value).cast(), size_of::<T>()) };
        self.ok("an attribute", status)
    }
}

/// A product as cuBLASLt is told of it. Its matrices are stored by columns: ours, transposed. So the result's transpose is
/// made of the factors' ones, in the other order.
struct Matrices {
    product: Owned,
    a: Owned,
    b: Owned,
    /// Of the result, and of what is added to it.
    result: Owned,
    /// The places of a, b and the result.
    places: [usize; 3],
}

impl Matrices {
    fn new(f: &LtFunctions, base: u64, p: &Product<usize>) -> Result<Self, String> {
        use lt::cublasComputeType_t as Compute;
        use lt::cublasLtMatmulDescAttributes_t as Attribute;
        let (floats, halves) =
            (lt::cudaDataType_t::CUDA_R_32F as c_int, lt::cudaDataType_t::CUDA_R_16BF as c_int);
        let format = |half: bool| if half { halves } else { floats };
        let compute = match p.math {
            Math::Tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            Math::F32 | Math::Bf16 => Compute::CUBLAS_COMPUTE_32F,
        } as c_int;
        // SAFETY: the function writes a handle to where it is told.
        let create = |to| unsafe { (f.create_product)(to, compute, floats) };
        let product = Owned::new(create, f.destroy_product, |s| f.ok("a product", s))?;
        let (rows, cin, cout) = (p.geometry.rows(), p.geometry.cin, p.geometry.cout);
        // [columns of ours, rows of ours], its place, whether it is transposed
        let (w, x, y) = ([cout, cin], [cin, rows], [cout, rows]);
        let (a, b, result) = match p.kind {
            Kind::Forward => ((w, p.w, false), (x, p.x, false), (y, p.y)),
            Kind::DataGrad => ((w, p.w, true), (y, p.y, false), (x, p.x)),
            Kind::WeightGrad => ((y, p.y, false), (x, p.x, true), (w, p.w)),
        };
        let layout = |[height, width]: [usize; 2], format: c_int| {
            let stride = i64::try_from(height).map_err(|e| e.to_string())?;
            // SAFETY: the function writes a handle to where it is told.
            let create = |to| unsafe { (f.create_layout)(to, format, height as u64, width as u64, stride) };
            Owned::new(create, f.destroy_layout, |s| f.ok("a matrix", s))
        };
        // CUBLAS_OP_N and CUBLAS_OP_T.
        let [of_a, of_b] = [a.2, b.2].map(c_int::from);
        f.set(f.set_product, &product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA as c_int, of_a)?;
        f.set(f.set_product, &product, Attribute::CUBLASLT_MATMUL_DESC_TRANSB as c_int, of_b)?;
        if let Some(bias) = p.bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            f.set(f.set_product, &product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE as c_int, epilogue)?;
            // Of the result's format, where nothing else is said.
            let at = address(base, bias);
            f.set(f.set_product, &product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER as c_int, at)?;
        }
        let factors = format(p.math == Math::Bf16);
        Ok(Self {
            product,
            a: layout(a.0, factors)?,
            b: layout(b.0, factors)?,
            result: layout(result.0, format(p.half_result))?,
            places: [a.1, b.1, result.1],
        })
    }
}

/// cuBLASLt.
pub struct CublasLt {
    functions: &'static LtFunctions,
    handle: Owned,
}

// SAFETY: as for cuDNN; cuBLASLt's handle may even be used by several threads at once.
unsafe impl Send for CublasLt {}

impl CublasLt {
    /// 10000 major + 100 minor + patch; or why it cannot be used.
    pub fn version() -> Result<usize, String> {
        // SAFETY: the function takes nothing.
        LtFunctions::find().map(|f| unsafe { (f.get_version)() })
    }

    /// A context must be current, here and in all calls.
    pub fn new() -> Result<Self, String> {
        let f = LtFunctions::find()?;
        // SAFETY: the function writes a handle to where it is told.
        let create = |to| unsafe { (f.create)(to) };
        Ok(Self { functions: f, handle: Owned::new(create, f.destroy, |s| f.ok("a start", s))? })
    }

    pub fn check_description(p: &Product<usize>) -> Result<(), String> {
        Matrices::new(LtFunctions::find()?, 0, p).map(|_| ())
    }

    /// The algorithms that can make a product within its workspace, the likely fastest first.
    pub fn algorithms(&self, base: u64, p: &Product<usize>) -> Result<Vec<Algorithm>, String> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let f = self.functions;
        let m = Matrices::new(f, base, p)?;
        // SAFETY: the function writes a handle to where it is told.
        let create = |to| unsafe { (f.create_preference)(to) };
        let preference = Owned::new(create, f.destroy_preference, |s| f.ok("a preference", s))?;
        let most = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as c_int;
        f.set(f.set_preference, &preference, most, p.workspace.1)?;
        for alignment in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            f.set(f.set_preference, &preference, alignment as c_int, ALIGNMENT)?;
        }
        let mut all = [Heuristic::default(); MOST_ALGORITHMS];
        let (room, mut count) = (int(all.len())?, 0);
        let result = m.result.handle;
        let [product, a, b, preference] = [&m.product, &m.a, &m.b, &preference].map(|owned| owned.handle);
        // SAFETY: the handles are alive; the function writes at most `room` elements, and their number.
        let status = unsafe {
            (f.algorithms)(
                self.handle.handle,
                product,
                a,
                b,
                result,
                result,
                preference,
                room,
                all.as_mut_ptr(),
                &mut count,
            )
        };
        f.ok("listing algorithms", status)?;
        let found = &all[..usize::try_from(count).unwrap_or(0).min(MOST_ALGORITHMS)];
        let wanted = |h: &&Heuristic| h.status == 0 && h.workspace <= p.workspace.1;
        let algorithm = |h: &Heuristic| Algorithm { words: h.algorithm, workspace: h.workspace };
        Ok(found.iter().filter(wanted).map(algorithm).collect())
    }

    /// Starts a product on a stream, whose context must be current; places are offsets from `base`.
    pub fn product(
        &self,
        on: &CudaStream,
        base: u64,
        p: &Product<usize>,
        algorithm: &Algorithm,
    ) -> Result<(), String> {
        let f = self.functions;
        let m = Matrices::new(f, base, p)?;
        let [a, b, result] = m.places.map(|at| address(base, at));
        let (one, beta) = (1.0f32, if p.residual.is_some() { 1.0f32 } else { 0.0 });
        let added = p.residual.map_or(result, |at| address(base, at));
        let (workspace, like) = (address(base, p.workspace.0), m.result.handle);
        // SAFETY: the handles are alive. The places lie in the GPU's one piece of memory, which outlives the stream, and are as
        // large as the layouts say, as these are made of the plan's sizes; the workspace has at least the bytes that the
        // algorithm asked for, and calls on the one stream use it one after the other. The factors and the algorithm are read
        // before the call returns.
        let status = unsafe {
            (f.product)(
                self.handle.handle,
                m.product.handle,
                &one,
                a,
                m.a.handle,
                b,
                m.b.handle,
                &beta,
                added,
                like,
                result,
                like,
                &algorithm.words,
                workspace,
                algorithm.workspace,
                stream(on),
            )
        };
        f.ok("a product", status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::library::{Geometry, Library};

    functions!(NoFunctions of nn::culib {
        nothing "cudnnNoSuchFunction" ();
    });

    fn product(library: Library, kind: Kind) -> Product<usize> {
        let (size, kernel) = ((8, 8), if library == Library::Cudnn { (3, 3) } else { (1, 1) });
        let pad = (kernel.0 / 2, kernel.1 / 2);
        let geometry =
            Geometry { n: 2, input: size, output: size, kernel, stride: (1, 1), pad, cin: 16, cout: 32 };
        let (x, w, y, workspace) = (0, 1 << 16, 2 << 16, (3 << 16, 1 << 16));
        let (math, half_result, bias, residual) = (Math::Bf16, true, None, None);
        Product { library, kind, math, half_result, geometry, x, w, y, bias, residual, workspace }
    }

    /// Nothing panics where a library, a function, or a GPU is missing. With the libraries and no GPU this shows the answers of
    /// the real ones.
    #[test]
    fn what_is_missing_is_an_answer() {
        match Cudnn::version() {
            Err(reason) => println!("skipped: cuDNN: {reason}"),
            Ok(_) => {
                let missing = NoFunctions::load().map(|all| all.nothing as usize);
                assert_eq!(missing, Err("it has no function cudnnNoSuchFunction".to_owned()));
                let f = CudnnFunctions::find().expect("a version");
                let error = f.ok("a test", nn::cudnnStatus_t::CUDNN_STATUS_BAD_PARAM as c_int);
                assert_eq!(error, Err("cuDNN: a test: CUDNN_STATUS_BAD_PARAM".to_owned()));
                let mut wrong = product(Library::Cudnn, Kind::Forward);
                wrong.geometry.output = (7, 8);
                let error = Cudnn::check_description(&wrong).expect_err("another size");
                assert!(error.contains("[2, 32, 8, 8]"), "{error}");
                match Cudnn::new() {
                    Err(reason) => assert!(reason.starts_with("cuDNN: a start: CUDNN_STATUS"), "{reason}"),
                    Ok(cudnn) => {
                        for kind in [Kind::Forward, Kind::DataGrad, Kind::WeightGrad] {
                            let found = cudnn.algorithms(&product(Library::Cudnn, kind));
                            println!("{kind:?}: {found:?}");
                            assert!(found.is_ok_and(|all| !all.is_empty()), "{kind:?}");
                        }
                    }
                }
            }
        }
        match CublasLt::version() {
            Err(reason) => println!("skipped: cuBLASLt: {reason}"),
            Ok(_) => match CublasLt::new() {
                Err(reason) => assert!(reason.starts_with("cuBLASLt: a start: "), "{reason}"),
                Ok(lt) => {
                    for kind in [Kind::Forward, Kind::DataGrad, Kind::WeightGrad] {
                        println!("{kind:?}: {:?}", lt.algorithms(0, &product(Library::CublasLt, kind)));
                    }
                }
            },
        }
    }
}
