//! What may be written where: nothing that this program did not make is overwritten.
//!
//! Every file that a command writes beside a training carries a mark of its making: PNGs the text `Software: ddpm VERSION`,
//! GIFs the comment `ddpm VERSION`, weights `"software": "ddpm VERSION"` in their metadata, JSON the entry
//! `"program": "ddpm"`, tables the header line of a table of ours. [`check`] decides by these marks. The files that make up a run
//! (its settings, its record, its checkpoints) carry none, and are never overwritten from outside.

use crate::error::{Error, Result};
use crate::train::run::{is_run, step_sheet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The mark in PNGs, GIFs and weights.
pub(crate) const SOFTWARE: &str = concat!("ddpm ", env!("CARGO_PKG_VERSION"));
/// The key and the value of the mark in JSON.
pub const PROGRAM: (&str, &str) = ("program", "ddpm");
/// The header line of the table of distances.
pub const DISTANCES: &str = "sample,training image,mirrored,distance";
/// The header line of the table of a bound's terms.
pub const TERMS: &str = "term,first_t,last_t,bits_per_dim,standard_error,x_0_mse,eps_mse";

/// Beginning of what every mark of [`SOFTWARE`] says, whatever the version.
const MARK: &[u8] = b"ddpm ";
/// Largest JSON file or header that is looked at, in bytes.
const MOST: u64 = 64 << 20;

/// What a file is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An image.
    Png,
    /// An animation.
    Gif,
    /// Weights, as safetensors.
    Weights,
    /// Facts about what was made.
    Json,
    /// A table with one of our header lines.
    Table,
    /// What carries no mark, as another program's checkpoint: it is never taken for ours.
    Foreign,
}

/// Whether `path` may be written as a file of this kind: nothing is there, or what is there was made by this program and is of
/// the same kind, or `overwrite` is set. A part of a run, a folder and a device are refused in any case.
///
/// # Errors
/// [`Error::Taken`] with the way out.
pub fn check(path: &Path, kind: Kind, overwrite: bool) -> Result<()> {
    let taken = |reason: String| Err(Error::Taken { path: path.to_owned(), reason });
    if let Some((run, part)) = part_of_run(path) {
        return taken(format!(
            "belongs to {part} of {}, which nothing but training writes to; choose another name with --out",
            run.display()
        ));
    }
    if fs::symlink_metadata(path).is_err() {
        // Nothing is there; whether it can be written shows when it is.
        return Ok(());
    }
    match fs::metadata(path) {
        Ok(about) if about.is_dir() => return taken("is a folder; give a file's name with --out".to_owned()),
        Ok(about) if !about.is_file() => {
            return taken(
                "is no regular file, but a device or a pipe; give a file's name with --out".to_owned(),
            );
        }
        // A link that leads nowhere is somebody's, too.
        _ => {}
    }
    if overwrite || is_ours(path, kind) {
        return Ok(());
    }
    taken(
        "is there already, and not as a result of this command; choose another name with --out, or replace it with \
         --overwrite"
            .to_owned(),
    )
}

/// Whether files may be written into the folder `path`, which need not be there yet.
///
/// # Errors
/// [`Error::Taken`] for a file in its place, and for the folders that training keeps its own in.
pub fn check_folder(path: &Path) -> Result<()> {
    let taken = |reason: String| Err(Error::Taken { path: path.to_owned(), reason });
    if let Some((run, part)) = part_of_run(&path.join("file")) {
        return taken(format!(
            "belongs to {part} of {}, which nothing but training writes to; choose another folder with --out",
            run.display()
        ));
    }
    match fs::metadata(path) {
        Ok(about) if !about.is_dir() => taken("is a file; give a folder with --out".to_owned()),
        _ => Ok(()),
    }
}

/// Whether the file carries the mark of its kind. One that cannot be read does not.
pub fn is_ours(path: &Path, kind: Kind) -> bool {
    match kind {
        Kind::Png => png_software(path).is_some_and(|text| text.starts_with(MARK)),
        Kind::Gif => head(path, 2048).is_some_and(|bytes| gif_comment(&bytes)),
        Kind::Weights => metadata(path).is_some_and(|about| {
            about.get("software").and_then(|v| v.as_str()).is_some_and(|v| v.as_bytes().starts_with(MARK))
        }),
        Kind::Json => json(path).is_some_and(|value| value.get(PROGRAM.0).is_some_and(|v| v == PROGRAM.1)),
        Kind::Table => head(path, 256).is_some_and(|bytes| {
            [DISTANCES, TERMS].iter().any(|line| bytes.starts_with(format!("{line}\n").as_bytes()))
        }),
        Kind::Foreign => false,
    }
}

/// Whether the file is a PNG of ours to its end: one that the system lost power in the middle of is not.
pub fn is_whole_png(path: &Path) -> bool {
    const END: &[u8] = b"\0\0\0\0IEND\xAE\x42\x60\x82";
    is_ours(path, Kind::Png) && fs::read(path).is_ok_and(|bytes| bytes.ends_with(END))
}

/// A file of JSON, where it is one.
pub fn json(path: &Path) -> Option<serde_json::Value> {
    serde_json::from_slice(&head(path, MOST)?).ok()
}

