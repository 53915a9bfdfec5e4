//! Output folders of the commands that make images: `--out`, or a folder in the run named after the request. Images go to its
//! subfolder `images`, sheets and tables beside it.
//!
//! Each image is written as soon as it is finished, and `request.json` records the request, so that an interrupted call can be
//! resumed: image i does not depend on the call that samples it.

use super::flags::stem;
use anyhow::{Context, bail};
use ddpm::Error;
use ddpm::image::{Image, read_png};
use ddpm::output::{self, FileKind};
use ddpm::run_folder::RunFolder;
use ddpm::storage::write_file;
use ddpm::text::{capped, quoted_value, shown, thousands};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The record of the request.
const REQUEST: &str = "request.json";
/// The subfolder of the images.
const IMAGES: &str = "images";
/// Files that commands write beside it.
const SIDE_FILES: [(&str, FileKind); 6] = [
    ("grid.png", FileKind::Png),
    ("sheet.png", FileKind::Png),
    ("progress.png", FileKind::Png),
    ("progress.gif", FileKind::Gif),
    ("nearest.png", FileKind::Png),
    ("nearest.csv", FileKind::Table),
];
/// Maximum differences listed when a request is not the one to resume.
const MAX_DIFFERENCES: usize = 4;

/// An explicit flag and its value, part of the folder's name so that different requests get different folders.
pub(super) type FlagValue = (&'static str, String);

/// Where results go, and what happens to existing files.
#[derive(clap::Args)]
pub(super) struct OutFlags {
    /// Output folder; by default in RUN/samples, named after all flags but -n
    #[arg(short, long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
    /// Resume the same call after an interruption: make only the missing images
    #[arg(long)]
    pub resume: bool,
    /// Overwrite existing files not written by this command
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
}

/// The request that a folder of images is opened for.
pub(super) struct FolderRequest<'a> {
    pub run: &'a RunFolder,
    pub command: &'static str,
    /// Start of the folder's name; the flags follow.
    pub what: String,
    pub explicit: Vec<FlagValue>,
    /// Everything that the images depend on besides their index.
    pub request: Map<String, Value>,
    /// What affects only rounding, such as the instruction set.
    pub computed: Map<String, Value>,
    pub count: usize,
}

/// A folder that images are written to.
pub(super) struct ImageFolder {
    path: PathBuf,
    /// Whether it is in the run under a generated name, so that everything in it is ours.
    in_run: bool,
    record: Value,
    count: usize,
    /// Image count of the resumed request.
    before: Option<usize>,
    /// Indices of complete images.
    complete: HashSet<usize>,
    started: bool,
    written: usize,
}

impl ImageFolder {
    /// Opens `--out`, or a folder in RUN/samples. No file is written or removed before the first image is finished.
    ///
    /// # Errors
    /// Existing files that ddpm did not write; resuming a different request.
    pub fn open(flags: &OutFlags, request: FolderRequest<'_>) -> anyhow::Result<Self> {
        let FolderRequest { run, command, what, explicit, request, computed, count } = request;
        let path = flags.out.clone().unwrap_or_else(|| run.samples().join(name(&what, &explicit)));
        let record = json!({
            output::PROGRAM.0: output::PROGRAM.1,
            "version": env!("CARGO_PKG_VERSION"),
            "command": command,
            "count": count,
            "request": request,
            "computed": computed,
        });
        let mut folder = Self {
            path,
            in_run: flags.out.is_none(),
            record,
            count,
            before: None,
            complete: HashSet::new(),
            started: false,
            written: 0,
        };
        output::check_folder(&folder.path)?;
        output::check_folder(&folder.images())?;
        if flags.resume {
            folder.resume()?;
        } else if !folder.is_of_earlier_version() {
            let numbered = folder
                .image_indices()?
                .into_iter()
                .filter(|&i| i < count)
                .map(|i| (folder.image(i), FileKind::Png));
            let side_files = SIDE_FILES.iter().map(|(name, kind)| (folder.side_file(name), *kind));
            let all = numbered.chain(side_files).chain([(folder.side_file(REQUEST), FileKind::Json)]);
            for (path, kind) in all {
                output::check(&path, kind, flags.overwrite)?;
            }
        }
        make_folder(&folder.images())?;
        Ok(folder)
    }

