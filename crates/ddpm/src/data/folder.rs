//! Folders of picture files, flat or one folder per class.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::decode::{Facts, Pixels, decode_file};
use super::{
    DataOptions, Dataset, Fingerprint, Found, OnBadFile, PictureShape, Summary, channels_name, count, idx,
    unusable,
};
use crate::error::{Error, Result};

/// The file names that are taken for pictures, without regard to case.
const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"];

/// What a folder holds.
pub(super) enum Scan {
    /// An IDX file with pictures, and what to tell about the choice.
    Idx { images: PathBuf, notes: Vec<String> },
    /// Picture files.
    Pictures(Listing),
}

/// Picture files in their order.
pub(super) struct Listing {
    files: Vec<Entry>,
    classes: Vec<String>,
    notes: Vec<String>,
}

struct Entry {
    path: PathBuf,
    /// Relative to the data set, the parts joined by '/'.
    name: Vec<u8>,
    label: Option<u32>,
}

/// The names in one folder, sorted by their bytes.
#[derive(Default)]
struct Names {
    pictures: Vec<PathBuf>,
    folders: Vec<PathBuf>,
    idx: Vec<PathBuf>,
    hidden: usize,
    other: usize,
}

fn file_name_bytes(path: &Path) -> &[u8] {
    path.file_name().unwrap_or_default().as_encoded_bytes()
}

fn list(folder: &Path) -> Result<Names> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list the folder"))? {
        paths.push(entry.map_err(Error::io(folder, "list the folder"))?.path());
    }
    paths.sort_by(|a, b| file_name_bytes(a).cmp(file_name_bytes(b)));
    let mut names = Names::default();
    for path in paths {
        // Follows links. A dangling one with a picture's name is reported with the files that cannot be read.
        let is_folder = fs::metadata(&path).is_ok_and(|m| m.is_dir());
        if file_name_bytes(&path).starts_with(b".") {
            names.hidden += 1;
        } else if is_folder {
            names.folders.push(path);
        } else if is_picture_name(&path) {
            names.pictures.push(path);
        } else if idx::is_images_name(&path) {
            names.idx.push(path);
        } else {
            names.other += 1;
        }
    }
    Ok(names)
}

fn is_picture_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    EXTENSIONS.contains(&extension.as_str())
}

/// The file at `path` as a set of one picture, if it is named as one.
pub(super) fn single(path: &Path) -> Option<Listing> {
    let entry = Entry { name: file_name_bytes(path).to_vec(), path: path.to_owned(), label: None };
    is_picture_name(path).then(|| Listing { files: vec![entry], classes: Vec::new(), notes: Vec::new() })
}

