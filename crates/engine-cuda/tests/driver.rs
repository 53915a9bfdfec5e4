//! Everything on top of NVIDIA's driver API (`driver.rs`, `ffi.rs`, `compile.rs`, `probe.rs`), with a stand-in for the driver and
//! NVRTC whose kernels are emulated. Skipped, with a message, if there is no C++ compiler.

#[path = "libraries/by_driver.rs"]
mod libraries;
mod networks;
mod stand_in;
#[allow(dead_code, unused_imports, reason = "shared with other tests")]
mod table;
mod training;

use ddpm_engine::ops::{Conv2d, Loss};
use ddpm_engine::passes::autodiff::backward;
use ddpm_engine::{
    AdamStep, ComputeOptions, Device, Error, Executor, Graph, MatmulDtype, PlanOptions, Region, Result,
    RngKey, Tensor,
};
use ddpm_engine_cuda::lower::CudaOptions;
use ddpm_engine_cuda::source::SOURCES;
use ddpm_engine_cuda::{CudaDevice, probe};
use ddpm_rng::{Purpose, Stream};
use stand_in::build::ALL;
use stand_in::in_own_process;

fn make(cuda_options: CudaOptions) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| {
        CudaDevice { index: 0, options: cuda_options }.executor(graph, options).expect("an executor")
    }
}

#[test]
fn operations_agree_with_the_cpu() {
    let report = in_own_process("operations_agree_with_the_cpu", "all", ALL, &[], || {
        // A sample: `emulated.rs` has all cases, and the driver code does not depend on which kernels it launches.
        for case in table::cases(table::Form::Plain).iter().step_by(7) {
            table::agree(case, ComputeOptions::default(), 1e-5, &make(CudaOptions::default()));
        }
        let convolution = &table::convolutions(table::Form::Plain)[1];
        let tf32 = CudaOptions { tf32: true, ..CudaOptions::default() };
        table::agree(convolution, ComputeOptions::default(), 2e-3, &make(tf32));
        let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
        let cuda_options = CudaOptions { min_bf16_elems: 1, ..CudaOptions::default() };
        for case in table::cases(table::Form::Stored).iter().step_by(7) {
            table::agree(case, bf16, table::BF16_TOLERANCE, &make(cuda_options));
        }
    });
    let Some(report) = report else { return };
    report.assert_all_released();
    assert!(report.count("captures") > 30, "every plan is captured");
    assert_eq!(report.count("captures"), report.count("graph_launches"), "each was run once");
    // A process compiles a source once.
    assert!(report.count("compiled") <= SOURCES.len() as u64);
}

#[test]
fn kernels_are_compiled_once_across_processes() {
    let folder = std::env::temp_dir().join(format!("ddpm-cache-{}", std::process::id()));
    let cache = folder.to_str().expect("a UTF-8 path");
    let mut compiled = Vec::new();
    for scenario in ["first", "second", "damaged"] {
        if scenario == "damaged" && !compiled.is_empty() {
            let mut files = std::fs::read_dir(&folder).expect("the folder");
            let file = files.next().expect("a file").expect("its name").path();
            std::fs::write(file, "no code").expect("written");
        }
        let test = "kernels_are_compiled_once_across_processes";
        let report = in_own_process(test, scenario, ALL, &[("CACHE", cache)], || {
            let small = Small::new();
            small.agree(&mut *small.on_gpu().expect("an executor"), 1);
        });
        compiled.extend(report.map(|report| report.count("compiled")));
    }
    if compiled.is_empty() {
        return;
    }
    std::fs::remove_dir_all(&folder).expect("the folder");
    assert!(compiled[0] > 1 && compiled[1..] == [0, 1], "{compiled:?}");
}

#[test]
fn training_steps_agree_with_the_cpu_and_repeat_to_the_bit() {
    let test = "training_steps_agree_with_the_cpu_and_repeat_to_the_bit";
    for (scenario, settings) in
        [("with pools", &[][..]), ("without pools", &[("POOLS", "0"), ("ORDER", "backwards")])]
    {
        let report = in_own_process(test, scenario, ALL, settings, || {
            training::host_controlled(&make(CudaOptions::default()));
            training::fused_steps(&make(CudaOptions::default()));
            training::skipped_updates(&make(CudaOptions::default()));
            training::clipped(&make(CudaOptions::default()));
            training::states_are_restored(&make(CudaOptions::default()));
        });
        let Some(report) = report else { continue };
        report.assert_all_released();
        assert!(
            report.count("graph_launches") > 10 && report.count("max_pending") > 30,
            "nothing is asynchronous"
        );
        assert!(report.count("joined") > 0, "nothing runs concurrently");
    }
}

