//! Disks that are full at every call in turn.

use super::*;
use crate::storage::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A disk that is full at some call: only at that one, or for everything that needs space from then on.
struct FullDisk {
    calls: Arc<AtomicUsize>,
    fails_at: usize,
    stays_full: bool,
}

struct FullFile {
    file: fs::File,
    disk: FullDisk,
}

impl FullDisk {
    fn clone(&self) -> Self {
        Self { calls: Arc::clone(&self.calls), ..*self }
    }

    fn call(&self, needs_room: bool) -> io::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if call == self.fails_at || self.stays_full && needs_room && call > self.fails_at {
            Err(io::Error::from_raw_os_error(28))
        } else {
            Ok(())
        }
    }
}

impl FileSystem for FullDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call(true)?;
        OsFileSystem.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        self.call(true)?;
        Ok(Box::new(FullFile { file: fs::File::create(path)?, disk: self.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(false)?;
        OsFileSystem.rename(from, to)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        self.call(true)
    }
}

impl Write for FullFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full disk writes a part before it fails.
        self.file.write_all(&bytes[..bytes.len() / 2])?;
        self.disk.call(true)?;
        self.file.write_all(&bytes[bytes.len() / 2..])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Output for FullFile {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.call(true)
    }
}

// errno 28 is "no space left on device" only on Unix.
#[cfg(unix)]
#[test]
fn a_full_disk_at_any_call_leaves_the_old_checkpoints_and_nothing_else() {
    for (step, stays_full) in [(2000, false), (2000, true), (1000, false), (1000, true)] {
        let mut fails_at = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            save(dir.path(), &checkpoint(1000)).unwrap();
            let mut new = checkpoint(step);
            new.manifest.seed = 99;
            let disk = FullDisk { calls: Arc::default(), fails_at, stays_full };
            let saved = save_on(&disk, dir.path(), &new);
            let Err(error) = saved else {
                // Create, write and sync of four files; create and sync of the folder; two renames; sync of the parent.
                assert_eq!(fails_at, disk.calls.load(Ordering::Relaxed));
                assert_eq!(fails_at, 4 * 3 + 2 + 2 + 1);
                break;
            };
            let message = error.to_string();
            assert!(matches!(error, Error::Io { .. }), "{message}");
            assert!(
                message.contains("takes 1 MB: free some space") && message.contains("step-000"),
                "{message}"
            );
            assert!(names(dir.path()).iter().all(|n| n.starts_with("step-")), "{:?}", names(dir.path()));
            let old = load(&path_of(dir.path(), 1000)).unwrap();
            // The last call comes after the final rename.
            if step == 2000 || fails_at < 16 {
                assert_eq!(without_files(old), checkpoint(1000), "call {fails_at}");
            }
            save(dir.path(), &new).unwrap();
            assert_eq!(newest(dir.path()).unwrap().unwrap().step, step);
            fails_at += 1;
        }
    }
}

// As above.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_snapshot_and_gives_advice() {
    let all = checkpoint(1);
    let set = |tensors: &[NamedTensor]| ["power-0.05", "power-0.1"].map(|n| (n.to_owned(), tensors.to_vec()));
    for stays_full in [false, true] {
        let mut fails_at = 0;
        loop {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path();
            let path = save_snapshot(dir, 7, &set(&all.weights)).unwrap();
            let disk = FullDisk { calls: Arc::default(), fails_at, stays_full };
            let Err(error) = save_snapshot_on(&disk, dir, 7, &set(&all.ema)) else {
                // Create, write and sync of two files; create and sync of the folder; two renames; sync of the parent.
                assert_eq!((fails_at, disk.calls.load(Ordering::Relaxed)), (2 * 3 + 2 + 2 + 1, fails_at));
                break;
            };
            let message = error.to_string();
            let parts =
                [dir.to_str().unwrap(), "a snapshot of this run takes 1 MB: free some space and resume"];
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
            assert_eq!(names(dir), ["step-0000007"]);
            // The last call comes after the final rename.
            let there = if fails_at < 10 { &all.weights } else { &all.ema };
            assert_eq!(read_weights_file(&path.join("power-0.1.safetensors")).unwrap(), *there, "{fails_at}");
            fails_at += 1;
        }
    }
}
