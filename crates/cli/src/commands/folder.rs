//! Where the commands put pictures: a folder of the run's, named after what was asked for, or the one that is said.

use super::flags::stem;
use anyhow::Context;
use ddpm::Error;
use ddpm::picture::{Picture, save_png};
use ddpm::text::{capped, shown};
use ddpm::train::run::RunFolder;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What the commands write beside numbered pictures.
const BESIDE: [&str; 6] =
    ["grid.png", "sheet.png", "progress.png", "progress.gif", "nearest.png", "nearest.csv"];

/// A flag that was given, with its value: pictures that are drawn in another way have a folder of another name.
pub(super) type Said = (&'static str, String);

/// A folder that pictures are written to.
pub(super) struct PictureFolder {
    path: PathBuf,
    /// Whether it has its name from here, so that all in it is.
    own: bool,
}

impl PictureFolder {
    /// Makes the folder `asked`, or one in RUN/samples whose name is `what` and all that was said.
    pub fn make(asked: Option<&Path>, run: &RunFolder, what: &str, said: &[Said]) -> anyhow::Result<Self> {
        let path = asked.map_or_else(|| run.samples().join(name(what, said)), Path::to_owned);
        make_folder(&path)?;
        Ok(Self { path, own: asked.is_none() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes pictures as `0000.png` and so on. In a folder of the run's they take the place of all that an earlier call left; in
    /// another nothing is removed, and it is said if more such pictures are there.
    pub fn write(&self, pictures: &[Picture]) -> anyhow::Result<()> {
        let digits = pictures.len().saturating_sub(1).to_string().len().max(4);
        let names: Vec<String> = (0..pictures.len()).map(|i| format!("{i:0digits$}.png")).collect();
        let list = || Error::io(&self.path, "list the folder");
        let mut earlier = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(list())? {
            let name = entry.map_err(list())?.file_name();
            if is_numbered(&name) || (self.own && BESIDE.iter().any(|n| name == *n)) {
                earlier.push(name);
            }
        }
        earlier.retain(|name| !names.iter().any(|n| name == n.as_str()));
        earlier.sort();
        if self.own {
            for path in earlier.iter().map(|name| self.path.join(name)) {
                std::fs::remove_file(&path).map_err(Error::io(&path, "remove what an earlier call left"))?;
            }
        } else if let Some(first) = earlier.first() {
            tell!(
                "note: {} had numbered pictures before, and {} of them, from {} on, are not of this call",
                shown(&self.path),
                earlier.len(),
                shown(first)
            );
        }
        for (picture, name) in pictures.iter().zip(&names) {
            save_png(picture, &self.path.join(name))?;
        }
        Ok(())
    }
}

/// Makes a folder.
pub(super) fn make_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", shown(path)))
}

/// Most bytes of a folder's name. Systems take 255, some of those that encrypt names 143; files inside have room beside it.
const MAX_NAME: usize = 120;

/// `vary-cat-seed-0-strength-0.3`: on every system a name, however long those are that it is made of.
fn name(what: &str, said: &[Said]) -> String {
    let parts = said.iter().map(|(flag, value)| format!("-{flag}-{value}"));
    let whole: String = std::iter::once(what.to_owned()).chain(parts).collect();
    let safe: String =
        whole.chars().map(|c| if c.is_alphanumeric() || "-_.+".contains(c) { c } else { '-' }).collect();
    capped(&safe, MAX_NAME).into_owned()
}

/// Whether a file's name is as `0000.png`.
fn is_numbered(name: &OsStr) -> bool {
    let path = Path::new(name);
    let stem = stem(path);
    path.extension() == Some(OsStr::new("png")) && stem.len() >= 4 && stem.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_by_what_was_said() {
        let said = |pairs: &[(&'static str, &str)]| -> Vec<Said> {
            pairs.iter().map(|&(flag, value)| (flag, value.to_owned())).collect()
        };
        assert_eq!(name("seed-7", &[]), "seed-7");
        let of_sampler = said(&[("class", "bl/ue: één"), ("sampler", "dpm++2m"), ("steps", "10")]);
        assert_eq!(
            name("vary-cat-seed-0", &of_sampler),
            "vary-cat-seed-0-class-bl-ue--één-sampler-dpm++2m-steps-10"
        );
    }

    #[test]
    fn a_name_of_240_bytes_makes_a_folder_that_can_be_written() {
        let long = |end: &str| format!("denoise-{}{end}", "東京".repeat(40));
        let (a, b) = (name(&long("a"), &[]), name(&long("b"), &[]));
        assert!(a.len() <= MAX_NAME && b.len() <= MAX_NAME && a != b, "{a} {b}");
        assert!(a.starts_with("denoise-東京"), "{a}");
        let said: Vec<Said> = vec![("class", "x".repeat(300)), ("weights", "y".repeat(300))];
        assert!(name("seed-0", &said).len() <= MAX_NAME);
        std::fs::create_dir(tempfile::tempdir().unwrap().path().join(a)).unwrap();
    }

    #[test]
    fn numbered_pictures_are_known_by_their_names() {
        for (file, numbered) in [
            ("0000.png", true),
            ("00012.png", true),
            ("000.png", false),
            ("0000.jpg", false),
            ("cat1.png", false),
        ] {
            assert_eq!(is_numbered(OsStr::new(file)), numbered, "{file}");
        }
    }
}
