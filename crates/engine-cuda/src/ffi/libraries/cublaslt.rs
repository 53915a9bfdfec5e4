//! cuBLASLt: products of matrices.

use super::{Handle, Owned, address, functions, int, stream, text};
use crate::library::{Algorithm, Kind, Math, Product};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::CudaStream;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

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
