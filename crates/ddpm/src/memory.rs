//! Memory that may not be there: asked for before it is taken, so that its lack is an error and not the program's end.

use crate::error::Error;

/// Whether so many bytes can be had now; the error says how many were asked for.
pub(crate) fn available(bytes: usize) -> Result<(), String> {
    let mut probe: Vec<u8> = Vec::new();
    let reserved = probe.try_reserve_exact(bytes);
    // Memory that nobody looks at need not be taken at all.
    std::hint::black_box(&probe);
    reserved.map_err(|_| lacking(bytes))
}

/// Zeros, for `what`.
pub(crate) fn zeros(len: usize, what: &str) -> Result<Vec<f32>, Error> {
    let mut values = Vec::new();
    let reserved = values.try_reserve_exact(len);
    reserved.map_err(|_| refused(what, &lacking(len.saturating_mul(size_of::<f32>()))))?;
    values.resize(len, 0.0);
    Ok(values)
}

/// The error that there is no memory for `what`.
pub(crate) fn refused(what: &str, reason: &str) -> Error {
    Error::Engine(ddpm_engine::Error::Resources(format!("{reason} for {what}")))
}

fn lacking(bytes: usize) -> String {
    format!("{:.1} MiB of memory cannot be had", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_not_there_is_an_error_with_the_amount() {
        assert_eq!(available(1 << 20), Ok(()));
        // More than any address space has.
        let much = 1 << 62;
        assert!(available(much).unwrap_err().contains("4398046511104.0 MiB of memory cannot be had"));
        let error = zeros(much / 4, "a batch of images").unwrap_err().to_string();
        assert!(error.contains("MiB of memory cannot be had for a batch of images"), "{error}");
        assert_eq!(zeros(3, "").unwrap(), [0.0; 3]);
    }
}
