//! Ctrl-C: the first asks for an orderly stop, which must come soon unless something is being saved; the second stops at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Time that an orderly stop may take where there is nothing to save.
const GRACE: Duration = Duration::from_millis(900);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(10);

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

/// A flag that Ctrl-C (or a request to terminate) sets.
pub fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&flag);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
        // Without the thread the second Ctrl-C is there.
        let _ = std::thread::Builder::new().name("stop".to_owned()).spawn(end_soon);
    })?;
    Ok(flag)
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
    tell!("stopped{}", WORDS.lock().unwrap_or_else(|e| e.into_inner()));
    std::process::exit(i32::from(crate::INTERRUPTED));
}

/// Lets writing beyond the limit of a file's size (`ulimit -f`) fail as on a full disk, instead of ending the program without a word.
pub fn survive_file_size_limits() {
    // A signal with a handler does not end the program. Where none can be set, all is as before.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}
