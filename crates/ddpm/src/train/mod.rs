//! Training: the step, and the loop around it in a run folder.
//!
//! [`trainer::Trainer`] takes optimizer steps and knows nothing of files; [`session`] runs it in a run folder and
//! reports plain [`session::Event`]s, which the command line renders.

mod averages;
mod classes;
mod ema;
mod health;
mod init;
mod log;
mod losses;
pub mod posthoc;
mod resume;
pub mod session;
pub mod trainer;

pub use init::Init;
pub use resume::{Remark, Resume};
pub use session::{Event, Outcome, Run};
pub use trainer::{StepReport, TrainPlan, Trainer, memory, outline};