#[test]
fn networks_agree_with_the_cpu() {
    let report = in_own_process("networks_agree_with_the_cpu", "all", ALL, &[], || {
        networks::agree(2e-4, &make(CudaOptions::default()));
    });
    if let Some(report) = report {
        report.assert_all_released();
    }
}

/// A convolution with inputs large enough for pinned buffers.
struct Small {
    graph: Graph,
    x: Tensor,
    loss: Tensor,
    gradients: Vec<Tensor>,
}

impl Small {
    fn new() -> Self {
        let mut b = table::Build::default();
        let x = b.input([2, 53, 53, 3]);
        let (w, bias) = (b.p([1, 1, 3, 3]), b.p([3]));
        let y = b.add(Conv2d::linear(), &[x, w, bias]);
        let loss = b.add(Loss::Mse, &[y, x]);
        let mut graph = b.graph;
        let gradients = backward(&mut graph, loss).expect("gradients");
        Self { graph, x, loss, gradients }
    }

    fn options(&self) -> PlanOptions {
        PlanOptions {
            gradients: Some(self.gradients.clone()),
            accumulate: true,
            outputs: vec![self.loss],
            ..PlanOptions::default()
        }
    }

    fn write_weights(&self, exec: &mut dyn Executor) -> Result<()> {
        exec.write_parameter(Region::Weights, 0, &[0.5, 0.1, -0.2, 0.3, 0.7, 0.0, -0.4, 0.2, 0.9])?;
        exec.write_parameter(Region::Weights, 1, &[0.1, -0.1, 0.2])
    }

    /// A step over several batches without waiting in between: the norm, and the summed gradients.
    fn step(&self, exec: &mut dyn Executor, step: u64, batches: u32) -> Result<(f64, Vec<f32>)> {
        for batch in 0..batches {
            let mut x = vec![0.0; self.graph.shape(self.x).len()];
            Stream::new(step, Purpose::Test, batch, 0).fill_normal(&mut x);
            exec.write(self.x, &x)?;
            // `write` must not read the caller's buffer after it returns.
            x.fill(f32::NAN);
            exec.run(RngKey::default())?;
            exec.accumulate(batch == 0)?;
        }
        let norm = exec.gradient_norm()?;
        let mut sums = vec![f32::NAN; 9];
        exec.read_parameter(Region::GradientSum, 0, &mut sums)?;
        exec.update(&AdamStep {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decoupled: false,
            step,
            ema_decay: 0.0,
            grad_scale: 1.0,
        })?;
        Ok((norm, sums))
    }

    fn on_gpu(&self) -> Result<Box<dyn Executor>> {
        CudaDevice::default().executor(self.graph.clone(), &self.options())
    }

