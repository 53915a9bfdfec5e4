//! Where the commands put images: a folder of the run's, named after what was asked for, or the one that is said. The images have
//! a folder of their own in it, sheets and tables stand beside.
//!
//! Each image is written as soon as it is drawn, and `request.json` says what was asked for, so that a call that was stopped can be
//! gone on with: image i is the same whoever draws it.

use super::flags::stem;
use anyhow::{Context, bail};
use ddpm::Error;
use ddpm::image::{Image, read_png, save_png};
use ddpm::output::{self, Kind};
use ddpm::text::{capped, quoted_value, shown, thousands};
use ddpm::train::run::RunFolder;
use ddpm::train::write_file;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What was asked for.
const REQUEST: &str = "request.json";
/// The folder of the images.
const IMAGES: &str = "images";
/// What the commands write beside it.
const BESIDE: [(&str, Kind); 6] = [
    ("grid.png", Kind::Png),
    ("sheet.png", Kind::Png),
    ("progress.png", Kind::Png),
    ("progress.gif", Kind::Gif),
    ("nearest.png", Kind::Png),
    ("nearest.csv", Kind::Table),
];
/// Settings that are named where a request is another than the one that is gone on with.
const NAMED: usize = 4;

/// A flag that was given, with its value: images that are drawn in another way have a folder of another name.
pub(super) type FlagValue = (&'static str, String);

/// Where results go, and what becomes of what is there.
#[derive(clap::Args)]
pub(super) struct OutFlags {
    /// Where the images go; if not given, a folder in RUN/samples with the name of all that is said but -n
    #[arg(short, long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
    /// Go on where the same call was stopped: draw the images that are not there yet
    #[arg(long)]
    pub resume: bool,
    /// Replace files that this command did not make
    #[arg(long, conflicts_with = "resume")]
    pub overwrite: bool,
}

/// What a folder of images is opened for.
pub(super) struct Asked<'a> {
    pub run: &'a RunFolder,
    pub command: &'static str,
    /// The beginning of the folder's name, and the rest of it.
    pub what: String,
    pub said: Vec<FlagValue>,
    /// All that the images depend on beside their numbers.
    pub request: Map<String, Value>,
    /// What they depend on in their last digits.
    pub computed: Map<String, Value>,
    pub count: usize,
}

/// A folder that images are written to.
pub(super) struct ImageFolder {
    path: PathBuf,
    /// Whether it has its name from here, so that all in it is.
    own: bool,
    record: Value,
    count: usize,
    /// How many a request that is gone on with had.
    before: Option<usize>,
    /// Those that are there already.
    there: HashSet<usize>,
    begun: bool,
    written: usize,
}

