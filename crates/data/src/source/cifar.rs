//! The binary version of CIFAR-10 and CIFAR-100: <https://www.cs.toronto.edu/~kriz/cifar.html>.
//!
//! A record is the label (CIFAR-100: coarse label, fine label) followed by planes of 1024 bytes of red, green and blue, each
//! row by row. Training images are in `data_batch_1.bin` to `data_batch_5.bin` or in `train.bin`, class names in
//! `batches.meta.txt` or `fine_label_names.txt`.

use std::path::{Path, PathBuf};

use super::super::unusable;
use super::packed::Packed;
use super::{DataContent, file_name_bytes};
use crate::error::{Error, Result};
use ddpm_text::{counted, shown};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

/// The record format of a file, according to its name.
struct BatchFormat {
    /// Label bytes before the pixels; the last one is used.
    labels: usize,
    /// The file with the class names.
    names: &'static str,
    /// Whether it contains training images.
    training: bool,
}

fn batch_format(path: &Path) -> Option<BatchFormat> {
    let name = path.file_name()?.to_str()?;
    let ten = |training| Some(BatchFormat { labels: 1, names: "batches.meta.txt", training });
    let hundred = |training| Some(BatchFormat { labels: 2, names: "fine_label_names.txt", training });
    match name {
        "test_batch.bin" => ten(false),
        "train.bin" => hundred(true),
        "test.bin" => hundred(false),
        _ => match name.strip_prefix("data_batch_").and_then(|rest| rest.strip_suffix(".bin")) {
            Some(number) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => ten(true),
            _ => None,
        },
    }
}

/// Whether `path` has the name of a CIFAR batch.
pub(super) fn is_batch_name(path: &Path) -> bool {
    batch_format(path).is_some()
}

/// The training batches of a folder in order (the test batch if there are none), and notes about the choice.
pub(super) fn choose(folder: &Path, candidates: &[PathBuf]) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let name = |path: &PathBuf| shown(path.file_name().unwrap_or_default());
    let training = |path: &&PathBuf| batch_format(path).is_some_and(|f| f.training);
    let (mut chosen, rest): (Vec<_>, Vec<_>) = if candidates.iter().any(|p| training(&p)) {
        candidates.iter().partition(training)
    } else {
        (candidates.iter().collect(), Vec::new())
    };
    // Shorter names first: batch 10 comes after batch 9.
    chosen.sort_by_key(|path| (file_name_bytes(path).len(), name(path)));
    let label_counts: std::collections::BTreeSet<_> =
        chosen.iter().filter_map(|p| batch_format(p).map(|f| f.labels)).collect();
    if label_counts.len() > 1 {
        return Err(unusable(
            folder,
            "it contains files of both CIFAR-10 and CIFAR-100; give the path of one, or move them to separate folders",
        ));
    }
    let notes = if rest.is_empty() {
        Vec::new()
    } else {
        vec![format!("not used: {}", rest.into_iter().map(name).collect::<Vec<_>>().join(", "))]
    };
    Ok((chosen.into_iter().cloned().collect(), notes))
}

/// Reads the batches `files`, all of one format and at most `memory` bytes in total; `source` is the path the user gave.
pub(super) fn read(source: &Path, files: &[PathBuf], notes: Vec<String>, memory: u64) -> Result<DataContent> {
    let Some(format) = files.first().and_then(|path| batch_format(path)) else {
        return Err(unusable(source, "no CIFAR batches here"));
    };
    let record = format.labels + 3 * PLANE;
    let mut packed = Packed {
        height: SIDE,
        width: SIDE,
        channels: 3,
        data: Vec::new(),
        labels: Vec::new(),
        files: Vec::new(),
    };
    for path in files {
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "read the CIFAR batch"))?;
        if !metadata.is_file() {
            return Err(unusable(path, "it is not a regular file"));
        }
        let stored = metadata.len();
        if stored == 0 || !stored.is_multiple_of(record as u64) {
            return Err(unusable(
                path,
                format!(
                    "its size of {stored} bytes is not a multiple of {record} bytes (a CIFAR image with its label): it is \
                     cut off, or not a CIFAR batch"
                ),
            ));
        }
        if stored.saturating_add(packed.data.len() as u64) > memory {
            let reason = format!("with it the images take more than {} MiB (data.memory_mib)", memory >> 20);
            return Err(unusable(path, reason));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path, "read the CIFAR batch"))?;
        packed.files.push((packed.labels.len(), path.clone()));
        for record in bytes.chunks_exact(record) {
            let (labels, planes) = record.split_at(format.labels);
            packed.labels.push(labels[format.labels - 1].into());
            let (red, rest) = planes.split_at(PLANE);
            let (green, blue) = rest.split_at(PLANE);
            let pixels = red.iter().zip(green).zip(blue);
            packed.data.extend(pixels.flat_map(|((&r, &g), &b)| [r, g, b]));
        }
    }
    let classes = classes(&packed, files, &format)?;
    Ok(DataContent { source: Box::new(packed), classes, sorted: false, notes, bad: Vec::new() })
}

