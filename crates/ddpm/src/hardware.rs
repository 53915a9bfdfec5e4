//! What networks run on: the CPU's cores or an NVIDIA GPU.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The setting `train.device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first NVIDIA GPU if the program was built for them and one can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU's cores.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!("{text:?} is no device; write auto, cpu, cuda or, for another GPU than the first, cuda:1")
        };
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let number = text.strip_prefix("cuda:").ok_or_else(wrong)?;
                number.parse().map(Self::Cuda).map_err(|_| wrong())
            }
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// A device, and how it computes. A number of threads stands for the CPU with so many, 0 for all of its cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Which.
    pub device: DeviceChoice,
    /// Threads on the CPU; 0 takes all cores.
    pub threads: usize,
    /// Whether a GPU may round f32 factors to tf32.
    pub tf32: bool,
    /// Whether a GPU computes by our kernels alone: which of them are taken never depends on the clock.
    pub deterministic: bool,
}

impl From<usize> for Hardware {
    fn from(threads: usize) -> Self {
        Self { device: DeviceChoice::Cpu, threads, tf32: false, deterministic: false }
    }
}

/// Starts the threads that reading and writing files share. Where the system gives none, the caller's does their work: later on that
/// would be a panic.
pub fn start_shared_threads() {
    let threads = || rayon::ThreadPoolBuilder::new().thread_name(|i| format!("shared-{i}"));
    // A pool that fails cannot be tried again: another one tells whether there are threads.
    let _ = match threads().build() {
        Ok(_) => threads().build_global(),
        Err(_) => threads().num_threads(1).use_current_thread().build_global(),
    };
}

/// A library or GPU that a program with the feature `cuda` looks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Its name.
    pub name: String,
    /// What is known of it, or why it cannot be used.
    pub state: Result<String, String>,
}

/// Libraries and GPUs as [`DeviceChoice::Cuda`] would find them.
#[cfg(feature = "cuda")]
pub fn findings() -> Vec<Finding> {
    use ddpm_engine_cuda::probe;
    let libraries = probe::libraries().into_iter();
    let mut all: Vec<Finding> = libraries
        .map(|l| Finding {
            name: l.name.to_owned(),
            state: l
                .version
                .map(|v| format!("{v} ({})", l.purpose))
                .map_err(|e| format!("{e} ({})", l.purpose)),
        })
        .collect();
    match probe::devices() {
        Err(reason) => all.push(Finding { name: "GPUs".to_owned(), state: Err(reason) }),
        Ok(found) if found.is_empty() => {
            all.push(Finding { name: "GPUs".to_owned(), state: Err("there are none".to_owned()) });
        }
        Ok(found) => all.extend(found.into_iter().map(|gpu| {
            let ((major, minor), (free, total)) = (gpu.capability, gpu.memory);
            let text = format!(
                "{}, compute capability {major}.{minor}, {} of {} MiB free",
                gpu.name,
                free >> 20,
                total >> 20
            );
            let state = match gpu.usable {
                Ok(()) => Ok(text),
                Err(reason) => Err(format!("{reason} ({text})")),
            };
            Finding { name: format!("cuda:{}", gpu.index), state }
        })),
    }
    all
}

/// Nothing: this program was built without them.
#[cfg(not(feature = "cuda"))]
pub fn findings() -> Vec<Finding> {
    Vec::new()
}

/// Whether the program can use NVIDIA GPUs at all.
pub const BUILT_FOR_CUDA: bool = cfg!(feature = "cuda");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string(), text);
        }
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", ""] {
            let error = text.parse::<DeviceChoice>().expect_err("no device");
            assert!(error.contains("cuda:1"), "{error}");
        }
    }
}
