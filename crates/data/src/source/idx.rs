//! IDX files, the format of MNIST and similar data sets: <https://yann.lecun.com/exdb/mnist/>.
//!
//! A file starts with two zero bytes, the element type (8: unsigned byte) and the number of dimensions; the sizes
//! follow as big-endian 32-bit integers, then the elements, last dimension fastest.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;

use super::super::unusable;
use super::packed::Packed;
use super::{DataContent, sniff};
use crate::error::{Error, Result};
use ddpm_text::shown;

/// DEFLATE never compresses by more than 1032 to 1.
const MAX_GZIP_RATIO: u64 = 1032;

/// `name` without ".gz", and whether it had that suffix.
fn ungz(name: &str) -> (&str, bool) {
    match name.strip_suffix(".gz") {
        Some(stem) => (stem, true),
        None => (name, false),
    }
}

/// Whether `path` has the name of an IDX file of images.
pub(super) fn is_images_name(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = ungz(&name).0;
    stem.contains("images") && (stem.ends_with("-idx3-ubyte") || stem.ends_with(".idx3-ubyte"))
}

/// Picks one of the image files in a folder: training images before others before test images, an uncompressed file
/// before its compressed copy. The notes list the unused ones.
pub(super) fn choose(folder: &Path, candidates: &[PathBuf]) -> Result<(PathBuf, Vec<String>)> {
    let name = |path: &PathBuf| shown(path.file_name().unwrap_or_default());
    let mut ranked: Vec<_> = candidates
        .iter()
        .map(|path| {
            let name = name(path);
            let (stem, zipped) = ungz(&name);
            let rank = match stem {
                _ if stem.contains("train") => 0,
                _ if stem.contains("t10k") || stem.contains("test") => 2,
                _ => 1,
            };
            // Both spellings are the same name.
            (rank, stem.replace(".idx3", "-idx3"), zipped, path)
        })
        .collect();
    ranked.sort();
    let Some((rank, stem, _, chosen)) = ranked.first() else {
        return Err(unusable(folder, "no IDX files of images here"));
    };
    let rivals: Vec<_> =
        ranked.iter().filter(|(r, s, ..)| r == rank && s != stem).map(|c| name(c.3)).collect();
    if !rivals.is_empty() {
        return Err(unusable(
            folder,
            format!(
                "several sets of IDX files here ({}, {}); give the path of one",
                name(chosen),
                rivals.join(", ")
            ),
        ));
    }
    let others: Vec<_> = ranked.iter().filter(|c| c.1 != *stem).map(|c| name(c.3)).collect();
    let notes = if others.is_empty() {
        Vec::new()
    } else {
        vec![format!("{} is used; not used: {}", name(chosen), others.join(", "))]
    };
    Ok(((*chosen).clone(), notes))
}

/// The label file that matches the name of an image file, if it exists.
fn labels_beside(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?;
    if !is_images_name(images) {
        return None;
    }
    let stem = ungz(name).0.replace("images", "labels");
    let stem = stem.strip_suffix("idx3-ubyte")?.strip_suffix(['-', '.'])?;
    ["-idx1-ubyte", ".idx1-ubyte", "-idx1-ubyte.gz", ".idx1-ubyte.gz"]
        .into_iter()
        .map(|suffix| images.with_file_name(format!("{stem}{suffix}")))
        .find(|path| path.is_file())
}

/// The contents of an IDX file; the length of `data` is the product of `sizes`.
struct Idx {
    sizes: Vec<usize>,
    data: Vec<u8>,
}

