//! Runs tests in processes of their own, in which a stand-in replaces NVIDIA's driver and NVRTC (`emulator/driver.cpp`).

#[path = "../emulator/build.rs"]
pub mod build;

use std::collections::HashMap;
use std::fs::File;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names the scenario that this process runs.
const SCENARIO: &str = "DDPM_TEST_SCENARIO";

/// Timeout of a scenario, in case it hangs.
const LIMIT: Duration = Duration::from_secs(240);

/// What the stand-in counted, including resources not released when the process ended.
pub struct Report(HashMap<String, u64>);

impl Report {
    pub fn count(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    /// Asserts that all driver resources were released.
    pub fn assert_all_released(&self) {
        let left: Vec<_> = self.0.iter().filter(|(what, n)| what.starts_with("left_") && **n > 0).collect();
        assert!(left.is_empty(), "not released: {left:?}");
    }
}

fn setting<'a>(settings: &[(&str, &'a str)], name: &str) -> &'a str {
    settings.iter().find(|(n, _)| *n == name).map_or("", |(_, value)| value)
}

/// Runs `body` in a process of its own, in which the stand-in has the names of `libraries`, with `settings` as environment variables
/// (prefixed with `FAKE_CUDA_`). The process is this test program with `test` alone: there, only the scenario's body runs and the
/// result is `None`; so it is, with a message, if there is no C++ compiler. The setting `CACHE` is the kernel cache folder.
pub fn in_own_process(
    test: &str,
    scenario: &str,
    libraries: &[&str],
    settings: &[(&str, &str)],
    body: impl FnOnce(),
) -> Option<Report> {
    if let Ok(wanted) = std::env::var(SCENARIO) {
        if wanted == scenario {
            body();
        }
        return None;
    }
    let folder = build::libraries(libraries)?;
    let tmp = folder.parent().expect("it has a parent");
    let [report, output] = ["report", "output"]
        .map(|what| tmp.join(format!("{}-{test}-{}.{what}", std::process::id(), scenario.replace(' ', "-"))));
    let out = File::create(&output).expect("a file");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--nocapture", "--test-threads", "1"])
        .env("LD_LIBRARY_PATH", &folder)
        .env(SCENARIO, scenario)
        .env("FAKE_CUDA_REPORT", &report)
        .env("DDPM_KERNEL_CACHE", setting(settings, "CACHE"))
        .envs(settings.iter().map(|(name, value)| (format!("FAKE_CUDA_{name}"), value)))
        .stdin(Stdio::null())
        .stderr(out.try_clone().expect("a file"))
        .stdout(out)
        .spawn()
        .expect("this program starts again");
    let started = Instant::now();
    let status = loop {
        match child.try_wait().expect("a child") {
            Some(status) => break Some(status),
            None if started.elapsed() > LIMIT => break None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = std::fs::read_to_string(&output).unwrap_or_default();
    match status {
        Some(status) => assert!(status.success(), "{scenario}: {status}\n{text}"),
        None => panic!("{scenario}: it hangs\n{text}"),
    }
    let counted = std::fs::read_to_string(&report).unwrap_or_default();
    let pair = |line: &str| line.split_once(' ').and_then(|(k, v)| Some((k.to_owned(), v.parse().ok()?)));
    let _ = std::fs::remove_file(report);
    let _ = std::fs::remove_file(output);
    Some(Report(counted.lines().filter_map(pair).collect()))
}
