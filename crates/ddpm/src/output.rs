//! Overwrite protection: only files that ddpm wrote itself are replaced.
//!
//! Every file that a command writes, apart from training, carries a marker: PNGs the text `Software: ddpm VERSION`,
//! GIFs the comment `ddpm VERSION`, weights `"software": "ddpm VERSION"` in their metadata, JSON the entry
//! `"program": "ddpm"`, tables a known header line. [`check`] looks for these markers. The files of a run (its
//! settings, logs and checkpoints) have none, and only training overwrites them.

use crate::error::{Error, Result};
use crate::run_folder::{is_run, step_sheet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The marker in JSON: key and value.
pub const PROGRAM: (&str, &str) = ("program", "ddpm");
/// Header line of the table of nearest-neighbour distances.
pub const DISTANCES: &str = "sample,training image,mirrored,distance";
/// Header line of the table of terms of the variational bound.
pub const TERMS: &str = "term,first_t,last_t,bits_per_dim,standard_error,x_0_mse,eps_mse";

/// Prefix of [`SOFTWARE`](crate::image::SOFTWARE) in any version.
const SOFTWARE_PREFIX: &[u8] = b"ddpm ";
/// Maximum length of a JSON file or header that is examined, in bytes.
const MAX_JSON: u64 = 64 << 20;

/// Kind of output file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// An image.
    Png,
    /// An animation.
    Gif,
    /// Weights, as safetensors.
    Weights,
    /// Metadata about results, as JSON.
    Json,
    /// A CSV table with one of our header lines.
    Table,
    /// A file without a marker, such as a checkpoint for another program; never recognised as ours.
    Foreign,
}

/// Checks that `path` may be written as a file of this kind: it does not exist, or ddpm wrote it as the same kind, or
/// `overwrite` is set. Files of a run, folders and devices are always rejected.
///
/// # Errors
/// [`Error::Taken`] with advice.
pub fn check(path: &Path, kind: FileKind, overwrite: bool) -> Result<()> {
    let taken = |reason: String| Err(Error::Taken { path: path.to_owned(), reason });
    if let Some((run, part)) = part_of_run(path) {
        return taken(format!(
            "belongs to {part} of {}, which only training may write; choose another name with --out",
            run.display()
        ));
    }
    if fs::symlink_metadata(path).is_err() {
        // Does not exist; write errors are reported on writing.
        return Ok(());
    }
    match fs::metadata(path) {
        Ok(about) if about.is_dir() => return taken("is a folder; give a file name with --out".to_owned()),
        Ok(about) if !about.is_file() => {
            return taken(
                "is a device or a pipe, not a regular file; give a file name with --out".to_owned(),
            );
        }
        // A dangling symlink counts as an existing file.
        _ => {}
    }
    if overwrite || is_ours(path, kind) {
        return Ok(());
    }
    taken(
        "already exists and was not written by this command; choose another name with --out, or replace it with \
         --overwrite"
            .to_owned(),
    )
}

/// Checks that files may be written into the folder `path`, which need not exist.
///
/// # Errors
/// [`Error::Taken`] if `path` is a file, or a folder that only training may write.
pub fn check_folder(path: &Path) -> Result<()> {
    let taken = |reason: String| Err(Error::Taken { path: path.to_owned(), reason });
    if let Some((run, part)) = part_of_run(&path.join("file")) {
        return taken(format!(
            "belongs to {part} of {}, which only training may write; choose another folder with --out",
            run.display()
        ));
    }
    match fs::metadata(path) {
        Ok(about) if !about.is_dir() => taken("is a file; give a folder with --out".to_owned()),
        _ => Ok(()),
    }
}

/// Whether the file has the marker of its kind; false if it cannot be read.
pub fn is_ours(path: &Path, kind: FileKind) -> bool {
    match kind {
        FileKind::Png => png_software(path).is_some_and(|text| text.starts_with(SOFTWARE_PREFIX)),
        FileKind::Gif => read_prefix(path, 2048).is_some_and(|bytes| gif_comment(&bytes)),
        FileKind::Weights => metadata(path).is_some_and(|about| {
            about
                .get("software")
                .and_then(|v| v.as_str())
                .is_some_and(|v| v.as_bytes().starts_with(SOFTWARE_PREFIX))
        }),
        FileKind::Json => {
            json(path).is_some_and(|value| value.get(PROGRAM.0).is_some_and(|v| v == PROGRAM.1))
        }
        FileKind::Table => read_prefix(path, 256).is_some_and(|bytes| {
            [DISTANCES, TERMS].iter().any(|line| bytes.starts_with(format!("{line}\n").as_bytes()))
        }),
        FileKind::Foreign => false,
    }
}