/// At most so many bytes of a file's beginning.
fn head(path: &Path, most: u64) -> Option<Vec<u8>> {
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The text behind `Software` among a PNG's chunks before its pixels.
fn png_software(path: &Path) -> Option<Vec<u8>> {
    const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
    const KEYWORD: &[u8] = b"Software\0";
    let bytes = head(path, 4096)?;
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
        // Behind the chunk's checksum.
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
            .is_some_and(|text| text.starts_with(MARK))
}

/// The metadata in the header of a safetensors file.
fn metadata(path: &Path) -> Option<serde_json::Value> {
    let bytes = head(path, 8)?;
    let length = u64::from_le_bytes(bytes.try_into().ok()?);
    let header = head(path, 8 + length.min(MOST))?;
    let value: serde_json::Value = serde_json::from_slice(header.get(8..)?).ok()?;
    value.get("__metadata__").cloned()
}

/// The run that a file at `path` would be a part of, and of which part.
fn part_of_run(path: &Path) -> Option<(PathBuf, &'static str)> {
    let name = path.file_name()?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // What is not there yet has no links to resolve.
    let parent = parent.canonicalize().or_else(|_| std::path::absolute(parent)).ok()?;
    if parent.join("manifest.json").is_file() {
        return Some((parent, "the files"));
    }
    let whole = parent.join(name);
    let run = parent.ancestors().find(|folder| is_run(folder))?;
    let inside = whole.strip_prefix(run).ok()?;
    let mut parts = inside.components().map(|part| part.as_os_str().to_string_lossy());
    let (first, second) = (parts.next()?, parts.next());
    let part = match (&*first, second) {
        ("checkpoints", _) => "the checkpoints",
        ("snapshots", _) => "the snapshots",
        ("config.toml", None) => "the settings",
        ("metrics.jsonl" | "lock" | "README.md" | "loss.png", None) => "the record",
        (name, None) if name.starts_with("events.out.tfevents") => "the record",
        ("samples", Some(name)) if step_sheet(&name) && parts.next().is_none() => "the sample sheets",
        _ => return None,
    };
    Some((run.to_owned(), part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageShape;
    use crate::image::{Image, save_gif, save_png};
    use crate::train::config::Config;
    use crate::train::run::RunFolder;

    fn image() -> Image {
        Image::black(ImageShape { height: 2, width: 3, channels: 3 })
    }

    #[test]
    fn nothing_is_overwritten_that_does_not_carry_the_mark_of_its_kind() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        save_png(&image(), &file("a.png")).unwrap();
        save_gif(&[image()], 50, 50, &file("a.gif")).unwrap();
        fs::write(file("a.json"), r#"{"program": "ddpm"}"#).unwrap();
        fs::write(file("a.csv"), format!("{TERMS}\nprior,,\n")).unwrap();
        let kinds =
            [("a.png", Kind::Png), ("a.gif", Kind::Gif), ("a.json", Kind::Json), ("a.csv", Kind::Table)];
        for (name, own) in kinds {
            for kind in [Kind::Png, Kind::Gif, Kind::Weights, Kind::Json, Kind::Table, Kind::Foreign] {
                assert_eq!(check(&file(name), kind, false).is_ok(), kind == own, "{name} as {kind:?}");
                assert!(check(&file(name), kind, true).is_ok());
            }
        }
        // The same kinds, made by others.
        image::RgbImage::new(2, 2).save(file("b.png")).unwrap();
        fs::write(file("b.gif"), b"GIF89a\x01\0\x01\0\0\0\0\x21\xFE\x05other\0;").unwrap();
        fs::write(file("b.json"), r#"{"program": "another"}"#).unwrap();
        fs::write(file("b.csv"), "term,first\n").unwrap();
        fs::write(file("b.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
        fs::write(file("empty"), "").unwrap();
        let others = [
            ("b.png", Kind::Png),
            ("b.gif", Kind::Gif),
            ("b.json", Kind::Json),
            ("b.csv", Kind::Table),
            ("b.safetensors", Kind::Weights),
            ("empty", Kind::Png),
        ];
        for (name, kind) in others {
            let error = check(&file(name), kind, false).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("--overwrite"), "{error}");
            assert!(check(&file(name), kind, true).is_ok());
        }
        assert!(check(&file("new.png"), Kind::Png, false).is_ok());
        assert!(check(folder.path(), Kind::Png, true).unwrap_err().to_string().contains("is a folder"));
        assert!(check_folder(&file("a.png")).is_err() && check_folder(folder.path()).is_ok());
    }

    #[cfg(unix)]
    #[test]
    fn devices_are_refused_and_links_are_what_they_lead_to() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        for device in ["/dev/null", "/dev/stdout"] {
            let error = check(Path::new(device), Kind::Png, true);
            assert!(device == "/dev/stdout" || error.is_err(), "{device}");
        }
        save_png(&image(), &file("a.png")).unwrap();
        fs::write(file("text"), "mine").unwrap();
        for (name, target) in [("ours", "a.png"), ("theirs", "text"), ("nowhere", "gone")] {
            std::os::unix::fs::symlink(file(target), file(name)).unwrap();
            assert_eq!(check(&file(name), Kind::Png, false).is_ok(), name == "ours", "{name}");
        }
    }

    #[test]
    fn a_runs_own_files_are_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), Some("r")).unwrap();
        run.write_config(&Config::default()).unwrap();
        save_png(&image(), &run.loss_path()).unwrap();
        save_png(&image(), &run.sample_path(100)).unwrap();
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
                let error = check(&inside(own), Kind::Png, overwrite).unwrap_err().to_string();
                assert!(error.contains("nothing but training writes to"), "{own}: {error}");
            }
        }
        for free in ["averages/a.safetensors", "samples/seed-7/grid.png", "export/model.pth", "mine.png"] {
            assert!(check(&inside(free), Kind::Png, false).is_ok(), "{free}");
        }
        assert!(check_folder(&run.checkpoints()).is_err() && check_folder(&inside("samples/seed-7")).is_ok());
        // A checkpoint that was copied elsewhere.
        let copied = root.path().join("copied");
        fs::create_dir(&copied).unwrap();
        fs::write(copied.join("manifest.json"), "{}").unwrap();
        assert!(check(&copied.join("model.safetensors"), Kind::Weights, true).is_err());
    }
}
