//! Fallible allocation: running out of memory becomes an error instead of an abort.

use crate::error::Error;

/// Checks that `bytes` can be allocated now; the error states the amount.
pub fn check_available(bytes: usize) -> Result<(), String> {
    let mut probe: Vec<u8> = Vec::new();
    let reserved = probe.try_reserve_exact(bytes);
    // Keeps the compiler from removing an allocation that is never used.
    std::hint::black_box(&probe);
    reserved.map_err(|_| cannot_allocate(bytes))
}

/// `len` zeros for `what`.
pub(crate) fn try_zeros(len: usize, what: &str) -> Result<Vec<f32>, Error> {
    let mut values = Vec::new();
    let reserved = values.try_reserve_exact(len);
    reserved.map_err(|_| out_of_memory(what, &cannot_allocate(len.saturating_mul(size_of::<f32>()))))?;
    values.resize(len, 0.0);
    Ok(values)
}

/// The error for a failed allocation for `what`.
pub fn out_of_memory(what: &str, reason: &str) -> Error {
    Error::Memory(format!("{reason} for {what}"))
}

fn cannot_allocate(bytes: usize) -> String {
    format!("cannot allocate {:.1} MiB of memory", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_allocations_are_errors_with_the_amount() {
        assert_eq!(check_available(1 << 20), Ok(()));
        // Larger than any address space.
        let too_much = 1 << 62;
        assert!(
            check_available(too_much).unwrap_err().contains("cannot allocate 4398046511104.0 MiB of memory")
        );
        let error = try_zeros(too_much / 4, "a batch of images").unwrap_err().to_string();
        assert!(error.contains("MiB of memory for a batch of images"), "{error}");
        assert_eq!(try_zeros(3, "").unwrap(), [0.0; 3]);
    }
}
