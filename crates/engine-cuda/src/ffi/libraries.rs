//! cuDNN and cuBLASLt. Types and constants are cudarc's. Functions are looked up here, all of a library at once, so that a
//! missing library or function is an error instead of a panic; status codes are plain integers, as a newer library may return
//! codes that cudarc's enums lack.

mod cublaslt;
mod cudnn;

pub use cublaslt::CublasLt;
pub use cudnn::Cudnn;

use cudarc::driver::CudaStream;
use std::ffi::{CStr, c_char, c_int, c_void};

/// A library object.
type Handle = *mut c_void;
/// Its destructor.
type Destroy = unsafe extern "C" fn(Handle) -> c_int;

/// A library's functions. Each returns a status (0 is success) unless a type is given.
macro_rules! functions {
    ($name:ident of $library:path { $($field:ident $symbol:literal ($($arg:ty),*) $(-> $out:ty)?;)* }) => {
        pub(super) struct $name {
            $($field: unsafe extern "C" fn($($arg),*) -> functions!(@ $($out)?),)*
        }

        impl $name {
            /// Looks up all functions. The library must be present.
            pub(super) fn load() -> Result<Self, String> {
                // SAFETY: loading runs the library's initialisers; it is NVIDIA's library.
                let library = unsafe { $library() };
                Ok(Self {
                    // SAFETY: the signature is that of NVIDIA's header, as in cudarc's bindings, with integers for enumerations;
                    // the library is never unloaded.
                    $($field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }
                        .map_err(|_| format!("it has no function {}", $symbol))?,)*
                })
            }
        }
    };
    (@) => { c_int };
    (@ $out:ty) => { $out };
}

use functions;

/// A string returned by a library.
fn text(message: *const c_char) -> String {
    if message.is_null() {
        return "an unknown error".to_owned();
    }
    // SAFETY: the libraries return constant NUL-terminated strings.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

/// A library object, destroyed on drop.
struct Owned {
    handle: Handle,
    destroy: Destroy,
}

impl Owned {
    /// The object whose handle `create` writes through its argument.
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
        // SAFETY: the library created the object, `destroy` is its destructor, and this is the only owner. Errors cannot be
        // handled here.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

/// The stream's handle.
fn stream(stream: &CudaStream) -> Handle {
    stream.cu_stream().cast()
}

/// An address without the format bit that kernels use.
fn address(base: u64, offset: usize) -> u64 {
    base + (offset as u64 & !1)
}

/// A size as an int.
fn int(v: usize) -> Result<c_int, String> {
    c_int::try_from(v).map_err(|_| format!("size {v} exceeds the library's limit"))
}

#[cfg(test)]
mod tests {
    use super::cudnn::CudnnFunctions;
    use super::*;
    use crate::library::{ConvPass, Geometry, Library, LibraryOp, MathMode};
    use cudarc::cudnn::sys as nn;

    functions!(NoFunctions of nn::culib {
        missing "cudnnNoSuchFunction" ();
    });

    fn op(library: Library, pass: ConvPass) -> LibraryOp<usize> {
        let (size, kernel) = ((8, 8), if library == Library::Cudnn { (3, 3) } else { (1, 1) });
        let pad = (kernel.0 / 2, kernel.1 / 2);
        let geometry =
            Geometry { n: 2, input: size, output: size, kernel, stride: (1, 1), pad, cin: 16, cout: 32 };
        let (x, w, y, workspace) = (0, 1 << 16, 2 << 16, (3 << 16, 1 << 16));
        let (math, bf16_result, bias, residual) = (MathMode::Bf16, true, None, None);
        LibraryOp { library, pass, math, bf16_result, geometry, x, w, y, bias, residual, workspace }
    }

    /// A missing library, function or GPU is an error, not a panic. With the libraries but without a GPU, this prints the errors of
    /// the real ones.
    #[test]
    fn missing_libraries_are_errors() {
        match Cudnn::version() {
            Err(reason) => println!("skipped: cuDNN: {reason}"),
            Ok(_) => {
                let missing = NoFunctions::load().map(|all| all.missing as usize);
                assert_eq!(missing, Err("it has no function cudnnNoSuchFunction".to_owned()));
                let f = CudnnFunctions::find().expect("a version");
                let error = f.ok("a test", nn::cudnnStatus_t::CUDNN_STATUS_BAD_PARAM as c_int);
                assert_eq!(error, Err("cuDNN: a test: CUDNN_STATUS_BAD_PARAM".to_owned()));
                let mut wrong = op(Library::Cudnn, ConvPass::Forward);
                wrong.geometry.output = (7, 8);
                let error = Cudnn::check_description(&wrong).expect_err("wrong size");
                assert!(error.contains("[2, 32, 8, 8]"), "{error}");
                match Cudnn::new() {
                    Err(reason) => {
                        assert!(reason.starts_with("cuDNN: initialisation: CUDNN_STATUS"), "{reason}")
                    }
                    Ok(cudnn) => {
                        for pass in [ConvPass::Forward, ConvPass::DataGrad, ConvPass::WeightGrad] {
                            let found = cudnn.algorithms(&op(Library::Cudnn, pass));
                            println!("{pass:?}: {found:?}");
                            assert!(found.is_ok_and(|all| !all.is_empty()), "{pass:?}");
                        }
                    }
                }
            }
        }
        match CublasLt::version() {
            Err(reason) => println!("skipped: cuBLASLt: {reason}"),
            Ok(_) => match CublasLt::new() {
                Err(reason) => assert!(reason.starts_with("cuBLASLt: initialisation: "), "{reason}"),
                Ok(lt) => {
                    for pass in [ConvPass::Forward, ConvPass::DataGrad, ConvPass::WeightGrad] {
                        println!("{pass:?}: {:?}", lt.algorithms(0, &op(Library::CublasLt, pass)));
                    }
                }
            },
        }
    }
}
