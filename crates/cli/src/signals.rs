//! Ctrl-C: the first ends the program, or asks those that have something to finish for an orderly stop, which must come soon unless
//! something is being saved; the second ends it at once.

use anyhow::Context;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

/// Time that an orderly stop may take where there is nothing to save.
const GRACE: Duration = Duration::from_millis(900);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Whether a stop was asked for.
static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
/// Whether somebody looks at that.
static ORDERLY: AtomicBool = AtomicBool::new(false);
/// How much there is that an orderly stop saves.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// What is told where the program ends before it could tell by itself.
static WORDS: Mutex<String> = Mutex::new(String::new());

/// Sets what is told behind "stopped", as how to go on.
pub fn say_when_stopped(words: String) {
    *WORDS.lock().unwrap_or_else(|e| e.into_inner()) = words;
}

/// While it lives the first Ctrl-C ends the program no other way than orderly: there is work that would be lost.
pub struct Hold(());

/// Something has been made that is not saved yet.
pub fn hold() -> Hold {
    HELD.fetch_add(1, Ordering::SeqCst);
    Hold(())
}

impl Drop for Hold {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Sets what Ctrl-C (or a request to terminate) does.
pub fn handle() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        let again = STOP.swap(true, Ordering::SeqCst);
        if again {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
        if !ORDERLY.load(Ordering::SeqCst) {
            end();
        }
        // Without the thread the second Ctrl-C is there.
        let _ = std::thread::Builder::new().name("stop".to_owned()).spawn(end_soon);
    })
    .context(
        "cannot start the thread that waits for Ctrl-C; if memory or processes are limited here (ulimit -v, -u), raise the limit",
    )
}

/// The flag that Ctrl-C sets; from now on the program ends by looking at it.
pub fn stop_flag() -> Arc<AtomicBool> {
    ORDERLY.store(true, Ordering::SeqCst);
    Arc::clone(&STOP)
}

/// Ends the program once nothing has been held for a while: what it is doing does not look at the flag.
fn end_soon() {
    let (asked, mut free, mut told) = (Instant::now(), Instant::now(), false);
    while free.elapsed() < GRACE {
        if HELD.load(Ordering::SeqCst) > 0 {
            free = Instant::now();
            if asked.elapsed() > GRACE && !std::mem::replace(&mut told, true) {
                tell!("stopping, when what was learnt is saved; a second Ctrl-C stops at once, without that");
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    end();
}

fn end() -> ! {
    tell!("stopped{}", WORDS.lock().unwrap_or_else(|e| e.into_inner()));
    std::process::exit(i32::from(crate::INTERRUPTED));
}

/// Lets writing beyond the limit of a file's size (`ulimit -f`) fail as on a full disk, instead of ending the program without a word.
pub fn survive_file_size_limits() {
    // A signal with a handler does not end the program. Where none can be set, all is as before.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}