    /// Runs `steps` steps and compares them with the CPU's.
    fn agree(&self, exec: &mut dyn Executor, steps: u64) {
        let mut cpu = table::on_cpu(&self.graph, &self.options());
        self.write_weights(exec).expect("weights");
        self.write_weights(&mut *cpu).expect("weights");
        for step in 1..=steps {
            let (norm, sums) = self.step(exec, step, 5).expect("a step");
            let (want_norm, want) = self.step(&mut *cpu, step, 5).expect("a step");
            assert!((norm - want_norm).abs() < 1e-5 * want_norm, "step {step}: {norm}, not {want_norm}");
            for (got, want) in sums.iter().zip(want) {
                assert!((got - want).abs() < 1e-5 * want_norm as f32, "step {step}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn pinned_buffers_are_not_overwritten_too_early() {
    let test = "pinned_buffers_are_not_overwritten_too_early";
    let run = || {
        let small = Small::new();
        small.agree(&mut *small.on_gpu().expect("an executor"), 3);
    };
    if let Some(report) = in_own_process(test, "pinned", ALL, &[], run) {
        report.assert_all_released();
        assert_eq!(report.count("pinned_copies"), 15);
        assert!(report.count("max_pending") > 10, "uploads must be asynchronous");
    }
    // Without pinned memory, uploads are slower but work.
    let settings = [("FAIL", "pinned:2:2 pinned:3:2 pinned:4:2")];
    if let Some(report) = in_own_process(test, "no pinned memory left", ALL, &settings, run) {
        report.assert_all_released();
        assert!((1..15).contains(&report.count("pinned_copies")), "{}", report.count("pinned_copies"));
    }
}

#[test]
fn an_executor_moves_between_threads() {
    let report = in_own_process("an_executor_moves_between_threads", "all", ALL, &[], || {
        let small = Small::new();
        std::thread::scope(|scope| {
            let both: Vec<_> = (0..2)
                .map(|_| {
                    let made = scope.spawn(|| small.on_gpu().expect("an executor")).join().expect("no panic");
                    scope.spawn(|| {
                        let mut exec = made;
                        small.agree(&mut *exec, 1);
                        exec
                    })
                })
                .collect();
            for exec in both {
                let exec = exec.join().expect("no panic");
                // Dropped on a thread that never used it.
                scope.spawn(move || drop(exec)).join().expect("no panic");
            }
        });
    });
    if let Some(report) = report {
        report.assert_all_released();
    }
}

/// Asserts that an error contains all of these words.
fn assert_mentions(error: &dyn std::fmt::Display, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is missing: {text}");
    }
    println!("{text}");
}

#[test]
fn startup_problems_are_reported() {
    let test = "startup_problems_are_reported";
    let driver = &["libcuda.so", "libcuda.so.1"][..];
    type Scenario<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], CudaDevice, &'a [&'a str]);
    let first = CudaDevice::default();
    let second = CudaDevice { index: 1, ..first };
    let scenarios: [Scenario<'_>; 13] = [
        ("no driver", &[], &[], first, &["libcuda.so", "install it", "--device cpu"]),
        ("no NVRTC", driver, &[], first, &["NVRTC", "pip install", "LD_LIBRARY_PATH"]),
        ("no GPU", ALL, &[("DEVICES", "0")], first, &["no NVIDIA GPU", "--device cpu"]),
        ("no second GPU", ALL, &[], second, &["cuda:1", "1 NVIDIA GPU(s)", "doctor"]),
        ("an old GPU", ALL, &[("CAPABILITY", "7.5")], first, &["7.5", "8.0 (Ampere)", "--device cpu"]),
        ("an old driver", ALL, &[("DRIVER", "11040")], first, &["CUDA up to 11.4", "12.0", "newer driver"]),
        (
            "NVRTC newer than the driver",
            ALL,
            &[("DRIVER", "12040"), ("NVRTC", "13000")],
            first,
            &["up to 12.4", "CUDA 13.0", "nvidia-cuda-nvrtc-cu12"],
        ),
        ("a driver mismatch", ALL, &[("FAIL", "init:1:803")], first, &["different versions", "restart"]),
        ("a stub", ALL, &[("FAIL", "init:1:34")], first, &["stub", "LD_LIBRARY_PATH"]),
        (
            "a broken driver",
            ALL,
            &[("FAIL", "init:1:999")],
            first,
            &["cannot start", "nvidia-smi", "UNKNOWN"],
        ),
        ("an exclusive GPU", ALL, &[("FAIL", "retain:1:46")], first, &["another program has exclusive use"]),
        ("an unknown GPU", ALL, &[("CAPABILITY", "12.0")], first, &["12.0", "NVRTC older", "--gpu-arch"]),
        ("a compile error", ALL, &[("BROKEN", "conv")], first, &["conv.cu", "identifier is undefined"]),
    ];
    for (scenario, libraries, settings, device, words) in scenarios {
        let report = in_own_process(test, scenario, libraries, settings, || {
            let small = Small::new();
            match device.executor(small.graph.clone(), &small.options()) {
                // The machine has a real one elsewhere.
                Ok(_) if libraries.len() < ALL.len() => println!("skipped: {scenario}"),
                Ok(_) => panic!("{scenario}: it starts"),
                Err(error) => assert_mentions(&error, words),
            }
        });
        if let Some(report) = report {
            report.assert_all_released();
        }
    }
    // The library names on machines without the toolkit.
    in_own_process(test, "short names", &["libcuda.so.1", "libnvrtc.so.12"], &[], || {
        let small = Small::new();
        small.agree(&mut *small.on_gpu().expect("an executor"), 1);
    });
}

#[test]
fn missing_memory_is_reported_and_freed_memory_is_reused() {
    let test = "missing_memory_is_reported_and_freed_memory_is_reused";
    let words = ["MiB of GPU memory needed", "train.batch_size", "train.accumulate"];
    for (scenario, settings) in
        [("before allocation", ("MEMORY", "0")), ("during allocation", ("FAIL", "alloc:1:2"))]
    {
        let report = in_own_process(test, scenario, ALL, &[settings], || {
            let Err(error) = Small::new().on_gpu() else { panic!("it starts") };
            assert!(matches!(error, Error::Resources(_)));
            assert_mentions(&error, &words);
        });
        if let Some(report) = report {
            report.assert_all_released();
        }
    }
    for (scenario, fail) in [("for a module", "module:1:2"), ("for a graph", "graph:1:2")] {
        let report = in_own_process(test, scenario, ALL, &[("FAIL", fail)], || {
            let Err(error) = Small::new().on_gpu() else { panic!("it starts") };
            assert_mentions(&error, &["not enough free GPU memory", "train.batch_size"]);
        });
        if let Some(report) = report {
            report.assert_all_released();
        }
    }
    // Enough for one plan, not for two.
    let settings = [("MEMORY", "350")];
    let report = in_own_process(test, "one plan after another", ALL, &settings, || {
        let small = Small::new();
        let bytes = CudaDevice::default().footprint(small.graph.clone(), &small.options()).expect("a plan");
        assert!((175 << 10..350 << 10).contains(&bytes.arena_bytes), "{bytes:?}");
        for _ in 0..3 {
            small.agree(&mut *small.on_gpu().expect("an executor"), 1);
        }
    });
    if let Some(report) = report {
        report.assert_all_released();
    }
}

