//! Counts the images in a file: pages of a TIFF, frames of a GIF, WebP or PNG. Only the first one is read, with a note.

/// Counting stops here: a damaged page list may be cyclic.
const MAX_PAGES: usize = 10_000;

/// The number of images in a file, at least 1; for damaged files, as many as can be found.
pub(super) fn count(bytes: &[u8]) -> usize {
    let n = match bytes {
        [b'I', b'I', ..] | [b'M', b'M', ..] => tiff(bytes),
        [b'G', b'I', b'F', b'8', ..] => gif(bytes),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp(bytes),
        [0x89, b'P', b'N', b'G', ..] => png(bytes),
        _ => None,
    };
    n.unwrap_or(1).max(1)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The pages of a TIFF or BigTIFF, excluding thumbnails (reduced-resolution versions of another page).
fn tiff(bytes: &[u8]) -> Option<usize> {
    let little = bytes[0] == b'I';
    let read_uint = |at: usize, length: usize| -> Option<u64> {
        let part = bytes.get(at..at.checked_add(length)?)?;
        let add = |n: u64, byte: &u8| n << 8 | u64::from(*byte);
        Some(if little { part.iter().rev().fold(0, add) } else { part.iter().fold(0, add) })
    };
    // Sizes in bytes of an entry count, an entry and an offset, and the position of the first offset.
    let (counts, entries, offsets, first) = match read_uint(2, 2)? {
        42 => (2, 12, 4, 4),
        43 => (8, 20, 8, 8),
        _ => return None,
    };
    let (mut pages, mut seen) = (0, 0);
    let mut at = usize::try_from(read_uint(first, offsets)?).ok()?;
    while at > 0 && seen < MAX_PAGES {
        let Some(n) = read_uint(at, counts).and_then(|n| usize::try_from(n).ok()) else { break };
        let list = at + counts;
        let Some(end) = n.checked_mul(entries).and_then(|n| n.checked_add(list)) else { break };
        if end > bytes.len() {
            break;
        }
        // Tag 254, NewSubfileType: bit 0 marks a thumbnail. The value is at the end of its entry.
        let subfile_type = (list..end).step_by(entries).find(|&entry| read_uint(entry, 2) == Some(254));
        let thumbnail = subfile_type
            .and_then(|entry| read_uint(entry + entries - offsets, 4))
            .is_some_and(|v| v & 1 == 1);
        pages += usize::from(!thumbnail);
        seen += 1;
        let Some(next) = read_uint(end, offsets).and_then(|next| usize::try_from(next).ok()) else { break };
        at = next;
    }
    Some(pages)
}

fn gif(bytes: &[u8]) -> Option<usize> {
    let palette = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut at = 13 + palette(*bytes.get(10)?);
    let mut frames = 0;
    loop {
        match bytes.get(at) {
            Some(0x2C) => {
                frames += 1;
                let Some(flags) = bytes.get(at + 9) else { break };
                at += 11 + palette(*flags);
            }
            Some(0x21) => at += 2,
            _ => break,
        }
        // Length-prefixed blocks; the last one is empty.
        while let Some(&length) = bytes.get(at) {
            at += 1 + usize::from(length);
            if length == 0 {
                break;
            }
        }
    }
    Some(frames)
}

fn webp(bytes: &[u8]) -> Option<usize> {
    let (mut at, mut frames) = (12, 0);
    while let Some(chunk) = array::<8>(bytes, at) {
        frames += usize::from(chunk.starts_with(b"ANMF"));
        let length = u32::from_le_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]) as usize;
        at = at.checked_add(8)?.checked_add(length)?.checked_add(length % 2)?;
    }
    Some(frames)
}

/// The frame count in the `acTL` chunk of an animated PNG.
fn png(bytes: &[u8]) -> Option<usize> {
    let mut at = 8;
    while let Some(head) = array::<8>(bytes, at) {
        match &head[4..] {
            b"acTL" => return Some(u32::from_be_bytes(array(bytes, at + 8)?) as usize),
            b"IDAT" => return None,
            _ => at = at.checked_add(12 + u32::from_be_bytes(*head.first_chunk()?) as usize)?,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{DynamicImage, ImageFormat, RgbaImage};
    use std::io::Cursor;

    /// A TIFF whose pages have only tag 254 with these values.
    fn pages(kinds: &[u16], big_endian: bool) -> Vec<u8> {
        let short = |n: u16| if big_endian { n.to_be_bytes() } else { n.to_le_bytes() };
        let long = |n: u32| if big_endian { n.to_be_bytes() } else { n.to_le_bytes() };
        let mut bytes = if big_endian { b"MM".to_vec() } else { b"II".to_vec() };
        bytes.extend(short(42));
        bytes.extend(long(8));
        for (i, &kind) in kinds.iter().enumerate() {
            let next = if i + 1 == kinds.len() { 0 } else { bytes.len() as u32 + 18 };
            bytes.extend([short(1), short(254), short(4)].concat());
            bytes.extend([long(1), long(kind.into()), long(next)].concat());
        }
        bytes
    }

    #[test]
    fn pages_are_counted_without_thumbnails() {
        for big_endian in [false, true] {
            assert_eq!(count(&pages(&[0], big_endian)), 1);
            assert_eq!(count(&pages(&[0, 2, 2], big_endian)), 3);
            assert_eq!(count(&pages(&[0, 1], big_endian)), 1);
        }
        // A cyclic page list terminates.
        let mut circle = pages(&[0], false);
        let end = circle.len() - 4;
        circle[end..].copy_from_slice(&8u32.to_le_bytes());
        assert_eq!(count(&circle), MAX_PAGES);
        let cut = pages(&[0, 0, 0], false);
        (0..cut.len()).for_each(|n| assert!((1..=3).contains(&count(&cut[..n]))));
    }

    #[test]
    fn frames_are_counted() {
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::gif::GifEncoder::new(&mut bytes);
        for value in [20, 90, 200] {
            let frame = RgbaImage::from_pixel(7, 5, image::Rgba([value, 3, 9, 255]));
            encoder.encode_frame(image::Frame::new(frame)).unwrap();
        }
        drop(encoder);
        assert_eq!(count(&bytes), 3);
        let plain = DynamicImage::ImageRgba8(RgbaImage::new(7, 5));
        for format in
            [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Tiff, ImageFormat::Gif, ImageFormat::Bmp]
        {
            let mut bytes = Cursor::new(Vec::new());
            plain.write_to(&mut bytes, format).unwrap();
            assert_eq!(count(&bytes.into_inner()), 1, "{format:?}");
        }
        let mut animated = b"\x89PNG\r\n\x1a\n".to_vec();
        animated.extend(b"\0\0\0\x08acTL\0\0\0\x05\0\0\0\0crc_");
        assert_eq!(count(&animated), 5);
        let riff =
            [&b"RIFF\0\0\0\0WEBP"[..], b"VP8X\x03\0\0\0abc_", b"ANMF\x02\0\0\0ab", b"ANMF\0\0\0\0"].concat();
        assert_eq!(count(&riff), 2);
    }
}
