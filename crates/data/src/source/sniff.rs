//! Detects file types by content, to name unsupported ones and suggest what to do.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use flate2::bufread::GzDecoder;

/// Maximum size of the end of a zip archive: the end-of-central-directory record and a comment.
const MAX_END: u64 = 22 + 0xFFFF;
/// Size of a tar block; every signature here lies within the first block.
const BLOCK: u64 = 512;

const ZIP: [&[u8]; 4] = [b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK00"];

/// The error for a part of a split zip archive.
pub(super) const SPLIT_ZIP: &str = "it is a part of a split zip archive (.z01, .z02, ..., .zip); join the parts with \
     zip -s 0 NAME.zip --out WHOLE.zip and give WHOLE.zip";

/// The first bytes of the file at `path`, at most a block.
fn start(path: &Path) -> Vec<u8> {
    let mut start = Vec::new();
    // An unreadable file has no known type; the caller that actually reads it reports the error.
    let _ = File::open(path).and_then(|file| file.take(BLOCK).read_to_end(&mut start));
    start
}

/// Whether the file at `path` starts like a zip archive, or like the first part of a split one.
pub(super) fn starts_as_zip(path: &Path) -> bool {
    // An empty archive consists of only the directory end; one that could have been split starts with its own signature.
    is_zip(&start(path))
}

fn is_zip(start: &[u8]) -> bool {
    ZIP.iter().any(|magic| start.starts_with(magic))
}

/// The end-of-central-directory record of the zip archive at `path`, whatever precedes it (such as a self-extractor).
fn directory_end(path: &Path) -> Option<[u8; 22]> {
    let end = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_END)))?;
        let mut end = Vec::new();
        file.take(MAX_END).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = end().ok()?;
    (0..end.len().saturating_sub(21)).rev().find_map(|at| {
        let record: &[u8; 22] = end[at..].first_chunk()?;
        // The comment extends to the end of the file.
        let comment = usize::from(u16::from_le_bytes([record[20], record[21]]));
        (record.starts_with(b"PK\x05\x06") && at + 22 + comment == end.len()).then_some(*record)
    })
}

/// Whether the file at `path` ends like a zip archive.
pub(super) fn has_zip_directory(path: &Path) -> bool {
    directory_end(path).is_some()
}

/// Whether the file at `path`, which starts or ends like a zip archive, is one part of a split archive.
pub(super) fn is_zip_part(path: &Path) -> bool {
    match directory_end(path) {
        // The number of this part, from 0; a zip64 archive stores it elsewhere.
        Some(end) => !matches!(u16::from_le_bytes([end[4], end[5]]), 0 | 0xFFFF),
        None => start(path).starts_with(b"PK\x07\x08"),
    }
}

/// Whether a file starts like a tar archive: with a header whose checksum is right.
fn is_tar(start: &[u8]) -> bool {
    if start.get(257..262) == Some(b"ustar") {
        return true;
    }
    // Pre-POSIX archives have no signature. The checksum is computed with spaces in the checksum field.
    let Some(header) = start.first_chunk::<512>() else { return false };
    let digits = header[148..156].iter().copied().skip_while(|&b| b == b' ').take_while(u8::is_ascii_digit);
    let stored = digits.fold(0u32, |n, digit| n.wrapping_mul(8).wrapping_add(u32::from(digit - b'0')));
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    header[0] != 0 && stored == sum(&header[..148]) + 8 * u32::from(b' ') + sum(&header[156..])
}

/// The name of the archive or compression format that a file starts with, except zip and gzip.
fn archive(start: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &'static str); 5] = [
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"BZh", "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    ];
    let kind = kinds.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, kind)| *kind);
    kind.or_else(|| is_tar(start).then_some("a tar archive"))
}

/// The name of the image format that a file starts with.
fn image(start: &[u8]) -> Option<&'static str> {
    use image::ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    Some(match image::guess_format(start).ok()? {
        Png => "PNG",
        Jpeg => "JPEG",
        Gif => "GIF",
        WebP => "WebP",
        Tiff => "TIFF",
        // Two letters are a weak signature; the four bytes after the length are always 0.
        Bmp if start.get(6..10) == Some(&[0; 4]) => "BMP",
        _ => return None,
    })
}

/// The error for the file at `path`, if it is of a known type that is not supported as it is.
pub(super) fn unsupported(path: &Path) -> Option<String> {
    let start = start(path);
    if let Some(kind) = archive(&start) {
        return Some(format!(
            "it is {kind}, which is not supported; unpack it and give the folder, or pack it as a zip"
        ));
    }
    if let Some(kind) = image(&start) {
        return Some(format!(
            "it is a {kind} image without an image extension; rename it to end in .{}",
            kind.to_lowercase()
        ));
    }
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let number = extension.strip_prefix('z').unwrap_or_default();
    (number.len() >= 2 && number.bytes().all(|b| b.is_ascii_digit())).then(|| SPLIT_ZIP.to_owned())
}

/// The error for the gzip file at `path`, if its contents are of a known type other than IDX.
pub(super) fn gzip_contents(path: &Path) -> Option<String> {
    let file = std::io::BufReader::new(File::open(path).ok()?);
    let mut inside = Vec::new();
    // The start of damaged data may still be recognizable.
    let _ = GzDecoder::new(file).take(BLOCK).read_to_end(&mut inside);
    if is_tar(&inside) {
        return Some(
            "it is a tar archive compressed with gzip, which is not supported; unpack it (tar -xzf) and give the folder, \
             or pack it as a zip"
                .to_owned(),
        );
    }
    let kind = match archive(&inside) {
        Some(kind) => kind.to_owned(),
        None if is_zip(&inside) => "a zip archive".to_owned(),
        None if inside.starts_with(&[0x1F, 0x8B]) => "compressed with gzip twice".to_owned(),
        None => format!("a {} image", image(&inside)?),
    };
    let by = if kind.starts_with("compressed") { "" } else { " compressed with gzip" };
    Some(format!("it is {kind}{by}, which is not supported; unpack it with gunzip and give the result"))
}
