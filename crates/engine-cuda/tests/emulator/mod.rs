//! A GPU for tests: the kernels' own text as C++, in a program that g++ makes when the tests run. Threads of a block are
//! fibers, tensor cores are loops; arguments are checked against the kernels' signatures.

use ddpm_engine::{Error, Result};
use ddpm_engine_cuda::gpu::{Arg, Gpu, Launch};
use ddpm_engine_cuda::source::{COMMON, SOURCES};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};

/// The emulator's program; `None`, with a line on the standard output, where there is no C++ compiler.
fn program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM.get_or_init(build).as_deref()
}

fn build() -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    if !Command::new(&compiler).arg("--version").output().is_ok_and(|o| o.status.success()) {
        println!("skipped: no C++ compiler ({compiler}) to emulate a GPU with");
        return None;
    }
    if !cfg!(target_os = "linux") {
        println!("skipped: the emulator is for Linux");
        return None;
    }
    let mut texts: Vec<&str> = Vec::new();
    for source in SOURCES {
        if !texts.contains(&source.text) {
            texts.push(source.text);
        }
    }
    let shim = include_str!("shim.h");
    let defines: String = SOURCES.iter().filter_map(|s| s.define).map(|d| format!("#define {d}\n")).collect();
    let whole = format!("{defines}{shim}\n{COMMON}\n{}\n{}", texts.join("\n"), include_str!("machine.cpp"));
    let entries: String = SOURCES.iter().flat_map(|s| s.kernels).map(|k| format!("ENTRY({k})\n")).collect();
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let (source, program) = (folder.join("emulator.cpp"), folder.join("emulator"));
    std::fs::create_dir_all(&folder).expect("a folder for the emulator");
    // One test program builds it, others find it; two at once each make their own and rename it.
    let same = std::fs::read_to_string(&source).is_ok_and(|old| old == whole)
        && std::fs::read_to_string(folder.join("entries.h")).is_ok_and(|old| old == entries);
    if same && program.exists() {
        return Some(program);
    }
    let mine = folder.join(format!("build-{}", std::process::id()));
    std::fs::create_dir_all(&mine).expect("a folder for the emulator");
    std::fs::write(mine.join("emulator.cpp"), &whole).expect("the emulator's source");
    std::fs::write(mine.join("entries.h"), &entries).expect("the list of kernels");
    let made = Command::new(&compiler)
        .args([
            "-std=c++17",
            "-O2",
            "-U_FORTIFY_SOURCE",
            "-fsanitize=alignment",
            "-fsanitize-undefined-trap-on-error",
            "-w",
            "-o",
            "emulator",
            "emulator.cpp",
        ])
        .current_dir(&mine)
        .output()
        .expect("the compiler runs");
    assert!(made.status.success(), "the kernels are no C++:\n{}", String::from_utf8_lossy(&made.stderr));
    for name in ["emulator", "entries.h", "emulator.cpp"] {
        std::fs::rename(mine.join(name), folder.join(name)).expect("the emulator's place");
    }
    let _ = std::fs::remove_dir(&mine);
    Some(program)
}

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
    graphs: Vec<Vec<Launch<usize>>>,
}

impl Emulator {
    /// A new one; `None` where there is no C++ compiler, which a test says and ends.
    pub fn new() -> Option<Self> {
        Self::with(Order::Forwards)
    }

    /// The same, with another order of threads.
    pub fn with(order: Order) -> Option<Self> {
        let mut child = Command::new(program()?)
            .args((order == Order::Backwards).then_some("backwards"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the emulator starts");
        let to = BufWriter::new(child.stdin.take().expect("piped"));
        let from = BufReader::new(child.stdout.take().expect("piped"));
        Some(Self { pipes: Mutex::new(Pipes { child, to, from }), graphs: Vec::new() })
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

    fn record(&mut self, launches: &[Launch<usize>]) -> Result<Option<usize>> {
        self.graphs.push(launches.to_vec());
        Ok(Some(self.graphs.len() - 1))
    }

    fn replay(&self, graph: usize) -> Result<()> {
        self.graphs[graph].iter().try_for_each(|launch| self.launch(launch))
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn pace(&self) -> Result<()> {
        Ok(())
    }
}
