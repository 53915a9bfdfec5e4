//! JPEGs of every kind, complete and truncated, with every kind of trailing data.

use super::check;

/// Made by tools/golden/jpeg.py: baseline and progressive, with and without restart markers, in grey, colour with three kinds
/// of chroma subsampling, and CMYK.
const GOLDEN: &str = include_str!("../../tests/golden/jpeg.json");

fn files() -> Vec<(String, Vec<u8>)> {
    let golden: std::collections::BTreeMap<String, String> = serde_json::from_str(GOLDEN).unwrap();
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    };
    golden.iter().map(|(name, hex)| (name.clone(), bytes(hex))).collect()
}

/// Trailing data as written by phones, cameras and editors.
fn tails(image: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let film: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    vec![
        ("nothing", Vec::new()),
        ("a film", [&b"\0\0\0\x18ftypmp42"[..], &film].concat()),
        ("a second image", image.to_vec()),
        ("a truncated second image", image[..image.len() * 2 / 3].to_vec()),
        ("a camera's notes", [&b"\0\0\x01\x0a\x0e\0\0\0Image_UTC_Data"[..], &[0; 40], b"SEFT"].concat()),
        ("an end marker", vec![0xFF, 0xD9]),
        ("end markers and a start", vec![0xFF, 0xD9, 0xFF, 0xD9, 0xFF, 0xDA, 0, 8, 1]),
        ("zeros", vec![0; 5000]),
        ("text", b"cut here\n".repeat(99)),
        ("bytes of FF", vec![0xFF; 300]),
        ("a newline", b"\n".to_vec()),
        ("two newlines", b"\r\n".to_vec()),
        ("a zero", vec![0]),
        ("a few zeros", vec![0; 100]),
        ("newlines", b"\n".repeat(3000)),
        ("a line", b"saved by the camera of 1999\n".to_vec()),
        ("a line and zeros", [&b"saved by the camera of 1999\n"[..], &[0; 4000]].concat()),
        ("no more than padding", vec![0xFF]),
        ("a cut segment", b"\xFF\xE1\x40\x00Exif".to_vec()),
    ]
}

#[test]
fn a_complete_jpeg_is_accepted_with_any_tail() {
    assert_eq!(files().len(), 20);
    for (name, bytes) in files() {
        for (tail, more) in tails(&bytes) {
            assert_eq!(check(&[&bytes[..], &more].concat()), Ok(()), "{name} and {tail}");
        }
    }
}

/// The segments of a JPEG, each from the marker to the end of its declared length.
fn segments(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut all, mut at) = (Vec::new(), 2);
    while at + 4 <= bytes.len() {
        let length = usize::from(u16::from_be_bytes([bytes[at + 2], bytes[at + 3]]));
        all.push(at..at + 2 + length);
        at += 2 + length;
        while bytes[at] != 0xFF || matches!(bytes[at + 1], 0x00 | 0xD0..=0xD7) {
            at += 1;
        }
    }
    all
}

#[test]
fn a_truncated_jpeg_is_rejected_with_any_tail() {
    let mut all = 0;
    for (name, bytes) in files() {
        let segments = segments(&bytes);
        for kept in (3..bytes.len() - 2).step_by(7) {
            // A truncated segment swallows what follows it, and the rest may be a complete image.
            let in_segment = segments.iter().any(|s| (s.start + 1..s.end).contains(&kept));
            // Some cameras omit bits of the last block.
            let near = kept + 40 > bytes.len();
            for (tail, more) in tails(&bytes) {
                if near || (in_segment && !matches!(tail, "nothing" | "an end marker")) {
                    continue;
                }
                all += 1;
                let reason = check(&[&bytes[..kept], &more].concat())
                    .expect_err(&format!("{name} after {kept} and {tail}"));
                assert!(reason.contains("is cut off") || reason.contains("is damaged"), "{reason}");
            }
        }
    }
    assert!(all > 30_000, "{all}");
}

#[test]
fn the_error_for_a_truncated_jpeg_has_the_position() {
    let (_, bytes) = files().into_iter().find(|(name, _)| name == "RGB 4:4:4 baseline restart 0").unwrap();
    let scan = bytes.windows(2).position(|w| w == [0xFF, 0xDA]).unwrap();
    let middle = scan + (bytes.len() - scan) / 2;
    let reason = check(&[&bytes[..middle], &[0xFF, 0xD9]].concat()).unwrap_err();
    let part: f64 = reason.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!(
        reason.starts_with("is cut off: the JPEG's data end after ") && (40.0..60.0).contains(&part),
        "{reason}"
    );
}

