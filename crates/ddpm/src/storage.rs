//! Size-limited reads, and atomic writes: a crash or a full disk leaves the old file or the new one, never half of one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::text::capped;
use crate::{Error, Result};

/// A file being written.
pub(crate) trait Output: Write + Send {
    /// Waits until everything written is on the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// The operations that writing needs. Tests substitute one that fails on demand.
pub(crate) trait FileSystem: Sync {
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Waits until the folder's directory entries are on the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's file system.
pub(crate) struct OsFileSystem;

impl Output for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl FileSystem for OsFileSystem {
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
            // Some network file systems do not support this.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
            other => other,
        }
    }

    #[cfg(not(unix))]
    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        // Other systems cannot open folders for syncing; the rename is journalled.
        Ok(())
    }
}

/// Writes a new file and waits until it is on the disk.
pub(crate) fn write_synced(fs: &dyn FileSystem, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs.create(path)?;
    for part in bytes.chunks(1 << 20) {
        file.write_all(part)?;
    }
    file.sync()
}

/// Creates or replaces the file at `path` atomically.
pub(crate) fn write_atomic(
    file_system: &dyn FileSystem,
    path: &Path,
    bytes: &[u8],
    doing: &'static str,
) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The name may already have the maximum length; leave room for the additions.
    let temporary = path.with_file_name(format!(".tmp-{}-{}", capped(&name, 100), std::process::id()));
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let done = write_synced(file_system, &temporary, bytes)
        .and_then(|()| file_system.rename(&temporary, path))
        .and_then(|()| file_system.sync_dir(parent));
    if done.is_err() {
        // Best effort: otherwise the next start removes it.
        let _ = fs::remove_file(&temporary);
    }
    done.map_err(Error::io(path, doing))
}

/// Creates or replaces a file atomically: a crash or a full disk leaves the old file or the new one.
/// `doing` describes the operation in error messages, e.g. "write the table".
///
/// # Errors
/// [`Error::Io`].
pub fn write_file(path: &Path, bytes: &[u8], doing: &'static str) -> Result<()> {
    write_atomic(&OsFileSystem, path, bytes, doing)
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

/// Reads a file of at most `max_bytes` bytes.
pub(crate) fn read(path: &Path, doing: &'static str, max_bytes: u64) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let metadata = fs::metadata(path)?;
        // Opening a pipe would block until it has a writer.
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
        }
        let too_big =
            || io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {max_bytes} bytes"));
        if metadata.len() > max_bytes {
            return Err(too_big());
        }
        let mut bytes = Vec::new();
        let length = usize::try_from(metadata.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        bytes.try_reserve_exact(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        File::open(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > max_bytes { Err(too_big()) } else { Ok(bytes) }
    };
    read().map_err(Error::io(path, doing))
}