/// Reads an IDX file of at most `cap` bytes, plain or gzipped.
fn read(path: &Path, cap: u64) -> Result<Idx> {
    let io = |e| read_error(path, e);
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(unusable(path, "it is not a regular file; give a folder or an IDX file"));
    }
    let stored = metadata.len();
    let mut file = File::open(path).map_err(io)?;
    let mut start = Vec::new();
    (&mut file).take(4).read_to_end(&mut start).map_err(io)?;
    let zipped = start.starts_with(&[0x1F, 0x8B]);
    if !zipped && !start.starts_with(&[0, 0]) {
        return Err(unusable(
            path,
            "it is neither a folder nor an IDX file (plain or .gz) nor a zip; give a folder of images, a folder with \
             one folder per class, a zip of either, IDX files such as MNIST's, or CIFAR's binary batches",
        ));
    }
    let plain = BufReader::new(std::io::Cursor::new(start).chain(file));
    let mut content: Box<dyn Read> = if zipped { Box::new(GzDecoder::new(plain)) } else { Box::new(plain) };

    let sizes = sizes(path, &mut content)?;
    let shown = shape(&sizes);
    let declared = sizes.iter().try_fold(1u64, |n, &size| n.checked_mul(size as u64)).filter(|&n| n <= cap);
    let Some(declared) = declared else {
        return Err(unusable(
            path,
            format!("its header declares {shown} bytes; at most {} MiB are read", cap >> 20),
        ));
    };
    // Before any allocation.
    check_length(path, &sizes, declared, stored, zipped)?;
    let mut data = Vec::new();
    data.try_reserve_exact(declared as usize)
        .map_err(|_| unusable(path, format!("not enough memory for its {declared} bytes")))?;
    (&mut content).take(declared).read_to_end(&mut data).map_err(io)?;
    if data.len() as u64 != declared {
        return Err(unusable(
            path,
            format!("it is cut off: its header declares {shown} bytes, but {} follow", data.len()),
        ));
    }
    // Reading to the end also verifies gzip's checksum.
    if content.read(&mut [0]).map_err(io)? != 0 {
        return Err(unusable(
            path,
            format!("it has trailing data: more than {shown} bytes follow its header"),
        ));
    }
    Ok(Idx { sizes, data })
}

/// The error for a failed read of an IDX file.
fn read_error(path: &Path, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::UnexpectedEof => unusable(path, "it is cut off"),
        ErrorKind::InvalidInput | ErrorKind::InvalidData => {
            unusable(path, format!("its gzip data is damaged: {error}"))
        }
        _ => Error::io(path, "read the IDX file")(error),
    }
}

/// Reads the header: the size of each dimension.
fn sizes(path: &Path, content: &mut dyn Read) -> Result<Vec<usize>> {
    let io = |e| read_error(path, e);
    let mut magic = [0; 4];
    content.read_exact(&mut magic).map_err(io)?;
    let [0, 0, kind, dimensions] = magic else {
        let reason = sniff::gzip_contents(path).unwrap_or_else(|| {
            format!(
                "it is not an IDX file: unpacked, it starts with {magic:02x?}, not with 00 00; IDX is the only format \
                 supported with gzip"
            )
        });
        return Err(unusable(path, reason));
    };
    if kind != 8 {
        return Err(unusable(
            path,
            format!("its elements are of IDX type 0x{kind:02x}; only bytes (0x08) are supported"),
        ));
    }
    if !(1..=4).contains(&dimensions) {
        return Err(unusable(path, format!("its header declares {dimensions} dimensions; images have 3")));
    }
    let mut sizes = Vec::new();
    for _ in 0..dimensions {
        let mut size = [0; 4];
        content.read_exact(&mut size).map_err(io)?;
        sizes.push(u32::from_be_bytes(size) as usize);
    }
    Ok(sizes)
}

/// Checks the length that the header declares against that of the file.
fn check_length(path: &Path, sizes: &[usize], declared: u64, stored: u64, zipped: bool) -> Result<()> {
    let shown = shape(sizes);
    let header = 4 + 4 * sizes.len() as u64;
    if !zipped && stored != header + declared {
        let what = if stored < header + declared { "it is cut off" } else { "it has trailing data" };
        return Err(unusable(
            path,
            format!(
                "{what}: its header declares {shown} bytes, but {} follow",
                stored.saturating_sub(header)
            ),
        ));
    }
    if zipped && declared / MAX_GZIP_RATIO > stored {
        return Err(unusable(
            path,
            format!("its header declares {shown} bytes, which {stored} gzipped bytes cannot hold"),
        ));
    }
    Ok(())
}

