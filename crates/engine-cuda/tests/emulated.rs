//! The kernels and their calls on an emulated GPU (`emulator`): the case table with PyTorch's numbers, every operation
//! against the CPU's executor, training steps. Skipped, with a line, where there is no C++ compiler.

#[path = "../../engine/tests/cases/mod.rs"]
mod cases;
mod emulator;
mod libraries;
mod networks;
mod table;
mod training;

use cases::{Golden, run_case};
use ddpm_engine::{Arithmetic, Executor, Factors, PlanOptions};
use ddpm_engine_cuda::GpuExecutor;
use ddpm_engine_cuda::translate::Choices;
use emulator::{Emulator, Order};
use table::{Form, agree};

/// Few blocks fill the emulated GPU, so that small products are not cut into parts of k.
fn few() -> Choices {
    Choices { blocks: 1, least_bf16: 1, scores: 1, ..Choices::default() }
}

fn make(choices: Choices) -> impl Fn(ddpm_engine::Graph, &PlanOptions) -> Box<dyn Executor> {
    in_order(choices, Order::Forwards)
}

fn in_order(
    choices: Choices,
    order: Order,
) -> impl Fn(ddpm_engine::Graph, &PlanOptions) -> Box<dyn Executor> {
    move |graph, options| {
        let gpu = Emulator::with(order).expect("the caller has looked");
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
    for case in table::cases(Form::Plain) {
        // Where a barrier is missing, one of the orders reads what is not written yet.
        for (choices, order) in [(Choices::default(), Order::Forwards), (few(), Order::Backwards)] {
            agree(&case, Arithmetic::default(), 1e-5, &in_order(choices, order));
        }
    }
}

#[test]
fn tensor_cores_agree_with_the_cpu_to_their_precision() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = Arithmetic { factors: Factors::Bf16, ..Arithmetic::default() };
    for case in table::convolutions(Form::Plain) {
        for blocks in [Choices::default().blocks, 1] {
            // 10 and 7 bits behind the point.
            agree(
                &case,
                Arithmetic::default(),
                2e-3,
                &make(Choices { tf32: true, blocks, ..Choices::default() }),
            );
            agree(&case, bf16, 1.5e-2, &make(Choices { blocks, ..Choices::default() }));
        }
    }
    // Softmax makes an error of the scores a relative one of the weights.
    for case in table::attentions(Form::Plain) {
        agree(&case, bf16, 3e-2, &in_order(Choices::default(), Order::Backwards));
    }
}

#[test]
fn tensors_in_bf16_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    let bf16 = Arithmetic { factors: Factors::Bf16, ..Arithmetic::default() };
    let mut seen = Vec::new();
    for case in table::cases(Form::Stored) {
        let all = Choices { least_bf16: 1, ..Choices::default() };
        for (choices, order) in [(all, Order::Forwards), (few(), Order::Backwards)] {
            seen.extend(agree(&case, bf16, table::STORED, &in_order(choices, order)));
        }
    }
    table::all_were_stored(seen);
}

#[test]
fn training_steps_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    training::by_the_host(&make(Choices::default()));
    training::in_runs(&in_order(Choices::default(), Order::Backwards));
    training::held(&make(Choices::default()));
    training::clipped(&make(Choices::default()));
    training::states_are_kept(&make(Choices::default()));
}

#[test]
fn networks_agree_with_the_cpu() {
    if Emulator::new().is_none() {
        return;
    }
    networks::agree(2e-4, &make(Choices::default()));
}