/// Finds out what the folder at `path` holds.
pub(super) fn scan(path: &Path) -> Result<Scan> {
    let top = list(path)?;
    if !top.idx.is_empty() {
        if !top.pictures.is_empty() {
            return Err(unusable(
                path,
                format!(
                    "it holds IDX files and {}; give the IDX file's own path, or keep the two apart",
                    count(top.pictures.len(), "picture")
                ),
            ));
        }
        let (images, notes) = idx::choose(path, &top.idx)?;
        return Ok(Scan::Idx { images, notes });
    }

    let (mut hidden, mut other, mut deeper) = (top.hidden, top.other, 0);
    let mut classes: Vec<(PathBuf, Vec<PathBuf>)> = Vec::new();
    let mut without: Vec<String> = Vec::new();
    let mut with_idx = None;
    for folder in top.folders {
        let inside = list(&folder)?;
        if inside.pictures.is_empty() {
            without.push(String::from_utf8_lossy(file_name_bytes(&folder)).into_owned());
            if !inside.idx.is_empty() {
                with_idx.get_or_insert(folder);
            }
            continue;
        }
        hidden += inside.hidden;
        other += inside.other + inside.idx.len();
        deeper += inside.folders.len();
        classes.push((folder, inside.pictures));
    }

    if top.pictures.is_empty() && classes.is_empty() {
        let found =
            [(other, "other file"), (hidden, "hidden name"), (without.len(), "folder without pictures")]
                .into_iter()
                .filter(|(n, _)| *n > 0)
                .map(|(n, what)| match what {
                    "folder without pictures" if n > 1 => format!("{n} folders without pictures"),
                    _ => count(n, what),
                })
                .collect::<Vec<_>>()
                .join(", ");
        let found = if found.is_empty() { "it is empty".to_owned() } else { format!("it holds {found}") };
        let hint = match with_idx {
            Some(folder) => format!("; IDX files are in {}: give that path", folder.display()),
            None => String::new(),
        };
        return Err(unusable(
            path,
            format!(
                "no pictures here ({found}); looked for .{} files here and in folders one level down (one per \
                 class), and for IDX files such as train-images-idx3-ubyte.gz{hint}",
                EXTENSIONS.join(" .")
            ),
        ));
    }
    if !top.pictures.is_empty() && !classes.is_empty() {
        return Err(unusable(
            path,
            format!(
                "it holds both {} and {} with pictures ({} is one); a set without classes has no folders of \
                 pictures, one with classes has all its pictures in them: move one or the other elsewhere",
                count(top.pictures.len(), "picture"),
                count(classes.len(), "folder"),
                classes[0].0.display()
            ),
        ));
    }

    let mut notes = Vec::new();
    if other > 0 {
        notes.push(format!("{} ignored: not named as pictures", count(other, "file")));
    }
    if hidden > 0 {
        notes.push(format!("{} ignored", count(hidden, "hidden name")));
    }
    if !without.is_empty() {
        notes.push(format!("ignored, no pictures inside: {}", shorten(&without)));
    }
    if deeper > 0 {
        notes.push(format!(
            "{} inside class folders ignored: only one level is looked into",
            count(deeper, "folder")
        ));
    }

    let mut files = Vec::new();
    for path in top.pictures {
        files.push(Entry { name: file_name_bytes(&path).to_vec(), path, label: None });
    }
    let mut names = Vec::new();
    for (label, (folder, pictures)) in classes.into_iter().enumerate() {
        names.push(String::from_utf8_lossy(file_name_bytes(&folder)).into_owned());
        for path in pictures {
            let name = [file_name_bytes(&folder), b"/", file_name_bytes(&path)].concat();
            files.push(Entry { path, name, label: Some(label as u32) });
        }
    }
    if u32::try_from(files.len()).is_err() {
        return Err(unusable(path, "it holds more than 2^32 pictures"));
    }
    Ok(Scan::Pictures(Listing { files, classes: names, notes }))
}

/// The first few of `items`, and how many more.
fn shorten(items: &[String]) -> String {
    let mut text = items.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    if items.len() > 5 {
        text += &format!(" and {} more", items.len() - 5);
    }
    text
}

/// A folder of pictures, decoded.
pub(super) struct FolderSet {
    entries: Vec<Entry>,
    /// All pictures, or nothing when they take too much memory.
    pixels: Vec<Pixels>,
    classes: Vec<String>,
    options: DataOptions,
    summary: Summary,
}

/// What remains of a decoded file when its pixels are let go.
struct Decoded {
    facts: Facts,
    /// The form after reduction and resizing.
    form: (usize, usize, usize, u8),
    digest: [u8; 32],
    bytes: u64,
    pixels: Option<Pixels>,
}

