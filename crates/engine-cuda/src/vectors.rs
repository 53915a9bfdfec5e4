//! Vectors beside a plan, in the GPU's memory: the kernels of `sampler.cu`.

use crate::executor::GpuExecutor;
use crate::gpu::{Arg, Gpu, Launch};
use ddpm_engine::rng::Purpose;
use ddpm_engine::vectors::MOST_TERMS;
use ddpm_engine::{BufferSpec, Draws, Error, PlanVectors, Result, Tensor, Vector, Vectors};
use std::ops::Range;

/// Threads of a block, and most blocks.
const THREADS: usize = 256;
const MOST_BLOCKS: usize = 4096;
/// Threads for the one block that has an image.
const THREADS_OF_IMAGE: usize = 512;

/// The kernels that are launched here.
pub const KERNELS: [&str; 8] = [
    "copy",
    "fill",
    "vector_normal",
    "vector_mix",
    "vector_deviate",
    "vector_extrapolate",
    "vector_clip",
    "vector_clip_dynamic",
];

/// Where the vectors lie: one behind the other in the GPU's memory, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Laid {
    from: usize,
    stride: usize,
    count: usize,
    images: usize,
    image: usize,
}

impl Laid {
    /// Behind what ends at a byte; none where none are wanted.
    ///
    /// # Errors
    /// [`Error::Device`] for more numbers than the kernels count.
    pub fn new(wanted: Option<BufferSpec>, end: usize) -> Result<Self> {
        let from = end.next_multiple_of(256);
        let Some(BufferSpec { count, shape }) = wanted else {
            return Ok(Self { from: end, ..Self::default() });
        };
        let images = shape.dims().first().copied().unwrap_or(1);
        // Threads count on beyond the last number by as many as there are.
        if shape.len() > i32::MAX as usize - THREADS * MOST_BLOCKS {
            let reason = "a batch of more than 2^31 numbers".to_owned();
            return Err(Error::Device { device: "cuda".to_owned(), reason });
        }
        let image = shape.len() / images.max(1);
        Ok(Self { from, stride: (shape.len() * 4).next_multiple_of(256), count, images, image })
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.count > 0
    }

    /// Where they end.
    pub fn end(&self) -> usize {
        self.from + self.stride * self.count
    }

    /// Numbers of each.
    fn len(&self) -> usize {
        self.images * self.image
    }

    /// Where the first numbers of one begin.
    fn place(&self, v: Vector, numbers: usize) -> usize {
        assert!(v.0 < self.count && numbers <= self.len(), "{numbers} numbers of vector {}", v.0);
        self.from + self.stride * v.0
    }

    fn arg(&self, v: Vector) -> Arg<usize> {
        Arg::At(self.place(v, 0))
    }
}

fn int(v: usize) -> Arg<usize> {
    Arg::Int(i32::try_from(v).expect("sizes were checked"))
}

/// A kernel whose threads go over `count` items.
fn each(kernel: &'static str, count: usize, args: Vec<Arg<usize>>) -> Launch<usize> {
    let blocks = count.div_ceil(THREADS).clamp(1, MOST_BLOCKS) as u32;
    Launch { kernel, grid: [blocks, 1, 1], block: [THREADS as u32, 1, 1], args }
}

impl<G: Gpu> GpuExecutor<G> {
    fn copy_numbers(&self, from: usize, to: usize, n: usize) -> Result<()> {
        self.gpu().launch(&each("copy", n.div_ceil(4), vec![Arg::At(from), Arg::At(to), int(n)]))
    }
}

impl<G: Gpu> Vectors for GpuExecutor<G> {
    fn write(&mut self, to: Vector, data: &[f32]) -> Result<()> {
        let at = self.vectors_laid().place(to, data.len());
        self.gpu().write(at, bytemuck::cast_slice(data))
    }

    fn read(&self, from: Vector, out: &mut [f32]) -> Result<()> {
        let at = self.vectors_laid().place(from, out.len());
        self.gpu().read(at, bytemuck::cast_slice_mut(out))
    }