impl ImageFolder {
    /// Opens the folder that is said, or one in RUN/samples. Nothing is written or removed before the first image is there.
    ///
    /// # Errors
    /// Files in the way that this program did not make, and a request that is not the one to be gone on with.
    pub fn open(flags: &OutFlags, asked: Asked<'_>) -> anyhow::Result<Self> {
        let Asked { run, command, what, said, request, computed, count } = asked;
        let path = flags.out.clone().unwrap_or_else(|| run.samples().join(name(&what, &said)));
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
            own: flags.out.is_none(),
            record,
            count,
            before: None,
            there: HashSet::new(),
            begun: false,
            written: 0,
        };
        output::check_folder(&folder.path)?;
        output::check_folder(&folder.images())?;
        if flags.resume {
            folder.go_on()?;
        } else if !folder.is_of_earlier_version() {
            let numbered =
                folder.numbered()?.into_iter().filter(|&i| i < count).map(|i| (folder.image(i), Kind::Png));
            let beside = BESIDE.iter().map(|(name, kind)| (folder.beside(name), *kind));
            let all = numbered.chain(beside).chain([(folder.beside(REQUEST), Kind::Json)]);
            for (path, kind) in all {
                output::check(&path, kind, flags.overwrite)?;
            }
        }
        make_folder(&folder.images())?;
        Ok(folder)
    }

    /// Finds out what is there of the request.
    fn go_on(&mut self) -> anyhow::Result<()> {
        let (path, shown) = (self.beside(REQUEST), shown(&self.path));
        let Some(there) = output::json(&path).filter(|_| output::is_ours(&path, Kind::Json)) else {
            if self.numbered()?.is_empty() {
                tell!("note: there is nothing in {shown} to go on with: this begins");
                return Ok(());
            }
            bail!(
                "{shown} has images, but no {REQUEST} that says what they are of; leave --resume out, or give another --out"
            );
        };
        let differing = differing(&there["request"], &self.record["request"]);
        if there["command"] != self.record["command"] || !differing.is_empty() {
            let reason = match differing.is_empty() {
                true => format!("it is of ddpm {}", there["command"].as_str().unwrap_or("?")),
                false => differing[..differing.len().min(NAMED)].join(", "),
            };
            bail!(
                "{shown}: --resume goes on with the same call only, and there {reason}; leave --resume out to begin again, or \
                 give another --out"
            );
        }
        if there["computed"] != self.record["computed"] || there["version"] != self.record["version"] {
            tell!(
                "note: the images so far were computed in another way ({}), so that last digits may differ",
                there["computed"]
            );
        }
        let before = there["count"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let known = self.numbered()?.into_iter().filter(|&i| i < before);
        self.there = known.filter(|&i| output::is_whole_png(&self.image(i))).collect();
        self.before = Some(before);
        self.record["count"] = self.count.max(before).into();
        tell!("going on: {} of {} images are there", thousands(self.present()), thousands(self.count));
        Ok(())
    }

    /// Whether an earlier version filled it, which put the images beside the sheet and marked nothing.
    fn is_of_earlier_version(&self) -> bool {
        self.own && !self.beside(REQUEST).exists() && self.beside("0000.png").is_file()
    }

    /// Images that are asked for and there.
    fn present(&self) -> usize {
        self.there.iter().filter(|&&i| i < self.count).count()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of the images.
    pub fn images(&self) -> PathBuf {
        self.path.join(IMAGES)
    }

    /// The file of image `i`.
    pub fn image(&self, i: usize) -> PathBuf {
        self.images().join(format!("{i:06}.png"))
    }

    /// A file beside the images.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// How many images it is to have.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether image `i` is still to be drawn.
    pub fn wants(&self, i: usize) -> bool {
        !self.there.contains(&i)
    }

    /// How many images are still to be drawn.
    pub fn missing(&self) -> usize {
        self.count - self.present()
    }

    /// The numbers of the images that are there.
    fn numbered(&self) -> anyhow::Result<Vec<usize>> {
        Ok(names(&self.images())?.iter().filter_map(|name| number(name)).collect())
    }

    /// Writes images, the first of which is number `first`, but for those that are there.
    pub fn put(&mut self, first: usize, images: &[Image]) -> ddpm::Result<()> {
        if !self.begun {
            self.begin()?;
            self.begun = true;
        }
        for (i, image) in (first..self.count).zip(images) {
            if self.wants(i) {
                save_png(image, &self.image(i))?;
                self.written += 1;
            }
        }
        Ok(())
    }

    /// Clears away what an earlier call left, and says what this one is of. In a folder of the run's its images take the place of
    /// all earlier ones; in another nothing is removed that is not replaced, and it is said if more such images are there.
    fn begin(&mut self) -> ddpm::Result<()> {
        let images = self.images();
        std::fs::create_dir_all(&images).map_err(Error::io(&images, "make the folder"))?;
        let remove = |path: PathBuf| {
            std::fs::remove_file(&path).map_err(Error::io(&path, "remove what an earlier call left"))
        };
        let of_earlier_version = self.is_of_earlier_version();
        let mut others = Vec::new();
        for name in names(&images)? {
            let path = images.join(&name);
            let Some(i) = number(&name) else {
                // Of a process that was killed while it wrote.
                if name.to_string_lossy().starts_with('.') && name.to_string_lossy().ends_with(".tmp") {
                    remove(path)?;
                }
                continue;
            };
            match self.before {
                Some(before) if i >= before && i < self.count && output::is_ours(&path, Kind::Png) => {
                    remove(path)?
                }
                Some(_) => {}
                None if i < self.count || (self.own && output::is_ours(&path, Kind::Png)) => remove(path)?,
                None => others.push(name),
            }
        }
        if self.own && self.before.is_none() {
            for name in names(&self.path)?.iter().filter(|name| of_earlier_version && number(name).is_some())
            {
                remove(self.path.join(name))?;
            }
            for (name, kind) in BESIDE {
                let path = self.beside(name);
                if path.is_file() && (of_earlier_version || output::is_ours(&path, kind)) {
                    remove(path)?;
                }
            }
        }
        if let Some(first) = others.iter().min() {
            tell!(
                "note: {} had numbered images before, and {} of them, from {} on, are not of this call",
                shown(&images),
                others.len(),
                shown(first)
            );
        }
        write_file(&self.beside(REQUEST), format!("{:#}\n", self.record).as_bytes(), "write the request")
    }

    /// The first `n` images, whoever drew them.
    pub fn first(&self, n: usize) -> ddpm::Result<Vec<Image>> {
        (0..n.min(self.count)).map(|i| read_png(&self.image(i))).collect()
    }

    /// Says what there is where it was stopped, and how to go on.
    pub fn stopped(&self) {
        let there = self.present() + self.written;
        if there == 0 {
            tell!("stopped; nothing was written");
            // Only where they are empty.
            let _ = std::fs::remove_dir(self.images()).and_then(|()| std::fs::remove_dir(&self.path));
            return;
        }
        let (there, count) = (thousands(there), thousands(self.count));
        tell!("stopped; {there} of {count} images are in {}", shown(self.images()));
        tell!("go on with:  {}", again("--resume"));
    }
}

/// This call again, with a flag more.
fn again(flag: &str) -> String {
    let mut args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--overwrite").collect();
    if !args.iter().any(|arg| arg == flag) {
        args.push(flag.to_owned());
    }
    let quoted: Vec<String> = args.iter().map(|arg| quoted_value(arg)).collect();
    format!("ddpm {}", quoted.join(" "))
}

/// Entries that differ, as "seed is 7, and here 8".
pub(super) fn differing(there: &Value, here: &Value) -> Vec<String> {
    let empty = Map::new();
    let (there, here) = (there.as_object().unwrap_or(&empty), here.as_object().unwrap_or(&empty));
    let keys: std::collections::BTreeSet<&String> = there.keys().chain(here.keys()).collect();
    let shown = |value: Option<&Value>| match value {
        None | Some(Value::Null) => "not given".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    };
    keys.into_iter()
        .filter(|&key| there.get(key) != here.get(key))
        .map(|key| {
            format!(
                "{} is {}, and here {}",
                key.replace('_', " "),
                shown(there.get(key)),
                shown(here.get(key))
            )
        })
        .collect()
}

/// The names in a folder; none if it is not there.
fn names(path: &Path) -> ddpm::Result<Vec<std::ffi::OsString>> {
    let list = || Error::io(path, "list the folder");
    match std::fs::read_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries.map_err(list())?.map(|entry| Ok(entry.map_err(list())?.file_name())).collect(),
    }
}

