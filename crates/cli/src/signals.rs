//! Ctrl-C. The first ends the program, or requests an orderly stop from work that polls [`stop_flag`]; that stop must come within
//! [`GRACE`] unless unsaved work is held. The second ends the program at once.

use anyhow::Context;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

/// Time allowed for an orderly stop when there is nothing to save.
const GRACE: Duration = Duration::from_millis(900);
/// Polling interval while stopping.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Whether a stop was requested.
static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// Whether anything polls [`STOP`].
static POLLED: AtomicBool = AtomicBool::new(false);
/// Number of live [`Hold`]s: unsaved work that an orderly stop saves.
static UNSAVED: AtomicUsize = AtomicUsize::new(0);

/// Text printed after "stopped" when the program ends from here.
static STOP_HINT: Mutex<String> = Mutex::new(String::new());

/// Sets the text printed after "stopped", such as how to resume.
pub fn set_stop_hint(hint: String) {
    *STOP_HINT.lock().unwrap_or_else(|e| e.into_inner()) = hint;
}

/// While it lives, the first Ctrl-C only requests an orderly stop: exiting would lose work.
pub struct Hold(());

/// Marks unsaved work until the returned guard is dropped.
pub fn hold() -> Hold {
    UNSAVED.fetch_add(1, Ordering::SeqCst);
    Hold(())
}

impl Drop for Hold {
    fn drop(&mut self) {
        UNSAVED.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Installs the handler of Ctrl-C and termination requests.
pub fn handle() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        let again = STOP.swap(true, Ordering::SeqCst);
        if again {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
        if !POLLED.load(Ordering::SeqCst) {
            exit_interrupted();
        }
        // If the thread cannot start, a second Ctrl-C still works.
        let _ = std::thread::Builder::new().name("stop".to_owned()).spawn(exit_when_idle);
    })
    .context(
        "cannot start the Ctrl-C handler thread; if memory or processes are limited (ulimit -v, -u), raise the limit",
    )
}

/// The flag that Ctrl-C sets. The caller must poll it: from now on Ctrl-C no longer exits by itself.
pub fn stop_flag() -> Arc<AtomicBool> {
    POLLED.store(true, Ordering::SeqCst);
    Arc::clone(&STOP)
}

/// Ends the program once nothing has been held for [`GRACE`], for work that does not poll the flag in time.
fn exit_when_idle() {
    let (requested, mut idle_since, mut announced) = (Instant::now(), Instant::now(), false);
    while idle_since.elapsed() < GRACE {
        if UNSAVED.load(Ordering::SeqCst) > 0 {
            idle_since = Instant::now();
            if requested.elapsed() > GRACE && !std::mem::replace(&mut announced, true) {
                status!("stopping once progress is saved; a second Ctrl-C stops at once, without saving");
            }
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    exit_interrupted();
}

fn exit_interrupted() -> ! {
    status!("stopped{}", STOP_HINT.lock().unwrap_or_else(|e| e.into_inner()));
    std::process::exit(i32::from(crate::INTERRUPTED));
}

/// Makes writes beyond the file size limit (`ulimit -f`) fail like a full disk, instead of SIGXFSZ killing the program.
pub fn catch_sigxfsz() {
    // Any handler suppresses the default action; if registration fails, the default stays.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}
