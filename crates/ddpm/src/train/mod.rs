//! Training: settings, run folders, checkpoints, and the loop.
//!
//! [`trainer::Trainer`] takes optimizer steps and knows nothing of files; [`session`] runs it in a run folder and
//! reports plain [`session::Event`]s, which the command line renders.

mod averages;
pub mod checkpoint;
mod classes;
mod data;
mod ema;
mod health;
mod init;
mod log;
mod losses;
pub mod lr_schedule;
pub mod posthoc;
mod resume;
pub mod run;
pub mod session;
pub mod trainer;

pub(crate) use crate::storage;
pub use crate::storage::{file_sha256, write_file};
pub use data::{check_data, open_data};
pub use init::Init;
pub use resume::{Remark, Resume};
pub use session::{Event, Outcome, Session};
pub use trainer::{StepReport, TrainPlan, Trainer, memory, outline};
