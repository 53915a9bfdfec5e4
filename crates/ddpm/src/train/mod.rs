//! Training: settings, run folders, checkpoints, and the loop.
//!
//! [`trainer::Trainer`] makes steps and knows no files; [`session`] runs it in a run folder and reports plain
//! [`session::Event`]s, which the command line renders.

mod averages;
pub mod checkpoint;
mod classes;
pub mod config;
mod data;
pub(crate) mod disk;
mod ema;
mod health;
mod init;
mod log;
mod losses;
pub mod posthoc;
pub mod rate;
mod resume;
pub mod run;
pub mod session;
pub mod trainer;

pub use data::{check_data, open_data};
pub use disk::{file_sha256, write_file};
pub use init::Init;
pub use resume::{Remark, Resume};
pub use session::{Event, Outcome, Session};
pub use trainer::{StepReport, TrainPlan, Trainer, memory, outline};
