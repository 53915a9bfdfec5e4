//! Asking for numbers before they are needed, where they lie too far apart for the machine to guess.

/// Asks for `x[at]` to be brought near; no more than a hint, and none at all where there is no such number.
#[inline(always)]
#[allow(unsafe_code, reason = "pulp does not have this instruction")]
pub(crate) fn prefetch(x: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(x) = x.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has SSE, and the address is that of a number of the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(x).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, at);
}
