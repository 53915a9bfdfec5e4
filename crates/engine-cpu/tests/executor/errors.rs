//! Errors name their cause.

use super::*;

#[test]
fn wrong_lengths_and_missing_regions_are_reported_by_name() -> Result<()> {
    let mut g = Graph::new();
    let (x, p) = (g.input("image", [2, 3]), g.parameter("the.weight", [2, 3]));
    let y = g.add("y", Add, &[x, p])?;
    let options = PlanOptions { outputs: vec![y], ..PlanOptions::default() };
    let mut executor = CpuExecutor::with_isa(g, &options, 1, Isa::best())?;
    let error = executor.write(x, &[0.0; 5]).expect_err("too short").to_string();
    assert!(error.contains("image") && error.contains('5') && error.contains('6'), "{error}");
    let error = executor.read(y, &mut [0.0; 7]).expect_err("too long").to_string();
    assert!(error.contains('y') && error.contains('7'), "{error}");
    let error = executor.write_parameter(Region::Weights, 0, &[0.0; 1]).expect_err("too short").to_string();
    assert!(error.contains("the.weight"), "{error}");
    let error = executor.read_parameter(Region::Ema, 0, &mut [0.0; 6]).expect_err("no training").to_string();
    assert!(error.contains("Ema") && error.contains("training"), "{error}");
    let error = executor.update(&adam_step(1)).expect_err("no training").to_string();
    assert!(error.contains("training"), "{error}");
    let error = executor.gradient_norm().expect_err("no training").to_string();
    assert!(error.contains("training"), "{error}");
    assert!(executor.read_parameter(Region::Weights, 1, &mut [0.0; 6]).is_err(), "there is one parameter");
    Ok(())
}
