//! cuDNN and cuBLASLt. Types and constants are cudarc's. The functions are looked up here, all of a library at once, so that
//! a missing library or function is an answer and no panic; and what they return are numbers here, as a newer library may have
//! codes that cudarc's types do not know.

mod cublaslt;
mod cudnn;

pub use cublaslt::CublasLt;
pub use cudnn::Cudnn;

use cudarc::driver::CudaStream;
use std::ffi::{CStr, c_char, c_int, c_void};

/// An object of a library.
type Handle = *mut c_void;
/// What ends one.
type Destroy = unsafe extern "C" fn(Handle) -> c_int;

/// A library's functions. Each returns a status unless it says something else; 0 is success.
macro_rules! functions {
    ($name:ident of $library:path { $($field:ident $symbol:literal ($($arg:ty),*) $(-> $out:ty)?;)* }) => {
        pub(super) struct $name {
            $($field: unsafe extern "C" fn($($arg),*) -> functions!(@ $($out)?),)*
        }

        impl $name {
            /// Looks all of them up. The library must be there.
            pub(super) fn load() -> Result<Self, String> {
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

use functions;

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

#[cfg(test)]
mod tests {
    use super::cudnn::CudnnFunctions;
    use super::*;
    use crate::library::{Geometry, Kind, Library, Math, Product};
    use cudarc::cudnn::sys as nn;

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
