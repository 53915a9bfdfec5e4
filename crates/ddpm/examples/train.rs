//! Trains on a folder of images, in a run folder that `sample` and the program `ddpm` can open.
//!
//! ```sh
//! cargo run --release -p ddpm --example train -- photos 32 20000
//! ```

use ddpm::train::Event;
use ddpm::{Config, Result, Run};
use std::sync::Arc;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| "digits".to_owned());
    let mut number = |default| arguments.next().and_then(|n| n.parse().ok()).unwrap_or(default);
    let (size, steps): (usize, u64) = (number(16), number(100) as u64);

    let config = Config::builder()
        .data(folder)
        .size(size)
        .steps(steps)
        .batch_size(8)
        .set("network.name", "attention")
        .set("attention.down_channels", "16, 32")
        .set("attention.mid_channels", "32, 16")
        .set("attention.down_sample", "true")
        .build()?;
    let mut run = Run::create("runs", &config)?;
    // A flag that another thread or a signal handler may set: training then stops with a checkpoint.
    let stop = Arc::default();
    let outcome = run.train_with(&stop, &mut |event| match event {
        Event::Step { step, steps, loss, .. } if step % 10 == 0 => println!("{step}/{steps}: loss {loss:.3}"),
        Event::Samples { path, .. } => println!("samples: {}", path.display()),
        Event::Warning(text) => eprintln!("warning: {text}"),
        _ => {}
    })?;
    println!("{outcome:?}: {}", run.run_folder().path().display());
    Ok(())
}
