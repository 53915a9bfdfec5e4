//! The GPU by NVIDIA's driver (`driver.rs`, `ffi.rs`, `compile.rs`, `probe.rs`), with a stand-in for the driver and NVRTC
//! whose kernels are emulated. Skipped, with a line, where there is no C++ compiler.

#[path = "libraries/by_driver.rs"]
mod libraries;
mod networks;
mod stand_in;
#[allow(dead_code, reason = "the other tests' too")]
mod table;
mod training;

use ddpm_engine::autodiff::backward;
use ddpm_engine::ops::{Conv2d, Loss};
use ddpm_engine::rng::{Purpose, Stream};
use ddpm_engine::{
    AdamStep, ComputeOptions, Device, Draws, Error, Executor, Graph, MatmulDtype, PlanOptions, Region,
    Result, Tensor,
};
use ddpm_engine_cuda::source::SOURCES;
use ddpm_engine_cuda::translate::Choices;
use ddpm_engine_cuda::{CudaDevice, probe};
use stand_in::apart;
use stand_in::build::ALL;

fn make(choices: Choices) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| CudaDevice { index: 0, choices }.executor(graph, options).expect("an executor")
}

#[test]
fn operations_agree_with_the_cpu() {
    let report = apart("operations_agree_with_the_cpu", "all", ALL, &[], || {
        // Some of them: `emulated.rs` has all, and the driver does not know what it launches.
        for case in table::cases(table::Form::Plain).iter().step_by(7) {
            table::agree(case, ComputeOptions::default(), 1e-5, &make(Choices::default()));
        }
        let convolution = &table::convolutions(table::Form::Plain)[1];
        let tf32 = Choices { tf32: true, ..Choices::default() };
        table::agree(convolution, ComputeOptions::default(), 2e-3, &make(tf32));
        let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
        let choices = Choices { least_bf16: 1, ..Choices::default() };
        for case in table::cases(table::Form::Stored).iter().step_by(7) {
            table::agree(case, bf16, table::STORED, &make(choices));
        }
    });
    let Some(report) = report else { return };
    report.nothing_left();
    assert!(report.of("captures") > 30, "every plan is a graph");
    assert_eq!(report.of("captures"), report.of("graph_launches"), "each was run once");
    // A process compiles a source once.
    assert!(report.of("compiled") <= SOURCES.len() as u64);
}

#[test]
fn kernels_are_compiled_once_for_all_starts() {
    let folder = std::env::temp_dir().join(format!("ddpm-cache-{}", std::process::id()));
    let cache = folder.to_str().expect("plain letters");
    let mut compiled = Vec::new();
    for scenario in ["first", "second", "damaged"] {
        if scenario == "damaged" && !compiled.is_empty() {
            let mut files = std::fs::read_dir(&folder).expect("the folder");
            let file = files.next().expect("a file").expect("its name").path();
            std::fs::write(file, "no code").expect("written");
        }
        let test = "kernels_are_compiled_once_for_all_starts";
        let report = apart(test, scenario, ALL, &[("CACHE", cache)], || {
            let small = Small::new();
            small.agree(&mut *small.on_gpu().expect("an executor"), 1);
        });
        compiled.extend(report.map(|report| report.of("compiled")));
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
        let report = apart(test, scenario, ALL, settings, || {
            training::by_the_host(&make(Choices::default()));
            training::in_runs(&make(Choices::default()));
            training::held(&make(Choices::default()));
            training::clipped(&make(Choices::default()));
            training::states_are_kept(&make(Choices::default()));
        });
        let Some(report) = report else { continue };
        report.nothing_left();
        assert!(report.of("graph_launches") > 10 && report.of("most_pending") > 30, "nothing waits");
        assert!(report.of("joined") > 0, "nothing runs side by side");
    }
}

#[test]
fn networks_agree_with_the_cpu() {
    let report = apart("networks_agree_with_the_cpu", "all", ALL, &[], || {
        networks::agree(2e-4, &make(Choices::default()));
    });
    if let Some(report) = report {
        report.nothing_left();
    }
}