/// Makes a folder.
pub(super) fn make_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", shown(path)))
}

/// Most bytes of a folder's name. Systems take 255, some of those that encrypt names 143; files inside have room beside it.
const MAX_NAME: usize = 120;

/// `vary-cat-seed-0-strength-0.3`: on every system a name, however long those are that it is made of.
pub(super) fn name(what: &str, said: &[FlagValue]) -> String {
    let parts = said.iter().map(|(flag, value)| format!("-{flag}-{value}"));
    let whole: String = std::iter::once(what.to_owned()).chain(parts).collect();
    let mut safe = String::new();
    for c in whole.chars() {
        match c.is_alphanumeric() || "-_.+".contains(c) {
            true => safe.push(c),
            // As in URLs: other flags have another name, whatever characters they differ in.
            false => c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| safe += &format!("%{byte:02X}")),
        }
    }
    capped(&safe, MAX_NAME).into_owned()
}

/// The number of an image by its file's name, as of `000012.png`.
fn number(name: &OsStr) -> Option<usize> {
    let path = Path::new(name);
    let stem = stem(path);
    let numbered = stem.len() >= 4 && stem.bytes().all(|b| b.is_ascii_digit());
    (path.extension() == Some(OsStr::new("png")) && numbered).then(|| stem.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_by_what_was_said() {
        let said = |pairs: &[(&'static str, &str)]| -> Vec<FlagValue> {
            pairs.iter().map(|&(flag, value)| (flag, value.to_owned())).collect()
        };
        assert_eq!(name("seed-7", &[]), "seed-7");
        let of_sampler = said(&[("class", "bl/ue: één"), ("sampler", "dpm++2m"), ("steps", "10")]);
        assert_eq!(
            name("vary-cat-seed-0", &of_sampler),
            "vary-cat-seed-0-class-bl%2Fue%3A%20één-sampler-dpm++2m-steps-10"
        );
        let of_class = |class| name("seed-0", &said(&[("class", class)]));
        let classes = ["a b", "a-b", "a:b", "-1", "#1"].map(of_class);
        assert!((1..classes.len()).all(|i| !classes[..i].contains(&classes[i])), "{classes:?}");
    }

    #[test]
    fn a_name_of_240_bytes_makes_a_folder_that_can_be_written() {
        let long = |end: &str| format!("denoise-{}{end}", "東京".repeat(40));
        let (a, b) = (name(&long("a"), &[]), name(&long("b"), &[]));
        assert!(a.len() <= MAX_NAME && b.len() <= MAX_NAME && a != b, "{a} {b}");
        assert!(a.starts_with("denoise-東京"), "{a}");
        let said: Vec<FlagValue> = vec![("class", "x".repeat(300)), ("weights", "y".repeat(300))];
        assert!(name("seed-0", &said).len() <= MAX_NAME);
        std::fs::create_dir(tempfile::tempdir().unwrap().path().join(a)).unwrap();
    }

    #[test]
    fn images_are_known_by_their_names() {
        for (file, i) in [
            ("0000.png", Some(0)),
            ("000012.png", Some(12)),
            ("1234567.png", Some(1_234_567)),
            ("000.png", None),
            ("0000.jpg", None),
            ("cat1.png", None),
        ] {
            assert_eq!(number(OsStr::new(file)), i, "{file}");
        }
    }

    #[test]
    fn differences_of_requests_are_named() {
        let there = json!({"seed": 7, "class": "cat", "steps": 5});
        let here = json!({"seed": 8, "steps": 5, "eta": 1.0});
        assert_eq!(
            differing(&there, &here),
            ["class is cat, and here not given", "eta is not given, and here 1.0", "seed is 7, and here 8"]
        );
    }
}
