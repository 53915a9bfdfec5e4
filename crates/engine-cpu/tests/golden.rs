//! Every operation, forward and backward, against PyTorch's results, on every instruction set.

mod cases;

use cases::{Golden, run_case};
use ddpm_engine::{Executor, PlanOptions};
use ddpm_engine_cpu::{CpuExecutor, Isa};
use std::collections::HashMap;

/// Maximum absolute difference, relative to the largest absolute value of the tensor.
const TOLERANCE: f32 = 1e-5;

#[test]
fn operations_agree_with_pytorch() {
    let golden = Golden::open();
    let cases = golden.cases();
    assert!(cases.len() > 100, "{} cases", cases.len());
    let mut worst: HashMap<String, f32> = HashMap::new();
    for isa in Isa::all() {
        for case in &cases {
            let op = case["op"].as_str().expect("op");
            let worst = worst.entry(format!("{isa} {op}")).or_default();
            let make = |graph, options: &PlanOptions| -> Box<dyn Executor> {
                Box::new(CpuExecutor::with_isa(graph, options, 2, isa).expect("an executor"))
            };
            *worst = worst.max(run_case(&golden, case, isa.name(), TOLERANCE, &make));
        }
    }
    let mut worst: Vec<_> = worst.into_iter().collect();
    worst.sort_by(|a, b| a.0.cmp(&b.0));
    for (op, error) in worst {
        println!("{op}: largest relative error {error:.2e}");
    }
}