/// The class names in the file next to the first batch, or numbers if there is no such file.
fn classes(packed: &Packed, files: &[PathBuf], format: &BatchFormat) -> Result<Vec<String>> {
    let max_label = packed.labels.iter().max().copied().unwrap_or(0);
    let path = files[0].with_file_name(format.names);
    // Names are optional: an unreadable file counts as none.
    let short = std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= 1 << 16);
    let Some(text) = short.then(|| std::fs::read_to_string(&path).ok()).flatten() else {
        return Ok((0..=max_label).map(|class| class.to_string()).collect());
    };
    let names: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    let Some(at) = packed.labels.iter().position(|&label| label as usize >= names.len()) else {
        return Ok(names);
    };
    let (first, file) =
        packed.files.iter().rfind(|(first, _)| *first <= at).expect("the first file starts at 0");
    Err(unusable(
        file,
        format!(
            "its record {} has the label {}, but {} has {}: it is damaged, or not a CIFAR batch",
            at - first,
            packed.labels[at],
            shown(&path),
            counted(names.len(), "name")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::super::{AugmentKey, DataOptions, Dataset, ImageShape, open};
    use super::*;
    use tempfile::TempDir;

    /// Records with constant channels: `first` + 3 i + channel.
    fn batch(labels: &[&[u8]], first: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (i, label) in labels.iter().enumerate() {
            bytes.extend(*label);
            for c in 0..3 {
                bytes.extend([first + 3 * i as u8 + c; PLANE]);
            }
        }
        bytes
    }

    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = TempDir::new().unwrap();
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn opened(path: &Path) -> Result<Box<dyn Dataset>> {
        open(path, &DataOptions::default())
    }

    fn first_pixel(set: &dyn Dataset, index: usize) -> [u8; 3] {
        let mut out = vec![0.0; set.shape().num_elements()];
        set.read(index, AugmentKey::default(), &mut out).unwrap();
        [0, 1, 2].map(|c| ((out[c] + 1.0) * 127.5).round() as u8)
    }

    #[test]
    fn the_training_batches_of_a_folder_are_read_in_order() {
        let folder = folder(&[
            ("data_batch_10.bin", &batch(&[&[1]], 200)),
            ("data_batch_2.bin", &batch(&[&[0]], 100)),
            ("data_batch_1.bin", &batch(&[&[2], &[1]], 10)),
            ("test_batch.bin", &batch(&[&[0]], 50)),
            ("batches.meta.txt", b"plane\ncar\nbird\n\n"),
            ("readme.html", b""),
        ]);
        let set = opened(folder.path()).unwrap();
        assert_eq!((set.len(), set.shape()), (4, ImageShape { height: 32, width: 32, channels: 3 }));
        assert_eq!(set.classes(), ["plane", "car", "bird"]);
        assert_eq!((0..4).map(|i| set.label(i).unwrap()).collect::<Vec<_>>(), [2, 1, 0, 1]);
        let pixels: Vec<_> = (0..4).map(|i| first_pixel(&*set, i)).collect();
        assert_eq!(pixels, [[10, 11, 12], [13, 14, 15], [100, 101, 102], [200, 201, 202]]);
        let notes = set.summary().notes.join("\n");
        assert!(notes.contains("not used: test_batch.bin"), "{notes}");
        let test = opened(&folder.path().join("test_batch.bin")).unwrap();
        assert_eq!((test.len(), first_pixel(&*test, 0)), (1, [50, 51, 52]));
    }

    #[test]
    fn cifar_100_uses_the_fine_labels() {
        let folder = folder(&[
            ("train.bin", &batch(&[&[9, 2], &[8, 0]], 10)),
            ("fine_label_names.txt", b"apple\nbear\ncup\n"),
        ]);
        let set = opened(folder.path()).unwrap();
        // The file also names classes without images.
        assert_eq!(set.classes(), ["apple", "cup"]);
        assert_eq!([set.label(0), set.label(1)], [Some(1), Some(0)]);
        assert_eq!(first_pixel(&*set, 1), [13, 14, 15]);
    }

    #[test]
    fn planes_are_interleaved() {
        let mut bytes = vec![0];
        bytes.extend((0..3 * PLANE).map(|i| (i / PLANE * 80 + i % PLANE % 7) as u8));
        let folder = folder(&[("data_batch_1.bin", &bytes)]);
        let set = opened(folder.path()).unwrap();
        assert_eq!(set.classes(), ["0"]);
        let mut out = vec![0.0; 3 * PLANE];
        set.read(0, AugmentKey::default(), &mut out).unwrap();
        for (p, pixel) in out.chunks(3).enumerate() {
            for (c, v) in pixel.iter().enumerate() {
                assert_eq!(*v, (c * 80 + p % 7) as f32 / 255.0 * 2.0 - 1.0);
            }
        }
    }

    #[test]
    fn invalid_batches_are_rejected_with_the_reason() {
        let good = batch(&[&[0], &[1]], 0);
        for (files, expected) in [
            (
                vec![("data_batch_1.bin", &good[..good.len() - 1])],
                "6145 bytes is not a multiple of 3073 bytes",
            ),
            (vec![("data_batch_1.bin", &b""[..])], "0 bytes is not a multiple"),
            (
                vec![("data_batch_1.bin", &good[..]), ("batches.meta.txt", b"only\n")],
                "record 1 has the label 1",
            ),
            (vec![("data_batch_1.bin", &good[..]), ("train.bin", b"")], "both CIFAR-10 and CIFAR-100"),
        ] {
            let folder = folder(&files);
            let text = opened(folder.path()).err().expect("an error").to_string();
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }
}
