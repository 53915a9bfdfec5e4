//! What a file is by its bytes, to name what is not read and say what to do with it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use flate2::bufread::GzDecoder;

/// Longest end of a zip archive: the directory's end, and a comment.
const MAX_END: u64 = 22 + 0xFFFF;
/// A block of a tar archive; nothing that is known here shows further in.
const BLOCK: u64 = 512;

const ZIP: [&[u8]; 4] = [b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK00"];

/// What to do about a part of a split zip archive.
pub(super) const PART: &str = "it is a part of a split zip archive (.z01, .z02, ..., .zip); join the parts with \
     zip -s 0 NAME.zip --out WHOLE.zip and give the whole";

/// The first bytes of the file at `path`, at most a block.
fn start(path: &Path) -> Vec<u8> {
    let mut start = Vec::new();
    // What cannot be read is of no known kind; whoever reads it in earnest says why.
    let _ = File::open(path).and_then(|file| file.take(BLOCK).read_to_end(&mut start));
    start
}

/// Whether the file at `path` begins as a zip archive does, or as the first part of one does.
pub(super) fn begins_as_zip(path: &Path) -> bool {
    // An archive without entries has only the end of its directory; one that could have been split begins with a mark.
    is_zip(&start(path))
}

fn is_zip(start: &[u8]) -> bool {
    ZIP.iter().any(|magic| start.starts_with(magic))
}

/// The end of the directory of the zip archive at `path`, whatever the file begins with: a program that unpacks it, say.
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
        // Its comment reaches to the end of the file.
        let comment = usize::from(u16::from_le_bytes([record[20], record[21]]));
        (record.starts_with(b"PK\x05\x06") && at + 22 + comment == end.len()).then_some(*record)
    })
}

/// Whether the file at `path` ends as a zip archive does.
pub(super) fn has_zip_directory(path: &Path) -> bool {
    directory_end(path).is_some()
}

/// Whether the file at `path`, which begins or ends as a zip archive does, is but a part of a split one.
pub(super) fn is_part_of_zip(path: &Path) -> bool {
    match directory_end(path) {
        // The number of this part, from 0; that of an archive of 64 bits stands elsewhere.
        Some(end) => !matches!(u16::from_le_bytes([end[4], end[5]]), 0 | 0xFFFF),
        None => start(path).starts_with(b"PK\x07\x08"),
    }
}

/// Whether a file begins as a tar archive does: with a header whose checksum is right.
fn is_tar(start: &[u8]) -> bool {
    if start.get(257..262) == Some(b"ustar") {
        return true;
    }
    // Archives of before POSIX have no mark. The checksum is of the header with spaces in its own place.
    let Some(header) = start.first_chunk::<512>() else { return false };
    let digits = header[148..156].iter().copied().skip_while(|&b| b == b' ').take_while(u8::is_ascii_digit);
    let noted = digits.fold(0u32, |n, digit| n.wrapping_mul(8).wrapping_add(u32::from(digit - b'0')));
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    header[0] != 0 && noted == sum(&header[..148]) + 8 * u32::from(b' ') + sum(&header[156..])
}

/// The name of the archive or compressed data that a file begins as; zip and gzip are not among them.
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

/// The name of the image format that a file begins as.
fn image(start: &[u8]) -> Option<&'static str> {
    use image::ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    Some(match image::guess_format(start).ok()? {
        Png => "PNG",
        Jpeg => "JPEG",
        Gif => "GIF",
        WebP => "WebP",
        Tiff => "TIFF",
        // Two letters are little; four bytes that are always 0 follow the length.
        Bmp if start.get(6..10) == Some(&[0; 4]) => "BMP",
        _ => return None,
    })
}

/// What the file at `path` is and what to do with it, if it is of a kind that is known and cannot be read as it is.
pub(super) fn not_read(path: &Path) -> Option<String> {
    let start = start(path);
    if let Some(kind) = archive(&start) {
        return Some(format!(
            "it is {kind}, which is not read; unpack it and give the folder, or pack it as a zip"
        ));
    }
    if let Some(kind) = image(&start) {
        return Some(format!(
            "it is a {kind} image that is not named as one; give it the ending .{}",
            kind.to_lowercase()
        ));
    }
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let number = ending.strip_prefix('z').unwrap_or_default();
    (number.len() >= 2 && number.bytes().all(|b| b.is_ascii_digit())).then(|| PART.to_owned())
}

/// What the gzip data at `path` hold and what to do with them, if that is known and no IDX file.
pub(super) fn in_gzip(path: &Path) -> Option<String> {
    let file = std::io::BufReader::new(File::open(path).ok()?);
    let mut inside = Vec::new();
    // Of damaged data the beginning may still tell.
    let _ = GzDecoder::new(file).take(BLOCK).read_to_end(&mut inside);
    if is_tar(&inside) {
        return Some(
            "it is a tar archive compressed with gzip, which is not read; unpack it (tar -xzf) and give the folder, or \
             pack it as a zip"
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
    Some(format!("it is {kind}{by}, which is not read; unpack it with gunzip and give what comes out"))
}
