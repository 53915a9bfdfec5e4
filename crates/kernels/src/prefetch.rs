//! Software prefetch, for strides too long for the hardware prefetcher.

/// Prefetches the cache line of `x[at]`; does nothing if the index is out of bounds.
#[inline(always)]
#[allow(unsafe_code, reason = "pulp lacks this instruction")]
pub(crate) fn prefetch(x: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(x) = x.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has SSE, and the address is that of an element of the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(x).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, at);
}
