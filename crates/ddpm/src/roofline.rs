//! Measures the peak matmul and copy throughput of a GPU, to compare networks against.

use crate::error::Result;
use crate::hardware::Hardware;
use ddpm_engine::ops::{Affine, Conv2d};
use ddpm_engine::{ComputeOptions, Device, Graph, PlanOptions, RngKey, Tensor};
use std::time::Instant;

/// Peak throughput of large operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// Floating-point operations per second of matrix products, with operands in the compute options' precision.
    pub flops: f64,
    /// Bytes per second read plus written by copies.
    pub bytes: f64,
}

/// Side of the square matrices, and elements copied.
const SIDE: usize = 8192;
const ELEMENTS: usize = 1 << 28;

impl Roofline {
    /// Measures a GPU; `None` for the CPU, and for a GPU too busy with other work to be measured.
    ///
    /// # Errors
    /// Errors of the device, such as too little memory for about 2 GiB.
    pub fn measure(hardware: Hardware, compute: ComputeOptions) -> Result<Option<Self>> {
        let device = hardware.open()?;
        if !device.has_own_memory() {
            return Ok(None);
        }
        Self::on_device(&*device, compute, SIDE, ELEMENTS)
    }

    fn on_device(
        device: &dyn Device,
        compute: ComputeOptions,
        side: usize,
        elements: usize,
    ) -> Result<Option<Self>> {
        let product = |g: &mut Graph, x, weights| {
            Ok(g.add("product", Conv2d { bias: false, ..Conv2d::linear() }, &[x, weights])?)
        };
        let Some((seconds, _)) = chain(device, compute, side * side, side, &product)? else {
            return Ok(None);
        };
        let flops = 2.0 * (side as f64).powi(3) / seconds;
        let copy = |g: &mut Graph, x, _| Ok(g.add("copy", Affine { scale: 1.0, shift: 0.5 }, &[x])?);
        let Some((seconds, elem_bytes)) = chain(device, compute, elements, side, &copy)? else {
            return Ok(None);
        };
        Ok(Some(Self { flops, bytes: 2.0 * (elements * elem_bytes) as f64 / seconds }))
    }
}

/// Appends a node to a tensor; the last argument is a square weight matrix.
type Link<'a> = dyn Fn(&mut Graph, Tensor, Tensor) -> Result<Tensor> + 'a;

/// Seconds per node of a chain, from the time difference of a long and a short chain; and the element size in bytes.
/// `None` for a device too busy with other work to be measured.
fn chain(
    device: &dyn Device,
    compute: ComputeOptions,
    elements: usize,
    side: usize,
    link: &Link<'_>,
) -> Result<Option<(f64, usize)>> {
    const LONG: usize = 9;
    const ROUNDS: usize = 20;
    let (mut short, mut long) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        short = short.min(shortest_time(device, compute, elements, side, 1, link)?.0);
        let (time, bytes) = shortest_time(device, compute, elements, side, LONG, link)?;
        long = long.min(time);
        // Other programs can delay either chain; the shortest times of more rounds come closer to the true ones.
        if long > 2.0 * short {
            return Ok(Some(((long - short) / (LONG - 1) as f64, bytes)));
        }
    }
    Ok(None)
}

/// The shortest of the seconds that a chain takes, and the element size in bytes.
fn shortest_time(
    device: &dyn Device,
    compute: ComputeOptions,
    elements: usize,
    side: usize,
    links: usize,
    link: &Link<'_>,
) -> Result<(f64, usize)> {
    let mut g = Graph::new();
    let (x, flag) = (g.input("x", [elements / side, side]), g.input("flag", [1]));
    let weights = g.parameter("weights", [1, 1, side, side]);
    // A computed tensor, so that it may be stored in bf16 like the following ones.
    let mut y = g.add("first", Affine { scale: 1.0, shift: 0.0 }, &[x])?;
    for _ in 0..links {
        y = link(&mut g, y, weights)?;
    }
    let options = PlanOptions { compute, ..PlanOptions::default() };
    let mut exec = device.executor(g, &options)?;
    let bytes = exec.plan().graph().ty(y).dtype.bytes();
    let mut shortest = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        exec.run(RngKey::default())?;
        // Reading waits for the run to finish.
        exec.read(flag, &mut [0.0])?;
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    Ok((shortest, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ddpm_engine_cpu::CpuDevice;

    #[test]
    fn measured_rates_are_plausible() {
        assert_eq!(Roofline::measure(1.into(), ComputeOptions::default()).unwrap(), None);
        // The CPU can be measured too; both rates are between 1e6 and 1e13.
        let rates = Roofline::on_device(&CpuDevice { threads: 1 }, ComputeOptions::default(), 256, 1 << 20)
            .unwrap()
            .unwrap();
        assert!((1e6..1e13).contains(&rates.flops) && (1e6..1e13).contains(&rates.bytes), "{rates:?}");
    }
}
