//! Instruction sets: which ones this machine has, which one to use, and the one place that dispatches to them.

use std::fmt;

/// The environment variable that forces an instruction set (`portable`, `avx2`, `avx512`, `avx512bf16`, `neon`).
pub const ISA_VARIABLE: &str = "DDPM_ISA";

/// An instruction set that was detected on this machine. Holding a value proves the detection.
#[derive(Clone, Copy)]
pub struct Isa(pub(crate) Token);

/// The capability itself: pulp's tokens can be made only after detection.
#[derive(Clone, Copy)]
pub(crate) enum Token {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    /// With products of bf16 pairs besides, and of pairs of whole numbers.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(pulp::x86::V4, crate::bf16::Native),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
}

/// A forced instruction set that this machine does not have, or that does not exist.
#[derive(Debug, thiserror::Error)]
#[error("{ISA_VARIABLE}={asked}: this machine has {available}; set one of these, or unset the variable")]
pub struct IsaError {
    asked: String,
    available: String,
}

impl Isa {
    /// Every instruction set of this machine, the fastest first. The portable one is always there.
    pub fn all() -> Vec<Isa> {
        #[allow(unused_mut, reason = "pushed to on the architectures with more than the portable path")]
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

    /// The one that the environment variable [`ISA_VARIABLE`] names, or the fastest.
    pub fn from_env() -> Result<Isa, IsaError> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) if !name.is_empty() => Self::named(&name),
            _ => Ok(Self::best()),
        }
    }

    /// The one of that name, if this machine has it.
    pub fn named(name: &str) -> Result<Isa, IsaError> {
        let all = Self::all();
        all.iter().copied().find(|isa| isa.name().eq_ignore_ascii_case(name)).ok_or_else(|| IsaError {
            asked: name.to_owned(),
            available: all.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Its name, as the environment variable takes it.
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

    /// Whether there is an instruction for products of bf16 pairs.
    pub fn has_bf16(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Token::Avx512Bf16(..) => true,
            _ => false,
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

/// Makes a closure that uses it callable only once. Such a closure is called directly; any other goes through a shim
/// that is not `#[inline(always)]`, and whose contents would be compiled without the instruction set.
pub(crate) struct Once;

impl Once {
    #[inline(always)]
    pub(crate) fn spend(self) {}
}

/// Calls a generic kernel with the token of `isa`, inside a function compiled for that instruction set: the only
/// place where the CPU decides which code runs. In the longer form also with the [`Product`](crate::tile::Product) of such
/// [`Words`](crate::bf16::Words), and in the longest of whole numbers, where that is asked for.
///
/// Kernels must be compiled there too: every function and closure below that handles vectors is `#[inline(always)]`,
/// and none is handed to an iterator adapter.
macro_rules! dispatch {
    ($isa:expr, $words:expr, $simd:ident, $product:ident or whole if $whole:expr => $call:expr) => {
        match $isa.0 {
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx512Bf16($simd, native) if $whole => {
                let (once, $product) = (crate::isa::Once, native.whole());
                native.vectorize(
                    #[inline(always)]
                    || {
                        once.spend();
                        $call
                    },
                )
            }
            _ => crate::isa::dispatch!($isa, $words, $simd, $product => $call),
        }
    };
    ($isa:expr, $words:expr, $simd:ident, $product:ident => $call:expr) => {
        match $isa.0 {
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx512Bf16($simd, $product) if $words == crate::bf16::Words::Pairs => {
                let once = crate::isa::Once;
                $product.vectorize(
                    #[inline(always)]
                    || {
                        once.spend();
                        $call
                    },
                )
            }
            _ => {
                let $product = crate::tile::Single;
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
                let once = crate::isa::Once;
                $simd.vectorize(
                    #[inline(always)]
                    || {
                        once.spend();
                        $call
                    },
                )
            }
            #[cfg(target_arch = "x86_64")]
            crate::isa::Token::Avx512($simd) | crate::isa::Token::Avx512Bf16($simd, _) => {
                let once = crate::isa::Once;
                $simd.vectorize(
                    #[inline(always)]
                    || {
                        once.spend();
                        $call
                    },
                )
            }
            #[cfg(target_arch = "aarch64")]
            crate::isa::Token::Neon($simd) => {
                let once = crate::isa::Once;
                $simd.vectorize(
                    #[inline(always)]
                    || {
                        once.spend();
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
    fn the_best_comes_first_and_portable_last() {
        let all = Isa::all();
        assert_eq!(all.last().map(|i| i.name()), Some("portable"));
        assert!(all.windows(2).all(|w| w[0].lanes() >= w[1].lanes()));
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_choices() {
        let text = Isa::named("sse9").unwrap_err().to_string();
        assert!(text.contains("sse9") && text.contains("portable"), "{text}");
    }
}
