//! Temporary files left in a run's folder by killed processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{RunFolder, names};

/// Age above which a file counts as left over if its process cannot be looked up.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Removes partially written files in the run's folder and its `samples/` whose process is gone, and returns their paths.
/// Checkpoints have [their own cleanup](crate::checkpoint::sweep_orphans).
pub(crate) fn sweep_leftovers(run: &RunFolder) -> Vec<PathBuf> {
    let samples = run.samples();
    let below = names(&samples).into_iter().map(|name| samples.join(name)).filter(|path| path.is_dir());
    let folders: Vec<PathBuf> = [run.path().to_owned(), samples.clone()].into_iter().chain(below).collect();
    let mut swept = Vec::new();
    for folder in folders {
        for name in names(&folder) {
            let path = folder.join(&name);
            if is_left_over(&path, &name) {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                // A file that cannot be removed does no harm.
                swept.extend(removed.is_ok().then_some(path));
            }
        }
    }
    swept
}

fn is_left_over(path: &Path, name: &str) -> bool {
    process_of(name).is_some_and(|process| !may_be_running(process, path))
}

/// The process that writes a file of this name: `.tmp-config.toml-PROCESS`, or for images `.0000.png.PROCESS-NUMBER.tmp`.
fn process_of(name: &str) -> Option<u32> {
    if let Some(rest) = name.strip_prefix(".tmp-") {
        return rest.rsplit_once('-')?.1.parse().ok();
    }
    let (_, end) = name.strip_prefix('.')?.strip_suffix(".tmp")?.rsplit_once('.')?;
    let (process, number) = end.split_once('-')?;
    number.parse::<u32>().ok()?;
    process.parse().ok()
}

/// Whether the process that writes `path` may still be running.
fn may_be_running(process: u32, path: &Path) -> bool {
    if process == std::process::id() {
        return true;
    }
    if Path::new("/proc/self").exists() {
        return Path::new("/proc").join(process.to_string()).exists();
    }
    let age = fs::metadata(path).and_then(|about| about.modified()).ok().and_then(|time| time.elapsed().ok());
    age.is_none_or(|age| age < MAX_AGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_temporary_files_of_dead_processes_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), Some("r")).unwrap();
        let live = std::process::id();
        // Above the highest process id of Linux.
        let dead = 4_194_305;
        fs::create_dir(run.samples().join("seed-0")).unwrap();
        let swept = [
            format!(".tmp-config.toml-{dead}"),
            format!(".loss.png.{dead}-0.tmp"),
            format!("samples/.step-0000004.png.{dead}-3.tmp"),
            format!("samples/seed-0/.0001.png.{dead}-1.tmp"),
        ];
        let kept = [
            format!(".tmp-README.md-{live}"),
            format!("samples/seed-0/.0002.png.{live}-1.tmp"),
            ".tmp-notes".to_owned(),
            ".hidden.tmp".to_owned(),
            ".2024-01.tmp".to_owned(),
            "mine.tmp".to_owned(),
        ];
        for name in swept.iter().chain(&kept) {
            fs::write(run.path().join(name), "").unwrap();
        }
        if cfg!(target_os = "linux") {
            let gone = sweep_leftovers(&run);
            assert_eq!(gone.len(), swept.len(), "{gone:?}");
            assert!(swept.iter().all(|name| !run.path().join(name).exists()));
        } else {
            assert!(sweep_leftovers(&run).is_empty(), "they are new");
        }
        assert!(kept.iter().all(|name| run.path().join(name).exists()));
    }
}
