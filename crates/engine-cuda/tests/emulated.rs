//! The kernels and their calls on an emulated GPU (`emulator`): the case table with PyTorch's numbers, every operation
//! against the CPU's executor, training steps. Skipped, with a line, where there is no C++ compiler.

#[path = "../../engine/tests/cases/mod.rs"]
mod cases;
mod emulator;
mod networks;
mod table;

use cases::{Golden, run_case};
use ddpm_engine::{Arithmetic, Executor, Factors, PlanOptions};
use ddpm_engine_cuda::GpuExecutor;
use ddpm_engine_cuda::translate::Choices;
use emulator::Emulator;
use table::{Case, agree};

/// Few blocks fill the emulated GPU, so that small products are not cut into parts of k.
const FEW: Choices = Choices { tf32: false, blocks: 1 };

fn make(choices: Choices) -> impl Fn(ddpm_engine::Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| {
        let gpu = Emulator::new().expect("the caller has looked");
        Box::new(GpuExecutor::new(gpu, graph, options, choices).expect("an executor"))
    }
}

#[test]
fn the_case_table_agrees_with_pytorch() {
    if Emulator::new().is_none() {
        return;
    }
    let golden = Golden::open();
    for case in golden.cases() {
        run_case(&golden, &case, "emulated GPU", 1e-5, &make(Choices::default()));
    }
}

#[test]
fn every_operation_agrees_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    for case in table::cases() {
        for choices in [Choices::default(), FEW] {
            agree(&case, Arithmetic::default(), 1e-5, &make(choices));
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = Arithmetic { factors: Factors::Bf16, ..Arithmetic::default() };
    for case in table::convolutions() {
        for blocks in [Choices::default().blocks, 1] {
            // 10 and 7 bits behind the point.
            agree(&case, Arithmetic::default(), 2e-3, &make(Choices { tf32: true, blocks }));
            agree(&case, bf16, 1.5e-2, &make(Choices { tf32: false, blocks }));
        }
    }
    // Softmax makes an error of the scores a relative one of the weights.
    for case in table::attentions() {
        agree(&case, bf16, 3e-2, &make(Choices::default()));
    }
}

#[test]
fn training_steps_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    table::train(&make(Choices::default()));
}

#[test]
fn networks_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    networks::agree(2e-4, &make(Choices::default()));
}

/// The table has every operation.
#[test]
fn no_operation_is_left_out() {
    let mut seen: Vec<&str> = table::cases().iter().flat_map(Case::operations).collect();
    seen.sort_unstable();
    seen.dedup();
    for name in [
        "silu",
        "relu",
        "gelu",
        "mish",
        "silu_grad",
        "relu_grad",
        "gelu_grad",
        "mish_grad",
        "add",
        "add_picture",
        "affine",
        "attention",
        "attention_grad",
        "batch_norm",
        "batch_norm_fixed",
        "batch_norm_grad",
        "concat",
        "conv2d",
        "conv2d_transpose",
        "conv2d_weight_grad",
        "draw_normal",
        "draw_timestep",
        "dropout",
        "fill",
        "group_norm",
        "group_norm_grad",
        "group_norm_silu",
        "group_norm_silu_grad",
        "layer_norm",
        "layer_norm_grad",
        "mse",
        "l1",
        "huber",
        "loss_grad",
        "lookup",
        "lookup_grad",
        "max_pool",
        "max_pool_grad",
        "multiply",
        "q_sample",
        "resample",
        "running_average",
        "scale_picture",
        "sinusoidal_embedding",
        "slice",
        "sum_pixels",
        "sum_rows",
        "weighted_loss",
        "weighted_loss_grad",
    ] {
        assert!(seen.contains(&name), "{name}");
    }
}
