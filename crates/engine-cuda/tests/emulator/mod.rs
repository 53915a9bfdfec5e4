//! A GPU for tests: the kernels' own text as C++, in a program that g++ makes when the tests run. Threads of a block are
//! fibers, tensor cores are loops; arguments are checked against the kernels' signatures.

mod build;
mod products;

use ddpm_engine::rng::{Purpose, Stream, below};
use ddpm_engine::{Error, Result};
use ddpm_engine_cuda::gpu::{Arg, Gpu, Launch, Step};
use ddpm_engine_cuda::library::{Algorithm, Call, Product};
use ddpm_engine_cuda::schedule::Turn;
use ddpm_engine_cuda::source::SOURCES;
use std::io::{BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

struct Pipes {
    child: Child,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
}

/// In which order a block's threads run between two barriers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// From the first on.
    Forwards,
    /// From the last on.
    Backwards,
}

/// An emulated GPU.
pub struct Emulator {
    pipes: Mutex<Pipes>,
    /// What was recorded.
    graphs: Vec<Vec<(Vec<Call<usize>>, Turn)>>,
    replays: AtomicU32,
    /// Whether it has libraries, which make every product.
    pub libraries: bool,
}

impl Emulator {
    /// A new one; `None` where there is no C++ compiler, which a test says and ends.
    pub fn new() -> Option<Self> {
        Self::with(Order::Forwards)
    }

    /// The same, with another order of threads.
    pub fn with(order: Order) -> Option<Self> {
        let mut child = Command::new(build::built()?.join("emulator"))
            .args((order == Order::Backwards).then_some("backwards"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        let to = BufWriter::new(child.stdin.take().expect("piped"));
        let from = BufReader::new(child.stdout.take().expect("piped"));
        Some(Self {
            pipes: Mutex::new(Pipes { child, to, from }),
            graphs: Vec::new(),
            replays: AtomicU32::new(0),
            libraries: false,
        })
    }

    /// Sends a command and takes the answer, then `out` numbers of what was asked for.
    fn ask(&self, what: &str, parts: &[&[u8]], out: &mut [u8]) -> Result<()> {
        let mut pipes = self.pipes.lock().expect("no test panicked here");
        let error = |reason: String| Error::Device { device: "emulator".to_owned(), reason };
        let mut talk = || -> std::io::Result<String> {
            for part in parts {
                pipes.to.write_all(part)?;
            }
            pipes.to.flush()?;
            let mut len = [0; 4];
            pipes.from.read_exact(&mut len)?;
            let mut text = vec![0; u32::from_le_bytes(len) as usize];
            pipes.from.read_exact(&mut text)?;
            pipes.from.read_exact(out)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        match talk() {
            Ok(text) if text.is_empty() => Ok(()),
            Ok(text) => Err(error(text)),
            Err(e) => Err(error(format!("it ended in {what}: {e}"))),
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if let Ok(pipes) = self.pipes.get_mut() {
            let _ = pipes.child.kill();
            let _ = pipes.child.wait();
        }
    }
}

fn place(v: usize) -> [u8; 8] {
    (v as u64).to_le_bytes()
}

/// The only algorithm for a product.
fn algorithm_for(product: &Product<usize>) -> Algorithm {
    Algorithm { words: [7; 8], workspace: product.workspace.1 }
}

impl Gpu for Emulator {
    fn describe(&self) -> String {
        "emulated GPU".to_owned()
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.ask("reserve", &[b"r", &place(bytes)], &mut [])
    }

    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()> {
        for kernel in kernels {
            assert!(SOURCES.iter().any(|s| s.kernels.contains(kernel)), "{kernel} is in no source's list");
        }
        Ok(())
    }

    fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        self.ask("write", &[b"w", &place(at), &place(data.len()), data], &mut [])
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        self.ask("read", &[b"g", &place(at), &place(out.len())], out)
    }

    fn launch(&self, launch: &Launch<usize>) -> Result<()> {
        let mut bytes = vec![b'l'];
        bytes.extend((launch.kernel.len() as u32).to_le_bytes());
        bytes.extend(launch.kernel.as_bytes());
        for v in launch.grid.iter().chain(&launch.block) {
            bytes.extend(v.to_le_bytes());
        }
        bytes.extend((launch.args.len() as u32).to_le_bytes());
        for arg in &launch.args {
            let (kind, bits) = match *arg {
                Arg::At(at) => (b'p', at as u64),
                Arg::Int(v) => (b'i', u64::from(v as u32)),
                Arg::Uint(v) => (b'u', u64::from(v)),
                Arg::Float(v) => (b'f', u64::from(v.to_bits())),
                Arg::Double(v) => (b'd', v.to_bits()),
            };
            bytes.push(kind);
            bytes.extend(bits.to_le_bytes());
        }
        self.ask(launch.kernel, &[&bytes], &mut [])
    }

    fn algorithms(&mut self, product: &Product<usize>) -> Vec<Algorithm> {
        self.libraries.then(|| algorithm_for(product)).into_iter().collect()
    }

    fn product(&self, product: &Product<usize>, algorithm: &Algorithm) -> Result<()> {
        assert!(self.libraries && *algorithm == algorithm_for(product), "an algorithm that was not offered");
        products::make(self, product)
    }

    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>> {
        self.graphs.push(steps.iter().map(|step| (step.calls.to_vec(), step.turn.clone())).collect());
        Ok(Some(self.graphs.len() - 1))
    }

    /// In an order that streams and waits allow, another one each time.
    fn replay(&self, graph: usize) -> Result<()> {
        let steps = &self.graphs[graph];
        let round = self.replays.fetch_add(1, Ordering::Relaxed);
        let mut words = Stream::new(u64::from(round), Purpose::Test, 0, 0).words();
        let mut left: Vec<usize> = (0..steps.len()).collect();
        while !left.is_empty() {
            let (done, of_stream) = (|i: &usize| !left.contains(i), |i: usize| steps[i].1.stream);
            let can = |&i: &usize| {
                let first = left.iter().all(|&j| j >= i || of_stream(j) != of_stream(i));
                first && steps[i].1.waits.iter().all(done)
            };
            let ready: Vec<usize> = left.iter().copied().filter(can).collect();
            let next = ready[below(words.next().expect("endless"), ready.len() as u32) as usize];
            steps[next].0.iter().try_for_each(|call| self.call(call))?;
            left.retain(|&i| i != next);
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn pace(&self) -> Result<()> {
        Ok(())
    }
}
