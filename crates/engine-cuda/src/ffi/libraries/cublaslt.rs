//! cuBLASLt: matrix products.

use super::{Handle, Owned, address, functions, int, stream, text};
use crate::library::{Algorithm, ConvPass, LibraryOp, MathMode};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::CudaStream;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

functions!(LtFunctions of lt::culib {
    get_version "cublasLtGetVersion" () -> usize;
    status_string "cublasLtGetStatusString" (c_int) -> *const c_char;
    create "cublasLtCreate" (*mut Handle);
    destroy "cublasLtDestroy" (Handle);
    create_matmul "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int);
    set_matmul "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize);
    destroy_matmul "cublasLtMatmulDescDestroy" (Handle);
    create_layout "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64);
    destroy_layout "cublasLtMatrixLayoutDestroy" (Handle);
    create_preference "cublasLtMatmulPreferenceCreate" (*mut Handle);
    set_preference "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize);
    destroy_preference "cublasLtMatmulPreferenceDestroy" (Handle);
    algorithms "cublasLtMatmulAlgoGetHeuristic"
        (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int);
    matmul "cublasLtMatmul"
        (Handle, Handle, *const f32, u64, Handle, u64, Handle, *const f32, u64, Handle, u64, Handle, *const [u64; 8], u64,
            usize, Handle);
});

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

const _: () = assert!(size_of::<Heuristic>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>());

/// The oldest supported version.
const MIN_CUBLAS: usize = 120_000;
/// Algorithms requested per operation.
const MAX_ALGORITHMS: usize = 8;
/// Byte alignment of every tensor.
const ALIGNMENT: u32 = 64;

impl LtFunctions {
    /// The functions, looked up once.
    fn find() -> Result<&'static Self, String> {
        static FOUND: OnceLock<Result<LtFunctions, String>> = OnceLock::new();
        let look = || {
            // SAFETY: loading runs the library's initialisers; a library of that name, if any, is NVIDIA's.
            if !unsafe { lt::is_culib_present() } {
                return Err("cannot find libcublasLt.so.13 (or .12)".to_owned());
            }
            let functions = Self::load()?;
            // SAFETY: the function takes no arguments.
            let version = unsafe { (functions.get_version)() };
            if version < MIN_CUBLAS {
                return Err(format!("version {version} is too old: install that of CUDA 12 or 13"));
            }
            Ok(functions)
        };
        FOUND.get_or_init(look).as_ref().map_err(Clone::clone)
    }

    fn ok(&self, what: &str, status: c_int) -> Result<(), String> {
        // SAFETY: the function accepts any status.
        let message = || text(unsafe { (self.status_string)(status) });
        if status == 0 { Ok(()) } else { Err(format!("cuBLASLt: {what}: {}", message())) }
    }

    /// Sets an attribute of an object of the type that `set` expects.
    fn set<T: bytemuck::NoUninit>(
        &self,
        set: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
        object: &Owned,
        attribute: c_int,
        value: T,
    ) -> Result<(), String> {
        // SAFETY: the object is alive, and the size passed is that of the value.
        let status = unsafe { set(object.handle, attribute, (&raw const value).cast(), size_of::<T>()) };
        self.ok("setting an attribute", status)
    }
}

/// A matrix product as described to cuBLASLt. Its matrices are column-major, so ours appear transposed: the transposed result is
/// the product of the transposed operands in reverse order.
struct Matrices {
    matmul: Owned,
    a: Owned,
    b: Owned,
    /// Layout of the result and of the residual.
    result: Owned,
    /// Offsets of a, b and the result.
    offsets: [usize; 3],
}

impl Matrices {
    fn new(f: &LtFunctions, base: u64, p: &LibraryOp<usize>) -> Result<Self, String> {
        use lt::cublasComputeType_t as Compute;
        use lt::cublasLtMatmulDescAttributes_t as Attribute;
        let (f32_type, bf16_type) =
            (lt::cudaDataType_t::CUDA_R_32F as c_int, lt::cudaDataType_t::CUDA_R_16BF as c_int);
        let format = |bf16: bool| if bf16 { bf16_type } else { f32_type };
        let compute = match p.math {
            MathMode::Tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            MathMode::F32 | MathMode::Bf16 => Compute::CUBLAS_COMPUTE_32F,
        } as c_int;
        // SAFETY: the function writes a handle through the pointer.
        let create = |to| unsafe { (f.create_matmul)(to, compute, f32_type) };
        let matmul = Owned::new(create, f.destroy_matmul, |s| f.ok("creating the operation", s))?;
        let (rows, cin, cout) = (p.geometry.rows(), p.geometry.cin, p.geometry.cout);
        // [columns, rows] in our order, offset, whether it is transposed
        let (w, x, y) = ([cout, cin], [cin, rows], [cout, rows]);
        let (a, b, result) = match p.pass {
            ConvPass::Forward => ((w, p.w, false), (x, p.x, false), (y, p.y)),
            ConvPass::DataGrad => ((w, p.w, true), (y, p.y, false), (x, p.x)),
            ConvPass::WeightGrad => ((y, p.y, false), (x, p.x, true), (w, p.w)),
        };
        let layout = |[height, width]: [usize; 2], format: c_int| {
            let stride = i64::try_from(height).map_err(|e| e.to_string())?;
            // SAFETY: the function writes a handle through the pointer.
            let create = |to| unsafe { (f.create_layout)(to, format, height as u64, width as u64, stride) };
            Owned::new(create, f.destroy_layout, |s| f.ok("creating a layout", s))
        };
        // CUBLAS_OP_N and CUBLAS_OP_T.
        let [op_a, op_b] = [a.2, b.2].map(c_int::from);
        f.set(f.set_matmul, &matmul, Attribute::CUBLASLT_MATMUL_DESC_TRANSA as c_int, op_a)?;
        f.set(f.set_matmul, &matmul, Attribute::CUBLASLT_MATMUL_DESC_TRANSB as c_int, op_b)?;
        if let Some(bias) = p.bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            f.set(f.set_matmul, &matmul, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE as c_int, epilogue)?;
            // The bias has the result's format by default.
            let at = address(base, bias);
            f.set(f.set_matmul, &matmul, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER as c_int, at)?;
        }
        let operands = format(p.math == MathMode::Bf16);
        Ok(Self {
            matmul,
            a: layout(a.0, operands)?,
            b: layout(b.0, operands)?,
            result: layout(result.0, format(p.bf16_result))?,
            offsets: [a.1, b.1, result.1],
        })
    }
}