/// Whether the file is a complete PNG of ours, not one truncated by a power loss.
pub fn is_complete_png(path: &Path) -> bool {
    const END: &[u8] = b"\0\0\0\0IEND\xAE\x42\x60\x82";
    is_ours(path, FileKind::Png) && fs::read(path).is_ok_and(|bytes| bytes.ends_with(END))
}

/// Parses a JSON file; `None` if it is not one.
pub fn json(path: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&read_prefix(path, MAX_JSON)?).ok()
}

/// At most `max_len` bytes from the start of a file.
fn read_prefix(path: &Path, max_len: u64) -> Option<Vec<u8>> {
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(max_len).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The `Software` text chunk of a PNG, if it comes before the pixels.
fn png_software(path: &Path) -> Option<Vec<u8>> {
    const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
    const KEYWORD: &[u8] = b"Software\0";
    let bytes = read_prefix(path, 4096)?;
    let mut rest = bytes.strip_prefix(SIGNATURE)?;
    loop {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (name, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        if name == b"IDAT" {
            return None;
        }
        let content = after.get(..length)?;
        if name == b"tEXt"
            && let Some(text) = content.strip_prefix(KEYWORD)
        {
            return Some(text.to_owned());
        }
        // Skip the chunk's checksum.
        rest = after.get(length + 4..)?;
    }
}

/// Whether a GIF's first comment is ours.
fn gif_comment(bytes: &[u8]) -> bool {
    const COMMENT: &[u8] = b"\x21\xFE";
    bytes.starts_with(b"GIF8")
        && bytes
            .windows(COMMENT.len())
            .position(|w| w == COMMENT)
            .and_then(|at| bytes.get(at + COMMENT.len() + 1..))
            .is_some_and(|text| text.starts_with(SOFTWARE_PREFIX))
}

/// The `__metadata__` of a safetensors file.
fn metadata(path: &Path) -> Option<serde_json::Value> {
    let bytes = read_prefix(path, 8)?;
    let length = u64::from_le_bytes(bytes.try_into().ok()?);
    let header = read_prefix(path, 8 + length.min(MAX_JSON))?;
    let value: serde_json::Value = serde_json::from_slice(header.get(8..)?).ok()?;
    value.get("__metadata__").cloned()
}

/// The run that a file at `path` would belong to, and to which part.
fn part_of_run(path: &Path) -> Option<(PathBuf, &'static str)> {
    let name = path.file_name()?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A path that does not exist has no links to resolve.
    let parent = parent.canonicalize().or_else(|_| std::path::absolute(parent)).ok()?;
    if parent.join("manifest.json").is_file() {
        return Some((parent, "the files"));
    }
    let target = parent.join(name);
    let run = parent.ancestors().find(|folder| is_run(folder))?;
    let inside = target.strip_prefix(run).ok()?;
    let mut parts = inside.components().map(|part| part.as_os_str().to_string_lossy());
    let (first, second) = (parts.next()?, parts.next());
    let part = match (&*first, second) {
        ("checkpoints", _) => "the checkpoints",
        ("snapshots", _) => "the snapshots",
        ("config.toml", None) => "the settings",
        ("metrics.jsonl" | "lock" | "README.md" | "loss.png", None) => "the logs",
        (name, None) if name.starts_with("events.out.tfevents") => "the logs",
        ("samples", Some(name)) if step_sheet(&name) && parts.next().is_none() => "the sample sheets",
        _ => return None,
    };
    Some((run.to_owned(), part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::data::ImageShape;
    use crate::image::{Image, save_gif};
    use crate::run_folder::RunFolder;

    fn image() -> Image {
        Image::black(ImageShape { height: 2, width: 3, channels: 3 })
    }

    #[test]
    fn only_files_with_the_marker_of_their_kind_are_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        image().save(file("a.png")).unwrap();
        save_gif(&[image()], 50, 50, &file("a.gif")).unwrap();
        fs::write(file("a.json"), r#"{"program": "ddpm"}"#).unwrap();
        fs::write(file("a.csv"), format!("{TERMS}\nprior,,\n")).unwrap();
        let kinds = [
            ("a.png", FileKind::Png),
            ("a.gif", FileKind::Gif),
            ("a.json", FileKind::Json),
            ("a.csv", FileKind::Table),
        ];
        for (name, own) in kinds {
            for kind in [
                FileKind::Png,
                FileKind::Gif,
                FileKind::Weights,
                FileKind::Json,
                FileKind::Table,
                FileKind::Foreign,
            ] {
                assert_eq!(check(&file(name), kind, false).is_ok(), kind == own, "{name} as {kind:?}");
                assert!(check(&file(name), kind, true).is_ok());
            }
        }
        // Files of the same kinds from other programs.
        image::RgbImage::new(2, 2).save(file("b.png")).unwrap();
        fs::write(file("b.gif"), b"GIF89a\x01\0\x01\0\0\0\0\x21\xFE\x05other\0;").unwrap();
        fs::write(file("b.json"), r#"{"program": "another"}"#).unwrap();
        fs::write(file("b.csv"), "term,first\n").unwrap();
        fs::write(file("b.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
        fs::write(file("empty"), "").unwrap();
        let others = [
            ("b.png", FileKind::Png),
            ("b.gif", FileKind::Gif),
            ("b.json", FileKind::Json),
            ("b.csv", FileKind::Table),
            ("b.safetensors", FileKind::Weights),
            ("empty", FileKind::Png),
        ];
        for (name, kind) in others {
            let error = check(&file(name), kind, false).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("--overwrite"), "{error}");
            assert!(check(&file(name), kind, true).is_ok());
        }
        assert!(check(&file("new.png"), FileKind::Png, false).is_ok());
        assert!(check(folder.path(), FileKind::Png, true).unwrap_err().to_string().contains("is a folder"));
        assert!(check_folder(&file("a.png")).is_err() && check_folder(folder.path()).is_ok());
    }

    #[cfg(unix)]
    #[test]
    fn devices_are_rejected_and_symlinks_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        for device in ["/dev/null", "/dev/stdout"] {
            let error = check(Path::new(device), FileKind::Png, true);
            assert!(device == "/dev/stdout" || error.is_err(), "{device}");
        }
        image().save(file("a.png")).unwrap();
        fs::write(file("text"), "mine").unwrap();
        for (name, target) in [("ours", "a.png"), ("theirs", "text"), ("nowhere", "gone")] {
            std::os::unix::fs::symlink(file(target), file(name)).unwrap();
            assert_eq!(check(&file(name), FileKind::Png, false).is_ok(), name == "ours", "{name}");
        }
    }

    #[test]
    fn files_of_a_run_are_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), Some("r")).unwrap();
        run.write_config(&Config::default()).unwrap();
        image().save(run.loss_path()).unwrap();
        image().save(run.sample_path(100)).unwrap();
        let inside = |name: &str| run.path().join(name);
        for own in [
            "config.toml",
            "metrics.jsonl",
            "README.md",
            "loss.png",
            "lock",
            "events.out.tfevents.1.x",
            "checkpoints/step-0000001/model.safetensors",
            "checkpoints/mine.png",
            "samples/../config.toml",
            "samples/step-0000100.png",
            "snapshots/new.safetensors",
        ] {
            for overwrite in [false, true] {
                let error = check(&inside(own), FileKind::Png, overwrite).unwrap_err().to_string();
                assert!(error.contains("only training may write"), "{own}: {error}");
            }
        }
        for free in ["averages/a.safetensors", "samples/seed-7/grid.png", "export/model.pth", "mine.png"] {
            assert!(check(&inside(free), FileKind::Png, false).is_ok(), "{free}");
        }
        assert!(check_folder(&run.checkpoints()).is_err() && check_folder(&inside("samples/seed-7")).is_ok());
        // A checkpoint copied elsewhere.
        let copied = root.path().join("copied");
        fs::create_dir(&copied).unwrap();
        fs::write(copied.join("manifest.json"), "{}").unwrap();
        assert!(check(&copied.join("model.safetensors"), FileKind::Weights, true).is_err());
    }
}
