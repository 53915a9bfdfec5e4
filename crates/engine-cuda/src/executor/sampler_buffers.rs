//! Arithmetic of samplers between runs: launches of the kernels in `sampler.cu` on buffers in GPU memory.

use super::GpuExecutor;
use crate::buffer_layout::{BufferLayout, MAX_BLOCKS, THREADS};
use crate::gpu::Gpu;
use crate::launch::{Arg, Launch};
use ddpm_engine::plan_buffers::MAX_TERMS;
use ddpm_engine::{BufferId, PlanBuffers, Result, RngKey, Tensor};
use ddpm_rng::Purpose;
use std::ops::Range;

/// Threads of the single block that handles an image.
const IMAGE_THREADS: usize = 512;

/// The kernels launched here.
pub const KERNELS: [&str; 8] = [
    "copy",
    "fill",
    "sampler_normal",
    "sampler_linear_combination",
    "sampler_learned_std",
    "sampler_extrapolate",
    "sampler_clip",
    "sampler_clip_dynamic",
];

fn arg(layout: BufferLayout, v: BufferId) -> Arg<usize> {
    Arg::At(layout.offset(v, 0))
}

fn int(v: usize) -> Arg<usize> {
    Arg::Int(i32::try_from(v).expect("sizes were checked"))
}

/// Launches a grid-stride loop over `count` items.
fn each(kernel: &'static str, count: usize, args: Vec<Arg<usize>>) -> Launch<usize> {
    let blocks = count.div_ceil(THREADS).clamp(1, MAX_BLOCKS) as u32;
    Launch { kernel, grid: [blocks, 1, 1], block: [THREADS as u32, 1, 1], args }
}

impl<G: Gpu> GpuExecutor<G> {
    fn copy_elems(&self, from: usize, to: usize, n: usize) -> Result<()> {
        self.gpu().launch(&each("copy", n.div_ceil(4), vec![Arg::At(from), Arg::At(to), int(n)]))
    }
}

impl<G: Gpu> PlanBuffers for GpuExecutor<G> {
    fn write(&mut self, to: BufferId, data: &[f32]) -> Result<()> {
        let at = self.buffer_layout().offset(to, data.len());
        self.gpu().write(at, bytemuck::cast_slice(data))
    }

    fn read(&self, from: BufferId, out: &mut [f32]) -> Result<()> {
        let at = self.buffer_layout().offset(from, out.len());
        self.gpu().read(at, bytemuck::cast_slice_mut(out))
    }

    fn copy(&mut self, to: BufferId, from: BufferId) -> Result<()> {
        let layout = self.buffer_layout();
        self.copy_elems(layout.offset(from, 0), layout.offset(to, 0), layout.len())
    }

    fn linear_combination(&mut self, to: BufferId, terms: &[(f64, BufferId)], divisor: f64) -> Result<()> {
        assert!(terms.len() <= MAX_TERMS, "{} terms in a linear combination", terms.len());
        let layout = self.buffer_layout();
        let mut args = vec![arg(layout, to), int(layout.len()), Arg::Double(divisor), int(terms.len())];
        for i in 0..MAX_TERMS {
            let &(c, v) = terms.get(i).unwrap_or(&(0.0, to));
            args.extend([arg(layout, v), Arg::Double(c)]);
        }
        self.gpu().launch(&each("sampler_linear_combination", layout.len(), args))
    }

    fn normal(&mut self, to: BufferId, key: RngKey, purpose: Purpose) -> Result<()> {
        let layout = self.buffer_layout();
        let seed = [key.seed as u32, (key.seed >> 32) as u32];
        let words = [seed[0], seed[1], key.step, key.first_index, purpose as u32].map(Arg::Uint);
        let args = [&[arg(layout, to), int(layout.images), int(layout.image)][..], &words].concat();
        let quads = layout.images * layout.image.div_ceil(4);
        self.gpu().launch(&each("sampler_normal", quads, args))
    }

    fn threshold(&mut self, v: BufferId, quantile: Option<f64>) -> Result<()> {
        let layout = self.buffer_layout();
        let Some(quantile) = quantile else {
            let args = vec![arg(layout, v), int(layout.len())];
            return self.gpu().launch(&each("sampler_clip", layout.len(), args));
        };
        let Some(last) = layout.image.checked_sub(1) else { return Ok(()) };
        let at = quantile * last as f64;
        let ranks = [at.floor(), at.ceil()].map(|rank| int(rank as usize));
        let args = vec![arg(layout, v), int(layout.image), ranks[0], ranks[1], Arg::Float(at.fract() as f32)];
        let (grid, block) = ([layout.images as u32, 1, 1], [IMAGE_THREADS as u32, 1, 1]);
        self.gpu().launch(&Launch { kernel: "sampler_clip_dynamic", grid, block, args })
    }

    fn apply_learned_std(&mut self, v: BufferId, z: BufferId, [small, large]: [f64; 2]) -> Result<()> {
        let layout = self.buffer_layout();
        let args =
            vec![arg(layout, v), arg(layout, z), int(layout.len()), Arg::Double(small), Arg::Double(large)];
        self.gpu().launch(&each("sampler_learned_std", layout.len(), args))
    }

    fn copy_to_tensor(&mut self, to: Tensor, from: BufferId) -> Result<()> {
        let Range { start, end } = self.tensor_bytes(to);
        let n = (end - start) / 4;
        self.copy_elems(self.buffer_layout().offset(from, n), start, n)
    }

    fn copy_from_tensor(&mut self, to: BufferId, from: Tensor) -> Result<()> {
        let Range { start, end } = self.tensor_bytes(from);
        let n = (end - start) / 4;
        self.copy_elems(start, self.buffer_layout().offset(to, n), n)
    }

    fn fill(&mut self, to: Tensor, value: f32) -> Result<()> {
        let Range { start, end } = self.tensor_bytes(to);
        let n = (end - start) / 4;
        self.gpu().launch(&each("fill", n, vec![Arg::At(start), int(n), Arg::Float(value)]))
    }

    fn extrapolate(&mut self, y: BufferId, u: BufferId, scale: f32) -> Result<()> {
        let layout = self.buffer_layout();
        let args = vec![arg(layout, y), arg(layout, u), int(layout.len()), Arg::Float(scale)];
        self.gpu().launch(&each("sampler_extrapolate", layout.len(), args))
    }

    fn throttle(&mut self) -> Result<()> {
        self.gpu().throttle()
    }
}