/// A convolution whose inputs are large enough for pinned buffers.
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
            keep: vec![self.loss],
            ..PlanOptions::default()
        }
    }

    fn begin(&self, exec: &mut dyn Executor) -> Result<()> {
        exec.write_parameter(Region::Weights, 0, &[0.5, 0.1, -0.2, 0.3, 0.7, 0.0, -0.4, 0.2, 0.9])?;
        exec.write_parameter(Region::Weights, 1, &[0.1, -0.1, 0.2])
    }

    /// A step over several batches, without a wait between them: the norm, and the sums of the gradients.
    fn step(&self, exec: &mut dyn Executor, step: u64, batches: u32) -> Result<(f64, Vec<f32>)> {
        for batch in 0..batches {
            let mut x = vec![0.0; self.graph.shape(self.x).len()];
            Stream::new(step, Purpose::Test, batch, 0).fill_normal(&mut x);
            exec.write(self.x, &x)?;
            // The caller's memory is his again.
            x.fill(f32::NAN);
            exec.run(Draws::default())?;
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

    /// So many steps agree with the CPU's.
    fn agree(&self, exec: &mut dyn Executor, steps: u64) {
        let mut cpu = table::on_cpu(&self.graph, &self.options());
        self.begin(exec).expect("a beginning");
        self.begin(&mut *cpu).expect("a beginning");
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
fn images_go_through_pinned_buffers_that_are_not_overwritten_too_early() {
    let test = "images_go_through_pinned_buffers_that_are_not_overwritten_too_early";
    let run = || {
        let small = Small::new();
        small.agree(&mut *small.on_gpu().expect("an executor"), 3);
    };
    if let Some(report) = apart(test, "pinned", ALL, &[], run) {
        report.nothing_left();
        assert_eq!(report.of("pinned_copies"), 15);
        assert!(report.of("most_pending") > 10, "batches are not waited for");
    }
    // Without such memory it goes on, more slowly.
    let settings = [("FAIL", "pinned:2:2 pinned:3:2 pinned:4:2")];
    if let Some(report) = apart(test, "no pinned memory left", ALL, &settings, run) {
        report.nothing_left();
        assert!((1..15).contains(&report.of("pinned_copies")), "{}", report.of("pinned_copies"));
    }
}

#[test]
fn an_executor_moves_between_threads() {
    let report = apart("an_executor_moves_between_threads", "all", ALL, &[], || {
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
        report.nothing_left();
    }
}

/// That an error says all of it.
fn says(error: &dyn std::fmt::Display, words: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is missing: {text}");
    }
    println!("{text}");
}

#[test]
fn what_is_missing_before_the_start_is_told() {
    let test = "what_is_missing_before_the_start_is_told";
    let driver = &["libcuda.so", "libcuda.so.1"][..];
    type Scenario<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], CudaDevice, &'a [&'a str]);
    let first = CudaDevice::default();
    let second = CudaDevice { index: 1, ..first };
    let scenarios: [Scenario<'_>; 13] = [
        ("no driver", &[], &[], first, &["libcuda.so", "install it", "--device cpu"]),
        ("no NVRTC", driver, &[], first, &["NVRTC", "pip install", "LD_LIBRARY_PATH"]),
        ("no GPU", ALL, &[("DEVICES", "0")], first, &["there is no NVIDIA GPU", "--device cpu"]),
        ("no second GPU", ALL, &[], second, &["cuda:1", "there are 1 NVIDIA GPUs", "doctor"]),
        ("an old GPU", ALL, &[("CAPABILITY", "7.5")], first, &["7.5", "8.0 (Ampere)", "--device cpu"]),
        ("an old driver", ALL, &[("DRIVER", "11040")], first, &["CUDA up to 11.4", "12.0", "newer driver"]),
        (
            "NVRTC newer than the driver",
            ALL,
            &[("DRIVER", "12040"), ("NVRTC", "13000")],
            first,
            &["up to 12.4", "CUDA 13.0", "nvidia-cuda-nvrtc-cu12"],
        ),
        ("a driver's mismatch", ALL, &[("FAIL", "init:1:803")], first, &["different versions", "restart"]),
        ("a stub", ALL, &[("FAIL", "init:1:34")], first, &["stub", "LD_LIBRARY_PATH"]),
        (
            "a broken driver",
            ALL,
            &[("FAIL", "init:1:999")],
            first,
            &["cannot start", "nvidia-smi", "UNKNOWN"],
        ),
        ("an exclusive GPU", ALL, &[("FAIL", "retain:1:46")], first, &["another program keeps the GPU"]),
        (
            "an unknown GPU",
            ALL,
            &[("CAPABILITY", "12.0")],
            first,
            &["12.0", "NVRTC that is older", "--gpu-arch"],
        ),
        ("a fault in a kernel", ALL, &[("BROKEN", "conv")], first, &["conv.cu", "identifier is undefined"]),
    ];
    for (scenario, libraries, settings, device, words) in scenarios {
        let report = apart(test, scenario, libraries, settings, || {
            let small = Small::new();
            match device.executor(small.graph.clone(), &small.options()) {
                // A real one, which the machine has elsewhere.
                Ok(_) if libraries.len() < ALL.len() => println!("skipped: {scenario}"),
                Ok(_) => panic!("{scenario}: it starts"),
                Err(error) => says(&error, words),
            }
        });
        if let Some(report) = report {
            report.nothing_left();
        }
    }
    // The names that machines without the toolkit have.
    apart(test, "short names", &["libcuda.so.1", "libnvrtc.so.12"], &[], || {
        let small = Small::new();
        small.agree(&mut *small.on_gpu().expect("an executor"), 1);
    });
}

