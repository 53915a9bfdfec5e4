//! The same on a real GPU, where there is one: run this first on a machine that has one (docs/cuda.md).

#[path = "../../engine/tests/cases/mod.rs"]
mod cases;
mod networks;
mod sampling;
mod table;
mod training;

use cases::{Golden, run_case};
use ddpm_engine::{ComputeOptions, Device, Executor, Graph, MatmulDtype, PlanOptions};
use ddpm_engine_cuda::CudaDevice;
use ddpm_engine_cuda::library::{self, Libraries, cublaslt_version, cudnn_version};
use ddpm_engine_cuda::translate::Choices;
use std::collections::HashMap;
use table::Form;

/// Largest difference from PyTorch's numbers, relative to the largest of a tensor, that the issue allows.
const TOLERANCE: f32 = 1e-4;

/// Says why, where there is none.
fn there() -> bool {
    match CudaDevice::default().check() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            false
        }
    }
}

fn make(choices: Choices) -> impl Fn(Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| CudaDevice { index: 0, choices }.executor(graph, options).expect("an executor")
}

#[test]
fn the_case_table_agrees_with_pytorch() {
    if !there() {
        return;
    }
    let golden = Golden::open();
    let mut worst: HashMap<String, f32> = HashMap::new();
    for case in golden.cases() {
        let error = run_case(&golden, &case, "CUDA", TOLERANCE, &make(Choices::default()));
        let of_op = worst.entry(case["op"].as_str().expect("op").to_owned()).or_default();
        *of_op = of_op.max(error);
    }
    for (op, error) in worst {
        println!("{op}: largest relative error {error:.2e}");
    }
}

#[test]
fn every_operation_agrees_with_the_cpu() {
    if !there() {
        return;
    }
    for case in table::cases(Form::Plain) {
        for blocks in [Choices::default().blocks, 1] {
            table::agree(
                &case,
                ComputeOptions::default(),
                TOLERANCE,
                &make(Choices { blocks, ..Choices::default() }),
            );
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if !there() {
        return;
    }
    let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
    for case in table::convolutions(Form::Plain) {
        for blocks in [Choices::default().blocks, 1] {
            table::agree(
                &case,
                ComputeOptions::default(),
                2e-3,
                &make(Choices { tf32: true, blocks, ..Choices::default() }),
            );
            table::agree(&case, bf16, 1.5e-2, &make(Choices { blocks, ..Choices::default() }));
        }
    }
    // Softmax makes an error of the scores a relative one of the weights.
    for case in table::attentions(Form::Plain) {
        table::agree(&case, bf16, 3e-2, &make(Choices::default()));
    }
}

#[test]
fn tensors_in_bf16_agree_with_the_cpu() {
    if !there() {
        return;
    }
    let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
    let mut seen = Vec::new();
    for case in table::cases(Form::Stored) {
        for blocks in [Choices::default().blocks, 1] {
            let choices = Choices { blocks, least_bf16: 1, ..Choices::default() };
            seen.extend(table::agree(&case, bf16, table::STORED, &make(choices)));
        }
    }
    table::all_were_stored(seen);
}

/// Whether cuDNN or cuBLASLt is there.
fn libraries() -> bool {
    for (name, version) in [("cuDNN", cudnn_version()), ("cuBLASLt", cublaslt_version())] {
        match version {
            Ok(version) => println!("{name} {version}"),
            Err(reason) => println!("skipped: {name}: {reason}"),
        }
    }
    library::any()
}

/// Every algorithm, as far as there are this many.
#[test]
fn products_of_libraries_agree_with_the_cpu() {
    if !there() || !libraries() {
        return;
    }
    let bf16 = ComputeOptions { factors: MatmulDtype::Bf16, ..ComputeOptions::default() };
    for number in 0..6 {
        let choices = Choices { libraries: Libraries::Forced(number), ..Choices::default() };
        for case in table::convolutions(Form::Plain) {
            table::agree(&case, ComputeOptions::default(), TOLERANCE, &make(choices));
            table::agree(&case, ComputeOptions::default(), 2e-3, &make(Choices { tf32: true, ..choices }));
        }
        for case in table::convolutions(Form::Stored) {
            table::agree(&case, bf16, table::STORED, &make(Choices { least_bf16: 1, ..choices }));
        }
        let networks = make(choices);
        networks::agree(1e-3, &|graph, options| {
            let made = networks(graph, options);
            println!("algorithm {number}: {}", made.describe());
            made
        });
    }
}

/// What was taken once is taken again, and gives the same bits.
#[test]
fn training_with_libraries_agrees_with_the_cpu_and_repeats_to_the_bit() {
    if there() && libraries() {
        let choices = Choices { libraries: Libraries::Timed, ..Choices::default() };
        training::by_the_host(&make(choices));
        training::in_runs(&make(choices));
        networks::agree(1e-3, &make(choices));
    }
}

#[test]
fn training_steps_agree_with_the_cpu_and_repeat_to_the_bit() {
    if there() {
        training::by_the_host(&make(Choices::default()));
        training::in_runs(&make(Choices::default()));
        training::held(&make(Choices::default()));
        training::clipped(&make(Choices::default()));
        training::states_are_kept(&make(Choices::default()));
    }
}

#[test]
fn networks_agree_with_the_cpu() {
    if there() {
        networks::agree(1e-3, &make(Choices::default()));
    }
}

#[test]
fn samplers_in_the_gpus_memory_draw_what_they_draw_on_the_host() {
    if there() {
        let device = CudaDevice::default();
        sampling::every_sampler(&device);
        sampling::from_no_signal(&device);
        sampling::classes_and_variance(&device);
        sampling::editing(&device);
        sampling::thresholds(&device);
        sampling::arithmetic(&device);
        let mut steps = 0;
        assert!(sampling::unseen(&device, &mut || steps += 1).iter().all(|x| x.is_finite()));
        assert_eq!(steps, 5);
    }
}