    fn copy(&mut self, to: Vector, from: Vector) -> Result<()> {
        let laid = self.vectors_laid();
        self.copy_numbers(laid.place(from, 0), laid.place(to, 0), laid.len())
    }

    fn mix(&mut self, to: Vector, terms: &[(f64, Vector)], divisor: f64) -> Result<()> {
        assert!(terms.len() <= MOST_TERMS, "{} terms are mixed", terms.len());
        let laid = self.vectors_laid();
        let mut args = vec![laid.arg(to), int(laid.len()), Arg::Double(divisor), int(terms.len())];
        for i in 0..MOST_TERMS {
            let &(c, v) = terms.get(i).unwrap_or(&(0.0, to));
            args.extend([laid.arg(v), Arg::Double(c)]);
        }
        self.gpu().launch(&each("vector_mix", laid.len(), args))
    }

    fn normal(&mut self, to: Vector, draws: Draws, purpose: Purpose) -> Result<()> {
        let laid = self.vectors_laid();
        let seed = [draws.seed as u32, (draws.seed >> 32) as u32];
        let words = [seed[0], seed[1], draws.step, draws.first_index, purpose as u32].map(Arg::Uint);
        let args = [&[laid.arg(to), int(laid.images), int(laid.image)][..], &words].concat();
        let fours = laid.images * laid.image.div_ceil(4);
        self.gpu().launch(&each("vector_normal", fours, args))
    }

    fn threshold(&mut self, v: Vector, part: Option<f64>) -> Result<()> {
        let laid = self.vectors_laid();
        let Some(part) = part else {
            let args = vec![laid.arg(v), int(laid.len())];
            return self.gpu().launch(&each("vector_clip", laid.len(), args));
        };
        let Some(last) = laid.image.checked_sub(1) else { return Ok(()) };
        let at = part * last as f64;
        let ranks = [at.floor(), at.ceil()].map(|rank| int(rank as usize));
        let args = vec![laid.arg(v), int(laid.image), ranks[0], ranks[1], Arg::Float(at.fract() as f32)];
        let (grid, block) = ([laid.images as u32, 1, 1], [THREADS_OF_IMAGE as u32, 1, 1]);
        self.gpu().launch(&Launch { kernel: "vector_clip_dynamic", grid, block, args })
    }

    fn apply_learned_std(&mut self, v: Vector, z: Vector, [small, large]: [f64; 2]) -> Result<()> {
        let laid = self.vectors_laid();
        let args = vec![laid.arg(v), laid.arg(z), int(laid.len()), Arg::Double(small), Arg::Double(large)];
        self.gpu().launch(&each("vector_deviate", laid.len(), args))
    }

    fn pace(&mut self) -> Result<()> {
        self.gpu().pace()
    }
}

impl<G: Gpu> PlanVectors for GpuExecutor<G> {
    fn give(&mut self, to: Tensor, from: Vector) -> Result<()> {
        let Range { start, end } = self.tensor_bytes(to);
        let n = (end - start) / 4;
        self.copy_numbers(self.vectors_laid().place(from, n), start, n)
    }

    fn take(&mut self, to: Vector, from: Tensor) -> Result<()> {
        let Range { start, end } = self.tensor_bytes(from);
        let n = (end - start) / 4;
        self.copy_numbers(start, self.vectors_laid().place(to, n), n)
    }

    fn fill(&mut self, to: Tensor, value: f32) -> Result<()> {
        let Range { start, end } = self.tensor_bytes(to);
        let n = (end - start) / 4;
        self.gpu().launch(&each("fill", n, vec![Arg::At(start), int(n), Arg::Float(value)]))
    }

    fn extrapolate(&mut self, y: Vector, u: Vector, scale: f32) -> Result<()> {
        let laid = self.vectors_laid();
        let args = vec![laid.arg(y), laid.arg(u), int(laid.len()), Arg::Float(scale)];
        self.gpu().launch(&each("vector_extrapolate", laid.len(), args))
    }
}
