//! How far samples are from the data's distribution, for every sampler, spacing, schedule and number of steps, with a denoiser that
//! is known exactly: a table and a heat map.
//!
//! ```sh
//! cargo run --release -p ddpm --example spacing_matrix -- docs/spacing-matrix.png
//! ```

#[path = "../tests/samplers/matrix.rs"]
mod matrix;
#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../tests/samplers/mixture.rs"]
mod mixture;

use ddpm::process::Prediction;
use ddpm::sampler::Threshold;

fn main() {
    let schedules = matrix::schedules();
    let quantiles = matrix::quantiles(&schedules[0].1);
    for threshold in [Threshold::Clip, Threshold::None] {
        for prediction in [Prediction::Eps, Prediction::V] {
            println!("{} {prediction}", threshold.name());
            for (name, schedule) in &schedules {
                println!("== {name}");
                for way in matrix::ways() {
                    print!("{:16} {:12}", way.sampler.name, way.spacing);
                    for steps in matrix::STEPS {
                        match matrix::distance(way, schedule, steps, (prediction, threshold), &quantiles) {
                            Ok(far) => print!(" {far:9.3}"),
                            Err(_) => print!("   refused"),
                        }
                    }
                    println!();
                }
            }
        }
    }
}
