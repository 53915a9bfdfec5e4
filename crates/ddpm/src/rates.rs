//! What a GPU reaches at best, as a measure for what networks reach on it.

use crate::error::Result;
use crate::hardware::Hardware;
use crate::model::device;
use ddpm_engine::ops::{Affine, Conv2d};
use ddpm_engine::{ComputeOptions, Device, Draws, Graph, PlanOptions, Tensor};
use std::time::Instant;

/// Rates of large operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Floating-point operations a second of products of matrices, with factors as the arithmetic has them.
    pub flops: f64,
    /// Bytes read or written a second by copies.
    pub bytes: f64,
}

/// Sides of the matrices, and numbers of the copies.
const SIDE: usize = 8192;
const NUMBERS: usize = 1 << 28;

impl Rates {
    /// Measures a GPU; `None` for the CPU.
    ///
    /// # Errors
    /// What the device says, as not enough memory for about 2 GiB.
    pub fn measure(hardware: Hardware, arithmetic: ComputeOptions) -> Result<Option<Self>> {
        let device = device(hardware)?;
        match device.has_own_memory() {
            true => Self::of(&*device, arithmetic, SIDE, NUMBERS).map(Some),
            false => Ok(None),
        }
    }

    fn of(device: &dyn Device, arithmetic: ComputeOptions, side: usize, numbers: usize) -> Result<Self> {
        let product = |g: &mut Graph, x, weights| {
            Ok(g.add("product", Conv2d { bias: false, ..Conv2d::linear() }, &[x, weights])?)
        };
        let (seconds, _) = chain(device, arithmetic, side * side, side, &product)?;
        let flops = 2.0 * (side as f64).powi(3) / seconds;
        let copy = |g: &mut Graph, x, _| Ok(g.add("copy", Affine { scale: 1.0, shift: 0.5 }, &[x])?);
        let (seconds, of_number) = chain(device, arithmetic, numbers, side, &copy)?;
        Ok(Self { flops, bytes: 2.0 * (numbers * of_number) as f64 / seconds })
    }
}

/// Adds a node behind a tensor, with a square matrix of weights at hand.
type Link<'a> = dyn Fn(&mut Graph, Tensor, Tensor) -> Result<Tensor> + 'a;

/// Time of one node in a chain: how much longer a long chain takes than a short one. With the bytes of a number in it.
fn chain(
    device: &dyn Device,
    arithmetic: ComputeOptions,
    numbers: usize,
    side: usize,
    link: &Link<'_>,
) -> Result<(f64, usize)> {
    const LONG: usize = 9;
    let of = |links: usize| -> Result<(f64, usize)> {
        let mut g = Graph::new();
        let (x, flag) = (g.input("x", [numbers / side, side]), g.input("flag", [1]));
        let weights = g.parameter("weights", [1, 1, side, side]);
        // A computed tensor, which may be stored in bf16; the last is as well.
        let mut y = g.add("first", Affine { scale: 1.0, shift: 0.0 }, &[x])?;
        for _ in 0..links {
            y = link(&mut g, y, weights)?;
        }
        let options = PlanOptions { arithmetic, ..PlanOptions::default() };
        let mut exec = device.executor(g, &options)?;
        let bytes = exec.plan().graph().ty(y).dtype.bytes();
        let mut best = f64::MAX;
        for _ in 0..5 {
            let start = Instant::now();
            exec.run(Draws::default())?;
            // What is read waits for the run.
            exec.read(flag, &mut [0.0])?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok((best, bytes))
    };
    let ((short, _), (long, bytes)) = (of(1)?, of(LONG)?);
    Ok(((long - short).max(1e-9) / (LONG - 1) as f64, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm_engine::CpuDevice;

    #[test]
    fn rates_are_of_what_was_done() {
        assert_eq!(Rates::measure(1.into(), ComputeOptions::default()).unwrap(), None);
        // Any device can be measured; the processor does between a million and ten million million of both.
        let rates = Rates::of(&CpuDevice { threads: 1 }, ComputeOptions::default(), 256, 1 << 20).unwrap();
        assert!((1e6..1e13).contains(&rates.flops) && (1e6..1e13).contains(&rates.bytes), "{rates:?}");
    }
}