#[test]
fn fill_bytes_are_accepted() {
    for (name, bytes) in files() {
        // Fill bytes before each marker after the start. Lengths and data can contain FF too, but not before these bytes.
        let mut filled = bytes[..2].to_vec();
        let mut at = 2;
        while at < bytes.len() {
            let marker = bytes[at] == 0xFF && matches!(bytes.get(at + 1), Some(0xC0..=0xC4 | 0xD9..=0xDD));
            if marker {
                filled.extend([0xFF; 3]);
            }
            filled.push(bytes[at]);
            at += 1;
        }
        assert_eq!(check(&filled), Ok(()), "{name}");
    }
}

#[test]
fn a_jpeg_without_end_marker_is_accepted_if_all_blocks_are_present() {
    for (name, bytes) in files() {
        let (image, scans) = (&bytes[..bytes.len() - 2], segments(&bytes));
        for (tail, more) in tails(&bytes) {
            let found = check(&[image, &more].concat());
            // Arbitrary bytes cannot be distinguished from blocks.
            let recognizable = !matches!(tail, "a film" | "a camera's notes");
            match found {
                Ok(()) => {}
                Err(reason) => {
                    assert!(!recognizable && reason.contains("save it again"), "{name} and {tail}: {reason}")
                }
            }
        }
        // Without its last scan it is rejected with any tail.
        let last = scans.iter().rfind(|s| bytes[s.start + 1] == 0xDA).unwrap();
        let several = scans.iter().filter(|s| bytes[s.start + 1] == 0xDA).count() > 1;
        assert_eq!(several, name.contains("progressive"), "{name}");
        for (tail, more) in tails(&bytes) {
            assert!(check(&[&bytes[..last.start], &more].concat()).is_err(), "{name} and {tail}");
        }
    }
}

#[test]
fn a_flat_jpeg_without_end_marker_is_accepted_although_its_scan_is_equal_bytes() {
    // Tables of one-bit codes: 0 for nothing, 1 (DC only) for eight bits. Then 8 x 8 blocks, of two codes each if they are
    // empty: 16 zero bytes, or one byte more if the first block is not empty.
    let table = |class: u8| [&[0xFF, 0xC4, 0, 21, class, 2][..], &[0; 15], &[0, 8]].concat();
    let header = [
        &[0xFF, 0xD8, 0xFF, 0xC0, 0, 11, 8, 0, 64, 0, 64, 1, 1, 0x11, 0][..],
        &table(0x00),
        &table(0x10),
        &[0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0],
    ]
    .concat();
    // Black, and white: a 1, eight bits, then zeros.
    for start in [&[0u8][..], &[0xFF, 0x00, 0x80]] {
        let image = |n: usize| [&header[..], start, &vec![0; n]].concat();
        for tail in [&b""[..], b"\n", b"\r\n", b"saved by the camera of 1999\n", b"\xFF\xD9"] {
            assert_eq!(check(&[&image(15)[..], tail].concat()), Ok(()), "{start:?} and {tail:?}");
            assert!(check(&[&image(11)[..], tail].concat()).is_err(), "{start:?} and {tail:?}");
        }
        // Additional zeros may hide a truncation.
        assert!(check(&image(300)).unwrap_err().contains("save it again"), "{start:?}");
    }
}

#[test]
fn random_damage_does_not_panic() {
    let mut seed = 1u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as usize
    };
    for (_, bytes) in files() {
        for _ in 0..200 {
            let mut bytes = bytes.clone();
            for _ in 0..1 + random() % 6 {
                let at = random() % bytes.len();
                bytes[at] = random() as u8;
            }
            // Either result is fine, as long as it returns.
            let _ = check(&bytes[..random() % bytes.len() + 1]);
        }
    }
    for short in [&[][..], &[0xFF], &[0xFF, 0xD8], &[0xFF, 0xD8, 0xFF], &[0xFF, 0xD8, 0xFF, 0xDA, 0, 0]] {
        assert!(check(short).is_err());
    }
}
