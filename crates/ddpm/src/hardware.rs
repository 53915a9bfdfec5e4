//! Device selection: the CPU or an NVIDIA GPU.

use crate::settings::section;
use ddpm_engine::{ComputeOptions, Device, MatmulDtype};
use ddpm_engine_cpu::CpuDevice;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The setting `compute.device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first NVIDIA GPU if CUDA support is compiled in and a usable one is found, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU with this index.
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
            format!(
                "{text:?} is not a device; give auto, cpu, cuda or, for another GPU than the first, cuda:1"
            )
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

/// Precision of the operands of convolutions and linear layers; accumulation and weights are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// No rounding.
    #[default]
    F32,
    /// bf16: 8 bits of mantissa.
    Bf16,
    /// tf32 on GPUs: 11 bits of mantissa. No rounding on the CPU.
    Tf32,
}

section! {
    /// The device, and how it computes.
    pub struct ComputeConfig {
        /// Device: "cpu", "cuda" (an NVIDIA GPU; "cuda:1" is the second one) or "auto" (a GPU if one is found and the program was built with CUDA support, else the CPU).
        #[alias = "train.device"]
        free device: DeviceChoice = DeviceChoice::Auto,
        /// CPU threads; 0: all of the machine's.
        #[alias = "train.threads"]
        free threads: usize = 0,
        /// Precision of matmul operands: "f32", "bf16" (faster on GPUs and on CPUs with AVX512-BF16; on every CPU, training also stores some activations in bf16 to save memory) or "tf32" (GPUs only).
        #[alias = "train.precision"]
        noted precision: Precision = Precision::F32,
        /// Make GPU results bit-for-bit reproducible by using only the built-in kernels; otherwise cuDNN and cuBLASLt, if installed, are used where they measure faster, and the last bits may differ between runs. CPU results are always reproducible.
        #[alias = "train.deterministic"]
        noted deterministic: bool = false,
        /// Allow the Winograd algorithm for 3x3 convolutions and 4x4 convolutions with stride 2: up to 3 times as fast, with about 5 times the rounding error of f32.
        #[alias = "train.winograd"]
        noted winograd: bool = true,
    }
}

impl ComputeConfig {
    /// The executor's numeric options.
    pub fn options(&self) -> ComputeOptions {
        let matmul_dtype = match self.precision {
            Precision::F32 | Precision::Tf32 => MatmulDtype::F32,
            Precision::Bf16 => MatmulDtype::Bf16,
        };
        ComputeOptions { winograd: self.winograd, matmul_dtype }
    }

    /// The device and its options.
    pub fn hardware(&self) -> Hardware {
        let tf32 = self.precision == Precision::Tf32;
        Hardware { device: self.device, threads: self.threads, tf32, deterministic: self.deterministic }
    }
}

/// A device and its compute options; by default the first GPU that can be used, or else all cores of the CPU. A thread count
/// converts to the CPU with that many threads; 0 means all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// The device.
    pub device: DeviceChoice,
    /// CPU threads; 0 means all cores.
    pub threads: usize,
    /// Whether a GPU may round f32 matmul operands to TF32.
    pub tf32: bool,
    /// Whether a GPU uses only our own kernels, whose choice never depends on timing.
    pub deterministic: bool,
}

impl Hardware {
    /// Opens the device that networks run on; the only place that chooses it.
    ///
    /// # Errors
    /// [`ddpm_engine::Error::Device`] for a GPU if this program was built without GPU support or the GPU cannot
    /// be used.
    pub(crate) fn open(self) -> crate::Result<Box<dyn Device>> {
        let cpu = || Box::new(CpuDevice { threads: self.threads });
        #[cfg(feature = "cuda")]
        {
            use ddpm_engine_cuda::{CudaDevice, library::Libraries, lower::CudaOptions};
            let libraries = if self.deterministic { Libraries::Never } else { Libraries::Timed };
            let options = CudaOptions { tf32: self.tf32, libraries, ..CudaOptions::default() };
            let gpu = |index| CudaDevice { index, options };
            match self.device {
                DeviceChoice::Cpu => Ok(cpu()),
                DeviceChoice::Auto if gpu(0).check().is_err() => Ok(cpu()),
                DeviceChoice::Auto => Ok(Box::new(gpu(0))),
                DeviceChoice::Cuda(index) => {
                    gpu(index).check()?;
                    Ok(Box::new(gpu(index)))
                }
            }
        }
        #[cfg(not(feature = "cuda"))]
        match self.device {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(cpu()),
            DeviceChoice::Cuda(_) => {
                let reason = "this program was built without NVIDIA GPU support: build it with --features cuda, or use --device cpu";
                let device = self.device.to_string();
                Err(ddpm_engine::Error::Device { device, reason: reason.to_owned() }.into())
            }
        }
    }
}

impl From<usize> for Hardware {
    fn from(threads: usize) -> Self {
        Self { device: DeviceChoice::Cpu, threads, tf32: false, deterministic: false }
    }
}

/// Starts the thread pool shared by file I/O. If the system cannot create threads, the calling thread does the work; without
/// this, rayon would panic later.
pub fn start_shared_threads() {
    let threads = || rayon::ThreadPoolBuilder::new().thread_name(|i| format!("shared-{i}"));
    // The global pool can be built only once, so a temporary pool tests whether threads can be created.
    let _ = match threads().build() {
        Ok(_) => threads().build_global(),
        Err(_) => threads().num_threads(1).use_current_thread().build_global(),
    };
}

/// The result of probing a CUDA library or a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeResult {
    /// Its name.
    pub name: String,
    /// Its description, or why it is unusable.
    pub state: Result<String, String>,
}

/// Probes the libraries and GPUs that [`DeviceChoice::Cuda`] would use.
#[cfg(feature = "cuda")]
pub fn probe_cuda() -> Vec<ProbeResult> {
    use ddpm_engine_cuda::probe;
    let libraries = probe::libraries().into_iter();
    let mut all: Vec<ProbeResult> = libraries
        .map(|l| ProbeResult {
            name: l.name.to_owned(),
            state: l
                .version
                .map(|v| format!("{v} ({})", l.purpose))
                .map_err(|e| format!("{e} ({})", l.purpose)),
        })
        .collect();
    match probe::devices() {
        Err(reason) => all.push(ProbeResult { name: "GPUs".to_owned(), state: Err(reason) }),
        Ok(found) if found.is_empty() => {
            all.push(ProbeResult { name: "GPUs".to_owned(), state: Err("none found".to_owned()) });
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
            ProbeResult { name: format!("cuda:{}", gpu.index), state }
        })),
    }
    all
}

/// Empty, as this build has no CUDA support.
#[cfg(not(feature = "cuda"))]
pub fn probe_cuda() -> Vec<ProbeResult> {
    Vec::new()
}

/// Whether CUDA support is compiled in.
pub const BUILT_FOR_CUDA: bool = cfg!(feature = "cuda");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_round_trip() {
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
