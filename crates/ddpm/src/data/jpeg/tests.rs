//! JPEGs of every kind, whole and cut, with every kind of tail.

use super::check;

/// Made by tools/golden/jpeg.py: baseline and progressive, with and without restart markers, grey, colour of three ways of
/// sampling, and CMYK.
const GOLDEN: &str = include_str!("../../../tests/golden/jpeg.json");

fn files() -> Vec<(String, Vec<u8>)> {
    let golden: std::collections::BTreeMap<String, String> = serde_json::from_str(GOLDEN).unwrap();
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    };
    golden.iter().map(|(name, hex)| (name.clone(), bytes(hex))).collect()
}

/// What phones, cameras and editors put behind an image.
fn tails(whole: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let film: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    vec![
        ("nothing", Vec::new()),
        ("a film", [&b"\0\0\0\x18ftypmp42"[..], &film].concat()),
        ("a second image", whole.to_vec()),
        ("a cut second image", whole[..whole.len() * 2 / 3].to_vec()),
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
fn a_whole_jpeg_is_whole_with_any_tail() {
    assert_eq!(files().len(), 20);
    for (name, bytes) in files() {
        for (tail, more) in tails(&bytes) {
            assert_eq!(check(&[&bytes[..], &more].concat()), Ok(()), "{name} and {tail}");
        }
    }
}

/// Where the segments of a JPEG stand, from the marker to the end of what its length says.
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
fn a_cut_jpeg_is_cut_off_with_any_tail() {
    let mut all = 0;
    for (name, bytes) in files() {
        let segments = segments(&bytes);
        for kept in (3..bytes.len() - 2).step_by(7) {
            // A segment that is cut swallows what follows it, and what comes then may be whole.
            let in_segment = segments.iter().any(|s| (s.start + 1..s.end).contains(&kept));
            // Of the last block some cameras leave out bits.
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
fn how_far_a_cut_jpeg_goes_is_told() {
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
fn fill_bytes_do_no_harm() {
    for (name, bytes) in files() {
        // Fill bytes before each marker behind the start; a length or data could hold FF too, but not before these.
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
fn a_jpeg_without_its_end_marker_is_whole_where_all_blocks_are_there() {
    for (name, bytes) in files() {
        let (image, scans) = (&bytes[..bytes.len() - 2], segments(&bytes));
        for (tail, more) in tails(&bytes) {
            let found = check(&[image, &more].concat());
            // Bytes of every value cannot be told from blocks.
            let told = !matches!(tail, "a film" | "a camera's notes");
            match found {
                Ok(()) => {}
                Err(reason) => {
                    assert!(!told && reason.contains("save it again"), "{name} and {tail}: {reason}")
                }
            }
        }
        // Without its last scan nothing makes it whole.
        let last = scans.iter().rfind(|s| bytes[s.start + 1] == 0xDA).unwrap();
        let several = scans.iter().filter(|s| bytes[s.start + 1] == 0xDA).count() > 1;
        assert_eq!(several, name.contains("progressive"), "{name}");
        for (tail, more) in tails(&bytes) {
            assert!(check(&[&bytes[..last.start], &more].concat()).is_err(), "{name} and {tail}");
        }
    }
}

#[test]
fn a_flat_jpeg_without_its_end_marker_is_whole_though_its_scan_is_equal_bytes() {
    // Tables of codes of one bit: 0 for nothing, of DC 1 for eight bits. Then 8 x 8 blocks, of two codes each where they are
    // blank: 16 bytes of 0, or a byte more where the first is not.
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
        // Further zeros may have taken the place of what is cut off.
        assert!(check(&image(300)).unwrap_err().contains("save it again"), "{start:?}");
    }
}

#[test]
fn no_bytes_are_too_much() {
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
            // Whatever it says, it comes back.
            let _ = check(&bytes[..random() % bytes.len() + 1]);
        }
    }
    for short in [&[][..], &[0xFF], &[0xFF, 0xD8], &[0xFF, 0xD8, 0xFF], &[0xFF, 0xD8, 0xFF, 0xDA, 0, 0]] {
        assert!(check(short).is_err());
    }
}