#[test]
fn memory_that_is_not_there_is_told_and_what_was_freed_is_there_again() {
    let test = "memory_that_is_not_there_is_told_and_what_was_freed_is_there_again";
    let words = ["MiB of GPU memory are needed", "train.batch_size", "train.accumulate"];
    for (scenario, settings) in
        [("before the start", ("MEMORY", "0")), ("when it is taken", ("FAIL", "alloc:1:2"))]
    {
        let report = apart(test, scenario, ALL, &[settings], || {
            let Err(error) = Small::new().on_gpu() else { panic!("it starts") };
            assert!(matches!(error, Error::Resources(_)));
            says(&error, &words);
        });
        if let Some(report) = report {
            report.nothing_left();
        }
    }
    for (scenario, fail) in [("for a module", "module:1:2"), ("for a graph", "graph:1:2")] {
        let report = apart(test, scenario, ALL, &[("FAIL", fail)], || {
            let Err(error) = Small::new().on_gpu() else { panic!("it starts") };
            says(&error, &["not enough free memory", "train.batch_size"]);
        });
        if let Some(report) = report {
            report.nothing_left();
        }
    }
    // Enough for one, not for two.
    let settings = [("MEMORY", "350")];
    let report = apart(test, "one plan after the other", ALL, &settings, || {
        let small = Small::new();
        let bytes = CudaDevice::default().footprint(small.graph.clone(), &small.options()).expect("a plan");
        assert!((175 << 10..350 << 10).contains(&bytes.arena_bytes), "{bytes:?}");
        for _ in 0..3 {
            small.agree(&mut *small.on_gpu().expect("an executor"), 1);
        }
    });
    if let Some(report) = report {
        report.nothing_left();
    }
}

#[test]
fn a_lost_gpu_is_told_and_harms_nothing_else() {
    let test = "a_lost_gpu_is_told_and_harms_nothing_else";
    let failures = [
        ("launch:1:719", "LAUNCH_FAILED"),
        ("launch:4:214", "ECC_UNCORRECTABLE"),
        ("launch:33:700", "ILLEGAL_ADDRESS"),
        ("launch:71:999", "UNKNOWN"),
        ("sync:4:719", "LAUNCH_FAILED"),
        ("sync:9:710", "ASSERT"),
    ];
    for (fail, name) in failures {
        apart(test, fail, ALL, &[("FAIL", fail)], || {
            let small = Small::new();
            let mut exec = small.on_gpu().expect("an executor");
            let mut run = || -> Result<()> {
                small.begin(&mut *exec)?;
                (1..=9).try_for_each(|step| small.step(&mut *exec, step, 3).map(|_| ()))
            };
            let error = run().expect_err("it is lost");
            assert!(matches!(error, Error::Device { .. }));
            says(&error, &["cuda:0", "the GPU was lost", "checkpoint is whole", "--resume", name]);
            // It stays lost, whatever is asked of it.
            says(&small.begin(&mut *exec).expect_err("lost"), &[name]);
            says(&small.step(&mut *exec, 1, 1).expect_err("lost"), &[name]);
            says(&exec.run(Draws::default()).expect_err("lost"), &[name]);
            says(&exec.gradient_norm().expect_err("lost"), &[name]);
            says(&exec.read(small.loss, &mut [0.0]).expect_err("lost"), &[name]);
            assert!(exec.describe().contains("cuda:0"));
            drop(exec);
            let Err(error) = small.on_gpu() else { panic!("it is there again") };
            says(&error, &["cannot start", name]);
        });
    }
}

#[test]
fn what_is_there_is_found() {
    let test = "what_is_there_is_found";
    let settings = [("DEVICES", "2"), ("MEMORY", "1024000"), ("DRIVER", "12080")];
    let report = apart(test, "two GPUs", ALL, &settings, || {
        // cuDNN and cuBLASLt come behind, which may be there.
        let versions: Vec<_> = probe::libraries().into_iter().take(2).map(|l| l.version).collect();
        assert_eq!(versions, [Ok("takes CUDA up to 12.8".to_owned()), Ok("12.9".to_owned())]);
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
        report.nothing_left();
    }
    apart(test, "an old GPU", ALL, &[("CAPABILITY", "7.0")], || {
        let found = probe::devices().expect("one");
        assert_eq!(found[0].capability, (7, 0));
        says(found[0].usable.as_ref().expect_err("too old"), &["7.0", "8.0 (Ampere)"]);
    });
    apart(test, "no GPU", ALL, &[("DEVICES", "0")], || {
        assert!(probe::devices().expect_err("none").contains("no NVIDIA GPU"));
    });
    apart(test, "nothing", &[], &[], || {
        if probe::libraries().iter().all(|l| l.version.is_err()) {
            assert!(probe::devices().expect_err("no driver").contains("libcuda.so"));
        }
    });
}