impl FolderSet {
    /// Decodes every file once, keeping the pixels when all of them together take at most `memory` bytes.
    pub fn open(path: &Path, listing: Listing, options: &DataOptions, memory: u64) -> Result<Self> {
        let Listing { files, classes, mut notes } = listing;
        let held = AtomicU64::new(0);
        let decoded: Vec<Result<Decoded, String>> = files
            .par_iter()
            .map(|file| {
                let (pixels, facts) = decode_file(&file.path, options)?;
                let bytes = pixels.bytes();
                let fits = held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= memory;
                Ok(Decoded {
                    facts,
                    form: (pixels.height, pixels.width, pixels.channels, pixels.bits()),
                    digest: pixels.digest(),
                    bytes,
                    pixels: fits.then_some(pixels),
                })
            })
            .collect();

        let (mut entries, mut good, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        for (file, result) in files.into_iter().zip(decoded) {
            match result {
                Ok(picture) => {
                    entries.push(file);
                    good.push(picture);
                }
                Err(reason) => skipped.push((file.path, reason)),
            }
        }
        if options.on_bad_file == OnBadFile::Fail && !skipped.is_empty() {
            return Err(Error::BadFiles { files: skipped });
        }
        if good.is_empty() {
            let reasons: Vec<_> =
                skipped.iter().map(|(p, reason)| format!("{}: {reason}", p.display())).collect();
            return Err(unusable(
                path,
                format!("no file here can be read as a picture ({})", shorten(&reasons)),
            ));
        }
        if !skipped.is_empty() {
            notes.push(format!("{} skipped: not readable as a picture", count(skipped.len(), "file")));
        }

        let found = tally(&good);
        let (height, width) = common_size(path, &good, options, &found, &mut notes)?;
        let channels = common_channels(&good, options, &mut notes);
        let bit_depth = common_depth(&good, &mut notes);
        tell(&good, &mut notes, |f| f.turned, "turned upright as the camera noted (EXIF)");

        let bytes: u64 = good.iter().map(|p| p.bytes).sum();
        let cached = bytes <= memory;
        if !cached {
            notes.push(format!(
                "decoded, the pictures take {} MiB; over {} MiB they are read from disk each time",
                bytes >> 20,
                memory >> 20
            ));
        }
        let mut fingerprint = Fingerprint::new();
        for (entry, picture) in entries.iter().zip(&good) {
            fingerprint.add(&entry.name, entry.label, &picture.digest);
        }
        let summary = Summary {
            source: path.display().to_string(),
            pictures: good.len(),
            shape: PictureShape { height, width, channels },
            bit_depth,
            classes: classes.len(),
            found,
            skipped,
            memory_bytes: if cached { bytes } else { 0 },
            fingerprint: fingerprint.finish(),
            notes,
        };
        // With skipped files and a tight limit some pixels may have been let go of although the rest fits.
        let pixels = match cached {
            true => good
                .into_par_iter()
                .zip(&entries)
                .map(|(picture, entry)| match picture.pixels {
                    Some(pixels) => Ok(pixels),
                    None => decode_again(&entry.path, options, picture.form),
                })
                .collect::<Result<_>>()?,
            false => Vec::new(),
        };
        Ok(Self { entries, pixels, classes, options: options.clone(), summary })
    }
}

fn decode_again(path: &Path, options: &DataOptions, form: (usize, usize, usize, u8)) -> Result<Pixels> {
    let changed = |reason: String| {
        unusable(
            path,
            format!("the file has changed since the data set was opened: {reason}; start the run again"),
        )
    };
    let (pixels, _) = decode_file(path, options).map_err(changed)?;
    if (pixels.height, pixels.width) != (form.0, form.1) {
        return Err(changed(format!(
            "it is {}x{} now, not {}x{}",
            pixels.height, pixels.width, form.0, form.1
        )));
    }
    Ok(pixels)
}

/// The forms of the files, the most frequent first.
fn tally(pictures: &[Decoded]) -> Vec<Found> {
    let mut counts = BTreeMap::new();
    for Found { height, width, channels, bits, .. } in pictures.iter().map(|p| p.facts.file) {
        *counts.entry((height, width, channels, bits)).or_insert(0) += 1;
    }
    let mut found: Vec<_> = counts
        .into_iter()
        .map(|((height, width, channels, bits), pictures)| Found { height, width, channels, bits, pictures })
        .collect();
    found.sort_by_key(|f| std::cmp::Reverse(f.pictures));
    found
}

/// The one size of all pictures.
fn common_size(
    path: &Path,
    pictures: &[Decoded],
    options: &DataOptions,
    found: &[Found],
    notes: &mut Vec<String>,
) -> Result<(usize, usize)> {
    let mut counts = BTreeMap::new();
    for f in found {
        *counts.entry((f.height, f.width)).or_insert(0) += f.pictures;
    }
    let mut sizes: Vec<_> = counts.into_iter().collect();
    sizes.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let listed = shorten(
        &sizes.iter().map(|((h, w), n)| format!("{h}x{w} ({})", count(*n, "picture"))).collect::<Vec<_>>(),
    );
    match options.size {
        None if sizes.len() == 1 => Ok(sizes[0].0),
        None => Err(unusable(
            path,
            format!(
                "the pictures have {} sizes (height x width): {listed}; --size H (or HxW) resizes them all",
                sizes.len()
            ),
        )),
        Some((h, w)) => {
            if sizes.len() > 1 {
                notes.push(format!("{} sizes found (height x width): {listed}", sizes.len()));
            }
            if sizes.iter().any(|&(size, _)| size != (h, w)) {
                let whom = if sizes.len() == 1 {
                    format!("the pictures are {}x{}: ", sizes[0].0.0, sizes[0].0.1)
                } else {
                    String::new()
                };
                notes.push(format!(
                    "{whom}every picture is resized to {h}x{w} (short side, then the middle cut out)"
                ));
            }
            tell(pictures, notes, |f| f.enlarged, &format!("smaller than {h}x{w}, and enlarged"));
            Ok((h, w))
        }
    }
}

/// The channels that all pictures can be given without loss, or those asked for.
fn common_channels(pictures: &[Decoded], options: &DataOptions, notes: &mut Vec<String>) -> usize {
    let own = |n: usize| pictures.iter().filter(|p| p.form.2 == n).count();
    let needed = (1..=4).rfind(|&n| own(n) > 0).unwrap_or(1);
    let channels = options.channels.unwrap_or(needed);
    let colour_files = pictures.iter().filter(|p| p.facts.file.channels >= 3).count();
    let grey_in_colour = pictures.iter().filter(|p| p.facts.grey_in_colour).count();
    if channels <= 2 {
        if grey_in_colour > 0 {
            notes.push(format!(
                "{} stored in colour, yet every pixel is grey: read as grey",
                are(grey_in_colour, pictures.len())
            ));
        }
        if colour_files > grey_in_colour {
            notes.push(format!(
                "{} in colour, made grey (luma)",
                are(colour_files - grey_in_colour, pictures.len())
            ));
        }
    } else {
        let grey = own(1) + own(2);
        if grey > 0 {
            notes.push(format!("{} grey, made {}", are(grey, pictures.len()), channels_name(channels)));
        }
    }
    tell(
        pictures,
        notes,
        |f| f.opaque_alpha,
        "stored with an alpha channel that is opaque everywhere: it is dropped",
    );
    tell(
        pictures,
        notes,
        |f| f.composited,
        "transparent in places: laid on black (--channels 2 or 4 keeps alpha)",
    );
    channels
}

fn common_depth(pictures: &[Decoded], notes: &mut Vec<String>) -> u8 {
    let deep = pictures.iter().filter(|p| p.form.3 == 16).count();
    if deep > 0 && deep < pictures.len() {
        notes.push(format!("{} of 16 bits a sample, the others of 8", are(deep, pictures.len())));
    }
    if deep > 0 { 16 } else { 8 }
}

/// Notes how many pictures something holds for, if it does for any.
fn tell(pictures: &[Decoded], notes: &mut Vec<String>, holds: impl Fn(&Facts) -> bool, what: &str) {
    let n = pictures.iter().filter(|p| holds(&p.facts)).count();
    if n > 0 {
        notes.push(format!("{} {what}", are(n, pictures.len())));
    }
}

/// "all 7 pictures are", "1 of 7 pictures is".
fn are(n: usize, of: usize) -> String {
    match n {
        _ if of == 1 => "the picture is".to_owned(),
        _ if n == of => format!("all {of} pictures are"),
        1 => format!("1 of {of} pictures is"),
        _ => format!("{n} of {of} pictures are"),
    }
}

impl Dataset for FolderSet {
    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.entries[index].label
    }