#[test]
fn a_lost_gpu_is_reported_and_harms_nothing_else() {
    let test = "a_lost_gpu_is_reported_and_harms_nothing_else";
    let failures = [
        ("launch:1:719", "LAUNCH_FAILED"),
        ("launch:4:214", "ECC_UNCORRECTABLE"),
        ("launch:33:700", "ILLEGAL_ADDRESS"),
        ("launch:71:999", "UNKNOWN"),
        ("sync:4:719", "LAUNCH_FAILED"),
        ("sync:9:710", "ASSERT"),
    ];
    for (fail, name) in failures {
        in_own_process(test, fail, ALL, &[("FAIL", fail)], || {
            let small = Small::new();
            let mut exec = small.on_gpu().expect("an executor");
            let mut run = || -> Result<()> {
                small.write_weights(&mut *exec)?;
                (1..=9).try_for_each(|step| small.step(&mut *exec, step, 3).map(|_| ()))
            };
            let error = run().expect_err("it is lost");
            assert!(matches!(error, Error::Device { .. }));
            assert_mentions(
                &error,
                &["cuda:0", "the GPU was lost", "checkpoint is intact", "--resume", name],
            );
            // It stays lost, whatever is called.
            assert_mentions(&small.write_weights(&mut *exec).expect_err("lost"), &[name]);
            assert_mentions(&small.step(&mut *exec, 1, 1).expect_err("lost"), &[name]);
            assert_mentions(&exec.run(RngKey::default()).expect_err("lost"), &[name]);
            assert_mentions(&exec.gradient_norm().expect_err("lost"), &[name]);
            assert_mentions(&exec.read(small.loss, &mut [0.0]).expect_err("lost"), &[name]);
            assert!(exec.describe().contains("cuda:0"));
            drop(exec);
            let Err(error) = small.on_gpu() else { panic!("it is there again") };
            assert_mentions(&error, &["cannot start", name]);
        });
    }
}

#[test]
fn probing_finds_libraries_and_gpus() {
    let test = "probing_finds_libraries_and_gpus";
    let settings = [("DEVICES", "2"), ("MEMORY", "1024000"), ("DRIVER", "12080")];
    let report = in_own_process(test, "two GPUs", ALL, &settings, || {
        // cuDNN and cuBLASLt follow; the machine may have them.
        let versions: Vec<_> = probe::libraries().into_iter().take(2).map(|l| l.version).collect();
        assert_eq!(versions, [Ok("supports CUDA up to 12.8".to_owned()), Ok("12.9".to_owned())]);
        let found = probe::devices().expect("two");
        assert_eq!(found.len(), 2);
        assert_eq!((found[1].index, found[1].name.as_str()), (1, "Stand-in GPU 1"));
        assert_eq!((found[1].capability, found[1].usable.clone()), ((9, 0), Ok(())));
        assert_eq!(found[1].memory, (1000 << 20, 8192 << 20));
        let small = Small::new();
        let second = CudaDevice { index: 1, ..CudaDevice::default() };
        let mut exec = second.executor(small.graph.clone(), &small.options()).expect("an executor");
        assert_eq!(exec.describe(), "Stand-in GPU 1 (cuda:1)");
        small.agree(&mut *exec, 1);
    });
    if let Some(report) = report {
        report.assert_all_released();
    }
    in_own_process(test, "an old GPU", ALL, &[("CAPABILITY", "7.0")], || {
        let found = probe::devices().expect("one");
        assert_eq!(found[0].capability, (7, 0));
        assert_mentions(found[0].usable.as_ref().expect_err("too old"), &["7.0", "8.0 (Ampere)"]);
    });
    in_own_process(test, "no GPU", ALL, &[("DEVICES", "0")], || {
        assert!(probe::devices().expect_err("none").contains("no NVIDIA GPU"));
    });
    in_own_process(test, "nothing", &[], &[], || {
        if probe::libraries().iter().all(|l| l.version.is_err()) {
            assert!(probe::devices().expect_err("no driver").contains("libcuda.so"));
        }
    });
}