/// The dimensions as text: "60000 x 28 x 28".
fn shape(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

/// Reads the images in `images` and the label file next to it, each of at most `memory` bytes.
pub(super) fn read_set(images: &Path, mut notes: Vec<String>, memory: u64) -> Result<DataContent> {
    let Idx { sizes, data } = read(images, memory)?;
    let [n, height, width] = sizes[..] else {
        let reason = match sizes.len() {
            1 => "it contains labels (one dimension); give the image file, ...images-idx3-ubyte".to_owned(),
            d => format!("it has {d} dimensions; grey images have 3 (number, height, width)"),
        };
        return Err(unusable(images, reason));
    };
    if data.is_empty() {
        return Err(unusable(images, format!("it contains no pixels ({n} images of {height}x{width})")));
    }
    let labels: Vec<u32> = match labels_beside(images) {
        None => {
            notes.push("no label file next to the images: the data set has no classes".to_owned());
            Vec::new()
        }
        Some(path) => {
            let Idx { sizes, data } = read(&path, memory)?;
            if sizes != [n] {
                let reason = match sizes[..] {
                    [m] => format!("it contains {m} labels for {n} images"),
                    _ => format!("it has {} dimensions; labels have one", sizes.len()),
                };
                return Err(unusable(&path, format!("{reason} (of {})", shown(images))));
            }
            data.into_iter().map(u32::from).collect()
        }
    };
    let classes = labels.iter().max().map_or(Vec::new(), |&max| (0..=max).map(|c| c.to_string()).collect());
    let files = vec![(0, images.to_owned())];
    let source = Box::new(Packed { height, width, channels: 1, data, labels, files });
    Ok(DataContent { source, classes, sorted: false, notes, bad: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::super::super::{AugmentKey, DataOptions, Dataset, ImageShape, open, open_within};
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::fs;
    use std::io::Write;
    use tempfile::TempDir;

    fn idx(kind: u8, sizes: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, kind, sizes.len() as u8];
        sizes.iter().for_each(|size| bytes.extend(size.to_be_bytes()));
        bytes.extend(data);
        bytes
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// `n` images of 2x3, with samples counting up from `first`.
    fn images(n: u32, first: u8) -> Vec<u8> {
        idx(8, &[n, 2, 3], &(0..n * 6).map(|i| first.wrapping_add(i as u8)).collect::<Vec<_>>())
    }

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = TempDir::new().unwrap();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn opened(path: &Path) -> Result<Box<dyn Dataset>> {
        open(path, &DataOptions::default())
    }

    fn message(result: Result<Box<dyn Dataset>>) -> String {
        result.err().expect("an error").to_string()
    }

    fn first_sample(set: &dyn Dataset, index: usize) -> u8 {
        let mut out = vec![0.0; set.shape().num_elements()];
        set.read(index, AugmentKey::default(), &mut out).unwrap();
        ((out[0] + 1.0) * 127.5).round() as u8
    }

    #[test]
    fn mnist_files_are_found_by_either_spelling_plain_or_gzipped() {
        let labels = idx(8, &[4], &[3, 0, 2, 1]);
        for (images_name, labels_name, zipped) in [
            ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", false),
            ("train-images.idx3-ubyte", "train-labels.idx1-ubyte", false),
            ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", true),
            ("train-images.idx3-ubyte.gz", "train-labels.idx1-ubyte.gz", true),
        ] {
            let form = |bytes: Vec<u8>| if zipped { gzip(&bytes) } else { bytes };
            let folder = folder(&[(images_name, &form(images(4, 10))), (labels_name, &form(labels.clone()))]);
            for path in [folder.path().to_owned(), folder.path().join(images_name)] {
                let set = opened(&path).unwrap();
                assert_eq!((set.len(), set.shape()), (4, ImageShape { height: 2, width: 3, channels: 1 }));
                assert_eq!(set.classes(), ["0", "1", "2", "3"]);
                assert_eq!((0..4).map(|i| set.label(i).unwrap()).collect::<Vec<_>>(), [3, 0, 2, 1]);
                assert_eq!((0..4).map(|i| first_sample(&*set, i)).collect::<Vec<_>>(), [10, 16, 22, 28]);
                assert_eq!(set.summary().notes, Vec::<String>::new());
                assert_eq!(set.summary().source, path.display().to_string());
            }
        }
    }

    #[test]
    fn training_images_are_preferred_to_test_images_and_plain_files_to_gzipped() {
        let folder = folder(&[
            ("t10k-images-idx3-ubyte", &images(2, 1)),
            ("train-images-idx3-ubyte", &images(3, 2)),
            ("train-images-idx3-ubyte.gz", b"never read"),
        ]);
        let set = opened(folder.path()).unwrap();
        assert_eq!((set.len(), first_sample(&*set, 0)), (3, 2));
        assert_eq!((set.classes().len(), set.label(0)), (0, None));
        let notes = set.summary().notes.join("\n");
        assert!(
            notes.contains("not used: t10k-images-idx3-ubyte") && notes.contains("no label file"),
            "{notes}"
        );
        assert_eq!(opened(&folder.path().join("t10k-images-idx3-ubyte")).unwrap().len(), 2);
    }

    #[test]
    fn labels_without_images_are_dropped() {
        // EMNIST's letters are labelled from 1.
        let labels = idx(8, &[5], &[1, 26, 3, 3, 1]);
        let folder =
            folder(&[("train-images-idx3-ubyte", &images(5, 0)), ("train-labels-idx1-ubyte", &labels)]);
        let set = opened(folder.path()).unwrap();
        assert_eq!(set.classes(), ["1", "3", "26"]);
        let of: Vec<_> = (0..5).map(|i| set.label(i)).collect();
        assert_eq!(of, [Some(0), Some(2), Some(1), Some(1), Some(0)]);
        let notes = set.summary().notes.join("\n");
        assert!(notes.contains("24 classes without images omitted (0, 2, 4, 5"), "{notes}");
        assert!(notes.contains("and 4 more): 3 of 27 remain"), "{notes}");
    }

    #[test]
    fn ambiguous_folders_are_rejected() {
        let two = folder(&[
            ("letters-train-images-idx3-ubyte", &images(2, 1)),
            ("digits-train-images-idx3-ubyte", &images(2, 1)),
        ]);
        assert!(message(opened(two.path())).contains("several sets of IDX files"));
        let mixed = folder(&[("train-images-idx3-ubyte", &images(2, 1)), ("a.png", b"")]);
        assert!(message(opened(mixed.path())).contains("IDX files and 1 image"));
        let above = TempDir::new().unwrap();
        fs::create_dir(above.path().join("raw")).unwrap();
        fs::write(above.path().join("raw/train-images-idx3-ubyte"), images(2, 1)).unwrap();
        let text = message(opened(above.path()));
        assert!(text.contains("CIFAR batches are in") && text.ends_with("raw: give that path"), "{text}");
    }

    #[test]
    fn hostile_files_are_rejected_with_the_reason() {
        let huge = idx(8, &[u32::MAX, u32::MAX, u32::MAX], &[]);
        let overflow = idx(8, &[1 << 31, 1 << 31, 4], &[]);
        let far = idx(8, &[1_000_000, 28, 28], &[0; 50]);
        let mut damaged = gzip(&images(50, 0));
        let end = damaged.len() - 6;
        damaged[end] ^= 0xFF;
        let good = images(4, 0);
        let cases: &[(&[u8], &str)] = &[
            (b"", "neither a folder nor an IDX file"),
            (b"%PDF-1.4", "neither a folder nor an IDX file"),
            (&[0, 0, 8], "cut off"),
            (&gzip(b"hello, hello"), "unpacked, it starts with"),
            (&idx(9, &[4, 2, 3], &[0; 24]), "IDX type 0x09"),
            (&idx(8, &[], &[]), "0 dimensions"),
            (&[0, 0, 8, 200, 0, 0], "200 dimensions"),
            (&[0, 0, 8, 3, 0, 0, 0, 1, 0], "cut off"),
            (&idx(8, &[4], &[0; 4]), "contains labels"),
            (&idx(8, &[4, 6], &[0; 24]), "2 dimensions"),
            (&idx(8, &[0, 2, 3], &[]), "contains no pixels"),
            (&idx(8, &[4, 0, 3], &[]), "contains no pixels"),
            (&huge, "at most 2048 MiB"),
            (&overflow, "at most 2048 MiB"),
            (&far, "it is cut off: its header declares 1000000 x 28 x 28 bytes, but 50 follow"),
            (&good[..good.len() - 1], "23 follow"),
            (&[&good[..], &[0]].concat(), "it has trailing data"),
            (&gzip(&far), "gzipped bytes cannot hold"),
            (&gzip(&huge), "at most 2048 MiB"),
            (&gzip(&good[..good.len() - 1]), "23 follow"),
            (&gzip(&[&good[..], &vec![0; 10_000_000]].concat()), "more than 4 x 2 x 3 bytes"),
            (&gzip(&images(50, 0))[..60], "cut off"),
            (&damaged, "gzip data is damaged"),
        ];
        for (bytes, expected) in cases {
            let folder = folder(&[("train-images-idx3-ubyte", bytes)]);
            let text = message(opened(folder.path()));
            assert!(text.contains(expected), "{expected}: {text}");
            assert!(text.contains("train-images-idx3-ubyte"), "{text}");
        }
    }

    #[test]
    fn labels_must_match_the_images() {
        for (labels, expected) in [
            (idx(8, &[3], &[0; 3]), "3 labels for 4 images"),
            (images(4, 0), "3 dimensions; labels have one"),
            (idx(8, &[4], &[0; 3]), "cut off"),
        ] {
            let folder =
                folder(&[("train-images-idx3-ubyte", &images(4, 0)), ("train-labels-idx1-ubyte", &labels)]);
            let text = message(opened(folder.path()));
            assert!(text.contains(expected) && text.contains("train-labels-idx1-ubyte"), "{text}");
        }
    }

    #[test]
    fn images_are_resized_and_converted() {
        let folder = folder(&[("train-images-idx3-ubyte", &images(4, 0))]);
        let options = DataOptions { size: Some((4, 4)), channels: Some(3), ..DataOptions::default() };
        let set = open(folder.path(), &options).unwrap();
        assert_eq!(set.shape(), ImageShape { height: 4, width: 4, channels: 3 });
        assert!(set.summary().notes.iter().any(|n| n.contains("2x3: every image is resized to 4x4")));
        let mut out = vec![9.0; 48];
        set.read(3, AugmentKey::default(), &mut out).unwrap();
        assert!(out.chunks(3).all(|p| p[0] == p[1] && p[1] == p[2]));
        assert_ne!(set.summary().fingerprint, opened(folder.path()).unwrap().summary().fingerprint);
        // If the resized images do not fit in memory, every read resizes again.
        let on_disk = open_within(folder.path(), &options, 40).unwrap();
        let mut again = vec![9.0; 48];
        on_disk.read(3, AugmentKey::default(), &mut again).unwrap();
        assert_eq!((again, on_disk.summary().memory_bytes), (out, 24));
        assert!(message(open_within(folder.path(), &options, 20)).contains("at most 0 MiB"));
    }

    #[test]
    fn the_fingerprint_covers_pixels_and_labels() {
        let print = |first: u8, labels: Option<[u8; 2]>| {
            let folder = folder(&[("train-images-idx3-ubyte", &images(2, first))]);
            if let Some(labels) = labels {
                fs::write(folder.path().join("train-labels-idx1-ubyte"), idx(8, &[2], &labels)).unwrap();
            }
            opened(folder.path()).unwrap().summary().fingerprint.clone()
        };
        let all = [print(0, None), print(1, None), print(0, Some([0, 1])), print(0, Some([1, 0]))];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), 4);
        assert_eq!(print(0, None), all[0]);
    }
}