/// cuBLASLt.
pub struct CublasLt {
    functions: &'static LtFunctions,
    handle: Owned,
}

// SAFETY: as for cuDNN; a cuBLASLt handle may even be used by several threads at once.
unsafe impl Send for CublasLt {}

impl CublasLt {
    /// 10000 major + 100 minor + patch; or why it cannot be used.
    pub fn version() -> Result<usize, String> {
        // SAFETY: the function takes no arguments.
        LtFunctions::find().map(|f| unsafe { (f.get_version)() })
    }

    /// A CUDA context must be current, here and in all calls.
    pub fn new() -> Result<Self, String> {
        let f = LtFunctions::find()?;
        // SAFETY: the function writes a handle through the pointer.
        let create = |to| unsafe { (f.create)(to) };
        Ok(Self { functions: f, handle: Owned::new(create, f.destroy, |s| f.ok("initialisation", s))? })
    }

    pub fn check_description(p: &LibraryOp<usize>) -> Result<(), String> {
        Matrices::new(LtFunctions::find()?, 0, p).map(|_| ())
    }

    /// Algorithms for an operation that fit its workspace, expected fastest first.
    pub fn algorithms(&self, base: u64, p: &LibraryOp<usize>) -> Result<Vec<Algorithm>, String> {
        use lt::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let f = self.functions;
        let m = Matrices::new(f, base, p)?;
        // SAFETY: the function writes a handle through the pointer.
        let create = |to| unsafe { (f.create_preference)(to) };
        let preference = Owned::new(create, f.destroy_preference, |s| f.ok("creating a preference", s))?;
        let max_workspace = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as c_int;
        f.set(f.set_preference, &preference, max_workspace, p.workspace.1)?;
        for alignment in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            f.set(f.set_preference, &preference, alignment as c_int, ALIGNMENT)?;
        }
        let mut all = [Heuristic::default(); MAX_ALGORITHMS];
        let (room, mut count) = (int(all.len())?, 0);
        let result = m.result.handle;
        let [matmul, a, b, preference] = [&m.matmul, &m.a, &m.b, &preference].map(|owned| owned.handle);
        // SAFETY: the handles are alive; the function writes at most `room` elements, and their count.
        let status = unsafe {
            (f.algorithms)(
                self.handle.handle,
                matmul,
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
        let found = &all[..usize::try_from(count).unwrap_or(0).min(MAX_ALGORITHMS)];
        let wanted = |h: &&Heuristic| h.status == 0 && h.workspace <= p.workspace.1;
        let algorithm = |h: &Heuristic| Algorithm { words: h.algorithm, workspace: h.workspace };
        Ok(found.iter().filter(wanted).map(algorithm).collect())
    }

    /// Starts an operation on a stream, whose context must be current; addresses are offsets from `base`.
    pub fn run(
        &self,
        on: &CudaStream,
        base: u64,
        p: &LibraryOp<usize>,
        algorithm: &Algorithm,
    ) -> Result<(), String> {
        let f = self.functions;
        let m = Matrices::new(f, base, p)?;
        let [a, b, result] = m.offsets.map(|at| address(base, at));
        let (one, beta) = (1.0f32, if p.residual.is_some() { 1.0f32 } else { 0.0 });
        let added = p.residual.map_or(result, |at| address(base, at));
        let (workspace, like) = (address(base, p.workspace.0), m.result.handle);
        // SAFETY: the handles are alive. The addresses lie in the GPU's single allocation, which outlives the stream, and the
        // memory behind them is as large as the layouts state, as both follow from the plan's sizes; the workspace has at least
        // the bytes that the algorithm requires, and calls on one stream use it one after another. The scalars and the algorithm
        // are read before the call returns.
        let status = unsafe {
            (f.matmul)(
                self.handle.handle,
                m.matmul.handle,
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
        f.ok("matmul", status)
    }
}
