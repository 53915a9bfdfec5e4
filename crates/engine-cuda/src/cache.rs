//! On-disk cache of compiled kernels, so that only the first start of the program compiles them.
//!
//! The environment variable `DDPM_KERNEL_CACHE` names the folder (empty: no cache); by default it is in the user's cache directory.
//! Unreadable entries are recompiled and failed writes ignored: nothing here is an error.

use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::{env, fs, process};

/// Environment variable that names the folder.
pub const VARIABLE: &str = "DDPM_KERNEL_CACHE";

/// The cache folder; `None` disables the cache.
pub fn folder() -> Option<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if env::var_os(VARIABLE).is_some() {
        return named(VARIABLE);
    }
    let user_cache = named("XDG_CACHE_HOME").or_else(|| named("LOCALAPPDATA"));
    Some(user_cache.or_else(|| Some(named("HOME")?.join(".cache")))?.join("ddpm").join("kernels"))
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Cache file of a source compiled with these options by this compiler version.
pub fn file(folder: &Path, name: &str, source: &str, options: &[String], compiler: (i32, i32)) -> PathBuf {
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    folder.join(format!("{plain}-{:016x}.cubin", hash((source, options, compiler))))
}

/// Reads an entry made by [`write`]; `None` if it is missing or corrupt.
pub fn read(file: &Path) -> Option<Vec<u8>> {
    let content = fs::read(file).ok()?;
    let (sum, code) = content.split_first_chunk::<8>()?;
    (*sum == hash(code).to_le_bytes()).then(|| code.to_vec())
}

/// Stores code after its checksum, atomically: other processes see either all of it or nothing.
pub fn write(file: &Path, code: &[u8]) {
    let mut name = OsString::from(file);
    name.push(format!(".{}", process::id()));
    let (temporary, content) = (PathBuf::from(name), [&hash(code).to_le_bytes()[..], code].concat());
    let folder = file.parent().map_or(Ok(()), fs::create_dir_all);
    if folder
        .and_then(|()| fs::write(&temporary, content))
        .and_then(|()| fs::rename(&temporary, file))
        .is_err()
    {
        let _ = fs::remove_file(&temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip_and_corrupt_ones_are_ignored() {
        let folder = env::temp_dir().join(format!("ddpm-kernels-{}", process::id()));
        let of = |source, compiler| file(&folder, "norm.cu (8, b)", source, &["-x".to_owned()], compiler);
        let one = of("a", (12, 9));
        assert!(one != of("b", (12, 9)) && one != of("a", (13, 0)) && one == of("a", (12, 9)));
        assert_eq!(read(&one), None);
        write(&one, b"code");
        write(&one, b"the code");
        assert_eq!(read(&one).as_deref(), Some(&b"the code"[..]));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no temporary file remains");
        for damage in [&b""[..], b"1234", b"12345678the code"] {
            fs::write(&one, damage).unwrap();
            assert_eq!(read(&one), None);
        }
        fs::remove_dir_all(&folder).unwrap();
        // The folder cannot be created.
        fs::write(&folder, "a file").unwrap();
        write(&one, b"code");
        assert_eq!(read(&one), None);
        fs::remove_file(&folder).unwrap();
    }
}
