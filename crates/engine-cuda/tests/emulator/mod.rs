//! A GPU for tests: the kernels' own source as C++, in a program that g++ builds when the tests run. Threads of a block are
//! fibers, tensor cores are loops; arguments are checked against the kernels' signatures.

mod build;
mod library_ops;

use ddpm_engine::{Error, Result};
use ddpm_engine_cuda::gpu::{Gpu, Step};
use ddpm_engine_cuda::launch::{Arg, Launch};
use ddpm_engine_cuda::library::{Algorithm, Call, LibraryOp};
use ddpm_engine_cuda::source::SOURCES;
use ddpm_engine_cuda::streams::StreamSlot;
use ddpm_rng::{Purpose, Stream, below};
use std::io::{BufReader, BufWriter, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

struct Pipes {
    child: Child,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
}

/// The order in which a block's threads run between two barriers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// First to last.
    Forwards,
    /// Last to first.
    Backwards,
}

/// An emulated GPU.
pub struct Emulator {
    pipes: Mutex<Pipes>,
    /// Recorded graphs.
    graphs: Vec<Vec<(Vec<Call<usize>>, StreamSlot)>>,
    replays: AtomicU32,
    /// Whether it has libraries, which then support every operation.
    pub libraries: bool,
}

impl Emulator {
    /// A new one; `None` if there is no C++ compiler: the test should then return.
    pub fn new() -> Option<Self> {
        Self::with(Order::Forwards)
    }

    /// The same, with a given order of threads.
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

    /// Sends a command, checks its reply, and reads `out` bytes of data after it.
    fn request(&self, what: &str, parts: &[&[u8]], out: &mut [u8]) -> Result<()> {
        let mut pipes = self.pipes.lock().expect("no test panicked here");
        let error = |reason: String| Error::Device { device: "emulator".to_owned(), reason };
        let mut exchange = || -> std::io::Result<String> {
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
        match exchange() {
            Ok(text) if text.is_empty() => Ok(()),
            Ok(text) => Err(error(text)),
            Err(e) => Err(error(format!("the emulator ended in {what}: {e}"))),
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

fn le_bytes(v: usize) -> [u8; 8] {
    (v as u64).to_le_bytes()
}

/// The only algorithm offered for an operation.
fn algorithm_for(op: &LibraryOp<usize>) -> Algorithm {
    Algorithm { words: [7; 8], workspace: op.workspace.1 }
}

impl Gpu for Emulator {
    fn describe(&self) -> String {
        "emulated GPU".to_owned()
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.request("reserve", &[b"r", &le_bytes(bytes)], &mut [])
    }

    fn prepare(&mut self, kernels: &[&'static str]) -> Result<()> {
        for kernel in kernels {
            assert!(SOURCES.iter().any(|s| s.kernels.contains(kernel)), "{kernel} is not in `SOURCES`");
        }
        Ok(())
    }

    fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        self.request("write", &[b"w", &le_bytes(at), &le_bytes(data.len()), data], &mut [])
    }

    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        self.request("read", &[b"g", &le_bytes(at), &le_bytes(out.len())], out)
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
        self.request(launch.kernel, &[&bytes], &mut [])
    }

    fn algorithms(&mut self, op: &LibraryOp<usize>) -> Vec<Algorithm> {
        self.libraries.then(|| algorithm_for(op)).into_iter().collect()
    }

    fn call_library(&self, op: &LibraryOp<usize>, algorithm: &Algorithm) -> Result<()> {
        assert!(self.libraries && *algorithm == algorithm_for(op), "an algorithm that was not offered");
        library_ops::run(self, op)
    }

    fn record(&mut self, steps: &[Step<'_>]) -> Result<Option<usize>> {
        self.graphs.push(steps.iter().map(|step| (step.calls.to_vec(), step.slot.clone())).collect());
        Ok(Some(self.graphs.len() - 1))
    }

    /// In a random order that streams and waits allow, different each time.
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

    fn throttle(&self) -> Result<()> {
        Ok(())
    }
}
