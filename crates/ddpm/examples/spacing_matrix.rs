//! Distance of samples from the data's distribution for every sampler, spacing, schedule and number of steps, with an exact
//! denoiser: prints a table and draws a heat map. `tests/samplers/matrix.rs` defines the distance.
//!
//! ```sh
//! cargo run --release -p ddpm --example spacing_matrix -- docs/spacing-matrix.png
//! ```

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/samplers/matrix.rs"]
mod matrix;
#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/samplers/mixture.rs"]
mod mixture;

use ddpm::Result;
use ddpm::plot::{Columns, Row, heat_map};
use std::path::PathBuf;

const TITLE: &str = "Distance of samples from the data, over its limit, by schedule and number of steps";

fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).map_or_else(|| "spacing-matrix.png".into(), PathBuf::from);
    let schedules = matrix::schedules();
    let each = matrix::STEPS.map(|steps| steps.to_string()).to_vec();
    let columns: Vec<Columns> =
        schedules.iter().map(|(name, _)| Columns { name: name.clone(), each: each.clone() }).collect();
    let mut rows = Vec::new();
    for (way, cells) in matrix::matrix(&schedules, |_| &matrix::SETTINGS) {
        let values: Vec<Option<f64>> = cells.into_iter().map(std::result::Result::ok).collect();
        let name = format!("{} {}", way.sampler.name, way.spacing);
        let shown: Vec<String> =
            values.iter().map(|v| v.map_or("refused".to_owned(), |v| format!("{v:.2}"))).collect();
        println!("{name}: {}", shown.join(" "));
        rows.push(Row { name, values });
    }
    heat_map(TITLE, "refused by name", &columns, &rows)?.save(&path)?;
    println!("{}", path.display());
    Ok(())
}