    fn read(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let PictureShape { height, width, channels } = self.summary.shape;
        if let Some(pixels) = self.pixels.get(index) {
            pixels.write_unit(channels, out);
        } else {
            let path = &self.entries[index].path;
            let pixels = decode_again(path, &self.options, (height, width, channels, 0))?;
            if pixels.channels > channels {
                let reason = "it has more channels now than any file had; start the run again";
                return Err(unusable(path, reason));
            }
            pixels.write_unit(channels, out);
        }
        Ok(())
    }

    fn summary(&self) -> &Summary {
        &self.summary
    }
}

#[cfg(test)]
mod tests {
    use super::super::{open, open_within};
    use super::*;
    use image::{DynamicImage, GrayImage, ImageBuffer, Luma, Rgb, RgbImage, Rgba, RgbaImage};
    use tempfile::TempDir;

    fn save(folder: &TempDir, name: &str, picture: impl Into<DynamicImage>) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        picture.into().save(path).unwrap();
    }

    fn grey(height: u32, width: u32, value: u8) -> GrayImage {
        GrayImage::from_fn(width, height, |x, y| Luma([value.wrapping_add((x + 3 * y) as u8)]))
    }

    fn colour(height: u32, width: u32, value: u8) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([value, (x * 9) as u8, (y * 9) as u8]))
    }

    fn plain(folder: &TempDir) -> Result<Box<dyn Dataset>> {
        open(folder.path(), &DataOptions::default())
    }

    fn sized(folder: &TempDir, height: usize, width: usize) -> Result<Box<dyn Dataset>> {
        open(folder.path(), &DataOptions { size: Some((height, width)), ..DataOptions::default() })
    }

    fn message(result: Result<Box<dyn Dataset>>) -> String {
        result.err().expect("an error").to_string()
    }

    fn picture(set: &dyn Dataset, index: usize) -> Vec<f32> {
        let mut out = vec![9.0; set.shape().values()];
        set.read(index, &mut out).unwrap();
        out
    }

    fn notes(set: &dyn Dataset) -> String {
        set.summary().notes.join("\n")
    }

    #[test]
    fn a_flat_folder_is_read_in_the_order_of_its_names() {
        let folder = TempDir::new().unwrap();
        for (name, value) in [("b.png", 1), ("a.png", 2), ("10.png", 3), ("9.png", 4), ("B.PNG", 5)] {
            save(&folder, name, grey(3, 4, value));
        }
        fs::write(folder.path().join("readme.txt"), "hello").unwrap();
        fs::write(folder.path().join(".hidden.png"), "hello").unwrap();
        let set = plain(&folder).unwrap();
        assert_eq!((set.len(), set.shape()), (5, PictureShape { height: 3, width: 4, channels: 1 }));
        // By bytes: 10.png, 9.png, B.PNG, a.png, b.png.
        let firsts: Vec<_> = (0..5).map(|i| ((picture(&*set, i)[0] + 1.0) * 127.5).round() as u8).collect();
        assert_eq!(firsts, [3, 4, 5, 2, 1]);
        assert!(set.classes().is_empty());
        assert_eq!(set.label(0), None);
        let notes = notes(&*set);
        assert!(
            notes.contains("1 file ignored: not named as pictures")
                && notes.contains("1 hidden name ignored")
        );
        assert_eq!(set.summary().memory_bytes, 60);
        assert_eq!(set.summary().found, [Found { height: 3, width: 4, channels: 1, bits: 8, pictures: 5 }]);
        let expected: Vec<f32> =
            grey(3, 4, 3).as_raw().iter().map(|&v| f32::from(v) / 255.0 * 2.0 - 1.0).collect();
        assert_eq!(picture(&*set, 0), expected);
    }

    #[test]
    fn folders_are_classes_in_the_order_of_their_names() {
        let folder = TempDir::new().unwrap();
        for name in ["dog/1.png", "cat/7.png", "cat/2.png", "cat/deeper/3.png"] {
            save(&folder, name, grey(4, 4, 0));
        }
        fs::create_dir(folder.path().join("bird")).unwrap();
        let set = plain(&folder).unwrap();
        assert_eq!(set.classes(), ["cat", "dog"]);
        assert_eq!((0..3).map(|i| set.label(i)).collect::<Vec<_>>(), [Some(0), Some(0), Some(1)]);
        assert_eq!((set.len(), set.summary().classes), (3, 2));
        let notes = notes(&*set);
        assert!(notes.contains("no pictures inside: bird"), "{notes}");
        assert!(notes.contains("1 folder inside class folders ignored"), "{notes}");
    }

    #[cfg(unix)]
    #[test]
    fn links_in_a_circle_end() {
        let folder = TempDir::new().unwrap();
        save(&folder, "cat/1.png", grey(4, 4, 0));
        std::os::unix::fs::symlink(folder.path(), folder.path().join("cat/up")).unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("again")).unwrap();
        assert_eq!(plain(&folder).unwrap().classes(), ["cat"]);
    }

    #[test]
    fn pictures_beside_class_folders_are_refused() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", grey(4, 4, 0));
        save(&folder, "cat/1.png", grey(4, 4, 0));
        assert!(message(plain(&folder)).contains("both 1 picture and 1 folder with pictures"));
    }

    #[test]
    fn an_empty_folder_says_what_was_looked_for() {
        let folder = TempDir::new().unwrap();
        let text = message(plain(&folder));
        assert!(
            text.contains("it is empty") && text.contains(".png .jpg .jpeg .webp .bmp .tif .tiff .gif"),
            "{text}"
        );
        fs::write(folder.path().join("notes.txt"), "x").unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        assert!(message(plain(&folder)).contains("it holds 1 other file, 2 folders without pictures"));
    }

    #[test]
    fn several_sizes_are_listed_unless_one_is_asked_for() {
        let folder = TempDir::new().unwrap();
        for i in 0..3 {
            save(&folder, &format!("a{i}.png"), grey(20, 30, i));
        }
        for side in 1..=6 {
            save(&folder, &format!("b{side}.png"), grey(side, 9, 0));
        }
        let text = message(plain(&folder));
        assert!(
            text.contains("7 sizes (height x width): 20x30 (3 pictures), 1x9 (1 picture), ")
                && text.contains("and 2 more"),
            "{text}"
        );
        assert!(text.contains("--size H (or HxW) resizes them all"));
        let set = sized(&folder, 8, 10).unwrap();
        assert_eq!(set.shape(), PictureShape { height: 8, width: 10, channels: 1 });
        let notes = notes(&*set);
        assert!(
            notes.contains("7 sizes found") && notes.contains("every picture is resized to 8x10"),
            "{notes}"
        );
        assert!(notes.contains("6 of 9 pictures are smaller than 8x10, and enlarged"), "{notes}");
        assert_eq!(set.summary().found[0].pictures, 3);
    }

    #[test]
    fn grey_and_colour_together_are_colour_and_it_is_said() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", grey(4, 4, 77));
        save(&folder, "b.png", colour(4, 4, 5));
        let set = plain(&folder).unwrap();
        assert_eq!(set.shape().channels, 3);
        assert!(notes(&*set).contains("1 of 2 pictures is grey, made RGB"));
        let a = picture(&*set, 0);
        assert_eq!(a[..3], [77.0 / 255.0 * 2.0 - 1.0; 3]);
        assert_eq!(picture(&*set, 1)[0], 5.0 / 255.0 * 2.0 - 1.0);
        let options = DataOptions { channels: Some(1), ..DataOptions::default() };
        let set = open(folder.path(), &options).unwrap();
        assert_eq!(set.shape().channels, 1);
        assert!(notes(&*set).contains("1 of 2 pictures is in colour, made grey"));
    }

    #[test]
    fn grey_pixels_in_colour_files_make_a_grey_set_and_it_is_said() {
        let folder = TempDir::new().unwrap();
        let as_colour = DynamicImage::ImageLuma8(grey(4, 4, 8)).to_rgb8();
        save(&folder, "a.png", as_colour);
        save(&folder, "b.png", grey(4, 4, 8));
        let set = plain(&folder).unwrap();
        assert_eq!(set.shape().channels, 1);
        assert!(notes(&*set).contains("1 of 2 pictures is stored in colour, yet every pixel is grey"));
        assert_eq!(picture(&*set, 0), picture(&*set, 1));
    }

    #[test]
    fn alpha_is_dropped_laid_on_black_or_kept_and_it_is_said() {
        let folder = TempDir::new().unwrap();
        let with = |alpha| {
            RgbaImage::from_fn(2, 2, move |x, _| Rgba([200, 10, 10, if x == 0 { 255 } else { alpha }]))
        };
        save(&folder, "a.png", with(255));
        save(&folder, "b.png", with(0));
        let set = plain(&folder).unwrap();
        assert_eq!(set.shape().channels, 3);
        assert!(
            notes(&*set)
                .contains("1 of 2 pictures is stored with an alpha channel that is opaque everywhere")
        );
        assert!(notes(&*set).contains("1 of 2 pictures is transparent in places: laid on black"));
        assert_eq!(picture(&*set, 1)[3..6], [-1.0; 3]);
        let set = open(folder.path(), &DataOptions { channels: Some(4), ..DataOptions::default() }).unwrap();
        let (a, b) = (picture(&*set, 0), picture(&*set, 1));
        assert_eq!((a[3], a[7], b[3], b[7]), (1.0, 1.0, 1.0, -1.0));
    }

    #[test]
    fn two_depths_keep_sixteen_bits() {
        let folder = TempDir::new().unwrap();
        save(&folder, "a.png", grey(1, 1, 200));
        save(
            &folder,
            "b.png",
            DynamicImage::ImageLuma16(ImageBuffer::from_pixel(1, 1, Luma([200u16 * 257 + 1]))),
        );
        let set = plain(&folder).unwrap();
        assert_eq!(set.summary().bit_depth, 16);
        assert!(notes(&*set).contains("1 of 2 pictures is of 16 bits"));
        let difference = picture(&*set, 1)[0] - picture(&*set, 0)[0];
        assert!((difference - 2.0 / 65_535.0).abs() < 1e-7, "{difference}");
    }

    /// Two good files, three bad ones.
    fn damaged() -> TempDir {
        let folder = TempDir::new().unwrap();
        save(&folder, "x/a.png", colour(30, 30, 0));
        save(&folder, "x/c.png", colour(30, 30, 0));
        save(&folder, "y/good.png", colour(30, 30, 0));
        let cut = folder.path().join("x/a.png");
        let bytes = fs::read(&cut).unwrap();
        fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
        fs::write(folder.path().join("x/b.png"), "not a picture").unwrap();
        fs::write(folder.path().join("y/empty.jpg"), "").unwrap();
        folder
    }

    #[test]
    fn bad_files_are_all_listed() {
        let folder = damaged();
        match plain(&folder) {
            Err(Error::BadFiles { files }) => {
                let names: Vec<_> =
                    files.iter().map(|(p, _)| p.strip_prefix(folder.path()).unwrap()).collect();
                assert_eq!(names, [Path::new("x/a.png"), Path::new("x/b.png"), Path::new("y/empty.jpg")]);
                assert!(files[0].1.contains("damaged or cut off"), "{}", files[0].1);
                assert!(files[1].1.contains("is not a picture"));
                assert_eq!(files[2].1, "is empty");
            }
            other => panic!("{:?}", other.err()),
        }
    }

    #[test]
    fn bad_files_can_be_skipped_until_nothing_is_left() {
        let folder = damaged();
        let options = DataOptions { on_bad_file: OnBadFile::Skip, ..DataOptions::default() };
        let set = open(folder.path(), &options).unwrap();
        assert_eq!((set.len(), set.label(0), set.label(1)), (2, Some(0), Some(1)));
        assert_eq!(set.summary().skipped.len(), 3);
        assert!(notes(&*set).contains("3 files skipped"));
        fs::remove_file(folder.path().join("x/c.png")).unwrap();
        fs::remove_file(folder.path().join("y/good.png")).unwrap();
        assert!(message(open(folder.path(), &options)).contains("no file here can be read as a picture"));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nowhere_is_a_bad_file() {
        let folder = TempDir::new().unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("a.png")).unwrap();
        assert!(message(plain(&folder)).contains("a.png: cannot be read"));
    }

    #[test]
    fn what_does_not_fit_in_memory_is_read_from_disk_the_same() {
        let folder = TempDir::new().unwrap();
        for i in 0..6 {
            save(&folder, &format!("{i}.png"), colour(20, 16, i));
        }
        save(&folder, "6.png", grey(20, 16, 0));
        for size in [None, Some((8, 8))] {
            let options = DataOptions { size, ..DataOptions::default() };
            let inside = open(folder.path(), &options).unwrap();
            let outside = open_within(folder.path(), &options, 100).unwrap();
            assert_eq!(outside.summary().memory_bytes, 0);
            assert!(inside.summary().memory_bytes > 0);
            assert!(notes(&*outside).contains("read from disk each time"));
            assert_eq!(inside.summary().fingerprint, outside.summary().fingerprint);
            for i in 0..7 {
                assert_eq!(picture(&*inside, i), picture(&*outside, i));
            }
        }
        let set = open_within(folder.path(), &DataOptions::default(), 100).unwrap();
        save(&folder, "0.png", colour(21, 16, 0));
        fs::remove_file(folder.path().join("1.png")).unwrap();
        let mut out = vec![0.0; set.shape().values()];
        for (i, what) in [(0, "it is 21x16 now, not 20x16"), (1, "cannot be read")] {
            let text = set.read(i, &mut out).unwrap_err().to_string();
            assert!(text.contains("has changed since") && text.contains(what), "{text}");
        }
    }

    #[test]
    fn the_fingerprint_is_of_the_pixels_and_names() {
        let make = |name: &str, value: u8, in_colour: bool| {
            let folder = TempDir::new().unwrap();
            let picture = DynamicImage::ImageLuma8(grey(3, 3, value));
            match in_colour {
                true => save(&folder, name, picture.to_rgb8()),
                false => save(&folder, name, picture),
            }
            plain(&folder).unwrap().summary().fingerprint.clone()
        };
        let first = make("a.png", 1, false);
        assert_eq!(first.len(), 64);
        assert_eq!(first, make("a.png", 1, true));
        assert_ne!(first, make("a.png", 2, false));
        assert_ne!(first, make("b.png", 1, false));
        assert_ne!(first, make("a/a.png", 1, false));
    }
}
