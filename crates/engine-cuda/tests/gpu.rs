//! The same tests on a real GPU. Run this first on a machine that has one (docs/cuda.md).

#[path = "../../engine-cpu/tests/cases/mod.rs"]
mod cases;
mod networks;
mod sampling;
mod table;
mod training;

use cases::{Golden, run_case};
use ddpm_engine::{ComputeOptions, Device, Executor, Graph, MatmulDtype, PlanOptions};
use ddpm_engine_cuda::CudaDevice;
use ddpm_engine_cuda::installed::{self, cublaslt_version, cudnn_version};
use ddpm_engine_cuda::library::Libraries;
use ddpm_engine_cuda::lower::CudaOptions;
use std::collections::HashMap;
use table::Form;

/// Largest allowed difference from PyTorch's results, relative to a tensor's largest absolute value.
const TOLERANCE: f32 = 1e-4;

/// Whether there is a GPU; prints the reason otherwise.
fn has_gpu() -> bool {
    match CudaDevice::default().check() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            false
        }
    }
}

fn make(cuda_options: CudaOptions) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| {
        CudaDevice { index: 0, options: cuda_options }.executor(graph, options).expect("an executor")
    }
}

#[test]
fn the_case_table_agrees_with_pytorch() {
    if !has_gpu() {
        return;
    }
    let golden = Golden::open();
    let mut worst: HashMap<String, f32> = HashMap::new();
    for case in golden.cases() {
        let error = run_case(&golden, &case, "CUDA", TOLERANCE, &make(CudaOptions::default()));
        let of_op = worst.entry(case["op"].as_str().expect("op").to_owned()).or_default();
        *of_op = of_op.max(error);
    }
    for (op, error) in worst {
        println!("{op}: largest relative error {error:.2e}");
    }
}

#[test]
fn every_operation_agrees_with_the_cpu() {
    if !has_gpu() {
        return;
    }
    for case in table::cases(Form::Plain) {
        for blocks in [CudaOptions::default().blocks, 1] {
            table::agree(
                &case,
                ComputeOptions::default(),
                TOLERANCE,
                &make(CudaOptions { blocks, ..CudaOptions::default() }),
            );
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if !has_gpu() {
        return;
    }
    let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
    for case in table::convolutions(Form::Plain) {
        for blocks in [CudaOptions::default().blocks, 1] {
            table::agree(
                &case,
                ComputeOptions::default(),
                2e-3,
                &make(CudaOptions { tf32: true, blocks, ..CudaOptions::default() }),
            );
            table::agree(&case, bf16, 1.5e-2, &make(CudaOptions { blocks, ..CudaOptions::default() }));
        }
    }
    // Softmax turns an error of the scores into a relative error of the weights.
    for case in table::attentions(Form::Plain) {
        table::agree(&case, bf16, 3e-2, &make(CudaOptions::default()));
    }
}

#[test]
fn tensors_in_bf16_agree_with_the_cpu() {
    if !has_gpu() {
        return;
    }
    let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
    let mut seen = Vec::new();
    for case in table::cases(Form::Stored) {
        for blocks in [CudaOptions::default().blocks, 1] {
            let cuda_options = CudaOptions { blocks, min_bf16_elems: 1, ..CudaOptions::default() };
            seen.extend(table::agree(&case, bf16, table::BF16_TOLERANCE, &make(cuda_options)));
        }
    }
    table::assert_all_stored(seen);
}

/// Whether cuDNN or cuBLASLt is available.
fn libraries() -> bool {
    for (name, version) in [("cuDNN", cudnn_version()), ("cuBLASLt", cublaslt_version())] {
        match version {
            Ok(version) => println!("{name} {version}"),
            Err(reason) => println!("skipped: {name}: {reason}"),
        }
    }
    installed::any()
}

/// The first six algorithms (fewer where a library offers fewer).
#[test]
fn libraries_agree_with_the_cpu() {
    if !has_gpu() || !libraries() {
        return;
    }
    let bf16 = ComputeOptions { matmul_dtype: MatmulDtype::Bf16, ..ComputeOptions::default() };
    for number in 0..6 {
        let cuda_options = CudaOptions { libraries: Libraries::Forced(number), ..CudaOptions::default() };
        for case in table::convolutions(Form::Plain) {
            table::agree(&case, ComputeOptions::default(), TOLERANCE, &make(cuda_options));
            table::agree(
                &case,
                ComputeOptions::default(),
                2e-3,
                &make(CudaOptions { tf32: true, ..cuda_options }),
            );
        }
        for case in table::convolutions(Form::Stored) {
            table::agree(
                &case,
                bf16,
                table::BF16_TOLERANCE,
                &make(CudaOptions { min_bf16_elems: 1, ..cuda_options }),
            );
        }
        let networks = make(cuda_options);
        networks::agree(1e-3, &|graph, options| {
            let made = networks(graph, options);
            println!("algorithm {number}: {}", made.describe());
            made
        });
    }
}

/// Autotuning decisions are cached within the process, so that results repeat bit by bit.
#[test]
fn training_with_libraries_agrees_with_the_cpu_and_repeats_to_the_bit() {
    if has_gpu() && libraries() {
        let cuda_options = CudaOptions { libraries: Libraries::Timed, ..CudaOptions::default() };
        training::host_controlled(&make(cuda_options));
        training::fused_steps(&make(cuda_options));
        networks::agree(1e-3, &make(cuda_options));
    }
}

#[test]
fn training_steps_agree_with_the_cpu_and_repeat_to_the_bit() {
    if has_gpu() {
        training::host_controlled(&make(CudaOptions::default()));
        training::fused_steps(&make(CudaOptions::default()));
        training::skipped_updates(&make(CudaOptions::default()));
        training::clipped(&make(CudaOptions::default()));
        training::states_are_restored(&make(CudaOptions::default()));
    }
}

#[test]
fn networks_agree_with_the_cpu() {
    if has_gpu() {
        networks::agree(1e-3, &make(CudaOptions::default()));
    }
}

#[test]
fn samplers_on_the_gpu_agree_with_the_host() {
    if has_gpu() {
        let device = CudaDevice::default();
        sampling::every_sampler(&device);
        sampling::from_zero_snr(&device);
        sampling::classes_and_variance(&device);
        sampling::editing(&device);
        sampling::thresholds(&device);
        sampling::arithmetic(&device);
        let mut steps = 0;
        assert!(sampling::unobserved(&device, &mut || steps += 1).iter().all(|x| x.is_finite()));
        assert_eq!(steps, 5);
    }
}
