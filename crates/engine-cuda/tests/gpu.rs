//! The same on a real GPU, where there is one: run this first on a machine that has one (docs/cuda.md).

#[path = "../../engine/tests/cases/mod.rs"]
mod cases;
mod networks;
mod sampling;
mod table;
mod training;

use cases::{Golden, run_case};
use ddpm_engine::{Arithmetic, Device, Executor, Factors, Graph, PlanOptions};
use ddpm_engine_cuda::CudaDevice;
use ddpm_engine_cuda::translate::Choices;
use std::collections::HashMap;

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
    for case in table::cases() {
        for blocks in [Choices::default().blocks, 1] {
            table::agree(&case, Arithmetic::default(), TOLERANCE, &make(Choices { tf32: false, blocks }));
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if !there() {
        return;
    }
    let bf16 = Arithmetic { factors: Factors::Bf16, ..Arithmetic::default() };
    for case in table::convolutions() {
        for blocks in [Choices::default().blocks, 1] {
            table::agree(&case, Arithmetic::default(), 2e-3, &make(Choices { tf32: true, blocks }));
            table::agree(&case, bf16, 1.5e-2, &make(Choices { tf32: false, blocks }));
        }
    }
    // Softmax makes an error of the scores a relative one of the weights.
    for case in table::attentions() {
        table::agree(&case, bf16, 3e-2, &make(Choices::default()));
    }
}

#[test]
fn training_steps_agree_with_the_cpu_and_repeat_to_the_bit() {
    if there() {
        training::by_the_host(&make(Choices::default()));
        training::in_runs(&make(Choices::default()));
        training::held(&make(Choices::default()));
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
        sampling::classes_and_variance(&device);
        sampling::editing(&device);
        sampling::thresholds(&device);
        sampling::arithmetic(&device);
        let mut steps = 0;
        assert!(sampling::unseen(&device, &mut || steps += 1).iter().all(|x| x.is_finite()));
        assert_eq!(steps, 5);
    }
}