    /// Checks that the recorded request is this one, and finds its complete images.
    fn resume(&mut self) -> anyhow::Result<()> {
        let (path, shown) = (self.side_file(REQUEST), shown(&self.path));
        let Some(recorded) = output::json(&path).filter(|_| output::is_ours(&path, FileKind::Json)) else {
            if self.image_indices()?.is_empty() {
                status!("note: nothing to resume in {shown}; starting from the first image");
                return Ok(());
            }
            bail!(
                "{shown} has images, but no {REQUEST} that records how they were made; omit --resume, or give another --out"
            );
        };
        let differences = differences(&recorded["request"], &self.record["request"]);
        if recorded["command"] != self.record["command"] || !differences.is_empty() {
            let reason = if differences.is_empty() {
                format!("it was made by ddpm {}", recorded["command"].as_str().unwrap_or("?"))
            } else {
                differences[..differences.len().min(MAX_DIFFERENCES)].join(", ")
            };
            bail!(
                "{shown}: --resume requires the same request, but {reason}; omit --resume to start over, or give another --out"
            );
        }
        if recorded["computed"] != self.record["computed"] || recorded["version"] != self.record["version"] {
            status!(
                "note: the existing images were computed differently ({}); new ones may differ in rounding",
                recorded["computed"]
            );
        }
        let before = recorded["count"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let known = self.image_indices()?.into_iter().filter(|&i| i < before);
        self.complete = known.filter(|&i| output::is_complete_png(&self.image(i))).collect();
        self.before = Some(before);
        self.record["count"] = self.count.max(before).into();
        status!("resuming: {} of {} images exist", thousands(self.present()), thousands(self.count));
        Ok(())
    }

    /// Whether an earlier version wrote it, which put images beside the sheet and recorded no request.
    fn is_of_earlier_version(&self) -> bool {
        self.in_run && !self.side_file(REQUEST).exists() && self.side_file("0000.png").is_file()
    }

    /// Number of requested images that exist.
    fn present(&self) -> usize {
        self.complete.iter().filter(|&&i| i < self.count).count()
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The subfolder of the images.
    pub fn images(&self) -> PathBuf {
        self.path.join(IMAGES)
    }

    /// The file of image `i`.
    pub fn image(&self, i: usize) -> PathBuf {
        self.images().join(format!("{i:06}.png"))
    }

    /// A file beside the images.
    pub fn side_file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Number of requested images.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether image `i` is missing.
    pub fn is_missing(&self, i: usize) -> bool {
        !self.complete.contains(&i)
    }

    /// Number of missing images.
    pub fn missing(&self) -> usize {
        self.count - self.present()
    }

    /// Indices of the image files in the folder.
    fn image_indices(&self) -> anyhow::Result<Vec<usize>> {
        Ok(names(&self.images())?.iter().filter_map(|name| image_index(name)).collect())
    }

    /// Writes images `first..`, except existing ones.
    pub fn write(&mut self, first: usize, images: &[Image]) -> ddpm::Result<()> {
        if !self.started {
            self.start()?;
            self.started = true;
        }
        for (i, image) in (first..self.count).zip(images) {
            if self.is_missing(i) {
                image.save(self.image(i))?;
                self.written += 1;
            }
        }
        Ok(())
    }

    /// Removes what an earlier call left and records this request. In a folder of the run, its images replace all earlier ones;
    /// in `--out` nothing is removed that is not replaced, and a note tells of other numbered images.
    fn start(&mut self) -> ddpm::Result<()> {
        let images = self.images();
        std::fs::create_dir_all(&images).map_err(Error::io(&images, "create the folder"))?;
        let remove = |path: PathBuf| {
            std::fs::remove_file(&path).map_err(Error::io(&path, "remove a file of an earlier call"))
        };
        let of_earlier_version = self.is_of_earlier_version();
        let mut others = Vec::new();
        for name in names(&images)? {
            let path = images.join(&name);
            let Some(i) = image_index(&name) else {
                // Left by a process killed while writing.
                if name.to_string_lossy().starts_with('.') && name.to_string_lossy().ends_with(".tmp") {
                    remove(path)?;
                }
                continue;
            };
            match self.before {
                Some(before) if i >= before && i < self.count && output::is_ours(&path, FileKind::Png) => {
                    remove(path)?
                }
                Some(_) => {}
                None if i < self.count || (self.in_run && output::is_ours(&path, FileKind::Png)) => {
                    remove(path)?
                }
                None => others.push(name),
            }
        }
        if self.in_run && self.before.is_none() {
            for name in
                names(&self.path)?.iter().filter(|name| of_earlier_version && image_index(name).is_some())
            {
                remove(self.path.join(name))?;
            }
            for (name, kind) in SIDE_FILES {
                let path = self.side_file(name);
                if path.is_file() && (of_earlier_version || output::is_ours(&path, kind)) {
                    remove(path)?;
                }
            }
        }
        if let Some(first) = others.iter().min() {
            status!(
                "note: {} already had numbered images; {} of them, from {} on, are not from this call",
                shown(&images),
                others.len(),
                shown(first)
            );
        }
        write_file(&self.side_file(REQUEST), format!("{:#}\n", self.record).as_bytes(), "write the request")
    }

    /// The first `n` images, of this call or an earlier one.
    pub fn read_first(&self, n: usize) -> ddpm::Result<Vec<Image>> {
        (0..n.min(self.count)).map(|i| read_png(&self.image(i))).collect()
    }

    /// Reports an interruption: what was written, and how to resume.
    pub fn report_stop(&self) {
        let present = self.present() + self.written;
        if present == 0 {
            status!("stopped; nothing was written");
            // Fails, as intended, unless they are empty.
            let _ = std::fs::remove_dir(self.images()).and_then(|()| std::fs::remove_dir(&self.path));
            return;
        }
        let (present, count) = (thousands(present), thousands(self.count));
        status!("stopped; {present} of {count} images are in {}", shown(self.images()));
        status!("resume with:  {}", rerun_with("--resume"));
    }
}

/// This command line with `flag` added.
fn rerun_with(flag: &str) -> String {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--overwrite").collect();
    if !args.iter().any(|arg| arg == flag) {
        args.push(flag.to_owned());
    }
    let quoted: Vec<String> = args.iter().map(|arg| quoted_value(arg)).collect();
    format!("ddpm {}", quoted.join(" "))
}

/// Entries that differ, as "seed was 7, now 8".
pub(super) fn differences(old: &Value, new: &Value) -> Vec<String> {
    let empty = Map::new();
    let (old, new) = (old.as_object().unwrap_or(&empty), new.as_object().unwrap_or(&empty));
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let shown = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "unset".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    keys.into_iter()
        .filter(|&key| old.get(key) != new.get(key))
        .map(|key| {
            format!("{} was {}, now {}", key.replace('_', " "), shown(old.get(key)), shown(new.get(key)))
        })
        .collect()
}

/// The names in a folder; none if it does not exist.
fn names(path: &Path) -> ddpm::Result<Vec<std::ffi::OsString>> {
    let list = || Error::io(path, "list the folder");
    match std::fs::read_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries.map_err(list())?.map(|entry| Ok(entry.map_err(list())?.file_name())).collect(),
    }
}

/// Creates a folder and its parents.
pub(super) fn make_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot create the folder {}", shown(path)))
}

