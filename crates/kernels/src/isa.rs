//! Instruction sets: detection, selection, and the single dispatch point.

use crate::bf16::{MatmulDtype, Packing};
use std::fmt;

/// Environment variable that forces an instruction set (`portable`, `avx2`, `avx512`, `avx512bf16`, `neon`).
pub const ISA_ENV_VAR: &str = "DDPM_ISA";

/// An instruction set detected on this machine. Holding a value proves the detection.
#[derive(Clone, Copy)]
pub struct Isa(pub(crate) Token);

/// The capability itself: pulp's tokens can only be constructed after detection.
#[derive(Clone, Copy)]
pub(crate) enum Token {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    /// Plus dot products of bf16 pairs and of int16 pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(pulp::x86::V4, crate::bf16::Native),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
}

/// The requested instruction set is unknown or not available on this machine.
#[derive(Debug, thiserror::Error)]
#[error("{ISA_ENV_VAR}={requested}: this machine has {available}; set one of these, or unset the variable")]
pub struct IsaError {
    requested: String,
    available: String,
}

impl Isa {
    /// Every instruction set of this machine, fastest first. The portable one is always included.
    pub fn all() -> Vec<Isa> {
        #[allow(unused_mut, reason = "only pushed to on architectures with SIMD kernels")]
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = pulp::x86::V4::try_new();
            found.extend(
                avx512.zip(crate::bf16::Native::try_new()).map(|(v4, bf16)| Token::Avx512Bf16(v4, bf16)),
            );
            found.extend(avx512.map(Token::Avx512));
            found.extend(pulp::x86::V3::try_new().map(Token::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        found.extend(pulp::aarch64::Neon::try_new().map(Token::Neon));
        found.push(Token::Portable);
        found.into_iter().map(Isa).collect()
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Isa {
        Self::all()[0]
    }

    /// The one named by the environment variable [`ISA_ENV_VAR`], or the fastest.
    pub fn from_env() -> Result<Isa, IsaError> {
        match std::env::var(ISA_ENV_VAR) {
            Ok(name) if !name.is_empty() => Self::named(&name),
            _ => Ok(Self::best()),
        }
    }

    /// Looks an instruction set up by name.
    pub fn named(name: &str) -> Result<Isa, IsaError> {
        let all = Self::all();
        all.iter().copied().find(|isa| isa.name().eq_ignore_ascii_case(name)).ok_or_else(|| IsaError {
            requested: name.to_owned(),
            available: all.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Its name, as accepted by the environment variable.
    pub fn name(self) -> &'static str {
        match self.0 {
            Token::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Bf16(..) => "avx512bf16",
            #[cfg(target_arch = "aarch64")]
            Token::Neon(_) => "neon",
        }
    }

    /// f32 lanes of a vector register.
    pub fn lanes(self) -> usize {
        match self.0 {
            Token::Portable => 1,
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => 8,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) | Token::Avx512Bf16(..) => 16,
            #[cfg(target_arch = "aarch64")]
            Token::Neon(_) => 4,
        }
    }

    /// Whether there is a dot-product instruction for bf16 pairs.
    pub fn has_bf16(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Bf16(..) => true,
            _ => false,
        }
    }

    /// How matmul operands of this dtype are packed.
    pub(crate) fn packing(self, dtype: MatmulDtype) -> Packing {
        match dtype {
            MatmulDtype::F32 => Packing::F32,
            MatmulDtype::Bf16 if self.has_bf16() => Packing::Pairs,
            MatmulDtype::Bf16 => Packing::Rounded,
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Makes a closure that moves it `FnOnce`. Such a closure is called directly; any other goes through a shim
/// that is not `#[inline(always)]`, and whose body would be compiled without the instruction set.
pub(crate) struct ForceDirectCall;

impl ForceDirectCall {
    #[inline(always)]
    pub(crate) fn consume(self) {}
}

/// Calls a generic kernel with the token of `isa`, inside a function compiled for that instruction set: the
/// only place where the CPU decides which code runs. The longer form also passes the
/// [`DotKernel`](crate::tile::DotKernel) for the given [`Packing`](crate::bf16::Packing); the longest uses
/// int16 dot products if the condition holds.
///
/// Kernels must be compiled there too: every function and closure below that handles vectors is
/// `#[inline(always)]`, and none is passed to an iterator adapter.
macro_rules! dispatch {
    ($isa:expr, $packing:expr, $simd:ident, $dot:ident or int16 if $int16:expr => $call:expr) => {
        match $isa.0 {
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx512Bf16($simd, native) if $int16 => {
                let (direct, $dot) = (crate::isa::ForceDirectCall, native.int16());
                native.vectorize(
                    #[inline(always)]
                    || {
                        direct.consume();
                        $call
                    },
                )
            }
            _ => crate::isa::dispatch!($isa, $packing, $simd, $dot => $call),
        }
    };
    ($isa:expr, $packing:expr, $simd:ident, $dot:ident => $call:expr) => {
        match $isa.0 {
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx512Bf16($simd, $dot) if $packing == crate::bf16::Packing::Pairs => {
                let direct = crate::isa::ForceDirectCall;
                $dot.vectorize(
                    #[inline(always)]
                    || {
                        direct.consume();
                        $call
                    },
                )
            }
            _ => {
                let $dot = crate::tile::F32;
                crate::isa::dispatch!($isa, $simd => $call)
            }
        }
    };
    ($isa:expr, $simd:ident => $call:expr) => {
        match $isa.0 {
            crate::isa::Token::Portable => {
                let $simd = pulp::Scalar;
                $call
            }
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx2($simd) => {
                let direct = crate::isa::ForceDirectCall;
                $simd.vectorize(
                    #[inline(always)]
                    || {
                        direct.consume();
                        $call
                    },
                )
            }
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx512($simd) | crate::isa::Token::Avx512Bf16($simd, _) => {
                let direct = crate::isa::ForceDirectCall;
                $simd.vectorize(
                    #[inline(always)]
                    || {
                        direct.consume();
                        $call
                    },
                )
            }
            #[cfg(target_arch = "aarch64")]
            crate::isa::Token::Neon($simd) => {
                let direct = crate::isa::ForceDirectCall;
                $simd.vectorize(
                    #[inline(always)]
                    || {
                        direct.consume();
                        $call
                    },
                )
            }
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_is_first_and_portable_last() {
        let all = Isa::all();
        assert_eq!(all.last().map(|i| i.name()), Some("portable"));
        assert!(all.windows(2).all(|w| w[0].lanes() >= w[1].lanes()));
    }

    #[test]
    fn unknown_name_error_lists_the_choices() {
        let text = Isa::named("sse9").unwrap_err().to_string();
        assert!(text.contains("sse9") && text.contains("portable"), "{text}");
    }
}
