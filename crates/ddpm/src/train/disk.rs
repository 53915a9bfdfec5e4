//! Reading with a limit, and writing so that a crash or a full disk leaves the old file or the new, never half of one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::text::capped;
use crate::{Error, Result};

/// A file being written.
pub(crate) trait Output: Write {
    /// Waits until what was written is on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// The calls that writing needs. Tests put a disk in its place that fails when told to.
pub(crate) trait Disk {
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Waits until the folder's entries are on the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's.
pub(crate) struct RealDisk;

impl Output for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(File::create(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    #[cfg(unix)]
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match File::open(path)?.sync_all() {
            // Some network file systems know no such thing.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
            other => other,
        }
    }

    #[cfg(not(unix))]
    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        // Folders cannot be opened for this elsewhere; the rename is journalled.
        Ok(())
    }
}

/// Writes a whole new file and waits until it is on the disk.
pub(crate) fn write(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = disk.create(path)?;
    for part in bytes.chunks(1 << 20) {
        file.write_all(part)?;
    }
    file.sync()
}

/// Puts `bytes` in the place of the file at `path`, or makes it, in one step.
pub(crate) fn replace(disk: &dyn Disk, path: &Path, bytes: &[u8], doing: &'static str) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A name may be as long as file systems let it, and what is added to it must have room.
    let temporary = path.with_file_name(format!(".tmp-{}-{}", capped(&name, 100), std::process::id()));
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let done = write(disk, &temporary, bytes)
        .and_then(|()| disk.rename(&temporary, path))
        .and_then(|()| disk.sync_dir(parent));
    if done.is_err() {
        // Best effort: the next start sweeps it otherwise.
        let _ = fs::remove_file(&temporary);
    }
    done.map_err(Error::io(path, doing))
}

/// Writes a whole file, or puts it in the place of one, in one step: a crash or a full disk leaves the old file or the new.
/// `doing` is what errors say that was tried, as "write the table".
///
/// # Errors
/// [`Error::Io`].
pub fn write_file(path: &Path, bytes: &[u8], doing: &'static str) -> Result<()> {
    replace(&RealDisk, path, bytes, doing)
}

/// SHA-256 of a file's bytes, in hexadecimal.
///
/// # Errors
/// [`Error::Io`].
pub fn file_sha256(path: &Path) -> Result<String> {
    let mut sha = Sha256::new();
    let mut part = vec![0; 1 << 20];
    let mut read = || -> io::Result<()> {
        let mut file = File::open(path)?;
        loop {
            match file.read(&mut part)? {
                0 => return Ok(()),
                n => sha.update(&part[..n]),
            }
        }
    };
    read().map_err(Error::io(path, "read it"))?;
    Ok(sha.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Reads a file of at most `most` bytes.
pub(crate) fn read(path: &Path, doing: &'static str, most: u64) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let about = fs::metadata(path)?;
        // Opening a pipe would wait for a writer.
        if !about.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
        }
        let too_big =
            || io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {most} bytes"));
        if about.len() > most {
            return Err(too_big());
        }
        let mut bytes = Vec::new();
        let length = usize::try_from(about.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.try_reserve_exact(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        File::open(path)?.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > most { Err(too_big()) } else { Ok(bytes) }
    };
    read().map_err(Error::io(path, doing))
}