/// Maximum bytes of a folder's name. File systems allow 255; some that encrypt names, 143.
const MAX_NAME: usize = 120;

/// A folder name such as `vary-cat-seed-0-strength-0.3`, valid on every system and at most [`MAX_NAME`] bytes.
pub(super) fn name(what: &str, explicit: &[FlagValue]) -> String {
    let parts = explicit.iter().map(|(flag, value)| format!("-{flag}-{value}"));
    let full: String = std::iter::once(what.to_owned()).chain(parts).collect();
    let mut safe = String::new();
    for c in full.chars() {
        if c.is_alphanumeric() || "-_.+".contains(c) {
            safe.push(c)
        } else {
            // Percent-encoding keeps different values different.
            c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| safe += &format!("%{byte:02X}"))
        }
    }
    capped(&safe, MAX_NAME).into_owned()
}

/// The index of an image from its file name, such as `000012.png`.
fn image_index(name: &OsStr) -> Option<usize> {
    let path = Path::new(name);
    let stem = stem(path);
    let numbered = stem.len() >= 4 && stem.bytes().all(|b| b.is_ascii_digit());
    (path.extension() == Some(OsStr::new("png")) && numbered).then(|| stem.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_after_explicit_flags() {
        let explicit = |pairs: &[(&'static str, &str)]| -> Vec<FlagValue> {
            pairs.iter().map(|&(flag, value)| (flag, value.to_owned())).collect()
        };
        assert_eq!(name("seed-7", &[]), "seed-7");
        let of_sampler = explicit(&[("class", "bl/ue: één"), ("sampler", "dpm++2m"), ("steps", "10")]);
        assert_eq!(
            name("vary-cat-seed-0", &of_sampler),
            "vary-cat-seed-0-class-bl%2Fue%3A%20één-sampler-dpm++2m-steps-10"
        );
        let of_class = |class| name("seed-0", &explicit(&[("class", class)]));
        let classes = ["a b", "a-b", "a:b", "-1", "#1"].map(of_class);
        assert!((1..classes.len()).all(|i| !classes[..i].contains(&classes[i])), "{classes:?}");
    }

    #[test]
    fn long_names_are_shortened_to_valid_distinct_ones() {
        let long = |end: &str| format!("denoise-{}{end}", "東京".repeat(40));
        let (a, b) = (name(&long("a"), &[]), name(&long("b"), &[]));
        assert!(a.len() <= MAX_NAME && b.len() <= MAX_NAME && a != b, "{a} {b}");
        assert!(a.starts_with("denoise-東京"), "{a}");
        let explicit: Vec<FlagValue> = vec![("class", "x".repeat(300)), ("weights", "y".repeat(300))];
        assert!(name("seed-0", &explicit).len() <= MAX_NAME);
        std::fs::create_dir(tempfile::tempdir().unwrap().path().join(a)).unwrap();
    }

    #[test]
    fn image_indices_are_parsed_from_file_names() {
        for (file, i) in [
            ("0000.png", Some(0)),
            ("000012.png", Some(12)),
            ("1234567.png", Some(1_234_567)),
            ("000.png", None),
            ("0000.jpg", None),
            ("cat1.png", None),
        ] {
            assert_eq!(image_index(OsStr::new(file)), i, "{file}");
        }
    }

    #[test]
    fn differences_between_requests_are_named() {
        let old = json!({"seed": 7, "class": "cat", "steps": 5});
        let new = json!({"seed": 8, "steps": 5, "eta": 1.0});
        assert_eq!(
            differences(&old, &new),
            ["class was cat, now unset", "eta was unset, now 1.0", "seed was 7, now 8"]
        );
    }
}
