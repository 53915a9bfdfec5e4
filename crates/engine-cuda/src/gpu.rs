//! What an executor needs of a GPU, small enough that the tests have another one: the same kernels compiled as C++ for
//! the CPU (`tests/emulator`).

use crate::library::{Algorithm, Call, Product};
use crate::schedule::Turn;
use ddpm_engine::{Error, Result};
use std::time::{Duration, Instant};

/// An argument of a kernel. Places are byte offsets into the GPU's one piece of memory, once a plan is laid out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg<Place> {
    /// A pointer.
    At(Place),
    /// An `int`.
    Int(i32),
    /// An `unsigned int`.
    Uint(u32),
    /// A `float`.
    Float(f32),
    /// A `double`.
    Double(f64),
}

/// One kernel call.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch<Place> {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Its arguments, in order.
    pub args: Vec<Arg<Place>>,
}

impl<P: Copy> Launch<P> {
    /// The same with every place replaced.
    pub fn placed<Q>(&self, place: impl Fn(P) -> Q) -> Launch<Q> {
        let args = self.args.iter().map(|&arg| match arg {
            Arg::At(p) => Arg::At(place(p)),
            Arg::Int(v) => Arg::Int(v),
            Arg::Uint(v) => Arg::Uint(v),
            Arg::Float(v) => Arg::Float(v),
            Arg::Double(v) => Arg::Double(v),
        });
        Launch { kernel: self.kernel, grid: self.grid, block: self.block, args: args.collect() }
    }
}

/// Calls that run one after the other, and when.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// The calls.
    pub calls: &'a [Call<usize>],
    /// Counts steps of the same list.
    pub turn: Turn,
}

/// A GPU with one piece of memory. Calls are carried out in order; all but [`read`](Self::read),
/// [`finish`](Self::finish) and [`pace`](Self::pace) may return before they are done, and then no longer need what they were given.
pub trait Gpu: Send {
    /// For a person: "NVIDIA H200, driver 12.8".
    fn describe(&self) -> String;

    /// Takes the memory, all zeros.
    fn reserve(&mut self, bytes: usize) -> Result<()>;

    /// Makes these kernels ready to launch.
    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()>;

    /// Copies to the GPU.
    fn write(&self, at: usize, data: &[u8]) -> Result<()>;

    /// As [`write`](Self::write), of what is written again and again in one length, as the images of batches: it may go
    /// through memory that the GPU reads by itself.
    fn upload(&self, at: usize, data: &[u8]) -> Result<()> {
        self.write(at, data)
    }

    /// Copies from the GPU.
    fn read(&self, at: usize, out: &mut [u8]) -> Result<()>;

    /// Starts a kernel.
    fn launch(&self, launch: &Launch<usize>) -> Result<()>;

    /// The algorithms that a library has for a product, the likely fastest first; none where it is missing or cannot make it.
    fn algorithms(&mut self, _: &Product<usize>) -> Vec<Algorithm> {
        Vec::new()
    }

    /// Starts a library's product.
    fn product(&self, _: &Product<usize>, _: &Algorithm) -> Result<()> {
        Err(Error::Device { device: self.describe(), reason: "it has no libraries".to_owned() })
    }

    /// Starts a kernel or a product.
    fn call(&self, call: &Call<usize>) -> Result<()> {
        match call {
            Call::Launch(launch) => self.launch(launch),
            Call::Product(both) => self.product(&both.0, &both.1),
        }
    }

    /// How long these calls take in a graph, after others have made them once.
    fn time(&mut self, calls: &[Call<usize>]) -> Result<Duration> {
        calls.iter().try_for_each(|call| self.call(call))?;
        self.finish()?;
        let start = Instant::now();
        calls.iter().try_for_each(|call| self.call(call))?;
        self.finish()?;
        Ok(start.elapsed())
    }

    /// Makes one graph of many calls, and gives its number; `None` where there is no such thing. Steps run side by side where
    /// their turns let them.
    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>>;

    /// Starts all calls of a graph, behind whatever was called before.
    fn replay(&self, graph: usize) -> Result<()>;

    /// Waits until everything is done.
    fn finish(&self) -> Result<()>;

    /// Waits until what was started before the last call of this is done; what was started since goes on.
    fn pace(&self) -> Result<()>;
}
